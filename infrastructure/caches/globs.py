"""Globs as Redis has them: byte by byte, with `*`, `?`, `[a-c]`, `[^a]` and backslashes."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache

ANY = frozenset(range(256))


def encoded(text: str) -> bytes:
    """Return a key or a pattern as Redis gets it; half of a surrogate pair is let through."""
    return text.encode("utf-8", "surrogatepass")


def literal(text: str) -> bytes:
    """Return a pattern that fits this text alone."""
    return re.sub(rb"([*?\[\]\\^])", rb"\\\1", encoded(text))


@lru_cache(maxsize=256)
def matcher(pattern: str) -> Callable[[str], bool]:
    """Return whether a key fits a pattern, as Redis tells it, in time linear in the key.

    The rules are those of `stringmatchlen` in Redis' `util.c`: a range may be reversed; a class
    that does not end ends with the pattern; a backslash at the end stands for itself.
    """
    parts: list[bytes] = [b""]  # between the stars
    for fitting in _parse(encoded(pattern)):
        if fitting is None:
            parts.append(b"")
        else:
            parts[-1] += _one_of(fitting)
    first, *others = parts
    if others:
        *middle, last = others
        # Each part is looked for once, from the left: what it found is never given up again.
        first += b"".join(b"(?>.*?%s)" % part for part in middle if part) + b".*" + last
    fits = re.compile(first + rb"\Z", re.DOTALL).match
    return lambda key: fits(encoded(key)) is not None


def _parse(pattern: bytes) -> list[frozenset[int] | None]:
    """Return the bytes that fit at each place, None for a star."""
    found: list[frozenset[int] | None] = []
    at = 0
    while at < len(pattern):
        sign = pattern[at : at + 1]
        if sign == b"*":
            found.append(None)
        elif sign == b"?":
            found.append(ANY)
        elif sign == b"[":
            fitting, at = _parse_class(pattern, at + 1)
            found.append(fitting)
        else:
            if sign == b"\\" and at + 1 < len(pattern):
                at += 1
            found.append(frozenset(pattern[at : at + 1]))
        at += 1
    return found


def _parse_class(pattern: bytes, at: int) -> tuple[frozenset[int], int]:
    """Return the bytes of a class, and where it ends."""
    is_negated = pattern[at : at + 1] == b"^"
    at += is_negated
    fitting: set[int] = set()
    while at < len(pattern):
        left = len(pattern) - at
        if left >= 2 and pattern[at : at + 1] == b"\\":  # noqa: PLR2004 - it and another
            at += 1
            fitting.add(pattern[at])
        elif pattern[at : at + 1] == b"]":
            break
        elif left >= 3 and pattern[at + 1 : at + 2] == b"-":  # noqa: PLR2004 - as in a-c
            low, high = sorted((_signed(pattern[at]), _signed(pattern[at + 2])))
            fitting.update(byte % 256 for byte in range(low, high + 1))
            at += 2
        else:
            fitting.add(pattern[at])
        at += 1
    return (ANY - fitting if is_negated else frozenset(fitting)), at


def _signed(byte: int) -> int:
    """Return a byte as the `char` that the server compares, on most machines."""
    return byte - 256 if byte > 127 else byte  # noqa: PLR2004 - the largest of a signed byte


def _one_of(fitting: frozenset[int]) -> bytes:
    if fitting == ANY:
        return b"."
    if not fitting:
        return b"(?!)"
    return b"[" + b"".join(b"\\x%02x" % byte for byte in sorted(fitting)) + b"]"
