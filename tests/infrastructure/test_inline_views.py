"""Inline views: written with the events, so that they can refuse them."""

from __future__ import annotations

import asyncio
import random
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from string import ascii_letters
from urllib.parse import urlsplit

import pytest
from databases import execute
from eventsourcing.persistence import OperationalError
from waiting import until

from leftfold.application import (
    EventStoreUnavailable,
    InvalidModelError,
    NotUnique,
    Projection,
    Unstorable,
)
from leftfold.application.items import RenameItem, item_model, item_stock, shop_model
from leftfold.domain import Err
from leftfold.domain.items import ItemRegistered, ItemRenamed, Reorder, StockSold
from leftfold.infrastructure import Retried, Runtime, Settings, ViewInUseError, follower, pages
from leftfold.infrastructure.errors import TooManyDeadLettersError
from leftfold.infrastructure.items import open_items

pytestmark = pytest.mark.anyio


@dataclass(frozen=True, slots=True)
class Name:
    name: str
    sold: int = 0


def names(**options):
    """A view in which no two items have the same name."""
    view = Projection("names", version=1, row=Name, unique=["name"], inline=True, **options)
    view.on(ItemRegistered)(lambda row, event: Name(event.name))
    view.on(ItemRenamed)(lambda row, event: replace(row, name=event.name))

    @view.on(StockSold)
    def sold(row, event):
        if event.quantity == 13:
            raise ZeroDivisionError
        return replace(row, sold=row.sold + event.quantity)

    return view


def opened(url, view, **options):
    model = replace(item_model, projections=(item_stock, view))
    return Runtime(model, settings=Settings(store=url, **options))


def named(register, sku, name, stock=100):
    return register(sku, stock).model_copy(update={"name": name})


async def take(shop, register, name, *skus):
    """Give items one name, in a program that has no rule against it."""
    for sku in skus:
        (await shop.commands.dispatch(named(register, sku, name))).unwrap()


def shown(shop, view):
    return sorted(row.name for _, row in shop._store.views.select(view, None, None))


async def test_a_second_row_of_the_same_value_is_refused_with_nothing_written(store_url, register):
    view = names()
    async with opened(store_url, view) as shop:
        (await shop.commands.dispatch(named(register, "A", "Cup"))).unwrap()
        answer = await shop.commands.dispatch(named(register, "B", "Cup"))
        assert answer == Err(NotUnique("names", ("name",)))
        assert shop._store.log.head() == 1
        (await shop.commands.dispatch(named(register, "B", "Jug"))).unwrap()
        answer = await shop.commands.dispatch(RenameItem(sku="B", name="Cup"))
        assert answer == Err(NotUnique("names", ("name",)))
        (await shop.commands.dispatch(RenameItem(sku="B", name="Pot"))).unwrap()
        (await shop.commands.dispatch(named(register, "C", "Jug"))).unwrap()
        assert shown(shop, view) == ["Cup", "Jug", "Pot"]


async def test_of_many_at_once_each_is_refused_alone(store_url, register):
    view = names()
    async with opened(store_url, view) as shop:
        wanted = [named(register, f"S{n}", f"N{n % 5}") for n in range(20)]
        answers = await asyncio.gather(*(shop.commands.dispatch(c) for c in wanted))
        assert sum(answer.is_ok() for answer in answers) == 5
        refused = {answer.error for answer in answers if not answer.is_ok()}
        assert refused == {NotUnique("names", ("name",))}
        assert shown(shop, view) == [f"N{n}" for n in range(5)]


async def test_what_was_written_is_seen_at_once(store_url, register):
    view = names()
    async with opened(store_url, view) as shop:
        receipt = (await shop.commands.dispatch(named(register, "A", "Cup"))).unwrap()
        assert shown(shop, view) == ["Cup"]
        (await shop.wait_for(receipt, ["names"])).unwrap()
        for sku in ("B", "C"):
            command = named(register, sku, sku)
            answer = await shop.commands.dispatch(command, consistency=["names", "item_stock"])
            assert answer.unwrap().behind == ()


async def test_an_event_that_an_inline_view_cannot_fold_is_refused(store_url, register, sell):
    view = names()
    async with opened(store_url, view) as shop:
        (await shop.commands.dispatch(named(register, "A", "Cup"))).unwrap()
        answer = await shop.commands.dispatch(sell("A", 13))
        assert isinstance(answer.error, Unstorable)
        assert "ZeroDivisionError in sold" in answer.error.reason
        (await shop.commands.dispatch(sell("A", 1))).unwrap()


async def test_of_many_at_once_one_that_fails_its_own_statements_fails_alone(shared_url, register):
    view = names()

    @view.executing
    def execute(execute, events):
        if any(event.name == "bad" for event in events):
            raise KeyError("bad")

    async with opened(shared_url, view) as shop:
        wanted = [named(register, n, n) for n in ("w", "bad", "a", "b", "c")]
        answers = await asyncio.gather(*(shop.commands.dispatch(c) for c in wanted))
        assert [answer.is_ok() for answer in answers] == [True, False, True, True, True]
        assert answers[1] == Err(Unstorable("KeyError"))
        assert shown(shop, view) == ["a", "b", "c", "w"]


@pytest.mark.parametrize("is_others", [False, True])
async def test_a_statement_of_its_own_that_is_wrong_is_no_outage(
    shared_url, register, caplog, is_others
):
    view = names()
    view.executing(lambda execute, events: execute("INSERT INTO nowhere VALUES (1)"))
    async with opened(shared_url, view) as shop, open_items(shared_url) as other:
        if is_others:
            (await other.commands.dispatch(named(register, "C", "C"))).unwrap()
        for sku in ("A", "B"):
            answer = await shop.commands.dispatch(named(register, sku, sku))
            assert answer == Err(Unstorable("ProgrammingError"))
        assert "nowhere" in caplog.text
        (breaker, *_) = shop.health().parts
        assert breaker.counters["failures"] == 0


async def test_what_is_wrong_with_the_store_itself_is_an_outage_with_inline_views_too(
    shared_url, register
):
    async with opened(shared_url, names()) as shop:
        (await shop.commands.dispatch(named(register, "A", "A"))).unwrap()
        execute(shared_url, "ALTER TABLE leftfold_commands RENAME TO elsewhere")
        answer = await shop.commands.dispatch(named(register, "B", "B"))
        assert isinstance(answer.error, EventStoreUnavailable)


async def test_what_is_too_long_for_an_index_fails_alone_and_is_no_outage(postgres_url, register):
    view, draw = names(), random.Random(1)
    async with opened(postgres_url, view) as shop:
        for _ in range(13):  # more than open a breaker
            long = "".join(draw.choices(ascii_letters, k=9_000))
            wanted = [named(register, n, n) for n in ("a", "b")]
            wanted.insert(1, named(register, "L", long))
            one, other, another = await asyncio.gather(
                *(shop.commands.dispatch(command) for command in wanted)
            )
            assert isinstance(other.error, Unstorable)
            assert not isinstance(getattr(one, "error", None), EventStoreUnavailable)
            assert not isinstance(getattr(another, "error", None), EventStoreUnavailable)
        assert shown(shop, view) == ["a", "b"]
        assert shop.health().is_healthy


async def test_two_processes_race_for_one_value_and_one_gets_it(shared_url, register):
    view = names()
    async with opened(shared_url, view) as one, opened(shared_url, view) as two:
        for n in range(10):
            answers = await asyncio.gather(
                one.commands.dispatch(named(register, f"A{n}", f"N{n}")),
                two.commands.dispatch(named(register, f"B{n}", f"N{n}")),
            )
            assert sorted(answer.is_ok() for answer in answers) == [False, True]


async def test_a_new_inline_view_begins_with_what_the_log_holds(shared_url, register):
    async with open_items(shared_url) as shop:
        for n in range(3):
            (await shop.commands.dispatch(named(register, f"S{n}", f"N{n}"))).unwrap()
    view = names()
    async with opened(shared_url, view) as shop:
        assert shown(shop, view) == ["N0", "N1", "N2"]
        answer = await shop.commands.dispatch(named(register, "B", "N1"))
        assert answer == Err(NotUnique("names", ("name",)))


async def test_what_a_program_without_the_view_writes_is_made_good(shared_url, register):
    view = names()
    async with opened(shared_url, view) as shop, open_items(shared_url) as other:
        (await other.commands.dispatch(named(register, "A", "Cup"))).unwrap()
        answer = await shop.commands.dispatch(named(register, "B", "Cup"))
        assert answer == Err(NotUnique("names", ("name",)))
        (await shop.commands.dispatch(named(register, "B", "Jug"))).unwrap()
        assert shown(shop, view) == ["Cup", "Jug"]


async def test_what_a_program_without_the_view_writes_is_put_aside_if_it_cannot_be_taken_in(
    shared_url, register, sell
):
    view = names()
    async with opened(shared_url, view) as shop, open_items(shared_url) as other:
        (await shop.commands.dispatch(named(register, "A", "Cup"))).unwrap()
        for command in (
            *(named(register, "B", "Jug"), named(register, "C", "Cup"), sell("B", 13)),
            *(named(register, "D", "Pot"), sell("C", 1), sell("D", 2)),
        ):
            (await other.commands.dispatch(command)).unwrap()
        answer = await shop.commands.dispatch(named(register, "E", "Pot"))
        assert answer == Err(NotUnique("names", ("name",)))
        (await shop.commands.dispatch(named(register, "E", "Urn"))).unwrap()
        assert shown(shop, view) == ["Cup", "Jug", "Pot", "Urn"]
        letters = await shop.dead_letters("names")
        assert [(letter.position, letter.error.partition(":")[0]) for letter in letters] == [
            *((3, "NotUnique"), (4, letters[1].error), (6, "")),
        ]
        assert "ZeroDivisionError in sold" in letters[1].error
        # What follows waits behind it, also if it is written here.
        (await shop.commands.dispatch(sell("C", 1))).unwrap()
        assert len(await shop.dead_letters("names")) == 4

        (await shop.commands.dispatch(RenameItem(sku="A", name="Mug"))).unwrap()
        assert await shop.retry("names") == Retried(released=3, kept=1)
        assert shown(shop, view) == ["Cup", "Jug", "Mug", "Pot", "Urn"]
        answer = await shop.commands.dispatch(named(register, "F", "Cup"))
        assert answer == Err(NotUnique("names", ("name",)))


async def test_health_tells_of_what_an_inline_view_has_put_aside(shared_url, register):
    async with opened(shared_url, names()) as shop, open_items(shared_url) as other:
        await take(other, register, "Cup", "A", "B")
        (await shop.commands.dispatch(named(register, "C", "Jug"))).unwrap()

        def put_aside():
            (told,) = (p for p in shop.health().projections if p.name == "names")
            return told.dead_letters

        await until(lambda: put_aside() == 1)


async def test_a_view_that_is_to_halt_refuses_what_comes_after_what_it_cannot_take_in(
    shared_url, register
):
    view = names(on_poison="halt")
    async with opened(shared_url, view) as shop, open_items(shared_url) as other:
        await take(other, register, "Cup", "A", "B")
        for _ in range(2):
            answer = await shop.commands.dispatch(named(register, "C", "Jug"))
            assert answer == Err(NotUnique("names", ("name",)))
        assert shop._store.log.head() == 2


async def test_a_new_view_that_the_log_contradicts_is_opened_only_if_it_parks(shared_url, register):
    async with open_items(shared_url) as shop:
        await take(shop, register, "Cup", "A", "B")
    with pytest.raises(NotUnique, match="name"):
        await opened(shared_url, names()).open()
    view = names(on_poison="park")
    async with opened(shared_url, view) as shop:
        assert shown(shop, view) == ["Cup"]


async def test_what_cannot_be_taken_in_when_a_view_is_opened_again_is_put_aside(
    shared_url, register
):
    view = names()
    async with opened(shared_url, view) as shop:
        (await shop.commands.dispatch(named(register, "A", "Cup"))).unwrap()
    async with open_items(shared_url) as other:
        await take(other, register, "Cup", "B", "C")
    async with opened(shared_url, view) as shop:
        assert shown(shop, view) == ["Cup"]
        assert [letter.position for letter in await shop.dead_letters("names")] == [2, 3]


async def test_what_was_put_aside_at_a_commit_is_told_to_who_waits_for_it(
    shared_url, register, sell
):
    async with opened(shared_url, names()) as shop, open_items(shared_url) as other:
        await take(other, register, "Cup", "A", "B")
        # This process has not looked since: it asks the store.
        (await shop.commands.dispatch(named(register, "C", "Jug"))).unwrap()
        sold = await shop.commands.dispatch(sell("B", 1), consistency=["names"])
        assert sold.unwrap().behind == ("names",)


async def test_what_is_made_good_stays_though_the_commit_is_refused(shared_url, register, caplog):
    view = names()
    async with opened(shared_url, view) as shop, open_items(shared_url) as other:
        await take(other, register, "Cup", "A", "B")
        for _ in range(3):
            answer = await shop.commands.dispatch(named(register, "C", "Cup"))
            assert answer == Err(NotUnique("names", ("name",)))
        assert shown(shop, view) == ["Cup"]
        assert [letter.position for letter in await shop.dead_letters("names")] == [2]
    assert caplog.text.count("names_v1 has put an event aside: NotUnique") == 1


async def test_beyond_the_most_dead_letters_commits_are_refused(shared_url, register, monkeypatch):
    monkeypatch.setattr(pages, "MAX_DEAD_LETTERS", 1)
    view = names()
    async with opened(shared_url, view) as shop, open_items(shared_url) as other:
        await take(other, register, "Cup", "A", "B")
        (await shop.commands.dispatch(named(register, "C", "Jug"))).unwrap()
        await take(other, register, "Cup", "D")
        for _ in range(2):
            answer = await shop.commands.dispatch(named(register, "E", "Pot"))
            assert answer == Err(NotUnique("names", ("name",)))
        assert shown(shop, view) == ["Cup", "Jug"]
        await until(lambda: not shop.health().is_healthy)
        (told,) = (p for p in shop.health().projections if p.name == "names")
        assert told.failure == str(TooManyDeadLettersError("names_v1", 1))
        assert await shop.drop_dead_letters("names") == 1
        await until(lambda: shop.health().is_healthy)
        (await shop.commands.dispatch(named(register, "E", "Pot"))).unwrap()


async def test_a_process_reacts_though_others_have_written_what_a_view_does_not_take(
    shared_url, register, sell
):
    view = names()
    model = replace(shop_model, projections=(item_stock, view))
    async with open_items(shared_url) as other:
        (await other.commands.dispatch(named(register, "A", "Cup", 1))).unwrap()
        async with Runtime(model, shared_url) as shop:
            for command in (named(register, "B", "Cup"), sell("A", 1)):
                (await other.commands.dispatch(command)).unwrap()
            (await shop.catch_up()).unwrap()
            assert list(shop._store.log.versions([Reorder.id_of("A/1")]).values()) == [1]
            assert [letter.position for letter in await shop.dead_letters("names")] == [2]
            assert not any(p.dead_letters for p in shop.health().projections if p.name != "names")


async def test_an_outage_while_others_events_are_made_good_puts_nothing_aside(
    shared_url, register, monkeypatch
):
    async with opened(shared_url, names()) as shop, open_items(shared_url) as other:
        await take(other, register, "Cup", "A", "B")
        views, refused = shop._store.views, []
        genuine = type(views).write

        def write(self, changes, *args, **options):
            if self is views and any(change.rows for change in changes):  # not in the commit
                refused.append(changes)
                raise OperationalError("the server is away")
            return genuine(self, changes, *args, **options)

        with monkeypatch.context() as patched:
            patched.setattr(type(views), "write", write)
            answer = await shop.commands.dispatch(named(register, "C", "Jug"))
            assert isinstance(answer.error, EventStoreUnavailable)
            assert refused
        assert await shop.dead_letters("names") == ()
        (await shop.commands.dispatch(named(register, "C", "Jug"))).unwrap()
        assert len(await shop.dead_letters("names")) == 1


@pytest.mark.parametrize("on_poison", [None, "park"])
async def test_a_view_that_was_dropped_under_its_writers_refuses_them(
    shared_url, register, on_poison
):
    view = names(on_poison=on_poison)
    async with opened(shared_url, view) as shop:
        (await shop.commands.dispatch(named(register, "A", "Cup"))).unwrap()
        shop._store.views.drop(view)
        answer = await shop.commands.dispatch(named(register, "B", "Jug"))
        assert isinstance(answer.error, (Unstorable, EventStoreUnavailable))
        assert await shop.dead_letters("names") == ()


async def test_a_rebuild_that_ends_with_two_such_rows_says_so(shared_url, register):
    async with opened(shared_url, names()) as shop, open_items(shared_url) as other:
        await take(other, register, "Cup", "A", "B")
        (await shop.commands.dispatch(named(register, "C", "Jug"))).unwrap()
        with pytest.raises(NotUnique, match="name"):
            await shop.rebuild("names")
        (await shop.commands.dispatch(named(register, "D", "Pot"))).unwrap()


async def test_others_may_see_to_it_meanwhile(shared_url, register):
    """Whoever comes first has put it aside; the others find that it was."""
    view = names()
    async with (
        opened(shared_url, view) as one,
        opened(shared_url, view) as two,
        open_items(shared_url) as other,
    ):
        for n in range(30):
            (await other.commands.dispatch(named(register, f"S{n}", f"N{n % 7}"))).unwrap()
        answers = await asyncio.gather(
            *(
                each.commands.dispatch(named(register, f"{k}{n}", f"{k}{n}"))
                for k, each in (("A", one), ("B", two))
                for n in range(10)
            )
        )
        assert all(answer.is_ok() for answer in answers)
        assert len(await one.dead_letters("names")) == 23
        assert len(shown(one, view)) == 27


async def test_an_inline_view_may_be_looked_at_by_who_may_not_write(postgres_url, register, caplog):
    async with opened(postgres_url, names()) as shop:
        (await shop.commands.dispatch(named(register, "A", "Cup"))).unwrap()
    execute(postgres_url, "CREATE ROLE looker LOGIN")
    execute(postgres_url, "GRANT SELECT ON ALL TABLES IN SCHEMA public TO looker")
    try:
        url = urlsplit(postgres_url)
        reading = url._replace(netloc=f"looker@{url.netloc.rpartition('@')[2]}").geturl()
        view = names()
        async with opened(reading, view, follow=False, create_tables=False) as shop:
            assert shown(shop, view) == ["Cup"]
        assert "it does not show that inline views are in use" in caplog.text
    finally:
        execute(postgres_url, "DROP OWNED BY looker")
        execute(postgres_url, "DROP ROLE looker")


@pytest.mark.parametrize("seed", range(4))
async def test_whoever_writes_it_holds_all_but_what_was_put_aside(shared_url, register, seed):
    view, chance = names(), random.Random(seed)
    async with opened(shared_url, view) as shop, open_items(shared_url) as other:
        written = {shop: [], other: []}
        for n in range(60):
            by = shop if chance.random() < 0.3 else other
            command = named(register, f"S{n}", f"N{chance.randrange(40)}")
            answer = await by.commands.dispatch(command)
            if answer.is_ok():
                written[by].append(command.name)
        (await shop.commands.dispatch(named(register, "last", "last"))).unwrap()
        assert shown(shop, view) == sorted({*written[shop], *written[other], "last"})
        letters = await shop.dead_letters("names")
        doubled = len(written[shop]) + len(written[other]) + 1 - len(shown(shop, view))
        assert len(letters) == doubled > 0
        assert len(set(written[shop])) == len(written[shop])


@pytest.mark.timed
async def test_an_old_version_is_dropped_when_nobody_writes_it_any_more(
    shared_url, register, monkeypatch
):
    monkeypatch.setattr(follower, "IN_USE", 2.0)
    monkeypatch.setattr(follower, "SHOWN", 0.5)
    newer = names()
    newer.version = 2
    async with opened(shared_url, newer) as new:
        async with opened(shared_url, names()) as old, opened(shared_url, names()):
            (await old.commands.dispatch(named(register, "A", "Cup"))).unwrap()
            for _ in range(2):
                with pytest.raises(ViewInUseError, match="names_v1"):
                    await new.drop_version("names", 1)
                await asyncio.sleep(2.5)  # though nothing happens
        await asyncio.sleep(2.5)
        await new.drop_version("names", 1)
        (await new.commands.dispatch(named(register, "B", "Jug"))).unwrap()
        assert shown(new, newer) == ["Cup", "Jug"]


def test_only_an_inline_view_has_unique_columns():
    with pytest.raises(InvalidModelError, match="inline"):
        Projection("names", version=1, row=Name, unique=["name"])


async def test_what_is_refused_leaves_no_trace_in_other_inline_views(store_url, register):
    last = Projection("last_names", version=1, row=Name, inline=True, key=lambda event: "last")
    last.on(ItemRegistered)(lambda row, event: Name(event.name))
    model = replace(item_model, projections=(item_stock, last, names()))
    async with Runtime(model, store_url) as shop:
        (await shop.commands.dispatch(named(register, "A", "Cup"))).unwrap()
        (await shop.commands.dispatch(named(register, "B", "Jug"))).unwrap()
        assert not (await shop.commands.dispatch(named(register, "C", "Cup"))).is_ok()
        assert shown(shop, last) == ["Jug"]
        (await shop.commands.dispatch(named(register, "D", "Pot"))).unwrap()
        assert shown(shop, last) == ["Pot"]


@asynccontextmanager
async def busy(url, view, register, sell):
    """A shop that sells all the while, and in the end has refused nothing."""
    async with opened(url, view) as shop:
        (await shop.commands.dispatch(named(register, "A", "Cup", 10**6))).unwrap()
        selling = asyncio.gather(*(shop.commands.dispatch(sell("A", 1)) for _ in range(300)))
        yield shop
        assert all(answer.is_ok() for answer in await selling)


async def test_it_can_be_opened_while_others_write(shared_url, register, sell):
    view = names()
    async with busy(shared_url, view, register, sell):
        for _ in range(10):
            async with opened(shared_url, view) as other:
                assert shown(other, view) == ["Cup"]


async def test_it_can_be_built_anew_while_others_write(shared_url, register, sell):
    async with busy(shared_url, names(), register, sell) as shop:
        for _ in range(3):
            assert (await shop.rebuild("names")).changed == 0
