from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from time import sleep, time
from uuid import RFC_4122, UUID

import pytest

from leftfold.infrastructure.platform import SystemPlatform


@pytest.fixture
def platform():
    platform = SystemPlatform()
    yield platform
    platform.close()


def test_ids_are_of_the_time_and_of_chance(platform):
    made = platform.new_id()
    assert (made.version, made.variant) == (7, RFC_4122)
    assert abs((made.int >> 80) / 1000 - time()) < 5
    assert made == UUID(str(made)) == pickle.loads(pickle.dumps(made)) == deepcopy(made)
    assert len({i.int & (1 << 62) - 1 for i in (platform.new_id() for _ in range(1_000))}) == 1_000


def test_ids_made_later_are_greater(platform):
    made = []
    for _ in range(3):
        made.append(platform.new_id())
        sleep(0.002)
    assert made == sorted(made)


def test_no_two_threads_get_one_id(platform):
    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(lambda _: platform.new_id(), range(20_000)))
    assert len(set(made)) == 20_000
