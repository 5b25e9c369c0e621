"""Commands as processes of their own, each forked from one that has imported the program."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from leftfold.infrastructure import cli

TIMEOUT = 60.0  # seconds

# Most of what a command takes is to import: half a second, a hundred times over.
_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["leftfold.infrastructure.cli.app"])


def carry_out(
    arguments: Sequence[str], environment: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """Run `leftfold` to its end."""
    with TemporaryDirectory(prefix="leftfold-") as folder:
        output, errors = Path(folder) / "output", Path(folder) / "errors"
        process = _forks.Process(target=_run, args=(arguments, dict(environment), output, errors))
        process.start()
        process.join(TIMEOUT)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(list(arguments), TIMEOUT)
        return subprocess.CompletedProcess(
            list(arguments), process.exitcode, output.read_text(), errors.read_text()
        )


def _run(
    arguments: Sequence[str], environment: Mapping[str, str], output: Path, errors: Path
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for number, path in enumerate((output, errors), 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    sys.argv = ["leftfold", *arguments]
    cli.main()
