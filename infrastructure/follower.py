"""Following the log: who folds which page next, and when to try again."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from functools import partial
from typing import Any

from eventsourcing.persistence import PersistenceError

from leftfold.application import (
    EventPutAside,
    Projection,
    Receipt,
    ViewBehind,
    ViewStopped,
)
from leftfold.application.checkpoints import Checkpoint, Comparison, Reader, full_name
from leftfold.application.ports import Log, Platform, ViewStore
from leftfold.domain import LeftfoldError
from leftfold.infrastructure.access import may_pass
from leftfold.infrastructure.errors import NotRunningError
from leftfold.infrastructure.health import ProjectionHealth, ReaderState
from leftfold.infrastructure.pages import (
    Fold,
    Outcome,
    Pages,
    Prepared,
    described,
    failure_of,
    fault_of,
    is_poison,
)
from leftfold.infrastructure.subscriptions import Subscription

_log = logging.getLogger("leftfold.follower")

IDLE = 1.0
"""Seconds after which the log is looked at without a hint: hints may be lost."""
LEASE = 3.0
"""Seconds that a reader is held; renewed at looks, of which there is one each `IDLE` at least."""
RENEWED = 0.5
"""Seconds for which that is not repeated: to renew is to write, and looks may be many."""
EVERYBODY = "everybody"
"""Who owns inline views: all that write them, together, so that it shows that they are in use."""
IN_USE = 60.0
"""Seconds for which it shows."""
SHOWN = 20.0
"""Seconds for which that is not repeated."""
SOON = 0.02
"""Seconds between looks at what another process folds while somebody waits for it."""
SELDOM = 0.1
"""Seconds between looks where all that is read is this process's own."""
FIRST_PAUSE, LONGEST_PAUSE = 0.05, 5.0
"""Seconds to wait after a failing database, at first and at most."""
FIRST_PAGE = 1_000
"""Events in the first page; later ones are as long as they may take."""
GROWTH = 4.0
UNSEEN = 3
"""How many times longer a page may take while its view is built."""
SMOOTHING = 0.3
"""How much of a rate is the last page's."""

COMPARED = 250
"""Looks at whether a view and the version before it are equally far."""

Ask = Callable[..., Awaitable[Any]]
"""Calls what may block with its arguments."""
Paged = Callable[[Reader, int, float], object]


def unheard(_reader: Reader, _events: int, _seconds: float) -> None:
    """Nobody is told of pages."""


class Followed:
    """One reader of the log: what is known of it, and what is to be done next."""

    def __init__(self, work: Fold[Any] | Subscription, *, is_inline: bool = False) -> None:
        self.work = work
        self.reader = work.reader
        self.full_name = full_name(work.reader.name, work.reader.version)
        """Its name, with its version."""
        self.is_inline = is_inline
        """Its rows are written with the events: there are no pages of it."""
        self.is_local = isinstance(work, Subscription) and work.reader.everywhere
        """Its checkpoint is this process's own."""
        self.head = 0
        """The log's last position, as of the last look."""
        self.failure: LeftfoldError | None = None
        """Why it stopped, if it did."""
        self.is_mine = False
        self.is_looked_through = False
        """Its dead letters were looked through since it is this process's."""
        self.is_busy = False
        self.is_due = True
        self.is_alone = False
        """It failed: its pages are its own until one goes well."""
        self.limit = FIRST_PAGE
        self.pause = 0.0
        self.not_before = 0.0
        self.behind_since: float | None = None
        self.rate = 0.0
        self.compared: Comparison | None = None
        """How its rows differed from those of the version before it when they were built here."""
        self.moved_at = 0.0
        """When others were last seen to have moved it, or to have no more to take in."""
        self._waiting: list[tuple[int, asyncio.Future[None]]] = []

    @property
    def checkpoint(self) -> Checkpoint:
        """How far it is, as far as this process knows."""
        return self.work.checkpoint

    @property
    def position(self) -> int:
        """Up to where it has taken the log in."""
        return self.work.checkpoint.position

    def has_seen(self, position: int) -> bool:
        """Tell whether it shows what was written up to there."""
        return self.is_inline or self.position >= position

    @property
    def is_waited_for(self) -> bool:
        """Somebody waits for it to get on."""
        return bool(self._waiting)

    @property
    def why_stopped(self) -> str | None:
        """Why it stopped, here or where it was last; None if it did not."""
        if self.failure is not None:
            return str(self.failure)
        return None if self.is_mine else self.checkpoint.failure or None

    @property
    def state(self) -> ReaderState:
        """What it is doing."""
        if self.why_stopped is not None:
            return ReaderState.HALTED
        if self.pause:
            return ReaderState.WAITING
        if not self.checkpoint.is_built:
            return ReaderState.BUILDING
        if self.is_mine or self.is_inline:
            return ReaderState.LIVE
        return ReaderState.WATCHED if self.checkpoint.is_held else ReaderState.FREE

    def may_go_on(self) -> None:
        """Somebody has seen to why it stopped."""
        self.failure = None
        if self.checkpoint.failure:  # so no page of it is under way here
            self.work.checkpoint = self.checkpoint._replace(failure="")

    def note(self, now: float) -> None:
        """Note since when it is behind, and answer who waited for what it has seen."""
        if self.has_seen(self.head):
            self.behind_since = None
        elif self.behind_since is None:
            self.behind_since = now
        self.answer()

    def note_rate(self, events: int, seconds: float) -> None:
        """Note how quickly it gets on."""
        rate = events / max(seconds, 1e-6)
        self.rate = rate if not self.rate else self.rate + SMOOTHING * (rate - self.rate)

    def answer(self, *, is_over: bool = False) -> None:
        """Answer those who wait: what they wait for is there, or will not come."""
        is_over = is_over or self.failure is not None
        still: list[tuple[int, asyncio.Future[None]]] = []
        for position, seen in self._waiting:
            if seen.done():
                continue
            if self.has_seen(position) or is_over:
                seen.set_result(None)
            else:
                still.append((position, seen))
        self._waiting = still

    async def wait_for(self, position: int, timeout: float) -> None:
        """Return when it has seen a position, has stopped, or after some seconds."""
        seen: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((position, seen))
        try:
            async with asyncio.timeout(timeout):
                await seen
        except TimeoutError:
            pass

    def behind(self, wanted: int) -> ViewBehind:
        """Return what to tell those who wait for it in vain."""
        why = self.why_stopped
        if why is None:
            return ViewBehind(self.reader.name, self.position, wanted)
        return ViewStopped(self.reader.name, self.position, wanted, why)

    def health(self, now: float) -> ProjectionHealth:
        """Tell how it is."""
        lag = 0 if self.has_seen(self.head) else self.head - self.position
        since = self.behind_since
        return ProjectionHealth(
            self.reader.name,
            self.reader.version,
            self.state,
            self.position,
            lag,
            0.0 if since is None or not lag else now - since,
            self.rate,
            self.checkpoint.dead_letters,
            self.why_stopped,
            self.compared,
        )


async def give_back(views: ViewStore, owner: str, platform: Platform) -> None:
    """Give the leases of an owner back; if that fails, they run out."""
    try:
        await platform.in_thread(views.release, owner)
    except (PersistenceError, NotRunningError) as error:
        _log.warning("leases are not given back: %s", described(error))


class Follower:
    """Keeps what reads the log as new as the log.

    Readers that are equally far share a page. A page is written on the condition that the
    checkpoints are where it began, and of the epoch in which it was begun: so no event is skipped
    or taken in twice, whoever else is at it. Of several processes one holds the lease of a reader
    and writes its pages; the others look how far it is.
    """

    def __init__(
        self,
        readers: Sequence[Followed],
        pages: Pages,
        views: ViewStore,
        log: Log,
        platform: Platform,
        *,
        page_size: int,
        page_seconds: float,
        paged: Paged = unheard,
    ) -> None:
        """Fold at most `page_size` events at a time, about as many as `page_seconds` allow.

        `paged` is told of each page: its reader, its events, its seconds.
        """
        self.readers = {reader.full_name: reader for reader in readers}
        self.folds = False
        """This process folds; if not, it only watches how far others are."""
        self._pages = pages
        self._views = views
        self._log = log
        self._platform = platform
        self._page_size = page_size
        self._page_seconds = page_seconds
        self._paged = paged
        self._owner = platform.new_id().hex
        self._renewed = self._looked_at = platform.monotonic() - LEASE
        self._shown_at = platform.monotonic() - IN_USE
        self._hint = asyncio.Event()
        self._look_hint = asyncio.Event()
        self._retrying = asyncio.Lock()  # one at a time: others need the threads
        self._comparing = asyncio.Lock()  # likewise
        self._is_stopping = False
        self._pages_under_way: set[asyncio.Future[None]] = set()
        for reader in readers:
            reader.limit = min(FIRST_PAGE, page_size)

    def wake(self) -> None:
        """There may be new events."""
        for reader in self.readers.values():
            reader.is_due = True
        self._hint.set()
        if any(r.is_waited_for and not r.is_mine for r in self.readers.values()):
            self._look_hint.set()

    def look(self) -> None:
        """Others may have got on, or given up."""
        others = (r for r in self.readers.values() if not (r.is_local or r.is_inline))
        is_watching = any(not reader.is_mine for reader in others)
        # It is told of its own pages, too.
        if is_watching or self._platform.monotonic() - self._looked_at > SELDOM:
            self._look_hint.set()

    def follow(self) -> None:
        """Begin to fold."""
        self.folds = True
        self._look_hint.set()
        self.wake()

    def follow_again(self) -> None:
        """Go on with what had stopped."""
        for reader in self.readers.values():
            reader.is_due = True
        self._look_hint.set()

    def stop(self) -> None:
        """End after the pages under way."""
        self._is_stopping = True
        self._hint.set()
        self._look_hint.set()
        for reader in self.readers.values():
            if isinstance(reader.work, Subscription):
                reader.work.stop()

    async def begin(self) -> None:
        """Learn how far all are. Raises what the store does."""
        head, found = await self._platform.in_thread(self._ask)
        self._found(head, found)
        for reader in self.readers.values():
            if isinstance(reader.work, Subscription) and reader.is_local:
                needed = (self.readers[view.table] for view in reader.work.reader.needs)
                # A version that is built is told of what comes, and not of what was there.
                late = (v for v in needed if not v.is_inline and v.checkpoint.is_built)
                seen = (view.position for view in late)
                reader.work.adopt(Checkpoint(min((head, *seen))))
                reader.is_mine = True

    async def run(self) -> None:
        """Follow the log until stopped."""
        try:
            await asyncio.gather(self._run_pages(), self._run_looks())
        finally:
            while self._pages_under_way:
                await asyncio.wait(self._pages_under_way)
            for reader in self.readers.values():
                reader.answer(is_over=True)

    async def release(self) -> None:
        """Let others take over, at the end."""
        if any(r.is_mine and not r.is_local for r in self.readers.values()):
            await give_back(self._views, self._owner, self._platform)

    async def wait_for(
        self, readers: Iterable[Followed], position: int, timeout: float
    ) -> ViewBehind | None:
        """Wait until readers have seen a position; return which has not after some seconds."""
        late = [reader for reader in readers if not reader.has_seen(position)]
        for reader in late:
            if reader.failure is not None or self._is_stopping:
                return reader.behind(position)
        if not late:
            return None
        gathered = asyncio.gather(*(reader.wait_for(position, timeout) for reader in late))
        self.look()
        self.wake()
        await gathered
        return next((r.behind(position) for r in late if not r.has_seen(position)), None)

    async def put_aside(
        self, readers: Iterable[Followed], receipts: Sequence[Receipt], ask: Ask
    ) -> EventPutAside | None:
        """Return which of some views has put what commands wrote aside.

        It goes by the last event of each aggregate of theirs, and by their last of all. `ask`
        reads the store, if some have put anything aside.
        """
        last = {pair for receipt in receipts for pair in receipt.aggregates}
        positions = {receipt.position for receipt in receipts}
        for reader in readers:
            # What is known of an inline view here is as old as the last look.
            may_have = reader.checkpoint.dead_letters or reader.is_inline
            if not may_have or not isinstance(reader.work, Fold):
                continue
            at: int | None = await ask(self._views.parked, reader.reader, positions, last)
            if at is not None:
                return EventPutAside(reader.reader.name, at - 1, max(positions))
        return None

    # Looks ------------------------------------------------------------------------------------

    async def _run_looks(self) -> None:
        """Hold what is free, and see how far others are."""
        pause = 0.0
        while not self._is_stopping:
            self._look_hint.clear()
            known = {name: reader.checkpoint for name, reader in self.readers.items()}
            try:
                head, found = await self._platform.in_thread(partial(self._ask, holds=self.folds))
            except Exception as error:  # noqa: BLE001 - looks go on, whatever a store raises
                pause = min(max(2 * pause, FIRST_PAUSE), IDLE)
                _log.warning("views are not looked at for %.2f s: %s", pause, described(error))
                await self._sleep(self._look_hint, pause)
                continue
            pause = 0.0
            self._looked_at = self._platform.monotonic()
            self._found(head, found, known)
            self._hint.set()
            self._look_through()
            is_urgent = any(r.is_waited_for and not r.is_mine for r in self.readers.values())
            if not is_urgent and not self._look_hint.is_set():
                await self._sleep(self._look_hint, IDLE)
            else:
                await self._platform.sleep(SOON)  # one look for many commits

    def _look_through(self) -> None:
        """Take in what was put aside by a release that did not know it, once we have its reader.

        Beside the looks: it may take longer than a lease lasts.
        """
        for reader in self.readers.values():
            is_new, reader.is_looked_through = not reader.is_looked_through, reader.is_mine
            work = reader.work
            if not (reader.is_mine and is_new and isinstance(work, Fold)):
                continue
            if work.checkpoint.dead_letters:
                self._start(self._retry_known(reader, Fold(work.reader, work.process)))

    async def _retry_known(self, reader: Followed, again: Fold[Any]) -> None:
        async with self._retrying:
            if self._is_stopping:
                return
            try:
                await self._platform.in_thread(self._pages.retry_known, again)
            except (PersistenceError, LeftfoldError) as error:  # it can be asked for, too
                _log.warning("%s: nothing is tried again: %s", reader.full_name, described(error))

    def _ask(self, *, holds: bool = False) -> tuple[int, list[Checkpoint]]:
        followed = [reader for reader in self.readers.values() if not reader.is_local]
        readers = [reader.reader for reader in followed]
        self._show_use()
        found = self._views.checkpoints(readers)
        head = self._log.head()
        if holds:
            now = self._platform.monotonic()
            is_due = now - self._renewed > RENEWED
            wanted = [
                reader.reader
                for reader, at in zip(followed, found, strict=True)
                if reader.failure is None
                and not reader.is_inline
                and (not at.is_held or (is_due and at.owner == self._owner))
            ]
            if wanted:
                held = self._views.hold(wanted, self._owner, LEASE)
                self._renewed = now if is_due else self._renewed
                by_name = {(r.name, r.version): at for r, at in zip(wanted, held, strict=True)}
                found = [
                    by_name.get((r.name, r.version), at)
                    for r, at in zip(readers, found, strict=True)
                ]
        return head, found

    def _show_use(self) -> None:
        """Show that inline views are in use; who may only read does not keep others from it."""
        inline = [reader.reader for reader in self.readers.values() if reader.is_inline]
        now = self._platform.monotonic()
        if not inline or now - self._shown_at < SHOWN:
            return
        self._shown_at = now
        try:
            self._views.hold(inline, EVERYBODY, IN_USE)
        except PersistenceError as error:
            _log.warning("it does not show that inline views are in use: %s", described(error))

    def _found(
        self, head: int, found: Sequence[Checkpoint], known: dict[str, Checkpoint] | None = None
    ) -> None:
        now = self._platform.monotonic()
        stored = iter(found)
        for name, reader in self.readers.items():
            reader.head = max(reader.head, head)
            if reader.is_local:
                reader.is_due = reader.is_due or reader.position < head
                continue
            at = next(stored)
            if reader.is_busy or (known is not None and reader.checkpoint != known[name]):
                continue  # a page has come between, and knows more
            has_moved = at.position > reader.position
            if has_moved:
                reader.failure = None  # somebody else knew how to go on
                if reader.moved_at:
                    reader.note_rate(at.position - reader.position, now - reader.moved_at)
            elif at.epoch != reader.checkpoint.epoch and at.owner == reader.checkpoint.owner:
                reader.failure = None  # somebody wants it to be tried again
            if has_moved or not reader.moved_at or at.position >= head:
                reader.moved_at = now
            reader.work.adopt(at)
            if reader.is_inline:  # what it cannot take in refuses commits from here on
                reader.failure = fault_of(reader.reader, at)
            reader.is_mine = self.folds and at.owner == self._owner and at.is_held
            reader.head = max(reader.head, at.position)
            reader.is_due = reader.is_due or reader.position < reader.head
            reader.note(now)

    # Versions ---------------------------------------------------------------------------------

    async def compare(self, reader: Followed, ask: Ask) -> Comparison | None:
        """Compare a view with the version before it, once they are equally far.

        None if there is no other, if their columns differ, or if they are never equally far.
        """
        projection = reader.reader
        if not isinstance(projection, Projection) or self._is_stopping:
            return None
        other: Projection[Any] | None = await ask(self._views.before, projection)
        if other is None:
            return None
        for _ in range(COMPARED):
            compared: Comparison | None = await ask(self._views.compare, projection, other)
            if compared is not None or self._is_stopping:
                return compared
            await self._platform.sleep(SOON)
        _log.warning("%s and %s were never equally far", projection.table, other.table)
        return None

    async def _compare_built(self, reader: Followed) -> None:
        """Tell how a view that takes over from the version before it differs from that."""
        try:
            async with self._comparing:
                compared = await self.compare(reader, self._platform.in_thread)
        except (PersistenceError, NotRunningError) as error:
            if not self._is_stopping:  # then it is cut
                _log.warning("%s is not compared: %s", reader.full_name, described(error))
            return
        if compared is not None:
            reader.compared = compared
            level = logging.INFO if compared.is_same else logging.WARNING
            _log.log(level, "%s beside the version before: %s", reader.full_name, compared)

    # Pages ------------------------------------------------------------------------------------

    async def _run_pages(self) -> None:
        """Begin pages for all that are free and behind."""
        while not self._is_stopping:
            self._hint.clear()
            wait: float | None = None
            now = self._platform.monotonic()
            for group in self._groups(now):
                self._begin(group)
            for reader in self.readers.values():
                if reader.is_mine and reader.is_due and not reader.is_busy and reader.pause:
                    left = max(0.0, reader.not_before - now)
                    wait = left if wait is None else min(wait, left)
            await self._sleep(self._hint, wait)

    def _groups(self, now: float) -> list[list[Followed]]:
        """Return who may begin a page together: those that are equally far, and go well."""
        groups: dict[object, list[Followed]] = {}
        for name, reader in self.readers.items():
            is_free = reader.is_mine and not reader.is_busy and not reader.is_inline
            if not is_free or reader.failure is not None:
                continue
            reach = self._reach(reader)
            is_held_back = reach is not None and reach <= reader.position
            work = reader.work
            is_outdated = isinstance(work, Subscription) and work.is_outdated(self._epochs(work))
            is_wanted = is_outdated or (reader.is_due and not is_held_back)
            if not is_wanted or reader.not_before > now:
                continue
            is_apart = reader.is_alone or not isinstance(work, Fold) or work.process is not None
            groups.setdefault(name if is_apart else reader.position, []).append(reader)
        return list(groups.values())

    def _reach(self, reader: Followed) -> int | None:
        """Return how far a reader may go: as far as all views that it needs; None: as the log."""
        if not isinstance(reader.work, Subscription):
            return None
        views = [self.readers[view.table] for view in reader.work.reader.needs]
        late = [view for view in views if not view.is_inline]
        if not all(view.checkpoint.is_built for view in late):
            return 0
        return min((view.position for view in late), default=None)

    def _epochs(self, work: Subscription) -> list[int]:
        return [self.readers[view.table].checkpoint.epoch for view in work.reader.needs]

    def _begin(self, group: Sequence[Followed]) -> None:
        for reader in group:
            reader.is_busy, reader.is_due = True, False
        self._start(self._page(group))

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        """Begin what is finished before the leases are given back."""
        under_way = asyncio.ensure_future(self._platform.spawn(work))
        self._pages_under_way.add(under_way)
        under_way.add_done_callback(self._pages_under_way.discard)

    async def _page(self, group: Sequence[Followed]) -> None:
        """Take in a page, and those that follow on it; see to what goes wrong."""
        ahead: Prepared | None = None
        is_begun = False
        unbuilt = [reader for reader in group if not reader.checkpoint.is_built]
        try:
            while not self._is_stopping and (ahead is not None or not is_begun):
                is_begun = True
                ahead = await self._one_page(group, ahead)
        finally:
            now = self._platform.monotonic()
            for reader in group:
                reader.is_busy = False
                reader.note(now)
            self._hint.set()
            for reader in unbuilt:
                if reader.checkpoint.is_built:
                    self._platform.spawn(self._compare_built(reader))

    async def _one_page(self, group: Sequence[Followed], begun: Prepared | None) -> Prepared | None:
        """Take in one page; return the next, if it was folded while this one was written."""
        began = self._platform.monotonic()
        limit = min(reader.limit for reader in group)
        ahead: Prepared | None = None
        try:
            outcome, ahead = await self._turn(group, limit, begun)
        except Exception as error:  # noqa: BLE001 - whatever is wrong is seen to, reader by reader
            for reader in group:
                await self._failed(reader, error, limit, is_shared=len(group) > 1)
            return None
        seconds = self._platform.monotonic() - began
        for reader in group:
            work = reader.work
            failure = outcome.failed.get(work) if isinstance(work, Fold) else None
            if failure is not None and not outcome.is_lost:
                await self._failed(reader, failure, limit, is_shared=False)
            elif outcome.is_lost:
                reader.is_due, reader.is_mine = True, False  # until it is looked at again
                self._look_hint.set()
            else:
                self._went_well(reader, outcome, limit, seconds)
                reader.note(began + seconds)
        return None if any(reader.failure for reader in group) else ahead

    async def _turn(
        self, group: Sequence[Followed], limit: int, begun: Prepared | None
    ) -> tuple[Outcome, Prepared | None]:
        """Write one page while the next is folded: the database works, and so do we."""
        in_thread, pages = self._platform.in_thread, self._pages
        (first, *_) = group
        if isinstance(first.work, Subscription):
            epochs = self._epochs(first.work)
            return await first.work.turn(limit, self._reach(first), epochs), None
        folds = [reader.work for reader in group]
        if first.work.process is not None:
            return await in_thread(pages.fold, folds, limit), None
        page: Prepared | Outcome
        page = await in_thread(pages.begin, folds, limit) if begun is None else begun
        if isinstance(page, Outcome):
            return page, None
        if not page.has_more or page.failed:
            return await in_thread(pages.write, page), None
        outcome, ahead = await asyncio.gather(
            in_thread(pages.write, page),
            in_thread(pages.prepare, folds, limit, page),
            return_exceptions=True,
        )
        if isinstance(outcome, BaseException):
            raise outcome
        is_good = isinstance(ahead, Prepared) and not (outcome.is_lost or ahead.failed)
        return outcome, ahead if is_good and isinstance(ahead, Prepared) else None

    def _went_well(self, reader: Followed, outcome: Outcome, limit: int, seconds: float) -> None:
        reader.pause = reader.not_before = 0.0
        reader.is_alone = False
        reader.head = max(reader.head, outcome.head)
        reader.is_due = reader.is_due or outcome.has_more
        if not outcome.events:
            return
        if isinstance(reader.work, Fold) and reader.work.process is not None:
            self.wake()  # there may be events of its own
        fault = fault_of(reader.reader, reader.checkpoint)
        if fault is not None:
            self._halt(reader, fault)
            return
        reader.note_rate(outcome.events, seconds)
        if outcome.has_more:
            # Nobody looks at what is built, and who has to wait for it had better wait less.
            target = self._page_seconds * (1 if reader.checkpoint.is_built else UNSEEN)
            allowed = limit * target / max(seconds, 1e-6)
            grown = min(allowed, limit * GROWTH, self._page_size)
            reader.limit = max(1, int(grown))
        self._paged(reader.reader, outcome.events, seconds)

    async def _failed(
        self, reader: Followed, error: Exception, limit: int, *, is_shared: bool
    ) -> None:
        """Try again later, or alone, or with less; at last put aside what it cannot take in."""
        reader.is_due = reader.is_alone = True
        work = reader.work
        if may_pass(error) or isinstance(work, Subscription):
            reader.limit = max(1, limit // 2)  # it may have taken too long
            self._wait_out(reader, error)
        elif is_shared:
            pass  # whose fault it is shows when they are alone
        elif not is_poison(error):
            self._halt(reader, error)
        elif limit > 1:
            reader.limit = max(1, limit // 2)  # so it is found
        elif work.policy == "halt":
            self._halt(reader, error)
        else:
            await self._park(reader, work, error)

    def _wait_out(self, reader: Followed, error: Exception) -> None:
        """Try again later, and later each time."""
        reader.pause = min(max(2 * reader.pause, FIRST_PAUSE), LONGEST_PAUSE)
        reader.not_before = self._platform.monotonic() + reader.pause
        _log.warning("%s waits %.2f s: %s", reader.full_name, reader.pause, described(error))

    async def _park(self, reader: Followed, fold: Fold[Any], error: Exception) -> None:
        why = described(error)
        try:
            is_parked = await self._platform.in_thread(self._pages.park, fold, why)
        except Exception as failure:  # noqa: BLE001 - as any page's
            if may_pass(failure):
                self._wait_out(reader, failure)
            else:
                self._halt(reader, failure)
            return
        reader.is_alone = False
        if is_parked:
            _log.error("%s has put an event aside: %s", reader.full_name, why)
        else:
            reader.is_mine = False  # until it is looked at again
            self._look_hint.set()

    def _halt(self, reader: Followed, error: Exception) -> None:
        reader.failure = failure_of(reader.full_name, error)
        reader.is_mine = False  # its lease runs out: another process may know how to go on
        reader.pause = reader.not_before = 0.0
        _log.error("%s stopped: %s", reader.full_name, reader.failure)
        if not reader.is_local:
            self._start(self._keep_failure(reader, str(reader.failure)))

    async def _keep_failure(self, reader: Followed, why: str) -> None:
        """Let other processes know."""
        try:
            await self._platform.in_thread(self._views.halt, reader.reader, reader.checkpoint, why)
        except (PersistenceError, NotRunningError) as error:
            _log.warning("why %s stopped is not kept: %s", reader.full_name, described(error))

    async def _sleep(self, hint: asyncio.Event, seconds: float | None) -> None:
        """Wait for a hint, at most for some seconds."""
        try:
            async with asyncio.timeout(seconds):
                await hint.wait()
        except TimeoutError:
            pass
