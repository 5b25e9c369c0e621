"""What we use of eventsourcing 9.5.6 that it does not promise: a new version must still have it."""

from __future__ import annotations

import sqlite3
from datetime import UTC, datetime, timedelta
from inspect import signature
from uuid import uuid4

import eventsourcing.domain
import pytest
from eventsourcing.application import Application, Repository
from eventsourcing.domain import CanInitAggregate, CanMutateAggregate, OriginatorVersionError, event
from eventsourcing.persistence import (
    InfrastructureFactory,
    IntegrityError,
    Mapper,
    PersistenceError,
    StoredEvent,
    Tracking,
)
from eventsourcing.popo import POPOProcessRecorder
from eventsourcing.postgres import PostgresDatastore, PostgresProcessRecorder
from eventsourcing.sqlite import (
    SQLiteConnection,
    SQLiteCursor,
    SQLiteDatastore,
    SQLiteProcessRecorder,
)
from eventsourcing.utils import Environment

from leftfold.infrastructure.settings import load_settings
from leftfold.infrastructure.stores import make_store

NOW = datetime(2011, 12, 9, tzinfo=UTC)


class Dog(eventsourcing.domain.Aggregate):
    @event("Registered")
    def __init__(self, name: str) -> None:
        self.name = name


# Aggregates -----------------------------------------------------------------------------------


def test_base_init_sets_an_aggregates_own_attributes():
    dog, dog_id = object.__new__(eventsourcing.domain.Aggregate), uuid4()
    dog.__base_init__(dog_id, 3, NOW)
    assert vars(dog) == {
        "_id": dog_id,
        "_version": 3,
        "_created_on": NOW,
        "_modified_on": NOW,
        "_pending_events": [],
    }


def test_the_version_and_the_time_of_change_are_what_the_properties_show():
    dog = Dog("Fido")
    dog._version, dog._modified_on = 7, NOW + timedelta(days=1)
    assert (dog.version, dog.modified_on) == (7, NOW + timedelta(days=1))
    dog.modified_on = NOW
    assert dog._modified_on == NOW


def test_pending_events_are_what_is_collected_and_what_the_next_version_follows():
    dog = Dog("Fido")
    pending = list(dog._pending_events)
    assert isinstance(dog._pending_events, list)
    assert list(dog.collect_events()) == pending
    assert dog._pending_events == []


def test_the_bases_of_events_may_be_mixed_with_other_classes():
    class Base:
        def __init_subclass__(cls, **kwargs):
            super().__init_subclass__(**kwargs)

    class Created(Base, CanInitAggregate):
        pass

    assert issubclass(Created, CanMutateAggregate)
    assert issubclass(OriginatorVersionError, Exception)


def test_an_aggregates_initial_version_is_1():
    assert eventsourcing.domain.Aggregate.INITIAL_VERSION == 1


# SQLite ---------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path):
    datastore = SQLiteDatastore(str(tmp_path / "dogs.db"), lock_timeout=1, pool_size=2)
    yield datastore
    datastore.close()


def test_a_connection_to_sqlite_is_the_drivers_in_autocommit_for_any_thread(file):
    with file.get_connection(commit=True) as connection:
        assert isinstance(connection, SQLiteConnection)
        assert isinstance(connection._sqlite_conn, sqlite3.Connection)
        assert connection._sqlite_conn.isolation_level is None


def test_the_pool_makes_connections_by_a_method_that_can_be_replaced(file):
    made, genuine = [], file.pool._create_connection

    def create():
        made.append(genuine())
        return made[-1]

    file.pool._create_connection = create
    with file.get_connection(commit=False) as connection:
        assert made == [connection]


def test_the_first_statement_of_a_sqlite_recorder_makes_the_events_table_and_others_follow(file):
    first, *others = SQLiteProcessRecorder(file).construct_create_table_statements()
    assert "stored_events" in first
    assert not [statement for statement in others if "stored_events (" in statement]
    assert "tracking" in "".join(others)


def test_a_sqlite_recorder_tracks_on_a_cursor_of_ours(file):
    recorder = SQLiteProcessRecorder(file)
    recorder.create_table()
    with file.get_connection(commit=True) as connection:
        recorder._insert_tracking(SQLiteCursor(connection._sqlite_conn.cursor()), Tracking("d", 7))
    assert recorder.max_tracking_id("d") == 7


# PostgreSQL -----------------------------------------------------------------------------------


def test_a_datastore_for_postgresql_takes_what_we_give_it():
    taken = signature(PostgresDatastore).parameters
    given = {"dbname", "host", "port", "user", "password", "pool_size", "max_overflow"}
    assert given | {"lock_timeout", "enable_db_functions"} <= set(taken)
    assert taken["enable_db_functions"].default is False


def test_connections_to_postgresql_are_in_autocommit(postgres_url):
    store = make_store(load_settings(store=postgres_url))
    store.open((), create_tables=True)
    with store.log.datastore.get_connection() as connection:
        assert connection.autocommit
    store.close()


def test_a_recorder_for_postgresql_has_the_tracking_hook_we_call():
    assert list(signature(PostgresProcessRecorder._insert_tracking).parameters) == [
        *("self", "curs", "tracking")
    ]


# Memory ---------------------------------------------------------------------------------------


def test_a_recorder_in_memory_keeps_events_in_a_list_with_an_index_by_version():
    recorder, dog = POPOProcessRecorder(), uuid4()
    events = [StoredEvent(dog, version, "dog", b"{}") for version in (1, 2)]
    assert recorder._update_table(events) == [1, 2]
    assert recorder._stored_events == events
    assert recorder._stored_events_index[str(dog)] == {1: 0, 2: 1}
    with recorder._database_lock:
        recorder._notify_listeners()


# Applications ---------------------------------------------------------------------------------


def test_the_hooks_of_an_application_are_called_with_what_we_expect():
    assert list(signature(Application.construct_env).parameters) == ["self", "name", "env"]
    assert list(signature(Application.construct_factory).parameters) == ["self", "env"]
    assert list(signature(Application.construct_mapper).parameters) == ["self"]
    assert list(signature(Application.construct_repository).parameters) == ["self"]


def test_an_application_keeps_what_our_services_use():
    dogs = Application()
    assert isinstance(dogs._repository, Repository)
    assert isinstance(dogs.factory, InfrastructureFactory)
    assert isinstance(dogs.mapper, Mapper)
    assert (dogs.events, dogs.snapshots) == (dogs.repository.event_store, None)
    assert not dogs.closing.is_set()


def test_an_environment_holds_only_what_it_is_given(monkeypatch):
    monkeypatch.setenv("MAPPER_TOPIC", "os:system")
    assert Environment("dogs", {}).get("MAPPER_TOPIC") is None


def test_a_mapper_has_a_compressor_and_a_cipher():
    assert {"transcoder", "compressor", "cipher"} <= set(signature(Mapper.__init__).parameters)


def test_errors_of_its_persistence_are_one_tree():
    assert issubclass(IntegrityError, PersistenceError)
