"""Every version of every event that was ever released can still be read."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from uuid import UUID

import pytest

from leftfold.application import EventMapper
from leftfold.domain import Personal
from leftfold.domain.items import Item, Reorder

RELEASED = json.loads((Path(__file__).parent.parent / "released" / "events.json").read_text())
MAPPER = EventMapper.of(Item, Reorder)(transcoder=None)


@pytest.mark.parametrize(
    "stored", RELEASED["events"], ids=lambda e: f"{e['topic']}.v{e['class_version']}"
)
def test_a_released_event_is_read_with_its_facts(stored):
    event = MAPPER.decode(
        UUID(stored["aggregate_id"]), stored["version"], stored["topic"], stored["state"].encode()
    )
    facts = {name: plain(value) for name, value in event.facts().items()}
    assert {name: facts[name] for name in stored["facts"]} == stored["facts"]
    assert event.metadata.user == stored["user"]


def plain(value):
    if isinstance(value, Personal):
        return value.reveal()
    return str(value) if isinstance(value, Decimal) else value


@pytest.mark.parametrize("event_type", [*Item.EVENTS, *Reorder.EVENTS], ids=lambda e: e.TOPIC)
def test_every_present_version_is_among_the_released(event_type):
    released = {(e["topic"], e["class_version"]) for e in RELEASED["events"]}
    versions = range(1, event_type.class_version + 1)
    topics = (event_type.TOPIC, *event_type.ALIASES)
    for version in versions:
        assert any((topic, version) in released for topic in topics), (
            f"add {event_type.TOPIC} version {version} to tests/released/events.json"
        )
