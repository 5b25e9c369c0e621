"""What a database does not take is refused to the one who wanted it, and to nobody else."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from uuid import uuid4

import psycopg
import pytest
from eventsourcing.persistence import OperationalError

from leftfold.application import Unstorable
from leftfold.application.items import ItemHistory
from leftfold.application.ports import EncodedEvent, Failed, Group, Save
from leftfold.domain import Err
from leftfold.infrastructure import CircuitState
from leftfold.infrastructure.items import open_items
from leftfold.infrastructure.pages import InlineViews
from leftfold.infrastructure.stores.common import MADE_GOOD, commit_in_runs
from leftfold.infrastructure.stores.postgres import PostgresStore

pytestmark = pytest.mark.anyio

NO_SPOONS = {
    "sqlite": """
        CREATE TRIGGER no_spoons BEFORE INSERT ON stored_events
        WHEN instr(CAST(NEW.state AS TEXT), '"Spoon"') BEGIN
            SELECT RAISE(ABORT, 'no spoons here');
        END""",
    "postgresql": """
        CREATE FUNCTION no_spoons() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            IF convert_from(NEW.state, 'UTF8') LIKE '%"Spoon"%' THEN
                RAISE check_violation USING MESSAGE = 'no spoons here';
            END IF;
            RETURN NEW;
        END $$;
        CREATE TRIGGER no_spoons BEFORE INSERT ON stored_events
        FOR EACH ROW EXECUTE FUNCTION no_spoons()""",
}


def forbid_spoons(url):
    if url.startswith("sqlite"):
        with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as connection:
            connection.executescript(NO_SPOONS["sqlite"])
    else:
        with psycopg.connect(url) as connection:
            connection.execute(NO_SPOONS["postgresql"])


def test_an_outage_while_inline_views_are_made_good_is_no_refusal(monkeypatch):
    group = Group([Save(uuid4(), "Add", [EncodedEvent(uuid4(), 1, "added", b"{}")], (), None)], [])

    def refuse(run):
        return [Failed("not unique", is_refusal=True)] * len(run.groups)

    inline = InlineViews(())

    def make_good():
        raise OperationalError("the server is away")

    monkeypatch.setattr(inline, "make_good", make_good)
    assert commit_in_runs([group], refuse, inline) == [Failed("the server is away")]


def test_a_run_is_not_written_for_ever_while_others_write_what_views_do_not_take(
    monkeypatch,
):
    group = Group([Save(uuid4(), "Add", [EncodedEvent(uuid4(), 1, "added", b"{}")], (), None)], [])
    refusal, tried = Failed("not unique", is_refusal=True), []

    def refuse(run):
        tried.append(run)
        return [refusal] * len(run.groups)

    inline = InlineViews(())
    monkeypatch.setattr(inline, "make_good", lambda: True)
    assert commit_in_runs([group], refuse, inline) == [refusal]
    assert len(tried) == 1 + MADE_GOOD


@pytest.mark.parametrize("in_thread", [False, True])
async def test_a_refused_save_fails_alone(shared_url, register, monkeypatch, in_thread):
    if in_thread:
        monkeypatch.setattr(PostgresStore, "committing", lambda _: None)
    async with open_items(shared_url) as shop:
        forbid_spoons(shared_url)
        skus = [f"S{n}" for n in range(30)]
        commands = [
            register(sku).model_copy(update={"name": "Spoon"} if sku in {"S7", "S20"} else {})
            for sku in skus
        ]
        outcomes = await asyncio.gather(*map(shop.commands.dispatch, commands))
        refused = [sku for sku, o in zip(skus, outcomes, strict=True) if not o.is_ok()]
        assert refused == ["S7", "S20"]
        error = outcomes[7].error
        assert isinstance(error, Unstorable)
        assert "Spoon" not in str(error)
        assert not (await shop.queries.dispatch(ItemHistory(sku="S7"))).is_ok()


async def test_a_trigger_of_the_programs_own_does_as_it_says(sqlite_url, register):
    async with open_items(sqlite_url) as shop:
        with closing(sqlite3.connect(sqlite_url.removeprefix("sqlite:///"))) as connection:
            connection.executescript(
                "CREATE TABLE seen (topic TEXT PRIMARY KEY);"
                "CREATE TRIGGER see AFTER INSERT ON stored_events BEGIN "
                "INSERT OR IGNORE INTO seen VALUES (NEW.topic); END"
            )
        (await shop.commands.dispatch_all([register(f"S{n}") for n in range(30)])).unwrap()


async def test_to_be_refused_is_no_outage(shared_url, register):
    async with open_items(shared_url) as shop:
        forbid_spoons(shared_url)
        spoon = register("S").model_copy(update={"name": "Spoon"})
        for _ in range(20):
            assert isinstance((await shop.commands.dispatch(spoon)).error, Unstorable)
        assert shop._opened.access.breaker.state is CircuitState.CLOSED
        assert shop.health().parts[0].counters["failures"] == 0
        assert isinstance(await shop.commands.dispatch(spoon), Err)
