from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal

import pytest

from leftfold.application import (
    InvalidModelError,
    Model,
    Projection,
    QueryService,
    Service,
    Subscriber,
)
from leftfold.application.items import ItemRow, Items, item_model, item_stock
from leftfold.domain import Aggregate, Created, attr
from leftfold.domain.items import (
    Item,
    ItemDiscontinued,
    ItemRegistered,
    ItemRenamed,
    StockReceived,
    StockSold,
)


@dataclass(frozen=True, slots=True)
class Shelf:
    name: str
    pieces: int


def make_shelves(**changes):
    shelves = Projection(**{"name": "shelves", "version": 1, "row": Shelf, **changes})

    @shelves.on(ItemRegistered)
    def registered(row, event):
        return Shelf(event.name, event.opening_stock)

    @shelves.on(StockReceived)
    def received(row, event):
        return Shelf(row.name, row.pieces + event.quantity)

    @shelves.on(ItemDiscontinued)
    def discontinued(row, event):
        return None

    return shelves


def history(sku, *changes, stock=1):
    item = Item.register(sku, f"name of {sku}", Decimal(1), stock)
    for change in changes:
        change(item)
    return item.collect_events()


def fold(projection, events, rows=()):
    rows = dict(rows)
    return projection.fold(events, lambda keys: {key: rows[key] for key in keys if key in rows})


def key(sku):
    return Item.id_of(sku).hex


# One row


def test_evolve_answers_the_row_after_an_event():
    assert make_shelves().evolve(Shelf("Cup", 2), StockReceived(quantity=3)) == Shelf("Cup", 5)


def test_an_event_that_is_not_read_changes_nothing():
    row = Shelf("Cup", 2)
    assert make_shelves().evolve(row, ItemRenamed(name="Mug")) is row


def test_on_gives_the_function_back():
    def evolve(row, event):
        return row

    assert make_shelves().on(StockSold)(evolve) is evolve


def test_event_types_are_those_it_reads():
    assert make_shelves().event_types == (ItemRegistered, StockReceived, ItemDiscontinued)


# Many rows


def test_a_fold_answers_a_row_for_each_aggregate():
    events = [*history("A", lambda item: item.receive(4)), *history("B")]
    assert fold(make_shelves(), events) == {
        key("A"): Shelf("name of A", 5),
        key("B"): Shelf("name of B", 1),
    }


def test_a_fold_goes_on_from_the_rows_that_are_there():
    _, *later = history("A", lambda item: item.receive(4))
    rows = {key("A"): Shelf("Cup", 10)}
    assert fold(make_shelves(), later, rows) == {key("A"): Shelf("Cup", 14)}


def test_a_fold_asks_only_for_the_rows_it_needs():
    asked = []
    events = history("A", lambda item: item.rename("Mug"))

    def load(keys):
        asked.append(set(keys))
        return {}

    make_shelves().fold(events, load)
    assert asked == [{key("A")}]


def test_a_fold_of_events_it_does_not_read_touches_nothing():
    _, renamed = history("A", lambda item: item.rename("Mug"))
    assert fold(make_shelves(), [renamed], {key("A"): Shelf("Cup", 10)}) == {}


def test_none_deletes_the_row():
    assert fold(make_shelves(), history("A", Item.discontinue)) == {key("A"): None}


def test_a_deleted_row_may_come_again():
    events = [*history("A", Item.discontinue), *history("A", stock=7)]
    assert fold(make_shelves(), events) == {key("A"): Shelf("name of A", 7)}


def test_rows_may_have_another_key_than_the_aggregate():
    everything = make_shelves(key=lambda event: "all")
    events = [*history("A"), *history("B", lambda item: item.receive(4))]
    assert fold(everything, events) == {"all": Shelf("name of B", 5)}


# What it is called, and shows


def test_its_table_carries_name_and_version():
    assert make_shelves(version=3).table == "shelves_v3"


def test_its_columns_are_the_rows_fields():
    assert make_shelves().columns == ("name", "pieces")


@pytest.mark.parametrize("name", ["", "Shelves", "a-b", "1a", "a b", 'a"; drop', "a.b"])
def test_a_bad_name_is_refused(name):
    with pytest.raises(InvalidModelError):
        make_shelves(name=name)


@pytest.mark.parametrize("version", [0, -1])
def test_a_bad_version_is_refused(version):
    with pytest.raises(InvalidModelError):
        make_shelves(version=version)


@pytest.mark.parametrize("row", [dict, str])
def test_a_row_that_is_no_dataclass_is_refused(row):
    with pytest.raises(InvalidModelError, match="dataclass"):
        make_shelves(row=row)


def test_an_event_is_evolved_by_one_function():
    with pytest.raises(InvalidModelError, match="StockReceived twice"):
        make_shelves().on(StockReceived)(lambda row, _: row)


@pytest.mark.parametrize(("pieces", "is_shown"), [(0, False), (1, True)])
def test_a_specification_says_which_rows_show(pieces, is_shown):
    stocked = make_shelves(specification=attr("pieces") > 0)
    assert stocked.shows(Shelf("Cup", pieces)) is is_shown


def test_every_row_shows_without_a_specification():
    assert make_shelves().shows(Shelf("Cup", 0))


# The model


class BoxMade(Created, topic="test.box.made"):
    def apply(self, box):
        """A box has no attributes."""


class Box(Aggregate, topic="test.box", events=(BoxMade,)):
    pass


class Twin(Aggregate, topic="test.twin", events=()):
    pass


def test_the_reference_model_is_sound():
    assert item_model.services == (Items,)
    assert item_model.projections[0] is item_stock


def test_a_model_maps_the_events_of_its_aggregates_and_no_others():
    assert set(Model(aggregates=(Box,)).mapper_class().event_topics()) == {"test.box.made"}


def test_a_service_needs_its_aggregates_in_the_model():
    with pytest.raises(InvalidModelError, match="Items: Item is missing"):
        Model(aggregates=(Box,), services=(Items,))


def test_a_projection_needs_its_events_in_the_model():
    with pytest.raises(InvalidModelError, match="item_stock reads unknown events"):
        Model(aggregates=(Box,), projections=(item_stock,))


def test_two_projections_of_one_table_are_refused():
    with pytest.raises(InvalidModelError, match="shelves_v1"):
        Model(aggregates=(Item,), projections=(make_shelves(), make_shelves()))


def test_two_versions_of_a_projection_may_stand_side_by_side():
    versions = (make_shelves(version=1), make_shelves(version=2))
    assert Model(aggregates=(Item,), projections=versions).projections == versions


def test_two_aggregates_of_one_topic_are_refused():
    first = type("First", (Aggregate,), {}, topic="test.box", events=())
    with pytest.raises(InvalidModelError):
        Model(aggregates=(Box, first))


def test_a_service_and_a_query_service_have_no_handlers_of_their_own():
    assert list(Service.handlers(None)) == []
    assert list(QueryService(None, None).handlers()) == []


def test_a_row_of_items_is_frozen():
    row = ItemRow(*range(len(item_stock.columns)))
    with pytest.raises(AttributeError):
        row.sku = "B"


def test_names_that_a_database_would_cut_are_refused():
    with pytest.raises(InvalidModelError):
        Projection("n" * 41, version=1, row=Shelf)
    with pytest.raises(InvalidModelError):
        Subscriber("n" * 41)
