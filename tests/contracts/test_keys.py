"""What every store of keys does."""

from __future__ import annotations

import sqlite3
import stat
from contextlib import closing

import pytest
from eventsourcing.persistence import OperationalError

from leftfold.infrastructure import InvalidSettingsError, Settings
from leftfold.infrastructure.stores.keys import TOGETHER, make_keys


@pytest.fixture
def keys(store_url):
    with closing(opened(Settings(store=store_url))) as keys:
        yield keys


def opened(settings):
    keys = make_keys(settings)
    keys.open(create_tables=True)
    return keys


def test_a_subject_gets_a_key_once(keys):
    (first,) = keys.provide(["ann"])
    (again,) = keys.provide(["ann"])
    assert again == first
    assert first.subject == "ann"
    assert len(first.secret) == 32


def test_each_subject_has_a_key_of_its_own(keys):
    made = keys.provide(["ann", "bob", "cem"])
    assert {key.subject for key in made} == {"ann", "bob", "cem"}
    assert len({key.secret for key in made}) == len({key.id for key in made}) == 3


def test_a_key_is_found_by_its_name(keys):
    (ann,) = keys.provide(["ann"])
    assert ann in keys.find(ann.id)
    assert keys.find("0" * 32) == []


def test_a_forgotten_key_is_not_found_and_its_name_is_told(keys):
    _, mark = keys.forgotten(-1)
    (ann,) = keys.provide(["ann"])
    (bob,) = keys.provide(["bob"])
    assert keys.forget("ann") == [ann.id]
    assert ann not in keys.find(ann.id)
    assert bob in keys.find(bob.id)
    gone, after = keys.forgotten(mark)
    assert gone == [ann.id]
    assert keys.forgotten(after) == ([], after)
    assert keys.forget("bob") == [bob.id]
    assert keys.forgotten(after)[0] == [bob.id]


def test_to_forget_nobody_does_nothing(keys):
    assert keys.forget("nobody") == []


def test_who_comes_back_gets_another_key(keys):
    (first,) = keys.provide(["ann"])
    keys.forget("ann")
    (second,) = keys.provide(["ann"])
    assert second.id != first.id
    assert second.secret != first.secret


def test_any_text_may_be_a_subject(keys):
    subjects = ["", "a'b\"c", "☃", "%s", "x" * 1_000]
    assert {key.subject for key in keys.provide(subjects)} == set(subjects)


def test_what_is_read_together_is_bounded(keys):
    made = keys.provide([f"s{n}" for n in range(TOGETHER + 10)])
    first = min(made, key=lambda key: len(keys.find(key.id)) * -1)
    assert 1 <= len(keys.find(first.id)) <= TOGETHER


@pytest.fixture
def both(shared_url):
    settings = Settings(store=shared_url)
    with closing(opened(settings)) as one, closing(opened(settings)) as other:
        yield one, other


def test_two_processes_that_ask_for_one_subject_get_one_key(both):
    one, other = both
    assert one.provide(["ann"]) == other.provide(["ann"])
    (key,) = one.provide(["ann"])
    other.forget("ann")
    assert key not in one.find(key.id)
    assert one.forgotten(-1)[0] == [key.id]


def test_a_file_of_keys_is_for_its_owner_only(tmp_path):
    with closing(make_keys(Settings(keys=f"sqlite:///{tmp_path}/k.db"))) as keys:
        keys.provide(["ann"])
    assert stat.S_IMODE((tmp_path / "k.db").stat().st_mode) == 0o600


def test_a_forgotten_secret_is_in_no_file(tmp_path):
    with closing(make_keys(Settings(keys=f"sqlite:///{tmp_path}/k.db"))) as keys:
        (ann,) = keys.provide(["ann"])
        found = [ann.secret in path.read_bytes() for path in tmp_path.iterdir()]
        assert any(found)
        keys.forget("ann")
        assert not any(ann.secret in path.read_bytes() for path in tmp_path.iterdir())
    assert not any(ann.secret in path.read_bytes() for path in tmp_path.iterdir())


def test_keys_that_cannot_be_reached_say_so_and_show_no_password(tmp_path):
    unreachable = [
        f"sqlite:///{tmp_path}/no/such/folder/k.db",
        "postgresql://ann:secret@127.0.0.1:1/none",
    ]
    for url in unreachable:
        keys = make_keys(Settings(keys=url))
        with pytest.raises(OperationalError) as raised:
            keys.provide(["ann"])
        assert "secret" not in str(raised.value)
    with pytest.raises(InvalidSettingsError) as refused:
        make_keys(Settings(keys="ftp://ann:secret@example.org"))
    assert "secret" not in str(refused.value)


def test_a_connection_that_was_lost_is_made_anew(postgres_url):
    import psycopg

    with closing(opened(Settings(keys=postgres_url))) as keys:
        (ann,) = keys.provide(["ann"])
        with psycopg.connect(postgres_url, autocommit=True) as other:
            other.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE pid <> pg_backend_pid() AND datname = current_database()"
            )
        with pytest.raises(OperationalError):
            keys.provide(["ann"])
        assert keys.provide(["ann"]) == [ann]


def test_the_representation_of_a_key_shows_neither_subject_nor_secret(keys):
    (ann,) = keys.provide(["ann"])
    assert repr(ann) == f"StoredKey({ann.id})"


def test_the_file_of_the_events_is_refused_for_keys(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for keys in (f"sqlite:///{tmp_path}/shop.db", "sqlite:///shop.db"):
        with pytest.raises(InvalidSettingsError, match="own file"):
            make_keys(Settings(store=f"sqlite:///{tmp_path}/shop.db", keys=keys))


def test_reading_keys_waits_for_no_writer(tmp_path):
    settings = Settings(keys=f"sqlite:///{tmp_path}/k.db", lock_timeout=1)
    with closing(opened(settings)) as keys, closing(sqlite3.connect(tmp_path / "k.db")) as writer:
        (ann,) = keys.provide(["ann"])
        writer.execute("BEGIN IMMEDIATE")
        assert keys.find(ann.id) == [ann]
        assert keys.forgotten(-1) == ([], 0)


def test_where_no_tables_may_be_made_none_are(shared_url):
    with closing(make_keys(Settings(store=shared_url))) as keys:
        keys.open(create_tables=False)
        with pytest.raises(OperationalError, match="leftfold migrate"):
            keys.provide(["ann"])
        with closing(opened(Settings(store=shared_url))) as others:
            (ann,) = others.provide(["ann"])
        assert keys.provide(["ann"]) == [ann]
