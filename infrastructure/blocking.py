"""A facade for programs without asyncio: the runtime lives on a loop in a thread of its own."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from types import TracebackType
from typing import Any, Self, TypeVar, cast
from uuid import UUID

from anyio.from_thread import BlockingPortal

from leftfold.application import (
    Answer,
    Command,
    DispatchError,
    EventStoreUnavailable,
    Query,
    Receipt,
    ValidationFailed,
    ViewBehind,
)
from leftfold.application.checkpoints import Comparison, DeadLetter
from leftfold.domain import Metadata, Result
from leftfold.infrastructure.errors import NotRunningError
from leftfold.infrastructure.health import Health
from leftfold.infrastructure.platform import sigterm, start_thread
from leftfold.infrastructure.runtime import Runtime
from leftfold.infrastructure.upkeep import Retried, Told, untold

T = TypeVar("T")
E = TypeVar("E")


class BlockingCommands:
    """The command bus, called from threads; see `CommandBus`."""

    def __init__(self, facade: BlockingRuntime) -> None:
        self._facade = facade

    def dispatch(
        self,
        command: Command[T, E],
        *,
        command_id: UUID | None = None,
        metadata: Metadata | None = None,
        consistency: Sequence[str] = (),
    ) -> Result[T, E | DispatchError]:
        """Carry out a command."""
        bus = self._facade.runtime.commands
        return self._facade.call(
            lambda: bus.dispatch(
                command, command_id=command_id, metadata=metadata, consistency=consistency
            )
        )

    def dispatch_all(
        self,
        commands: Sequence[Command[T, E]],
        *,
        command_ids: Sequence[UUID] | None = None,
        metadata: Metadata | None = None,
        consistency: Sequence[str] = (),
    ) -> Result[tuple[T, ...], E | DispatchError]:
        """Carry out several commands in one transaction, all or none."""
        bus = self._facade.runtime.commands
        return self._facade.call(
            lambda: bus.dispatch_all(
                commands, command_ids=command_ids, metadata=metadata, consistency=consistency
            )
        )

    def parse(
        self, name: str, data: Mapping[str, object] | str | bytes
    ) -> Result[Command[Any, Any], ValidationFailed]:
        """Make a command from outside input."""
        return self._facade.runtime.commands.parse(name, data)


class BlockingQueries:
    """The query bus, called from threads; see `QueryBus`."""

    def __init__(self, facade: BlockingRuntime) -> None:
        self._facade = facade

    def dispatch(
        self, query: Query[T, E], *, after: Receipt | None = None
    ) -> Result[T, E | DispatchError]:
        """Answer a query."""
        bus = self._facade.runtime.queries
        return self._facade.call(lambda: bus.dispatch(query, after=after))

    def answer(
        self, query: Query[T, E], *, after: Receipt, timeout: float | None = None
    ) -> Result[Answer[T], E | DispatchError]:
        """Answer a query, from older views if need be; see `QueryBus.answer`."""
        bus = self._facade.runtime.queries
        return self._facade.call(lambda: bus.answer(query, after=after, timeout=timeout))

    def parse(
        self, name: str, data: Mapping[str, object] | str | bytes
    ) -> Result[Query[Any, Any], ValidationFailed]:
        """Make a query from outside input."""
        return self._facade.runtime.queries.parse(name, data)


class BlockingRuntime:
    """A runtime for threads: `with runtime.blocking() as shop: shop.commands.dispatch(…)`."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.commands = BlockingCommands(self)
        self.queries = BlockingQueries(self)
        self._owner = os.getpid()
        self._loop: _Loop | None = None

    def wait_for(
        self,
        receipt: Receipt,
        projections: Iterable[str] | None = None,
        timeout: float | None = None,
    ) -> Result[None, ViewBehind | EventStoreUnavailable]:
        """Wait until views have seen what a command wrote; see `Runtime.wait_for`."""
        return self.call(lambda: self.runtime.wait_for(receipt, projections, timeout))

    def catch_up(
        self, timeout: float | None = None
    ) -> Result[None, ViewBehind | EventStoreUnavailable]:
        """Wait until all views have seen what the log holds now; see `Runtime.catch_up`."""
        return self.call(lambda: self.runtime.catch_up(timeout))

    def forget(self, subject: str) -> bool:
        """Erase a subject's personal data; see `Runtime.forget`."""
        return self.call(lambda: self.runtime.forget(subject))

    def dead_letters(self, name: str) -> tuple[DeadLetter, ...]:
        """Return what a reader of the log could not take in; see `Runtime.dead_letters`."""
        return self.call(lambda: self.runtime.dead_letters(name))

    def retry(self, name: str) -> Retried:
        """Take in what was put aside; see `Runtime.retry`."""
        return self.call(lambda: self.runtime.retry(name))

    def drop_dead_letters(self, name: str, position: int | None = None) -> int:
        """Give up what was put aside; see `Runtime.drop_dead_letters`."""
        return self.call(lambda: self.runtime.drop_dead_letters(name, position))

    def rebuild(self, name: str, told: Told = untold) -> Comparison:
        """Build a view anew beside itself; see `Runtime.rebuild`."""
        return self.call(lambda: self.runtime.rebuild(name, told))

    def provide_keys(self, subjects: Iterable[str]) -> None:
        """Make keys for subjects that have none; see `Runtime.provide_keys`."""
        return self.call(lambda: self.runtime.provide_keys(subjects))

    def purge_receipts(self) -> int:
        """Delete old receipts; see `Runtime.purge_receipts`."""
        return self.call(self.runtime.purge_receipts)

    def health(self) -> Health:
        """Tell how the runtime is."""
        return self.runtime.health()

    def call(self, function: Callable[[], Awaitable[T]]) -> T:
        """Await on the runtime's loop what a function returns. Raises `NotRunningError`."""
        _ = self.runtime.commands  # raises in a child process, where the loop's thread is not
        if self._loop is None:
            raise NotRunningError
        return self._loop.portal.call(function)

    def __enter__(self) -> Self:
        """Open the runtime; raises what `Runtime.open` does."""
        self._owner = os.getpid()
        self._loop = loop = _Loop()
        opening = loop.portal.start_task_soon(self.runtime.open)
        try:
            opening.result()
        except BaseException:
            opening.cancel()  # if it was this thread that was interrupted
            self._close(loop)
            raise
        sigterm.settle()  # only now, if this is the main thread
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if os.getpid() != self._owner:
            return  # a child by fork: the loop's thread is the parent's
        if self._loop is not None:
            self._close(self._loop)
        sigterm.settle()

    def _close(self, loop: _Loop) -> None:
        try:
            loop.portal.call(self.runtime.close)
        finally:
            self._loop = None
            loop.stop()


class _Loop:
    """An event loop in a thread.

    No generator holds it open: collected in a child by fork, it would wait for the thread, which
    only the parent has.
    """

    def __init__(self) -> None:
        ready: Future[BlockingPortal] = Future()
        self._thread, ended = start_thread(lambda: asyncio.run(self._live(ready)))
        wait(cast("list[Future[Any]]", [ready, ended]), return_when=FIRST_COMPLETED)
        if ended.done():
            ended.result()  # raises why there is no loop
        self.portal = ready.result()

    def stop(self) -> None:
        """End the loop when its calls are answered."""
        try:
            self.portal.call(self.portal.stop)
        finally:
            self._thread.join()

    async def _live(self, ready: Future[BlockingPortal]) -> None:
        async with BlockingPortal() as portal:
            ready.set_result(portal)
            await portal.sleep_until_stopped()
