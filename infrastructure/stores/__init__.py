"""Stores: one adapter a database, chosen by URL."""

from __future__ import annotations

from typing import Any

from eventsourcing.persistence import (
    AggregateRecorder,
    ApplicationRecorder,
    InfrastructureFactory,
    Mapper,
    ProcessRecorder,
    TrackingRecorder,
    Transcoder,
)
from eventsourcing.utils import Environment, EnvType

from leftfold.application import EventMapper, InvalidModelError
from leftfold.application.ports import Store
from leftfold.domain.personal import Keys
from leftfold.infrastructure.errors import InvalidSettingsError, MissingPackageError
from leftfold.infrastructure.settings import Settings, masked
from leftfold.infrastructure.stores.memory import MemoryStore

__all__ = ["SharedLog", "make_store"]


def make_store(settings: Settings) -> Store:
    """Return the store that the settings name, not yet open.

    Raises `InvalidSettingsError` for a URL of no known form or a malformed one,
    `MissingPackageError` for a database whose driver is not installed.
    """
    url = settings.store
    if "\0" in url:
        raise InvalidSettingsError("store", "holds a NUL character")
    if url == MemoryStore.name:
        return MemoryStore()
    if url.startswith("sqlite:///") and len(url) > len("sqlite:///"):
        from leftfold.infrastructure.stores.sqlite import SQLiteStore

        if url == "sqlite:///:memory:":
            raise InvalidSettingsError("store", "a store in memory is memory:")
        return SQLiteStore(url.removeprefix("sqlite:///"), settings.lock_timeout)
    if url.startswith(("postgresql://", "postgres://")):
        try:
            from leftfold.infrastructure.stores.postgres import PostgresStore
        except ImportError:
            raise MissingPackageError("PostgreSQL", "postgres") from None
        return PostgresStore(url, settings.lock_timeout)
    known = "memory:, sqlite:///path, postgresql://…"
    raise InvalidSettingsError("store", f"{masked(url)!r} is none of {known}")


class SharedLog(InfrastructureFactory[Any]):
    """Gives every service of a runtime the store's one recorder.

    Left to itself the library makes one table an application on PostgreSQL, one recorder an
    application in memory, and on SQLite one table whose followers share their tracking.
    """

    def __init__(
        self,
        recorder: Any,  # one of our recorders; the library has no common type
        keys: Keys | None = None,
        env: EnvType | None = None,
    ) -> None:
        super().__init__(Environment(env=env))
        self._recorder = recorder
        self._keys = keys

    def mapper(
        self,
        transcoder: Transcoder | None = None,
        mapper_class: type[Mapper[Any]] | None = None,
    ) -> Mapper[Any]:
        mapper = super().mapper(transcoder, mapper_class)
        if isinstance(mapper, EventMapper):
            mapper.keys = self._keys
        return mapper

    def application_recorder(self) -> ApplicationRecorder:
        recorder: ApplicationRecorder = self._recorder
        return recorder

    def process_recorder(self) -> ProcessRecorder:
        recorder: ProcessRecorder = self._recorder
        return recorder

    def tracking_recorder(
        self,
        tracking_recorder_class: type[Any] | None = None,  # noqa: ARG002 - there is only ours
    ) -> TrackingRecorder:
        recorder: TrackingRecorder = self._recorder
        return recorder

    def aggregate_recorder(self, purpose: str = "events") -> AggregateRecorder:
        raise InvalidModelError(f"a service in a runtime has no {purpose} of its own")
