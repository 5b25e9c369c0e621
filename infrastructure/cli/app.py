"""The commands, each a thin layer over a runtime, of the Item model if no other is named."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from leftfold.application import ValidationFailed
from leftfold.application.items import FindItems, ItemRow, item_model, shop_model
from leftfold.domain import InvalidSpecification, LeftfoldError, Result, Specification
from leftfold.infrastructure.cli import projections
from leftfold.infrastructure.cli.common import (
    FAILURE,
    INTERRUPTED,
    WRONG_USE,
    AsJson,
    Named,
    Store,
    complete,
    kept_in,
    model_of,
    open_shop,
)
from leftfold.infrastructure.cli.output import (
    ReaderGoneError,
    complain,
    mend_output,
    progress,
    say,
    show_facts,
    show_json,
    show_table,
)
from leftfold.infrastructure.errors import InvalidSettingsError
from leftfold.infrastructure.importing import Summary, import_sales
from leftfold.infrastructure.items import open_items
from leftfold.infrastructure.keyring import Keyring
from leftfold.infrastructure.runtime import Runtime
from leftfold.infrastructure.settings import load_settings
from leftfold.infrastructure.simulation import write_shop
from leftfold.infrastructure.stores import make_store
from leftfold.infrastructure.stores.keys import make_keys
from leftfold.infrastructure.stores.memory import MemoryStore

T = TypeVar("T")

FOLLOWER_ENDS = 20.0
"""Seconds that an import waits for the process that folds beside it."""

Keys = Annotated[
    str,
    typer.Option(
        "--keys",
        envvar="LEFTFOLD_KEYS",
        help="Where the keys of personal data are kept, if not near the store.",
        show_default=False,
        show_envvar=True,
    ),
]
Sku = Annotated[str, typer.Argument(help="The item's SKU, as it is written.")]
Order = Annotated[str, typer.Option(help="A column's name; with - before it, descending.")]

app = typer.Typer(
    name="leftfold",
    help="Event-sourced stock-keeping: the reference model of leftfold.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(projections.app)


@app.command()
def demo(
    store: Annotated[
        str, typer.Option("--store", help="Keep the shop there.", show_default=False)
    ] = "",
    seed: Annotated[int, typer.Option(help="Another seed is another shop.")] = 1,
    days: Annotated[int, typer.Option(min=1, max=3_650, help="Days of sales.")] = 90,
    as_json: AsJson = False,
) -> None:
    """Simulate a small shop, import its sales, and ask a few questions."""
    with tempfile.TemporaryDirectory(prefix="leftfold-") as folder:
        path = Path(folder) / "shop.csv"
        write_shop(path, seed=seed, days=days)
        url = store or f"sqlite:///{folder}/shop.db"

        async def run() -> tuple[Summary, tuple[ItemRow, ...]]:
            async with open_items(url) as shop:
                with progress() as tell:
                    summary = await import_sales(shop, path, tell)
                best = await shop.queries.dispatch(FindItems(order="-revenue", limit=5))
                return summary, best.unwrap().rows

        summary, best = complete(run())
    if as_json:
        show_json(_summary(summary))
        return
    say(f"A simulated shop, {days} days, imported on {'the store' if store else 'SQLite'}.")
    _show_summary(summary)
    _show_items("Best sellers", best)
    if not store:
        say("Keep it and look around: leftfold demo --store sqlite:///shop.db")


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="A .csv, .csv.gz or .csv.xz file.")],
    store: Store,
    as_json: AsJson = False,
) -> None:
    """Import a shop's sales in the UCI Online Retail format; run it again to go on."""
    if not file.is_file():
        raise typer.BadParameter(f"there is no file {file}")

    async def run() -> Summary:
        settings = load_settings(store=store, follow=False)
        async with open_items(settings=settings) as shop:
            # The views are folded on another processor, and here only what that has left.
            with _following(settings.store), progress() as tell:
                return await import_sales(shop, file, tell)

    summary = complete(run())
    if as_json:
        show_json(_summary(summary))
        return
    _show_summary(summary)
    for code, count in summary.skipped_by_code.items():
        say(f"skipped\t{code}\t{count}")
    for line, reason in summary.odd_rows:
        say(f"line {line}: {reason}")
    if summary.refused:
        complain(f"{len(summary.refused)} invoices were refused, and nothing of them recorded")
    for refused in summary.refused:
        say(f"line {refused.line}: invoice {refused.invoice} was refused: {refused.reason}")


@app.command()
def items(
    store: Store,
    order: Order = "sku",
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="Rows to show.")] = 20,
    cursor: Annotated[str, typer.Option(help="Where to go on.", show_default=False)] = "",
    where: Annotated[
        str, typer.Option(help="Only these: \"on_hand < 10 and name contains 'HEART'\".")
    ] = "always",
    as_json: AsJson = False,
) -> None:
    """List items."""

    async def run() -> Any:
        async with open_shop(store) as shop:
            (await shop.catch_up()).unwrap()
            wanted = _specification(where)
            query = FindItems(where=wanted, order=order, limit=limit, cursor=cursor or None)
            return _unwrap(await shop.queries.dispatch(query))

    page = complete(run())
    if as_json:
        show_json({"rows": [asdict(row) for row in page.rows], "next": page.next})
        return
    _show_items("Items", page.rows)
    if page.next:
        complain(f"there are more: --cursor {page.next}")


@app.command()
def show(sku: Sku, store: Store, as_json: AsJson = False) -> None:
    """Show one item."""

    async def run() -> ItemRow:
        async with open_shop(store) as shop:
            (await shop.catch_up()).unwrap()
            row: ItemRow = _unwrap(await shop.queries.dispatch(_query(shop, "GetItem", sku)))
            return row

    row = complete(run())
    if as_json:
        show_json(asdict(row))
    else:
        show_facts(
            row.sku, [(name.replace("_", " "), value) for name, value in asdict(row).items()]
        )


@app.command()
def events(sku: Sku, store: Store, as_json: AsJson = False) -> None:
    """Show all that happened to one item."""

    async def run() -> Any:
        async with open_shop(store) as shop:
            return _unwrap(await shop.queries.dispatch(_query(shop, "ItemHistory", sku)))

    history = complete(run())
    if as_json:
        show_json([event.model_dump() for event in history])
        return
    rows = []
    for event in history:
        facts = dict(event.payload)
        occurred = facts.pop("occurred_at")
        told = ", ".join(f"{name}={value}" for name, value in facts.items() if value is not None)
        rows.append((event.version, occurred, event.event_type.rpartition(".")[2], told))
    show_table(f"Events of {sku}", ("version", "occurred_at", "event", "facts"), rows)


@app.command()
def follow(
    store: Store,
    model: Named = "",
    reorders: Annotated[
        bool, typer.Option("--reorders", help="Open and close reorders, too.")
    ] = False,
    while_input: Annotated[bool, typer.Option("--while-input", hidden=True)] = False,
) -> None:
    """Keep the views up to date, until it is interrupted."""
    own = model_of(model)
    if own is not None and reorders:
        raise typer.BadParameter("--reorders are the shop's, and --model is another")
    if reorders:
        kept_in(store)  # the process may be new to the store, which itself has to be there
        runtime = open_shop(store, shop_model, create_tables=None)
    else:
        runtime = open_shop(store, own or item_model)

    async def run() -> None:
        async with runtime as shop:
            shop.follow()
            if while_input:
                await asyncio.to_thread(sys.stdin.read)
            else:
                await asyncio.Event().wait()

    complete(run())


@app.command()
def forget(
    subject: Annotated[
        str, typer.Argument(help="Whom, as events name it: of the shop a customer's id.")
    ],
    store: Store,
    keys: Keys = "",
    model: Named = "",
    as_json: AsJson = False,
) -> None:
    """Erase all personal data about somebody, for good."""
    served = model_of(model) or item_model

    async def run() -> tuple[bool, float]:
        async with open_shop(store, served, keys=keys or None, follow=False) as shop:
            return await shop.forget(subject), shop.settings.forget_within

    found, seconds = complete(run())
    if as_json:
        show_json({"forgotten": found})
    elif found:
        say(f"Erased; in programs that run now within {seconds:g} s.")
    else:
        say("There is nothing to erase.")


@app.command()
def purge(store: Store, model: Named = "", as_json: AsJson = False) -> None:
    """Delete receipts that are old enough (LEFTFOLD_RECEIPTS_KEPT, in seconds)."""
    served = model_of(model) or item_model

    async def run() -> int:
        async with open_shop(store, served, follow=False) as shop:
            return await shop.purge_receipts()

    purged = complete(run())
    if as_json:
        show_json({"purged": purged})
    else:
        say(f"{purged} receipts were deleted.")


@app.command()
def migrate(store: Store, keys: Keys = "", model: Named = "") -> None:
    """Make the tables that are missing, also those of keys, so that programs need no right to."""
    served = model_of(model) or shop_model
    settings = load_settings(store=store, keys=keys or None)
    opened, keyring = make_store(settings), Keyring(make_keys(settings), settings.forget_within)
    with closing(opened), closing(keyring):
        opened.open(served.stored_readers, create_tables=True)
        keyring.open(create_tables=True)
        keyring.provide(())  # it makes the file
    say(f"{opened.name} is ready")


def run() -> int:
    """Run the command line and return its exit code."""
    mend_output()
    usage_error: Any = typer.BadParameter.__base__  # typer brings its own, or click's
    try:
        code = app(standalone_mode=False)
        sys.stdout.flush()
    except usage_error as error:
        if message := " ".join(error.format_message().split()):  # none after the help alone
            complain(message)
        return WRONG_USE
    except (InvalidSettingsError, ValidationFailed) as error:
        complain(str(error))
        return WRONG_USE
    except LeftfoldError as error:
        complain(str(error))
        return FAILURE
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except (ReaderGoneError, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 0
    except OSError as error:
        complain(f"cannot write: {error.strerror}")
        return FAILURE
    if code == INTERRUPTED:  # typer makes an exit of Ctrl-C
        complain("interrupted; what was committed stays")
    return code if isinstance(code, int) else 0


@contextmanager
def _following(store: str) -> Iterator[None]:
    """Let another process keep the views up to date; it ends with this one, however that ends."""
    if store == MemoryStore.name:
        yield
        return
    command = [sys.executable, "-m", "leftfold.infrastructure.cli", "follow", "--while-input"]
    # The store is no argument, which others could read; the model is the shop's, whatever is set.
    environment = {**os.environ, "LEFTFOLD_STORE": store, "LEFTFOLD_MODEL": ""}
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment,
    ) as follower:
        yield
        try:
            follower.communicate(timeout=FOLLOWER_ENDS)
        except subprocess.TimeoutExpired:
            follower.kill()  # a page that it was at is folded by who comes next


def _specification(sentence: str) -> Specification[ItemRow]:
    try:
        return Specification.parse(sentence)
    except InvalidSpecification as error:
        reason = error.reason.partition("\n")[0]  # the rest points at the place with a caret
        raise ValidationFailed("--where", ((error.where, reason),)) from None


def _query(shop: Runtime, name: str, sku: str) -> Any:
    return shop.queries.parse(name, {"sku": sku}).unwrap()


def _unwrap(result: Result[T, Any]) -> T:
    value: T = result.unwrap()
    return value


def _summary(summary: Summary) -> dict[str, object]:
    return {field.name: getattr(summary, field.name) for field in fields(summary)}


def _show_summary(summary: Summary) -> None:
    facts = [
        (name, value)
        for name, value in _summary(summary).items()
        if not isinstance(value, dict | tuple)
    ]
    facts.append(("refused", len(summary.refused)))
    show_facts("Imported", facts)


def _show_items(title: str, rows: tuple[ItemRow, ...]) -> None:
    columns = ("sku", "name", "unit_price", "on_hand", "units_sold", "units_returned", "revenue")
    show_table(title, columns, [[getattr(row, name) for name in columns] for row in rows])
