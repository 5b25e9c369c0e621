"""Snapshots: where the replay of a long stream may begin."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import get_type_hints

from leftfold.application.errors import InvalidModelError
from leftfold.application.fingerprints import code_of, digest, sorted_text
from leftfold.domain import Aggregate


@dataclass(frozen=True, slots=True)
class SnapshotPolicy:
    """When the state of an aggregate is kept; at least one of both is given."""

    every: int | None = None
    """Events: it is kept each time so many more were recorded or replayed."""
    seconds: float | None = None
    """It is kept when reading and replaying took longer."""

    def __post_init__(self) -> None:
        """Check it. Raises `InvalidModelError`."""
        given = [bound for bound in (self.every, self.seconds) if bound is not None]
        if not given or min(given) <= 0:
            raise InvalidModelError("a snapshot policy is made of numbers above 0")

    def is_due_at(self, before: int, version: int) -> bool:
        """Tell whether to keep an aggregate that events have brought from a version to another."""
        return self.every is not None and before // self.every < version // self.every

    def is_due_after(self, events: int, seconds: float) -> bool:
        """Tell whether to keep an aggregate whose replay was so dear."""
        return (self.every is not None and events >= self.every) or (
            self.seconds is not None and seconds > self.seconds
        )


@cache
def shape_of(aggregate_type: type[Aggregate]) -> str:
    """Return a fingerprint of what an aggregate's state is made of, and how; all processes agree.

    It is another when an attribute changes, an event's fields, their defaults or its version, an
    upcaster, or the code of an `apply`; of what these call, functions of the same module are looked
    at. Other versions of Python may see another.
    """
    parts = [sorted_text(get_type_hints(aggregate_type))]
    for event in aggregate_type.EVENTS:
        facts = {n: (field.annotation, field.default) for n, field in event.model_fields.items()}
        parts += [event.TOPIC, str(event.class_version), sorted_text(facts)]
        parts += code_of(event.apply)
        for step in range(1, event.class_version):
            parts += code_of(getattr(event, f"upcast_v{step}_v{step + 1}", None))
    return digest(parts)
