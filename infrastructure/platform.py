"""The system's time, randomness, ids, threads and tasks, behind the application's port."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import random
import time
import uuid
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any, TypeVar

T = TypeVar("T")

THREADS = 6
"""One writes, the others read and fold."""


class SystemPlatform:
    """What the operating system and asyncio offer. This module alone touches them."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(THREADS, thread_name_prefix="leftfold")
        self._tasks: set[asyncio.Task[None]] = set()

    def now(self) -> datetime:
        return datetime.now(UTC)

    def monotonic(self) -> float:
        return time.monotonic()

    def random(self) -> float:
        return random.random()  # noqa: S311 - for jitter, not for secrets

    def new_id(self) -> uuid.UUID:
        return uuid.uuid4()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def in_thread(self, function: Callable[..., T], *args: Any) -> T:
        context = contextvars.copy_context()
        call = functools.partial(context.run, function, *args)
        return await asyncio.get_running_loop().run_in_executor(self._executor, call)

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        # An empty context: a task must not inherit the unit of the dispatch that began it.
        task = contextvars.Context().run(asyncio.get_running_loop().create_task, work)
        self._tasks.add(task)  # asyncio itself holds tasks weakly
        task.add_done_callback(self._tasks.discard)
        return task

    def close(self) -> None:
        """Let the threads end; what they are doing is finished first."""
        self._executor.shutdown(wait=True)
