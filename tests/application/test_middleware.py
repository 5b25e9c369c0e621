from __future__ import annotations

import asyncio
import logging
from datetime import UTC, datetime
from uuid import UUID

import pytest

from leftfold.application import Command, CommandBus, Conflict, OutcomeUnknown
from leftfold.application.middleware import conflict_retry, logged, timeout
from leftfold.domain import DomainError, Err, Ok, Personal

pytestmark = pytest.mark.anyio

ID = UUID(int=7)


class Refused(DomainError, message="not for {customer}"):
    customer: str


class Serve(Command[int, Refused]):
    customer: Personal[str] = Personal("Ada Lovelace")
    table: str = "by-the-window"


class Patient:
    """A platform on which waiting takes no time and is written down."""

    def __init__(self):
        self.slept = []

    def now(self):
        return datetime(2026, 1, 1, tzinfo=UTC)

    def monotonic(self):
        return 0.0

    def random(self):
        return 0.5

    async def sleep(self, seconds):
        self.slept.append(seconds)


@pytest.fixture
def platform():
    return Patient()


def bus_of(handler, *middleware):
    bus = CommandBus(middleware)
    bus.register(Serve, handler)
    return bus


def conflicting(times):
    """Make a handler that meets so many conflicts before it succeeds; it counts its calls."""

    def handle(_):
        handle.calls += 1
        return Err(Conflict(((ID, handle.calls),))) if handle.calls <= times else Ok(handle.calls)

    handle.calls = 0
    return handle


# Timeout


async def test_what_is_in_time_is_answered():
    assert await bus_of(lambda _: Ok(1), timeout(5)).dispatch(Serve()) == Ok(1)


async def test_what_takes_too_long_has_an_unknown_outcome():
    async def slow(_):
        await asyncio.sleep(5)

    answer = await bus_of(slow, timeout(0.01)).dispatch(Serve(), command_id=ID)
    assert answer == Err(OutcomeUnknown(ID))


async def test_what_takes_too_long_is_cancelled():
    cancelled = []

    async def slow(_):
        try:
            await asyncio.sleep(5)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    await bus_of(slow, timeout(0.01)).dispatch(Serve())
    assert cancelled == [True]


async def test_a_cancellation_from_outside_is_no_timeout():
    async def slow(_):
        await asyncio.sleep(5)

    task = asyncio.create_task(bus_of(slow, timeout(5)).dispatch(Serve()))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_each_command_has_its_own_time():
    bus = bus_of(lambda serve: wait(float(serve.table)), timeout(0.1))

    async def serve(begins, lasts):
        await asyncio.sleep(begins)
        return await bus.dispatch(Serve(table=str(lasts)), command_id=ID)

    times = [(0, 0.01), (0, 0.5), (0.05, 0.08), (0.06, 0.5), (0.25, 0.01), (0.3, 0.5)]
    outcomes = await asyncio.gather(*(serve(*each) for each in times))
    late = Err(OutcomeUnknown(ID))
    assert outcomes == [Ok(1), late, Ok(1), late, Ok(1), late]


async def wait(seconds):
    await asyncio.sleep(seconds)
    return Ok(1)


async def test_a_shorter_time_around_it_ends_as_it_would_alone():
    bus = bus_of(lambda _: wait(5), timeout(0.05))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await bus.dispatch(Serve())
    async with asyncio.timeout(1):
        assert await bus.dispatch(Serve(), command_id=ID) == Err(OutcomeUnknown(ID))
    assert asyncio.current_task().cancelling() == 0


async def test_a_handler_that_answers_though_it_is_cancelled_is_heard():
    async def stubborn(_):
        try:
            await asyncio.sleep(5)
        except asyncio.CancelledError:
            return Ok(7)

    assert await bus_of(stubborn, timeout(0.01)).dispatch(Serve()) == Ok(7)
    assert asyncio.current_task().cancelling() == 0
    await asyncio.sleep(0)


async def test_a_timeout_of_the_handlers_own_is_raised():
    async def impatient(_):
        async with asyncio.timeout(0.01):
            await asyncio.sleep(5)

    with pytest.raises(TimeoutError):
        await bus_of(impatient, timeout(1)).dispatch(Serve())


# Conflict retry


async def test_without_a_conflict_there_is_one_attempt(platform):
    handler = conflicting(0)
    assert await bus_of(handler, conflict_retry(platform)).dispatch(Serve()) == Ok(1)
    assert platform.slept == []


@pytest.mark.parametrize("conflicts", [1, 2, 9])
async def test_conflicts_are_tried_again(platform, conflicts):
    handler = conflicting(conflicts)
    assert await bus_of(handler, conflict_retry(platform)).dispatch(Serve()) == Ok(conflicts + 1)


@pytest.mark.parametrize("attempts", [1, 2, 3, 10])
async def test_after_so_many_attempts_the_last_conflict_is_the_answer(platform, attempts):
    handler = conflicting(100)
    answer = await bus_of(handler, conflict_retry(platform, attempts)).dispatch(Serve())
    assert handler.calls == attempts
    assert answer == Err(Conflict(((ID, attempts),)))


async def test_other_refusals_are_not_tried_again(platform):
    calls = []

    def refuse(_):
        calls.append(1)
        return Err(Refused("Ada"))

    assert await bus_of(refuse, conflict_retry(platform)).dispatch(Serve()) == Err(Refused("Ada"))
    assert len(calls) == 1


async def test_bugs_are_not_tried_again(platform):
    calls = []

    def fail(_):
        calls.append(1)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await bus_of(fail, conflict_retry(platform)).dispatch(Serve())
    assert len(calls) == 1


async def test_every_attempt_carries_the_same_command_id(platform):
    seen = []

    async def note(dispatch, call_next):
        seen.append(dispatch.command_id)
        return await call_next(dispatch)

    await bus_of(conflicting(3), conflict_retry(platform), note).dispatch(Serve())
    assert len(seen) == 4
    assert len(set(seen)) == 1


async def test_waits_between_attempts_are_bounded(platform):
    await bus_of(conflicting(100), conflict_retry(platform, 20, max_delay=0.1)).dispatch(Serve())
    assert all(0 <= wait <= 0.1 for wait in platform.slept)
    assert max(platform.slept) > 0


# Logging


def texts(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "leftfold.bus"]


async def test_a_refusal_is_logged_by_its_name(caplog, platform):
    caplog.set_level(logging.INFO, "leftfold.bus")
    bus = bus_of(lambda _: Err(Refused("Ada Lovelace")), logged(platform))
    await bus.dispatch(Serve(), command_id=ID)
    assert texts(caplog) == [f"Serve {ID}: Refused (0.0 ms)"]


async def test_success_is_logged_for_debugging(caplog, platform):
    caplog.set_level(logging.DEBUG, "leftfold.bus")
    await bus_of(lambda _: Ok(1), logged(platform)).dispatch(Serve(), command_id=ID)
    assert texts(caplog) == [f"Serve {ID} done (0.0 ms)"]


async def test_a_bug_is_logged_as_an_error(caplog, platform):
    caplog.set_level(logging.INFO, "leftfold.bus")
    with pytest.raises(ZeroDivisionError):
        await bus_of(lambda _: 1 / 0, logged(platform)).dispatch(Serve())
    assert [record.levelname for record in caplog.records] == ["ERROR"]


async def test_a_bug_is_logged_though_only_warnings_are_wanted(caplog, platform):
    caplog.set_level(logging.WARNING, "leftfold.bus")
    with pytest.raises(ZeroDivisionError):
        await bus_of(lambda _: 1 / 0, logged(platform)).dispatch(Serve())
    assert [record.levelname for record in caplog.records] == ["ERROR"]


@pytest.mark.parametrize("answer", [Ok(1), Ok("Ada Lovelace"), Err(Refused("Ada Lovelace"))])
async def test_data_is_never_logged(caplog, platform, answer):
    caplog.set_level(logging.DEBUG, "leftfold.bus")
    await bus_of(lambda _: answer, logged(platform)).dispatch(Serve())
    assert texts(caplog)
    assert "Lovelace" not in caplog.text
    assert "by-the-window" not in caplog.text


async def test_logging_gives_the_answer_on(platform):
    assert await bus_of(lambda _: Ok(1), logged(platform)).dispatch(Serve()) == Ok(1)
