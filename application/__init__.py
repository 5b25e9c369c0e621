"""The application layer: commands, queries, services, projections, and the ports they need."""

from leftfold.application.bus import (
    CommandBus,
    Dispatch,
    Middleware,
    QueryBus,
    Step,
    described,
)
from leftfold.application.caching import (
    CacheEntry,
    CacheProvider,
    InvalidCacheArgumentError,
    Loaded,
    NotKept,
    cached,
)
from leftfold.application.errors import (
    AlreadyHandledError,
    CommandIdReused,
    Conflict,
    DispatchError,
    DispatchOverError,
    EventStoreUnavailable,
    InvalidAnswerError,
    InvalidModelError,
    InvalidSubject,
    KeysUnavailable,
    NestedDispatchError,
    NoHandlerError,
    OutcomeUnknown,
    Overloaded,
    ShuttingDown,
    UnknownTopicError,
    UnreadableEventError,
    UnsavedEventsError,
    ValidationFailed,
    ViewBehind,
    ViewStopped,
)
from leftfold.application.mapper import EventMapper
from leftfold.application.messages import Command, CommandHandler, Handling, Query, QueryHandler
from leftfold.application.model import Model
from leftfold.application.planning import Plan, plan
from leftfold.application.projection import Page, Projection
from leftfold.application.reading import Histories, QueryService, Views
from leftfold.application.receipt import Receipt
from leftfold.application.service import Repository, Service
from leftfold.application.snapshots import SnapshotPolicy

__all__ = [
    "AlreadyHandledError",
    "CacheEntry",
    "CacheProvider",
    "Command",
    "CommandBus",
    "CommandHandler",
    "CommandIdReused",
    "Conflict",
    "Dispatch",
    "DispatchError",
    "DispatchOverError",
    "EventMapper",
    "EventStoreUnavailable",
    "Handling",
    "Histories",
    "InvalidAnswerError",
    "InvalidCacheArgumentError",
    "InvalidModelError",
    "InvalidSubject",
    "KeysUnavailable",
    "Loaded",
    "Middleware",
    "Model",
    "NestedDispatchError",
    "NoHandlerError",
    "NotKept",
    "OutcomeUnknown",
    "Overloaded",
    "Page",
    "Plan",
    "Projection",
    "Query",
    "QueryBus",
    "QueryHandler",
    "QueryService",
    "Receipt",
    "Repository",
    "Service",
    "ShuttingDown",
    "SnapshotPolicy",
    "Step",
    "UnknownTopicError",
    "UnreadableEventError",
    "UnsavedEventsError",
    "ValidationFailed",
    "ViewBehind",
    "ViewStopped",
    "Views",
    "cached",
    "described",
    "plan",
]
