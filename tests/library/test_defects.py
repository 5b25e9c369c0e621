"""What eventsourcing 9.5.6 does that our design works around.

A failure here after an upgrade is good news: the library was mended, and so may be our code.
"""

from __future__ import annotations

import dataclasses
import os
from datetime import UTC, datetime
from importlib.metadata import files
from threading import Event as Signal
from uuid import UUID, uuid4

import eventsourcing.application
import psycopg
import pytest
from eventsourcing.application import Application, project_aggregate
from eventsourcing.domain import Aggregate as PlainAggregate
from eventsourcing.domain import CanMutateAggregate, event
from eventsourcing.persistence import (
    DatetimeAsISO,
    InfrastructureFactory,
    JSONTranscoder,
    Mapper,
    StoredEvent,
    Tracking,
    UUIDAsHex,
)
from eventsourcing.popo import POPOTrackingRecorder
from eventsourcing.postgres import PostgresDatastore, PostgresProcessRecorder
from eventsourcing.projection import Projection, ProjectionRunner
from eventsourcing.sqlite import SQLiteDatastore, SQLiteProcessRecorder
from eventsourcing.system import ProcessApplication
from eventsourcing.utils import Environment, resolve_topic
from psycopg.conninfo import conninfo_to_dict
from pydantic import BaseModel

from leftfold.infrastructure.settings import load_settings
from leftfold.infrastructure.stores import make_store


class Dog(PlainAggregate):
    @event("Registered")
    def __init__(self, name: str) -> None:
        self.name = name


class Dogs(Application[UUID]):
    pass


class Barked(BaseModel, CanMutateAggregate[UUID]):
    originator_id: UUID
    originator_version: int
    timestamp: datetime
    loudness: int


def datastore(url, **options):
    parts = conninfo_to_dict(url)
    address = {name: parts.get(name, "") for name in ("dbname", "host", "port", "user", "password")}
    return PostgresDatastore(**address, **options)


def stored(n=1):
    return [StoredEvent(uuid4(), 1, "dog", b"{}") for _ in range(n)]


# Databases ------------------------------------------------------------------------------------


def test_its_database_functions_on_postgresql_drop_the_tracking(postgres_url):
    store = datastore(postgres_url, enable_db_functions=True)
    recorder = PostgresProcessRecorder(store)
    recorder.create_table()
    recorder.insert_events(stored(), tracking=Tracking("dogs", 1))
    assert recorder.max_notification_id() == 1
    assert recorder.max_tracking_id("dogs") is None
    store.close()


def test_its_database_functions_on_postgresql_do_not_wait_for_the_table_lock(postgres_url):
    store = datastore(postgres_url, enable_db_functions=True)
    recorder = PostgresProcessRecorder(store)
    recorder.create_table()
    with psycopg.connect(postgres_url) as slow:
        # An earlier position that commits later: a reader who saw 2 never asks for 1.
        slow.execute("INSERT INTO stored_events VALUES (gen_random_uuid(), 1, 'dog', '{}')")
        recorder.insert_events(stored())
        seen = recorder.select_notifications(1, 10)
        slow.commit()
    assert [notification.id for notification in seen] == [2]
    store.close()


def test_our_store_on_postgresql_never_uses_them(postgres_url, monkeypatch):
    monkeypatch.setenv("POSTGRES_ENABLE_DB_FUNCTIONS", "y")
    store = make_store(load_settings(store=postgres_url))
    store.open((), create_tables=True)
    assert store.log.datastore.enable_db_functions is False
    store.close()


def test_its_recorder_on_sqlite_has_no_subscription(tmp_path):
    store = SQLiteDatastore(str(tmp_path / "dogs.db"))
    with pytest.raises(NotImplementedError):
        SQLiteProcessRecorder(store).subscribe()
    store.close()


def test_its_followers_in_one_sqlite_file_share_their_tracking(tmp_path):
    env = {"PERSISTENCE_MODULE": "eventsourcing.sqlite", "SQLITE_DBNAME": str(tmp_path / "dogs.db")}
    factories = [InfrastructureFactory.construct(Environment(name, env)) for name in ("one", "two")]
    one, two = (factory.process_recorder() for factory in factories)
    one.insert_events([], tracking=Tracking("dogs", 7))
    assert two.max_tracking_id("dogs") == 7  # so the second follower skips all of them
    for factory in factories:
        factory.close()


def test_its_postgresql_module_ships_in_the_package_itself():
    assert "eventsourcing/postgres.py" in {str(path) for path in files("eventsourcing") or ()}


# Applications ---------------------------------------------------------------------------------


def test_replaying_checks_every_event_against_a_runtime_protocol(monkeypatch):
    checked = []

    class Checks(type):
        def __instancecheck__(cls, instance):
            checked.append(instance)
            return True

    class Watching(metaclass=Checks):
        pass

    dog = Dog("Fido")
    dog.trigger_event(Dog.Event)
    events = list(dog.collect_events())
    monkeypatch.setattr(eventsourcing.application, "CanMutateProtocol", Watching)
    project_aggregate(None, events)
    assert checked == events


def test_its_notification_log_refuses_more_than_ten():
    dogs = Dogs()
    assert len(dogs.notification_log.select(1, 10)) == 0
    with pytest.raises(ValueError, match="section size"):
        dogs.notification_log.select(1, 11)


def test_the_hosts_environment_beats_an_argument(monkeypatch, tmp_path):
    monkeypatch.setenv("DOGS_PERSISTENCE_MODULE", "eventsourcing.sqlite")
    monkeypatch.setenv("DOGS_SQLITE_DBNAME", str(tmp_path / "dogs.db"))
    dogs = Dogs(env={"PERSISTENCE_MODULE": "eventsourcing.popo"})
    assert type(dogs.recorder).__module__ == "eventsourcing.sqlite"
    dogs.close()


def test_following_makes_the_mapper_again_from_its_class_alone():
    class Keyed(Mapper[UUID]):
        key = "none"

    class Follows(ProcessApplication[UUID]):
        def construct_mapper(self):
            mapper = self.factory.mapper(self.construct_transcoder(), mapper_class=Keyed)
            mapper.key = "secret"
            return mapper

    follower = Follows()
    follower.follow("dogs", Dogs().notification_log)
    assert (follower.mapper.key, follower.mappers["dogs"].key) == ("secret", "none")


def test_an_exception_ends_a_projection_runner_for_good():
    seen, raised = [], Signal()

    class FailsOnce(Projection[POPOTrackingRecorder]):
        name = "fails"

        def process_event(self, domain_event, tracking):
            seen.append(domain_event)
            if len(seen) == 1:
                raised.set()
                raise ZeroDivisionError

    runner = ProjectionRunner(
        application_class=Dogs, projection_class=FailsOnce, view_class=POPOTrackingRecorder
    )

    def run():
        with runner:
            runner.app.save(Dog("Fido"))
            assert raised.wait(5)
            assert runner.is_interrupted.wait(5)
            runner.app.save(Dog("Rex"))
            runner._processing_thread.join(5)
            assert not runner._processing_thread.is_alive()

    with pytest.raises(ZeroDivisionError):
        run()
    assert len(seen) == 1


# Topics, mappers, modules ---------------------------------------------------------------------


def test_resolving_a_topic_imports_whatever_it_names():
    assert resolve_topic("os:system") is os.system


def barked_from(mapper):
    told = Barked(originator_id=uuid4(), originator_version=1, timestamp=NOW, loudness=3)
    return mapper.to_domain_event(mapper.to_stored_event(told))


def test_a_pydantic_event_from_its_mapper_cannot_be_compared():
    mapper = mapper_of_the_library()
    with pytest.raises(AttributeError, match="__pydantic_"):
        assert barked_from(mapper) == barked_from(mapper)


def test_a_pydantic_event_from_its_mapper_cannot_be_copied():
    with pytest.raises(AttributeError, match="__pydantic_"):
        barked_from(mapper_of_the_library()).model_copy()


def test_importing_its_domain_patches_dataclasses():
    assert dataclasses._process_class.__module__ == "eventsourcing.domain"


NOW = datetime(2011, 12, 9, tzinfo=UTC)


def mapper_of_the_library():
    transcoder = JSONTranscoder()
    transcoder.register(UUIDAsHex())
    transcoder.register(DatetimeAsISO())
    return Mapper(transcoder)
