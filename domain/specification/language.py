"""Specifications as sentences: `on_hand < 10 and name contains 'HEART'`, written and read."""

from __future__ import annotations

import re
from datetime import date, datetime
from decimal import Decimal
from typing import Any, TypeVar
from uuid import UUID

from leftfold.domain.specification.tree import (
    All,
    AnyOf,
    Attribute,
    Compare,
    Not,
    Opaque,
    Specification,
    expand,
)

T = TypeVar("T")

KEYWORDS = {
    *("and", "or", "not", "is", "in", "none", "true", "false", "always", "never", "between"),
    *("contains", "starts", "ends", "with", "datetime", "date", "uuid"),
}
NAME = re.compile(r"[^\W\d]\w*")
"""Names that a sentence has without quotes; some of Python's are not among them."""


def sentence(specification: Specification[Any]) -> str:
    """Return the specification as a sentence, which `parse` reads unless a callable is in it."""
    return _write(expand(specification), 0)


def _write(node: Specification[Any], binding: int) -> str:
    """Write a node; in parentheses if it binds less than where it stands (or 0, and 1, not 2)."""
    match node:
        case All(()):
            return "always"
        case AnyOf(()):
            return "never"
        case AnyOf((part,)) | All((part,)):
            return _write(expand(part), binding)
        case AnyOf(parts):
            text = " or ".join(_write(expand(part), 1) for part in parts)
            return f"({text})" if binding > 0 else text
        case All(parts):
            text = " and ".join(_write(expand(part), 2) for part in parts)
            return f"({text})" if binding > 1 else text
        case Not(part):
            return f"not {_write(expand(part), 2)}"
        case Opaque(_, name):
            return f"<{name}>"
        case Compare(left, sign, right):
            return _write_leaf(left, sign, right)
    raise TypeError(node)  # pragma: no cover - those are all nodes


def _write_leaf(left: Attribute, sign: str, right: object) -> str:
    path = _write_path(left)
    if right is None:
        return {"==": f"{path} is none", "!=": f"{path} is not none"}.get(
            sign, f"{path} {sign} none"
        )
    if isinstance(right, Attribute):
        return f"{path} {sign} {_write_path(right)}"
    if isinstance(right, tuple):
        return f"{path} in ({', '.join(map(_write_value, right))})"
    return f"{path} {sign} {_write_value(right)}"


def _write_path(attribute: Attribute) -> str:
    names = attribute.path.split(".")
    return ".".join(n if n not in KEYWORDS and NAME.fullmatch(n) else f'"{n}"' for n in names)


def _write_value(value: object) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case Decimal():
            text = f"{value:f}"
            return text if "." in text else f"{text}.0"
        case float():
            text = repr(value)
            return text if "e" in text else f"{text}e0"
        case str():
            return _quoted(value)
        case datetime():
            return f"datetime {_quoted(value.isoformat())}"
        case date():
            return f"date {_quoted(value.isoformat())}"
        case UUID():
            return f"uuid {_quoted(str(value))}"
        case _:
            return str(value)


def _quoted(text: str) -> str:
    doubled = text.replace("'", "''")
    return f"'{doubled}'"
