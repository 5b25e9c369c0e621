"""The breaker against a model, under random calls, outcomes and times; in tasks and threads."""

from __future__ import annotations

import asyncio
import queue
from concurrent.futures import ThreadPoolExecutor

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    precondition,
    rule,
)

from leftfold.infrastructure import CircuitBreaker, CircuitOpenError, CircuitState
from leftfold.infrastructure.resilience import Transition

TIMEOUT, LEASE = 10.0, 4.0
OUTCOMES = ("success", "failure", "other")


class Counted(Exception):
    pass


class Model:
    """What a breaker should do, written as plainly as can be."""

    def __init__(self, threshold, probes):
        self.threshold, self.probes = threshold, probes
        self.now = 0.0
        self.isolated = False
        self.close()
        self.changes = []

    def close(self):
        self.is_closed, self.row, self.era, self.probing = True, 0, object(), {}

    def open(self):
        self.is_closed, self.row, self.era, self.probing = False, 0, object(), {}
        self.opened_at = self.now

    @property
    def state(self):
        if self.is_closed:
            return CircuitState.CLOSED
        if self.isolated or self.now < self.opened_at + TIMEOUT:
            return CircuitState.OPEN
        return CircuitState.HALF_OPEN

    def admit(self):
        """Return what the call is known by, or None if it is rejected."""
        if self.state is CircuitState.CLOSED:
            return self.era
        if self.state is CircuitState.OPEN:
            return None
        alive = {probe: end for probe, end in self.probing.items() if end > self.now}
        if len(alive) >= self.probes:
            return None
        self.probing = alive
        probe = object()
        self.probing[probe] = self.now + LEASE
        return probe

    def end(self, call, outcome):
        is_probe = self.probing.pop(call, None) is not None
        if not is_probe and call is not self.era:
            return
        if outcome == "success":
            if is_probe:
                self.close()
            self.row = 0
        elif outcome == "failure":
            self.row += 1
            if is_probe or self.row >= self.threshold:
                self.open()


class Tasks:
    """Calls as tasks of one loop."""

    outcomes = (*OUTCOMES, "cancelled")

    def __init__(self):
        self.loop = asyncio.new_event_loop()

    def begin(self, breaker):
        async def begin():
            outcome = self.loop.create_future()
            call = asyncio.ensure_future(breaker.call(lambda: outcome))
            await asyncio.sleep(0)
            if call.done():
                await call
            return call, outcome

        return self.loop.run_until_complete(begin())

    def end(self, handle, outcome):
        call, answer = handle

        async def end():
            if outcome == "cancelled":
                call.cancel()
            elif outcome == "success":
                answer.set_result(None)
            else:
                answer.set_exception(Counted() if outcome == "failure" else ValueError())
            await asyncio.wait([call])
            return call.cancelled() or call.exception()

        self.loop.run_until_complete(end())

    def close(self):
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()


class Threads:
    """Calls in threads of their own."""

    outcomes = OUTCOMES

    def __init__(self):
        self.pool = ThreadPoolExecutor(50)

    def begin(self, breaker):
        begun, ended = queue.Queue(), queue.Queue()

        def work():
            begun.put(None)
            error = ended.get(timeout=60)
            if error is not None:
                raise error

        def run():
            try:
                breaker.call_sync(work)
            except CircuitOpenError as error:
                begun.put(error)
            except (Counted, ValueError):
                pass

        call = self.pool.submit(run)
        rejection = begun.get(timeout=10)
        if rejection is not None:
            raise rejection
        return call, ended

    def end(self, handle, outcome):
        call, ended = handle
        ended.put({"success": None, "failure": Counted(), "other": ValueError()}[outcome])
        call.result(timeout=10)

    def close(self):
        self.pool.shutdown()


class BreakerMachine(RuleBasedStateMachine):
    driver_type = Tasks
    calls = Bundle("calls")

    @initialize(threshold=st.integers(1, 4), probes=st.integers(1, 3))
    def begin(self, threshold, probes):
        self.driver = self.driver_type()
        self.model = Model(threshold, probes)
        self.breaker = CircuitBreaker(
            threshold,
            TIMEOUT,
            name="it",
            failures=Counted,
            probes=probes,
            probe_lease=LEASE,
            clock=lambda: self.model.now,
        )
        self.told: list[Transition] = []
        self.breaker.listen(self.told.append)
        self.under_way = []

    @rule(target=calls)
    def call(self):
        known = self.model.admit()
        try:
            handle = self.driver.begin(self.breaker)
        except CircuitOpenError as error:
            assert known is None, error  # noqa: PT017 - either may happen
            return None
        assert known is not None
        self.under_way.append(handle)
        return known, handle

    @rule(call=consumes(calls), data=st.data())
    def end(self, call, data):
        if call is None:
            return
        known, handle = call
        outcome = data.draw(st.sampled_from(self.driver.outcomes))
        self.under_way.remove(handle)
        self.driver.end(handle, outcome)
        self.model.end(known, outcome)

    @rule(seconds=st.sampled_from([0.5, 3.9, 4.0, 6.0, 10.0]))
    def wait(self, seconds):
        self.model.now += seconds

    @precondition(lambda self: self.model.state is CircuitState.CLOSED)
    @rule()
    def break_and_wait(self):
        """Go where most of the rules are: chance alone seldom does."""
        while self.model.state is CircuitState.CLOSED:
            known, handle = self.model.admit(), self.driver.begin(self.breaker)
            self.driver.end(handle, "failure")
            self.model.end(known, "failure")
        self.model.now += TIMEOUT

    @precondition(lambda self: self.model.now > 3 * TIMEOUT)
    @rule()
    def isolate(self):
        self.breaker.isolate()
        self.model.open()
        self.model.isolated = True

    @rule()
    def reset(self):
        self.breaker.reset()
        self.model.close()
        self.model.isolated = False

    @invariant()
    def they_agree(self):
        if not hasattr(self, "model"):
            return
        assert self.breaker.state is self.model.state
        assert (self.breaker.retry_after == 0) == (
            self.model.state is CircuitState.CLOSED
            or (
                self.model.state is CircuitState.HALF_OPEN
                and sum(end > self.model.now for end in self.model.probing.values())
                < self.model.probes
            )
        )
        for one, other in zip(self.told, self.told[1:], strict=False):
            assert one.after is other.before

    def teardown(self):
        for handle in getattr(self, "under_way", ()):
            self.driver.end(handle, "success")
        if hasattr(self, "driver"):
            self.driver.close()


class ThreadedMachine(BreakerMachine):
    driver_type = Threads


TestBreakerInTasks = BreakerMachine.TestCase
TestBreakerInTasks.settings = settings(max_examples=400, stateful_step_count=40)
TestBreakerInThreads = ThreadedMachine.TestCase
TestBreakerInThreads.settings = settings(max_examples=200, stateful_step_count=30)
