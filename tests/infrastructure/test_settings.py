"""Settings: arguments before environment before defaults, and no secret shown."""

from __future__ import annotations

import logging

import pytest

from leftfold.application.items import Items, item_model
from leftfold.infrastructure import InvalidSettingsError, Runtime, Settings, StoreUnavailableError
from leftfold.infrastructure.health import dump_health
from leftfold.infrastructure.items import open_items
from leftfold.infrastructure.settings import load_settings, masked

SECRET = "s3cret"


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch):
    for name in Settings.model_fields:
        monkeypatch.delenv(f"LEFTFOLD_{name.upper()}", raising=False)


def test_a_runtime_is_in_memory_by_default():
    assert open_items().settings == Settings()
    assert open_items().settings.store == "memory:"


def test_the_environment_beats_the_defaults(monkeypatch, sqlite_url):
    monkeypatch.setenv("LEFTFOLD_STORE", sqlite_url)
    monkeypatch.setenv("LEFTFOLD_PAGE_SIZE", "7")
    settings = open_items().settings
    assert (settings.store, settings.page_size) == (sqlite_url, 7)


def test_arguments_beat_the_environment(monkeypatch, sqlite_url):
    monkeypatch.setenv("LEFTFOLD_STORE", "sqlite:///elsewhere.db")
    monkeypatch.setenv("LEFTFOLD_PAGE_SIZE", "7")
    assert open_items(sqlite_url).settings.store == sqlite_url
    settings = load_settings(store=sqlite_url, page_size=8)
    assert (settings.store, settings.page_size) == (sqlite_url, 8)


def test_a_store_given_beside_settings_beats_theirs(sqlite_url):
    runtime = Runtime(item_model, sqlite_url, settings=Settings(store="memory:", page_size=9))
    assert (runtime.settings.store, runtime.settings.page_size) == (sqlite_url, 9)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("store", "mysql://shop"),
        ("store", "sqlite:///"),
        ("store", "sqlite://shop.db"),
        ("store", ""),
        ("page_size", "0"),
        ("page_size", "many"),
        ("memory", "-1"),
        ("command_timeout", "0"),
        ("command_timeout", "inf"),
        ("view_timeout", "nan"),
        ("conflict_attempts", "0"),
        ("poll_interval", "-1"),
        ("lock_timeout", "soon"),
        ("create_tables", "perhaps"),
    ],
)
def test_a_bad_setting_in_the_environment_is_refused_by_name(monkeypatch, field, value):
    monkeypatch.setenv(f"LEFTFOLD_{field.upper()}", value)
    with pytest.raises(InvalidSettingsError) as refusal:
        open_items()
    assert refusal.value.name == field


def test_a_bad_argument_is_refused_by_name():
    with pytest.raises(InvalidSettingsError) as refusal:
        open_items("mysql://shop")
    assert refusal.value.name == "store"


def test_a_bad_setting_given_to_settings_is_refused_by_name():
    with pytest.raises(InvalidSettingsError) as refusal:
        Settings(page_size=0)
    assert refusal.value.name == "page_size"


def test_an_unknown_setting_is_refused_by_name():
    with pytest.raises(InvalidSettingsError) as refusal:
        load_settings(pagesize=1)
    assert refusal.value.name == "pagesize"


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://shop:{SECRET}@host/db",
        f"postgres://shop:{SECRET}@host:5432/db?sslmode=require",
        f"postgresql://shop:a@{SECRET}@host/db",
        f"postgresql://shop:a/{SECRET}@host/db",
        f"postgresql://shop:a?{SECRET}@host/db",
        f"postgresql://shop:a#{SECRET}@host/db",
        f"postgresql://shop:%40{SECRET}@/db?host=/tmp",
        f"postgresql://host/db?user=shop&password={SECRET}&sslmode=require",
        f"postgresql://host/db?passfile=x&sslpassword={SECRET}",
        f"postgresql:shop:{SECRET}@host/db",
        f"postgresql//shop:{SECRET}@host/db",
        f"mysql://shop:{SECRET}@host/db",
        f"postgresql+psycopg://shop:{SECRET}@host/db",
        f"postgresql+asyncpg://shop:{SECRET}@host/db",
        f"postgres+x://shop:{SECRET}@host",
        f"postgresql://me@corp:{SECRET}@host/db",
        f"postgresql://me@{SECRET}:x@host/db",
        f"postgresql://shop:{SECRET}%zz@host/db",
        f"postgresql://shop:{SECRET}@host:port/db",
        f"postgresql://shop:{SECRET}@host/db?bogus=1",
        f"postgresql://shop:{SECRET}@[::1/db",
        f"postgresql://shop:{SECRET}/db",
        f"postgresql://shop:1/{SECRET}@host/db",
        f"postgresql://host/db?user=shop&password={SECRET}%zz",
        f"postgresql://host/db?user=shop&password={SECRET}\0",
        f"host=db user=shop password='a {SECRET}'",
        f"sqlite://shop:{SECRET}@host/x",
        f"shop:{SECRET}@host",
        f"postgresql:/shop:{SECRET}@host/db",
    ],
)
def test_a_password_is_never_shown(url):
    assert SECRET not in masked(url)
    assert SECRET not in repr(Settings(store=url)) + str(Settings(store=url))
    try:
        shown = repr(open_items(url)._store.name)
    except (InvalidSettingsError, StoreUnavailableError) as refusal:
        shown = f"{refusal} {refusal!r}"
    assert SECRET not in shown


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://shop:{SECRET}@host:port/db",
        f"postgresql://shop:a@{SECRET}@host/db",
        f"postgresql://shop:a?b@{SECRET}@host/db",
        f"postgresql://shop:1/{SECRET}@host/db",
        f"postgresql://shop:{SECRET}%zz@host/db",
        f"postgresql://shop:{SECRET}/db",
        f"postgresql://shop:\ud800{SECRET}@host/db",
    ],
)
def test_a_malformed_url_is_refused_before_the_driver_can_quote_it(url):
    with pytest.raises(InvalidSettingsError) as refusal:
        open_items(url)
    assert refusal.value.reason == f"{masked(url)!r} is malformed"


@pytest.mark.parametrize(
    "part",
    ["me%40corp:a%2Fb@host:5432/db", "shop:a?b@host/db", "h1:1,h2:2/db", "@/db?host=/tmp/a@b"],
)
def test_a_url_that_the_driver_reads_as_it_is_meant_is_taken(part):
    assert open_items(f"postgresql://{part}")._store.hints


def test_a_path_that_no_file_can_have_is_refused():
    with pytest.raises(InvalidSettingsError):
        open_items("sqlite:///a\0b")


@pytest.mark.parametrize(
    "url",
    [
        "memory:",
        "sqlite:////tmp/a:b@c.db",
        "postgresql://shop@host/db",
        "postgresql://h1:5432,h2:5432/db",
        "postgresql://[::1]:5432/db",
    ],
)
def test_a_url_without_a_password_is_shown_as_it_is(url):
    assert masked(url) == url


@pytest.mark.anyio
async def test_a_password_is_not_in_health_errors_or_logs(
    caplog, postgres_url, register, execute_all
):
    caplog.set_level(logging.DEBUG)
    url = postgres_url.replace("postgres:@", f"postgres:{SECRET}@")
    assert url != postgres_url
    async with open_items(url) as shop:
        await shop.commands.dispatch(register())
        shown = [dump_health(shop.health()), repr(shop.health()), repr(shop), repr(shop.settings)]
        await execute_all(shop)
    with pytest.raises(StoreUnavailableError) as refusal:
        await open_items(url.replace("/leftfold_", "/missing_")).__aenter__()
    shown += [str(refusal.value), repr(refusal.value), caplog.text]
    assert SECRET not in "".join(shown)
    assert "***" in shown[0]


@pytest.fixture
def execute_all(postgres_url):
    """Lose all connections, so that their failure is logged."""
    import psycopg

    from leftfold.domain import Err

    async def lose(shop):
        with psycopg.connect(postgres_url, autocommit=True) as connection:
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        assert isinstance(await shop.wait_for(await _ahead(shop), timeout=0.2), Err)

    async def _ahead(shop):
        from uuid import uuid4

        from leftfold.application import Receipt

        return Receipt(uuid4(), (), 10**9)

    return lose


HOST_ENVIRONMENT = {
    "PERSISTENCE_MODULE": "no.such.module",
    "ITEMS_PERSISTENCE_MODULE": "no.such.module",
    "SHAREDLOG_PERSISTENCE_MODULE": "no.such.module",
    "MAPPER_TOPIC": "no.such:mapper",
    "TRANSCODER_TOPIC": "no.such:transcoder",
    "COMPRESSOR_TOPIC": "no.such:compressor",
    "CIPHER_TOPIC": "no.such:cipher",
    "CIPHER_KEY": "no key",
    "IS_SNAPSHOTTING_ENABLED": "y",
    "POSTGRES_DBNAME": "elsewhere",
    "POSTGRES_HOST": "elsewhere",
    "POSTGRES_PASSWORD": "elsewhere",
    "POSTGRES_ENABLE_DB_FUNCTIONS": "y",
    "SQLITE_DBNAME": ":memory:",
    "ITEMS_SQLITE_DBNAME": ":memory:",
    "CREATE_TABLE": "n",
    "AGGREGATE_CACHE_MAXSIZE": "1",
}


@pytest.fixture
def _host_environment(monkeypatch):
    for name, value in HOST_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


@pytest.mark.anyio
@pytest.mark.usefixtures("_host_environment")
async def test_the_hosts_environment_does_not_reach_a_runtime(store_url, register, sell):
    async with open_items(store_url) as shop:
        await shop.commands.dispatch(register())
        receipt = (await shop.commands.dispatch(sell())).unwrap()
        assert (await shop.wait_for(receipt)).is_ok()


@pytest.mark.usefixtures("_host_environment")
def test_the_hosts_environment_does_not_reach_a_service_that_stands_alone():
    service = Items()
    assert not set(HOST_ENVIRONMENT) & set(service.env)
    assert type(service.recorder).__module__ == "eventsourcing.popo"
