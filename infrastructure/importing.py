"""Importing a shop's sales: every invoice once, however often the import is run or killed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from tempfile import TemporaryFile
from typing import TypeAlias
from uuid import NAMESPACE_URL, UUID, uuid5

from leftfold.application import DispatchError, Receipt
from leftfold.application.items import (
    FindItems,
    ItemCommand,
    ItemRow,
    RecordInvoice,
    RegisterItem,
)
from leftfold.domain import Err, LeftfoldError, Metadata, Result
from leftfold.domain.items import ItemAlreadyRegistered, ItemError
from leftfold.infrastructure.errors import InfrastructureError
from leftfold.infrastructure.platform import SystemPlatform
from leftfold.infrastructure.retail import Row, Survey, invoice_of, read_runs, survey
from leftfold.infrastructure.runtime import Runtime

BATCH_ROWS = 8_000
"""Rows after which a transaction is full; an invoice is never split."""
BREATH, PAUSE = 0.004, 0.0005
"""Seconds in which whole runs are read in one go, and for which others go on then."""
CATCH_UP_TIMEOUT = 600.0
"""Seconds that the view may need for what is left after the last invoice."""

Progress: TypeAlias = Callable[[str, int, int], None]
"""Told what is being done, and how many rows of how many are done."""
Runs: TypeAlias = Iterator[tuple[int, str, list[Row]]]
Identified: TypeAlias = tuple[UUID, ItemCommand | RecordInvoice]
Answers: TypeAlias = Result[tuple[Receipt, ...], ItemError | DispatchError]


class ImportStoppedError(
    InfrastructureError,
    message="stopped after {rows} of {total} rows: {reason}; "
    "what was committed stays: run it again to go on",
):
    """The import could not go on; it may be run again."""

    rows: int
    total: int
    reason: str


@dataclass(frozen=True, slots=True)
class Refused:
    """An invoice that the domain refused."""

    invoice: str
    line: int
    """Where its run begins in the file."""
    reason: str


@dataclass(frozen=True, slots=True)
class Summary:
    """What a file holds and where it left the items; `None` customers and all.

    Counts of rows first, then sums over the file's items, in pieces.
    """

    rows: int
    sales: int
    returns: int
    write_offs: int
    receipts: int
    skipped: int
    odd: int
    items: int
    units_sold: int
    units_returned: int
    units_written_off: int
    units_received: int
    opening_stock: int
    on_hand: int
    revenue: Decimal
    skipped_by_code: dict[str, int]
    odd_rows: tuple[tuple[int, str], ...]
    """Line and reason."""
    refused: tuple[Refused, ...]


async def import_sales(
    runtime: Runtime, path: Path, progress: Progress = lambda *_: None
) -> Summary:
    """Import a file, or the rest of it.

    Every invoice run is a command of its own whose id follows from the file's text and the run's
    number. Runs share transactions, but none is split. So an import that was killed goes on
    where it was, and a finished one changes nothing.
    Raises `DamagedFileError` before anything is written, and `ImportStoppedError`.
    """
    return await _Import(runtime, path, progress).run()


class _Import:
    def __init__(self, runtime: Runtime, path: Path, progress: Progress) -> None:
        self._runtime = runtime
        self._path = path
        self._progress = progress
        self._platform = SystemPlatform()
        self._refused: list[Refused] = []
        self._rows = 0

    async def run(self) -> Summary:
        with closing(self._platform), TemporaryFile(prefix="leftfold-") as text:
            self._text = text
            self._progress("reading", 0, 0)
            found = await self._platform.in_thread(survey, self._path, text)
            self._namespace = uuid5(NAMESPACE_URL, f"leftfold:import:{found.digest}")
            self._first_id = _first_id(found.digest)
            self._metadata = Metadata(correlation_id=f"import:{found.digest[:16]}")
            await self._provide_keys(found)
            await self._register(found)
            await self._record(found)
            self._runtime.follow()
            (await self._runtime.catch_up(CATCH_UP_TIMEOUT)).unwrap()
            return await self._sum_up(found)

    async def _provide_keys(self, found: Survey) -> None:
        try:
            await self._runtime.provide_keys(found.customers)
        except LeftfoldError as error:
            self._stop(found, error)

    async def _register(self, found: Survey) -> None:
        commands: list[Identified] = [
            (
                uuid5(self._namespace, f"item:{sku}"),
                RegisterItem(
                    sku=sku,
                    name=product.name or sku,
                    unit_price=product.unit_price,
                    opening_stock=product.opening_stock,
                    occurred_at=product.first_seen,
                ),
            )
            for sku, product in found.products.items()
        ]
        for begin in range(0, len(commands), BATCH_ROWS):
            batch = commands[begin : begin + BATCH_ROWS]
            answers = await self._dispatch_all(batch)
            if isinstance(answers, Err):
                for command in batch:
                    answer = await self._dispatch_all([command])
                    if isinstance(answer, Err) and not isinstance(
                        answer.error, ItemAlreadyRegistered
                    ):
                        self._stop(found, answer.error)

    async def _record(self, found: Survey) -> None:
        runs = read_runs(self._path.name, self._text)
        batch = await self._read(runs)
        while batch.commands:
            dispatched = self._platform.spawn(self._record_batch(found, batch))
            batch_after = await self._read(runs)
            await dispatched
            batch = batch_after
            self._progress("importing", self._rows, found.rows)

    async def _read(self, runs: Runs) -> _Batch:
        """Read the next batch, in the pauses of the one before: while the database commits that.

        In a thread it would compete with the handlers, and hold up what commits.
        """
        batch = _Batch()
        pause_at = 0.0
        for number, invoice, rows in runs:
            if rows:
                command = invoice_of(invoice, rows)
                batch.add(UUID(int=self._first_id + number), command, rows[0].line, rows[-1].line)
            if batch.rows >= BATCH_ROWS:
                break
            if self._platform.monotonic() >= pause_at:
                await self._platform.sleep(PAUSE)
                pause_at = self._platform.monotonic() + BREATH
        return batch

    async def _record_batch(self, found: Survey, batch: _Batch) -> None:
        answers = await self._dispatch_all(batch.commands)
        if isinstance(answers, Err):
            if isinstance(answers.error, DispatchError):
                self._stop(found, answers.error)
            for (command_id, command), line in zip(batch.commands, batch.lines, strict=True):
                answer = await self._dispatch_all([(command_id, command)])
                if isinstance(answer, Err):
                    if isinstance(answer.error, DispatchError):
                        self._stop(found, answer.error)
                    assert isinstance(command, RecordInvoice)  # noqa: S101 - what batches hold
                    self._refused.append(Refused(command.invoice, line, str(answer.error)))
        self._rows = batch.end

    async def _dispatch_all(self, batch: list[Identified]) -> Answers:
        ids = [command_id for command_id, _ in batch]
        return await self._runtime.commands.dispatch_all(
            [c for _, c in batch], command_ids=ids, metadata=self._metadata
        )

    def _stop(self, found: Survey, error: Exception) -> None:
        raise ImportStoppedError(self._rows, found.rows, str(error))

    async def _sum_up(self, found: Survey) -> Summary:
        rows: list[ItemRow] = []
        cursor: str | None = None
        while True:
            query = FindItems(limit=1_000, cursor=cursor)
            page = (await self._runtime.queries.dispatch(query)).unwrap()
            rows += [row for row in page.rows if row.sku in found.products]
            cursor = page.next
            if cursor is None:
                break
        return Summary(
            rows=found.rows,
            sales=found.kinds["sale"],
            returns=found.kinds["return"],
            write_offs=found.kinds["write_off"],
            receipts=found.kinds["receipt"],
            skipped=found.skipped.total(),
            odd=len(found.odd),
            items=len(rows),
            units_sold=sum(row.units_sold for row in rows),
            units_returned=sum(row.units_returned for row in rows),
            units_written_off=sum(row.units_written_off for row in rows),
            units_received=sum(row.units_received for row in rows),
            opening_stock=sum(row.opening_stock for row in rows),
            on_hand=sum(row.on_hand for row in rows),
            revenue=sum((row.revenue for row in rows), Decimal(0)),
            skipped_by_code=dict(found.skipped.most_common()),
            odd_rows=tuple(found.odd),
            refused=tuple(self._refused),
        )


class _Batch:
    """Invoice runs that share a transaction."""

    def __init__(self) -> None:
        self.commands: list[Identified] = []
        self.lines: list[int] = []
        self.rows = 0
        self.end = 0

    def add(self, command_id: UUID, command: RecordInvoice, first: int, last: int) -> None:
        self.commands.append((command_id, command))
        self.lines.append(first)
        self.rows += len(command.lines)
        self.end = last - 1  # the header is line 1


def _first_id(digest: str) -> int:
    """Return the id of a file's first run; the others follow it, so that an index grows at its end.

    RFC 9562, version 8: 60 bits of the digest, and 62 for the run's number.
    """
    return int(digest[:12], 16) << 80 | 8 << 76 | int(digest[12:15], 16) << 64 | 2 << 62
