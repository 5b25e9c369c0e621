"""Specifications as JSON documents: read with limits, and nothing executed or imported."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import date, datetime
from decimal import Decimal, InvalidOperation
from typing import Any, cast
from uuid import UUID

from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from leftfold.domain.errors import LeftfoldError
from leftfold.domain.specification.tree import (
    MAX_NAME,
    SIGNS,
    TEXTUAL,
    All,
    AnyOf,
    Attribute,
    Compare,
    Named,
    Not,
    Opaque,
    Specification,
    expand,
    name_of,
)
from leftfold.domain.specification.values import SHOWN, Value, constant

MAX_DEPTH = 32
MAX_NODES = 1_000
MAX_VALUES = 10_000
MAX_TEXT = 1_000_000
"""Characters of a document, or of a sentence."""

DECIMAL = r"^-?[0-9]{1,12}(\.[0-9]{1,6})?$"


class InvalidSpecification(LeftfoldError, message="{where}: {reason}"):
    """A document or a sentence is no specification."""

    where: str
    """The place of the fault: `$.all[2].op`, or a line and column with a caret under it."""
    reason: str


class OpaqueSpecification(LeftfoldError, message="{name!r} is a callable, and has no other form"):
    """A wrapped callable can be used in Python, and nowhere else."""

    name: str


class Budget:
    """Counts a specification's nodes while it is read."""

    def __init__(self) -> None:
        self._nodes = 0

    def spend(self, where: str, depth: int) -> None:
        """Count a node at a depth from 1. Raises `InvalidSpecification` beyond a limit."""
        self._nodes += 1
        if depth > MAX_DEPTH:
            raise InvalidSpecification(where, f"more than {MAX_DEPTH} levels deep")
        if self._nodes > MAX_NODES:
            raise InvalidSpecification(where, f"more than {MAX_NODES} nodes")


def to_json(specification: Specification[Any]) -> str:
    """Return the document as text."""
    return json.dumps(to_document(specification), ensure_ascii=False)


def to_document(specification: Specification[Any]) -> dict[str, object]:
    """Return the document as plain data. Raises `OpaqueSpecification`."""
    node = expand(specification)
    document: dict[str, object]
    match node:
        case All(parts):
            document = {"all": [to_document(part) for part in parts]}
        case AnyOf(parts):
            document = {"any": [to_document(part) for part in parts]}
        case Not(part):
            document = {"not": to_document(part)}
        case Compare(left, sign, right):
            operand: object
            if isinstance(right, Attribute):
                operand = {"attr": right.path}
            elif isinstance(right, tuple):
                operand = [_write(value) for value in right]
            else:
                operand = _write(right)
            document = {"attr": left.path, "op": sign, "value": operand}
        case Opaque(_, name):
            raise OpaqueSpecification(name)
        case _:  # pragma: no cover - those are all nodes
            raise TypeError(node)
    name = name_of(specification)
    return {"name": name, "is": document} if name else document


def from_json(document: str | bytes | Mapping[str, object]) -> Specification[Any]:
    """Read a document. Raises `InvalidSpecification`."""
    if isinstance(document, Mapping):
        return _read(document, "$", 1, Budget())
    if not isinstance(document, str | bytes):
        raise InvalidSpecification("$", "is no object")
    if len(document) > MAX_TEXT:
        raise InvalidSpecification("$", f"longer than {MAX_TEXT} characters")
    try:
        data = json.loads(
            document, object_pairs_hook=_object, parse_constant=_refuse, parse_float=_refuse
        )
    except InvalidSpecification:
        raise
    except RecursionError:
        raise InvalidSpecification("$", f"more than {MAX_DEPTH} levels deep") from None
    except ValueError as error:
        raise InvalidSpecification("$", f"no JSON: {str(error)[:200]}") from None
    return _read(data, "$", 1, Budget())


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise InvalidSpecification("$", "a field is given twice")
    return found


def _refuse(text: str) -> object:
    reason = f'{text[:SHOWN]} is no value: write {{"decimal": "…"}} or {{"float": "…"}}'
    raise InvalidSpecification("$", reason)


def _read(document: object, where: str, depth: int, budget: Budget) -> Specification[Any]:
    budget.spend(where, depth)
    fields = _fields(document, where)
    match fields:
        case {"all": parts, **rest} if not rest:
            return All(_parts(parts, f"{where}.all", depth, budget))
        case {"any": parts, **rest} if not rest:
            return AnyOf(_parts(parts, f"{where}.any", depth, budget))
        case {"not": part, **rest} if not rest:
            return Not(_read(part, f"{where}.not", depth + 1, budget))
        case {"name": name, "is": part, **rest} if not rest:
            if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME or not name.isprintable():
                raise InvalidSpecification(
                    f"{where}.name", f"no name of 1 to {MAX_NAME} printable characters"
                )
            return Named(name, _read(part, f"{where}.is", depth + 1, budget))
        case {"attr": path, "op": sign, "value": operand, **rest} if not rest:
            return _read_leaf(path, sign, operand, where)
    known = {"all", "any", "not", "name", "is", "attr", "op", "value"}
    unknown = ", ".join(repr(name[:SHOWN]) for name in fields if name not in known)
    if unknown:
        raise InvalidSpecification(where, f"unknown field {unknown}")
    raise InvalidSpecification(
        where, "is none of {all}, {any}, {not}, {name, is} and {attr, op, value}"
    )


def _fields(document: object, where: str) -> Mapping[str, object]:
    if not isinstance(document, Mapping) or not all(isinstance(name, str) for name in document):
        raise InvalidSpecification(where, "is no object")
    return document


def _parts(parts: object, where: str, depth: int, budget: Budget) -> tuple[Specification[Any], ...]:
    if not isinstance(parts, list | tuple):
        raise InvalidSpecification(where, "is no list")
    return tuple(
        _read(part, f"{where}[{number}]", depth + 1, budget) for number, part in enumerate(parts)
    )


def _read_leaf(path: object, sign: object, operand: object, where: str) -> Specification[Any]:
    if not isinstance(sign, str) or sign not in SIGNS:
        shown = repr(sign)[:SHOWN]
        raise InvalidSpecification(f"{where}.op", f"{shown} is none of {', '.join(SIGNS)}")
    left = _attribute(path, f"{where}.attr")
    place = f"{where}.value"
    if sign == "in":
        if not isinstance(operand, list | tuple):
            raise InvalidSpecification(place, "is no list")
        if len(operand) > MAX_VALUES:
            raise InvalidSpecification(place, f"more than {MAX_VALUES} values")
        values = [_value(value, f"{place}[{n}]") for n, value in enumerate(operand)]
        listed: Specification[Any] = _made(lambda: left.is_in(values), place)
        return listed
    if isinstance(operand, Mapping) and operand.keys() == {"attr"} and sign not in TEXTUAL:
        return left.compare(sign, _attribute(operand["attr"], f"{place}.attr"))
    value = _value(operand, place)
    if sign in TEXTUAL:
        if not isinstance(value, str):
            raise InvalidSpecification(place, f"{sign} takes a text")
        return Compare(left, sign, value)
    return left.compare(sign, value)


def _attribute(path: object, where: str) -> Attribute:
    if not isinstance(path, str):
        raise InvalidSpecification(where, "is no text")
    return cast("Attribute", _made(lambda: Attribute(path), where))  # it made an attribute


def _made(make: Callable[[], Any], where: str) -> Any:
    try:
        return make()
    except LeftfoldError as error:
        raise InvalidSpecification(where, str(error)) from None


def _write(value: Value | None) -> object:
    match value:
        case Decimal():
            return {"decimal": f"{value:f}"}
        case float():
            return {"float": repr(value)}
        case datetime():
            return {"datetime": value.isoformat()}
        case date():
            return {"date": value.isoformat()}
        case UUID():
            return {"uuid": str(value)}
        case _:
            return value


_TYPED: Mapping[str, Callable[[str], object]] = {
    "decimal": Decimal,
    "float": float,
    "datetime": datetime.fromisoformat,
    "date": date.fromisoformat,
    "uuid": UUID,
}


def _value(document: object, where: str) -> Value | None:
    if isinstance(document, Mapping):
        if len(document) != 1:
            raise InvalidSpecification(where, f"is none of {', '.join(_TYPED)}")
        ((name, text),) = document.items()
        if name not in _TYPED:
            raise InvalidSpecification(
                where, f"{str(name)[:SHOWN]!r} is none of {', '.join(_TYPED)}"
            )
        if not isinstance(text, str) or len(text) > SHOWN:
            raise InvalidSpecification(f"{where}.{name}", f"is no text of a {name}")
        try:
            document = _TYPED[name](text)
        except (ValueError, InvalidOperation):
            raise InvalidSpecification(f"{where}.{name}", f"{text!r} is no {name}") from None
    elif isinstance(document, list | tuple):
        raise InvalidSpecification(where, "is a list, which only `in` takes")
    kept: Value | None = _made(lambda: constant(document), where)
    return kept


def core_schema_of(specification_type: type[Specification[Any]]) -> CoreSchema:
    """Return the schema by which pydantic takes a specification, a document or a sentence."""

    def read(value: object) -> Specification[Any]:
        if isinstance(value, specification_type):
            return value
        try:
            if isinstance(value, str):
                return Specification.parse(value)
            if isinstance(value, Mapping):
                return from_json(value)
        except InvalidSpecification as error:
            # Braces would be taken for pydantic's own placeholders.
            fault = {"fault": str(error)}
            raise PydanticCustomError("specification", "{fault}", fault) from None
        raise PydanticCustomError("specification", "is no specification, document or sentence")

    return core_schema.no_info_plain_validator_function(
        read,
        serialization=core_schema.plain_serializer_function_ser_schema(
            to_document, when_used="json"
        ),
    )


def json_schema() -> dict[str, object]:
    """Return the JSON schema of documents (draft 2020-12); `docs/specification.schema.json`."""

    def exactly(**fields: object) -> dict[str, object]:
        return {
            "type": "object",
            "properties": fields,
            "required": list(fields),
            "additionalProperties": False,
        }

    node = {"$ref": "#/$defs/node"}
    path = {"type": "string", "maxLength": Attribute.MAX_PATH}
    typed = [
        exactly(decimal={"type": "string", "pattern": DECIMAL}),
        exactly(float={"type": "string", "maxLength": SHOWN}),
        exactly(datetime={"type": "string", "format": "date-time"}),
        exactly(date={"type": "string", "format": "date"}),
        exactly(uuid={"type": "string", "format": "uuid"}),
    ]
    value = {"$ref": "#/$defs/value"}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Specification",
        "description": (
            f"At most {MAX_DEPTH} levels, {MAX_NODES} nodes and {MAX_TEXT} characters in all."
        ),
        "$ref": "#/$defs/node",
        "$defs": {
            "node": {
                "oneOf": [
                    exactly(all={"type": "array", "items": node}),
                    exactly(any={"type": "array", "items": node}),
                    exactly(**{"not": node}),
                    exactly(
                        name={"type": "string", "minLength": 1, "maxLength": MAX_NAME},
                        **{"is": node},
                    ),
                    exactly(
                        attr=path,
                        op={
                            "enum": [sign for sign in SIGNS if sign != "in" and sign not in TEXTUAL]
                        },
                        value={"anyOf": [value, exactly(attr=path), {"type": "null"}]},
                    ),
                    exactly(attr=path, op={"enum": list(TEXTUAL)}, value={"type": "string"}),
                    exactly(
                        attr=path,
                        op={"const": "in"},
                        value={"type": "array", "items": value, "maxItems": MAX_VALUES},
                    ),
                ]
            },
            "value": {"anyOf": [{"type": ["boolean", "integer", "string"]}, *typed]},
        },
    }
