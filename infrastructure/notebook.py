"""Looking inside from a notebook: histories and views as pandas frames."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from leftfold.domain import DomainEvent
from leftfold.infrastructure.errors import MissingPackageError

if TYPE_CHECKING:
    import pandas as pd


def history_frame(history: Iterable[DomainEvent]) -> pd.DataFrame:
    """Return one row an event, by version: when it occurred, its name, and its facts as columns.

    Raises `MissingPackageError` without pandas.
    """
    rows = [
        {
            "version": event.version,
            "occurred_at": event.payload["occurred_at"],
            "event": event.event_type.rpartition(".")[2],
            **{name: value for name, value in event.payload.items() if name != "occurred_at"},
        }
        for event in history
    ]
    columns = None if rows else ["version", "occurred_at", "event"]
    frame: pd.DataFrame = _pandas().DataFrame(rows, columns=columns).set_index("version")
    return frame


def rows_frame(rows: Iterable[object]) -> pd.DataFrame:
    """Return one row a row of a view. Raises `MissingPackageError` without pandas."""
    facts = [asdict(row) for row in rows]  # type: ignore[call-overload]  # rows are dataclasses
    frame: pd.DataFrame = _pandas().DataFrame(facts)
    return frame


def _pandas() -> Any:
    try:
        import pandas as pd
    except ImportError:
        raise MissingPackageError("a frame", "notebooks") from None
    return pd
