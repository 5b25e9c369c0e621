"""Personal data is sealed where it is stored, and erased everywhere with its subject's key."""

from __future__ import annotations

import asyncio
import copy
import json
import os
import pickle
import signal
import sqlite3
import threading
from contextlib import closing
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import ClassVar
from uuid import uuid4

import psycopg
import pytest
from eventsourcing.persistence import OperationalError
from pydantic import BaseModel

from leftfold.application import (
    Command,
    InvalidAnswerError,
    InvalidCacheArgumentError,
    InvalidModelError,
    InvalidSubject,
    KeysUnavailable,
    Model,
    Projection,
    Query,
    QueryService,
    Receipt,
    Service,
    SnapshotPolicy,
    ValidationFailed,
    cached,
)
from leftfold.application.items import ItemHistory, RegisterItem, SellStock
from leftfold.domain import (
    ERASED,
    Aggregate,
    Created,
    DomainError,
    Err,
    Event,
    Ok,
    Personal,
    PersonalDataErased,
    Result,
)
from leftfold.domain.personal import OtherSubjectError, SealingOf
from leftfold.infrastructure import (
    InMemoryCache,
    Runtime,
    SchemaMissingError,
    Settings,
    StoreUnavailableError,
    TieredCache,
)
from leftfold.infrastructure.items import open_items
from leftfold.infrastructure.resilience import CircuitState
from leftfold.infrastructure.stores import make_store
from leftfold.infrastructure.stores.keys import make_keys

pytestmark = pytest.mark.anyio


class Joined(Created, topic="test.guest.joined"):
    key: str
    name: Personal[str]

    def apply(self, guest: Guest) -> None:
        guest.key = self.key
        guest.name = self.name
        guest.visits = 0


class Visited(Event, topic="test.guest.visited"):
    with_whom: list[Personal[str]]

    def apply(self, guest: Guest) -> None:
        guest.visits += 1


class Guest(Aggregate, topic="test.guest", events=(Joined, Visited)):
    key: str
    name: Personal[str]
    visits: int


@dataclass(frozen=True, slots=True)
class GuestRow:
    code: str
    name: Personal[str]
    visits: int


guests = Projection("guests", version=1, row=GuestRow)


@guests.on(Joined)
def joined(row: GuestRow | None, event: Joined) -> GuestRow:
    return GuestRow(event.key, event.name, 0)


@guests.on(Visited)
def visited(row: GuestRow | None, event: Visited) -> GuestRow:
    return GuestRow(row.code, row.name, row.visits + 1)


class Join(Command[Receipt, DomainError]):
    key: str
    name: Personal[str]


class Visit(Command[Personal[str], DomainError]):
    key: str
    with_whom: tuple[str, ...] = ()


class Greet(Command[str, DomainError]):
    key: str


class Guests(Service):
    aggregates = (Guest,)

    def handlers(self):
        yield Join.handled_by(self.join)
        yield Visit.handled_by(self.visit)
        yield Greet.handled_by(self.greet)

    def join(self, command: Join) -> Result[Receipt, DomainError]:
        guest = Guest.begin(Joined(key=command.key, name=command.name), command.key)
        return Ok(self.repository.save(guest))

    def visit(self, command: Visit) -> Result[Personal[str], DomainError]:
        guest = self.repository.load(Guest, Guest.id_of(command.key))
        guest.record(Visited(with_whom=list(command.with_whom)))
        self.repository.save(guest)
        return Ok(guest.name)

    def greet(self, command: Greet) -> Result[str, DomainError]:
        guest = self.repository.load(Guest, Guest.id_of(command.key))
        return Ok(f"Hello {guest.name.reveal()}")


class GuestByKey(Query[GuestRow, DomainError]):
    key: str


class GuestsNamed(Query[int, DomainError]):
    name: Personal[str]


class NameOf(Query[str, DomainError]):
    key: str


class HistoryOf(Query[list[object], DomainError]):
    key: str


class GuestQueries(QueryService):
    def handlers(self):
        yield GuestByKey.handled_by(self.guest)
        yield NameOf.handled_by(self.name)
        yield HistoryOf.handled_by(self.history)
        yield GuestsNamed.handled_by(self.named)

    async def guest(self, query: GuestByKey) -> Result[GuestRow, DomainError]:
        return Ok(await self.views.get(guests, Guest.id_of(query.key).hex))

    async def name(self, query: NameOf) -> Result[str, DomainError]:
        row = await self.views.get(guests, Guest.id_of(query.key).hex)
        return Ok(row.name.reveal())

    async def named(self, query: GuestsNamed) -> Result[int, DomainError]:
        return Ok(len(await self.views.rows(guests)))

    async def history(self, query: HistoryOf) -> Result[list[object], DomainError]:
        told = await self.histories.history(Guest, Guest.id_of(query.key))
        return Ok([event.payload for event in told])


model = Model(
    (Guest,), (Guests,), (guests,), (GuestQueries,), snapshots={Guest: SnapshotPolicy(every=2)}
)
SUBJECT = str(Guest.id_of("a"))
QUICK = 0.4  # seconds: whoever waits for it is marked as timed


def opened(url, **settings):
    return Runtime(model, settings=Settings(store=url, **settings))


async def fill(runtime):
    await runtime.commands.dispatch(Join(key="a", name="Ada Lovelace"))
    await runtime.commands.dispatch(Visit(key="a", with_whom=("Charles Babbage",)))
    receipt = await runtime.commands.dispatch(Join(key="b", name="Grace Hopper"))
    return receipt.unwrap()


def away(*_):
    raise OperationalError("keys: away")


def take_away_keys(runtime, patch):
    for name in ("find", "provide", "forget", "forgotten"):
        patch.setattr(runtime._keyring._store, name, away)


async def asked(runtime, query, after=None):
    return (await runtime.queries.dispatch(query, after=after)).unwrap()


@pytest.fixture
async def runtime(store_url):
    async with opened(store_url) as runtime:
        runtime.filled = await fill(runtime)
        yield runtime


async def test_personal_data_is_there_for_who_may_see_it(runtime):
    row = await asked(runtime, GuestByKey(key="a"), runtime.filled)
    assert row.name.reveal() == "Ada Lovelace"
    assert row.name == Personal("Ada Lovelace")
    told = await asked(runtime, HistoryOf(key="a"))
    assert told[0]["name"] == "Ada Lovelace"
    assert told[1]["with_whom"] == ["Charles Babbage"]
    assert await runtime.commands.dispatch(Greet(key="a")) == Ok("Hello Ada Lovelace")


async def test_nothing_that_is_stored_shows_it(sqlite_url):
    async with opened(sqlite_url) as runtime:
        receipt = await fill(runtime)
        await asked(runtime, GuestByKey(key="a"), receipt)
        path = Path(sqlite_url.removeprefix("sqlite:///"))
        for file in path.parent.iterdir():
            assert b"Lovelace" not in file.read_bytes()
            assert b"Babbage" not in file.read_bytes()


async def test_no_table_of_the_database_shows_it(postgres_url):
    import psycopg

    async with opened(postgres_url) as runtime:
        receipt = await fill(runtime)
        await asked(runtime, GuestByKey(key="a"), receipt)
    with psycopg.connect(postgres_url) as connection:
        query = "SELECT tablename FROM pg_tables WHERE schemaname = 'public'"
        tables = [name for (name,) in connection.execute(query)]
        assert {"stored_events", "guests_v1", "leftfold_snapshots"} <= set(tables)
        for table in tables:
            for row in connection.execute(f'SELECT * FROM "{table}"'.encode()):
                assert b"Lovelace" not in b" ".join(
                    v if isinstance(v, bytes) else str(v).encode() for v in row
                )


async def test_a_forgotten_subject_is_erased_wherever_it_is_kept(runtime):
    row = await asked(runtime, GuestByKey(key="a"), runtime.filled)
    answer = (await runtime.commands.dispatch(Visit(key="a"))).unwrap()
    assert answer.reveal() == row.name.reveal() == "Ada Lovelace"
    assert await runtime.forget(SUBJECT)
    for kept in (row.name, answer):  # objects that the program holds already
        assert kept.is_erased
        assert kept.reveal_or("gone") == "gone"
        with pytest.raises(PersonalDataErased):
            kept.reveal()
    assert (await asked(runtime, GuestByKey(key="a"))).name.is_erased
    told = await asked(runtime, HistoryOf(key="a"))
    assert told[0]["name"] == ERASED
    assert told[1]["with_whom"] == [ERASED]
    assert await runtime.commands.dispatch(Greet(key="a")) == Err(PersonalDataErased())
    assert await runtime.queries.dispatch(NameOf(key="a")) == Err(PersonalDataErased())


async def test_the_facts_that_are_not_personal_stay(runtime):
    await runtime.forget(SUBJECT)
    (await runtime.commands.dispatch(Visit(key="a"))).unwrap()
    (await runtime.catch_up()).unwrap()
    assert (await asked(runtime, GuestByKey(key="a"))).visits == 2


async def test_who_forgets_after_another_process_has_nothing_left_either(shared_url):
    async with opened(shared_url) as one, opened(shared_url) as other:
        row = await asked(one, GuestByKey(key="a"), await fill(one))
        assert await other.forget(SUBJECT)
        assert not await one.forget(SUBJECT)
        assert row.name.is_erased


async def test_others_are_not_erased_with_it(runtime):
    await runtime.forget(SUBJECT)
    assert await runtime.commands.dispatch(Greet(key="b")) == Ok("Hello Grace Hopper")


async def test_to_forget_somebody_unknown_does_nothing(runtime):
    assert not await runtime.forget("nobody")


async def test_it_stays_erased_for_who_opens_the_store_later(shared_url):
    async with opened(shared_url) as runtime:
        await fill(runtime)
        await runtime.forget(SUBJECT)
    async with opened(shared_url) as runtime:  # the aggregate comes from its snapshot
        assert await runtime.commands.dispatch(Greet(key="a")) == Err(PersonalDataErased())
        told = await asked(runtime, HistoryOf(key="a"))
        assert told[0]["name"] == ERASED


@pytest.mark.timed
async def test_another_process_shows_it_no_more_within_the_stated_time(shared_url):
    async with (
        opened(shared_url, forget_within=QUICK) as one,
        opened(shared_url, forget_within=QUICK) as other,
    ):
        receipt = await fill(one)
        row = await asked(other, GuestByKey(key="a"), receipt)
        assert row.name.reveal() == "Ada Lovelace"
        assert (await other.commands.dispatch(Greet(key="a"))).is_ok()  # it is in memory there
        await one.forget(SUBJECT)
        await asyncio.sleep(QUICK)
        assert row.name.is_erased
        assert await other.commands.dispatch(Greet(key="a")) == Err(PersonalDataErased())


@pytest.mark.timed
async def test_nothing_is_shown_while_the_keys_cannot_be_asked(sqlite_url, monkeypatch):
    async with opened(sqlite_url, forget_within=QUICK) as runtime:
        receipt = await fill(runtime)
        row = await asked(runtime, GuestByKey(key="a"), receipt)

        monkeypatch.setattr(runtime._keyring._store, "forgotten", away)
        await asyncio.sleep(2 * QUICK)
        with pytest.raises(KeysUnavailable):
            row.name.reveal()
        assert isinstance((await runtime.commands.dispatch(Greet(key="a"))).error, KeysUnavailable)
        monkeypatch.undo()
        await asyncio.sleep(QUICK)
        assert row.name.reveal() == "Ada Lovelace"


async def test_a_repeated_command_answers_the_sealed_value_again(runtime):
    command_id = uuid4()
    for _ in range(2):
        answer = await runtime.commands.dispatch(Visit(key="a"), command_id=command_id)
        assert answer.unwrap().reveal() == "Ada Lovelace"
    await runtime.forget(SUBJECT)
    answer = await runtime.commands.dispatch(Visit(key="a"), command_id=command_id)
    assert answer.unwrap().is_erased


ASKED = [(NameOf, str), (HistoryOf, list[object]), (GuestByKey, GuestRow)]


@pytest.mark.timed
@pytest.mark.parametrize(("query_type", "kind"), ASKED)
async def test_a_cache_shows_a_forgotten_subject_no_more(store_url, query_type, kind):
    query = query_type(key="a")
    settings = Settings(store=store_url, forget_within=QUICK)
    around = cached(query_type, InMemoryCache(kind), 60)
    async with Runtime(model, settings=settings, middleware=(around,)) as runtime:
        await fill(runtime)
        (await runtime.catch_up()).unwrap()
        assert "Lovelace" in shown(await runtime.queries.dispatch(query))
        assert "Lovelace" in shown(await runtime.queries.dispatch(query))
        await runtime.forget(SUBJECT)
        assert "Lovelace" not in shown(await runtime.queries.dispatch(query))


async def test_a_cache_outside_the_process_takes_no_personal_data(sqlite_url, valkey):
    from leftfold.infrastructure import RedisCache

    cache = RedisCache(GuestRow, valkey.url, prefix="p")
    async with opened(sqlite_url) as runtime:
        receipt = await fill(runtime)
        row = await asked(runtime, GuestByKey(key="a"), receipt)
        for unfit in (row, GuestRow("x", Personal("Ada"), 0)):
            with pytest.raises(InvalidCacheArgumentError, match="personal data"):
                await cache.set("a", unfit)
        assert await cache.get("a") is None
    await cache.close()


def shown(outcome):
    if isinstance(outcome, Err):
        return repr(outcome.error)
    value = outcome.value
    return str(value.name.reveal_or(ERASED) if isinstance(value, GuestRow) else value)


async def test_the_subject_of_a_sale_is_its_customer(shared_url, register):
    def sale(customer):
        return SellStock(
            sku="A",
            quantity=1,
            invoice="1",
            unit_price=Decimal(1),
            country="F",
            customer_id=customer,
        )

    async with open_items(shared_url) as shop:
        await shop.commands.dispatch(register("A"))
        for customer in ("17850", None, "13047"):
            (await shop.commands.dispatch(sale(customer))).unwrap()
        assert await shop.forget("17850")
        told = (await shop.queries.dispatch(ItemHistory(sku="A"))).unwrap()
        assert [e.payload["customer_id"] for e in told[1:]] == [ERASED, None, "13047"]
        (await shop.commands.dispatch(sale("17850"))).unwrap()  # who comes back is known anew
        told = (await shop.queries.dispatch(ItemHistory(sku="A"))).unwrap()
        assert [e.payload["customer_id"] for e in told[1:]] == [ERASED, None, "13047", "17850"]


async def test_keys_may_lie_in_a_store_of_their_own(shared_url, tmp_path):
    keys = f"sqlite:///{tmp_path}/keys.db"
    async with opened(shared_url, keys=keys) as runtime:
        await fill(runtime)
    (tmp_path / "keys.db").unlink()  # without them nothing can be read
    async with opened(shared_url, keys=keys) as runtime:
        assert await runtime.commands.dispatch(Greet(key="a")) == Err(PersonalDataErased())


async def test_a_token_that_comes_from_outside_is_only_text(runtime):
    with closing(make_store(Settings(store="memory:"))):
        row = await asked(runtime, GuestByKey(key="a"), runtime.filled)
    await runtime.commands.dispatch(Join(key="c", name=row.name.token))
    assert await runtime.commands.dispatch(Greet(key="c")) == Ok(f"Hello {row.name.token}")


async def test_sealed_data_is_neither_shown_nor_copied_out(runtime):
    row = await asked(runtime, GuestByKey(key="a"), runtime.filled)
    assert "Ada" not in repr(row)
    assert copy.deepcopy(row).name is row.name
    with pytest.raises(TypeError, match="does not leave its process"):
        pickle.dumps(row.name)


@pytest.mark.parametrize("whole", ["compressor", "cipher", "both"])
async def test_whole_payloads_are_compressed_and_encrypted_by_the_librarys_settings(
    sqlite_url, register, whole
):
    from eventsourcing.cryptography import AESCipher

    settings = {}
    if whole != "cipher":
        settings["compressor_topic"] = "eventsourcing.compressor:ZlibCompressor"
    if whole != "compressor":
        settings["cipher_topic"] = "eventsourcing.cryptography:AESCipher"
        settings["cipher_key"] = AESCipher.create_key(32)
    async with open_items(settings=Settings(store=sqlite_url, **settings)) as shop:
        receipt = (await shop.commands.dispatch(register("A"))).unwrap()
        assert (await shop.queries.dispatch(ItemHistory(sku="A"), after=receipt)).is_ok()
    with closing(make_store(Settings(store=sqlite_url))) as store:
        store.open((), create_tables=False)
        (event,) = store.log.read(0, 10)
    assert b"sku" not in event.state
    if "cipher_key" in settings:
        assert settings["cipher_key"] not in repr(Settings(**settings))


class Copy(Command[Receipt, DomainError]):
    """Begin a guest with the sealed name of another, or with what it says."""

    of: str
    key: str
    is_made_anew: bool = False


class Introduce(Command[Receipt, DomainError]):
    """Begin two guests of one name."""

    name: Personal[str]


class Name(BaseModel):
    name: Personal[str]


class Tell(Command[Name, DomainError]):
    """Begin a guest, and answer its name, or one that no event holds."""

    key: str
    name: Personal[str]
    is_made_up: bool = False


class Copying(Service):
    aggregates = (Guest,)

    def handlers(self):
        yield Copy.handled_by(self.copy)
        yield Introduce.handled_by(self.introduce)
        yield Tell.handled_by(self.tell)

    def copy(self, command: Copy) -> Result[Receipt, DomainError]:
        name = self.repository.load(Guest, Guest.id_of(command.of)).name
        if command.is_made_anew:
            name = Personal(name.reveal())
        return Ok(self.repository.save(begun(command.key, name)))

    def introduce(self, command: Introduce) -> Result[Receipt, DomainError]:
        return Ok(self.repository.save(begun("p", command.name), begun("q", command.name)))

    def tell(self, command: Tell) -> Result[Name, DomainError]:
        guest = begun(command.key, command.name)
        self.repository.save(guest)
        return Ok(Name(name="Lovelace" if command.is_made_up else guest.name))


def begun(key, name):
    return Guest.begin(Joined(key=key, name=name), key)


copying = Model((Guest,), (Guests, Copying), (guests,), (GuestQueries,))


async def name_in_history(runtime, key):
    return (await asked(runtime, HistoryOf(key=key)))[0]["name"]


async def test_one_value_in_events_about_two_subjects_is_erased_with_each():
    async with Runtime(copying, store="memory:") as runtime:
        (await runtime.commands.dispatch(Introduce(name="Ada Lovelace"))).unwrap()
        assert await runtime.forget(str(Guest.id_of("q")))
        assert await name_in_history(runtime, "q") == ERASED
        assert await name_in_history(runtime, "p") == "Ada Lovelace"


async def test_a_value_of_the_program_serves_in_several_stores_and_after_it_was_forgotten():
    ada = Personal("Ada Lovelace")
    for _ in range(2):
        async with opened("memory:") as runtime:
            for _ in range(2):
                (await runtime.commands.dispatch(Join(key="a", name=ada))).unwrap()
                assert await name_in_history(runtime, "a") == "Ada Lovelace"
                await runtime.forget(SUBJECT)
                await runtime.commands.dispatch(Join(key="b", name=ada))
                assert await name_in_history(runtime, "b") == "Ada Lovelace"
                break
    assert ada.reveal() == "Ada Lovelace"
    assert ada.token == ""


async def test_the_lines_of_an_invoice_are_sealed_once(monkeypatch):
    from leftfold.application.items import RecordInvoice
    from leftfold.infrastructure.keyring import SubjectKey

    sealed, encrypt = [], SubjectKey.encrypt
    monkeypatch.setattr(SubjectKey, "encrypt", lambda key, it: sealed.append(1) or encrypt(key, it))
    customer = Personal("17850")
    line = {"kind": "sale", "sku": "A", "quantity": 1, "customer_id": customer, "unit_price": 1}
    async with open_items("memory:") as shop:
        register = RegisterItem(sku="A", name="Cup", unit_price=1, opening_stock=10)
        (await shop.commands.dispatch(register)).unwrap()
        invoice = RecordInvoice.model_validate({"invoice": "1", "lines": [line] * 5})
        (await shop.commands.dispatch(invoice)).unwrap()
    assert len(sealed) == 1


async def test_what_is_sealed_for_one_subject_is_refused_in_an_event_about_another():
    async with Runtime(copying, store="memory:") as runtime:
        await fill(runtime)
        with pytest.raises(OtherSubjectError, match=r"Personal\(value\.reveal"):
            await runtime.commands.dispatch(Copy(of="a", key="c"))
        assert await asked(runtime, HistoryOf(key="c")) == []
        (await runtime.commands.dispatch(Copy(of="a", key="c", is_made_anew=True))).unwrap()
        await runtime.forget(SUBJECT)
        assert await name_in_history(runtime, "c") == "Ada Lovelace"


async def test_what_is_erased_already_may_be_recorded_about_another():
    async with Runtime(copying, store="memory:") as runtime:
        await fill(runtime)
        await runtime.forget(SUBJECT)
        (await runtime.commands.dispatch(Copy(of="a", key="c"))).unwrap()
        assert await name_in_history(runtime, "c") == ERASED


async def test_what_is_sealed_in_another_store_is_refused():
    async with opened("memory:") as one, opened("memory:") as other:
        row = await asked(one, GuestByKey(key="a"), await fill(one))
        with pytest.raises(OtherSubjectError):
            await other.commands.dispatch(Join(key="a", name=row.name))


async def test_an_answer_of_what_no_event_holds_is_an_error_in_the_program():
    async with Runtime(copying, store="memory:") as runtime:
        with pytest.raises(InvalidAnswerError, match="no event holds"):
            await runtime.commands.dispatch(Tell(key="a", name="Ada", is_made_up=True))


async def test_an_answer_may_be_made_of_what_is_recorded_with_it():
    async with Runtime(copying, store="memory:") as runtime:
        answer = (await runtime.commands.dispatch(Tell(key="a", name=Personal("Ada")))).unwrap()
        assert answer.name.reveal() == "Ada"
        await runtime.forget(SUBJECT)
        assert answer.name.is_erased


async def test_commands_and_queries_answer_that_the_keys_are_away(shared_url, monkeypatch):
    async with opened(shared_url) as runtime:
        receipt = await fill(runtime)
        (await runtime.wait_for(receipt)).unwrap()
    async with opened(shared_url, lock_timeout=1) as runtime:
        with monkeypatch.context() as patch:
            take_away_keys(runtime, patch)
            for command in (Greet(key="a"), Join(key="c", name="Cem"), Visit(key="a")):
                assert await runtime.commands.dispatch(command) == Err(
                    KeysUnavailable("keys: away")
                )
            for query in (HistoryOf(key="a"), GuestByKey(key="a")) * 8:
                assert await runtime.queries.dispatch(query) == Err(KeysUnavailable("keys: away"))
            with pytest.raises(KeysUnavailable):
                await runtime.forget(SUBJECT)
            assert runtime.health().parts[0].state == CircuitState.CLOSED.value
        assert await runtime.commands.dispatch(Greet(key="a")) == Ok("Hello Ada Lovelace")
        (await runtime.commands.dispatch(Join(key="c", name="Cem"))).unwrap()


async def test_keys_that_are_slow_hold_up_nobody_else(sqlite_url, monkeypatch):
    async with opened(sqlite_url) as runtime:
        await fill(runtime)
    async with opened(sqlite_url, follow=False) as runtime:
        may_go_on, provide = threading.Event(), runtime._keyring._store.provide

        def slowly(subjects):
            may_go_on.wait(10)
            return provide(subjects)

        monkeypatch.setattr(runtime._keyring._store, "provide", slowly)
        joining = [
            asyncio.create_task(runtime.commands.dispatch(Join(key=f"n{n}", name="Nan")))
            for n in range(40)
        ]
        for _ in range(20):  # those whose turn it is give up
            await asyncio.sleep(0.02)
            joining.pop(0).cancel()
        async with asyncio.timeout(3):  # it has to be read, and needs no new key
            assert await runtime.commands.dispatch(Greet(key="b")) == Ok("Hello Grace Hopper")
        may_go_on.set()
        assert all(answer.is_ok() for answer in await asyncio.gather(*joining))


async def test_an_answer_that_is_given_again_waits_for_its_key_and_holds_up_nobody(
    sqlite_url, monkeypatch
):
    known = {"command_ids": [uuid4()]}
    async with opened(sqlite_url) as runtime:
        await fill(runtime)
        (await runtime.commands.dispatch_all([Visit(key="a")], **known)).unwrap()
    async with opened(sqlite_url, follow=False) as runtime:
        may_go_on, find = threading.Event(), runtime._keyring._store.find

        def slowly(key_id):
            assert may_go_on.wait(10)
            return find(key_id)

        monkeypatch.setattr(runtime._keyring._store, "find", slowly)
        again = asyncio.create_task(runtime.commands.dispatch_all([Visit(key="a")], **known))
        asyncio.get_running_loop().call_later(0.2, may_go_on.set)
        (name,) = (await again).unwrap()
        assert name.reveal() == "Ada Lovelace"


async def test_keys_that_are_away_are_asked_for_once_a_load(sqlite_url, monkeypatch):
    async with opened(sqlite_url) as runtime:
        await fill(runtime)
    async with opened(sqlite_url, follow=False) as runtime:
        asked = []

        def find(key_id):
            asked.append(key_id)
            raise KeysUnavailable("away")

        monkeypatch.setattr(runtime._keyring, "find", find)
        outcome = await runtime.queries.dispatch(HistoryOf(key="a"))
        assert isinstance(outcome.error, KeysUnavailable)
        assert len(asked) == 1


@pytest.mark.timed
async def test_what_cannot_be_sealed_or_opened_in_time_is_answered(sqlite_url, monkeypatch):
    async with opened(sqlite_url, forget_within=QUICK) as runtime:
        await fill(runtime)
        monkeypatch.setattr(runtime._keyring._store, "forgotten", away)
        await asyncio.sleep(2 * QUICK)
        for command in (Join(key="c", name="Cem"), Visit(key="a", with_whom=("Cem",))):
            outcome = await runtime.commands.dispatch(command)
            assert isinstance(outcome.error, KeysUnavailable)
        outcome = await runtime.queries.dispatch(HistoryOf(key="a"))
        assert isinstance(outcome.error, KeysUnavailable)
        assert (await runtime.commands.dispatch(Visit(key="b", with_whom=()))).is_ok()


@pytest.mark.timed
@pytest.mark.parametrize("reveals", [False, True])
async def test_views_wait_while_the_keys_are_away(sqlite_url, monkeypatch, reveals):
    def joined(row, event):
        if reveals:
            event.name.reveal()
        return GuestRow(event.key, event.name, 0)

    projection = Projection("some", version=1, row=GuestRow)
    projection.on(Joined)(joined)
    some = Model((Guest,), (Guests,), (projection,))
    settings = Settings(store=sqlite_url, follow=False, forget_within=QUICK)
    async with Runtime(some, settings=settings) as runtime:
        await fill(runtime)
        with monkeypatch.context() as patch:
            take_away_keys(runtime, patch)
            runtime._keyring.close()  # as if it had not asked for a while
            await asyncio.sleep(2 * QUICK)
            runtime.follow()
            await asyncio.sleep(0.2)
            assert runtime.health().projections[0].lag == 3
            assert runtime.health().projections[0].failure is None
        assert await runtime.catch_up(20) == Ok(None)


async def test_more_subjects_than_keys_are_kept_are_served(monkeypatch):
    monkeypatch.setattr("leftfold.infrastructure.keyring.AT_HAND", 2)
    async with opened("memory:") as runtime:
        for key in "abcd":
            (await runtime.commands.dispatch(Join(key=key, name=f"Guest {key}"))).unwrap()
        for key in "abcd":
            (await runtime.commands.dispatch(Visit(key=key, with_whom=("Cem",)))).unwrap()
            assert await runtime.commands.dispatch(Greet(key=key)) == Ok(f"Hello Guest {key}")


async def test_a_subject_that_is_forgotten_again_and_again_ends_the_command(monkeypatch):
    async with opened("memory:") as runtime:
        monkeypatch.setattr(runtime._keyring, "of", lambda _: None)
        outcome = await runtime.commands.dispatch(Join(key="a", name="Ada"))
        assert isinstance(outcome.error, KeysUnavailable)


@pytest.mark.timed
async def test_a_runtime_that_is_opened_again_trusts_its_keys_at_once(sqlite_url):
    runtime = opened(sqlite_url, forget_within=QUICK)
    async with runtime:
        await fill(runtime)
    await asyncio.sleep(2 * QUICK)
    async with runtime:
        assert await runtime.commands.dispatch(Greet(key="a")) == Ok("Hello Ada Lovelace")
        (await runtime.commands.dispatch(Visit(key="b", with_whom=("Cem",)))).unwrap()


async def test_what_others_forgot_while_a_runtime_was_closed_is_erased_in_it(sqlite_url):
    runtime = opened(sqlite_url)
    async with runtime:
        row = await asked(runtime, GuestByKey(key="a"), await fill(runtime))
    async with opened(sqlite_url) as other:
        assert await other.forget(SUBJECT)
    async with runtime:
        assert await runtime.commands.dispatch(Greet(key="a")) == Err(PersonalDataErased())
        assert row.name.is_erased


async def test_what_lies_in_the_clear_from_before_keys_is_read_and_stays_so(sqlite_url):
    async with opened(sqlite_url, follow=False) as runtime:
        await fill(runtime)
    clear_names(sqlite_url)
    command_id = uuid4()
    async with opened(sqlite_url) as runtime:
        (await runtime.catch_up()).unwrap()
        assert (await asked(runtime, GuestByKey(key="a"))).name.reveal() == "Clear Old Name"
        for _ in range(2):
            answer = await runtime.commands.dispatch(Visit(key="a"), command_id=command_id)
            assert answer.unwrap().reveal() == "Clear Old Name"
    async with opened(sqlite_url) as runtime:
        assert (await asked(runtime, GuestByKey(key="a"))).name.reveal() == "Clear Old Name"


def clear_names(url):
    with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as database, database:
        events = database.execute(
            "SELECT position, state FROM stored_events WHERE topic = 'test.guest.joined'"
        ).fetchall()
        for position, state in events:
            clear = json.dumps(json.loads(state) | {"name": "Clear Old Name"}).encode()
            database.execute(
                "UPDATE stored_events SET state = ? WHERE position = ?", (clear, position)
            )
        database.execute("DELETE FROM leftfold_snapshots")


async def test_the_default_key_of_a_cache_shows_no_personal_data():
    plain, keyed = InMemoryCache(int), InMemoryCache(int)
    around = (cached(GuestsNamed, plain, 60),)
    async with Runtime(model, store="memory:", middleware=around) as runtime:
        assert await asked(runtime, GuestsNamed(name="Ada Lovelace")) == 0
        assert plain.stats.loads == 0
    around = (cached(GuestsNamed, keyed, 60, key=lambda _: "all"),)
    async with Runtime(model, store="memory:", middleware=around) as runtime:
        assert await asked(runtime, GuestsNamed(name="Ada Lovelace")) == 0
        assert await keyed.get("all") == 0


async def test_two_caches_around_one_query_keep_nothing_that_it_revealed():
    outer, inner = InMemoryCache(str), InMemoryCache(str)
    around = (cached(NameOf, outer, 60), cached(NameOf, inner, 60))
    async with Runtime(model, store="memory:", middleware=around) as runtime:
        (await runtime.wait_for(await fill(runtime))).unwrap()
        assert await asked(runtime, NameOf(key="a")) == "Ada Lovelace"
        await runtime.forget(SUBJECT)
        assert await runtime.queries.dispatch(NameOf(key="a")) == Err(PersonalDataErased())


async def test_a_cache_around_one_that_another_asks_learns_what_was_revealed():
    inner = InMemoryCache(str)
    outer = InMemoryCache(str)
    keys = iter(["one", "two"])
    around = (
        cached(NameOf, outer, 60, key=lambda _: next(keys)),
        cached(NameOf, inner, 60, key=lambda _: "same"),
    )
    async with Runtime(model, store="memory:", middleware=around) as runtime:
        (await runtime.wait_for(await fill(runtime))).unwrap()
        names = await asyncio.gather(*(asked(runtime, NameOf(key="a")) for _ in range(2)))
        assert names == ["Ada Lovelace"] * 2
        assert [await outer.get(key) for key in ("one", "two")] == [None, None]


@pytest.mark.parametrize("is_tiered", [False, True])
async def test_an_answer_with_personal_data_is_answered_and_not_kept_outside(
    sqlite_url, valkey, is_tiered
):
    from leftfold.infrastructure import RedisCache

    redis = RedisCache(GuestRow, valkey.url, prefix=uuid4().hex)
    cache = TieredCache(InMemoryCache(GuestRow), redis) if is_tiered else redis
    around = (cached(GuestByKey, cache, 60),)
    settings = Settings(store=sqlite_url, forget_within=QUICK)
    async with Runtime(model, settings=settings, middleware=around) as runtime:
        (await runtime.wait_for(await fill(runtime))).unwrap()
        for _ in range(2):
            assert (await asked(runtime, GuestByKey(key="a"))).name.reveal() == "Ada Lovelace"
        await runtime.forget(SUBJECT)
        assert (await asked(runtime, GuestByKey(key="a"))).name.is_erased
        assert await redis.get('GuestByKey:{"key":"a"}') is None
    await cache.close()


async def test_rows_are_not_ordered_by_personal_data(runtime):
    from leftfold.application.ports import Order

    views = runtime.queries._handlings[NameOf].handler.__self__.views
    for order in ("name", "-name"):
        with pytest.raises(ValidationFailed, match="none of code, visits"):
            await views.page(guests, order, 1)
    with pytest.raises(ValidationFailed):
        await views.rows(guests, Order("name"))


def test_personal_data_is_not_indexed():
    with pytest.raises(InvalidModelError, match="personal"):
        Projection("indexed", version=1, row=GuestRow, indexes=["name"])


def test_a_personal_column_of_another_type_is_another_column():
    from leftfold.infrastructure.rows import columns_of, describe

    assert describe(columns_of(guests)) == "code str, name Personal[str], visits int"


async def test_an_odd_subject_is_refused_and_not_shown(store_url):
    async with open_items(store_url) as shop:
        register = RegisterItem(sku="A", name="Cup", unit_price=1, opening_stock=10)
        (await shop.commands.dispatch(register)).unwrap()
        for odd in ("17\0", "\ud800", "x" * 2_001, "☃" * 667):
            with pytest.raises(InvalidSubject) as raised:
                await shop.forget(odd)
            assert odd not in str(raised.value)
        sold = await shop.commands.dispatch(sale_to("x" * 2_001))
        assert sold == Err(InvalidSubject("has more than 2000 bytes"))
        (await shop.commands.dispatch(sale_to("☃" * 666))).unwrap()
        assert await shop.forget("☃" * 666)


def sale_to(customer):
    return SellStock(sku="A", quantity=1, invoice="1", customer_id=customer)


class Seen(Event, topic="test.seen"):
    name: Personal[str]

    @property
    def subject(self) -> str:
        return "ann"


async def test_a_value_is_never_missing_while_it_is_sealed():
    import sys
    from threading import Thread

    from leftfold.infrastructure.keyring import Keyring
    from leftfold.infrastructure.stores.keys import MemoryKeys

    ring = Keyring(MemoryKeys(), 60)
    ring.provide(["ann"])
    events, seen, is_over = [Seen(name="Ada")], set(), []

    def read():
        while not is_over:
            seen.add(events[-1].name.reveal())

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    threads = [Thread(target=read, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(3_000):
        event = Seen(name="Ada")
        events.append(event)
        type(event).__pydantic_serializer__.to_json(event, context=SealingOf(event, ring))
        assert event.name.token == "" or event.name.reveal() == "Ada"
    is_over.append(True)
    for thread in threads:
        thread.join()
    sys.setswitchinterval(interval)
    assert seen == {"Ada"}


class Measured(Created, topic="test.measured"):
    born: Personal[date]
    weight: Personal[float]
    picture: Personal[bytes]
    tags: Personal[tuple[str, ...]]

    def apply(self, person: Person) -> None:
        person.born, person.weight = self.born, self.weight
        person.picture, person.tags = self.picture, self.tags


class Person(Aggregate, topic="test.person", events=(Measured,)):
    born: Personal[date]
    weight: Personal[float]
    picture: Personal[bytes]
    tags: Personal[tuple[str, ...]]


class Measure(Command[Personal[date], DomainError]):
    weight: Personal[float]
    picture: Personal[bytes]


class Look(Command[str, DomainError]):
    """Answers what is known of the person."""


class People(Service):
    aggregates = (Person,)

    def handlers(self):
        yield Measure.handled_by(self.measure)
        yield Look.handled_by(self.look)

    def measure(self, command: Measure) -> Result[Personal[date], DomainError]:
        person = Person.begin(
            Measured(
                born=date(1815, 12, 10),
                weight=command.weight,
                picture=command.picture,
                tags=("a", "b"),
            ),
            "x",
        )
        self.repository.save(person)
        return Ok(person.born)

    def look(self, _: Look) -> Result[str, DomainError]:
        person = self.repository.load(Person, Person.id_of("x"))
        parts = (person.born, person.weight, person.picture, person.tags)
        return Ok(repr([part.reveal() for part in parts]))


async def test_personal_data_is_of_any_type(sqlite_url):
    people = Model((Person,), (People,))
    async with Runtime(people, store=sqlite_url) as runtime:
        command = Measure(weight=float("nan"), picture=b"\xff\xfe")
        answer = (await runtime.commands.dispatch(command)).unwrap()
        assert answer.reveal() == date(1815, 12, 10)
    async with Runtime(people, store=sqlite_url) as runtime:
        known = (await runtime.commands.dispatch(Look())).unwrap()
        assert known == r"[datetime.date(1815, 12, 10), nan, b'\xff\xfe', ('a', 'b')]"


async def test_upcasters_move_what_is_sealed(sqlite_url):
    def version(number):
        class Named(Created, topic="test.named"):
            class_version: ClassVar[int] = number
            locals()["__annotations__"]["name" if number == 1 else "full_name"] = Personal[str]

            @staticmethod
            def upcast_v1_v2(state):
                return {"full_name": state.pop("name"), **state}

            def apply(self, one):
                one.name = self.name if number == 1 else self.full_name

        class One(Aggregate, topic="test.one", events=(Named,)):
            name: Personal[str]

        class Do(Command[str, DomainError]):
            """Begins it, or tells its name."""

        class Ones(Service):
            aggregates = (One,)

            def handlers(self):
                yield Do.handled_by(self.do)

            def do(self, _):
                one = self.repository.find(One, One.id_of("x"))
                if one is None:
                    self.repository.save(One.begin(Named(name="Ada"), "x"))
                    return Ok("begun")
                return Ok(one.name.reveal())

        return Model((One,), (Ones,)), Do

    for number, expected in ((1, "begun"), (2, "Ada")):
        ones, do = version(number)
        async with Runtime(ones, store=sqlite_url) as runtime:
            assert await runtime.commands.dispatch(do()) == Ok(expected)


async def test_folding_looks_for_no_forgotten_key(sqlite_url, monkeypatch):
    async with opened(sqlite_url, follow=False) as runtime:
        await fill(runtime)
        await runtime.forget(SUBJECT)
    async with opened(sqlite_url, follow=False) as runtime:
        sought, find = [], runtime._keyring._store.find
        monkeypatch.setattr(
            runtime._keyring._store, "find", lambda key_id: sought.append(key_id) or find(key_id)
        )
        runtime.follow()
        (await runtime.catch_up()).unwrap()
        assert len(sought) == 1  # of the other guest


async def test_keys_are_not_made_where_no_tables_may_be(shared_url):
    async with open_items(shared_url):
        pass
    remove_keys(shared_url)
    async with open_items(settings=Settings(store=shared_url, create_tables=False)) as shop:
        register = RegisterItem(sku="A", name="Cup", unit_price=1, opening_stock=10)
        (await shop.commands.dispatch(register)).unwrap()
        outcome = await shop.commands.dispatch(sale_to("17850"))
        assert isinstance(outcome.error, KeysUnavailable)
        assert "leftfold migrate" in str(outcome.error)
    assert not has_keys(shared_url)


def remove_keys(url):
    if url.startswith("postgresql"):
        with psycopg.connect(url) as connection:
            connection.execute("DROP TABLE leftfold_keys, leftfold_forgotten")


def has_keys(url):
    if url.startswith("sqlite"):
        return Path(f"{url.removeprefix('sqlite:///')}.keys").exists()
    with psycopg.connect(url) as connection:
        return connection.execute("SELECT to_regclass('leftfold_keys')").fetchone() != (None,)


async def test_who_may_not_make_tables_uses_those_that_are_there(postgres_url):
    async with opened(postgres_url):
        pass
    role = f"app_{uuid4().hex}"
    with psycopg.connect(postgres_url) as connection:
        for statement in (
            f"CREATE ROLE {role}",
            "REVOKE CREATE ON SCHEMA public FROM PUBLIC",
            f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {role}",
            f"GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO {role}",
        ):
            connection.execute(statement)
    joint = "&" if "?" in postgres_url else "?"
    url = f"{postgres_url}{joint}options=-c%20role%3D{role}"
    try:
        async with opened(url, create_tables=False) as runtime:
            (await runtime.commands.dispatch(Join(key="a", name="Ada"))).unwrap()
        with closing(make_keys(Settings(store=url))) as keys:
            keys.open(create_tables=True)
    finally:
        with psycopg.connect(postgres_url) as connection:
            connection.execute(f"DROP OWNED BY {role}")
            connection.execute(f"DROP ROLE {role}")


async def test_keys_in_a_database_that_is_away_are_noticed_at_start(sqlite_url):
    keys = "postgresql://ann:secret@127.0.0.1:1/none"
    with pytest.raises(StoreUnavailableError) as raised:
        async with opened(sqlite_url, keys=keys):
            pass
    assert "secret" not in str(raised.value)


async def test_a_call_for_keys_that_hangs_is_cut_off(sqlite_url, postgres_url):
    settings = {"store_timeout": 0.5, "command_timeout": 10, "lock_timeout": 1}
    async with opened(sqlite_url, keys=postgres_url, **settings) as runtime:
        await fill(runtime)
        (pid,) = backends_of(postgres_url)
        os.kill(pid, signal.SIGSTOP)
        try:
            outcome = await runtime.commands.dispatch(Join(key="c", name="Cem"))
            assert isinstance(outcome.error, KeysUnavailable)
        finally:
            os.kill(pid, signal.SIGCONT)
        for _ in range(50):
            if (await runtime.commands.dispatch(Join(key="c", name="Cem"))).is_ok():
                break
            await asyncio.sleep(0.1)
        assert await runtime.commands.dispatch(Greet(key="c")) == Ok("Hello Cem")


def backends_of(url):
    with psycopg.connect(url) as connection:
        rows = connection.execute(
            "SELECT pid FROM pg_stat_activity WHERE datname = current_database() "
            "AND pid <> pg_backend_pid() AND backend_type = 'client backend'"
        )
        return [pid for (pid,) in rows]


@pytest.mark.timed
async def test_another_process_erases_what_this_one_holds(shared_url, start):
    forgets = """
        from leftfold.infrastructure.items import open_items

        async def main():
            async with open_items(url) as shop:
                say(await shop.forget("17850"))

        asyncio.run(main())
    """
    settings = Settings(store=shared_url, forget_within=QUICK)
    async with open_items(settings=settings) as shop:
        register = RegisterItem(sku="A", name="Cup", unit_price=1, opening_stock=10)
        (await shop.commands.dispatch(register)).unwrap()
        (await shop.commands.dispatch(sale_to("17850"))).unwrap()
        child = start(forgets, shared_url)
        assert await asyncio.to_thread(child.says) == "True"
        await asyncio.sleep(QUICK)
        told = (await shop.queries.dispatch(ItemHistory(sku="A"))).unwrap()
        assert told[1].payload["customer_id"] == ERASED


async def test_a_backup_of_keys_brings_back_who_was_forgotten_and_loses_who_came_since(tmp_path):
    url, keys = f"sqlite:///{tmp_path}/shop.db", tmp_path / "shop.db.keys"
    async with opened(url) as runtime:
        await fill(runtime)
    backup = keys.read_bytes()
    async with opened(url) as runtime:
        await runtime.forget(SUBJECT)
        (await runtime.commands.dispatch(Join(key="c", name="Cem"))).unwrap()
    keys.write_bytes(backup)
    async with opened(url) as runtime:
        assert await name_in_history(runtime, "a") == "Ada Lovelace"
        assert await name_in_history(runtime, "c") == ERASED
        assert await runtime.forget(SUBJECT)
        assert await name_in_history(runtime, "a") == ERASED


async def test_a_missing_schema_is_still_told(sqlite_url):
    with pytest.raises(SchemaMissingError):
        async with opened(sqlite_url, create_tables=False):
            pass
