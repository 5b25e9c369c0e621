"""Pages against a plain fold of the log: whoever writes them, and whatever comes in between.

Several runners, some over stores of their own, fold the same views. At any step of any of them
(before or after each call of the store, or in the middle of a transaction) its answer is lost, it
is killed, or somebody else does something. What is stored must be at any time what a plain fold
of the log gives, up to the checkpoint and without what is parked; in the end, all of the log.
"""

from __future__ import annotations

import os
import sqlite3
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from copy import copy
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from random import Random
from threading import Thread
from time import sleep
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from eventsourcing.persistence import OperationalError
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from leftfold.application import EventMapper, Projection
from leftfold.application.ports import Group, Save
from leftfold.domain import attr
from leftfold.domain.items import Item, ItemRenamed, StockReceived, StockReturned, StockSold
from leftfold.infrastructure import pages
from leftfold.infrastructure.pages import Fold, Pages, Prepared
from leftfold.infrastructure.platform import SystemPlatform
from leftfold.infrastructure.settings import load_settings
from leftfold.infrastructure.stores import SharedLog, make_store, postgres_views

CASES = min(800, int(os.environ.get("LEFTFOLD_LAW_CASES", "200")))  # each is a long program
EXAMPLES = {"memory": CASES // 2, "sqlite": CASES // 8, "postgresql": CASES // 8}
STEPS = 25
NOW = datetime(2011, 12, 9, 12, 50, tzinfo=UTC)
ITEMS = tuple(UUID(int=n) for n in range(1, 4))
COUNTRIES = ("AB", "BA", "AA", "BC")
FAULTY = ("flows", "routes", "counts")
NAMES = (*FAULTY, "trickles")
KEYS = (*COUNTRIES, "A", "B", "C", *(item.hex for item in ITEMS))
LONG = 30.0
"""Seconds of a lease that does not run out in a test."""


class LostError(OperationalError):
    """The answer of the store is lost, or the store itself for a moment."""


class Killed(BaseException):
    """The runner is no more."""


class PoisonError(Exception):
    pass


# The views ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Trail:
    """Tells exactly which events were folded, in which order."""

    total: int
    events: str


class Faults:
    """The events that views cannot fold, by the views' names, until they are mended."""

    def __init__(self):
        self.events = defaultdict(set)
        self.are_ignored = False

    def are_in(self, name, event):
        return not self.are_ignored and named(event) in self.events[name]


def named(event):
    return event.originator_id.int, event.originator_version


def following(faults, name):
    """Return how the events of a view change its rows, which come and go."""

    def follow(row, event, key=None):
        if faults.are_in(name, event) and key in (None, event.country[1]):
            raise PoisonError
        total = (row.total if row else 0) + event.quantity
        events = f"{row.events if row else ''} {event.originator_id.int}.{event.originator_version}"
        return None if total % 7 == 0 else Trail(total, events)

    return follow


def views(faults):
    """Return views whose rows belong to several aggregates, to two at a time, and to one each.

    Two of them fold the same rows, and show others of them.
    """
    flows = Projection(
        "flows",
        version=1,
        row=Trail,
        specification=attr("total") > 4,
        where=attr("quantity") != 3,
        key=lambda event: event.country,
    )
    flows.on(StockSold)(following(faults, "flows"))
    flows.on(StockReturned)(following(faults, "flows"))
    trickles = flows.derive("trickles", version=1, specification=attr("total") <= 4)
    routes = Projection("routes", version=1, row=Trail, keys=lambda event: tuple(event.country))
    routes.on_each(StockSold)(following(faults, "routes"))
    counts = Projection("counts", version=1, row=Trail, specification=attr("total") < 20)
    for event_type in (StockSold, StockReturned, StockReceived):
        counts.on(event_type)(following(faults, "counts"))
    return {view.name: view for view in (flows, trickles, routes, counts)}


# The store, step by step ----------------------------------------------------------------------


class Stepped:
    """A part of a store: before and after each call of it something may happen."""

    def __init__(self, part, step, told):
        self._part, self._step, self._told = part, step, told

    def __getattr__(self, name):
        found = getattr(self._part, name)
        if not callable(found):
            return found

        def call(*arguments, **options):
            self._step()
            answer = found(*arguments, **options)
            self._told(name, answer, *arguments, **options)
            self._step()
            return answer

        return call


class Database:
    """A database, as it is reached beside the stores; it has a table that a view writes itself."""

    def __init__(self, url):
        if url.startswith("sqlite:"):
            path = url.removeprefix("sqlite:///")
            self._connection = sqlite3.connect(path, isolation_level=None, timeout=5)
            self.insert = "INSERT INTO told VALUES (?, ?)"
        else:
            self._connection = psycopg.connect(url, autocommit=True)
            self.insert = "INSERT INTO told VALUES (%s, %s)"
        self._connection.execute("CREATE TABLE told (item int, version int)")

    def empty(self, views):
        ours = ("stored_events", "leftfold_commands", "leftfold_dead_letters", "told")
        for table in (*ours, *(view.table for view in views)):
            self._connection.execute(f"DELETE FROM {table}")
        self._connection.execute(
            "UPDATE leftfold_checkpoints SET position = 0, owner = NULL, lease = NULL, "
            "built = (1 = 1)"
        )

    def told(self):
        return Counter(self._connection.execute("SELECT item, version FROM told").fetchall())

    def close(self):
        self._connection.close()


@dataclass(frozen=True)
class Entry:
    """An event of the log, as it was written; one that cannot be read is None."""

    position: int
    item: UUID
    topic: str
    event: Any

    @property
    def is_of_another_release(self):
        return self.topic not in {event.TOPIC for event in Item.EVENTS}


class World:
    """The stores of one database, which the examples share; each begins with an empty one."""

    def __init__(self, url):
        self.faults = Faults()
        self.views = views(self.faults)
        self.platform = SystemPlatform()
        self.in_transaction = lambda: None
        self._url = url
        self.database = None
        if url != "memory:":
            self.views["counts"].executing(self._execute)
            self.stores = [self._opened(), self._opened()]
            self.database = Database(url)

    def _opened(self):
        store = make_store(load_settings(store=self._url))
        store.open(tuple(self.views.values()), create_tables=True)
        return store

    def _execute(self, execute, events):
        for event in events:
            execute(self.database.insert, named(event))
        self.in_transaction()

    def begin_anew(self):
        self.in_transaction = lambda: None
        self.faults.events.clear()
        self.versions = Counter()
        if self.database is None:
            self.stores = [self._opened()]
        else:
            self.database.empty(self.views.values())
        self.log, self.store = self.stores[0].log, self.stores[0].views
        self.mapper = SharedLog(self.log).mapper(mapper_class=EventMapper.of(Item))

    def write(self, moves):
        """Write events in one commit, and return them with their positions."""
        events = []
        for kind, item, country, quantity, failing, others in moves:
            events += (self._event(ItemRenamed, item, name="Cup") for _ in range(others))
            facts = {"quantity": quantity}
            if kind not in ("received", "renamed"):
                facts |= {"country": country, "invoice": "1", "unit_price": 1, "customer_id": None}
            event_type = {"received": StockReceived, "returned": StockReturned}.get(kind, StockSold)
            event = (
                self._event(ItemRenamed, item, name="Jug")
                if kind == "renamed"
                else self._event(event_type, item, **facts)
            )
            if kind == "broken":
                event = event._replace(state=b"{}")
            elif kind == "unknown":
                event = event._replace(topic="of.another.release")
            events.append(event)
            for name in failing:
                self.faults.events[name].add((item.int, event.version))
        head = self.log.head()
        self.log.commit([Group([Save(uuid4(), "Test", events, (), None)])])
        return [self._entry(found) for found in self.log.read(head, len(events))]

    def _event(self, event_type, item, **facts):
        self.versions[item] += 1
        event = event_type(
            originator_id=item,
            originator_version=self.versions[item],
            timestamp=NOW,
            occurred_at=NOW,
            **facts,
        )
        return self.mapper.encode(event)

    def _entry(self, found):
        is_read = found.state != b"{}" and found.topic != "of.another.release"
        event = self.mapper.decode(*found[1:]) if is_read else None
        return Entry(found.position, found.aggregate_id, found.topic, event)

    def close(self):
        self.platform.close()
        if self.database is not None:
            self.database.close()
        for store in self.stores:
            store.close()


@pytest.fixture
def world(store_url):
    with closing(World(store_url)) as world:
        yield world


# What reads and writes ------------------------------------------------------------------------

RUNNERS = 3


class Runner:
    """One of several that fold the same views, as a follower does it: what fails, in halves."""

    def __init__(self, number, pages, views):
        self.owner = f"{number}"
        self._begin = (pages, tuple(views))
        self.begin()

    def begin(self):
        """Begin anew, with nothing in mind."""
        self.pages, views = self._begin
        self.folds = {view.name: Fold(view) for view in views}
        self.limits = {}
        self.memories = []
        self.is_busy = False
        """It is in the middle of a page, which goes on from where it began."""

    def look(self):
        readers = [fold.reader for fold in self.folds.values()]
        self._adopt(self.pages.views.checkpoints(readers))

    def hold(self, seconds=LONG):
        readers = [fold.reader for fold in self.folds.values()]
        found = self.pages.views.hold(readers, self.owner, seconds)
        if not self.is_busy:
            self._adopt(found)

    def _adopt(self, found):
        for fold, at in zip(self.folds.values(), found, strict=True):
            fold.adopt(at)

    def page(self, name, size, *, is_shared, ahead=None):
        """Fold a page, and those that follow on it: the next one before it is written, or after."""
        first = self.folds[name]
        group = [
            fold
            for fold in self.folds.values()
            if fold is first
            or (
                is_shared
                and fold.checkpoint.position == first.checkpoint.position
                and not self.limits.keys() & {fold.reader.name, name}
            )
        ]
        limit = min(size, self.limits.get(name, size))
        pages = self.pages
        if ahead is None:
            self._see_to(pages.fold(group, limit), group, limit)
            return
        page = pages.begin(group, limit)
        while isinstance(page, Prepared):
            follows = page.has_more and not page.failed
            with ThreadPoolExecutor(1) as beside:
                prepare = partial(pages.prepare, group, limit, page)
                after = prepare() if follows and ahead == "before" else None
                waited = beside.submit(prepare) if follows and ahead == "beside" else None
                outcome = pages.write(page)
            self._see_to(outcome, group, limit)
            if not follows or outcome.is_lost:
                return
            page = after or (waited.result() if waited else prepare())
            if page.failed:
                return
        self._see_to(page, group, limit)

    def _see_to(self, outcome, group, limit):
        if outcome.is_lost:
            self.look()
            return
        for fold in group:
            if fold not in outcome.failed:
                self.limits.pop(fold.reader.name, None)
            elif limit > 1:
                self.limits[fold.reader.name] = limit // 2
            else:
                self.pages.park(fold, "it fails")

    def remember(self):
        self.memories.append({name: _copied(fold) for name, fold in self.folds.items()})

    def recall(self, number):
        """Go back to a moment, and to all that was known then."""
        memory = self.memories[number % len(self.memories)]
        self.folds = {name: _copied(fold) for name, fold in memory.items()}


def _copied(fold):
    other = copy(fold)
    other.rows = copy(fold.rows)
    other.parked = None if fold.parked is None else set(fold.parked)
    return other


class Model:
    """What is to be found of one view, and what may become of it."""

    def __init__(self, view, faults, log, at):
        self.view = view
        self.cause = "flows" if view.name == "trickles" else view.name
        """In whose name it fails."""
        self.faults = faults
        self.log = log
        self.position, self.epoch = at.position, at.epoch
        self.owner, self.is_held = "", False
        self.letters = {}
        """By position: whether an error is told, by key."""
        self.dropped = set()

    def keys_of(self, entry):
        """Return the keys under which an event is parked; none if it is not the view's at all."""
        if entry.event is None:
            is_concerned = entry.is_of_another_release or entry.topic in self.view.topics
            return (entry.item.hex,) if is_concerned else ()
        return self.view.keys_of(entry.event) if self.view.is_of(entry.event) else ()

    def fails(self, entry):
        return entry.event is None or self.faults.are_in(self.cause, entry.event)

    def advance(self, position):
        """Note a page that ends there."""
        stuck = {key for keys in self.letters.values() for key in keys}
        for entry in self.log:
            if not self.position < entry.position <= position:
                continue
            keys = self.keys_of(entry)
            is_stuck = not stuck.isdisjoint(keys)
            if keys and (is_stuck or self.fails(entry)):
                told = entry.event is None or not is_stuck
                self.letters[entry.position] = dict.fromkeys(keys, told)
                stuck.update(keys)
        self.position = position

    def retry(self, position):
        """Note that what is parked at a position was tried again."""
        keys = self.letters[position].keys()
        before = {key for at, found in self.letters.items() if at < position for key in found}
        assert before.isdisjoint(keys), f"{position} was tried while others of its key wait"
        if self.fails(self.at(position)):
            self.letters[position] = dict.fromkeys(keys, True)
        else:
            del self.letters[position]

    def retried(self):
        """Return how many would be folded at a retry of all, and how many would stay."""
        stuck, kept = set(), 0
        for position, keys in sorted(self.letters.items()):
            if not stuck.isdisjoint(keys) or self.fails(self.at(position)):
                stuck.update(keys)
                kept += 1
        return len(self.letters) - kept, kept

    def at(self, position):
        return next(entry for entry in self.log if entry.position == position)

    def folded(self):
        """Return the events that are to be found in the rows."""
        return [
            entry.event
            for entry in self.log
            if entry.event is not None
            and entry.position <= self.position
            and entry.position not in self.letters.keys() | self.dropped
            and self.view.is_of(entry.event)
        ]

    def rows(self):
        self.faults.are_ignored = True
        folded = self.view.fold(self.folded(), lambda _: {})
        self.faults.are_ignored = False
        return {key: row for key, row in folded.items() if row is not None}


# The machine ----------------------------------------------------------------------------------

A_RUNNER = st.integers(0, RUNNERS - 1)
A_NAME = st.sampled_from(NAMES)
AHEAD = st.sampled_from([None, None, "before", "after"])
A_PAGE = st.tuples(A_RUNNER, A_NAME, st.sampled_from([1, 2, 3, 5, 8, 50]), st.booleans(), AHEAD)
"""Whose, of which view first, how large, whether it is shared, and when the next one is begun."""
KINDS = (*["sold"] * 28, *["returned"] * 8, *["received"] * 8, *["renamed"] * 4)
AN_EVENT = st.tuples(
    st.sampled_from([*KINDS, "broken", "unknown"]),
    st.sampled_from(ITEMS),
    st.sampled_from(COUNTRIES),
    st.integers(1, 4),
    st.sampled_from([()] * 36 + [("flows",), ("routes",), ("counts",), FAULTY]),
    st.sampled_from([0] * 9 + [12]),
)
"""What, of which item, where, how many, which views cannot fold it, how much else comes first."""
EVENTS = st.lists(AN_EVENT, max_size=4)
A_TURN = st.tuples(EVENTS, st.booleans(), A_PAGE)
"""What is written before, and whether the runner looks how far others are."""
A_TURN_OF_ANOTHER = st.tuples(st.just("turn"), EVENTS, st.just(value=True), A_PAGE)
HAPPENS = st.one_of(
    *[A_TURN_OF_ANOTHER] * 3,
    st.just(("lost",)),
    st.just(("killed",)),
    *[st.tuples(st.just("written"), EVENTS)] * 3,
    st.tuples(st.just("hold"), A_RUNNER),
    *[st.tuples(st.just("retry"), A_RUNNER, st.none() | A_NAME)] * 2,
    st.tuples(st.just("drop"), A_RUNNER, st.none() | A_NAME, st.integers(0, 3)),
    st.tuples(st.just("fence"), A_RUNNER, st.none() | A_NAME),
)
HARM = st.none() | st.tuples(st.integers(0, 3) | st.integers(0, 11), HAPPENS)
"""What happens in the middle of something, to the same view if none is named, and when."""


class PagesMachine(RuleBasedStateMachine):
    def __init__(self, world):
        super().__init__()
        self.world = world
        self.faults = world.faults
        self.doing, self.names = [], ["flows"]
        self.harm = None
        self.broken = None
        """What was found to be wrong: pages take it for the fault of a view, and go on."""

    @initialize()
    def begin(self):
        world = self.world
        world.begin_anew()
        world.in_transaction = partial(self._step, is_free=False)
        self.log = []
        found = world.store.checkpoints(list(world.views.values()))
        self.models = {
            name: Model(view, self.faults, self.log, at)
            for (name, view), at in zip(world.views.items(), found, strict=True)
        }
        self.runners = [self._runner(number) for number in range(RUNNERS)]
        for runner in self.runners:
            runner.look()

    def _runner(self, number):
        world = self.world
        store = world.stores[number % len(world.stores)]
        log = Stepped(store.log, self._step, lambda *_: None)
        views = Stepped(store.views, self._step, self._told)
        pages = Pages(log, views, world.mapper, world.platform)
        return Runner(number, pages, world.views.values())

    # What happens at a step

    def _step(self, *, is_free=True):
        if self.harm is None:
            return
        left, happens = self.harm
        is_outage = happens[0] in ("lost", "killed")
        if left > 0 or not (is_free or is_outage):  # nobody else can write in a transaction
            self.harm = (max(0, left - 1), happens)
            return
        self.harm = None
        if happens[0] == "lost":
            raise LostError("by the test")
        if happens[0] == "killed":
            raise Killed
        getattr(self, f"_{happens[0]}")(*happens[1:])

    def _told(self, name, answer, *arguments, **options):
        """Take note of what was done to the store, and look whether it may have been."""
        try:
            if name == "write":
                self._told_of_write(answer, *arguments, **options)
            elif name == "hold":
                self._told_of_hold(answer, *arguments)
        except AssertionError as error:
            self.broken = error
            raise
        if name == "release":
            for model in self.models.values():
                if model.owner == arguments[0]:
                    model.owner, model.is_held = "", False

    def _told_of_write(self, is_written, changes, position, *, is_fence=False, **_):
        models = [self.models[change.reader.name] for change in changes]
        expected = all(
            change.checkpoint[:2] == (model.position, model.epoch)
            for change, model in zip(changes, models, strict=True)
        )
        assert is_written == expected, "somebody wrote from a checkpoint that is over, or could not"
        if not is_written:
            return
        for change, model in zip(changes, models, strict=True):
            model.epoch += is_fence
            touched = {letter.position for letter in (*change.released, *change.parked)}
            if self.doing[-1] == "page":
                model.advance(position)
            elif self.doing[-1] == "retry":
                (touched_at,) = touched
                model.retry(touched_at)
            elif self.doing[-1] == "drop":
                for touched_at in touched & model.letters.keys():
                    del model.letters[touched_at]
                    model.dropped.add(touched_at)
            self._check_letters(model)

    def _told_of_hold(self, found, readers, owner, seconds):
        for reader, at in zip(readers, found, strict=True):
            model = self.models[reader.name]
            if not model.is_held or model.owner == owner:
                model.epoch += model.owner != owner
                model.owner, model.is_held = owner, True
            known = (model.position, model.epoch, model.owner)
            assert (at.position, at.epoch, at.owner) == known
            assert at.is_held or seconds < LONG

    # What may be done at any time

    @contextmanager
    def _does(self, what, harm=None, runner=None, name=None):
        """Do something, to a view, in the middle of which something else happens."""
        self.doing.append(what)
        self.names.append(name or self.names[-1])
        outer, self.harm = self.harm, harm
        try:
            yield
        except LostError:
            pass
        except Killed:
            runner.begin()
        except BaseException as error:
            self.broken = error
            raise
        finally:
            self.harm = outer
            self.doing.pop()
            self.names.pop()

    def _written(self, moves):
        self.log += self.world.write(moves)

    def _page(self, number, name, size, is_shared, ahead, harm=None):
        runner = self.runners[number]
        with self._does("page", harm, runner, name):
            runner.is_busy = True
            try:
                runner.page(name, size, is_shared=is_shared, ahead=ahead)
            finally:
                runner.is_busy = False

    def _hold(self, number, harm=None):
        runner = self.runners[number]
        with self._does("hold", harm, runner):
            runner.hold()

    def _retry(self, number, name, harm=None):
        runner = self.runners[number]
        model = self.models[name or self.names[-1]]
        expected = model.retried()
        with self._does("retry", harm, runner, name):
            retried = runner.pages.retry(Fold(model.view))
            assert harm is not None or retried == expected

    def _drop(self, number, name, which, harm=None):
        """Drop one, or all that cannot be read."""
        runner = self.runners[number]
        model = self.models[name or self.names[-1]]
        positions = sorted(model.letters)
        if which < len(positions):
            with self._does("drop", harm, runner, name):
                dropped = runner.pages.drop(model.view, positions[which])
                assert harm is not None or dropped == 1

    def _fence(self, number, name, harm=None):
        runner = self.runners[number]
        view = self.models[name or self.names[-1]].view
        with self._does("fence", harm, runner, name):
            runner.pages.change(view, (), ())

    # Rules

    @rule(turns=st.lists(A_TURN, min_size=1, max_size=6))
    def runners_take_turns(self, turns):
        for moves, looks, page in turns:
            self._turn(moves, looks, page)

    @rule(turn=A_TURN, harm=HARM)
    def something_happens_in_the_middle_of_a_page(self, turn, harm):
        self._turn(*turn, harm)

    def _turn(self, moves, looks, page, harm=None):
        self._written(moves)
        number, *how = page
        while self.runners[number].is_busy:
            number = (number + 1) % RUNNERS
        with self._does("look"):
            if looks:
                self.runners[number].look()
        self._page(number, *how, harm=harm)

    @rule(
        number=A_RUNNER,
        how=st.sampled_from(["taken", "given up", "run out", "begun anew"]),
        harm=HARM,
    )
    def ownership_changes(self, number, how, harm):
        runner = self.runners[number]
        if how == "taken":
            self._hold(number, harm)
            return
        with self._does("hold"):
            if how == "begun anew":
                runner.begin()
            elif how == "given up":
                runner.pages.views.release(runner.owner)
            else:
                runner.hold(0.001)
                sleep(0.003)
                for model in self.models.values():
                    model.is_held = model.is_held and model.owner != runner.owner

    @rule(number=A_RUNNER, which=st.none() | st.integers(0, 3))
    def a_runner_pauses_or_goes_on_from_where_it_paused(self, number, which):
        runner = self.runners[number]
        if which is None:
            runner.remember()
        elif runner.memories:
            runner.recall(which)

    @rule(number=A_RUNNER, name=A_NAME, is_mended=st.booleans(), harm=HARM)
    def what_is_parked_is_tried_again(self, number, name, is_mended, harm):
        model = self.models[name]
        for position in sorted(model.letters)[:1]:
            event = model.at(position).event
            self.faults.events[model.cause].discard(event and named(event))
        if is_mended:
            for each in NAMES:
                self.faults.events[each].clear()
                self._retry(number, each)
        self._retry(number, name, harm)

    @rule(number=A_RUNNER, name=A_NAME, which=st.none() | st.integers(0, 3), harm=HARM)
    def something_is_dropped_or_the_view_fenced(self, number, name, which, harm):
        if which is None:
            self._fence(number, name, harm)
        else:
            self._drop(number, name, which, harm)

    # What holds at any time

    def _check_letters(self, model):
        found = defaultdict(dict)
        for letter in self.world.store.dead_letters(model.view):
            found[letter.position][letter.key] = bool(letter.error)
        assert found == model.letters

    @invariant()
    def what_is_stored_is_a_plain_fold(self):
        if self.broken is not None:
            raise self.broken
        if not hasattr(self, "models"):
            return
        store = self.world.stores[-1].views
        for model in self.models.values():
            (at,) = store.checkpoints([model.view])
            letters = sum(map(len, model.letters.values()))
            known = (model.position, model.epoch, letters)
            assert (at.position, at.epoch, at.dead_letters) == known
            rows = model.rows()
            assert store.load(model.view, KEYS) == rows
            shown = {key: row for key, row in rows.items() if model.view.shows(row)}
            assert dict(store.select(model.view, None, None)) == shown
        if self.world.database is not None:
            told = Counter(map(named, self.models["counts"].folded()))
            assert self.world.database.told() == told

    def _finish(self):
        """Mend all, give up what nobody can read, and take in the rest of the log."""
        self.faults.events.clear()
        last = self._runner(RUNNERS)
        for name, model in self.models.items():
            with self._does("page"):
                last.look()
                while last.folds[name].checkpoint.position < self.world.log.head():
                    last.page(name, 7, is_shared=True)
            for position in [p for p in model.letters if model.at(p).event is None]:
                with self._does("drop"):
                    last.pages.drop(model.view, position)
            with self._does("retry"):
                _, kept = last.pages.retry(Fold(model.view))
            assert (kept, model.letters, model.position) == (0, {}, self.world.log.head())
        self.what_is_stored_is_a_plain_fold()

    def teardown(self):
        if hasattr(self, "runners") and self.broken is None:
            self._finish()


@pytest.mark.long
def test_what_is_stored_is_at_any_time_a_plain_fold_of_the_log(
    world, store_url, monkeypatch, caplog
):
    monkeypatch.setattr(pages, "CHUNK", 3)
    monkeypatch.setattr(pages, "CACHED_ROWS", 1)
    monkeypatch.setattr(postgres_views, "COPIED", 2)
    run_state_machine_as_test(
        partial(PagesMachine, world),
        settings=settings(
            max_examples=max(10, EXAMPLES[store_url.partition(":")[0]]),
            stateful_step_count=STEPS,
            suppress_health_check=list(HealthCheck),
        ),
    )
    assert "somebody else has written" not in caplog.text  # nobody has: pages knew their rows


# At the same time -----------------------------------------------------------------------------


def test_runners_in_threads_leave_a_plain_fold_too(world):
    world.begin_anew()
    random = Random(1)
    moves = [
        (random.choice(KINDS), random.choice(ITEMS), random.choice(COUNTRIES), 1 + n % 4, (), 0)
        for n in range(300)
    ]
    moves[100::100] = [(*move[:4], FAULTY, 0) for move in moves[100::100]]
    log, errors = [], []

    def written():
        for begin in range(0, len(moves), 5):
            log.extend(world.write(moves[begin : begin + 5]))

    threads = [Thread(target=_run, args=(world, n, errors)) for n in range(RUNNERS)]
    threads.append(Thread(target=written))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []
    world.faults.events.clear()
    store = world.stores[0]
    last = Runner(
        RUNNERS, Pages(store.log, store.views, world.mapper, world.platform), world.views.values()
    )
    for name, view in world.views.items():
        last.look()
        while last.folds[name].checkpoint.position < store.log.head():
            last.page(name, 50, is_shared=True)
        last.pages.retry(Fold(view))
        (at,) = store.views.checkpoints([view])
        model = Model(view, world.faults, log, at)
        assert (at.position, at.dead_letters) == (log[-1].position, 0)
        assert store.views.load(view, KEYS) == model.rows()
        if view.writes is not None:
            assert world.database.told() == Counter(map(named, model.folded()))


def _run(world, number, errors):
    """Fold pages, each while the one before it is written, and disturb others."""
    random = Random(number)
    views = list(world.views.values())
    store = world.stores[number % len(world.stores)]
    pages = Pages(store.log, store.views, world.mapper, world.platform)
    runner = Runner(number, pages, views)
    for _ in range(60):
        try:
            match random.randrange(12):
                case 0:
                    runner.hold(random.choice([0.001, 0.01]))
                case 1:
                    pages.retry(Fold(random.choice(views)))
                case 2:
                    pages.change(random.choice(views), (), ())
                case _:
                    runner.look()
                    size = random.choice([1, 3, 9])
                    runner.page(random.choice(NAMES), size, is_shared=True, ahead="beside")
        except OperationalError:  # of those that wait for each other the database gives one up
            continue
        except Exception as error:
            errors.append(error)
            raise
