"""What a runtime does, as OpenTelemetry spans and metrics; no data of messages is among it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from leftfold.application import Command, Dispatch
from leftfold.application.bus import Outcome, Step
from leftfold.application.checkpoints import Reader, full_name
from leftfold.domain import Err
from leftfold.infrastructure.errors import MissingPackageError, NotRunningError
from leftfold.infrastructure.health import Health
from leftfold.infrastructure.platform import epoch_seconds, monotonic

try:
    from opentelemetry import metrics, trace
    from opentelemetry.metrics import CallbackOptions, Observation
    from opentelemetry.trace import Status, StatusCode
except ImportError:
    raise MissingPackageError("Telemetry", "telemetry") from None

if TYPE_CHECKING:
    from opentelemetry.metrics import MeterProvider
    from opentelemetry.trace import TracerProvider

SCOPE = "leftfold"
STATES = {"closed": 0, "half_open": 1, "open": 2}


class Telemetry:
    """Tells OpenTelemetry of one runtime: `Runtime(…, telemetry=Telemetry())`.

    Spans: each command, query and page of a view. Metrics: `leftfold.dispatch.duration` and
    `leftfold.page.duration` (seconds), `leftfold.page.events`, `leftfold.view.lag` (positions),
    `leftfold.breaker.state` (0 closed, 1 half-open, 2 open), and each counter of breakers and
    caches, as `leftfold.cache.hits`.
    """

    def __init__(
        self,
        tracer_provider: TracerProvider | None = None,
        meter_provider: MeterProvider | None = None,
    ) -> None:
        """Use these providers, or the program's global ones."""
        self._tracer = trace.get_tracer(SCOPE, tracer_provider=tracer_provider)
        meter = metrics.get_meter(SCOPE, meter_provider=meter_provider)
        self._meter = meter
        self._is_watching = False
        self._dispatches = meter.create_histogram(
            "leftfold.dispatch.duration", "s", "How long commands and queries took"
        )
        self._pages = meter.create_histogram(
            "leftfold.page.duration", "s", "How long pages of views took"
        )
        self._events = meter.create_counter("leftfold.page.events", "{event}", "Events folded")

    async def around(self, dispatch: Dispatch[Any], call_next: Step) -> Outcome:
        """Tell of one dispatch: a middleware."""
        kind = "command" if isinstance(dispatch.message, Command) else "query"
        facts = {"leftfold.kind": kind, "leftfold.name": dispatch.name}
        begun, told = monotonic(), "raised"
        # The texts of exceptions may quote data: their types are told.
        with self._tracer.start_as_current_span(
            f"{kind} {dispatch.name}",
            attributes=facts,
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            if kind == "command":
                span.set_attribute("leftfold.command_id", str(dispatch.command_id))
            try:
                outcome = await call_next(dispatch)
                told = type(outcome.error).__name__ if isinstance(outcome, Err) else "ok"
            except BaseException as error:
                told = type(error).__name__
                span.set_status(Status(StatusCode.ERROR, told))
                raise
            finally:
                span.set_attribute("leftfold.outcome", told)
                self._dispatches.record(monotonic() - begun, {**facts, "leftfold.outcome": told})
            return outcome

    def page(self, reader: Reader, events: int, seconds: float) -> None:
        """Tell of a page that was taken in."""
        name = full_name(reader.name, reader.version)
        facts = {"leftfold.view": name}
        end = int(epoch_seconds() * 1e9)
        span = self._tracer.start_span(
            f"page {name}",
            attributes={**facts, "leftfold.events": events},
            start_time=end - int(seconds * 1e9),
        )
        span.end(end)
        self._pages.record(seconds, facts)
        self._events.add(events, facts)

    def watch(self, health: Callable[[], Health], counters: Mapping[str, Iterable[str]]) -> None:
        """Tell the health of a runtime whenever metrics are read, for as long as it is open.

        `counters` are the names of those that parts have, by the parts' kinds.
        """
        if self._is_watching:  # the runtime was opened again
            return
        self._is_watching = True
        asked = weakref.WeakMethod(health) if hasattr(health, "__self__") else lambda: health

        def now() -> Health | None:
            ask = asked()
            with suppress(NotRunningError):
                return ask() if ask is not None else None
            return None

        def lags(_: CallbackOptions) -> Iterable[Observation]:
            found = now()
            for view in found.projections if found is not None else ():
                yield Observation(view.lag, {"leftfold.view": full_name(view.name, view.version)})

        def states(_: CallbackOptions) -> Iterable[Observation]:
            found = now()
            for part in found.parts if found is not None else ():
                if part.state in STATES:
                    yield Observation(STATES[part.state], {"leftfold.part": part.name})

        self._meter.create_observable_gauge("leftfold.view.lag", [lags])
        self._meter.create_observable_gauge("leftfold.breaker.state", [states])
        for kind, names in counters.items():
            for name in names:
                self._meter.create_observable_counter(
                    f"leftfold.{kind}.{name}", [_counts(now, kind, name)]
                )


def _counts(
    now: Callable[[], Health | None], kind: str, name: str
) -> Callable[[CallbackOptions], Iterable[Observation]]:
    def counts(_: CallbackOptions) -> Iterable[Observation]:
        found = now()
        for part in found.parts if found is not None else ():
            if part.kind == kind and name in part.counters:
                yield Observation(part.counters[name], {"leftfold.part": part.name})

    return counts
