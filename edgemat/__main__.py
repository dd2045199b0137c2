"""``python -m edgemat``: the command line."""

from edgemat.cli import main

main()
