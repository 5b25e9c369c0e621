"""The command line, run as a person or a program would."""

import asyncio
import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from decimal import Decimal

import pytest

from leftfold.application.items import GetItem, RegisterItem
from leftfold.infrastructure import Settings
from leftfold.infrastructure.items import open_items
from leftfold.infrastructure.retail import HEADER
from leftfold.infrastructure.simulation import write_shop


def leftfold(*arguments, store=None, **environment):
    env = {**os.environ, **environment}
    env.pop("LEFTFOLD_STORE", None)
    if store is not None:
        env["LEFTFOLD_STORE"] = store
    return subprocess.run(
        [sys.executable, "-m", "leftfold.infrastructure.cli", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env=env,
    )


@pytest.fixture
def shop(tmp_path):
    """A store with a small shop in it."""
    url = f"sqlite:///{tmp_path}/shop.db"
    path = tmp_path / "shop.csv"
    write_shop(path, seed=5, days=10)
    done = leftfold("import", str(path), "--store", url, "--json")
    assert done.returncode == 0, done.stderr
    return url


def one_line(done):
    return done.stderr.startswith("leftfold: ") and done.stderr.count("\n") == 1


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
    follower = subprocess.Popen(
        [sys.executable, "-m", "leftfold.infrastructure.cli", "follow", "--while-input"],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "LEFTFOLD_STORE": shop},
    )
    time.sleep(2)  # it has nothing to say when it is ready
    follower.send_signal(signal.SIGINT)
    _, told = follower.communicate("", timeout=30)
    assert (follower.returncode, told) == (130, "leftfold: interrupted; what was committed stays\n")


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
    done = leftfold("purge", "--json", store=shop, LEFTFOLD_RECEIPTS_KEPT="0.001")
    assert json.loads(done.stdout)["purged"] > 10
    done = leftfold("purge", store=shop, LEFTFOLD_RECEIPTS_KEPT="0.001")
    assert done.stdout == "0 receipts were deleted.\n"


@pytest.mark.parametrize("command", [("forget", "17850"), ("purge",)])
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
