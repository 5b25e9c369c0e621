"""The runtime: wires a model to a store, and runs it."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from pydantic import TypeAdapter

from leftfold.application import (
    CommandBus,
    Dispatch,
    EventMapper,
    InvalidModelError,
    Middleware,
    Model,
    QueryBus,
    Receipt,
    Service,
    ViewBehind,
)
from leftfold.application.bus import Outcome, Step
from leftfold.application.execution import Execution
from leftfold.application.middleware import conflict_retry, logged, timeout
from leftfold.application.reading import answer
from leftfold.domain import Err, Ok, Result
from leftfold.infrastructure.errors import ForkedRuntimeError, NotRunningError
from leftfold.infrastructure.follower import Follower
from leftfold.infrastructure.platform import SystemPlatform
from leftfold.infrastructure.settings import Settings, load_settings
from leftfold.infrastructure.stores import SharedLog, make_store
from leftfold.infrastructure.views import FollowedViews, StoredHistories

if TYPE_CHECKING:
    from leftfold.infrastructure.blocking import BlockingRuntime


B = TypeVar("B", CommandBus, QueryBus)


@dataclass(frozen=True, slots=True)
class ProjectionHealth:
    """How far one view is. Positions are the log's."""

    name: str
    version: int
    position: int
    lag: int
    """Positions behind the log's end, as of the last look."""
    failure: str | None
    """Why it stopped, if it did."""


@dataclass(frozen=True, slots=True)
class Health:
    """How a runtime is."""

    store: str
    """The store's URL, with no password."""
    is_healthy: bool
    """It is open and no projection stopped."""
    projections: tuple[ProjectionHealth, ...]


class Runtime:
    """Runs a model on a store.

        async with Runtime(model, store="sqlite:///shop.db") as shop:
            receipt = (await shop.commands.dispatch(SellStock(...))).unwrap()
            row = (await shop.queries.dispatch(GetItem(sku="A"), after=receipt)).unwrap()

    Several runtimes, in one process or in many, may share a store; one in memory is alone.
    """

    def __init__(
        self,
        model: Model,
        store: str | None = None,
        *,
        settings: Settings | None = None,
        middleware: Sequence[Middleware] = (),
    ) -> None:
        """Prepare to run a model.

        `store` is `memory:`, `sqlite:///path` or `postgresql://…`; without it `settings`, and
        without them the environment (`LEFTFOLD_STORE`) decide. `middleware` goes around both
        buses, outside of the runtime's own. Raises `InvalidSettingsError`.
        """
        if settings is None:
            self.settings = load_settings(store=store)
        elif store is None:
            self.settings = settings
        else:
            self.settings = settings.model_copy(update={"store": store})
        self.model = model
        self._middleware = tuple(middleware)
        self._store = make_store(self.settings)
        self._commands: CommandBus | None = None
        self._queries: QueryBus | None = None
        self._owner = os.getpid()
        self._dying: asyncio.Task[None] | None = None

    @property
    def commands(self) -> CommandBus:
        """The bus for commands. Raises `NotRunningError`, `ForkedRuntimeError`."""
        return self._opened(self._commands)

    @property
    def queries(self) -> QueryBus:
        """The bus for queries. Raises `NotRunningError`, `ForkedRuntimeError`."""
        return self._opened(self._queries)

    def blocking(self) -> BlockingRuntime:
        """Return a facade for programs without asyncio."""
        from leftfold.infrastructure.blocking import BlockingRuntime

        return BlockingRuntime(self)

    async def wait_for(
        self,
        receipt: Receipt,
        projections: Iterable[str] | None = None,
        timeout: float | None = None,
    ) -> Result[None, ViewBehind]:
        """Wait until views have seen what a command wrote: the named ones, or all.

        Answers `Err(ViewBehind)` after `timeout` seconds (default: the setting `view_timeout`),
        and `Err(ViewStopped)` at once for a view that cannot go on. Raises `InvalidModelError`
        for a name that the model does not have.
        """
        self._opened(self._commands)
        names = None if projections is None else set(projections)
        unknown = (names or set()) - {p.name for p in self.model.projections}
        if unknown:
            raise InvalidModelError(f"there is no projection {', '.join(sorted(unknown))}")
        seconds = self.settings.view_timeout if timeout is None else timeout
        followers = [
            f for f in self._followers.values() if names is None or f.projection.name in names
        ]
        try:
            await asyncio.gather(*(f.wait_for(receipt.position, seconds) for f in followers))
        except ViewBehind as behind:
            return Err(behind)
        return Ok(None)

    async def catch_up(self, timeout: float | None = None) -> Result[None, ViewBehind]:
        """Wait until all views have seen what the log holds now; like `wait_for`."""
        self._opened(self._commands)
        head = await self._platform.in_thread(self._store.log.head)
        return await self.wait_for(Receipt(self._platform.new_id(), (), head), timeout=timeout)

    def health(self) -> Health:
        """Tell how the runtime is, without asking the database."""
        self._opened(self._commands)
        projections = tuple(
            ProjectionHealth(
                follower.projection.name,
                follower.projection.version,
                follower.position,
                max(0, follower.head - follower.position),
                None if follower.failure is None else str(follower.failure),
            )
            for follower in self._followers.values()
        )
        is_healthy = all(p.failure is None for p in projections)
        return Health(self._store.name, is_healthy, projections)

    async def __aenter__(self) -> Self:
        """Open the runtime; see `open`."""
        return await self.open()

    async def open(self) -> Self:
        """Open the store and follow its log, until `close`; `async with` does both.

        Raises `StoreUnavailableError`, `SchemaMissingError`, `SchemaVersionError`,
        `ViewChangedError`.
        """
        if self._commands is not None:
            raise InvalidModelError("this runtime is open already")
        self._owner = os.getpid()
        self._loop = asyncio.get_running_loop()
        self._platform = SystemPlatform()
        try:
            await self._platform.in_thread(self._open_store)
        except BaseException:
            self._platform.close()
            raise
        log = self._store.log
        mapper = self._make_mapper()
        self._followers = {
            projection.table: Follower(
                projection, log, self._store.views, mapper, self._platform, self.settings.page_size
            )
            for projection in self.model.projections
        }
        self._execution = Execution(
            log,
            mapper,
            self._platform,
            memory=self.settings.memory,
            committed=self._wake,
        )
        self._services = [self._make_service(service) for service in self.model.services]
        self._commands = self._make_command_bus()
        self._queries = self._make_query_bus(mapper)
        if self.settings.follow:
            self.follow()
        self._following = [self._platform.spawn(f.run()) for f in self._followers.values()]
        self._watching = self._platform.spawn(self._watch())
        if self.settings.drain_on_sigterm:
            self._catch_sigterm()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    def follow(self) -> None:
        """Begin to keep the views up to date in this process, if it does not yet."""
        self._opened(self._commands)
        for follower in self._followers.values():
            follower.folds = True
            follower.wake()

    async def close(self) -> None:
        """Finish the commands and pages under way, refuse new ones, and close the store."""
        if os.getpid() != self._owner:
            return  # a child by fork: the store is the parent's to close
        if self._dying is not None and asyncio.current_task() is not self._dying:
            await asyncio.shield(self._dying)  # the signal ends the process
        if self._commands is None:
            return
        await self._execution.drain()
        self._commands = self._queries = None
        for follower in self._followers.values():
            follower.stop()
        await asyncio.gather(*self._following)
        self._watching.cancel()
        await asyncio.gather(self._watching, return_exceptions=True)
        self._release_sigterm()
        await self._platform.in_thread(self._store.close)
        self._platform.close()

    def _opened(self, bus: B | None) -> B:
        if os.getpid() != self._owner:
            raise ForkedRuntimeError(self._owner)
        if bus is None:
            raise NotRunningError
        return bus

    def _open_store(self) -> None:
        self._store.open(self.model.projections, create_tables=self.settings.create_tables)

    def _make_mapper(self) -> EventMapper:
        factory = SharedLog(self._store.log)
        mapper = factory.mapper(mapper_class=self.model.mapper_class())
        assert isinstance(mapper, EventMapper)  # noqa: S101 - made of that class
        return mapper

    def _make_service(self, service: type[Service]) -> Service:
        return service(store=SharedLog(self._store.log))

    def _make_command_bus(self) -> CommandBus:
        settings, platform = self.settings, self._platform
        bus = CommandBus(
            (
                self._guard,
                *self._middleware,
                logged(platform),
                timeout(settings.command_timeout),
                conflict_retry(platform, settings.conflict_attempts),
            ),
            self._execution,
            platform.new_id,
        )
        for service in self._services:
            bus.add(*service.handlers())
        return bus

    def _make_query_bus(self, mapper: EventMapper) -> QueryBus:
        store, platform = self._store, self._platform
        views = FollowedViews(store, self._followers, platform, self.settings.view_timeout)
        histories = StoredHistories(store, mapper, platform)
        bus = QueryBus((self._guard, *self._middleware, logged(platform)), answer)
        for service in self.model.queries:
            bus.add(*service(views, histories).handlers())
        return bus

    async def _guard(self, dispatch: Dispatch[Any], call_next: Step) -> Outcome:
        if os.getpid() != self._owner:
            raise ForkedRuntimeError(self._owner)
        return await call_next(dispatch)

    def _wake(self) -> None:
        for follower in self._followers.values():
            follower.wake()

    async def _watch(self) -> None:
        """Wake the followers when another process wrote; a hint only, which may be lost."""
        listening: int | None = None

        def hear() -> None:
            nonlocal listening
            if not self._store.heard() and listening is not None:
                self._loop.remove_reader(listening)
                listening = None
            self._wake()

        try:
            while True:
                if listening is None:
                    with _no_hints():
                        descriptor = await self._platform.in_thread(self._store.listen)
                        if descriptor is not None:
                            self._loop.add_reader(descriptor, hear)  # not on every system's loop
                            listening = descriptor
                with _no_hints():
                    is_deaf = listening is None and self._store.hints
                    if is_deaf or self._store.has_changed():
                        self._wake()
                await self._platform.sleep(self.settings.poll_interval)
        finally:
            if listening is not None:
                self._loop.remove_reader(listening)

    def _catch_sigterm(self) -> None:
        self._has_sigterm = False
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            try:
                self._loop.add_signal_handler(signal.SIGTERM, self._on_sigterm)
            except (NotImplementedError, RuntimeError, ValueError):
                return  # not the main thread, or Windows: the program's own affair
            self._has_sigterm = True

    def _release_sigterm(self) -> None:
        if getattr(self, "_has_sigterm", False):
            self._loop.remove_signal_handler(signal.SIGTERM)
            self._has_sigterm = False

    def _on_sigterm(self) -> None:
        self._dying = self._loop.create_task(self._drain_and_die())

    async def _drain_and_die(self) -> None:
        await self.close()
        os.kill(os.getpid(), signal.SIGTERM)  # its handler is the system's again


@contextmanager
def _no_hints() -> Iterator[None]:
    """Go on without hints: the followers look at the log by themselves."""
    try:
        yield
    except Exception:  # noqa: BLE001 - whatever the driver raises, hints are not needed
        return


def dump_health(health: Health) -> str:
    """Return a runtime's health as JSON."""
    return TypeAdapter(Health).dump_json(health, indent=2).decode()
