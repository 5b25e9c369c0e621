"""The domain layer: aggregates, events, specifications and results. No I/O."""

from leftfold.domain.aggregate import Aggregate, Snapshot, project
from leftfold.domain.errors import AggregateNotFound, DomainError, LeftfoldError
from leftfold.domain.event import WHEN_RECORDED, Created, DomainEvent, Event
from leftfold.domain.personal import Personal
from leftfold.domain.result import Err, Ok, Result
from leftfold.domain.specification import (
    ALWAYS,
    NEVER,
    Specification,
    all_of,
    any_of,
    attr,
)

__all__ = [
    "ALWAYS",
    "NEVER",
    "WHEN_RECORDED",
    "Aggregate",
    "AggregateNotFound",
    "Created",
    "DomainError",
    "DomainEvent",
    "Err",
    "Event",
    "LeftfoldError",
    "Ok",
    "Personal",
    "Result",
    "Snapshot",
    "Specification",
    "all_of",
    "any_of",
    "attr",
    "project",
]
