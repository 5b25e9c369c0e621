"""The commands about views, and about what could not be taken into them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from leftfold.application import Comparison, DeadLetter, InvalidModelError
from leftfold.application.checkpoints import full_name
from leftfold.application.items import shop_model
from leftfold.infrastructure.cli.common import (
    FAILURE,
    AsJson,
    Named,
    Store,
    complete,
    kept_in,
    model_of,
    open_shop,
)
from leftfold.infrastructure.cli.output import (
    complain,
    progress,
    say,
    show_facts,
    show_json,
    show_table,
)
from leftfold.infrastructure.health import ProjectionHealth
from leftfold.infrastructure.upkeep import Retried

MEASURED = 2.0
"""Seconds in which it is seen how quickly others get on: in each one there is a look."""
Name = Annotated[str, typer.Argument(help="The view's name, or the process's.")]


class _ListingGroup(TyperGroup):
    """Lists if no command is named."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or (args[0].startswith("-") and args[0] not in ctx.help_option_names):
            args = ["list", *args]
        return super().parse_args(ctx, args)


app = typer.Typer()
projections = typer.Typer(
    cls=_ListingGroup, help="Show how far views and processes are, or see to one."
)
app.add_typer(projections, name="projections")


@projections.command("list")
def list_(store: Store, model: Named = "", as_json: AsJson = False) -> None:
    """Show how far they are, and how quickly they get on; this is done if no command is named."""
    served = model_of(model) or kept_in(store)

    async def run() -> tuple[ProjectionHealth, ...]:
        async with open_shop(store, served, follow=False) as shop:
            if any(found.lag and not found.failure for found in shop.health().projections):
                await asyncio.sleep(MEASURED)
            return shop.health().projections

    columns = ("name", "version", "state", "position", "lag", "rate", "dead_letters", "failure")
    rows = [{name: getattr(each, name) for name in columns} for each in complete(run())]
    if as_json:
        show_json(rows)
    else:
        show_table("Projections", columns, [[row[name] for name in columns] for row in rows])


@projections.command()
def rebuild(name: Name, store: Store, model: Named = "", as_json: AsJson = False) -> None:
    """Build a view anew beside itself, and mend its rows; run it again to go on."""
    served = model_of(model) or kept_in(store)

    async def run() -> Comparison:
        with progress("events") as tell:
            # What is built anew has a table of its own.
            async with open_shop(store, served, follow=False, create_tables=True) as shop:
                with _named_by_user():
                    return await shop.rebuild(name, lambda at, head: tell("folding", at, head))

    compared = complete(run())
    if as_json:
        show_json(asdict(compared))
    else:
        show_facts(f"Rows of {name}", list(asdict(compared).items()))


@projections.command()
def drop(
    name: Name,
    version: Annotated[int, typer.Argument(min=1, help="One that no program keeps any more.")],
    store: Store,
    model: Named = "",
) -> None:
    """Delete an old version of a view, with its rows."""
    served = model_of(model) or kept_in(store)

    async def run() -> None:
        async with open_shop(store, served, follow=False) as shop:
            with _named_by_user():
                await shop.drop_version(name, version)

    complete(run())
    say(f"{full_name(name, version)} was dropped.")


@app.command()
def dead_letters(
    name: Name,
    store: Store,
    model: Named = "",
    drop: Annotated[
        int | None,
        typer.Option(min=1, help="Give up the event at this position.", show_default=False),
    ] = None,
    drop_all: Annotated[bool, typer.Option("--drop-all", help="Give up all of them.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show the events that a view or process could not take in, or give them up."""
    if drop is not None and drop_all:
        raise typer.BadParameter("--drop is one event, and --drop-all are all")
    served = model_of(model) or kept_in(store)

    async def run() -> int | tuple[DeadLetter, ...]:
        async with open_shop(store, served, follow=False) as shop:
            with _named_by_user():
                if drop is not None or drop_all:
                    return await shop.drop_dead_letters(name, drop)
                return await shop.dead_letters(name)

    found = complete(run())
    if isinstance(found, int):
        if as_json:
            show_json({"dropped": found})
        else:
            say(f"{found} events were given up.")
        return
    columns = ("position", "key", "topic", "version", "error", "parked_at")
    rows = [{column: getattr(letter, column) for column in columns} for letter in found]
    if as_json:
        show_json(rows)
    else:
        show_table(f"Dead letters of {name}", columns, [list(row.values()) for row in rows])


@app.command()
def retry(name: Name, store: Store, model: Named = "", as_json: AsJson = False) -> None:
    """Take in what was put aside; exit code 1 if some of it stays."""
    served = model_of(model) or kept_in(store)

    async def run() -> Retried:
        async with open_shop(store, served, follow=False) as shop:
            with _named_by_user():
                return await shop.retry(name)

    retried = complete(run())
    if as_json:
        show_json(asdict(retried))
    else:
        say(f"{retried.released} events were taken in, {retried.kept} stay.")
    if retried.kept:
        complain(f"{retried.kept} events stay: leftfold dead-letters {name}")
        raise typer.Exit(FAILURE)


@app.command()
def graph(model: Named = "", as_json: AsJson = False) -> None:
    """Show who reads whose events, as a Mermaid flowchart."""
    shown = model_of(model) or shop_model
    if not as_json:
        say(shown.graph())
        return
    system = shown.system()
    show_json({"nodes": system.nodes, "edges": system.edges})


@contextmanager
def _named_by_user() -> Iterator[None]:
    """Tell of a name that there is not as of wrong use: here it is no fault of the program."""
    try:
        yield
    except InvalidModelError as error:
        raise typer.BadParameter(error.reason) from None
