from __future__ import annotations

import asyncio
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leftfold.application import (
    AlreadyHandledError,
    Command,
    CommandBus,
    NoHandlerError,
    OutcomeUnknown,
    Query,
    QueryBus,
    Receipt,
)
from leftfold.application.bus import handle
from leftfold.domain import DomainError, Err, Ok

pytestmark = pytest.mark.anyio


class Refused(DomainError, message="no"):
    """A refusal without facts."""


class Add(Command[int, Refused]):
    a: int = 1
    b: int = 2


class Greet(Command[str, Refused]):
    name: str


class AddThree(Add):
    c: int = 3


class Own(Command[int, Refused]):
    number: int

    async def execute(self):
        return Ok(self.number)


class Ask(Query[int, Refused]):
    pass


def answer(command):
    return Ok(command.a + command.b)


async def answer_later(command):
    await asyncio.sleep(0)
    return Ok(command.a + command.b)


async def answer_itself(dispatch):
    """An innermost step that shows what came to it."""
    return Ok(dispatch)


@given(st.lists(st.builds(Add, a=st.integers()) | st.builds(Greet, name=st.text()), max_size=8))
def test_command_dispatch(commands):
    """Property 5 of the design card: its own handler is called, once, with that very command."""
    added, greeted = [], []
    bus = CommandBus()
    bus.register(Add, lambda command: Ok(added.append(command)))
    bus.register(Greet, lambda command: Ok(greeted.append(command)))

    async def dispatch_all():
        for command in commands:
            await bus.dispatch(command)

    asyncio.run(dispatch_all())
    for calls, kind in ((added, Add), (greeted, Greet)):
        wanted = [command for command in commands if isinstance(command, kind)]
        assert [id(call) for call in calls] == [id(command) for command in wanted]


@pytest.mark.parametrize("handler", [answer, answer_later])
async def test_a_handler_may_be_plain_or_async(handler):
    bus = CommandBus()
    bus.register(Add, handler)
    assert await bus.dispatch(Add()) == Ok(3)


async def test_add_takes_what_handled_by_made():
    bus = CommandBus()
    bus.add(Add.handled_by(answer), Greet.handled_by(lambda command: Ok(command.name)))
    assert await bus.dispatch(Greet(name="Ada")) == Ok("Ada")


@pytest.mark.parametrize("make", [Add.handled_by, Ask.handled_by])
def test_a_second_handler_is_refused(make):
    bus = CommandBus()
    bus.add(make(answer))
    with pytest.raises(AlreadyHandledError):
        bus.add(make(answer_later))


def test_register_refuses_a_second_handler():
    bus = CommandBus()
    bus.register(Add, answer)
    with pytest.raises(AlreadyHandledError) as raised:
        bus.register(Add, answer_later)
    assert raised.value == AlreadyHandledError("Add")


async def test_after_a_refused_registration_the_first_handler_stays():
    bus = CommandBus()
    bus.register(Add, answer)
    with pytest.raises(AlreadyHandledError):
        bus.register(Add, lambda _: Ok(0))
    assert await bus.dispatch(Add()) == Ok(3)


def test_another_type_of_the_same_name_is_refused():
    bus = CommandBus()
    bus.register(Add, answer)
    with pytest.raises(AlreadyHandledError):
        bus.register(type("Add", (Command,), {"__module__": __name__}), answer)


async def test_a_command_without_a_handler_is_an_error():
    with pytest.raises(NoHandlerError) as raised:
        await CommandBus().dispatch(Add())
    assert raised.value == NoHandlerError("Add")


async def test_a_handler_does_not_answer_for_subclasses():
    bus = CommandBus()
    bus.register(Add, answer)
    with pytest.raises(NoHandlerError, match="AddThree"):
        await bus.dispatch(AddThree())


async def test_a_command_may_execute_itself():
    assert await CommandBus().dispatch(Own(number=5)) == Ok(5)


async def test_a_registered_handler_wins_over_execute():
    bus = CommandBus()
    bus.register(Own, lambda _: Ok(0))
    assert await bus.dispatch(Own(number=5)) == Ok(0)


async def test_executing_a_command_that_does_not_override_it_is_an_error():
    with pytest.raises(NoHandlerError):
        await Add().execute()


@pytest.mark.parametrize("error", [Refused(), OutcomeUnknown(UUID(int=1))])
@pytest.mark.parametrize("is_async", [False, True])
async def test_a_refusal_that_is_raised_becomes_err(error, is_async):
    def refuse(_):
        raise error

    async def refuse_later(_):
        raise error

    bus = CommandBus()
    bus.register(Add, refuse_later if is_async else refuse)
    assert await bus.dispatch(Add()) == Err(error)


async def test_a_bug_stays_raised():
    bus = CommandBus()
    bus.register(Add, lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        await bus.dispatch(Add())


async def test_a_query_reaches_its_handler():
    bus = QueryBus()
    bus.register(Ask, lambda _: Ok(42))
    assert await bus.dispatch(Ask()) == Ok(42)


async def test_a_query_carries_the_receipt_to_answer_after():
    receipt = Receipt(UUID(int=1), (), 7)
    bus = QueryBus((), answer_itself)
    bus.register(Ask, lambda _: Ok(42))
    assert (await bus.dispatch(Ask(), after=receipt)).unwrap().after == receipt


async def test_a_command_carries_the_id_it_was_given():
    bus = CommandBus((), answer_itself)
    bus.register(Add, answer)
    dispatch = (await bus.dispatch(Add(), command_id=UUID(int=7))).unwrap()
    assert dispatch.command_id == UUID(int=7)


async def test_a_command_without_an_id_gets_a_new_one():
    bus = CommandBus((), answer_itself, lambda: UUID(int=9))
    bus.register(Add, answer)
    dispatch = (await bus.dispatch(Add())).unwrap()
    assert dispatch.command_id == UUID(int=9)


async def test_a_batch_on_a_bare_bus_answers_in_order():
    bus = CommandBus()
    bus.register(Add, answer)
    assert await bus.dispatch_all([Add(a=1), Add(a=2)]) == Ok((3, 4))


async def test_a_batch_on_a_bare_bus_stops_at_the_first_refusal():
    calls = []
    bus = CommandBus()
    bus.register(Add, lambda command: calls.append(command) or Err(Refused()))
    assert await bus.dispatch_all([Add(), Add()]) == Err(Refused())
    assert len(calls) == 1


async def test_middleware_goes_around_in_its_order():
    seen = []

    def noting(name):
        async def around(dispatch, call_next):
            seen.append(f"{name} in")
            outcome = await call_next(dispatch)
            seen.append(f"{name} out")
            return outcome

        return around

    bus = CommandBus((noting("outer"), noting("inner")))
    bus.register(Add, lambda _: Ok(seen.append("handler")))
    await bus.dispatch(Add())
    assert seen == ["outer in", "inner in", "handler", "inner out", "outer out"]


async def test_middleware_may_answer_itself():
    async def refuse(dispatch, call_next):
        return Err(Refused())

    bus = CommandBus((refuse,))
    bus.register(Add, lambda _: pytest.fail("was called"))
    assert await bus.dispatch(Add()) == Err(Refused())


async def test_middleware_may_change_the_answer():
    async def double(dispatch, call_next):
        return (await call_next(dispatch)).map(lambda value: value * 2)

    bus = CommandBus((double,), handle)
    bus.register(Add, answer)
    assert await bus.dispatch(Add()) == Ok(6)


async def test_a_command_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Add().a = 2


def test_names_are_those_of_the_registered_types():
    bus = CommandBus()
    bus.add(Greet.handled_by(answer), Add.handled_by(answer))
    assert bus.names == ("Add", "Greet")
