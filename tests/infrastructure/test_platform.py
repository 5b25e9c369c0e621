from __future__ import annotations

import asyncio
import pickle
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from time import sleep, time
from uuid import RFC_4122, UUID

import pytest

from leftfold.infrastructure.errors import NotRunningError
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


def test_what_is_closed_takes_no_more_calls():
    async def ask(platform):
        platform.close()
        with pytest.raises(NotRunningError):
            await platform.in_thread(int)
        with pytest.raises(NotRunningError):
            await platform.in_own_thread(int)

    asyncio.run(ask(SystemPlatform()))
