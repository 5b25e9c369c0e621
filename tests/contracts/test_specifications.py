"""What a specification means must be the same in Python and in every store."""

from __future__ import annotations

import os
import random
from contextlib import contextmanager
from dataclasses import dataclass, fields
from datetime import date, datetime, timedelta
from decimal import Decimal
from enum import Enum
from uuid import UUID

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from leftfold.application import Projection, plan
from leftfold.application.checkpoints import Change
from leftfold.application.ports import Order, Seek
from leftfold.domain import ALWAYS, NEVER, all_of, any_of, attr
from leftfold.infrastructure.settings import load_settings
from leftfold.infrastructure.stores import make_store
from leftfold.infrastructure.strategies import DECIMALS, MOMENT, MOMENTS, TEXTS, specifications

laws = settings(
    max_examples=int(os.environ.get("LEFTFOLD_LAW_CASES", "200")),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def put(views, projection, rows):
    (at,) = views.checkpoints([projection])
    fresh = set(list(rows)[: len(rows) // 2])  # stores may put these in another way
    return views.write([Change(projection, at, rows, fresh)], at.position + 1)


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True, slots=True)
class Thing:
    whole: int | None
    other: int | None
    count: int
    price: Decimal | None
    cost: Decimal
    ratio: float | None
    name: str | None
    label: str
    is_old: bool | None
    is_new: bool
    seen: datetime | None
    made: datetime
    day: date | None
    ident: UUID | None
    colour: Colour | None


WHOLE = [0, 1, 2, -1, -3, 2**63 - 1, -(2**63), 2**53 + 1]
AMOUNTS = [*map(Decimal, DECIMALS), Decimal("-99999999999.999999"), Decimal("99999999999.999999")]
TIMES = [
    *MOMENTS,
    MOMENT + timedelta(microseconds=1),
    MOMENT - timedelta(days=700_000),
    MOMENT.replace(year=9998),
]
POOLS = {
    "whole": [None, *WHOLE],
    "other": [None, *WHOLE],
    "count": WHOLE,
    "price": [None, *AMOUNTS],
    "cost": AMOUNTS,
    "ratio": [None, 0.0, -0.0, 1.5, -1.5, 1e300, 5e-324, 0.1, 2.0],
    "name": [None, *TEXTS, "aß", "ab", "ba", "%a", "\U0001f600a", "z" * 50],
    "label": [*TEXTS, "aß", "ab", "日本語"],
    "is_old": [None, True, False],
    "is_new": [True, False],
    "seen": [None, *TIMES],
    "made": TIMES,
    "day": [None, date(2011, 12, 9), date(1, 1, 1), date(9999, 12, 31)],
    "ident": [None, *(UUID(int=n) for n in (0, 1, 2, 2**127, 2**128 - 1))],
    "colour": [None, *Colour],
}
NAMES = [field.name for field in fields(Thing)]
chance = random.Random(7)
ROWS = {
    f"k{n:03}": Thing(**{name: chance.choice(POOLS[name]) for name in NAMES}) for n in range(300)
}
things = Projection(
    "things", version=1, row=Thing, specification=attr("count") != 2, indexes=["whole", "name"]
)
SHOWN = {key: row for key, row in ROWS.items() if row.count != 2}


@contextmanager
def opened(url):
    store = make_store(load_settings(store=url))
    store.open([things], create_tables=True)
    assert put(store.views, things, ROWS)
    yield store.views
    store.close()


def asked(spec):
    return plan(spec.bind(Thing)).sql


@pytest.mark.long
def test_the_rows_that_a_store_finds_are_those_that_python_accepts(store_url):
    with opened(store_url) as views:

        @laws
        @given(specifications(Thing))
        def law(spec):
            expected = [key for key, row in SHOWN.items() if spec.check(row)]
            where = asked(spec)
            found = views.select(things, None, None, None, where)
            assert [key for key, _ in found] == expected
            assert views.count(things, where) == len(expected)

        law()


@pytest.mark.parametrize("name", NAMES)
def test_every_operator_on_every_value_means_the_same(store_url, name):
    column = attr(name)
    values = POOLS[name]
    specs = [column.is_none(), ~column.is_none(), column.is_in([]), ~column.is_in([])]
    for value in values:
        for sign in ("==", "!=", "<", "<=", ">", ">="):
            specs += [column.compare(sign, value), ~column.compare(sign, value)]
        if isinstance(value, str):
            for search in (column.contains, column.startswith, column.endswith):
                specs += [search(value), ~search(value)]
    given = [value for value in values if value is not None]
    specs += [column.is_in(given[:3]), ~column.is_in(given[:3]), column.is_in(given)]
    with opened(store_url) as views:
        for spec in specs:
            expected = [key for key, row in SHOWN.items() if spec.check(row)]
            found = views.select(things, None, None, None, asked(spec))
            assert [key for key, _ in found] == expected, spec


@pytest.mark.long
def test_order_and_paging_agree(store_url):
    with opened(store_url) as views:

        @laws
        @given(
            specifications(Thing, max_leaves=3),
            st.sampled_from(NAMES),
            st.booleans(),
            st.sampled_from([1, 7, *range(30, 120)]),
        )
        def law(spec, name, is_descending, size):
            order, where = Order(name, is_descending), asked(spec)
            whole = views.select(things, order, None, None, where)
            assert {key for key, _ in whole} == {k for k, row in SHOWN.items() if spec.check(row)}
            size = max(size, len(whole) // 20)  # or it takes long
            pages, seek = [], None
            while page := views.select(things, order, size, seek, where):
                pages += page
                key, row = page[-1]
                seek = Seek(getattr(row, name), key)
            assert pages == whole

        law()


def test_the_constant_specifications_find_all_and_nothing(store_url):
    with opened(store_url) as views:
        assert views.count(things, ALWAYS) == len(SHOWN)
        assert views.count(things, NEVER) == 0


def test_a_long_list_and_many_comparisons_are_one_query(store_url):
    with opened(store_url) as views:
        long = attr("count").is_in(range(10_000))
        assert views.count(things, asked(long)) == sum(
            0 <= r.count < 10_000 for r in SHOWN.values()
        )
        many = ALWAYS
        for number in range(400):
            many = many & (attr("count") != number)
        assert views.count(things, asked(many)) == sum(
            not 0 <= r.count < 400 for r in SHOWN.values()
        )
        either = NEVER
        for number in range(400):
            either = either | (attr("count") == number)
        assert views.count(things, asked(either)) == sum(0 <= r.count < 400 for r in SHOWN.values())


def test_what_one_query_cannot_take_is_left_to_python(store_url):
    negated = all_of(*(~(attr("whole") < number) for number in range(499)))
    deep = attr("count") == 0
    for number in range(1, 60):
        deep = any_of(attr("count") == number, all_of(deep, attr("whole") != number))
    wide = all_of(*(any_of(attr("whole") == n, attr("other") == n) for n in range(999)))
    with opened(store_url) as views:
        for spec in (negated, deep, ~deep, wide, ~wide):
            parts = plan(spec.bind(Thing))
            found = views.select(things, None, None, None, parts.sql)
            assert [key for key, row in found if parts.rest.check(row)] == [
                key for key, row in SHOWN.items() if spec.check(row)
            ]


@dataclass(frozen=True, slots=True)
class Stock:
    on_hand: int | None
    name: str


stock = Projection("stock", version=1, row=Stock, indexes=["on_hand", ("name", "on_hand")])


@pytest.mark.parametrize(
    ("where", "order", "index"),
    [
        (attr("on_hand") == 7, None, "stock_v1_on_hand_index"),
        (attr("on_hand") > 19_990, Order("on_hand"), "stock_v1_on_hand_index"),
        (attr("on_hand").between(5, 7), Order("on_hand"), "stock_v1_on_hand_index"),
        (attr("on_hand").is_in([3, 5]), None, "stock_v1_on_hand_index"),
        ((attr("name") == "B7") & (attr("on_hand") < 9), None, "stock_v1_name_on_hand_index"),
    ],
    ids=str,
)
def test_an_indexable_comparison_uses_the_index(shared_url, where, order, index):
    store = make_store(load_settings(store=shared_url))
    store.open([stock], create_tables=True)
    views = store.views
    rows = {f"k{n:05}": Stock(n, f"B{n % 100}") for n in range(20_000)}
    assert put(views, stock, rows)
    query = views.table(stock).select(order, 50, None, where)
    if shared_url.startswith("sqlite"):
        with views._database.reading() as cursor:
            cursor.execute("ANALYZE")
            cursor.execute(f"EXPLAIN QUERY PLAN {query.sql}", query.parameters)
            steps = " ".join(str(step) for step in cursor)
    else:
        with views._database.reading() as cursor:
            cursor.execute("ANALYZE stock_v1")
            cursor.execute(f"EXPLAIN {query.sql}".encode(), query.parameters)
            steps = " ".join(str(step) for step in cursor)
    store.close()
    assert index in steps
    assert order is None or not any(sort in steps for sort in (" Sort", "TEMP B-TREE"))
