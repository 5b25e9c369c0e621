from __future__ import annotations

import asyncio
from uuid import uuid4

import pytest

from leftfold.application.ports import Committed, EncodedEvent, Failed, Group, Save
from leftfold.application.writer import MAX_GROUPED_BYTES, MAX_GROUPED_EVENTS, Writer
from leftfold.infrastructure.platform import SystemPlatform
from leftfold.infrastructure.stores.memory import MemoryLog

pytestmark = pytest.mark.anyio


class FarLog(MemoryLog):
    is_local = False


class Slow:
    """Answers a call when it is told to, and notes what came together."""

    def __init__(self):
        self.calls = []
        self.may_answer = asyncio.Event()
        self.error = None

    async def commit(self, groups):
        self.calls.append(len(groups))
        await self.may_answer.wait()
        if self.error is not None:
            raise self.error
        return [Committed((1,) * len(group.saves)) for group in groups]


@pytest.fixture
async def access():
    return Slow()


@pytest.fixture
async def writer(access):
    platform = SystemPlatform()
    yield Writer(FarLog(), platform, access, lambda: None)
    platform.close()


def group(events=1, size=1):
    aggregate_id = uuid4()
    made = [EncodedEvent(aggregate_id, n, "sold", bytes(size)) for n in range(1, events + 1)]
    return Group([Save(uuid4(), "Sell", made, ((aggregate_id, events),), None)])


async def wrote(writer, access, *groups):
    """Return how many groups were in each call, after a first one that they all wait for."""
    writes = [asyncio.create_task(writer.write(group()))]
    await asyncio.sleep(0.01)
    writes += [asyncio.create_task(writer.write(each)) for each in groups]
    await asyncio.sleep(0.01)
    assert writer.waiting() == len(writes)
    access.may_answer.set()
    assert all(isinstance(verdict, Committed) for verdict in await asyncio.gather(*writes))
    await writer.drain()
    assert writer.waiting() == 0
    return access.calls[1:]


async def test_all_that_waits_goes_in_one_call(writer, access):
    assert await wrote(writer, access, *(group() for _ in range(50))) == [50]


async def test_a_call_holds_no_more_events_than_it_may(writer, access):
    third = MAX_GROUPED_EVENTS // 3
    assert await wrote(writer, access, *(group(third) for _ in range(5))) == [3, 2]


async def test_a_call_holds_no_more_bytes_than_it_may(writer, access):
    third = MAX_GROUPED_BYTES // 3
    assert await wrote(writer, access, *(group(size=third) for _ in range(5))) == [3, 2]


async def test_a_larger_group_goes_alone_and_whole(writer, access):
    large = group(MAX_GROUPED_EVENTS + 1)
    assert await wrote(writer, access, group(), large, group()) == [1, 1, 1]


async def test_what_the_log_raises_reaches_all_who_wait_and_those_after_them_are_served(
    writer, access
):
    access.error = ZeroDivisionError()
    access.may_answer.set()
    for write in [asyncio.create_task(writer.write(group())) for _ in range(3)]:
        with pytest.raises(ZeroDivisionError):
            await write
    access.error = None
    assert not isinstance(await writer.write(group()), Failed)
