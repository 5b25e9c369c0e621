"""What stores know of readers of the log: how they were defined, and that they may be gone."""

from __future__ import annotations

from leftfold.application.checkpoints import Checkpoint, Reader
from leftfold.infrastructure.errors import ViewChangedError

ABSENT = Checkpoint(0, is_built=False)
"""Stands for a reader that was dropped: nobody can hold it, and no page of it is written."""


def check_unchanged(reader: Reader, columns: str, found: tuple[str, str]) -> None:
    """Compare a reader with what is stored of it: its columns, and what it reads.

    Raises `ViewChangedError`. Nothing is known of what older releases read.
    """
    now = (columns, reader.reads)
    for then, this in zip(found, now, strict=True):
        if then not in (this, ""):
            raise ViewChangedError(f"{reader.name}_v{reader.version}", then, this)
