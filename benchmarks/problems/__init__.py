"""What is measured: for each operation the same call made by every provider, on any shape."""
