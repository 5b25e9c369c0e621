"""Statements of many rows on SQLite."""

from __future__ import annotations

import sqlite3
from contextlib import closing

import pytest
from eventsourcing.persistence import OperationalError

from leftfold.infrastructure.settings import load_settings
from leftfold.infrastructure.stores import make_store
from leftfold.infrastructure.stores.sqlite_file import (
    AT_ONCE,
    FEW,
    VARIABLES,
    SQLiteFile,
    chunks,
    insert_rows,
)


@pytest.mark.parametrize("columns", [1, 31, 32, 40, 2_000])
def test_rows_are_inserted_however_many_columns_they_have(columns):
    rows = [[n] * columns for n in range(1_100)]
    with closing(sqlite3.connect(":memory:")) as connection:
        # What SQLite allows by itself; some systems' builds allow more.
        connection.setlimit(sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER, VARIABLES)
        named = ",".join(f"c{n}" for n in range(columns))
        connection.execute(f"CREATE TABLE wide ({named})")
        insert_rows(connection, "wide", rows)
        assert connection.execute("SELECT count(*), sum(c0) FROM wide").fetchone() == (
            1_100,
            sum(range(1_100)),
        )


def test_values_are_parted_into_few_sizes_of_which_the_last_is_what_is_left():
    sizes = set()
    for number in range(3_000):
        parts = list(chunks(range(number)))
        assert [value for part in parts for value in part] == list(range(number))
        sizes.update(map(len, parts))
    assert sizes == {*range(1, FEW + 1), *(FEW << n for n in range(6))}
    assert max(sizes) == AT_ONCE


def test_copies_of_pages_and_temporary_tables_stay_in_memory_between_transactions(tmp_path):
    with closing(SQLiteFile(str(tmp_path / "shop.db"), lock_timeout=5)) as file:
        with file.writing(1) as connection:
            connection.execute("CREATE TEMP TABLE mine (n)")
        with file.writing(durable=False):
            pass
        with file.writing(1_000) as connection:
            assert tuple(connection.execute("PRAGMA temp_store").fetchone()) == (2,)
            assert tuple(connection.execute("SELECT count(*) FROM mine").fetchone()) == (0,)


def test_an_error_that_ends_a_comparison_is_told_as_it_is(sqlite_url):
    store = make_store(load_settings(store=sqlite_url))
    store.open((), create_tables=True)

    def fails():
        with store.views._comparing() as cursor:
            cursor.execute("ROLLBACK")  # as SQLite does by itself
            raise sqlite3.OperationalError("disk I/O error")

    with closing(store), pytest.raises(OperationalError, match="disk"):
        fails()
