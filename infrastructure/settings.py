"""Settings: arguments before environment before defaults."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from leftfold.infrastructure.errors import InvalidSettingsError

Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Settings(BaseSettings):
    """How a runtime runs. Each may be given in the environment as `LEFTFOLD_…`."""

    model_config = SettingsConfigDict(env_prefix="LEFTFOLD_", extra="forbid", frozen=True)

    store: str = Field(default="memory:", repr=False)
    """`memory:`, `sqlite:///path` or `postgresql://…`."""
    keys: str = Field(default="", repr=False)
    """Where the keys of personal data are kept: forms as for `store`. By default near the store:
    in memory, in `path.keys`, in the same PostgreSQL database, which a backup would keep together.
    """
    forget_within: Seconds = 5.0
    """Seconds after which what one process forgets is erased in all of them."""
    receipts_kept: Seconds = 30 * 86_400.0
    """Seconds that receipts are kept: so long a command that is repeated is not done again."""
    compressor_topic: str = ""
    """The eventsourcing library's setting: `eventsourcing.compressor:ZlibCompressor`."""
    cipher_topic: str = ""
    """The eventsourcing library's setting: `eventsourcing.cryptography:AESCipher`."""
    cipher_key: SecretStr = SecretStr("")
    """The eventsourcing library's setting: 16, 24 or 32 bytes as base64."""
    create_tables: bool = True
    """Make missing tables at start; if not, `leftfold migrate` has to."""
    memory: Annotated[int, Field(ge=1)] = 10_000
    """Idle aggregates kept in memory."""
    max_commands: Annotated[int, Field(ge=1)] = 10_000
    """Commands under way at a time, at most; further ones are answered `Overloaded`."""
    command_timeout: Seconds = 30.0
    """Seconds until a command is answered `OutcomeUnknown`."""
    view_timeout: Seconds = 5.0
    """Seconds that a query waits for a view to see its `after`."""
    conflict_attempts: Annotated[int, Field(ge=1)] = 10
    """How often a command is handled in all while others change its aggregates first."""
    follow: bool = True
    """Keep views up to date in this process; if not, `Runtime.follow` or another process has to."""
    page_size: Annotated[int, Field(ge=1, le=100_000)] = 20000
    """Events a projection folds in one transaction, at most."""
    page_seconds: Seconds = 0.25
    """Seconds that a page may take: its size adapts, so that newer events do not wait long."""
    poll_interval: Seconds = 0.1
    """Seconds between looks at the log when no hint comes."""
    lock_timeout: Annotated[int, Field(ge=1)] = 5
    """Seconds to wait for the database's write lock."""
    store_timeout: Seconds = 10.0
    """Seconds after which a call that the database has not answered is cut off, and fails."""
    drain_on_sigterm: bool = True
    """On SIGTERM finish what is under way, then let the signal end the process."""

    def __init__(self, **values: Any) -> None:
        """Read arguments, then the environment. Raises `InvalidSettingsError`, showing no value."""
        try:
            super().__init__(**values)
        except ValidationError as error:
            fault = error.errors(include_url=False, include_input=False)[0]
            name = ".".join(map(str, fault["loc"]))
            raise InvalidSettingsError(name, fault["msg"]) from None


def load_settings(**arguments: object) -> Settings:
    """Read the settings; an argument of None is not given. Raises `InvalidSettingsError`."""
    return Settings(**{name: value for name, value in arguments.items() if value is not None})


def masked(url: str) -> str:
    """Return a store's URL with its password hidden; rather too much than too little."""
    if url.startswith("sqlite:///"):
        return url
    begin = re.match(r"[\w+.-]*:?//+", url)
    scheme = begin.group() if begin else ""
    access, at, address = url.removeprefix(scheme).rpartition("@")
    if at:
        # All up to the last @ may be a password, but for a plain name before it.
        name, colon, _ = access.partition(":")
        if not re.fullmatch(r"[\w.~%+-]*", name):
            access = "***"
        elif colon:
            access = f"{name}:***"
    elif scheme:
        # Where an @ was forgotten, the password is in the port's place.
        address = re.sub(r"^([^:/?#\[]*):(?!\d*([,/?#]|$)).*", r"\1:***", address, flags=re.DOTALL)
    return re.sub(r"(?i)(password\s*=\s*)[^&]+", r"\1***", scheme + access + at + address)
