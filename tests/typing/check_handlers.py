"""A handler of another message, or with another answer, is rejected."""
# pyright: strict, reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

from leftfold.application import Command, CommandBus, Query, QueryBus, Receipt
from leftfold.domain import DomainError, Err, Ok, Result


class CupIsFull(DomainError, message="{litres} litres are too much"):
    litres: int


class CupIsBroken(DomainError):
    """Another refusal."""


class FillCup(Command[Receipt, CupIsFull]):
    litres: int


class CountCups(Command[int, CupIsFull]):
    """A command whose answer is no receipt."""


class LookIntoCup(Query[float, CupIsFull]):
    cup: str


def fill(command: FillCup) -> Result[Receipt, CupIsFull]:
    return Err(CupIsFull(command.litres))


async def fill_later(command: FillCup) -> Result[Receipt, CupIsFull]:
    return Err(CupIsFull(command.litres))


def fill_any(command: Command[Receipt, CupIsFull]) -> Ok[Receipt]:
    raise NotImplementedError


def count(_: CountCups) -> Result[int, CupIsFull]:
    return Ok(1)


def breaking(_: FillCup) -> Result[Receipt, CupIsBroken]:
    return Err(CupIsBroken())


def bare(_: FillCup) -> Receipt:
    raise NotImplementedError


def look(query: LookIntoCup) -> Result[float, CupIsFull]:
    return Ok(float(len(query.cup)))


class Cups:
    """A service's methods are handlers, too."""

    def fill(self, command: FillCup) -> Result[Receipt, CupIsFull]:
        return Err(CupIsFull(command.litres))


def right(commands: CommandBus, queries: QueryBus, cups: Cups) -> None:
    commands.add(FillCup.handled_by(fill))
    commands.add(FillCup.handled_by(fill_later))
    commands.add(FillCup.handled_by(fill_any))
    commands.add(FillCup.handled_by(cups.fill, blocking=True), CountCups.handled_by(count))
    commands.register(FillCup, fill)
    commands.register(FillCup, fill_later)
    queries.add(LookIntoCup.handled_by(look))
    queries.register(LookIntoCup, look)


def another_message() -> None:
    FillCup.handled_by(count)  # type: ignore[arg-type]
    CountCups.handled_by(fill)  # type: ignore[arg-type]
    LookIntoCup.handled_by(fill_later)  # type: ignore[arg-type]


def another_answer(commands: CommandBus) -> None:
    FillCup.handled_by(bare)  # type: ignore[arg-type]
    FillCup.handled_by(lambda _: Ok("full"))  # type: ignore[arg-type]
    commands.register(FillCup, count)  # type: ignore[misc]


def another_refusal(commands: CommandBus) -> None:
    FillCup.handled_by(breaking)  # type: ignore[arg-type]
    commands.register(FillCup, breaking)  # type: ignore[misc]


def another_kind(commands: CommandBus) -> None:
    commands.register(LookIntoCup, look)  # type: ignore[arg-type]
    commands.add(fill)  # type: ignore[arg-type]
