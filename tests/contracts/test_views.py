"""What every store of views must do; the one in memory is the reference."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from enum import Enum
from threading import Thread
from uuid import UUID

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from leftfold.application import Projection, ValidationFailed
from leftfold.application.checkpoints import Change
from leftfold.application.ports import Order, Seek
from leftfold.domain import attr
from leftfold.infrastructure import ValueOutOfRangeError
from leftfold.infrastructure.rows import RowShape
from leftfold.infrastructure.settings import load_settings
from leftfold.infrastructure.stores import make_store, postgres_views
from leftfold.infrastructure.stores.memory import MemoryLog, MemoryViews


class Colour(Enum):
    RED = "red"
    GREEN = "grün"


@dataclass(frozen=True, slots=True)
class Everything:
    """A column of every type, and of every type that may be None."""

    number: int
    amount: Decimal
    ratio: float
    text: str
    flag: bool
    moment: datetime
    day: date
    identity: UUID
    colour: Colour
    maybe_number: int | None = None
    maybe_amount: Decimal | None = None
    maybe_ratio: float | None = None
    maybe_text: str | None = None
    maybe_flag: bool | None = None
    maybe_moment: datetime | None = None
    maybe_day: date | None = None
    maybe_identity: UUID | None = None
    maybe_colour: Colour | None = None


@dataclass(frozen=True, slots=True)
class Stock:
    name: str
    on_hand: int
    price: Decimal | None = None


@dataclass(frozen=True, slots=True)
class Awkward:
    """Names that SQL uses itself, or would fold to another case."""

    order: int
    group: str
    camelCase: bool  # noqa: N815


everything = Projection("everything", version=1, row=Everything)
stock = Projection("stock", version=3, row=Stock)
shown = Projection("shown", version=1, row=Stock, specification=attr("on_hand") > 0)
awkward = Projection("awkward", version=1, row=Awkward)
PROJECTIONS = (everything, stock, shown, awkward)

PLAIN = Everything(
    number=1,
    amount=Decimal("2.55"),
    ratio=0.1,
    text="Cup",
    flag=True,
    moment=datetime(2011, 12, 9, 12, 50, tzinfo=UTC),
    day=date(2011, 12, 9),
    identity=UUID(int=7),
    colour=Colour.GREEN,
)
LARGEST = 2**63 - 1
MISTAKEN = {
    "number": (1.5, True, "1", Decimal(1)),
    "amount": (1, 1.5, "1"),
    "ratio": (True, "1", Decimal(1)),
    "text": (1, b"x", UUID(int=1)),
    "flag": (2, 1, "true"),
    "moment": (date(2011, 12, 9), "2011-12-09T12:50:00Z", 0),
    "day": (datetime(2011, 12, 9, tzinfo=UTC), "2011-12-09"),
    "identity": ("abc", UUID(int=1).hex, 1),
    "colour": ("red", 1),
}
"""Values of other types, some of which one database or the other would take."""
TYPES = ("number", "amount", "ratio", "text", "flag", "moment", "day", "identity", "colour")


@contextmanager
def opened(url, projections=PROJECTIONS):
    store = make_store(load_settings(store=url))
    store.open(projections, create_tables=True)
    yield store.views
    store.close()


def position(views, projection):
    return views.checkpoints([projection])[0].position


@pytest.fixture(autouse=True)
def _copying(monkeypatch):
    """Let PostgreSQL copy rows that are fresh, however few they are."""
    monkeypatch.setattr(postgres_views, "COPIED", 1)


def write(views, projection, rows, expected, to):
    """Write a page that began at a position."""
    (at,) = views.checkpoints([projection])
    fresh = rows.keys() - views.load(projection, [key for key in rows if "\0" not in key]).keys()
    return views.write([Change(projection, at._replace(position=expected), rows, fresh)], to)


def put(views, projection, rows):
    """Write rows at the next position."""
    at = position(views, projection)
    assert write(views, projection, rows, at, at + 1)


def keys(views, projection, order=None, limit=None):
    return [key for key, _ in views.select(projection, order, limit)]


def walk(views, projection, order, size):
    """Visit a view page by page, as `Views.page` does."""
    found, seek = [], None
    while page := views.select(projection, order, size, seek):
        found += page
        key, row = page[-1]
        seek = Seek(getattr(row, order.column), key)
        assert len(found) < 100
    return found


class ViewStoreContract:
    @pytest.fixture
    def views(self, url):
        with opened(url) as views:
            yield views

    # Checkpoints

    def test_a_checkpoint_begins_at_0(self, views):
        assert position(views, stock) == 0

    def test_writing_moves_the_checkpoint(self, views):
        assert write(views, stock, {"a": Stock("Cup", 1)}, 0, 17)
        assert position(views, stock) == 17

    def test_a_page_without_rows_moves_the_checkpoint(self, views):
        assert write(views, stock, {}, 0, 5)
        assert position(views, stock) == 5

    def test_writing_from_another_checkpoint_is_refused_and_writes_nothing(self, views):
        write(views, stock, {"a": Stock("Cup", 1), "b": Stock("Jug", 1)}, 0, 5)
        changes = {"a": Stock("Mug", 2), "b": None, "c": Stock("Pot", 3)}
        assert not write(views, stock, changes, 0, 9)
        assert not write(views, stock, changes, 6, 9)
        assert position(views, stock) == 5
        assert dict(views.select(stock, None, None)) == {"a": Stock("Cup", 1), "b": Stock("Jug", 1)}

    def test_each_view_has_its_own_checkpoint(self, views):
        write(views, stock, {"a": Stock("Cup", 1)}, 0, 5)
        assert position(views, shown) == 0
        assert keys(views, shown) == []

    def test_of_threads_that_race_from_one_checkpoint_one_writes(self, views):
        answers = []

        def race(n):
            answers.append(write(views, stock, {f"{n}": Stock("Cup", n)}, 0, n))

        racers = [Thread(target=race, args=(n,)) for n in range(1, 5)]
        for racer in racers:
            racer.start()
        for racer in racers:
            racer.join(20)
        assert sorted(answers) == [False, False, False, True]
        assert keys(views, stock) == [str(position(views, stock))]

    # Rows

    @pytest.mark.parametrize(
        ("column", "value"),
        [
            ("number", 0),
            ("number", LARGEST),
            ("number", -LARGEST),
            ("amount", Decimal(0)),
            ("amount", Decimal("-0.000001")),
            ("amount", Decimal("1.50")),
            ("amount", Decimal("9793394.693")),
            ("amount", Decimal("1E+3")),
            ("amount", Decimal("9223372036854.775807")),
            ("amount", Decimal("-9223372036854.775807")),
            ("ratio", 1 / 3),
            ("ratio", -1e308),
            ("ratio", 5e-324),
            ("text", ""),
            ("text", 'it\'s "quoted" `all` ways'),
            ("text", "100 %s of 'a_b' \\ %(x)s {0} ? :name $1 --"),
            ("text", "Grüße, 茶 und 🫖\n\ttab"),
            ("text", "\u0001\u001f\u007f\u2028\ufeff"),
            ("text", "null"),
            ("text", "x" * 100_000),
            ("flag", False),
            ("moment", datetime(2011, 3, 27, 1, 59, 59, 123456, tzinfo=UTC)),
            ("moment", datetime(1, 1, 2, tzinfo=UTC)),
            ("moment", datetime(9999, 12, 30, 23, 59, 59, 999999, tzinfo=UTC)),
            ("moment", datetime(2011, 12, 9, 1, tzinfo=timezone(timedelta(hours=-9, minutes=-30)))),
            ("moment", datetime(1890, 1, 1, tzinfo=timezone(timedelta(minutes=19, seconds=32)))),
            ("day", date(1, 1, 1)),
            ("day", date(9999, 12, 31)),
            ("identity", UUID(int=0)),
            ("identity", UUID(int=2**128 - 1)),
            ("colour", Colour.RED),
        ],
    )
    def test_a_value_comes_back_as_it_went(self, views, column, value):
        row = replace(PLAIN, **{column: value, f"maybe_{column}": value})
        for _ in ("it is new", "it is there"):
            put(views, everything, {"a": row})
            found = views.get(everything, "a")
            assert found == row
            assert type(getattr(found, column)) is type(value)

    def test_none_comes_back_in_every_column_that_may_hold_it(self, views):
        for _ in ("it is new", "it is there"):
            put(views, everything, {"a": PLAIN})
        found = views.get(everything, "a")
        assert [getattr(found, f"maybe_{name}") for name in TYPES] == [None] * len(TYPES)

    def test_a_moment_comes_back_in_utc_on_every_database(self, views):
        east = timezone(timedelta(hours=5, minutes=45))
        put(views, everything, {"a": replace(PLAIN, moment=PLAIN.moment.astimezone(east))})
        assert views.load(everything, ["a"])["a"].moment == PLAIN.moment

    def test_columns_may_have_names_that_sql_uses(self, views):
        row = Awkward(order=1, group="a", camelCase=True)
        put(views, awkward, {"k": row})
        put(views, awkward, {"k": replace(row, order=2)})
        assert views.load(awkward, ["k"]) == {"k": replace(row, order=2)}
        assert views.select(awkward, Order("order"), 1) == [("k", replace(row, order=2))]

    def test_a_view_may_have_a_name_that_sql_uses(self, url):
        select = Projection("select", version=1, row=Stock)
        with opened(url, (select,)) as views:
            put(views, select, {"a": Stock("Cup", 1)})
            assert views.select(select, None, None) == [("a", Stock("Cup", 1))]

    def test_keys_may_be_any_text(self, views):
        odd = {key: Stock(key, 1) for key in ("", "'", '"', "%", "_", "\\", "ü", "茶", "a b")}
        put(views, stock, odd)
        assert views.load(stock, list(odd)) == odd
        assert dict(views.select(stock, None, None)) == odd

    def test_a_row_replaces_the_one_under_its_key(self, views):
        put(views, stock, {"a": Stock("Cup", 1), "b": Stock("Jug", 2)})
        put(views, stock, {"a": Stock("Mug", 9, Decimal(1))})
        assert views.load(stock, ["a", "b"]) == {
            "a": Stock("Mug", 9, Decimal(1)),
            "b": Stock("Jug", 2),
        }

    def test_none_deletes_a_row(self, views):
        put(views, stock, {"a": Stock("Cup", 1), "b": Stock("Jug", 2)})
        put(views, stock, {"a": None, "never there": None})
        assert views.load(stock, ["a", "b"]) == {"b": Stock("Jug", 2)}
        assert keys(views, stock) == ["b"]

    def test_a_row_that_was_not_thought_to_be_there_is_changed_all_the_same(self, views):
        put(views, stock, {"a": Stock("Cup", 1), "b": Stock("Jug", 2)})
        (at,) = views.checkpoints([stock])
        rows = {"b": Stock("Jug", 3), "c": Stock("Mug", 4)}
        assert views.write([Change(stock, at, rows, fresh=rows.keys())], at.position + 1)
        assert views.load(stock, ["a", "b", "c"]) == {"a": Stock("Cup", 1), **rows}
        assert position(views, stock) == at.position + 1

    def test_a_page_may_hold_thousands_of_rows(self, views):
        rows = {f"{n:05}": Stock("Cup", n) for n in range(2_501)}
        put(views, stock, rows)
        put(views, stock, {key: None if row.on_hand % 2 else row for key, row in rows.items()})
        assert views.load(stock, list(rows)) == {k: r for k, r in rows.items() if not r.on_hand % 2}

    def test_absent_keys_are_left_out(self, views):
        put(views, stock, {"a": Stock("Cup", 1)})
        assert views.load(stock, ["a", "b"]) == {"a": Stock("Cup", 1)}
        assert views.load(stock, []) == {}
        assert views.get(stock, "b") is None

    # Members

    def test_rows_that_are_no_members_are_kept_and_not_shown(self, views):
        put(views, shown, {"a": Stock("Cup", 1), "b": Stock("Jug", 0)})
        assert keys(views, shown) == ["a"]
        assert keys(views, shown, Order("name")) == ["a"]
        assert (views.get(shown, "a"), views.get(shown, "b")) == (Stock("Cup", 1), None)
        assert views.load(shown, ["b"]) == {"b": Stock("Jug", 0)}

    def test_a_row_may_become_a_member_and_cease_to_be_one(self, views):
        put(views, shown, {"a": Stock("Cup", 0), "b": Stock("Jug", 1)})
        put(views, shown, {"a": Stock("Cup", 1), "b": Stock("Jug", 0)})
        assert keys(views, shown) == ["a"]

    def test_rows_that_are_no_members_take_no_place_in_a_page(self, views):
        put(views, shown, {f"{n}": Stock("Cup", n % 2) for n in range(6)})
        assert keys(views, shown, Order("name"), 2) == ["1", "3"]

    # Order

    def test_without_an_order_rows_come_by_key(self, views):
        put(
            views,
            stock,
            {key: Stock("Cup", 1) for key in ("b", "B", "a", "ä", "Z", "_", "10", "9")},
        )
        assert keys(views, stock) == ["10", "9", "B", "Z", "_", "a", "b", "ä"]
        assert keys(views, stock, limit=2) == ["10", "9"]

    def test_text_is_ordered_by_code_point(self, views):
        names = ["", " ", "B", "Z", "_", "a", "b", "z", "ä", "\uffee", "🫖"]
        put(views, stock, {str(n): Stock(name, n) for n, name in enumerate(reversed(names))})
        found = [row.name for _, row in views.select(stock, Order("name"), None)]
        assert found == names

    def test_decimals_are_ordered_as_numbers(self, views):
        prices = [Decimal(p) for p in ("-10", "-2.5", "0", "0.000001", "2.50", "2.6", "11")]
        put(views, stock, {p.as_tuple().__repr__(): Stock("Cup", 1, p) for p in reversed(prices)})
        found = [row.price for _, row in views.select(stock, Order("price"), None)]
        assert found == prices

    def test_none_comes_first_and_in_descending_order_last(self, views):
        rows = {"a": Decimal(1), "b": None, "c": Decimal(-1), "d": None}
        put(views, stock, {key: Stock("Cup", 1, price) for key, price in rows.items()})
        assert keys(views, stock, Order("price")) == ["b", "d", "c", "a"]
        assert keys(views, stock, Order("price", descending=True)) == ["a", "c", "b", "d"]

    def test_ties_go_by_key_in_both_directions(self, views):
        put(
            views,
            stock,
            {key: Stock("Cup", on_hand) for key, on_hand in zip("dbca", (1, 2, 1, 2), strict=True)},
        )
        assert keys(views, stock, Order("on_hand")) == ["c", "d", "a", "b"]
        assert keys(views, stock, Order("on_hand", descending=True)) == ["a", "b", "c", "d"]

    @pytest.mark.parametrize("column", [*TYPES, *(f"maybe_{name}" for name in TYPES)])
    @pytest.mark.parametrize("descending", [False, True])
    def test_rows_can_be_walked_by_a_column_of_any_type(self, views, column, descending):
        name = column.removeprefix("maybe_")
        low, high = ORDERED[name]
        rows = {"a": replace(PLAIN, **{name: low}), "b": replace(PLAIN, **{name: high})}
        rows["c"] = replace(rows["a"], number=rows["a"].number)
        expected = ["b", "a", "c"] if descending else ["a", "c", "b"]
        if column != name:
            rows = {k: replace(r, **{column: getattr(r, name)}) for k, r in rows.items()}
            rows |= {"d": PLAIN, "e": PLAIN}
            expected = [*expected, "d", "e"] if descending else ["d", "e", *expected]
        put(views, everything, rows)
        found = walk(views, everything, Order(column, descending), 2)
        assert [key for key, _ in found] == expected

    # What cannot be kept

    @pytest.mark.parametrize(
        ("column", "value"),
        [
            ("number", LARGEST + 1),
            ("number", -LARGEST - 2),
            ("amount", Decimal("NaN")),
            ("amount", Decimal("sNaN")),
            ("amount", Decimal("Infinity")),
            ("amount", Decimal("0.0000001")),
            ("amount", Decimal("1.0000000000000000000000000000001")),
            ("amount", Decimal("1E+20")),
            ("ratio", float("nan")),
            ("ratio", float("inf")),
            ("text", "nothing\0more"),
            ("text", "\ud800"),
            ("moment", datetime(2011, 12, 9, 12, 50)),  # noqa: DTZ001
            ("moment", datetime(9999, 12, 31, 23, tzinfo=timezone(timedelta(hours=-9)))),
            ("moment", datetime(1, 1, 1, tzinfo=timezone(timedelta(hours=9)))),
            ("ratio", 2**53 + 1),
            ("ratio", 10**400),
            *((column, value) for column, values in MISTAKEN.items() for value in values),
        ],
    )
    def test_a_value_that_cannot_be_kept_is_refused_by_name_and_nothing_is_written(
        self, views, column, value
    ):
        put(views, everything, {"a": PLAIN})
        at = position(views, everything)
        for name in (column, f"maybe_{column}"):
            with pytest.raises(ValueOutOfRangeError) as refusal:
                write(
                    views,
                    everything,
                    {"a": None, "b": PLAIN, "c": replace(PLAIN, **{name: value})},
                    at,
                    at + 1,
                )
            assert (refusal.value.projection, refusal.value.column) == ("everything", name)
        assert position(views, everything) == at
        assert views.select(everything, None, None) == [("a", PLAIN)]

    def test_a_key_that_cannot_be_kept_is_refused_and_nothing_is_written(self, views):
        with pytest.raises(ValueOutOfRangeError):
            write(views, stock, {"a": Stock("Cup", 1), "nothing\0more": Stock("Jug", 1)}, 0, 1)
        assert position(views, stock) == 0
        assert keys(views, stock) == []

    @pytest.mark.parametrize("column", TYPES)
    def test_none_where_the_row_type_has_no_none_is_refused_and_nothing_is_written(
        self, views, column
    ):
        with pytest.raises(ValueOutOfRangeError) as refusal:
            write(views, everything, {"a": replace(PLAIN, **{column: None})}, 0, 1)
        assert refusal.value.column == column
        assert position(views, everything) == 0
        assert keys(views, everything) == []

    @pytest.mark.parametrize("row", [Stock("s3cret\0", 1), Stock("Cup", "s3cret")])
    def test_a_refusal_does_not_quote_the_value(self, views, row):
        with pytest.raises(ValueOutOfRangeError) as refusal:
            write(views, stock, {"a": row}, 0, 1)
        assert "s3cret" not in f"{refusal.value} {refusal.value!r}"

    def test_a_whole_number_is_a_float_as_for_typing(self, views):
        put(views, everything, {"a": replace(PLAIN, ratio=7)})
        assert views.get(everything, "a").ratio == 7.0

    @pytest.mark.parametrize(
        ("column", "value"),
        [
            ("moment", datetime(2011, 12, 9, 12, 50)),  # noqa: DTZ001
            ("number", LARGEST + 1),
            ("number", "1"),
            ("number", None),
            ("text", "nothing\0more"),
            ("identity", "abc"),
            ("day", PLAIN.moment),
            ("amount", Decimal("NaN")),
            ("amount", Decimal("1E-999999999")),
            ("amount", Decimal("1E+999999999")),
        ],
    )
    def test_to_go_on_after_a_value_that_no_row_can_have_is_refused(self, views, column, value):
        put(views, everything, {"a": PLAIN})
        with pytest.raises(ValidationFailed):
            views.select(everything, Order(column), 1, Seek(value, "a"))

    @pytest.mark.parametrize("key", ["nothing\0more", "\ud800"])
    def test_to_go_on_after_a_key_that_no_row_can_have_is_refused(self, views, key):
        with pytest.raises(ValidationFailed):
            views.select(everything, Order("number"), 1, Seek(1, key))


@pytest.mark.parametrize("column", ["number", "maybe_text"])
def test_a_shape_knows_the_types_of_many_rows_and_refuses_one_among_them(column):
    shape = RowShape(everything)
    shape.encode("a", PLAIN)
    shape.encode("a", replace(PLAIN, maybe_text="x"))
    with pytest.raises(ValueOutOfRangeError):
        shape.encode("a", replace(PLAIN, **{column: 1.5}))


ORDERED = {
    "number": (-5, 11),
    "amount": (Decimal("-2.5"), Decimal(11)),
    "ratio": (-2.5, 11.0),
    "text": ("Z", "a"),
    "flag": (False, True),
    "moment": (
        datetime(2011, 12, 9, 12, tzinfo=timezone(timedelta(hours=2))),
        datetime(2011, 12, 9, 11, tzinfo=UTC),
    ),
    "day": (date(999, 1, 1), date(2011, 1, 1)),
    "identity": (UUID(int=9), UUID(int=2**127 + 1)),
    "colour": (Colour.GREEN, Colour.RED),
}


class TestMemoryViews(ViewStoreContract):
    @pytest.fixture
    def url(self):
        return "memory:"


class TestSQLiteViews(ViewStoreContract):
    @pytest.fixture
    def url(self, sqlite_url):
        return sqlite_url


class TestPostgresViews(ViewStoreContract):
    @pytest.fixture
    def url(self, postgres_url):
        return postgres_url


# Random rows ----------------------------------------------------------------------------------

KEYS = "abcdefgh"
amounts = st.decimals(-(10**9), 10**9, places=6) | st.integers(-(10**9), 10**9).map(Decimal)
texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)
values = {
    "number": st.integers(-LARGEST, LARGEST),
    "amount": amounts,
    "ratio": st.floats(allow_nan=False, allow_infinity=False),
    "text": texts,
    "flag": st.booleans(),
    "moment": st.datetimes(
        datetime(1, 1, 2),  # noqa: DTZ001 - hypothesis adds the zones
        datetime(9999, 12, 30),  # noqa: DTZ001
        timezones=st.timezones(),
    ).map(lambda at: at.replace(tzinfo=timezone(at.utcoffset()), fold=0)),
    "day": st.dates(),
    "identity": st.uuids(),
    "colour": st.sampled_from(Colour),
}
anything = st.builds(
    Everything,
    **values,
    **{f"maybe_{name}": st.none() | strategy for name, strategy in values.items()},
)
stocks = st.builds(
    Stock,
    st.sampled_from(["", "Cup", "cup", "Jug", "Über"]),
    st.integers(-2, 2),
    st.none() | st.sampled_from([Decimal(-1), Decimal("0.5"), Decimal(2)]),
)
orders = st.builds(Order, st.sampled_from(["name", "on_hand", "price"]), st.booleans())
small = settings(
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture
def views(store_url):
    with opened(store_url) as views:
        yield views


@small
@given(st.dictionaries(st.sampled_from(KEYS), anything, min_size=1, max_size=3))
def test_any_rows_come_back_as_they_went(views, rows):
    put(views, everything, {**dict.fromkeys(KEYS), **rows})
    assert views.load(everything, KEYS) == rows
    assert dict(views.select(everything, None, None)) == rows


@small
@given(
    st.dictionaries(st.sampled_from(KEYS), stocks),
    orders,
    st.integers(1, 4),
)
def test_paging_visits_every_row_exactly_once_and_in_order(views, rows, order, size):
    put(views, stock, {**dict.fromkeys(KEYS), **rows})
    found = walk(views, stock, order, size)
    assert found == views.select(stock, order, None)
    assert dict(found) == rows
    assert len(found) == len(rows)


@small
@given(
    st.lists(st.dictionaries(st.sampled_from(KEYS), st.none() | stocks), max_size=4),
    orders,
    st.none() | st.integers(1, 5),
)
def test_views_agree_with_the_ones_in_memory(views, pages, order, limit):
    reference = MemoryViews(MemoryLog())
    for rows in [dict.fromkeys(KEYS), *pages]:
        put(views, shown, rows)
        put(reference, shown, rows)
    assert views.load(shown, KEYS) == reference.load(shown, KEYS)
    assert views.select(shown, order, limit) == reference.select(shown, order, limit)
    assert views.select(shown, None, limit) == reference.select(shown, None, limit)
    for key in KEYS:
        assert views.get(shown, key) == reference.get(shown, key)
