from __future__ import annotations

import asyncio
from uuid import uuid4

import pytest

from leftfold.application import Command, Dispatch, Overloaded, Receipt, ShuttingDown
from leftfold.application.admission import Admission
from leftfold.domain import DomainError, Err, Ok

pytestmark = pytest.mark.anyio


class Do(Command[Receipt, DomainError]):
    """Do something."""


class Door:
    """An admission, before a step that goes on when it may."""

    def __init__(self, *args):
        self.admission = Admission(*args)
        self.gate = asyncio.Event()

    async def knock(self):
        return await self.admission(
            Dispatch(Do(), Do.handled_by(lambda _: Ok(1)), uuid4()), self.go
        )

    async def go(self, dispatch):
        await self.gate.wait()
        return Ok(1)

    async def knocks(self, number):
        knocking = [asyncio.create_task(self.knock()) for _ in range(number)]
        await asyncio.sleep(0)
        return knocking


async def test_as_many_are_let_in_as_there_is_room_for():
    door = Door(2)
    knocking = await door.knocks(3)
    assert await knocking[2] == Err(Overloaded(2))
    door.gate.set()
    assert [await task for task in knocking[:2]] == [Ok(1), Ok(1)]
    assert await door.knock() == Ok(1)


async def test_what_those_left_behind_who_went_away_takes_room_too():
    left_behind = 2
    door = Door(2, lambda: left_behind)
    door.gate.set()
    assert await door.knock() == Err(Overloaded(2))
    left_behind = 1
    assert await door.knock() == Ok(1)


async def test_who_is_cancelled_makes_room():
    door = Door(1)
    (first,) = await door.knocks(1)
    first.cancel()
    await asyncio.wait([first])
    door.gate.set()
    assert await door.knock() == Ok(1)


async def test_without_a_limit_all_are_let_in():
    door = Door()
    knocking = await door.knocks(100)
    door.gate.set()
    assert [await task for task in knocking] == [Ok(1)] * 100


async def test_nobody_is_let_in_any_more_once_it_is_closed():
    door = Door()
    await door.admission.drain()
    assert await door.knock() == Err(ShuttingDown())


async def test_closing_waits_for_those_who_are_in():
    door = Door()
    (inside,) = await door.knocks(1)
    draining = asyncio.create_task(door.admission.drain())
    await asyncio.sleep(0.01)
    assert not draining.done()
    door.gate.set()
    await draining
    assert await inside == Ok(1)


async def test_closing_that_was_given_up_leaves_those_alone_who_are_in():
    door = Door()
    (inside,) = await door.knocks(1)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(door.admission.drain(), 0.01)
    door.gate.set()
    assert await inside == Ok(1)
