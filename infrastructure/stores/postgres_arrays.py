"""Arrays as PostgreSQL reads them, packed at once: the driver packs each element by itself.

The form is that of the server's `array_recv`: dimensions, whether there are nulls, the type of the
elements; of the dimension its length and first index; then each element with its length in bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, repeat
from struct import Struct, pack, unpack_from

from psycopg.abc import AdaptContext
from psycopg.adapt import Dumper
from psycopg.pq import Format

_HEADER = Struct(">iiIii")
_LENGTH = Struct(">i")
_NULL = _LENGTH.pack(-1)
_UUID_LENGTH = _LENGTH.pack(16)
BYTEA, BIGINT, TEXT, INT, UUIDS = 17, 20, 25, 23, 2950


class Packed(bytes):
    """An array in its binary form; the statement says of what type."""


class _PackedDumper(Dumper):
    format = Format.BINARY
    oid = 0

    def dump(self, obj: Packed) -> bytes:
        return obj


def take_packed(context: AdaptContext) -> None:
    """Let a connection take packed arrays."""
    context.adapters.register_dumper(Packed, _PackedDumper)


def uuids(values: Sequence[int]) -> Packed:
    """Pack ids, by their numbers."""
    return _packed(UUIDS, len(values), [_UUID_LENGTH + value.to_bytes(16) for value in values])


def texts(values: Sequence[str]) -> Packed:
    """Pack texts."""
    return byteas([value.encode() for value in values], TEXT)


def byteas(values: Sequence[bytes | None], kind: int = BYTEA) -> Packed:
    """Pack bytes."""
    parts: list[bytes] = []
    for value in values:
        parts += (_NULL,) if value is None else (_LENGTH.pack(len(value)), value)
    return _packed(kind, len(values), parts, has_nulls=None in values)


def ints(values: Sequence[int]) -> Packed:
    """Pack numbers of 32 bits."""
    elements = pack(f">{2 * len(values)}i", *chain(*zip(repeat(4), values, strict=False)))
    return _packed(INT, len(values), [elements])


def bigints(values: Sequence[int]) -> Packed:
    """Pack numbers of 64 bits."""
    elements = pack(">" + "iq" * len(values), *chain(*zip(repeat(8), values, strict=False)))
    return _packed(BIGINT, len(values), [elements])


def read_texts(packed: bytes) -> list[str]:
    """Return the texts of an array."""
    found: list[str] = []
    at = _HEADER.size
    while at < len(packed):
        (length,) = _LENGTH.unpack_from(packed, at)
        at += _LENGTH.size + length
        found.append(packed[at - length : at].decode())
    return found


def read_bigints(packed: bytes) -> tuple[int, ...]:
    """Return the numbers of an array."""
    number = max(0, len(packed) - _HEADER.size) // 12
    return unpack_from(">" + "4xq" * number, packed, _HEADER.size) if number else ()


def _packed(kind: int, length: int, parts: Sequence[bytes], *, has_nulls: bool = False) -> Packed:
    return Packed(_HEADER.pack(1, has_nulls, kind, length, 1) + b"".join(parts))
