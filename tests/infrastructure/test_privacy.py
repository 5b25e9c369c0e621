"""Personal data is sealed where it is stored, and erased everywhere with its subject's key."""

from __future__ import annotations

import asyncio
import copy
import pickle
from contextlib import closing
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from uuid import uuid4

import pytest

from leftfold.application import (
    Command,
    InvalidCacheArgumentError,
    KeysUnavailable,
    Model,
    Projection,
    Query,
    QueryService,
    Receipt,
    Service,
    SnapshotPolicy,
    cached,
)
from leftfold.application.items import ItemHistory, SellStock
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
from leftfold.infrastructure import InMemoryCache, Runtime, Settings
from leftfold.infrastructure.items import open_items
from leftfold.infrastructure.stores import make_store

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


class NameOf(Query[str, DomainError]):
    key: str


class HistoryOf(Query[list[object], DomainError]):
    key: str


class GuestQueries(QueryService):
    def handlers(self):
        yield GuestByKey.handled_by(self.guest)
        yield NameOf.handled_by(self.name)
        yield HistoryOf.handled_by(self.history)

    async def guest(self, query: GuestByKey) -> Result[GuestRow, DomainError]:
        return Ok(await self.views.get(guests, Guest.id_of(query.key).hex))

    async def name(self, query: NameOf) -> Result[str, DomainError]:
        row = await self.views.get(guests, Guest.id_of(query.key).hex)
        return Ok(row.name.reveal())

    async def history(self, query: HistoryOf) -> Result[list[object], DomainError]:
        told = await self.histories.history(Guest, Guest.id_of(query.key))
        return Ok([event.payload for event in told])


model = Model(
    (Guest,), (Guests,), (guests,), (GuestQueries,), snapshots={Guest: SnapshotPolicy(every=2)}
)
SUBJECT = str(Guest.id_of("a"))
QUICK = 0.4  # seconds


def opened(url, **settings):
    return Runtime(model, settings=Settings(store=url, forget_within=QUICK, **settings))


async def fill(runtime):
    await runtime.commands.dispatch(Join(key="a", name="Ada Lovelace"))
    await runtime.commands.dispatch(Visit(key="a", with_whom=("Charles Babbage",)))
    receipt = await runtime.commands.dispatch(Join(key="b", name="Grace Hopper"))
    return receipt.unwrap()


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


async def test_another_process_shows_it_no_more_within_the_stated_time(shared_url):
    async with opened(shared_url) as one, opened(shared_url) as other:
        receipt = await fill(one)
        row = await asked(other, GuestByKey(key="a"), receipt)
        assert row.name.reveal() == "Ada Lovelace"
        assert (await other.commands.dispatch(Greet(key="a"))).is_ok()  # it is in memory there
        await one.forget(SUBJECT)
        await asyncio.sleep(QUICK)
        assert row.name.is_erased
        assert await other.commands.dispatch(Greet(key="a")) == Err(PersonalDataErased())


async def test_nothing_is_shown_while_the_keys_cannot_be_asked(sqlite_url, monkeypatch):
    async with opened(sqlite_url) as runtime:
        receipt = await fill(runtime)
        row = await asked(runtime, GuestByKey(key="a"), receipt)

        def away(_after):
            from eventsourcing.persistence import OperationalError

            raise OperationalError("keys: away")

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
