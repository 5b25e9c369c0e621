"""What the commands share: their options, how they open the shop, and how they run."""

from __future__ import annotations

import asyncio
import gc
import sys
from collections.abc import Coroutine
from contextlib import closing
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from leftfold.application import Model
from leftfold.application.items import item_model, reorder_watch, shop_model
from leftfold.infrastructure.errors import SchemaMissingError
from leftfold.infrastructure.runtime import Runtime
from leftfold.infrastructure.settings import load_settings
from leftfold.infrastructure.stores import make_store

T = TypeVar("T")

WRONG_USE = 2
FAILURE = 1
INTERRUPTED = 130

Store = Annotated[
    str,
    typer.Option(
        "--store",
        envvar="LEFTFOLD_STORE",
        help="sqlite:///path or postgresql://…",
        show_default=False,
        show_envvar=True,
    ),
]
Named = Annotated[
    str,
    typer.Option(
        "--model",
        envvar="LEFTFOLD_MODEL",
        help="A model of your own, as package.module:name, instead of the shop's.",
        show_default=False,
        show_envvar=True,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


def open_shop(store: str, model: Model = item_model, **settings: object) -> Runtime:
    """Return a runtime on a store that is there: one that is not is a mistake, and not made."""
    given = {"create_tables": False, **settings}
    return Runtime(model, settings=load_settings(store=store, **given))


def model_of(named: str) -> Model | None:
    """Return the model of this name, from what is installed or in this folder; None for no name."""
    if not named:
        return None
    module, _, name = named.partition(":")
    sys.path.insert(0, str(Path.cwd()))  # as `python -m` does
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise typer.BadParameter(f"--model {named}: {error}") from None
    if not isinstance(found, Model):
        raise typer.BadParameter(f"--model {named}: this is no Model")
    return found


def kept_in(store: str) -> Model:
    """Return what a store keeps: the shop with reorders, if it has had any.

    Raises `SchemaMissingError` for a store that is not there.
    """
    opened = make_store(load_settings(store=store))
    with closing(opened):
        try:
            opened.open(shop_model.readers, create_tables=False)
        except SchemaMissingError as error:
            if error.table != reorder_watch.table:
                raise
            return item_model
    return shop_model


def complete(work: Coroutine[Any, Any, T]) -> T:
    """Run a command's work to its end."""
    # This process is all leftfold's: events come and go by the hundred thousand, in no cycles.
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)
    return asyncio.run(work)
