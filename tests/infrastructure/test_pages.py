"""Pages: what they read of the log, what they write of views, and what they put aside."""

from __future__ import annotations

import sqlite3
from collections import Counter
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from urllib.parse import urlsplit
from uuid import UUID, uuid4

import psycopg
import pytest
from eventsourcing.persistence import OperationalError, ProgrammingError

from leftfold.application import EventMapper, InvalidModelError, Projection
from leftfold.application.checkpoints import Change
from leftfold.application.ports import EncodedEvent, Group, Save
from leftfold.domain import attr
from leftfold.domain.items import (
    Item,
    ItemRenamed,
    Reorder,
    ReorderClosed,
    StockReceived,
    StockSold,
)
from leftfold.infrastructure import pages as pages_module
from leftfold.infrastructure.errors import ProjectionFailedError, ViewBusyError
from leftfold.infrastructure.pages import Fold, InlineViews, Pages
from leftfold.infrastructure.platform import SystemPlatform
from leftfold.infrastructure.settings import load_settings
from leftfold.infrastructure.stores import SharedLog, make_store
from leftfold.infrastructure.stores.postgres import READ_TOPICS

A, B, C = UUID(int=1), UUID(int=2), UUID(int=3)
NOW = datetime(2011, 12, 9, 12, 50, tzinfo=UTC)
ELSEWHERE = "of.another.release"


@dataclass(frozen=True, slots=True)
class Tally:
    number: int
    quantity: int


class Shop:
    """A store, and what is needed to fold its events page by page."""

    def __init__(self, url, *projections, aggregates=(Item,)):
        self.url = url
        self.platform = SystemPlatform()
        self.store = make_store(load_settings(store=url))
        self.store.open(projections, create_tables=True)
        self.log, self.views = self.store.log, self.store.views
        mapper_class = EventMapper.of(*aggregates)
        self.mapper = SharedLog(self.log).mapper(mapper_class=mapper_class)
        self.pages = Pages(self.log, self.views, self.mapper, self.platform)
        self.versions = Counter()

    def close(self):
        self.platform.close()
        self.store.close()

    def knowing(self, *aggregates):
        """Return the pages of a program that knows other events."""
        mapper = SharedLog(self.log).mapper(mapper_class=EventMapper.of(*aggregates))
        return Pages(self.log, self.views, mapper, self.platform)

    def event(self, event_type, item, **facts):
        self.versions[item] += 1
        event = event_type(
            originator_id=item,
            originator_version=self.versions[item],
            timestamp=NOW,
            occurred_at=NOW,
            **facts,
        )
        mapper = SharedLog(self.log).mapper(mapper_class=EventMapper.of(Item, Reorder))
        return mapper.encode(event)

    def renamed(self, item=A):
        return self.event(ItemRenamed, item, name="Cup")

    def received(self, item=A, quantity=1):
        return self.event(StockReceived, item, quantity=quantity)

    def sold(self, item=A, quantity=1, country="UK"):
        facts = {"invoice": "1", "unit_price": 1, "customer_id": None}
        return self.event(StockSold, item, quantity=quantity, country=country, **facts)

    def write(self, *events):
        """Write events, and return the position of the last."""
        self.log.commit([Group([Save(uuid4(), "Test", events, (), None)])])
        return self.log.head()

    def fold_of(self, projection):
        fold = Fold(projection)
        self.look(fold)
        return fold

    def look(self, *folds):
        found = self.views.checkpoints([fold.reader for fold in folds])
        for fold, at in zip(folds, found, strict=True):
            fold.adopt(at)

    def rows(self, projection, *keys):
        return self.views.load(projection, keys or (A.hex, B.hex, C.hex))

    def letters(self, projection):
        """Return what is parked: the version of the event, the key, and whether it says why."""
        letters = self.views.dead_letters(projection)
        return [(letter.version, letter.key, bool(letter.error)) for letter in letters]


@pytest.fixture
def opened(store_url):
    """Open a shop on an empty store."""
    shops = []

    def opened(*projections, **options):
        shops.append(Shop(store_url, *projections, **options))
        return shops[-1]

    yield opened
    for shop in shops:
        shop.close()


class Fault:
    """What a projection cannot fold, until it is mended."""

    def __init__(self, *quantities):
        self.quantities = set(quantities)

    def stop(self, event):
        if event.quantity in self.quantities:
            raise ZeroDivisionError


def tallying(name="tallies", fault=None, events=(StockReceived, StockSold), **options):
    """A view that counts events and adds up quantities."""
    view = Projection(name, version=1, row=Tally, **options)
    for event_type in events:

        @view.on(event_type)
        def count(row, event):
            if fault is not None:
                fault.stop(event)
            row = row or Tally(0, 0)
            return Tally(row.number + 1, row.quantity + event.quantity)

    return view


@contextmanager
def before_each(monkeypatch, part, name, do):
    """Do something before each call of a method of a store, and note what it is called with."""
    genuine, calls = getattr(part, name), []

    def call(*arguments, **options):
        calls.append(arguments)
        do(len(calls))
        return genuine(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(part, name, call)
        yield calls


def nothing(_call):
    pass


# Reading --------------------------------------------------------------------------------------


def test_a_page_moves_the_view_to_the_logs_end_and_says_that_it_is_built(opened):
    view = tallying()
    shop = opened()
    head = shop.write(shop.received(A, 5), shop.renamed(A), shop.received(B, 7))
    shop.views.define(view)
    fold = shop.fold_of(view)
    assert not fold.checkpoint.is_built
    outcome = shop.pages.fold([fold], 10)
    assert (outcome.events, outcome.has_more, outcome.head) == (3, False, head)
    assert fold.checkpoint == shop.views.checkpoints([view])[0]
    assert (fold.checkpoint.position, fold.checkpoint.is_built) == (head, True)
    assert shop.rows(view) == {A.hex: Tally(1, 5), B.hex: Tally(1, 7)}


def test_a_view_whose_last_page_was_full_to_the_logs_end_is_built(opened):
    view = tallying()
    shop = opened()
    shop.write(*(shop.received() for _ in range(4)))
    shop.views.define(view)
    fold = shop.fold_of(view)
    shop.pages.fold([fold], 2)
    assert not shop.views.checkpoints([view])[0].is_built
    shop.pages.fold([fold], 2)
    assert fold.checkpoint == shop.views.checkpoints([view])[0]
    assert fold.checkpoint.is_built


def test_nothing_beyond_a_position_is_folded_if_one_is_given(opened):
    view = tallying()
    shop = opened(view)
    first = shop.write(shop.received(), shop.received())
    last = shop.write(shop.received(), shop.received())
    fold = shop.fold_of(view)
    for until, number in ((first - 1, 1), (first, 2), (first, 2), (last + 9, 4)):
        shop.pages.fold([fold], 10, until)
        assert fold.checkpoint.position == min(until, last)
        assert shop.rows(view) == {A.hex: Tally(number, number)}


def test_events_that_are_written_while_a_page_is_begun_are_folded_once(opened, monkeypatch):
    view = tallying()
    shop = opened(view)
    shop.write(shop.received())
    fold = shop.fold_of(view)

    def others(call):
        if call == 1:
            shop.write(shop.received())

    with before_each(monkeypatch, shop.log, "read", others):
        shop.pages.fold([fold], 10)
        shop.pages.fold([fold], 10)
    assert shop.rows(view) == {A.hex: Tally(2, 2)}
    assert fold.checkpoint.position == shop.log.head()


@contextmanager
def decoding(monkeypatch, shop):
    """Note what is decoded."""
    decoded, decode_all = [], shop.mapper.decode_all

    def noted(stored):
        stored = list(stored)
        decoded.extend(stored)
        return decode_all(stored)

    with monkeypatch.context() as patched:
        patched.setattr(shop.mapper, "decode_all", noted)
        yield decoded


def test_views_that_are_equally_far_read_and_decode_each_event_once(opened, monkeypatch):
    views = [tallying(), tallying("again"), tallying("sales", events=(StockSold,))]
    shop = opened(*views)
    shop.write(*(shop.received() for _ in range(5)), *(shop.sold(B) for _ in range(5)))
    folds = [shop.fold_of(view) for view in views]
    with (
        before_each(monkeypatch, shop.log, "read", nothing) as reads,
        decoding(monkeypatch, shop) as decoded,
    ):
        shop.pages.fold(folds, 20)
    assert (len(reads), len(decoded)) == (1, 10)
    assert [shop.rows(view) for view in views] == [
        {A.hex: Tally(5, 5), B.hex: Tally(5, 5)},
        {A.hex: Tally(5, 5), B.hex: Tally(5, 5)},
        {B.hex: Tally(5, 5)},
    ]


@pytest.mark.parametrize("kept", [0, pages_module.CACHED_ROWS])
def test_a_page_says_which_of_its_rows_are_not_there_yet(opened, monkeypatch, kept):
    monkeypatch.setattr(pages_module, "CACHED_ROWS", kept)
    monkeypatch.setattr(pages_module, "CHUNK", 1)
    view = tallying(events=(StockReceived,))

    @view.on(StockSold)
    def sold_out(row, event):
        return None

    shop = opened(view)
    fold = shop.fold_of(view)

    def fresh(*events):
        shop.write(*events)
        with before_each(monkeypatch, shop.views, "write", nothing) as calls:
            shop.pages.fold([fold], 10)
        ((((change,), _),)) = calls
        return set(change.fresh)

    assert fresh(shop.received(A), shop.received(A), shop.sold(B)) == {A.hex, B.hex}
    assert fresh(shop.received(A), shop.received(B)) == {B.hex}
    assert fresh(shop.sold(A), shop.received(A), shop.sold(B)) == set()
    assert fresh(shop.received(B)) == {B.hex}
    assert shop.rows(view) == {A.hex: Tally(1, 1), B.hex: Tally(1, 1)}


def test_a_page_says_so_too_while_the_one_before_it_is_not_written(opened):
    view = tallying()
    shop = opened(view)
    shop.write(shop.received(A), shop.received(B), shop.received(A), shop.received(C))
    fold = shop.fold_of(view)
    first = shop.pages.prepare([fold], 2)
    second = shop.pages.prepare([fold], 2, first)
    assert [turn.change().fresh for page in (first, second) for turn in page.turns] == [
        {A.hex, B.hex},
        {C.hex},
    ]


def test_views_that_fold_the_same_say_the_same(opened):
    view = tallying()
    views = view, view.derive("large", version=1, specification=attr("quantity") > 1)
    shop = opened(*views)
    folds = [shop.fold_of(view) for view in views]
    shop.write(shop.received(A), shop.received(B))
    one, two = shop.pages.prepare(folds, 10).turns
    assert two.leader is one
    assert one.change().fresh == two.change().fresh == {A.hex, B.hex}


def test_only_events_that_satisfy_where_are_folded(opened):
    view = tallying(where=attr("quantity") > 1)
    shop = opened(view)
    shop.write(shop.received(A, 1), shop.received(A, 2), shop.sold(A, 5), shop.received(B, 1))
    shop.pages.fold([shop.fold_of(view)], 10)
    assert shop.rows(view) == {A.hex: Tally(2, 7)}


# Rare events ----------------------------------------------------------------------------------


def rare(fault=None):
    return tallying("rare", fault, events=(StockSold,))


def sparse(shop, view):
    """Return what has learnt that events of its view are rare."""
    shop.write(*(shop.renamed() for _ in range(20)))
    fold = shop.fold_of(view)
    shop.pages.fold([fold], 50)
    assert fold.is_sparse
    return fold


def test_of_a_view_of_rare_events_only_those_are_read(opened, monkeypatch):
    view = rare()
    shop = opened(view)
    fold = sparse(shop, view)
    head = shop.write(
        shop.sold(), *(shop.renamed() for _ in range(20)), shop.sold(), shop.renamed()
    )
    with decoding(monkeypatch, shop) as decoded:
        assert shop.pages.fold([fold], 50).events == 2
    assert {topic for _, _, topic, _ in decoded} == {StockSold.TOPIC}
    assert fold.checkpoint.position == head
    assert shop.rows(view) == {A.hex: Tally(2, 2)}


def test_a_view_of_rare_events_moves_on_where_there_are_none(opened):
    view = rare()
    shop = opened(view)
    fold = sparse(shop, view)
    head = shop.write(*(shop.renamed() for _ in range(20)))
    assert shop.pages.fold([fold], 5) == (0, False, False, head, {})
    assert shop.views.checkpoints([view])[0].position == head
    assert fold.is_sparse


def test_a_view_whose_events_are_rare_no_more_reads_the_log_as_it_lies(opened, monkeypatch):
    view = rare()
    shop = opened(view)
    fold = sparse(shop, view)
    shop.write(*(shop.sold() for _ in range(8)))
    with before_each(monkeypatch, shop.log, "read", nothing) as reads:
        shop.pages.fold([fold], 4)
        assert not fold.is_sparse
        shop.pages.fold([fold], 4)
    assert [len(arguments) for arguments in reads] == [3, 2]  # by topics, and then not
    assert shop.rows(view) == {A.hex: Tally(8, 8)}


def test_views_share_a_page_of_rare_events_only_if_those_of_all_are_rare(opened):
    view, other = rare(), tallying(events=(StockReceived,))
    shop = opened(view, other)
    fold = sparse(shop, view)
    beside = shop.fold_of(other)
    shop.pages.fold([beside], 50)
    beside.is_sparse = False
    shop.write(*(shop.received() for _ in range(20)), shop.sold())
    shop.pages.fold([fold, beside], 50)
    assert shop.rows(view) == {A.hex: Tally(1, 1)}
    assert shop.rows(other) == {A.hex: Tally(20, 20)}
    assert not fold.is_sparse


def test_a_view_of_rare_events_does_not_pass_over_those_of_unknown_topics(opened):
    view = rare()
    shop = opened(view)
    fold = sparse(shop, view)
    shop.write(shop.renamed(), shop.sold(B)._replace(topic=ELSEWHERE), shop.sold(B), shop.sold(C))
    shop.pages.fold([fold], 50)
    assert shop.letters(view) == [(1, B.hex, True), (2, B.hex, False)]
    assert shop.rows(view) == {C.hex: Tally(1, 1)}


def test_a_topic_that_comes_up_while_events_are_looked_up_is_not_passed_over(opened, monkeypatch):
    view = rare()
    shop = opened(view)
    fold = sparse(shop, view)
    shop.write(shop.sold())

    def others(call):
        if call == 1:
            shop.write(shop.sold(B)._replace(topic=ELSEWHERE))
            shop.write(shop.sold(C))

    with before_each(monkeypatch, shop.log, "read", others):
        shop.pages.fold([fold], 50)
    shop.pages.fold([fold], 50)
    assert shop.letters(view) == [(1, B.hex, True)]
    assert shop.rows(view) == {A.hex: Tally(1, 1), C.hex: Tally(1, 1)}


@pytest.mark.parametrize("others", [1, 20])
def test_of_rare_events_the_one_at_fault_is_parked_and_no_other(opened, others):
    view = rare(Fault(7))
    shop = opened(view)
    fold = sparse(shop, view)
    shop.write(*(shop.renamed(B) for _ in range(others)), shop.sold(B, 7))
    assert fold in shop.pages.fold([fold], 1).failed
    assert shop.pages.park(fold, "it fails")
    assert shop.letters(view) == [(others + 1, B.hex, True)]
    assert fold.checkpoint.position == shop.log.head()


def rarely(shop, number):
    """Write many events, of which few are of one topic."""
    for begin in range(0, number, 1_000):
        topics = ["rare" if n % 500 == 0 else f"common{n % 4}" for n in range(begin, begin + 1_000)]
        shop.write(*(EncodedEvent(A, begin + n, t, b"{}") for n, t in enumerate(topics, 1)))


@pytest.mark.parametrize("is_analyzed", [False, True])
def test_sqlite_looks_events_up_in_the_index_of_topics(sqlite_url, is_analyzed):
    with closing(Shop(sqlite_url)) as shop:
        rarely(shop, 2_000)
        if is_analyzed:
            with shop.store._file.writing() as connection:
                connection.execute("ANALYZE")
        ran = []
        with shop.store._file.reading() as cursor:
            cursor.connection.set_trace_callback(ran.append)
        assert len(shop.log.read(0, 100, ["rare", "absent"])) == 4
    (query,) = (sql for sql in ran if "topic" in sql)
    with closing(sqlite3.connect(sqlite_url.removeprefix("sqlite:///"))) as connection:
        plan = [step for *_, step in connection.execute(f"EXPLAIN QUERY PLAN {query}")]
    assert sum("stored_events_topic (topic=? AND position>?)" in step for step in plan) == 2
    assert not any("SCAN stored_events" in step for step in plan), plan


@pytest.fixture(scope="module", params=["unknown to the planner", "analyzed"])
def many_events(request, postgres_server):
    """A connection to a database with many events."""
    name = f"leftfold_{uuid4().hex}"
    url = urlsplit(postgres_server)._replace(path=f"/{name}").geturl()
    with psycopg.connect(postgres_server, autocommit=True) as server:
        server.execute(f"CREATE DATABASE {name}")
    with closing(Shop(url)) as shop:
        rarely(shop, 20_000)
    with psycopg.connect(url, autocommit=True, prepare_threshold=None) as connection:
        if request.param == "analyzed":
            connection.execute("ANALYZE")
        yield connection
    with psycopg.connect(postgres_server, autocommit=True) as server:
        server.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.mark.parametrize("plan", ["force_custom_plan", "force_generic_plan"])
@pytest.mark.parametrize(
    ("topics", "after", "limit"),
    [
        ("{rare}", 0, 1_000),
        ("{rare,absent}", 0, 1_000),
        ("{rare,absent}", 15_000, 1),
        ("{common1,rare}", 19_000, 5_000),
        ("{common1}", 0, 500),
    ],
)
def test_postgresql_looks_events_up_in_the_index_of_topics(many_events, plan, topics, after, limit):
    """Whatever it knows of the table, and whether it plans for these values or for any."""
    query = READ_TOPICS
    for number in range(1, 5):
        query = query.replace("%s", f"${number}", 1)
    many_events.execute(f"SET plan_cache_mode = {plan}")
    many_events.execute(f"PREPARE look_up (text[], bigint, bigint, bigint) AS {query}")
    explained = many_events.execute(
        f"EXPLAIN EXECUTE look_up ('{topics}', {after}, {limit}, {limit})"
    )
    steps = [step for (step,) in explained]
    many_events.execute("DEALLOCATE look_up")
    scans = {step.split("  (")[0].split("->")[-1].strip() for step in steps if "Scan" in step}
    assert any("stored_events_topic" in scan for scan in scans), steps
    assert not any("Seq Scan" in scan for scan in scans), steps
    assert not any(step.strip().startswith("Filter:") for step in steps), steps


# Statements of their own ----------------------------------------------------------------------


def executing(url, view):
    """Let a view write each event's quantity into a table of its own."""
    mark = "?" if url.startswith("sqlite") else "%s"
    told = []

    @view.executing
    def execute(execute, events):
        events = list(events)
        told.append([event.quantity for event in events])
        for event in events:
            execute(f"INSERT INTO told VALUES ({mark})", (event.quantity,))
        counted = execute("SELECT count(*) FROM told").fetchone()
        told[-1].append(counted[0])

    return told


@contextmanager
def connected(url):
    if url.startswith("sqlite"):
        path = url.removeprefix("sqlite:///")
        with closing(sqlite3.connect(path, isolation_level=None)) as connection:
            yield connection
    else:
        with psycopg.connect(url, autocommit=True) as connection:
            yield connection


def quantities(url):
    with connected(url) as connection:
        return [n for (n,) in connection.execute("SELECT quantity FROM told ORDER BY quantity")]


@pytest.fixture
def telling(shared_url):
    """A view with statements of its own, what they were told, and its shop."""
    view = tallying(events=(StockReceived,), where=attr("quantity") != 4)
    told = executing(shared_url, view)
    with closing(Shop(shared_url, view)) as shop:
        with connected(shared_url) as connection:
            connection.execute("CREATE TABLE told (quantity int)")
        yield view, told, shop


def test_a_views_statements_are_run_with_the_events_of_the_page(telling, shared_url):
    view, told, shop = telling
    shop.write(shop.received(A, 3), shop.sold(A, 9), shop.received(A, 4), shop.received(B, 5))
    shop.pages.fold([shop.fold_of(view)], 10)
    assert told == [[3, 5, 2]]
    assert quantities(shared_url) == [3, 5]


def test_a_views_statements_are_not_run_for_pages_without_its_events(telling):
    view, told, shop = telling
    shop.write(shop.sold(A, 9), shop.received(A, 4))
    fold = shop.fold_of(view)
    shop.pages.fold([fold], 10)
    shop.pages.retry(fold)
    assert (told, fold.checkpoint.position) == ([], 2)


def test_a_views_statements_are_undone_with_their_page(telling, shared_url):
    view, told, shop = telling
    late, quick = shop.fold_of(view), shop.fold_of(view)
    shop.write(shop.received(A, 3))
    shop.pages.fold([quick], 10)
    assert shop.pages.fold([late], 10).is_lost
    assert quantities(shared_url) == [3]
    with connected(shared_url) as connection:
        connection.execute("DROP TABLE told")
    shop.write(shop.received(A, 5))
    before = shop.views.checkpoints([view])
    with pytest.raises(ProgrammingError, match="told"):  # and no outage
        shop.pages.fold([quick], 10)
    assert shop.views.checkpoints([view]) == before
    assert shop.rows(view) == {A.hex: Tally(1, 3)}
    assert told[0] == [3, 1]


def test_rows_are_undone_if_a_views_statements_fail(telling, shared_url):
    view, _, shop = telling
    working = view.writes

    @view.executing
    def failing(execute, events):
        working(execute, events)
        raise ZeroDivisionError

    shop.write(shop.received(A, 3))
    fold = shop.fold_of(view)
    with pytest.raises(ZeroDivisionError):
        shop.pages.fold([fold], 10)
    assert (shop.rows(view), quantities(shared_url)) == ({}, [])
    view.executing(working)
    shop.pages.fold([fold], 10)
    assert (shop.rows(view), quantities(shared_url)) == ({A.hex: Tally(1, 3)}, [3])


def test_a_views_statements_are_run_with_what_is_released_and_not_with_what_is_parked(
    telling, shared_url
):
    view, _, shop = telling
    shop.write(shop.received(A, 3)._replace(topic=ELSEWHERE), shop.received(A, 5))
    fold = shop.fold_of(view)
    shop.pages.fold([fold], 10)
    assert quantities(shared_url) == []
    shop.pages.drop(fold.reader, 1)
    assert shop.pages.retry(fold) == (1, 0)
    assert quantities(shared_url) == [5]


def test_the_store_in_memory_refuses_a_view_with_statements():
    view = tallying()
    view.executing(lambda execute, events: None)
    with pytest.raises(InvalidModelError, match="memory"):
        make_store(load_settings(store="memory:")).open((view,), create_tables=True)


# Several runners ------------------------------------------------------------------------------


def test_rows_are_read_anew_once_another_runner_has_written(opened):
    view = tallying()
    shop = opened(view)
    one, other = shop.fold_of(view), shop.fold_of(view)
    for n in range(1, 7):
        shop.write(shop.received())
        fold = (one, other)[n % 2]
        shop.look(fold)
        assert not shop.pages.fold([fold], 10).is_lost
        assert shop.rows(view) == {A.hex: Tally(n, n)}


def test_rows_are_not_read_again_between_a_runners_own_pages(opened, monkeypatch):
    view = tallying()
    shop = opened(view)
    shop.write(shop.received())
    other = shop.fold_of(view)
    shop.pages.fold([other], 10)
    fold = shop.fold_of(view)
    with before_each(monkeypatch, shop.views, "load", nothing) as loads:
        for _ in range(3):
            shop.write(shop.received())
            shop.pages.fold([fold], 10)
    assert len(loads) == 1
    assert shop.rows(view) == {A.hex: Tally(4, 4)}


def test_a_page_that_another_runner_has_written_is_lost(opened):
    view = tallying()
    shop = opened(view)
    shop.write(shop.received())
    one, other = shop.fold_of(view), shop.fold_of(view)
    assert not shop.pages.fold([one], 10).is_lost
    assert shop.pages.fold([other], 10).is_lost
    assert other.checkpoint.position == 0
    assert shop.rows(view) == {A.hex: Tally(1, 1)}


def test_a_former_owner_cannot_write(opened):
    """It was paused for longer than its lease, and knows nothing of its successor."""
    view = tallying()
    shop = opened(view)
    former, now = Fold(view), Fold(view)
    former.adopt(*shop.views.hold([view], "former", 30))
    shop.write(shop.received())
    shop.views.release("former")
    now.adopt(*shop.views.hold([view], "now", 30))
    assert shop.pages.fold([former], 10).is_lost
    assert shop.rows(view) == {}
    assert not shop.pages.fold([now], 10).is_lost
    assert shop.rows(view) == {A.hex: Tally(1, 1)}


@pytest.mark.parametrize("change", ["retry", "drop", "change"])
def test_what_was_begun_before_a_change_from_outside_cannot_be_written(opened, change):
    fault = Fault(7)
    view = tallying(fault=fault)
    shop = opened(view)
    shop.write(shop.received(A, 7))
    fold = shop.fold_of(view)
    shop.pages.park(fold, "it fails")
    fault.quantities.clear()
    if change == "change":
        shop.pages.change(view, (), ())
    elif change == "drop":
        shop.pages.drop(view)
    else:
        shop.pages.retry(Fold(view))
    shop.write(shop.received(B, 1))
    assert shop.pages.fold([fold], 10).is_lost
    shop.look(fold)
    assert not shop.pages.fold([fold], 10).is_lost


def test_a_page_is_prepared_while_the_one_before_it_waits_to_be_written(opened):
    fault = Fault(7)
    view = tallying(fault=fault)
    shop = opened(view)
    shop.write(shop.received(A, 1), shop.received(B, 7), shop.received(B, 2))
    shop.write(shop.received(B, 3), shop.received(A, 4), shop.received(A, 5))
    fold = shop.fold_of(view)
    shop.pages.fold([fold], 1)
    shop.pages.park(fold, "it fails")
    first = shop.pages.begin([fold], 1)
    second = shop.pages.prepare([fold], 1, first)
    third = shop.pages.prepare([fold], 1, second)
    for page in (first, second, third):
        assert not shop.pages.write(page).is_lost
    assert shop.rows(view) == {A.hex: Tally(2, 5)}
    assert shop.letters(view) == [(1, B.hex, True), (2, B.hex, False), (3, B.hex, False)]
    assert fold.checkpoint == shop.views.checkpoints([view])[0]


def test_what_follows_on_a_page_that_is_lost_is_lost_too(opened):
    view = tallying()
    shop = opened(view)
    shop.write(*(shop.received() for _ in range(4)))
    fold, other = shop.fold_of(view), shop.fold_of(view)
    first = shop.pages.begin([fold], 1)
    second = shop.pages.prepare([fold], 1, first)
    shop.pages.fold([other], 3)
    assert shop.pages.write(first).is_lost
    assert shop.pages.write(second).is_lost
    assert shop.rows(view) == {A.hex: Tally(3, 3)}


def test_views_that_fold_the_same_part_where_one_of_them_has_put_something_aside(opened):
    view = tallying()
    other = view.derive("large", version=1, specification=attr("quantity") > 10)
    shop = opened(view, other)
    folds = one, two = shop.fold_of(view), shop.fold_of(other)
    shop.write(shop.received(), shop.received())
    shop.pages.fold(folds, 1)
    shop.pages.park(one, "its table does not take the row")
    shop.pages.fold([two], 1)
    shop.write(shop.received())
    shop.pages.fold(folds, 5)
    assert (shop.rows(view), shop.rows(other)) == ({A.hex: Tally(1, 1)}, {A.hex: Tally(3, 3)})
    assert (len(shop.letters(view)), len(shop.letters(other))) == (2, 0)


def test_views_that_fold_the_same_part_where_one_of_them_is_retried(opened):
    view = tallying()
    other = view.derive("large", version=1, specification=attr("quantity") > 10)
    shop = opened(view, other)
    folds = one, two = shop.fold_of(view), shop.fold_of(other)
    shop.write(shop.received()._replace(state=b"{}"), shop.received())
    shop.pages.fold(folds, 5)
    shop.pages.drop(one.reader, shop.views.dead_letters(view)[0].position)
    assert shop.pages.retry(Fold(view)) == (1, 0)
    shop.look(one, two)
    shop.write(shop.received())
    shop.pages.fold(folds, 5)
    assert (shop.rows(view), shop.rows(other)) == ({A.hex: Tally(2, 2)}, {})
    assert (len(shop.letters(view)), len(shop.letters(other))) == (0, 3)


# What cannot be folded ------------------------------------------------------------------------


def test_a_view_that_fails_leaves_the_page_and_the_others_are_written(opened):
    views = [tallying(), tallying("failing", Fault(7)), tallying("beside")]
    shop = opened(*views)
    head = shop.write(shop.received(B, 1), shop.received(A, 7))
    folds = [shop.fold_of(view) for view in views]
    outcome = shop.pages.fold(folds, 10)
    assert [type(error) for error in outcome.failed.values()] == [ZeroDivisionError]
    assert list(outcome.failed) == [folds[1]]
    assert [at.position for at in shop.views.checkpoints(views)] == [head, 0, head]
    good = {A.hex: Tally(1, 7), B.hex: Tally(1, 1)}
    assert [shop.rows(view) for view in views] == [good, {}, good]


def test_what_fails_on_rows_that_others_have_changed_meanwhile_is_lost_and_not_at_fault(opened):
    view = Projection("once", version=1, row=Tally)

    @view.on(StockReceived)
    def received(row, event):
        if row is not None:
            raise ZeroDivisionError
        return Tally(1, event.quantity)

    shop = opened(view)
    shop.write(shop.renamed())
    paused = shop.fold_of(view)
    shop.pages.fold([paused], 10)
    shop.look(paused)
    late = Fold(view)
    late.adopt(paused.checkpoint)
    shop.write(shop.received())
    shop.pages.fold([paused], 10)
    outcome = shop.pages.fold([late], 10)
    assert outcome.is_lost


def test_the_next_event_is_parked_and_all_that_follow_under_its_keys(opened):
    fault = Fault(7)
    view = tallying(fault=fault, keys=lambda e: ("all", e.originator_id.hex))
    shop = opened(view)
    shop.write(shop.received(A, 1), shop.received(A, 7), shop.received(B, 1), shop.renamed(A))
    fold = shop.fold_of(view)
    shop.pages.fold([fold], 1)
    assert shop.pages.park(fold, "it fails")
    shop.pages.fold([fold], 10)
    assert shop.letters(view) == [
        (2, A.hex, True),
        (2, "all", True),
        (1, B.hex, False),
        (1, "all", False),
    ]
    assert shop.rows(view, A.hex, B.hex, "all") == {A.hex: Tally(1, 1), "all": Tally(1, 1)}
    assert fold.checkpoint == shop.views.checkpoints([view])[0]


@pytest.mark.parametrize("spoil", [{"topic": ELSEWHERE}, {"state": b"{}"}, {"state": b"\xff"}])
def test_what_cannot_be_read_is_parked_with_what_follows_of_its_aggregate(opened, spoil):
    view = tallying()
    shop = opened(view)
    spoilt = shop.received(A)._replace(**spoil)
    shop.write(spoilt, shop.received(B), shop.received(A), shop.renamed(A))
    fold = shop.fold_of(view)
    shop.pages.fold([fold], 10)
    shop.write(shop.received(A), shop.received(B))
    shop.pages.fold([fold], 10)
    assert shop.letters(view) == [(1, A.hex, True), (2, A.hex, False), (4, A.hex, False)]
    assert shop.rows(view) == {B.hex: Tally(2, 2)}
    assert spoilt.topic in shop.views.dead_letters(view)[0].error


def test_a_broken_event_that_a_view_would_not_read_does_not_concern_it(opened):
    view = tallying(events=(StockReceived,))
    shop = opened(view)
    shop.write(shop.sold(A)._replace(state=b"{}"), shop.received(A))
    shop.pages.fold([shop.fold_of(view)], 10)
    assert shop.letters(view) == []
    assert shop.rows(view) == {A.hex: Tally(1, 1)}


def test_an_event_whose_key_fails_or_cannot_be_kept_is_parked_under_its_aggregate(opened):
    def key(event):
        return {1: "one", 2: "no\0key", 3: 3}[event.quantity]

    view = tallying(key=key)
    shop = opened(view)
    shop.write(shop.received(A, 2), shop.received(B, 3), shop.received(C, 4), shop.received(A, 1))
    fold = shop.fold_of(view)
    for _ in range(3):
        shop.pages.park(fold, "it fails")
    shop.pages.fold([fold], 10)
    assert [key for _, key, _ in shop.letters(view)] == [A.hex, B.hex, C.hex]
    assert shop.rows(view, "one") == {"one": Tally(1, 1)}


def test_somebody_who_parks_too_late_parks_nothing(opened):
    view = tallying(fault=Fault(7))
    shop = opened(view)
    shop.write(shop.received(A, 7), shop.received(B, 7))
    one, other = shop.fold_of(view), shop.fold_of(view)
    assert shop.pages.park(one, "it fails")
    assert not shop.pages.park(other, "it fails")
    assert shop.letters(view) == [(1, A.hex, True)]


# Retrying and giving up -----------------------------------------------------------------------


def parked(shop, view, *events):
    """Write events, of which a view parks what it cannot fold."""
    shop.write(*events)
    fold = shop.fold_of(view)
    while fold.checkpoint.position < shop.log.head():
        if shop.pages.fold([fold], 1).failed:
            shop.pages.park(fold, "it fails")
    return fold


def by_country(fault):
    """A view that tells in which order events were folded under each country."""
    view = Projection("flows", version=1, row=Flow, key=lambda event: event.country)

    @view.on(StockSold)
    def sold(row, event):
        fault.stop(event)
        return Flow(f"{row.events if row else ''} {event.quantity}")

    return view


@dataclass(frozen=True, slots=True)
class Flow:
    events: str


def test_a_retry_keeps_the_order_under_each_key(opened):
    fault = Fault(1, 2, 6)
    view = by_country(fault)
    shop = opened(view)
    sales = [(1, "UK"), (2, "DE"), (3, "UK"), (4, "DE"), (5, "FR"), (6, "UK"), (7, "UK")]
    fold = parked(shop, view, *(shop.sold(A, n, country) for n, country in sales))
    assert shop.pages.retry(fold) == (0, 6)
    fault.quantities -= {2}
    assert shop.pages.retry(fold) == (2, 4)
    assert shop.rows(view, "UK", "DE", "FR") == {"DE": Flow(" 2 4"), "FR": Flow(" 5")}
    fault.quantities -= {1}
    assert shop.pages.retry(fold) == (2, 2)
    assert shop.letters(view) == [(6, "UK", True), (7, "UK", False)]
    fault.quantities.clear()
    assert shop.pages.retry(fold) == (2, 0)
    assert shop.rows(view, "UK") == {"UK": Flow(" 1 3 6 7")}
    assert shop.pages.retry(fold) == (0, 0)


def test_one_event_of_those_that_are_parked_can_be_given_up(opened):
    view = by_country(Fault(2))
    shop = opened(view)
    fold = parked(shop, view, *(shop.sold(A, n) for n in (1, 2, 3)))
    assert shop.pages.drop(fold.reader, 99) == 0
    assert shop.pages.drop(fold.reader, shop.views.dead_letters(view)[0].position) == 1
    assert shop.letters(view) == [(3, "UK", False)]
    assert shop.pages.retry(fold) == (1, 0)
    assert shop.rows(view, "UK") == {"UK": Flow(" 1 3")}


def test_an_event_of_several_keys_is_given_up_whole(opened):
    fault = Fault(7)
    view = tallying(fault=fault, keys=lambda e: ("all", e.originator_id.hex))
    shop = opened(view)
    fold = parked(shop, view, shop.received(A, 7), shop.received(B, 1))
    assert len(shop.letters(view)) == 4
    assert shop.pages.drop(fold.reader) == 2
    assert shop.letters(view) == []


def test_of_two_who_retry_at_once_one_folds_each_event(opened, monkeypatch):
    fault = Fault(1)
    view = by_country(fault)
    shop = opened(view)
    fold = parked(shop, view, *(shop.sold(A, n) for n in (1, 2, 3)))
    fault.quantities.clear()
    retried = []

    def other(call):
        if call == 2 and not retried:
            retried.append(None)
            retried.append(shop.pages.retry(Fold(view)))

    with before_each(monkeypatch, shop.views, "write", other):
        assert shop.pages.retry(fold) == (1, 0)
    assert retried[1] == (2, 0)
    assert shop.rows(view, "UK") == {"UK": Flow(" 1 2 3")}
    assert shop.letters(view) == []


def test_what_another_has_given_up_during_a_retry_stays_so(opened, monkeypatch):
    fault = Fault(1)
    view = by_country(fault)
    shop = opened(view)
    fold = parked(shop, view, *(shop.sold(A, n) for n in (1, 2)))
    fault.quantities.clear()

    dropped = []

    def other(_call):
        if not dropped and shop.letters(view) == [(2, "UK", False)]:  # its turn comes
            dropped.append(True)
            shop.pages.drop(fold.reader)

    with before_each(monkeypatch, shop.views, "checkpoints", other):
        assert shop.pages.retry(Fold(view)) == (1, 0)
    assert shop.rows(view, "UK") == {"UK": Flow(" 1")}
    assert shop.letters(view) == []


def test_one_who_cannot_fold_it_does_not_park_again_what_another_has_released(opened, monkeypatch):
    fault = Fault(1)
    view = by_country(fault)
    shop = opened(view)
    fold = parked(shop, view, shop.sold(A, 1))

    def other(call):
        if call == 1:
            fault.quantities.clear()
            shop.pages.retry(Fold(view))

    with before_each(monkeypatch, shop.views, "write", other):
        assert shop.pages.retry(fold) == (0, 0)
    assert shop.letters(view) == []
    assert shop.rows(view, "UK") == {"UK": Flow(" 1")}


def test_a_change_of_what_is_parked_leaves_alone_what_is_not_any_more(opened):
    view = by_country(Fault(1))
    shop = opened(view)
    fold = parked(shop, view, shop.sold(A, 1), shop.sold(B, 1, "DE"))
    first, second = shop.views.dead_letters(view)
    shop.pages.drop(fold.reader, first.position)
    shop.pages.change(fold.reader, (), [replace(each, error="again") for each in (first, second)])
    assert [letter.error for letter in shop.views.dead_letters(view)] == ["again"]
    assert shop.letters(view) == [(1, "DE", True)]


def test_a_retry_gives_up_if_pages_come_between_without_end(opened, monkeypatch):
    view = by_country(Fault(1))
    shop = opened(view)
    fold = parked(shop, view, shop.sold(A, 1))
    writes = shop.views.write
    monkeypatch.setattr(pages_module, "ATTEMPTS", 3)

    def others(_call):
        (at,) = shop.views.checkpoints([view])
        assert writes([Change(view, at)], at.position + 1)

    with (
        before_each(monkeypatch, shop.views, "write", others) as tried,
        pytest.raises(ViewBusyError),
    ):
        shop.pages.retry(fold)
    assert len(tried) == 3
    assert shop.letters(view) == [(1, "UK", True)]


def test_what_becomes_readable_waits_behind_what_is_parked_of_its_key(opened):
    """Nobody knew its key: its aggregate's id stood for it."""
    fault = Fault(1)
    view = Projection("flows", version=1, row=Flow, key=lambda event: "all")

    @view.on(StockSold)
    def sold(row, event):
        fault.stop(event)
        return Flow(f"{row.events if row else ''} sold")

    @view.on(ReorderClosed)
    def closed(row, event):
        return Flow(f"{row.events if row else ''} closed")

    shop = opened(view)
    shop.write(shop.sold(A, 1), shop.event(ReorderClosed, B, received=1), shop.sold(A, 2))
    fold = parked(shop, view)
    assert [key for _, key, _ in shop.letters(view)] == ["all", B.hex, "all"]
    newer = shop.knowing(Item, Reorder)
    assert newer.retry(fold) == (0, 3)
    assert [key for _, key, _ in shop.letters(view)] == ["all", "all", "all"]
    fault.quantities.clear()
    assert newer.retry(fold) == (3, 0)
    assert shop.rows(view, "all") == {"all": Flow(" sold closed sold")}


def test_a_store_that_fails_during_a_retry_leaves_the_rest_parked(opened, monkeypatch):
    fault = Fault(1)
    view = by_country(fault)
    shop = opened(view)
    fold = parked(shop, view, *(shop.sold(A, n) for n in (1, 2, 3)))
    fault.quantities.clear()

    def lose(call):
        if call == 2:
            raise OperationalError("it is away")

    with before_each(monkeypatch, shop.views, "write", lose), pytest.raises(OperationalError):
        shop.pages.retry(fold)
    assert shop.letters(view) == [(2, "UK", False), (3, "UK", False)]
    assert shop.pages.retry(fold) == (2, 0)
    assert shop.rows(view, "UK") == {"UK": Flow(" 1 2 3")}


# For those who are told -----------------------------------------------------------------------


def test_who_is_told_of_events_sees_none_beyond_how_far_it_is_said_to_be(opened, monkeypatch):
    view = tallying()
    shop = opened(view)
    head = shop.write(shop.received(), shop.received())
    fold = shop.fold_of(view)

    def others(_call):
        shop.write(shop.received())

    with before_each(monkeypatch, shop.log, "read", others):
        held_back = shop.pages.read_for(fold, 10, head)
        free = shop.pages.read_for(fold, 10)
    assert [at.position for at in held_back.logged] == [head - 1, head]
    assert held_back.end == head
    assert free.logged[-1].position == free.end == shop.log.head()


# A view alone ---------------------------------------------------------------------------------


def test_of_several_events_one_that_a_view_cannot_take_in_is_looked_for_and_put_aside(opened):
    view = tallying(fault=Fault(7), on_poison="park")
    shop = opened(view)
    shop.write(shop.received(), shop.received(B, 7), shop.received(C))
    fold = shop.fold_of(view)
    assert fold in shop.pages.fold_alone(fold, 3).failed
    assert not shop.pages.fold_alone(fold, 1).failed
    assert shop.letters(view) == []
    assert fold in shop.pages.fold_alone(fold, 1).failed
    assert shop.letters(view) == [(1, B.hex, True)]
    assert not shop.pages.fold_alone(fold, 1).failed
    assert shop.rows(view) == {A.hex: Tally(1, 1), C.hex: Tally(1, 1)}


def test_where_others_come_before_nothing_is_put_aside_and_the_page_is_lost(opened, monkeypatch):
    view = tallying(fault=Fault(7), on_poison="park")
    shop = opened(view)
    shop.write(shop.received(A, 7))
    fold = shop.fold_of(view)
    with before_each(monkeypatch, shop.pages, "park", lambda _: shop.pages.change(view, (), ())):
        assert shop.pages.fold_alone(fold, 1).is_lost
    assert shop.letters(view) == []


# Inline ---------------------------------------------------------------------------------------


def test_an_inline_view_that_fails_in_the_first_of_many_events_says_so(opened, monkeypatch):
    monkeypatch.setattr(pages_module, "INLINE", 2)
    view = tallying(fault=Fault(7), inline=True, on_poison="halt")
    shop = opened(view)
    shop.write(shop.received(A, 7), *(shop.received() for _ in range(5)))
    with pytest.raises(ProjectionFailedError, match="ZeroDivisionError"):
        InlineViews([view]).use(shop.pages)


def test_an_inline_view_takes_in_what_was_written_without_it(opened, monkeypatch):
    monkeypatch.setattr(pages_module, "INLINE", 2)
    view = tallying(inline=True)
    shop = opened(view)
    shop.write(*(shop.received() for _ in range(5)))
    InlineViews([view]).use(shop.pages)
    assert shop.rows(view) == {A.hex: Tally(5, 5)}
