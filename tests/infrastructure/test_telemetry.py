"""Spans and metrics: what a runtime does is told, and never what it is about."""

from __future__ import annotations

import asyncio
import json

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from leftfold.application import cached
from leftfold.application.items import GetItem, ItemRow, item_model
from leftfold.infrastructure import CircuitBreaker, InMemoryCache, Runtime
from leftfold.infrastructure.telemetry import Telemetry

pytestmark = pytest.mark.anyio


class Told:
    """What OpenTelemetry was told."""

    def __init__(self):
        self._exporter = InMemorySpanExporter()
        self._reader = InMemoryMetricReader()
        tracers = TracerProvider()
        tracers.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.telemetry = Telemetry(tracers, MeterProvider([self._reader]))

    @property
    def spans(self):
        return self._exporter.get_finished_spans()

    @property
    def metrics(self):
        data = self._reader.get_metrics_data()
        found = {}
        for resource in data.resource_metrics if data is not None else ():
            for scope in resource.scope_metrics:
                found.update({metric.name: metric.data.data_points for metric in scope.metrics})
        return found


@pytest.fixture
def told():
    return Told()


async def test_commands_and_queries_are_spans_with_their_outcome(store_url, told, register, sell):
    async with Runtime(item_model, store_url, telemetry=told.telemetry) as shop:
        receipt = (await shop.commands.dispatch(register("A", 2))).unwrap()
        await shop.commands.dispatch(sell("A", 5))
        await shop.queries.dispatch(GetItem(sku="A"), after=receipt)
    spans = {span.name: span for span in told.spans}
    assert spans["command RegisterItem"].attributes["leftfold.outcome"] == "ok"
    assert spans["command SellStock"].attributes["leftfold.outcome"] == "InsufficientStock"
    assert spans["query GetItem"].attributes["leftfold.outcome"] == "ok"
    command_id = spans["command RegisterItem"].attributes["leftfold.command_id"]
    assert command_id == str(receipt.command_id)
    durations = told.metrics["leftfold.dispatch.duration"]
    assert sorted((p.attributes["leftfold.name"], p.count) for p in durations) == [
        ("GetItem", 1),
        ("RegisterItem", 1),
        ("SellStock", 1),
    ]


async def test_pages_are_told_with_their_events(store_url, told, register):
    async with Runtime(item_model, store_url, telemetry=told.telemetry) as shop:
        await shop.commands.dispatch_all([register(f"S{n}") for n in range(7)])
        (await shop.catch_up()).unwrap()
        await asyncio.sleep(0.05)  # it is told after those who wait for the page
        pages = [span for span in told.spans if span.name == "page item_stock_v1"]
        assert sum(span.attributes["leftfold.events"] for span in pages) == 7
        assert all(span.start_time <= span.end_time for span in pages)
        metrics = told.metrics
        assert {point.value for point in metrics["leftfold.page.events"]} == {7}
        assert {point.value for point in metrics["leftfold.view.lag"]} == {0}


async def test_breakers_and_caches_are_told_while_the_runtime_is_open(told, register):
    cache, breaker = InMemoryCache(ItemRow, name="rows"), CircuitBreaker(1, 30.0, name="mail")
    async with Runtime(
        item_model,
        "memory:",
        middleware=[cached(GetItem, cache, 60)],
        watched=[cache, breaker],
        telemetry=told.telemetry,
    ) as shop:
        receipt = (await shop.commands.dispatch(register("A"))).unwrap()
        for _ in range(3):
            await shop.queries.dispatch(GetItem(sku="A"), after=receipt)
        breaker.isolate()
        metrics = told.metrics
        states = {p.attributes["leftfold.part"]: p.value for p in metrics["leftfold.breaker.state"]}
        assert states == {"memory:": 0, "mail": 2}
        assert [p.value for p in metrics["leftfold.cache.hits"]] == [2]
        assert [p.value for p in metrics["leftfold.cache.loads"]] == [1]
    assert "leftfold.view.lag" not in told.metrics


async def test_a_bug_is_told_by_its_type_alone(told, register):
    async def broken(dispatch, call_next):
        raise ZeroDivisionError("s3cret")

    async with Runtime(
        item_model, "memory:", middleware=[broken], telemetry=told.telemetry
    ) as shop:
        with pytest.raises(ZeroDivisionError):
            await shop.commands.dispatch(register("SKU-s3cret"))
    (span,) = told.spans
    assert span.attributes["leftfold.outcome"] == "ZeroDivisionError"
    assert not span.status.is_ok
    assert "s3cret" not in json.dumps([span.to_json() for span in told.spans])
