"""A facade for programs without asyncio: the runtime lives on a loop in a thread of its own."""

from __future__ import annotations

import os
import signal
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from types import FrameType, TracebackType
from typing import Any, Self, TypeVar
from uuid import UUID

from anyio.from_thread import BlockingPortal, start_blocking_portal

from leftfold.application import (
    Command,
    DispatchError,
    Query,
    Receipt,
    ValidationFailed,
    ViewBehind,
)
from leftfold.domain import Result
from leftfold.infrastructure.errors import NotRunningError
from leftfold.infrastructure.runtime import Health, Runtime

T = TypeVar("T")
E = TypeVar("E")


class BlockingCommands:
    """The command bus, called from threads; see `CommandBus`."""

    def __init__(self, facade: BlockingRuntime) -> None:
        self._facade = facade

    def dispatch(
        self, command: Command[T, E], *, command_id: UUID | None = None
    ) -> Result[T, E | DispatchError]:
        """Carry out a command."""
        bus = self._facade.runtime.commands
        return self._facade.call(lambda: bus.dispatch(command, command_id=command_id))

    def dispatch_all(
        self, commands: Sequence[Command[T, E]], *, command_ids: Sequence[UUID] | None = None
    ) -> Result[tuple[T, ...], E | DispatchError]:
        """Carry out several commands in one transaction, all or none."""
        bus = self._facade.runtime.commands
        return self._facade.call(lambda: bus.dispatch_all(commands, command_ids=command_ids))

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
        self._stack: ExitStack | None = None
        self._portal: BlockingPortal | None = None

    def wait_for(
        self,
        receipt: Receipt,
        projections: Iterable[str] | None = None,
        timeout: float | None = None,
    ) -> Result[None, ViewBehind]:
        """Wait until views have seen what a command wrote; see `Runtime.wait_for`."""
        return self.call(lambda: self.runtime.wait_for(receipt, projections, timeout))

    def catch_up(self, timeout: float | None = None) -> Result[None, ViewBehind]:
        """Wait until all views have seen what the log holds now."""
        return self.call(lambda: self.runtime.catch_up(timeout))

    def health(self) -> Health:
        """Tell how the runtime is."""
        return self.runtime.health()

    def call(self, function: Callable[[], Awaitable[T]]) -> T:
        """Await on the runtime's loop what a function returns. Raises `NotRunningError`."""
        _ = self.runtime.commands  # raises in a child process, where the loop's thread is not
        if self._portal is None:
            raise NotRunningError
        return self._portal.call(function)

    def __enter__(self) -> Self:
        """Open the runtime; raises what `Runtime.open` does."""
        self._owner = os.getpid()
        with ExitStack() as stack:
            self._portal = stack.enter_context(start_blocking_portal())
            stack.enter_context(self._portal.wrap_async_context_manager(self.runtime))
            self._stack = stack.pop_all()
        if self.runtime.settings.drain_on_sigterm:
            self._catch_sigterm()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if os.getpid() != self._owner:
            return  # a child by fork: the loop's thread is the parent's
        self._release_sigterm()
        if self._stack is not None:
            stack, self._stack = self._stack, None
            stack.close()
        self._portal = None

    def _catch_sigterm(self) -> None:
        self._has_sigterm = False
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            try:
                signal.signal(signal.SIGTERM, self._on_sigterm)
            except ValueError:
                return  # not the main thread: the program's own affair
            self._has_sigterm = True

    def _release_sigterm(self) -> None:
        if getattr(self, "_has_sigterm", False):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            self._has_sigterm = False

    def _on_sigterm(self, _number: int, _frame: FrameType | None) -> None:
        self._release_sigterm()
        self.call(self.runtime.close)
        os.kill(os.getpid(), signal.SIGTERM)
