"""The system's time, randomness, ids, threads, tasks and signals."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import gc
import logging
import os
import random
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from types import FrameType
from typing import Any, TypeVar

from leftfold.infrastructure.errors import NotRunningError

T = TypeVar("T")

THREADS = 6
"""One writes, the others read and fold."""
OWN_THREADS = 32
"""Handlers that block at a time, at most; further ones wait."""
IDS_AT_ONCE = 256
VERSION_7 = 7 << 76 | 0b10 << 62
RANDOM_BITS = (1 << 80) - 1 & ~(0xF << 76 | 0b11 << 62)
"""Of an id: all but its first 48, the time, and those that say what it is (RFC 9562)."""
PATIENCE = 5.0
"""Seconds that closing waits for threads; what hangs longer is left behind."""
FORK_PATIENCE = 1.0
"""Seconds that a fork waits for threads at work."""

Lock = threading.Lock
monotonic = time.monotonic
epoch_seconds = time.time
blocking_sleep = time.sleep

_log = logging.getLogger("leftfold.platform")
_tasks: set[asyncio.Task[Any]] = set()  # asyncio itself holds tasks weakly


def random_number() -> float:
    """Return a number from 0 up to 1."""
    return random.random()  # noqa: S311 - for jitter, not for secrets


async def asleep(seconds: float) -> None:
    """Wait some seconds, without blocking."""
    await asyncio.sleep(seconds)


def start_task(work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """Begin a task of what is no runtime's, in the caller's context."""
    task = asyncio.get_running_loop().create_task(work)
    _tasks.add(task)
    task.add_done_callback(_tasks.discard)
    return task


_pausing = threading.Lock()


@contextmanager
def collector_paused() -> Iterator[None]:
    """Let no garbage be collected meanwhile, in the whole process: for work of milliseconds.

    Events and rows come by the thousand and are in no cycles; to look through them all again and
    again takes a fifth of a page's time.
    """
    # One at a time, or it might never run; and not where the program has it off.
    if not gc.isenabled() or not _pausing.acquire(blocking=False):
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        _pausing.release()


class SystemPlatform:
    """What the operating system and asyncio offer. This module alone touches them."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(THREADS, thread_name_prefix="leftfold")
        self._own_executor = ThreadPoolExecutor(OWN_THREADS, thread_name_prefix="leftfold-handler")
        self._tasks: set[asyncio.Task[None]] = set()

    def now(self) -> datetime:
        return datetime.now(UTC)

    def monotonic(self) -> float:
        return time.monotonic()

    def random(self) -> float:
        return random_number()

    def new_id(self) -> uuid.UUID:
        return _ids.new()

    def thread(self) -> int:
        return threading.get_ident()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def in_thread(self, function: Callable[..., T], *args: Any) -> T:
        return await _run_in(self._executor, _called_at_work, function, *args)

    async def in_own_thread(self, function: Callable[..., T], *args: Any) -> T:
        return await _run_in(self._own_executor, function, *args)

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        # An empty context: a task must not inherit the unit of the dispatch that began it.
        task = contextvars.Context().run(asyncio.get_running_loop().create_task, work)
        self._tasks.add(task)  # asyncio itself holds tasks weakly
        task.add_done_callback(self._tasks.discard)
        return task

    def close(self) -> None:
        """Let the threads end; what they do is finished first, but not what blocks in its own."""
        self._own_executor.shutdown(wait=False)
        self._executor.shutdown(wait=True)

    async def close_then(self, last: Callable[[], None]) -> None:
        """Close without blocking the loop, then call `last`; wait `PATIENCE` seconds for both.

        They are done also if waiting ends before, or is cancelled. Raises what `last` does.
        """

        def end() -> None:
            self.close()
            last()

        thread, ended = start_thread(end)
        done, _ = await asyncio.wait({asyncio.wrap_future(ended)}, timeout=PATIENCE)
        if not done:
            _log.warning("a thread still works after %.0f s; it is left behind", PATIENCE)
            return
        thread.join()  # it has nothing left to do
        ended.result()


class _Ids:
    """Ids of the time and of chance (RFC 9562, version 7).

    Those made one after another are near each other, and so are their rows in a database: with
    random ones each would dirty a page of its own. Chance is drawn for many at a time: each draw is
    a system call.
    """

    def __init__(self) -> None:
        self.forget()

    def new(self) -> uuid.UUID:
        try:
            drawn = self._drawn.pop()
        except IndexError:
            block = os.urandom(16 * IDS_AT_ONCE)
            self._drawn += [int.from_bytes(block[at : at + 16]) for at in range(16, len(block), 16)]
            drawn = int.from_bytes(block[:16])
        number = time.time_ns() // 1_000_000 << 80 | drawn & RANDOM_BITS | VERSION_7
        # As `uuid.UUID` does it, without its questions about five other forms.
        made = object.__new__(uuid.UUID)
        object.__setattr__(made, "int", number)
        object.__setattr__(made, "is_safe", uuid.SafeUUID.unknown)
        return made

    def forget(self) -> None:
        """In a child by fork: what was drawn is the parent's."""
        self._drawn: list[int] = []


async def _run_in(executor: ThreadPoolExecutor, function: Callable[..., T], *args: Any) -> T:
    context = contextvars.copy_context()
    call = functools.partial(context.run, function, *args)
    loop = asyncio.get_running_loop()
    begun: asyncio.Future[T]
    try:
        begun = loop.run_in_executor(executor, call)
    except RuntimeError:  # it was shut down
        raise NotRunningError from None
    return await begun


def start_thread(function: Callable[[], T]) -> tuple[threading.Thread, Future[T]]:
    """Call a function in a thread that does not keep the interpreter from ending."""
    answer: Future[T] = Future()
    answer.set_running_or_notify_cancel()  # from here on it cannot be cancelled

    def run() -> None:
        try:
            answer.set_result(function())
        except BaseException as error:  # noqa: BLE001 - whoever asks for the answer raises it
            answer.set_exception(error)

    thread = threading.Thread(target=run, name="leftfold-beside", daemon=True)
    thread.start()
    return thread, answer


def shut_down(descriptor: int) -> None:
    """End what a socket's connection waits for, from any thread. Raises `OSError`."""
    with socket.socket(fileno=os.dup(descriptor)) as end:
        end.shutdown(socket.SHUT_RDWR)


class Sigterm:
    """What SIGTERM does while runtimes are open: all of them close, then it ends the process.

    There is one, `sigterm`, since a process has one handler of a signal. A program's own handler
    is left alone. The handler only wakes event loops, so it may interrupt anything; the last
    runtime to close sends the signal again, and the handler finds none that is open.
    """

    def __init__(self) -> None:
        self._open: dict[Callable[[], object], asyncio.AbstractEventLoop] = {}
        self._has_come = False
        self._owner = os.getpid()
        self._masks = threading.local()

    def add(self, close: Callable[[], object]) -> None:
        """Call this on the running loop when the signal comes, at once if it has come."""
        self._open[close] = loop = asyncio.get_running_loop()
        if self._has_come:
            loop.call_soon(close)
        self.settle()

    def discard(self, close: Callable[[], object]) -> None:
        """Tell that it is closed."""
        self._open.pop(close, None)
        if not self._has_come:
            self.settle()
        elif not self._open:
            # To the main thread, which alone handles signals, and may wait for a lock.
            main = threading.main_thread().ident
            assert main is not None  # noqa: S101 - it runs
            signal.pthread_kill(main, signal.SIGTERM)

    def settle(self) -> None:
        """Take the signal while a runtime is open, and give it back; only the main thread can."""
        if os.name != "posix":
            return  # nobody sends it
        ours, systems = self._handle, signal.SIG_DFL
        before, after = (systems, ours) if self._open else (ours, systems)
        if signal.getsignal(signal.SIGTERM) == before:
            with suppress(ValueError):  # another thread: it is the program's own affair
                signal.signal(signal.SIGTERM, after)

    async def wait(self) -> None:
        """Return at once if the signal has not come; else when all is closed: that is the end."""
        while self._has_come and self._open:  # noqa: ASYNC110 - they close on several loops
            await asyncio.sleep(0.005)

    def hold(self) -> None:
        """Before a fork: hold the signal back, for Python would lose it in a child just begun."""
        self._masks.before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def go_on(self) -> None:
        """After a fork: let the signal through."""
        signal.pthread_sigmask(signal.SIG_SETMASK, self._masks.before)

    def forget(self) -> None:
        """In a child by fork: the runtimes are the parent's, the signal is the system's again."""
        self._open.clear()
        self._has_come = False
        self._owner = os.getpid()
        self.settle()
        self.go_on()

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        is_ours = os.getpid() == self._owner
        for close, loop in list(self._open.items()) if is_ours else ():
            if loop.is_running():
                self._has_come = True
                loop.call_soon_threadsafe(close)
            else:
                self._open.pop(close, None)  # it was left open, and nothing is under way
        if not self._open or not is_ours:
            self._end()

    def _end(self) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.raise_signal(signal.SIGTERM)
        os._exit(128 + signal.SIGTERM)  # a container's first process is spared by the signal


class AtWork:
    """`with at_work:` around what must not be cut in two by a fork.

    A database's library holds locks of its own. One that a thread held while another forked is
    held for ever in the child, which could not open the database again.
    """

    def __init__(self) -> None:
        self._count = 0
        self._is_forking = False
        self._changed = threading.Condition()

    def __enter__(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._is_forking)
            self._count += 1

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._count -= 1
            self._changed.notify_all()

    def hold(self) -> None:
        """Let nobody begin, and wait for those at work, though not for ever: one may be forking."""
        with self._changed:
            self._is_forking = True
            self._changed.wait_for(lambda: not self._count, FORK_PATIENCE)

    def go_on(self) -> None:
        """Let all begin again."""
        with self._changed:
            self._is_forking = False
            self._changed.notify_all()

    def forget(self) -> None:
        """In a child by fork: nobody is at work."""
        self._count = 0
        self._is_forking = False
        self._changed = threading.Condition()


def _called_at_work(function: Callable[..., T], *args: Any) -> T:
    with at_work:
        return function(*args)


_ids = _Ids()
sigterm = Sigterm()
at_work = AtWork()

if hasattr(os, "register_at_fork"):  # not on Windows
    for each in (at_work, sigterm):
        os.register_at_fork(
            before=each.hold, after_in_parent=each.go_on, after_in_child=each.forget
        )
    os.register_at_fork(after_in_child=_ids.forget)
