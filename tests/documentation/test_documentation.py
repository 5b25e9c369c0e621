"""The documentation runs: each Python block of each page, in order; and what it names is there."""

from __future__ import annotations

import ast
import asyncio
import re
import sqlite3
import sys
from inspect import CO_COROUTINE
from pathlib import Path
from types import ModuleType

import psycopg
import pytest
import typer

import leftfold.application
import leftfold.domain
from leftfold.application import DispatchError
from leftfold.application.items import item_model
from leftfold.infrastructure import Settings
from leftfold.infrastructure.items import open_items

ROOT = Path(leftfold.domain.__file__).resolve().parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]+\]\(([^)\s]+)\)")
SOURCE = re.compile(
    r"`((?:domain|application|infrastructure|tests|notebooks|docs)/[\w/.]+\.(?:py|ipynb|md))`"
)
LANGUAGES = {"python", "console", "mermaid", "sql", "text", "json"}


def name_of(page):
    return str(page.relative_to(ROOT))


def blocks_of(page, language):
    """Each block with the line of its page where it begins."""
    text = page.read_text(encoding="utf-8")
    return [
        (text.count("\n", 0, fence.start(2)), fence[2])
        for fence in FENCE.finditer(text)
        if fence[1] == language
    ]


async def run(page, module):
    for line, source in blocks_of(page, "python"):
        code = compile(
            "\n" * line + source,  # so that a traceback names the page's own lines
            str(page),
            "exec",
            flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT,
            dont_inherit=True,
        )
        if code.co_flags & CO_COROUTINE:
            await eval(code, vars(module))
        else:
            # A plain block may block, as its readers' programs do: it must not have a loop.
            await asyncio.to_thread(exec, code, vars(module))
    for name, example in [*vars(module).items()]:
        if name.startswith("test_"):
            example()


every_page = pytest.mark.parametrize("page", PAGES, ids=name_of)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks_of(p, "python")], ids=name_of)
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # pages make files beside them
    monkeypatch.delenv("LEFTFOLD_STORE", raising=False)
    module = ModuleType(f"documentation_{page.stem.lower()}")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # types are looked up by module
    asyncio.run(run(page, module))


def test_readme_and_guide_have_python():
    assert blocks_of(ROOT / "README.md", "python")
    assert blocks_of(ROOT / "docs/guide.md", "python")


def test_the_own_model_of_the_readme_is_at_most_40_lines():
    _, model = blocks_of(ROOT / "README.md", "python")[0]
    lines = [line for line in model.splitlines() if line.strip()]
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 100
    for part in ("(Aggregate,", "(Command[", "(Service)", "Projection(", "(Query[", "scenario("):
        assert part in model


@every_page
def test_a_page_says_what_each_block_is(page):
    opened = re.findall(r"^```(.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert {language for language in opened if language} <= LANGUAGES
    assert len(FENCE.findall(page.read_text(encoding="utf-8"))) * 2 == len(opened)
    assert all(fence[0] for fence in FENCE.findall(page.read_text(encoding="utf-8")))


def anchors_of(page):
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@every_page
def test_the_links_of_a_page_lead_somewhere(page):
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if target.startswith(("https://", "http://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        if anchor:
            assert anchor in anchors_of(linked), target


@every_page
def test_the_files_that_a_page_names_exist(page):
    for path in SOURCE.findall(page.read_text(encoding="utf-8")):
        assert (ROOT / path).is_file(), path


def test_the_guide_says_what_to_do_about_each_failure():
    guide = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
    table = guide.partition("## Failures\n")[2].partition("\n## ")[0]
    answers = {
        name
        for name, kind in vars(leftfold.application).items()
        if isinstance(kind, type) and issubclass(kind, DispatchError) and kind is not DispatchError
    }
    assert set(re.findall(r"`([A-Z]\w+)`(?=[^|]*\| )", table)) >= answers
    assert answers >= {"Conflict", "EventPutAside", "OutcomeUnknown"}


@every_page
def test_the_targets_and_commands_that_a_page_names_exist(page):
    from leftfold.infrastructure.cli.app import app

    commands = set(typer.main.get_command(app).commands)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for _, session in blocks_of(page, "console"):
        for command in re.findall(r"^\$ (?:\S+=\S+ )*leftfold ([\w-]+)", session, re.MULTILINE):
            assert command in commands
        for target in re.findall(r"^\$ (?:\S+=\S+ )*make (\w+)", session, re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_every_setting_is_documented():
    guide = (ROOT / "docs/guide.md").read_text(encoding="utf-8")
    for name in Settings.model_fields:
        assert f"`{name}`" in guide, name


def test_every_decision_is_listed():
    index = (ROOT / "docs/adr/README.md").read_text(encoding="utf-8")
    pages = sorted(p.name for p in (ROOT / "docs/adr").glob("[0-9]*.md"))
    assert [int(name[:4]) for name in pages] == list(range(1, len(pages) + 1))
    for name in pages:
        assert f"({name})" in index
        text = (ROOT / "docs/adr" / name).read_text(encoding="utf-8")
        for heading in ("## Context", "## Decision", "## Consequences"):
            assert heading in text, name


def columns_on_sqlite(path):
    with sqlite3.connect(path) as connection:
        tables = connection.execute(
            "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'"
        ).fetchall()
        found = {
            (table, column)
            for (table,) in tables
            for _, column, *_ in connection.execute(f"PRAGMA table_info({table})")
        }
    connection.close()
    return found


def columns_on_postgresql(url):
    with psycopg.connect(url) as connection:
        return set(
            connection.execute(
                "SELECT c.table_name, c.column_name FROM information_schema.columns c "
                "JOIN information_schema.tables t USING (table_schema, table_name) "
                "WHERE c.table_schema = 'public' AND t.table_type = 'BASE TABLE'"
            ).fetchall()
        )


def test_the_storage_format_names_every_table_and_column(shared_url, tmp_path):
    with open_items(shared_url).blocking() as shop:
        shop.forget("nobody")  # now there are keys
    if shared_url.startswith("sqlite"):
        stored = columns_on_sqlite(tmp_path / "shop.db")
        stored |= columns_on_sqlite(tmp_path / "shop.db.keys")
    else:
        stored = columns_on_postgresql(shared_url)
    database = "SQLite" if shared_url.startswith("sqlite") else "PostgreSQL"
    page = (ROOT / "docs/storage-format.md").read_text(encoding="utf-8")
    documented = set()
    for table, on, body in re.findall(
        r"^### `(\w+)`( on \w+)?\n(.*?)(?=^#)", page, re.MULTILINE | re.DOTALL
    ):
        if on in ("", f" on {database}"):
            documented |= {(table, c) for c in re.findall(r"^\| `(\w+)` \|", body, re.MULTILINE)}
    views = tuple(view.name for view in item_model.projections)
    of_events = {(t, c) for t, c in stored if not t.startswith(views)}
    assert documented == of_events
    assert {("item_stock_v1", "key"), ("item_stock_v1", "member")} <= stored
