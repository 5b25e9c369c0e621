"""`python -m leftfold.infrastructure.cli`: the command where no script is installed."""

from leftfold.infrastructure.cli import main

main()
