from __future__ import annotations

import subprocess
import sys

import pytest

# What the library below loads by itself is not ours to answer for.
PROGRAM = """
import sys
import eventsourcing.domain, pydantic
before = set(sys.modules)
import {package}
print(*sorted({{name.partition(".")[0] for name in set(sys.modules) - before}}))
"""


def loaded_by(package: str) -> set[str]:
    program = PROGRAM.format(package=package)
    answer = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    return set(answer.stdout.split())


@pytest.mark.parametrize("package", ["leftfold.domain", "leftfold.domain.items"])
def test_the_domain_loads_no_database(package):
    loaded = loaded_by(package)
    assert "leftfold" in loaded
    assert loaded.isdisjoint({"sqlalchemy", "psycopg", "sqlite3", "redis", "asyncio"})


def test_the_application_loads_no_database():
    loaded = loaded_by("leftfold.application.items")
    assert loaded.isdisjoint({"sqlalchemy", "psycopg", "sqlite3", "redis"})
