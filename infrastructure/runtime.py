"""The runtime: wires a model to a store, and runs it."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from eventsourcing.persistence import PersistenceError

from leftfold.application import (
    CommandBus,
    Dispatch,
    EventMapper,
    EventStoreUnavailable,
    InvalidModelError,
    KeysUnavailable,
    Middleware,
    Model,
    QueryBus,
    Receipt,
    ViewBehind,
)
from leftfold.application.admission import Admission
from leftfold.application.bus import Outcome, Step
from leftfold.application.execution import Execution
from leftfold.application.middleware import conflict_retry, logged, timeout
from leftfold.application.ports import Store
from leftfold.application.reading import answer
from leftfold.domain import Err, Ok, Result
from leftfold.infrastructure.access import StoreAccess
from leftfold.infrastructure.errors import ForkedRuntimeError, NotRunningError
from leftfold.infrastructure.follower import Follower
from leftfold.infrastructure.health import Health, ProjectionHealth, Watched
from leftfold.infrastructure.keyring import Keyring
from leftfold.infrastructure.platform import PATIENCE, SystemPlatform, at_work, sigterm
from leftfold.infrastructure.resilience import CircuitState
from leftfold.infrastructure.settings import Settings, load_settings
from leftfold.infrastructure.stores import SharedLog, make_store
from leftfold.infrastructure.stores.keys import make_keys
from leftfold.infrastructure.views import FollowedViews, StoredHistories

if TYPE_CHECKING:
    from leftfold.infrastructure.blocking import BlockingRuntime
    from leftfold.infrastructure.telemetry import Telemetry

_log = logging.getLogger("leftfold.runtime")

PURGE_INTERVAL = 3_600.0
"""Seconds between purges."""
PURGED_AT_ONCE = 1_000
"""Receipts deleted in one transaction."""
REFRESHES = 4
"""How often what was forgotten is asked for before all that is at hand is distrusted."""


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
        watched: Sequence[Watched] = (),
        telemetry: Telemetry | None = None,
    ) -> None:
        """Prepare to run a model.

        `store` is `memory:`, `sqlite:///path` or `postgresql://…`; without it `settings`, and
        without them the environment (`LEFTFOLD_STORE`) decide. `middleware` goes around both
        buses, outside of the runtime's own; `watched` are breakers and caches to tell the health
        of; `telemetry` is told of commands, queries and pages. Raises `InvalidSettingsError`.
        """
        if settings is None:
            self.settings = load_settings(store=store)
        elif store is None:
            self.settings = settings
        else:
            self.settings = settings.model_copy(update={"store": store})
        self.model = model
        self._middleware = tuple(middleware)
        self._watched = tuple(watched)
        self._telemetry = telemetry
        self._store = make_store(self.settings)
        self._keyring = Keyring(make_keys(self.settings), self.settings.forget_within)
        self._owner = os.getpid()
        self._platform: SystemPlatform | None = None  # from the beginning of open to close's end
        self._parts: _Parts | None = None
        self._closing: asyncio.Task[None] | None = None

    @property
    def commands(self) -> CommandBus:
        """The bus for commands. Raises `NotRunningError`, `ForkedRuntimeError`."""
        return self._opened.commands

    @property
    def queries(self) -> QueryBus:
        """The bus for queries. Raises `NotRunningError`, `ForkedRuntimeError`."""
        return self._opened.queries

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
        followers = list(self._followers.values())
        if projections is not None:
            names = set(projections)
            unknown = names - {p.name for p in self.model.projections}
            if unknown:
                raise InvalidModelError(f"there is no projection {', '.join(sorted(unknown))}")
            followers = [f for f in followers if f.projection.name in names]
        return await self._wait(followers, receipt.position, timeout)

    async def catch_up(
        self, timeout: float | None = None
    ) -> Result[None, ViewBehind | EventStoreUnavailable]:
        """Wait until all views have seen what the log holds now; like `wait_for`.

        Answers `Err(EventStoreUnavailable)` if the database cannot be asked.
        """
        parts = self._opened
        try:
            head = await parts.access.read(self._store.log.head)
        except EventStoreUnavailable as error:
            return Err(error)
        return await self._wait(parts.followers.values(), head, timeout)

    async def forget(self, subject: str) -> bool:
        """Erase a subject's personal data; tell whether there was any.

        The key that it is sealed under is deleted. What is in this process is erased when this
        returns, in every other process after the setting `forget_within` (seconds): in events,
        histories, snapshots, views, caches and receipts. What the program has made of `reveal()`
        is its own: a plain text in a row, an answer or another event stays. Raises
        `KeysUnavailable`, and `InvalidSubject` for what can be nobody's name.
        """
        return await self._opened.platform.in_thread(self._keyring.forget, subject)

    async def provide_keys(self, subjects: Iterable[str]) -> None:
        """Make keys for subjects that have none, in few transactions.

        Nobody has to: each is made when it is needed. It spares much waiting before an import.
        Raises `InvalidSubject`, `KeysUnavailable`.
        """
        await self._opened.platform.in_thread(self._keyring.provide, subjects)

    async def purge_receipts(self) -> int:
        """Delete the receipts that are older than the setting `receipts_kept`; return how many.

        An open runtime does it by itself every hour. Raises `EventStoreUnavailable`.
        """
        return await self._opened.purge(self.settings.receipts_kept)

    def health(self) -> Health:
        """Tell how the runtime is, without asking the database."""
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
        breaker = self._opened.access.breaker
        is_healthy = breaker.state is CircuitState.CLOSED and all(
            p.failure is None for p in projections
        )
        parts = tuple(part.health() for part in (breaker, *self._watched))
        return Health(self._store.name, is_healthy, projections, parts)

    async def __aenter__(self) -> Self:
        """Open the runtime; see `open`."""
        return await self.open()

    async def open(self) -> Self:
        """Open the store and follow its log, until `close`; `async with` does both.

        What it opened is closed again if it fails or is cancelled. Raises
        `StoreUnavailableError`, `SchemaMissingError`, `SchemaVersionError`, `ViewChangedError`.
        """
        if self._platform is not None:
            raise InvalidModelError("this runtime is open already")
        self._owner = os.getpid()
        self._platform = platform = SystemPlatform()
        telemetry = self._telemetry
        async with AsyncExitStack() as undo:
            undo.callback(self._forget)
            undo.push_async_callback(platform.close_then, self._close_stores)
            await platform.in_thread(self._open_store)
            self._parts = _Parts(
                self.model,
                self.settings,
                self._store,
                platform,
                self._factory(),
                self._keyring,
                (self._guard, *self._middleware),
                telemetry,
            )
            undo.pop_all()
        if telemetry is not None:
            parts = self.health().parts
            telemetry.watch(self.health, {part.kind: part.counters for part in parts})
        if self.settings.follow:
            self.follow()
        if self.settings.drain_on_sigterm:
            sigterm.add(self._begin_close)
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
        for follower in self._followers.values():
            follower.folds = True
            follower.wake()

    async def close(self) -> None:
        """Finish the commands, queries and pages under way, refuse new ones, and close the store.

        They get a little longer than `command_timeout`; what hangs is left behind. Closing goes
        on if the caller is cancelled, and another call waits for it.
        """
        if os.getpid() != self._owner:
            return  # a child by fork: the store is the parent's to close
        self._begin_close()
        if self._closing is not None:
            await asyncio.shield(self._closing)
        await sigterm.wait()

    def _begin_close(self) -> None:
        if self._closing is None and self._parts is not None:
            self._closing = self._parts.platform.spawn(self._close(self._parts))

    async def _close(self, parts: _Parts) -> None:
        async with AsyncExitStack() as last:  # from its end to its beginning, whatever happens
            last.callback(sigterm.discard, self._begin_close)
            last.callback(self._forget)
            last.push_async_callback(parts.platform.close_then, self._close_stores)
            last.push_async_callback(parts.stop)
            await parts.drain(self.settings.command_timeout + PATIENCE)
            self._parts = None

    def _forget(self) -> None:
        self._platform = self._parts = self._closing = None

    @property
    def _opened(self) -> _Parts:
        self._check_owner()
        if self._parts is None:
            raise NotRunningError
        return self._parts

    @property
    def _followers(self) -> Mapping[str, Follower[Any]]:
        return self._opened.followers

    async def _wait(
        self, followers: Iterable[Follower[Any]], position: int, timeout: float | None
    ) -> Result[None, ViewBehind]:
        seconds = self.settings.view_timeout if timeout is None else timeout
        try:
            await asyncio.gather(*(f.wait_for(position, seconds) for f in followers))
        except ViewBehind as behind:
            return Err(behind)
        return Ok(None)

    def _check_owner(self) -> None:
        if os.getpid() != self._owner:
            raise ForkedRuntimeError(self._owner)

    async def _guard(self, dispatch: Dispatch[Any], call_next: Step) -> Outcome:
        self._check_owner()
        return await call_next(dispatch)

    def _open_store(self) -> None:
        self._store.open(
            self.model.projections, create_tables=self.settings.create_tables, keys=self._keyring
        )
        self._keyring.open(create_tables=self.settings.create_tables)

    def _close_stores(self) -> None:
        self._keyring.close()
        self._store.close()

    def _factory(self) -> SharedLog:
        settings = self.settings
        env = {
            "COMPRESSOR_TOPIC": settings.compressor_topic,
            "CIPHER_TOPIC": settings.cipher_topic,
            "CIPHER_KEY": settings.cipher_key.get_secret_value(),
        }
        return SharedLog(self._store.log, self._keyring, env)


class _Parts:
    """What a runtime consists of while it is open. Its store is open before, and closed after."""

    def __init__(
        self,
        model: Model,
        settings: Settings,
        store: Store,
        platform: SystemPlatform,
        factory: SharedLog,
        keyring: Keyring,
        middleware: Sequence[Middleware],
        telemetry: Telemetry | None,
    ) -> None:
        self.platform = platform
        self._store = store
        self._keyring = keyring
        self._forget_within = settings.forget_within
        mapper = factory.mapper(mapper_class=model.mapper_class())
        assert isinstance(mapper, EventMapper)  # noqa: S101 - made of that class
        self.mapper = mapper
        self._poll_interval = settings.poll_interval
        self._store_timeout = settings.store_timeout
        self.followers: dict[str, Follower[Any]] = {
            projection.table: Follower(
                projection,
                store.log,
                store.views,
                mapper,
                platform,
                settings.page_size,
                settings.poll_interval,
                *(() if telemetry is None else (telemetry.page,)),
            )
            for projection in model.projections
        }
        self.access = StoreAccess(
            store.log,
            platform,
            commit=store.committing(),
            name=store.name,
            patience=settings.lock_timeout,
        )
        around = (*middleware, logged(platform))
        if telemetry is not None:
            around = (telemetry.around, *around)
        self._execution = Execution(
            store.log,
            mapper,
            platform,
            self.access,
            memory=settings.memory,
            snapshots=model.snapshots,
            committed=self._wake,
        )
        self._admission = Admission(settings.max_commands, self._execution.waiting)
        self.commands = CommandBus(
            (
                *around,
                self._admission,
                timeout(settings.command_timeout),
                conflict_retry(platform, settings.conflict_attempts),
            ),
            self._execution,
            platform.new_id,
        )
        self._services = [service(store=factory) for service in model.services]
        for service in self._services:
            self.commands.add(*service.handlers())
        self._asking = Admission()
        self.queries = QueryBus((*around, self._asking), partial(_answer, platform))
        views = FollowedViews(store, self.followers, self.access, settings.view_timeout)
        histories = StoredHistories(store, mapper, self.access)
        for query_service in model.queries:
            self.queries.add(*query_service(views, histories).handlers())
        self._following = [platform.spawn(f.run()) for f in self.followers.values()]
        self._watching = platform.spawn(self._watch())
        self._housekeeping = (
            platform.spawn(self._cut()),
            platform.spawn(self._forget()),
            platform.spawn(self._purge(settings.receipts_kept)),
        )

    async def drain(self, seconds: float) -> None:
        """Finish commands, then queries, which commands may need; each within some seconds."""
        await _within(seconds, self._admission.drain())
        await _within(seconds, self._execution.drain())
        await _within(seconds, self._asking.drain())

    async def stop(self) -> None:
        """Finish the pages under way, and listen no more."""
        for follower in self.followers.values():
            follower.stop()
        self._watching.cancel()
        await _within(PATIENCE, asyncio.wait((*self._following, self._watching)))
        for task in self._housekeeping:
            task.cancel()

    def _wake(self) -> None:
        for follower in self.followers.values():
            follower.wake()

    async def _cut(self) -> None:
        """Cut off calls that hang, whatever else hangs."""
        while True:
            await self.platform.sleep(self._store_timeout / 10)
            self._store.cut(self._store_timeout)
            self._keyring.cut(self._store_timeout)

    async def _forget(self) -> None:
        """Learn what other processes have forgotten."""
        while True:
            await self.platform.sleep(self._forget_within / REFRESHES)
            try:
                await self.platform.in_thread(self._keyring.refresh)
            except KeysUnavailable as error:
                _log.warning("%s", error)

    async def _purge(self, kept: float) -> None:
        """Delete receipts that are old enough, now and then."""
        while True:
            await self.platform.sleep(min(PURGE_INTERVAL, kept))
            try:
                await self.purge(kept)
            except (EventStoreUnavailable, PersistenceError) as error:
                _log.warning("receipts are not purged: %s", error)

    async def purge(self, kept: float) -> int:
        purged = 0
        while True:
            found = await self.access.read(self._store.log.purge, kept, PURGED_AT_ONCE)
            purged += found
            if found < PURGED_AT_ONCE:
                return purged

    async def _watch(self) -> None:
        """Wake the followers when another process wrote; a hint only, which may be lost."""
        loop, store = asyncio.get_running_loop(), self._store
        listening: int | None = None

        def hear() -> None:
            nonlocal listening
            if not store.heard() and listening is not None:
                loop.remove_reader(listening)
                listening = None
            self._wake()

        try:
            while True:
                if listening is None:
                    with _no_hints():
                        descriptor = await self.platform.in_thread(store.listen)
                        if descriptor is not None:
                            loop.add_reader(descriptor, hear)  # not on every system's loop
                            listening = descriptor
                with _no_hints():
                    is_deaf = listening is None and store.hints
                    with at_work:
                        is_hint = is_deaf or store.has_changed()
                    if is_hint:
                        self._wake()
                await self.platform.sleep(self._poll_interval)
        finally:
            if listening is not None:
                loop.remove_reader(listening)


async def _answer(platform: SystemPlatform, dispatch: Dispatch[Any]) -> Outcome:
    """Answer a query, a blocking one in a thread."""
    handling = dispatch.handling
    if handling.blocking:
        blocking: Callable[[Any], Any] = handling.handler
        in_thread = partial(platform.in_own_thread, blocking)
        dispatch = dispatch._replace(handling=replace(handling, handler=in_thread))
    return await answer(dispatch)


async def _within(seconds: float, work: Awaitable[object]) -> None:
    """Wait for something at most some seconds, and then go on without it."""
    try:
        async with asyncio.timeout(seconds):
            await work
    except TimeoutError:
        _log.warning("something hangs for %.0f s; closing goes on without it", seconds)


@contextmanager
def _no_hints() -> Iterator[None]:
    """Go on without hints: the followers look at the log by themselves."""
    try:
        yield
    except Exception:  # noqa: BLE001 - whatever the driver raises, hints are not needed
        return
