"""Snapshots: where the replay of a long stream may begin."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from types import CodeType
from typing import Any, get_type_hints

from leftfold.application.errors import InvalidModelError
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
    """Return a fingerprint of what an aggregate's state is made of, and how.

    It is another when an attribute, an event's fields or version, or the code of an `apply`
    changes; code that `apply` calls is not looked at. Other versions of Python may see another.
    """
    digest = sha256()
    parts = [_sorted(get_type_hints(aggregate_type))]
    for event in aggregate_type.EVENTS:
        facts = {name: field.annotation for name, field in event.model_fields.items()}
        parts += [event.TOPIC, str(event.class_version), _sorted(facts)]
        parts += _code(event.apply.__code__)
    for part in parts:
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:32]


def _sorted(types: Mapping[str, Any]) -> str:
    return repr(sorted((name, str(each)) for name, each in types.items()))


def _code(code: CodeType) -> Iterator[str]:
    """Yield what a function does, without where it is written."""
    yield code.co_code.hex()
    yield repr(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _code(constant)
        else:
            yield repr(constant)
