"""What the command shows: tables on a terminal, plain text in a pipe, JSON for programs."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from decimal import Decimal
from io import TextIOWrapper
from pathlib import Path
from typing import TypeAlias

from pydantic_core import to_json
from rich.console import Console, JustifyMethod
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

Told: TypeAlias = Callable[[str, int, int], None]


class ReaderGoneError(Exception):
    """The program that read our output has seen enough, as `| head` has."""


class _Rate(ProgressColumn):
    """So many a second."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.0f} {self._unit}/s" if speed else "")


def mend_output() -> None:
    """Make standard output take any text, also where it is closed or knows few characters."""
    if sys.stdout is None:  # closed by `>&-`
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - to the end
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def show_json(document: object) -> None:
    """Print a document as JSON; decimals as numbers' exact text."""
    _write(to_json(document, indent=2, fallback=str).decode() + "\n")


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print rows: a table on a terminal, tab-separated lines with a header in a pipe."""
    if not sys.stdout.isatty():
        for row in (columns, *rows):
            _write("\t".join(_plain(value) for value in row) + "\n")
        return
    table = Table(title=escape(_harmless(title)), title_justify="left")
    samples = rows[0] if rows else [""] * len(columns)
    for index, (column, sample) in enumerate(zip(columns, samples, strict=True)):
        is_number = isinstance(sample, int | float | Decimal) and not isinstance(sample, bool)
        justify: JustifyMethod = "right" if is_number else "left"
        header = column.replace("_", " ")
        table.add_column(header, justify=justify, overflow="fold", no_wrap=not index)
    for row in rows:
        table.add_row(*(Text(_nice(value)) for value in row))
    Console().print(table)


def show_facts(title: str, facts: Sequence[tuple[str, object]]) -> None:
    """Print names and values: a table on a terminal, `name<TAB>value` lines in a pipe."""
    if not sys.stdout.isatty():
        for name, value in facts:
            _write(f"{name}\t{_plain(value)}\n")
        return
    table = Table(title=escape(_harmless(title)), title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in facts:
        table.add_row(name, Text(_nice(value)))
    Console().print(table)


def say(line: str) -> None:
    """Print a line."""
    _write(line + "\n")


def complain(line: str) -> None:
    """Print a line to standard error."""
    sys.stderr.write(f"leftfold: {_harmless(' '.join(line.split()))}\n")


@contextmanager
def progress(unit: str = "rows") -> Iterator[Told]:
    """Show a bar with rate and time left on a terminal, and nothing in a pipe."""
    if not sys.stderr.isatty():
        yield lambda *_: None
        return
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(unit),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    with bar:
        task = bar.add_task("reading", total=None)
        doing = "reading"
        (shown,) = bar.tasks

        def tell(what: str, done: int, total: int) -> None:
            nonlocal doing
            if what != doing:
                doing = what
                bar.reset(task, total=total or None, description=what)
            shown.total = total or None  # not by `update`, which would forget the rate
            bar.update(task, completed=done)

        yield tell


def _write(text: str) -> None:
    try:
        sys.stdout.write(text)
    except BrokenPipeError:  # typer would make a failure of it
        raise ReaderGoneError from None


def _plain(value: object) -> str:
    match value:
        case None:
            return ""
        case datetime():
            return value.isoformat()
        case float():
            return str(round(value, 3))
        case _:
            return _harmless(str(value))


def _harmless(text: str) -> str:
    """Show control characters as escapes: they would break lines, or command the terminal."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == " " else ascii(c)[1:-1] for c in text)


def _nice(value: object) -> str:
    match value:
        case None:
            return "–"
        case bool():
            return "yes" if value else "no"
        case int() | Decimal():
            return f"{value:,}"
        case float():
            return f"{value:,.1f}"
        case datetime():
            return f"{value:%Y-%m-%d %H:%M}"
        case _:
            return _harmless(str(value))
