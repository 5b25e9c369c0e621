"""The reference model, wired."""

from __future__ import annotations

from collections.abc import Sequence

from leftfold.application import Middleware
from leftfold.application.items import item_model
from leftfold.infrastructure.health import Watched
from leftfold.infrastructure.runtime import Runtime
from leftfold.infrastructure.settings import Settings


def open_items(
    store: str | None = None,
    *,
    settings: Settings | None = None,
    middleware: Sequence[Middleware] = (),
    watched: Sequence[Watched] = (),
) -> Runtime:
    """Return a runtime of the Item model; enter it with `async with`, or `with ….blocking()`."""
    return Runtime(item_model, store, settings=settings, middleware=middleware, watched=watched)
