"""What can be wrong with the surroundings: settings, stores, files."""

from __future__ import annotations

from leftfold.domain import LeftfoldError


class InfrastructureError(LeftfoldError):
    """The surroundings do not fit; the message says what to change."""


class InvalidSettingsError(InfrastructureError, message="setting {name}: {reason}"):
    """A setting, given as an argument or in the environment, cannot be used."""

    name: str
    reason: str


class MissingPackageError(
    InfrastructureError, message="{feature} needs a package: pip install 'leftfold[{extra}]'"
):
    """An optional package is not installed."""

    feature: str
    extra: str


class StoreUnavailableError(InfrastructureError, message="cannot open the store {store}: {reason}"):
    """The database cannot be opened or reached."""

    store: str
    reason: str


class SchemaMissingError(
    InfrastructureError,
    message="{store} has no table {table}, and create_tables is off: "
    "run `leftfold migrate`, for a model of your own with `--model`",
):
    """Tables are missing and may not be made."""

    store: str
    table: str


class SchemaVersionError(
    InfrastructureError, message="{store} has schema version {found}, this leftfold needs {needed}"
):
    """The store was made by another version of leftfold."""

    store: str
    found: int
    needed: int


class ViewChangedError(
    InfrastructureError,
    message="{projection} was made as ({found}) and is now ({now}): give it a new version",
):
    """What a projection holds, reads or shows was changed without a new version."""

    projection: str
    found: str
    now: str


class ValueOutOfRangeError(
    InfrastructureError, message="{column} of {projection}: {value} cannot be kept: {reason}"
):
    """A row holds a value that the databases cannot keep exactly."""

    projection: str
    column: str
    value: str
    reason: str


class ForkedRuntimeError(
    InfrastructureError,
    message="this runtime belongs to process {owner}: after a fork, open one of your own",
):
    """A runtime was used in a child process that inherited it by fork."""

    owner: int


class NotRunningError(
    InfrastructureError,
    message="the runtime is not open: use `async with`, or `with` if it is blocking",
):
    """A runtime was used before it was opened, or after it was closed."""


class ProjectionFailedError(
    InfrastructureError, message="projection {projection} stopped: {reason}"
):
    """A projection met an event that it cannot fold."""

    projection: str
    reason: str


class ReactionConflictError(
    InfrastructureError,
    message="{projection}: others have written what the reaction would begin with",
):
    """What a process records does not follow on what is stored of its aggregates."""

    projection: str


class TooManyDeadLettersError(
    InfrastructureError, message="{projection} has {limit} dead letters or more"
):
    """So much could not be taken in that it must be the reader that is at fault."""

    projection: str
    limit: int


class ViewBusyError(
    InfrastructureError, message="{projection} is being changed by others; nothing was changed here"
):
    """Pages follow on each other's heels, or another process builds the same view anew."""

    projection: str


class ViewInUseError(InfrastructureError, message="{view} is still kept up to date"):
    """A version of a view cannot be dropped while somebody uses it."""

    view: str


class CacheUnavailableError(InfrastructureError, message="the cache {cache} failed: {reason}"):
    """A cache outside this process cannot be reached; what was asked of it may not be done."""

    cache: str
    """Its address, with no password."""
    reason: str
