"""Processes and the model that holds them; the same class under the library's own runner."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass, replace
from decimal import Decimal
from uuid import uuid5

import pytest
from eventsourcing.persistence import IntegrityError
from eventsourcing.system import SingleThreadedRunner, System
from hypothesis import given, settings
from hypothesis import strategies as st

from leftfold.application import InvalidModelError, Process, Projection, Subscriber
from leftfold.application.errors import UnsavedEventsError
from leftfold.application.items import (
    DiscontinueItem,
    Items,
    ReceiveStock,
    RegisterItem,
    ReorderProcess,
    SellStock,
    TakeBackStock,
    WriteOffStock,
    item_model,
    item_stock,
    reorder_watch,
    shop_model,
)
from leftfold.application.process import Reactions
from leftfold.domain import Aggregate, Created, DomainError, Event, Metadata
from leftfold.domain.items import Item, ItemRegistered, Reorder, ReorderOpened, StockSold
from leftfold.infrastructure import Runtime

SKUS = ("A", "B", "C")


def register(sku="A", stock=5, level=4):
    return RegisterItem(
        sku=sku, name="Cup", unit_price=Decimal(1), opening_stock=stock, reorder_level=level
    )


def sell(sku="A", quantity=1):
    return SellStock(sku=sku, quantity=quantity, invoice="536365")


def receive(sku="A", quantity=9):
    return ReceiveStock(sku=sku, quantity=quantity)


# Under the library's runner -------------------------------------------------------------------


def carried_out_by(items, commands):
    """Call the service's handlers as methods; what is refused changes nothing."""
    handlers = {handling.message_type: handling.handler for handling in items.handlers()}
    for command in commands:
        with suppress(DomainError):
            handlers[type(command)](command)


def streams_of(find, skus=SKUS):
    """Return types and facts of all events of reorders, by item and number."""
    found = {}
    for sku in skus:
        number = 1
        while events := find(Reorder.id_of(Reorder.key_of(sku, number))):
            assert [event.originator_version for event in events] == [*range(1, len(events) + 1)]
            found[sku, number] = [(type(event), event.facts()) for event in events]
            number += 1
    return found


def by_the_librarys_runner(commands, env=None):
    with SingleThreadedRunner(shop_model.system(), env) as runner:
        carried_out_by(runner.get(Items), commands)
        process = runner.get(ReorderProcess)
        return streams_of(lambda reorder_id: list(process.events.get(reorder_id)))


async def _dispatched(commands, url):
    async with Runtime(shop_model, url) as shop:
        for command in commands:
            await shop.commands.dispatch(command)
        (await shop.catch_up()).unwrap()
        log, mapper = shop._store.log, shop._parts.mapper
        return streams_of(lambda i: mapper.decode_all(log.streams([i])[i]))


def by_leftfold(commands, url="memory:"):
    return asyncio.run(_dispatched(commands, url))


skus = st.sampled_from(SKUS)
quantities = st.integers(1, 6)
commands = st.lists(
    st.one_of(
        st.builds(register, skus, quantities),
        st.builds(sell, skus, quantities),
        st.builds(receive, skus, quantities),
        st.builds(lambda s, q: TakeBackStock(sku=s, quantity=q, invoice="1"), skus, quantities),
        st.builds(lambda s, q: WriteOffStock(sku=s, quantity=q, reason="lost"), skus, quantities),
        st.builds(lambda s: DiscontinueItem(sku=s), skus),
    ),
    max_size=30,
).map(lambda moves: [*map(register, SKUS), *moves])


@given(commands)
@settings(max_examples=25)
def test_the_librarys_runner_gives_the_same_reorders_as_a_runtime(commands):
    assert by_the_librarys_runner(commands) == by_leftfold(commands)


SOME = [register("A"), register("B", 4), sell("A"), receive("B"), sell("A"), receive("A"), sell()]


def on_sqlite(path):
    return {"PERSISTENCE_MODULE": "eventsourcing.sqlite", "SQLITE_DBNAME": str(path)}


def test_the_librarys_runner_gives_the_same_reorders_on_sqlite(tmp_path, sqlite_url):
    by_the_library = by_the_librarys_runner(SOME, on_sqlite(tmp_path / "library.db"))
    assert by_the_library == by_leftfold(SOME, sqlite_url)
    assert [len(stream) for stream in by_the_library.values()] == [2, 2]


def test_a_process_that_the_library_starts_again_goes_on_with_its_rows(tmp_path):
    env = on_sqlite(tmp_path / "library.db")
    by_the_librarys_runner(SOME[:3], env)
    assert by_the_librarys_runner(SOME[3:], env) == by_leftfold(SOME)


def test_an_event_whose_reaction_could_not_be_recorded_is_folded_once():
    with SingleThreadedRunner(shop_model.system()) as runner:
        items, process = runner.get(Items), runner.get(ReorderProcess)
        carried_out_by(items, [register("A", 6)])
        taken = Reorder.open("A", 1, 0, 0)
        process.repository.save(taken)  # by hand: the reaction cannot be recorded
        with pytest.raises(IntegrityError):
            items.sell(sell("A", 2))
        assert process._rows[Item.id_of("A").hex].on_hand == 6


def test_the_events_name_their_cause_under_the_librarys_runner():
    with SingleThreadedRunner(shop_model.system()) as runner:
        carried_out_by(runner.get(Items), [register("A", 4)])
        process = runner.get(ReorderProcess)
        (opened,) = process.events.get(Reorder.id_of(Reorder.key_of("A", 1)))
    cause = str(uuid5(Item.id_of("A"), "1"))
    assert opened.metadata == Metadata(cause, cause)


# Reactions ------------------------------------------------------------------------------------


def sold(number):
    """The cause of a reaction."""
    event = StockSold(
        quantity=1, invoice="536365", unit_price=Decimal(1), country="", customer_id=None
    )
    event.stamp(Item.id_of("A"), number, event.timestamp)
    return event


@pytest.fixture
def process():
    with ReorderProcess() as process:
        yield process


def test_a_reaction_sees_what_those_before_it_have_done(process):
    reorder_id = Reorder.id_of(Reorder.key_of("A", 1))
    reactions = Reactions(process, process.repository.find_all)

    def opens(before, after, event):
        process.repository.save(Reorder.open("A", 1, 0, 0))

    def closes(before, after, event):
        reorder = process.repository.load(Reorder, reorder_id)
        reorder.close(1)
        process.repository.save(reorder)

    with reactions.made():
        process.react = opens
        reactions.react(None, None, sold(2))
        process.react = closes
        reactions.react(None, None, sold(3))
    assert list(reactions.saved) == [reactions.command_id(sold(n)) for n in (2, 3)]
    assert [event.originator_version for event in reactions.events] == [1, 2]
    assert process.repository.find(Reorder, reorder_id) is None  # nothing is written here


def test_what_a_reaction_only_looked_at_must_stay_as_it_was(process):
    present, absent = Reorder.open("A", 1, 0, 0), Reorder.id_of("absent")
    process.repository.save(present)
    reactions = Reactions(process, process.repository.find_all)

    def looks(before, after, event):
        process.repository.find_all(Reorder, [present.id, absent])
        process.repository.save(Reorder.open("B", 1, 0, 0))

    with reactions.made():
        process.react = looks
        reactions.react(None, None, sold(2))
    assert reactions.based_on() == {present.id: 1, absent: 0}


def test_a_reaction_that_forgets_to_save_is_an_error(process):
    opened = Reorder.open("A", 1, 0, 0)
    process.repository.save(opened)
    reactions = Reactions(process, process.repository.find_all)

    def forgets(before, after, event):
        process.repository.load(Reorder, opened.id).close(1)

    process.react = forgets
    with reactions.made(), pytest.raises(UnsavedEventsError):
        reactions.react(None, None, sold(2))


def test_a_process_without_a_projection_is_refused():
    class Aimless(Process):
        aggregates = (Reorder,)

    with pytest.raises(InvalidModelError, match="Aimless names no projection"):
        Aimless()


def test_a_process_that_would_have_to_be_awaited_is_refused():
    class Awaited(ReorderProcess):
        async def react(self, before, after, event):
            pass

    with pytest.raises(InvalidModelError, match="Awaited reacts in a thread"):
        Awaited()


# The model ------------------------------------------------------------------------------------


class NoteBegun(Created, topic="test.note.begun"):
    def apply(self, note):
        note.text = ""


class NoteAdded(Event, topic="test.note.added"):
    text: str

    def apply(self, note):
        note.text += self.text


class Note(Aggregate, topic="test.note", events=(NoteBegun, NoteAdded)):
    text: str


@dataclass(frozen=True, slots=True)
class Opened:
    number: int


def watching(name, *event_types, version=1, inline=False):
    watch = Projection(name, version=version, row=Opened, inline=inline)
    for event_type in event_types:
        watch.on(event_type)(lambda row, _: Opened(row.number + 1 if row else 1))
    return watch


class NoteProcess(Process):
    """Notes what is reordered."""

    aggregates = (Note,)
    projection = watching("note_watch", ReorderOpened)


class SlowNoteProcess(NoteProcess):
    projection = watching("note_watch", ReorderOpened, version=2)


def test_a_system_leads_each_process_to_those_whose_events_it_watches():
    model = replace(
        shop_model,
        aggregates=(Item, Reorder, Note),
        processes=(ReorderProcess, NoteProcess),
    )
    system = model.system()
    assert isinstance(system, System)
    assert system.edges == [("Items", "ReorderProcess"), ("ReorderProcess", "NoteProcess")]
    assert (system.leaders_only, system.processors, system.singles) == (
        ["Items"],
        ["ReorderProcess"],
        [],
    )


def test_a_service_that_nobody_follows_is_part_of_the_system():
    assert item_model.system().singles == ["Items"]


def test_a_graph_tells_who_reads_whose_events():
    tells = Subscriber("tells")
    tells.on(ReorderOpened)(print)
    model = replace(shop_model, projections=(item_stock,), subscribers=(tells,))
    assert model.graph().splitlines() == [
        "flowchart LR",
        "    Items[Items]",
        "    Items --> item_stock_v1[(item_stock_v1)]",
        "    Items --> ReorderProcess",
        "    ReorderProcess[ReorderProcess]",
        "    ReorderProcess --> tells>tells]",
    ]


def test_two_versions_of_a_process_may_run_side_by_side():
    model = replace(
        shop_model,
        aggregates=(Item, Reorder, Note),
        processes=(ReorderProcess, NoteProcess, SlowNoteProcess),
    )
    assert [reader.version for reader in model.readers if reader.name == "note_watch"] == [1, 2]


def subscriber(name="tells", event_type=ItemRegistered, **options):
    tells = Subscriber(name, **options)
    tells.on(event_type)(print)
    return tells


class InlineProcess(ReorderProcess):
    projection = watching("inline_watch", ItemRegistered, inline=True)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"projections": (reorder_watch,)}, "its own"),
        ({"processes": (InlineProcess,)}, "the rows of InlineProcess are its own"),
        ({"processes": (NoteProcess,)}, "NoteProcess: Note is missing"),
        ({"aggregates": (Item,)}, "Reorder is missing"),
        ({"processes": (ReorderProcess, ReorderProcess)}, "two are named reorder_watch_v1"),
        ({"subscribers": (subscriber("reorder_watch"),)}, "two are named reorder_watch_v1"),
        ({"subscribers": (subscriber(), subscriber())}, "two are named tells_v1"),
        ({"subscribers": (subscriber(event_type=NoteAdded),)}, "tells reads unknown events"),
        (
            {"projections": (), "subscribers": (subscriber(needs=[item_stock]),)},
            "tells needs views that are missing",
        ),
    ],
)
def test_a_model_refuses_what_does_not_fit_together(changes, reason):
    with pytest.raises(InvalidModelError, match=reason):
        replace(shop_model, **changes)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"name": "no name"}, "bad name or version"),
        ({"name": "Tells"}, "bad name or version"),
        ({"name": "tells", "version": 0}, "bad name or version"),
        ({"name": "tells", "everywhere": True, "from_beginning": True}, "everywhere"),
    ],
)
def test_a_subscriber_refuses_what_does_not_fit_together(options, reason):
    with pytest.raises(InvalidModelError, match=reason):
        Subscriber(**options)


def test_a_subscriber_has_one_effect_for_a_type_of_events():
    with pytest.raises(InvalidModelError, match="tells: ItemRegistered twice"):
        subscriber().on(ItemRegistered)(print)
