"""``python -m lesa``."""

from lesa.cli import main

main()
