"""The `leftfold` command."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; exit code 2 for wrong use, 1 for failure, each with one line."""
    try:
        from leftfold.infrastructure.cli.app import run
    except ImportError as error:
        if error.name is None or error.name.partition(".")[0] not in {"rich", "typer"}:
            raise
        print("leftfold: the command line needs: pip install 'leftfold[cli]'", file=sys.stderr)  # noqa: T201 - nothing nicer is installed
        sys.exit(1)
    sys.exit(run())
