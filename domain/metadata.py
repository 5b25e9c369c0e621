"""Metadata: who wanted what an event records, and which conversation it belongs to."""

from __future__ import annotations

from contextvars import ContextVar, Token
from dataclasses import dataclass

from leftfold.domain.errors import LeftfoldError


class InvalidMetadataError(LeftfoldError, message="{name} is no text that can be stored"):
    """Metadata is not text, or holds NUL or half of a surrogate pair: an error in the program."""

    name: str


@dataclass(frozen=True, slots=True)
class Metadata:
    """What stands beside an event's facts. Empty texts stand for "not known"."""

    correlation_id: str = ""
    """Names the conversation: the same for all that follows from one request."""
    causation_id: str = ""
    """Names what caused the event; the id of its command, unless another cause is given."""
    user: str = ""
    """Names who wanted it; not personal data: this is never encrypted and never erased."""

    def check(self) -> Metadata:
        """Return it. Raises `InvalidMetadataError` if it could not be stored and read again."""
        for name in self.__slots__:
            text = getattr(self, name)
            if not isinstance(text, str) or "\0" in text or not _is_encodable(text):
                raise InvalidMetadataError(name)
        return self


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


NO_METADATA = Metadata()
_current: ContextVar[Metadata] = ContextVar("leftfold_metadata", default=NO_METADATA)


def current() -> Metadata:
    """Return what events that are recorded now get."""
    return _current.get()


def use(metadata: Metadata) -> Token[Metadata]:
    """Let events get this, in this thread or task only, until `restore` of the token."""
    return _current.set(metadata)


def restore(token: Token[Metadata]) -> None:
    """Let events get what they got before `use`."""
    _current.reset(token)
