"""The one writer of a runtime: drains staged saves into the log, in groups."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from leftfold.application.ports import Access, Committed, Group, Log, Platform, Verdict

MAX_GROUPED_EVENTS, MAX_GROUPED_BYTES = 1_000, 16 << 20
"""Events, and bytes of their states, in one call; a single larger group still goes whole."""


class Writer:
    """All groups that wait share one call of the log, in their order; each has its own verdict."""

    def __init__(
        self, log: Log, platform: Platform, access: Access, committed: Callable[[], None]
    ) -> None:
        """Write to a log; call `committed` after each successful commit."""
        self._log = log
        self._platform = platform
        self._access = access
        self._committed = committed
        self._waiting: deque[tuple[Group, asyncio.Future[Verdict]]] = deque()
        self._writing = 0
        self._is_draining = False

    async def write(self, group: Group) -> Verdict:
        """Write a group of saves, all or none. A cancelled caller does not stop the writing."""
        if self._log.is_local:
            verdict = self._log.commit([group])[0]
            self._committed()
            return verdict
        answer: asyncio.Future[Verdict] = asyncio.get_running_loop().create_future()
        self._waiting.append((group, answer))
        if not self._is_draining:
            self._is_draining = True
            self._platform.spawn(self._drain())
        return await answer

    def waiting(self) -> int:
        """How many groups are not written yet, also those whose callers have gone away."""
        return len(self._waiting) + self._writing

    async def drain(self) -> None:
        """Wait until all that was given is written, also what nobody waits for any more."""
        while self._is_draining:
            await self._platform.sleep(0.005)

    async def _drain(self) -> None:
        try:
            while self._waiting:
                groups, answers = self._take()
                self._writing = len(groups)
                try:
                    verdicts = await self._access.commit(groups)
                    for answer, verdict in zip(answers, verdicts, strict=True):
                        if not answer.done():  # its caller has gone away
                            answer.set_result(verdict)
                    if any(isinstance(verdict, Committed) for verdict in verdicts):
                        self._committed()
                except Exception as error:  # noqa: BLE001 - each waiting dispatch raises it
                    for answer in answers:
                        if not answer.done():
                            answer.set_exception(error)
        finally:
            self._writing = 0
            self._is_draining = False

    def _take(self) -> tuple[list[Group], list[asyncio.Future[Verdict]]]:
        groups: list[Group] = []
        answers: list[asyncio.Future[Verdict]] = []
        number = size = 0
        while self._waiting:
            group, answer = self._waiting[0]
            number += sum(len(save.events) for save in group.saves)
            size += sum(len(event.state) for save in group.saves for event in save.events)
            if groups and (number > MAX_GROUPED_EVENTS or size > MAX_GROUPED_BYTES):
                break
            self._waiting.popleft()
            groups.append(group)
            answers.append(answer)
        return groups, answers
