"""The command line, run as a person or a program would."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from decimal import Decimal
from uuid import uuid4

import pytest
from commands import carry_out

from leftfold.application.items import (
    GetItem,
    ReceiveStock,
    RegisterItem,
    item_model,
    item_stock,
    low_stock,
)
from leftfold.application.ports import EncodedEvent, Group, Save
from leftfold.domain.items import NeedsReorder
from leftfold.infrastructure import Runtime, Settings
from leftfold.infrastructure.cli import app
from leftfold.infrastructure.cli.app import _following
from leftfold.infrastructure.items import open_items
from leftfold.infrastructure.retail import HEADER
from leftfold.infrastructure.simulation import write_shop


def leftfold(*arguments, store=None, **environment):
    env = {**os.environ, **environment}
    env.pop("LEFTFOLD_STORE", None)
    if store is not None:
        env["LEFTFOLD_STORE"] = store
    if not any(name.startswith("PYTHON") for name in environment):
        return carry_out(arguments, env)
    return subprocess.run(  # an interpreter of its own
        [sys.executable, "-m", "leftfold.infrastructure.cli", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env=env,
    )


@pytest.fixture(scope="session")
def imported(tmp_path_factory):
    """The folder of a store into which a small shop was imported, and the shop's file."""
    folder = tmp_path_factory.mktemp("imported")
    write_shop(folder / "shop.csv", seed=5, days=10)
    url = f"sqlite:///{folder}/shop.db"
    done = leftfold("import", str(folder / "shop.csv"), "--store", url, "--json")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def shop(imported, tmp_path):
    """A store with a small shop in it."""
    shutil.copytree(imported, tmp_path, dirs_exist_ok=True)
    return f"sqlite:///{tmp_path}/shop.db"


def one_line(done):
    return done.stderr.startswith("leftfold: ") and done.stderr.count("\n") == 1


def asked(url, query, *values):
    """The rows that a statement answers, run on a store's file."""
    with contextlib.closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as file, file:
        return file.execute(query, values).fetchall()


def until(happens):
    deadline = time.monotonic() + 60
    while not happens():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture(autouse=True)
def _heeding_interrupts():
    """Let no command inherit that interrupts are ignored, as they are in a shell's background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@contextmanager
def started(url, *arguments):
    """A command under way, stopped in the end."""
    process = subprocess.Popen(
        [sys.executable, "-m", "leftfold.infrastructure.cli", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "LEFTFOLD_STORE": url},
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def is_followed(url):
    return asked(url, "SELECT 1 FROM leftfold_checkpoints WHERE owner IS NOT NULL")


def test_demo_imports_a_shop_and_shows_its_best_sellers():
    done = leftfold("demo", "--days", "10")
    assert done.returncode == 0, done.stderr
    assert "revenue\t" in done.stdout
    assert "sku\tname" in done.stdout


def test_demo_is_the_same_shop_for_the_same_seed():
    first, again, other = (
        leftfold("demo", "--days", "5", "--json", "--seed", seed).stdout for seed in "112"
    )
    assert first == again != other


def test_the_store_comes_from_the_environment_and_an_argument_beats_it(shop):
    assert leftfold("items", store=shop).returncode == 0
    assert leftfold("items", "--store", shop, store="nonsense:").returncode == 0


def test_items_are_listed_page_by_page(shop):
    first = json.loads(leftfold("items", "--limit", "40", "--json", store=shop).stdout)
    second = leftfold("items", "--limit", "40", "--cursor", first["next"], "--json", store=shop)
    skus = [row["sku"] for page in (first, json.loads(second.stdout)) for row in page["rows"]]
    assert skus == sorted(set(skus))
    assert len(skus) > 40


def test_items_are_ordered_as_asked(shop):
    rows = json.loads(leftfold("items", "--order=-on_hand", "--json", store=shop).stdout)["rows"]
    stocks = [row["on_hand"] for row in rows]
    assert stocks == sorted(stocks, reverse=True)


def test_one_item_is_shown_with_its_history(shop):
    row = json.loads(leftfold("show", "21000A", "--json", store=shop).stdout)
    events = json.loads(leftfold("events", "21000A", "--json", store=shop).stdout)
    assert row["sku"] == "21000A"
    assert [event["version"] for event in events] == list(range(1, len(events) + 1))


def test_in_a_pipe_there_are_plain_lines(shop):
    done = leftfold("events", "21000A", store=shop)
    assert done.stdout.splitlines()[0] == "version\toccurred_at\tevent\tfacts"
    assert "\x1b" not in done.stdout + done.stderr


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_has_seen_enough_is_no_failure(shop, unbuffered):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "leftfold.infrastructure.cli", "events", "21000A"],
        stdout=write,
        stderr=subprocess.PIPE,
        check=False,
        timeout=60,
        env={**os.environ, "LEFTFOLD_STORE": shop, "PYTHONUNBUFFERED": unbuffered},
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")


def test_migrate_makes_the_tables_alone(tmp_path):
    url = f"sqlite:///{tmp_path}/new.db"
    refused = leftfold("items", store=url, LEFTFOLD_CREATE_TABLES="false")
    assert (refused.returncode, one_line(refused)) == (1, True)
    assert "leftfold migrate" in refused.stderr
    assert leftfold("migrate", store=url).returncode == 0
    assert leftfold("items", store=url, LEFTFOLD_CREATE_TABLES="false").returncode == 0


def test_a_process_of_its_own_keeps_the_views_up_to_date_until_it_is_stopped(tmp_path):
    url = f"sqlite:///{tmp_path}/shop.db"
    follower = subprocess.Popen(
        [sys.executable, "-m", "leftfold.infrastructure.cli", "follow", "--store", url],
        stderr=subprocess.PIPE,
    )

    async def sell():
        settings = Settings(store=url, follow=False, view_timeout=20)
        async with open_items(settings=settings) as shop:
            receipt = await shop.commands.dispatch(
                RegisterItem(sku="A", name="CUP", unit_price=Decimal(1), opening_stock=5)
            )
            row = await shop.queries.dispatch(GetItem(sku="A"), after=receipt.unwrap())
            assert row.unwrap().on_hand == 5
            assert shop.health().projections[0].position == 1

    asyncio.run(sell())
    follower.terminate()
    assert follower.wait(20) == -signal.SIGTERM
    assert follower.stderr.read() == b""
    follower.stderr.close()


@pytest.mark.parametrize(
    "arguments",
    [
        ("items",),
        ("bogus",),
        ("show", "--store", "memory:"),
        ("items", "--store", "mysql://host/db"),
        ("items", "--store", "memory:", "--order", "colour"),
        ("items", "--store", "memory:", "--limit", "0"),
        ("items", "--store", "memory:", "--cursor", "nonsense"),
        ("show", "x" * 21, "--store", "memory:"),
        ("import", "nowhere.csv", "--store", "memory:"),
        ("projections",),
        ("projections", "bogus"),
        ("projections", "--store", "memory:", "rebuild", "item_stock"),
        ("projections", "rebuild", "nope", "--store", "memory:"),
        ("projections", "drop", "nope", "1", "--store", "memory:"),
        ("projections", "drop", "item_stock", "2", "--store", "memory:"),
        ("projections", "drop", "item_stock", "0", "--store", "memory:"),
        ("dead-letters", "nope", "--store", "memory:"),
        ("dead-letters", "nope", "--drop-all", "--store", "memory:"),
        ("dead-letters", "item_stock", "--drop", "1", "--drop-all", "--store", "memory:"),
        ("retry", "nope", "--store", "memory:"),
    ],
    ids=" ".join,
)
def test_wrong_use_is_one_line_and_exit_code_2(arguments):
    done = leftfold(*arguments)
    assert done.returncode == 2
    assert one_line(done), done.stderr


def test_failure_is_one_line_and_exit_code_1(shop, tmp_path):
    damaged = tmp_path / "damaged.csv"
    damaged.write_text("not,a,shop\n")
    for arguments in (
        ("show", "nope", "--store", shop),
        ("events", "nope", "--store", shop),
        ("import", str(damaged), "--store", shop),
        ("items", "--store", "postgresql://nobody@127.0.0.1:1/none"),
        ("items", "--store", f"sqlite:///{tmp_path}/no/such/folder/x.db"),
    ):
        done = leftfold(*arguments)
        assert done.returncode == 1, arguments
        assert one_line(done), done.stderr


def test_a_password_is_never_shown():
    done = leftfold("items", "--store", "postgresql://me:s3cret@127.0.0.1:1/none")
    assert done.returncode == 1
    assert "s3cret" not in done.stdout + done.stderr


def test_a_reader_that_goes_away_is_no_error(shop):
    command = f"{sys.executable} -m leftfold.infrastructure.cli events 21000A | head -n 1"
    done = subprocess.run(
        ["bash", "-c", command],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "LEFTFOLD_STORE": shop},
    )
    assert "Traceback" not in done.stderr


def test_without_its_extra_the_command_says_what_to_install(tmp_path):
    for package in ("typer", "rich"):
        (tmp_path / f"{package}.py").write_text(f"raise ImportError('no', name='{package}')")
    done = leftfold("demo", PYTHONPATH=f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    assert done.returncode == 1
    assert done.stderr == "leftfold: the command line needs: pip install 'leftfold[cli]'\n"


def test_ctrl_c_says_that_what_was_committed_stays(shop):
    with started(shop, "follow", "--while-input") as follower:
        until(lambda: is_followed(shop))
        follower.send_signal(signal.SIGINT)
        _, told = follower.communicate("", timeout=30)
    said = "leftfold: interrupted; what was committed stays\n"
    assert (follower.returncode, told) == (130, said)


def test_reading_a_store_that_is_not_there_makes_none(tmp_path):
    path = tmp_path / "typo.db"
    done = leftfold("items", store=f"sqlite:///{path}")
    assert (done.returncode, one_line(done), path.exists()) == (1, True, False)


def test_a_store_in_memory_is_not_asked_for_as_a_file():
    done = leftfold("items", store="sqlite:///:memory:")
    assert (done.returncode, one_line(done)) == (2, True)


def test_a_table_of_another_program_is_left_alone(tmp_path):
    path = tmp_path / "other.db"
    with contextlib.closing(sqlite3.connect(path)) as other:
        other.execute("CREATE TABLE stored_events (id)")
    done = leftfold("demo", "--days", "3", "--store", f"sqlite:///{path}")
    assert (done.returncode, one_line(done)) == (1, True)
    assert "not made by leftfold" in done.stderr


def test_control_characters_in_names_neither_break_lines_nor_reach_the_terminal(tmp_path):
    path = tmp_path / "shop.csv"
    row = '1,85123A,"RED\n\x1b[31mHEART",1,2010-12-01 08:26,2.55,1,France\n'
    path.write_text(",".join(HEADER) + "\n" + row)
    url = f"sqlite:///{tmp_path}/shop.db"
    assert leftfold("import", str(path), store=url).returncode == 0
    assert "\tRED\\n\\x1b[31mHEART\t" in leftfold("items", store=url).stdout


@pytest.mark.parametrize(
    ("redirect", "code", "told"),
    [
        (">/dev/full", 1, "leftfold: cannot write: No space left on device\n"),
        (">&-", 0, ""),
    ],
)
def test_output_that_cannot_be_written_is_one_line_or_nothing(shop, redirect, code, told):
    done = subprocess.run(
        ["sh", "-c", f'"{sys.executable}" -m leftfold.infrastructure.cli show 21000A {redirect}'],
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        env={**os.environ, "LEFTFOLD_STORE": shop},
    )
    assert (done.returncode, done.stderr) == (code, told)


def test_a_name_that_the_output_cannot_encode_is_escaped(tmp_path):
    path = tmp_path / "shop.csv"
    path.write_text(",".join(HEADER) + "\n1,85123A,CAFÉ,1,2010-12-01 08:26,2.55,1,France\n")
    url = f"sqlite:///{tmp_path}/shop.db"
    assert leftfold("import", str(path), store=url).returncode == 0
    done = leftfold("items", store=url, PYTHONIOENCODING="ascii")
    assert (done.returncode, "CAF\\xc9" in done.stdout) == (0, True)


def test_items_are_found_by_a_sentence(shop):
    done = leftfold("items", "--where", "units_sold > 0 and name contains 'LANTERN'", store=shop)
    rows = [line.split("\t") for line in done.stdout.splitlines()[1:]]
    assert rows
    assert all("LANTERN" in row[1] and int(row[4]) > 0 for row in rows)


@pytest.mark.parametrize("sentence", ["on_hand <", "onhand < 3", "on_hand < 'a'", "_on_hand < 3"])
def test_a_sentence_that_cannot_be_asked_is_one_line(shop, sentence):
    done = leftfold("items", "--where", sentence, store=shop)
    assert (done.returncode, one_line(done)) == (2, True)
    assert "where" in done.stderr


def test_forget_erases_a_customer(shop):
    def customers():
        skus = [
            row["sku"] for row in json.loads(leftfold("items", "--json", store=shop).stdout)["rows"]
        ]
        told = json.loads(leftfold("events", skus[0], "--json", store=shop).stdout)
        return {event["payload"].get("customer_id") for event in told} - {None}

    somebody = min(customers())
    done = leftfold("forget", somebody, store=shop)
    assert (done.returncode, done.stdout) == (0, "Erased; in programs that run now within 5 s.\n")
    assert somebody not in customers()
    assert "[erased]" in customers()
    again = leftfold("forget", somebody, "--json", store=shop)
    assert json.loads(again.stdout) == {"forgotten": False}


def test_purge_deletes_receipts_that_are_old_enough(shop):
    assert json.loads(leftfold("purge", "--json", store=shop).stdout) == {"purged": 0}
    time.sleep(3)  # so old they are; what an open runtime purges by itself comes as long after
    done = leftfold("purge", "--json", store=shop, LEFTFOLD_RECEIPTS_KEPT="3")
    assert json.loads(done.stdout)["purged"] > 10
    done = leftfold("purge", store=shop, LEFTFOLD_RECEIPTS_KEPT="3")
    assert done.stdout == "0 receipts were deleted.\n"


@pytest.mark.parametrize(
    "command",
    [
        ("forget", "17850"),
        ("purge",),
        ("projections",),
        ("projections", "rebuild", "item_stock"),
        ("projections", "drop", "item_stock", "2"),
        ("dead-letters", "item_stock"),
        ("retry", "item_stock"),
        ("follow", "--reorders"),
    ],
    ids=" ".join,
)
def test_a_store_that_is_not_there_is_not_made(tmp_path, command):
    refused = leftfold(*command, store=f"sqlite:///{tmp_path}/typo.db")
    assert (refused.returncode, one_line(refused)) == (1, True)
    assert list(tmp_path.iterdir()) == []


def test_forget_finds_keys_that_lie_elsewhere(tmp_path):
    url, keys = f"sqlite:///{tmp_path}/shop.db", f"sqlite:///{tmp_path}/keys.db"
    assert leftfold("migrate", "--keys", keys, store=url).returncode == 0
    assert (tmp_path / "keys.db").exists()
    lost = leftfold("forget", "17850", store=url)
    assert (lost.returncode, one_line(lost)) == (1, True)
    done = leftfold("forget", "17850", "--keys", keys, "--json", store=url)
    assert json.loads(done.stdout) == {"forgotten": False}


# Views ----------------------------------------------------------------------------------------


def projections(url):
    done = leftfold("projections", "--json", store=url)
    assert done.returncode == 0, done.stderr
    return {found["name"]: found for found in json.loads(done.stdout)}


def test_projections_are_listed_with_how_far_they_are(shop):
    ((head,),) = asked(shop, "SELECT max(position) FROM stored_events")
    found = projections(shop)
    assert list(found) == ["item_stock", "low_stock", "best_sellers", "daily_sales"]
    assert found["item_stock"] == {
        "name": "item_stock",
        "version": 1,
        "state": "free",
        "position": head,
        "lag": 0,
        "rate": 0.0,
        "dead_letters": 0,
        "failure": None,
    }
    done = leftfold("projections", store=shop)
    assert done.stdout.splitlines()[:2] == [
        "name\tversion\tstate\tposition\tlag\trate\tdead_letters\tfailure",
        f"item_stock\t1\tfree\t{head}\t0\t0.0\t0\t",
    ]
    assert leftfold("projections", "list", store=shop).stdout == done.stdout


def test_listing_projections_leaves_folding_to_those_who_do_it(shop):
    holders = "SELECT name, version, position, epoch, owner FROM leftfold_checkpoints"
    with started(shop, "follow") as follower:
        until(lambda: is_followed(shop))
        held = asked(shop, holders)
        assert {found["state"] for found in projections(shop).values()} == {"watched"}
        assert asked(shop, holders) == held
        follower.terminate()
        follower.wait(20)

    async def register():
        async with open_items(settings=Settings(store=shop, follow=False)) as opened:
            item = RegisterItem(sku="A", name="CUP", unit_price=Decimal(1), opening_stock=5)
            (await opened.commands.dispatch(item)).unwrap()

    asyncio.run(register())
    free = asked(shop, holders)
    assert {found["lag"] for found in projections(shop).values()} == {1}
    assert asked(shop, holders) == free


def test_listing_projections_tells_how_quickly_others_get_on(shop):
    asked(shop, "UPDATE leftfold_checkpoints SET position = 0")
    begun = time.monotonic()
    command = [sys.executable, "-m", "leftfold.infrastructure.cli", "projections", "--json"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, env={**os.environ, "LEFTFOLD_STORE": shop}
    ) as lister:
        while lister.poll() is None:  # somebody takes in 15 events a second
            position = min(int(15 * (time.monotonic() - begun)), 440)
            asked(shop, f"UPDATE leftfold_checkpoints SET position = {position}")
            time.sleep(0.02)
        told, _ = lister.communicate()
    for found in json.loads(told):
        assert 5 < found["rate"] < 45
        assert found["lag"] > 0


def test_a_rebuild_mends_a_view_and_tells_what_was_wrong(shop):
    right = leftfold("items", store=shop).stdout
    ((count,),) = asked(shop, "SELECT count(*) FROM item_stock_v1")
    asked(shop, "UPDATE item_stock_v1 SET on_hand = on_hand + 1 WHERE sku = '21000A'")
    asked(shop, "DELETE FROM item_stock_v1 WHERE sku = '21007'")
    assert leftfold("items", store=shop).stdout != right
    mended = leftfold("projections", "rebuild", "item_stock", "--json", store=shop)
    assert json.loads(mended.stdout) == {
        "same": count - 2,
        "changed": 1,
        "added": 1,
        "removed": 0,
    }
    assert leftfold("items", store=shop).stdout == right
    again = leftfold("projections", "rebuild", "item_stock", store=shop)
    assert again.stdout == f"same\t{count}\nchanged\t0\nadded\t0\nremoved\t0\n"
    assert (again.returncode, again.stderr) == (0, "")


@pytest.fixture
def many_items(tmp_path):
    """A store whose views are built anew in three pages."""
    url = f"sqlite:///{tmp_path}/shop.db"

    async def register():
        async with open_items(url) as opened:
            items = [
                RegisterItem(sku=f"S{n}", name="CUP", unit_price=Decimal(1)) for n in range(11_000)
            ]
            (await opened.commands.dispatch_all(items)).unwrap()
            (await opened.catch_up(60)).unwrap()

    asyncio.run(register())
    return url


def test_a_rebuild_that_is_interrupted_goes_on_where_it_was(many_items):
    """What was built before is not built again: a row that was changed meanwhile stays so."""
    asked(
        many_items,
        "CREATE VIEW long AS WITH RECURSIVE count (n) AS (SELECT 1 UNION ALL "
        "SELECT n + 1 FROM count WHERE n < 1000000) SELECT max(n) FROM count",
    )
    asked(
        many_items,
        "CREATE TRIGGER takes_long BEFORE UPDATE OF position ON leftfold_checkpoints "
        "WHEN OLD.version = -1 AND OLD.position > 0 BEGIN SELECT * FROM long; END",
    )
    built = "SELECT position FROM leftfold_checkpoints WHERE version = -1 AND position > 0"
    with started(many_items, "projections", "rebuild", "item_stock") as rebuild:
        until(lambda: asked(many_items, built))
        rebuild.send_signal(signal.SIGINT)
        _, told = rebuild.communicate(timeout=60)
    said = "leftfold: interrupted; what was committed stays\n"
    assert (rebuild.returncode, told) == (130, said)
    ((at,),) = asked(many_items, built)
    assert at < 11_000
    asked(many_items, "DROP TRIGGER takes_long")
    asked(many_items, "UPDATE item_stock_v1_anew SET name = 'MUG' WHERE sku = 'S0'")
    again = leftfold("projections", "rebuild", "item_stock", "--json", store=many_items)
    assert json.loads(again.stdout) == {"same": 10_999, "changed": 1, "added": 0, "removed": 0}
    assert "\nS0\tMUG\t" in leftfold("items", store=many_items).stdout


def test_a_rebuild_shows_on_a_terminal_how_fast_it_is(many_items):
    ours, terminal = os.openpty()
    rebuild = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "leftfold.infrastructure.cli",
            "projections",
            "rebuild",
            "low_stock",
        ],
        stdout=subprocess.DEVNULL,
        stderr=terminal,
        env={**os.environ, "LEFTFOLD_STORE": many_items, "TERM": "xterm"},
    )
    os.close(terminal)
    shown = b""
    with contextlib.suppress(OSError):  # at its end
        while more := os.read(ours, 4_096):
            shown += more
    os.close(ours)
    assert rebuild.wait(20) == 0
    assert b"11000/11000" in shown
    assert b" events/s" in shown


def test_an_old_version_of_a_view_is_dropped_and_a_present_one_is_kept(shop):
    async def keep_for_a_while():
        old = item_stock.derive("few_left", version=3, specification=NeedsReorder())
        async with Runtime(replace(item_model, projections=(low_stock, old)), shop) as opened:
            (await opened.catch_up()).unwrap()

    asyncio.run(keep_for_a_while())
    tables = "SELECT name FROM sqlite_master WHERE name LIKE 'few_left%'"
    assert asked(shop, tables)
    done = leftfold("projections", "drop", "few_left", "3", store=shop)
    assert (done.returncode, done.stdout) == (0, "few_left_v3 was dropped.\n")
    assert not asked(shop, tables)
    kept = leftfold("projections", "drop", "low_stock", "1", store=shop)
    assert (kept.returncode, one_line(kept)) == (1, True)
    assert projections(shop)["low_stock"]["lag"] == 0


@pytest.fixture
def foreign(shop):
    """The position of an event of another release, which the shop's views have put aside."""

    async def commit():
        async with open_items(shop) as opened:
            stored = opened._store.log.read(0, 1)[0]
            event = EncodedEvent(uuid4(), 1, "of.another.release", stored.state)
            save = Save(uuid4(), "Other", [event], ((event.aggregate_id, 1),), None)
            (committed,) = opened._store.log.commit([Group([save])])
            (await opened.catch_up()).unwrap()
            return committed.positions[0]

    return asyncio.run(commit())


def test_dead_letters_are_listed_with_why_they_were_put_aside(shop, foreign):
    (letter,) = json.loads(leftfold("dead-letters", "item_stock", "--json", store=shop).stdout)
    assert list(letter) == ["position", "key", "topic", "version", "error", "parked_at"]
    assert (letter["position"], letter["topic"]) == (foreign, "of.another.release")
    assert "of.another.release" in letter["error"]
    listed = leftfold("dead-letters", "item_stock", store=shop).stdout.splitlines()
    assert [line.split("\t")[0] for line in listed] == ["position", str(foreign)]
    assert projections(shop)["item_stock"]["dead_letters"] == 1


def test_a_retry_fails_while_something_stays(shop, foreign):
    done = leftfold("retry", "item_stock", store=shop)
    assert done.stdout == "0 events were taken in, 1 stay.\n"
    assert (done.returncode, one_line(done)) == (1, True)
    asked(
        shop,
        "UPDATE stored_events SET topic = 'leftfold.item.registered' WHERE position = ?",
        foreign,
    )
    done = leftfold("retry", "item_stock", "--json", store=shop)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == {"released": 1, "kept": 0}
    assert leftfold("retry", "item_stock", store=shop).stdout == "0 events were taken in, 0 stay.\n"


def test_dead_letters_are_given_up_one_by_one_or_all(shop, foreign):
    def give_up(name, *which):
        done = leftfold("dead-letters", name, *which, store=shop)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    assert give_up("item_stock", "--drop", str(foreign - 1)) == "0 events were given up.\n"
    assert give_up("item_stock", "--drop", str(foreign)) == "1 events were given up.\n"
    assert json.loads(give_up("low_stock", "--drop-all", "--json")) == {"dropped": 1}
    left = [found["dead_letters"] for found in projections(shop).values()]
    assert left == [0, 0, 1, 1]


def test_the_graph_shows_who_reads_whose_events():
    done = leftfold("graph")
    assert done.returncode == 0
    assert done.stdout.startswith("flowchart LR\n")
    assert "Items --> ReorderProcess\n" in done.stdout
    system = json.loads(leftfold("graph", "--json").stdout)
    assert system["nodes"]["Items"] == "leftfold.application.items.service:Items"
    assert system["edges"] == [["Items", "ReorderProcess"]]


def test_a_follower_opens_and_closes_reorders_if_it_is_told_to(tmp_path):
    url = f"sqlite:///{tmp_path}/shop.db"

    async def carry_out(command):
        async with open_items(settings=Settings(store=url, follow=False)) as opened:
            (await opened.commands.dispatch(command)).unwrap()

    def has_come(topic):
        return asked(url, "SELECT 1 FROM stored_events WHERE topic = ?", topic)

    asyncio.run(
        carry_out(RegisterItem(sku="A", name="CUP", unit_price=Decimal(1), reorder_level=5))
    )
    unknown = leftfold("dead-letters", "reorder_watch", store=url)
    assert (unknown.returncode, one_line(unknown)) == (2, True)
    with started(url, "follow", "--reorders") as follower:
        until(lambda: has_come("leftfold.reorder.opened"))
        asyncio.run(carry_out(ReceiveStock(sku="A", quantity=9)))
        until(lambda: has_come("leftfold.reorder.closed"))
        follower.terminate()
        assert follower.wait(20) == -signal.SIGTERM
        assert follower.stderr.read() == ""
    assert projections(url)["reorder_watch"]["position"] > 0
    assert leftfold("dead-letters", "reorder_watch", store=url).returncode == 0
    refused = leftfold("projections", "rebuild", "reorder_watch", store=url)
    assert (refused.returncode, one_line(refused)) == (2, True)


def test_where_no_tables_may_be_made_migrate_makes_those_of_reorders_too(tmp_path):
    url = f"sqlite:///{tmp_path}/shop.db"
    no_rights = {"store": url, "LEFTFOLD_CREATE_TABLES": "false"}
    asyncio.run(_open_once(url))
    refused = leftfold("follow", "--reorders", **no_rights)
    assert (refused.returncode, one_line(refused)) == (1, True)
    assert "leftfold migrate" in refused.stderr
    assert leftfold("migrate", store=url).returncode == 0
    assert "reorder_watch" in projections(url)


async def _open_once(url):
    async with open_items(url):
        pass


BANK = """
import asyncio
import sys
from dataclasses import dataclass

from leftfold.application import Command, Model, Projection, Receipt, Service
from leftfold.domain import Aggregate, Created, DomainError, Event, Ok
from leftfold.infrastructure import Runtime


class Opened(Created, topic="bank.opened"):
    pass


class Paid(Event, topic="bank.paid"):
    amount: int


class Account(Aggregate, topic="bank.account", events=(Opened, Paid)):
    pass


class Pay(Command[Receipt, DomainError]):
    amounts: list[int]


class Accounts(Service):
    aggregates = (Account,)

    def handlers(self):
        yield Pay.handled_by(self.pay)

    def pay(self, command):
        account = Account.begin(Opened(), "1")
        for amount in command.amounts:
            account.record(Paid(amount=amount))
        return Ok(self.repository.save(account))


@dataclass(frozen=True)
class Balance:
    payments: int
    share: int


balances = Projection("balances", version=1, row=Balance)


@balances.on(Opened)
def opened(row, event):
    return Balance(0, 0)


@balances.on(Paid)
def paid(row, event):
    return Balance(row.payments + 1, 100 // event.amount)


bank = Model((Account,), (Accounts,), (balances,))


async def main():
    async with Runtime(bank, store=sys.argv[1]) as runtime:
        (await runtime.commands.dispatch(Pay(amounts=[5, 0, 10]))).unwrap()
        (await runtime.catch_up()).unwrap()


if __name__ == "__main__":
    asyncio.run(main())
"""


@pytest.fixture
def bank(tmp_path, monkeypatch):
    """The folder of a model of one's own."""
    (tmp_path / "bank.py").write_text(BANK)
    monkeypatch.chdir(tmp_path)
    return f"sqlite:///{tmp_path}/bank.db"


def test_a_model_of_ones_own_is_seen_to_as_the_shops_is(bank):
    def told(*arguments):
        done = leftfold(*arguments, "--json", store=bank, LEFTFOLD_MODEL="bank:bank")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    assert leftfold("migrate", "--model", "bank:bank", store=bank).returncode == 0
    assert asked(bank, "SELECT name FROM leftfold_checkpoints") == [("balances",)]
    subprocess.run([sys.executable, "bank.py", bank], check=True)
    (listed,) = told("projections")
    assert (listed["name"], listed["position"], listed["dead_letters"]) == ("balances", 4, 2)
    assert [letter["topic"] for letter in told("dead-letters", "balances")] == ["bank.paid"] * 2
    retried = leftfold("retry", "balances", "--model", "bank:bank", "--json", store=bank)
    assert (retried.returncode, json.loads(retried.stdout)) == (1, {"released": 0, "kept": 2})
    assert told("dead-letters", "balances", "--drop-all") == {"dropped": 2}
    assert told("forget", "nobody") == {"forgotten": False}
    assert told("purge") == {"purged": 0}
    assert told("graph")["nodes"] == {"Accounts": "bank:Accounts"}
    with started(bank, "follow", "--model", "bank:bank") as follower:
        until(lambda: is_followed(bank))
        follower.terminate()
        assert follower.wait(20) in {0, 143, -signal.SIGTERM}


def test_an_import_has_the_shop_followed_whatever_model_is_set(shop, monkeypatch):
    monkeypatch.setenv("LEFTFOLD_MODEL", "nowhere:model")
    with _following(shop):
        until(lambda: is_followed(shop))


def test_a_follower_that_hangs_does_not_hold_up_the_end_of_an_import(shop, monkeypatch):
    monkeypatch.setattr(app, "FOLLOWER_ENDS", 0.5)
    started = []
    popen = subprocess.Popen
    monkeypatch.setattr(
        subprocess,
        "Popen",
        lambda *args, **options: started.append(popen(*args, **options)) or started[0],
    )
    with _following(shop):
        until(lambda: is_followed(shop))
        started[0].send_signal(signal.SIGSTOP)
    assert started[0].returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nowhere:model", "No module named 'nowhere'"),
        ("bank:other", "has no attribute 'other'"),
        ("bank", "has no attribute ''"),
        (":bank", "Empty module name"),
        ("bank:Account", "this is no Model"),
    ],
)
def test_what_is_no_model_is_a_wrong_use(bank, name, said):
    done = leftfold("projections", "--model", name, store=bank)
    assert (done.returncode, one_line(done)) == (2, True)
    assert said in done.stderr
