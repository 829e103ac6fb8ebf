"""LESA itself: its configuration, its mathematics, its files, and the memory of its variant without a table."""
