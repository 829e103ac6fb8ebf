"""The command line: ``lesa``, or ``python -m lesa``."""
