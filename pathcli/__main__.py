"""Run the command line: `python -m pathcli`."""

from pathcli.cli import main

main()
