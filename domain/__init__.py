"""The domain layer: aggregates, events, specifications and results. No I/O."""

from leftfold.domain.aggregate import Aggregate, Snapshot, project
from leftfold.domain.errors import (
    AggregateNotFound,
    DomainError,
    InvalidAggregateError,
    LeftfoldError,
)
from leftfold.domain.event import WHEN_RECORDED, Created, DomainEvent, Event
from leftfold.domain.metadata import InvalidMetadataError, Metadata
from leftfold.domain.personal import ERASED, Personal, PersonalDataErased
from leftfold.domain.result import Err, Ok, Result
from leftfold.domain.specification import (
    ALWAYS,
    NEVER,
    Explanation,
    InvalidSpecification,
    InvalidValue,
    OpaqueSpecification,
    PrivateAttribute,
    Specification,
    UnknownAttribute,
    UnlikeTypes,
    all_of,
    any_of,
    attr,
    satisfies,
)

__all__ = [
    "ALWAYS",
    "ERASED",
    "NEVER",
    "WHEN_RECORDED",
    "Aggregate",
    "AggregateNotFound",
    "Created",
    "DomainError",
    "DomainEvent",
    "Err",
    "Event",
    "Explanation",
    "InvalidAggregateError",
    "InvalidMetadataError",
    "InvalidSpecification",
    "InvalidValue",
    "LeftfoldError",
    "Metadata",
    "Ok",
    "OpaqueSpecification",
    "Personal",
    "PersonalDataErased",
    "PrivateAttribute",
    "Result",
    "Snapshot",
    "Specification",
    "UnknownAttribute",
    "UnlikeTypes",
    "all_of",
    "any_of",
    "attr",
    "project",
    "satisfies",
]
