"""The benchmarked problems: for each operation and shape the same call by every provider."""
