"""The keys that a process has at hand, to seal and open personal data."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from weakref import WeakValueDictionary

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from eventsourcing.persistence import OperationalError

from leftfold.application import KeysUnavailable
from leftfold.domain.personal import Keys, PersonalDataErased
from leftfold.infrastructure.platform import Lock, monotonic
from leftfold.infrastructure.stores.keys import TOGETHER, KeyStore, StoredKey

NONCE = 12
"""Bytes that AES-GCM needs anew for each value; drawn by chance, they do not repeat."""
AT_HAND = 100_000
"""Keys kept in memory."""


class SubjectKey:
    """A key in this process; it is good for nothing once it is dropped."""

    __slots__ = ("__weakref__", "_cipher", "_ring", "id", "subject")

    def __init__(self, key_id: str, subject: str, secret: bytes | None, ring: Keyring) -> None:
        """Hold a key; without its secret it is one that is gone."""
        self.id = key_id
        self.subject = subject
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

    What others forget is asked for again and again by `refresh`. If that fails for `lifetime`
    seconds, nothing is opened until it succeeds: somebody may have been forgotten meanwhile.
    """

    def __init__(
        self, store: KeyStore, lifetime: float, clock: Callable[[], float] = monotonic
    ) -> None:
        """Use the keys of a store."""
        self._store = store
        self._lifetime = lifetime
        self._clock = clock
        self._turn = Lock()
        self._seen: int | None = None  # None: the store was not asked for anything yet
        self._good_until = 0.0
        self._gone: set[str] = set()
        self._alive: WeakValueDictionary[str, SubjectKey] = WeakValueDictionary()
        self._kept: dict[str, SubjectKey] = {}  # by subject
        self._found: dict[str, SubjectKey] = {}  # by name

    def of(self, subject: str) -> SubjectKey | None:
        """Return a subject's key if it is at hand; never blocks."""
        key = self._kept.get(subject)
        return None if key is None or key.is_gone else key

    def provide(self, subjects: Iterable[str]) -> None:
        """Have the keys of subjects at hand. Raises `OperationalError`."""
        wanted = [subject for subject in subjects if self.of(subject) is None]
        self._begin()
        for begin in range(0, len(wanted), TOGETHER):
            self._add(self._store.provide(wanted[begin : begin + TOGETHER]))

    def find(self, key_id: str) -> SubjectKey:
        """Return a key by its name, also one that is gone. Raises `OperationalError`."""
        key = self._found.get(key_id) or self._alive.get(key_id)
        if key is None:
            self._begin()
            self._add(self._store.find(key_id))
            with self._turn:
                key = self._alive.get(key_id) or SubjectKey(key_id, "", None, self)
                _keep(self._found, key_id, key)
        return key

    def forget(self, subject: str) -> bool:
        """Erase all that is sealed for a subject; tell whether there was anything.

        In other processes it is gone after their next `refresh`. Raises `KeysUnavailable`.
        """
        try:
            self._begin()
            gone = self._store.forget(subject)
        except OperationalError as error:
            raise KeysUnavailable(str(error)) from None
        self._drop(gone)
        return bool(gone)

    def refresh(self) -> None:
        """Drop what others have forgotten. Raises `OperationalError`."""
        if self._seen is not None:
            asked = self._clock()
            gone, self._seen = self._store.forgotten(self._seen)
            self._drop(gone)
            self._good_until = asked + self._lifetime

    def check(self) -> None:
        """Raise `KeysUnavailable` if others may have forgotten what is at hand."""
        if self._clock() > self._good_until:
            raise KeysUnavailable("what was forgotten since is not known")

    def close(self) -> None:
        """Close the store."""
        self._store.close()

    def _begin(self) -> None:
        if self._seen is None:
            asked = self._clock()
            _, self._seen = self._store.forgotten(-1)
            self._good_until = asked + self._lifetime

    def _add(self, stored: Iterable[StoredKey]) -> None:
        with self._turn:
            for key_id, subject, secret in stored:
                # Somebody may have forgotten it after it was read.
                if key_id not in self._gone and key_id not in self._alive:
                    key = SubjectKey(key_id, subject, secret, self)
                    self._alive[key_id] = key
                    _keep(self._found, key_id, key)
                    _keep(self._kept, subject, key)

    def _drop(self, gone: Iterable[str]) -> None:
        with self._turn:
            for key_id in gone:
                self._gone.add(key_id)
                key = self._alive.get(key_id)
                if key is not None:
                    key.drop()


def _keep(keys: dict[str, SubjectKey], name: str, key: SubjectKey) -> None:
    """Keep a key; those that came first go first: to look one up must cost next to nothing."""
    while len(keys) >= AT_HAND:
        del keys[next(iter(keys))]
    keys[name] = key
