"""The keys that a process has at hand, to seal and open personal data."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import ParamSpec, TypeVar
from weakref import WeakValueDictionary

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from eventsourcing.persistence import OperationalError

from leftfold.application import InvalidSubject, KeysUnavailable
from leftfold.domain.personal import Keys, PersonalDataErased
from leftfold.infrastructure.platform import Lock, monotonic
from leftfold.infrastructure.stores.keys import TOGETHER, KeyStore, StoredKey

P = ParamSpec("P")
T = TypeVar("T")

NONCE = 12
"""Bytes that AES-GCM needs anew for each value; drawn by chance, they do not repeat."""
AT_HAND = 100_000
"""Keys kept in memory, at least while nothing is sealed under them there."""
LONGEST = 2_000
"""Bytes of a subject as UTF-8: an index of PostgreSQL takes little more."""


class SubjectKey:
    """A key in this process; it is good for nothing once it is dropped."""

    __slots__ = ("__weakref__", "_cipher", "_ring", "id")

    def __init__(self, key_id: str, secret: bytes | None, ring: Keyring) -> None:
        """Hold a key; without its secret it is one that is gone."""
        self.id = key_id
        self._cipher = None if secret is None else AESGCM(secret)
        self._ring = ring

    def encrypt(self, plain: bytes) -> bytes:
        """Seal something. Raises `PersonalDataErased`, `KeysUnavailable`."""
        nonce = os.urandom(NONCE)
        return nonce + self._usable().encrypt(nonce, plain, None)

    def decrypt(self, sealed: bytes) -> bytes:
        """Open what was sealed. Raises `PersonalDataErased`, `KeysUnavailable`."""
        return self._usable().decrypt(sealed[:NONCE], sealed[NONCE:], None)

    def drop(self) -> None:
        """Be good for nothing from now on."""
        self._cipher = None

    @property
    def is_gone(self) -> bool:
        """Its subject was forgotten."""
        return self._cipher is None

    def _usable(self) -> AESGCM:
        self._ring.check()
        if self._cipher is None:
            raise PersonalDataErased
        return self._cipher


class Keyring(Keys):
    """The keys that a process has at hand.

    There is one object a key, as long as anything is sealed under it here: to drop that is to
    erase all. What others forget is asked for again and again by `refresh`. If that fails for
    `lifetime` seconds, nothing is opened until it succeeds: somebody may have been forgotten
    meanwhile. What asks the store raises `KeysUnavailable` if it does not answer.
    """

    def __init__(
        self, store: KeyStore, lifetime: float, clock: Callable[[], float] = monotonic
    ) -> None:
        """Use the keys of a store."""
        self._store = store
        self._lifetime = lifetime
        self._clock = clock
        self._turn = Lock()
        self._seen: int | None = None  # None: what was forgotten is not asked for yet
        self._good_until = 0.0
        self._gone: set[str] = set()  # the names of all that were forgotten
        self._by_name: WeakValueDictionary[str, SubjectKey] = WeakValueDictionary()
        self._by_subject: WeakValueDictionary[str, SubjectKey] = WeakValueDictionary()
        self._kept: dict[str, SubjectKey] = {}  # by name: keeps alive what may be wanted again

    def open(self, *, create_tables: bool) -> None:
        """Prepare the store. Raises `StoreUnavailableError`."""
        self._store.open(create_tables=create_tables)

    def of(self, subject: str) -> SubjectKey | None:
        """Return a subject's key if it is at hand; never blocks."""
        if self._seen is None:
            return None
        key = self._by_subject.get(subject)
        return None if key is None or key.is_gone else key

    def provide(self, subjects: Iterable[str]) -> None:
        """Have the keys of subjects at hand. Raises `InvalidSubject`, `KeysUnavailable`."""
        wanted = [_checked(subject) for subject in subjects if self.of(subject) is None]
        self._begin()
        for begin in range(0, len(wanted), TOGETHER):
            self._add(self._ask(self._store.provide, wanted[begin : begin + TOGETHER]))

    def find(self, key_id: str) -> SubjectKey:
        """Return a key by its name, also one that is gone. Raises `KeysUnavailable`."""
        key = self._kept.get(key_id)
        if key is None or self._seen is None:
            self._begin()
            key = self._by_name.get(key_id)
        if key is None:
            if key_id not in self._gone:
                self._add(self._ask(self._store.find, key_id))
            with self._turn:
                key = self._by_name.get(key_id) or self._hold(SubjectKey(key_id, None, self))
        return key

    def forget(self, subject: str) -> bool:
        """Erase all that is sealed for a subject; tell whether there was anything.

        In other processes it is gone after their next `refresh`. Raises `InvalidSubject`,
        `KeysUnavailable`.
        """
        _checked(subject)
        gone = self._ask(self._store.forget, subject)
        self._drop(gone)
        self._learn()  # another process may have been first
        return bool(gone)

    def refresh(self) -> None:
        """Drop what others have forgotten. Raises `KeysUnavailable`."""
        if self._seen is not None or self._by_name:
            self._learn()

    def check(self) -> None:
        """Raise `KeysUnavailable` if others may have forgotten what is at hand."""
        if self._clock() > self._good_until:
            raise KeysUnavailable("what was forgotten since is not known")

    def cut(self, seconds: float) -> None:
        """End a call that the store has not answered for so long."""
        self._store.cut(seconds)

    def close(self) -> None:
        """Close the store. Who uses the keys again learns first what was forgotten meanwhile."""
        self._seen = None
        self._store.close()

    def _begin(self) -> None:
        if self._seen is None:
            self._learn()

    def _learn(self) -> None:
        asked = self._clock()
        gone, seen = self._ask(self._store.forgotten, -1 if self._seen is None else self._seen)
        self._drop(gone)
        self._seen = seen
        self._good_until = asked + self._lifetime

    def _ask(self, question: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return question(*args, **kwargs)
        except OperationalError as error:
            raise KeysUnavailable(str(error)) from None

    def _add(self, stored: Iterable[StoredKey]) -> None:
        with self._turn:
            for key_id, subject, secret in stored:
                # Somebody may have forgotten it after it was read.
                if key_id not in self._gone:
                    key = self._by_name.get(key_id) or SubjectKey(key_id, secret, self)
                    self._by_subject[subject] = self._hold(key)

    def _hold(self, key: SubjectKey) -> SubjectKey:
        """Keep a key; those that came first go first: to look one up must cost next to nothing."""
        if key.id not in self._kept and len(self._kept) >= AT_HAND:
            del self._kept[next(iter(self._kept))]
        self._by_name[key.id] = self._kept[key.id] = key
        return key

    def _drop(self, gone: Iterable[str]) -> None:
        with self._turn:
            for key_id in gone:
                self._gone.add(key_id)
                key = self._by_name.get(key_id)
                if key is not None:
                    key.drop()


def _checked(subject: str) -> str:
    """Return what every store can keep. Raises `InvalidSubject`, which does not show it."""
    if "\0" in subject:
        raise InvalidSubject("holds a NUL character")
    try:
        length = len(subject.encode())
    except UnicodeEncodeError:
        raise InvalidSubject("holds half of a surrogate pair") from None
    if length > LONGEST:
        raise InvalidSubject(f"has more than {LONGEST} bytes")
    return subject
