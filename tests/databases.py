"""Statements on a store's database itself, past the library."""

from __future__ import annotations

import sqlite3
from contextlib import closing

import psycopg


def execute(url, statement):
    """Run one statement; return the rows that it answers."""
    if url.startswith("sqlite"):
        with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as connection, connection:
            return connection.execute(statement).fetchall()
    with psycopg.connect(url) as connection:
        cursor = connection.execute(statement)
        return cursor.fetchall() if cursor.description else []
