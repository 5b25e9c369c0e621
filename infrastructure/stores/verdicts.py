"""What views say to events, and what a page does with the verdict on its own."""

from __future__ import annotations

from eventsourcing.persistence import IntegrityError, OperationalError

from leftfold.application.errors import DispatchError
from leftfold.application.ports import Committed, Failed, Verdict
from leftfold.domain import LeftfoldError


def is_written(verdict: Verdict) -> bool:
    """Tell whether events were written; if not, the page is folded again.

    Raises what refuses them, `IntegrityError` if no more is known, and `OperationalError` for a
    store that failed.
    """
    if isinstance(verdict, Failed):
        if verdict.refusal is not None:
            raise verdict.refusal
        raise (IntegrityError if verdict.is_refusal else OperationalError)(verdict.reason)
    return isinstance(verdict, Committed)


def refused(error: LeftfoldError) -> Failed:
    """Return the verdict on events that an inline view does not take."""
    refusal = error if isinstance(error, DispatchError) else None
    return Failed(str(error), is_refusal=True, refusal=refusal)
