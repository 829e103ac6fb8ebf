"""``python -m lesa``."""

from lesa.cli.commands import main

main()
