"""The runtime: wires a model to a store, and runs it."""

from __future__ import annotations

import asyncio
import logging
import math
import os
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager, suppress
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
from leftfold.application.bus import Batch, Outcome, Step
from leftfold.application.checkpoints import Comparison, DeadLetter
from leftfold.application.execution import Execution
from leftfold.application.middleware import conflict_retry, logged, timeout
from leftfold.application.ports import Heard, Store
from leftfold.application.reading import answer
from leftfold.domain import Err, Ok, Result
from leftfold.infrastructure.access import StoreAccess
from leftfold.infrastructure.errors import (
    ForkedRuntimeError,
    NotRunningError,
    StoreUnavailableError,
)
from leftfold.infrastructure.follower import Followed, Follower, unheard
from leftfold.infrastructure.health import Health, Watched
from leftfold.infrastructure.keyring import Keyring
from leftfold.infrastructure.pages import Fold, InlineViews, Pages
from leftfold.infrastructure.platform import PATIENCE, SystemPlatform, at_work, sigterm
from leftfold.infrastructure.resilience import CircuitState
from leftfold.infrastructure.settings import Settings, load_settings
from leftfold.infrastructure.stores import SharedLog, make_store
from leftfold.infrastructure.stores.keys import make_keys
from leftfold.infrastructure.subscriptions import Subscription
from leftfold.infrastructure.upkeep import Retried, Told, Upkeep, named, untold
from leftfold.infrastructure.views import FollowedViews, StoredHistories

if TYPE_CHECKING:
    from leftfold.infrastructure.blocking import BlockingRuntime
    from leftfold.infrastructure.telemetry import Telemetry

_log = logging.getLogger("leftfold.runtime")

CUT_EVERY = 1.0
"""Seconds between looks for calls that hang, at most."""
GRACE = 2.0
"""Seconds that a call for keys may take while the runtime closes."""
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
        self._inline = InlineViews(())

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
    ) -> Result[None, ViewBehind | EventStoreUnavailable]:
        """Wait until views have seen what a command wrote: the named ones, or all.

        Answers `Err(ViewBehind)` after `timeout` seconds (default: the setting `view_timeout`),
        `Err(ViewStopped)` at once for a view that cannot go on, and `Err(EventPutAside)` for one
        that has put what was written aside; `Err(EventStoreUnavailable)` if that cannot be asked.
        Raises `InvalidModelError` for a name that the model does not have.
        """
        parts = self._opened
        readers = parts.follower.readers
        found = list(readers.values()) if projections is None else named(readers, [*projections])
        seen = await self._wait(found, receipt.position, timeout)
        if isinstance(seen, Err):
            return seen
        try:
            aside = await parts.follower.put_aside(found, [receipt], parts.access.read)
        except EventStoreUnavailable as error:
            return Err(error)
        return seen if aside is None else Err(aside)

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
        return await self._wait(parts.follower.readers.values(), head, timeout)

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

    async def dead_letters(self, name: str) -> tuple[DeadLetter, ...]:
        """Return what a projection, process or subscriber could not take in, by position.

        Raises `InvalidModelError` for a name that the model does not have, and
        `EventStoreUnavailable`.
        """
        return await self._opened.upkeep.dead_letters(name)

    async def retry(self, name: str) -> Retried:
        """Take in what was put aside, in order; one that had stopped goes on.

        Raises as `dead_letters` does.
        """
        return await self._opened.upkeep.retry(name)

    async def drop_dead_letters(self, name: str, position: int | None = None) -> int:
        """Give up what was put aside, or the event at a position; return how many events.

        What waits behind it stays until a retry. Raises as `dead_letters` does.
        """
        return await self._opened.upkeep.drop(name, position)

    async def rebuild(self, name: str, told: Told = untold) -> Comparison:
        """Build a view anew beside itself, and give it the rows that come out differently.

        It is shown and kept up to date all the while; of several versions it is the newest. What
        the view's own statements have written is left as it is. One that was interrupted goes on
        where it was, after up to six seconds if its process died. `told` hears how far it is, and
        how far the log. Returns how many rows were the same, changed, added and removed. Raises
        `ViewBusyError` while another process does it, `ProjectionFailedError` for an event that
        cannot be folded, and as `dead_letters` does.
        """
        return await self._opened.upkeep.rebuild(name, told)

    async def compare_versions(self, name: str) -> Comparison | None:
        """Compare the newest version of a view with the one that is stored before it.

        None if there is none, if their columns differ, or if they are never equally far: some
        process has to keep the older one up to date.
        """
        return await self._opened.upkeep.compare(name)

    async def drop_version(self, name: str, version: int) -> None:
        """Delete an old version of a view.

        Raises `ViewInUseError` for one that is kept up to date, or that is this model's, and
        `InvalidModelError` for one that is not stored.
        """
        await self._opened.upkeep.drop_version(name, version)

    async def purge_receipts(self) -> int:
        """Delete the receipts that are older than the setting `receipts_kept`; return how many.

        An open runtime does it by itself every hour. Raises `EventStoreUnavailable`.
        """
        return await self._opened.purge(self.settings.receipts_kept)

    def health(self) -> Health:
        """Tell how the runtime is, without asking the database."""
        now = self._opened.platform.monotonic()
        readers = self._opened.follower.readers.values()
        projections = tuple(reader.health(now) for reader in readers)
        breaker = self._opened.access.breaker
        is_healthy = breaker.state is CircuitState.CLOSED and all(
            reader.failure is None for reader in readers
        )
        parts = tuple(part.health() for part in (breaker, *self._watched))
        return Health(self._store.name, is_healthy, projections, parts)

    async def __aenter__(self) -> Self:
        """Open the runtime; see `open`."""
        return await self.open()

    async def open(self) -> Self:
        """Open the store and follow its log, until `close`; `async with` does both.

        What it opened is closed again if it fails or is cancelled. Raises
        `StoreUnavailableError`, `SchemaMissingError`, `SchemaVersionError`, `ViewChangedError`;
        `NotUnique` and `ProjectionFailedError` for a new inline view that the log contradicts.
        """
        if self._platform is not None:
            raise InvalidModelError("this runtime is open already")
        self._owner = os.getpid()
        self._platform = platform = SystemPlatform()
        telemetry = self._telemetry
        cutter = _Cutter(self._store, self._keyring, platform, self.settings.store_timeout)
        async with AsyncExitStack() as undo:
            undo.callback(sigterm.discard, self._begin_close)
            undo.callback(self._forget)
            undo.callback(cutter.stop)
            undo.push_async_callback(platform.close_then, self._close_stores)
            undo.callback(cutter.give_up)
            await platform.in_thread(self._open_store)
            parts = _Parts(
                self.model,
                self.settings,
                self._store,
                platform,
                self._factory(),
                self._keyring,
                (self._guard, *self._middleware),
                telemetry,
            )
            undo.push_async_callback(parts.stop)
            await parts.begin(self._inline)
            parts.undo = undo.pop_all()
            self._parts = parts
        if telemetry is not None:
            watched = self.health().parts
            telemetry.watch(self.health, {part.kind: part.counters for part in watched})
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
        self._opened.follower.follow()

    async def close(self) -> None:
        """Finish the commands, queries and pages under way, refuse new ones, and close the store.

        They get a little longer than `command_timeout`; what hangs is left behind. Closing goes
        on if the caller is cancelled, and another call waits for it. One that is yet being opened
        is left alone.
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
        async with parts.undo:  # what opening did, from its end to its beginning, whatever happens
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

    async def _wait(
        self, readers: Iterable[Followed], position: int, timeout: float | None
    ) -> Result[None, ViewBehind]:
        seconds = self.settings.view_timeout if timeout is None else timeout
        behind = await self._opened.follower.wait_for(readers, position, seconds)
        return Ok(None) if behind is None else Err(behind)

    def _check_owner(self) -> None:
        if os.getpid() != self._owner:
            raise ForkedRuntimeError(self._owner)

    async def _guard(self, dispatch: Dispatch[Any], call_next: Step) -> Outcome:
        self._check_owner()
        return await call_next(dispatch)

    def _open_store(self) -> None:
        self._inline = inline = InlineViews([p for p in self.model.projections if p.inline])
        self._store.open(
            self.model.stored_readers,
            create_tables=self.settings.create_tables,
            keys=self._keyring,
            inline=inline if inline.projections else None,
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


class _Cutter:
    """Cuts off calls to a store and its keys that hang, whatever else hangs."""

    def __init__(
        self, store: Store, keyring: Keyring, platform: SystemPlatform, patience: float
    ) -> None:
        """Begin to; a call hangs after `patience` seconds."""
        self._store = store
        self._keyring = keyring
        self._platform = platform
        self._patience = patience
        self._cutting = platform.spawn(self._cut())

    async def _cut(self) -> None:
        while True:
            await self._platform.sleep(min(self._patience / 10, CUT_EVERY))
            self._store.cut(self._patience)
            self._keyring.cut(self._patience)

    def give_up(self) -> None:
        """Cut what the store is still asked: nobody waits for it. Keys get a little longer."""
        self._patience = min(self._patience, GRACE)
        self._store.cut(-math.inf)

    def stop(self) -> None:
        """Cut nothing any more."""
        self._cutting.cancel()


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
        self._view_timeout = settings.view_timeout
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
                self._consistent,
                self._admission,
                timeout(settings.command_timeout),
                conflict_retry(platform, settings.conflict_attempts),
            ),
            self._execution,
            platform.new_id,
        )
        self._services = [service(store=factory) for service in model.services]
        self._processes = [process(store=factory) for process in model.processes]
        self.pages = Pages(store.log, store.views, mapper, platform)
        self.follower = Follower(
            [
                *(Followed(Fold(p), is_inline=p.inline) for p in model.projections),
                *(Followed(Fold(p.projection, p)) for p in self._processes),
                *(Followed(Subscription(s, self.pages, platform)) for s in model.subscribers),
            ],
            self.pages,
            store.views,
            store.log,
            platform,
            page_size=settings.page_size,
            page_seconds=settings.page_seconds,
            paged=unheard if telemetry is None else telemetry.page,
        )
        self.upkeep = Upkeep(self.follower, self.pages, platform, self.access)
        for service in self._services:
            self.commands.add(*service.handlers())
        self._asking = Admission()
        self.queries = QueryBus((*around, self._asking), partial(_answer, platform))
        views = FollowedViews(store, self.follower, self.access, settings.view_timeout)
        histories = StoredHistories(store, mapper, self.access)
        for query_service in model.queries:
            self.queries.add(*query_service(views, histories).handlers())
        self._receipts_kept = settings.receipts_kept
        self._following: tuple[asyncio.Future[None], ...] = ()
        self._housekeeping: tuple[asyncio.Task[None], ...] = ()
        self.undo = AsyncExitStack()
        """What closing does."""

    async def begin(self, inline: InlineViews) -> None:
        """Bring inline views as far as the log, learn how far the others are, and go on."""
        try:
            if inline.projections:
                await self.platform.in_thread(inline.use, self.pages)
            await self.follower.begin()
        except PersistenceError as error:
            raise StoreUnavailableError(self._store.name, str(error)) from error
        spawn = self.platform.spawn
        self._watching = asyncio.ensure_future(spawn(self._watch()))
        self._following = (asyncio.ensure_future(spawn(self.follower.run())), self._watching)
        self._housekeeping = spawn(self._forget()), spawn(self._purge(self._receipts_kept))

    async def drain(self, seconds: float) -> None:
        """Finish commands, then queries, which commands may need; each within some seconds."""
        await _within(seconds, self._admission.drain())
        await _within(seconds, self._execution.drain())
        await _within(seconds, self._asking.drain())

    async def stop(self) -> None:
        """Finish the pages under way, and listen no more."""
        self.follower.stop()
        if self._following:
            self._watching.cancel()
            await _within(PATIENCE, asyncio.wait(self._following))
            await _within(PATIENCE, self.follower.release())
        for task in self._housekeeping:
            task.cancel()

    async def _consistent(self, dispatch: Dispatch[Any], call_next: Step) -> Outcome:
        """Answer a command when the views that it names have seen what it wrote."""
        if not dispatch.consistency:
            return await call_next(dispatch)
        readers = named(self.follower.readers, dispatch.consistency)  # before anything is written
        outcome = await call_next(dispatch)
        if isinstance(outcome, Err):
            return outcome
        is_batch = isinstance(dispatch.message, Batch)
        answers = outcome.value if is_batch else [outcome.value]
        position = max((a.position for a in answers if isinstance(a, Receipt)), default=0)
        if not all(isinstance(answer, Receipt) for answer in answers):
            # Of others it is not known where their events are.
            with suppress(EventStoreUnavailable):  # it is written, whatever fails now
                position = await self.access.read(self._store.log.head)
        await self.follower.wait_for(readers, position, self._view_timeout)
        receipts = [answer for answer in answers if isinstance(answer, Receipt)]
        late = tuple([r.reader.name for r in readers if await self._lacks(r, position, receipts)])
        marked = [replace(a, behind=late) if isinstance(a, Receipt) else a for a in answers]
        return Ok(marked if is_batch else marked[0])

    async def _lacks(self, reader: Followed, position: int, receipts: Sequence[Receipt]) -> bool:
        if not reader.has_seen(position):
            return True
        with suppress(EventStoreUnavailable):  # it is written, whatever fails now
            aside = await self.follower.put_aside([reader], receipts, self.access.read)
            return aside is not None
        return False

    def _wake(self) -> None:
        self.follower.wake()

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
            heard = store.heard()
            if Heard.END in heard and listening is not None:
                loop.remove_reader(listening)
                listening = None
            if Heard.VIEWS in heard:
                self.follower.look()
            if heard != Heard.VIEWS:
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
                        self.follower.look()
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
