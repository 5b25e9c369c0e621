"""What a dispatch adds over calling the handler directly; here the time itself is wanted.

The bare bus has no middleware and calls its handler in its default innermost step. The runtime's
bus (`memory:`) has all of its middleware and the execution of commands around a handler that
answers `Ok` and loads nothing. From each time that of calling the same handler directly is taken
off. Beside it stands its ratio to a baseline of the same run: awaiting an empty coroutine.

    python benchmarks/dispatch.py [--quick]
"""

from __future__ import annotations

import asyncio
import gc
import statistics
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from _measure import QUICK

from leftfold.application import Command, CommandBus, Handling, Model, Service
from leftfold.domain import DomainError, Ok, Result
from leftfold.infrastructure import Runtime

CALLS = 1_000 if QUICK else 10_000
ROUNDS = 3 if QUICK else 7
TARGET = "target at most 15 µs"


class Ping(Command[int, DomainError]):
    number: int


class LaterPing(Command[int, DomainError]):
    number: int


def pong(command: Ping) -> Result[int, DomainError]:
    return Ok(command.number)


async def pong_later(command: LaterPing) -> Result[int, DomainError]:
    return Ok(command.number)


class Pongs(Service):
    def handlers(self) -> Iterable[Handling]:
        yield Ping.handled_by(pong)
        yield LaterPing.handled_by(pong_later)


async def nothing() -> None:
    pass


async def microseconds(call: Callable[[], Awaitable[Any]]) -> float:
    begun = time.perf_counter()
    for _ in range(CALLS):
        await call()
    return (time.perf_counter() - begun) / CALLS * 1e6


async def main() -> None:
    ping, later = Ping(number=1), LaterPing(number=1)
    bare = CommandBus()
    bare.add(Ping.handled_by(pong), LaterPing.handled_by(pong_later))

    async def directly() -> None:
        pong(ping)

    async with Runtime(Model((), services=(Pongs,)), "memory:") as runtime:
        for name, call, direct in (
            ("bare bus, sync handler", lambda: bare.dispatch(ping), directly),
            ("bare bus, async handler", lambda: bare.dispatch(later), lambda: pong_later(later)),
            ("runtime's bus, sync handler", lambda: runtime.commands.dispatch(ping), directly),
            (
                "runtime's bus, async handler",
                lambda: runtime.commands.dispatch(later),
                lambda: pong_later(later),
            ),
        ):
            assert (await call()) == Ok(1)
            added, ratios = [], []
            for _ in range(ROUNDS):
                gc.collect()
                empty = await microseconds(nothing)
                added.append(await microseconds(call) - await microseconds(direct))
                ratios.append(added[-1] / empty)
            shown = " ".join(f"{more:.1f}" for more in added)
            print(
                f"dispatch, {name}: adds {statistics.median(added):.1f} µs, "
                f"{statistics.median(ratios):.0f}x an empty await ({TARGET}) [rounds: {shown}]",
                flush=True,
            )


if __name__ == "__main__":
    asyncio.run(main())
