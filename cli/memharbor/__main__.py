"""Run the command line as `python -m memharbor`."""

from memharbor.commands import main

main()
