from __future__ import annotations

import asyncio
from decimal import Decimal
from uuid import UUID

import pytest

from leftfold.application.memory import Memory
from leftfold.domain.items import Item

pytestmark = pytest.mark.anyio

A = UUID(int=1)


@pytest.fixture
def item():
    return Item.register("A", "Cup", Decimal(1))


@pytest.fixture
def memory():
    return Memory(2)


async def waiting_for(memory, number):
    tasks = [asyncio.create_task(memory.take(A)) for _ in range(number)]
    await asyncio.sleep(0)
    return tasks


async def test_those_who_wait_for_an_aggregate_get_it_in_their_order(memory, item):
    await memory.take(A)
    first, second = await waiting_for(memory, 2)
    memory.let_go(A, item)
    assert await first == (item, True)
    await asyncio.sleep(0)
    assert not second.done()
    memory.let_go(A, item, is_current=False)
    assert await second == (item, False)


async def test_who_comes_later_does_not_go_before_one_whose_turn_has_come(memory, item):
    await memory.take(A)
    (first,) = await waiting_for(memory, 1)
    memory.let_go(A, item)
    assert memory.take_current(A) is None
    assert await first == (item, True)


async def test_who_is_cancelled_while_waiting_is_passed_over(memory, item):
    await memory.take(A)
    first, second = await waiting_for(memory, 2)
    first.cancel()
    await asyncio.sleep(0)
    memory.let_go(A, item)
    assert await second == (item, True)


async def test_who_is_cancelled_when_the_turn_has_come_passes_it_on(memory, item):
    await memory.take(A)
    first, second = await waiting_for(memory, 2)
    memory.let_go(A, item)
    first.cancel()
    assert await second == (item, True)
    memory.let_go(A, item)
    assert not memory.is_taken(A)


async def test_the_last_to_let_go_frees_it(memory, item):
    await memory.take(A)
    memory.let_go(A, item)
    assert not memory.is_taken(A)
    assert memory.take_current(A).aggregate is item


async def test_of_many_idle_aggregates_those_used_last_stay(memory, item):
    ids = [UUID(int=n) for n in range(4)]
    for aggregate_id in ids:
        await memory.take(aggregate_id)
        memory.let_go(aggregate_id, item)
    assert [memory.take_current(i) is not None for i in ids] == [False, False, True, True]
