"""What a dispatch adds over calling the handler directly; here the time itself is wanted.

The bare bus calls its handler; the runtime's bus has all of its middleware and the execution
of commands around a handler that loads nothing. Beside each time stands its ratio to a baseline
of the same run: awaiting an empty coroutine.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Iterable

from _measure import QUICK

from leftfold.application import Command, CommandBus, Handling, Model, Service
from leftfold.domain import DomainError, Ok, Result
from leftfold.infrastructure import Runtime

CALLS = 2_000 if QUICK else 20_000


class Ping(Command[int, DomainError]):
    number: int


def pong(command: Ping) -> Result[int, DomainError]:
    return Ok(command.number)


async def pong_later(command: Ping) -> Result[int, DomainError]:
    return Ok(command.number)


class Pongs(Service):
    def handlers(self) -> Iterable[Handling]:
        yield Ping.handled_by(pong)


async def nothing() -> None:
    pass


async def microseconds(call) -> float:
    begun = time.perf_counter()
    for _ in range(CALLS):
        await call()
    return (time.perf_counter() - begun) / CALLS * 1e6


async def main() -> None:
    ping = Ping(number=1)
    bare, bare_later = CommandBus(), CommandBus()
    bare.add(Ping.handled_by(pong))
    bare_later.add(Ping.handled_by(pong_later))

    async def directly() -> None:
        pong(ping)

    def later() -> object:
        return pong_later(ping)

    async with Runtime(Model((), services=(Pongs,)), "memory:") as runtime:
        whole = runtime.commands
        for name, call, direct, target in (
            ("bare bus, plain handler", lambda: bare.dispatch(ping), directly, ""),
            (
                "bare bus, async handler",
                lambda: bare_later.dispatch(ping),
                lambda: pong_later(ping),
                "",
            ),
            ("runtime's bus", lambda: whole.dispatch(ping), directly, " (target at most 15 µs)"),
        ):
            rounds = [
                (await microseconds(call) - await microseconds(direct), await microseconds(nothing))
                for _ in range(5)
            ]
            added = statistics.median(more for more, _ in rounds)
            ratio = statistics.median(more / empty for more, empty in rounds)
            print(f"{name}: adds {added:.1f} µs{target}, {ratio:.0f} empty awaits", flush=True)


asyncio.run(main())
