"""Binding: a specification's names and types checked against a type of candidates."""

from __future__ import annotations

import difflib
import types
import typing
from decimal import Decimal
from enum import Enum
from functools import lru_cache
from typing import Any, TypeVar

from leftfold.domain.specification.tree import (
    TEXTUAL,
    All,
    AnyOf,
    Attribute,
    Compare,
    Named,
    Not,
    Specification,
    UnknownAttribute,
    expand,
    name_of,
)
from leftfold.domain.specification.values import (
    KINDS,
    UnlikeTypes,
    Value,
    are_alike,
    is_exact_float,
    kind_of,
)

T = TypeVar("T")


def bind(specification: Specification[Any], model_type: type[T]) -> Specification[T]:
    """Return the specification for candidates of one type, its constants in the declared types.

    Raises `UnknownAttribute` and `UnlikeTypes`.
    """
    node = expand(specification)
    bound: Specification[Any]
    match node:
        case All(parts):
            bound = All(tuple(bind(part, model_type) for part in parts))
        case AnyOf(parts):
            bound = AnyOf(tuple(bind(part, model_type) for part in parts))
        case Not(part):
            bound = Not(bind(part, model_type))
        case Compare():
            bound = _bind_leaf(node, model_type)
        case _:
            bound = node
    name = name_of(specification)
    return Named(name, bound) if name else bound


def _bind_leaf(leaf: Compare, model_type: type[Any]) -> Compare:
    declared = _declared(leaf.left, model_type)
    if leaf.right is None or declared is Any:
        return leaf
    kind = _kind(leaf.left, declared)
    if leaf.sign in TEXTUAL and kind != "str":
        raise UnlikeTypes(f"{leaf.left.path} ({kind})", "text")
    if isinstance(leaf.right, Attribute):
        declared = _declared(leaf.right, model_type)
        other = kind if declared is Any else _kind(leaf.right, declared)
        if kind != other:
            raise UnlikeTypes(f"{leaf.left.path} ({kind})", f"{leaf.right.path} ({other})")
        return leaf
    if isinstance(leaf.right, tuple):
        values = tuple(_converted(leaf.left, kind, value) for value in leaf.right)
        return Compare(leaf.left, leaf.sign, values)
    return Compare(leaf.left, leaf.sign, _converted(leaf.left, kind, leaf.right))


def _converted(attribute: Attribute, kind: str, value: Value) -> Value:
    """Return a constant in the attribute's own type, so that no use has to convert it."""
    found = kind_of(value)
    if found == kind:
        return value
    if are_alike(kind, found):
        if kind == "Decimal" and isinstance(value, int) and abs(value) < 10**12:
            return Decimal(value)
        if kind == "int" and isinstance(value, Decimal) and value == int(value):
            return int(value)
        if kind == "float" and isinstance(value, int) and is_exact_float(value):
            return float(value)
    raise UnlikeTypes(f"{attribute.path} ({kind})", f"{value!r} ({found})")


def _declared(attribute: Attribute, model_type: type[Any]) -> Any:
    """Return the type that a path is declared with, or `Any`. Raises `UnknownAttribute`."""
    found: Any = model_type
    for step in attribute.path.split("."):
        if found is Any:
            return Any
        found = _type_of(found, step)
    return found


def _kind(attribute: Attribute, declared: Any) -> str:
    kind = kind_of_type(declared)
    if kind is None:
        shown = getattr(declared, "__name__", str(declared))
        raise UnlikeTypes(f"{attribute.path} ({shown})", "anything but none")
    return kind


def _type_of(owner: Any, name: str) -> Any:
    if isinstance(owner, type) and issubclass(owner, (*KINDS, Enum)):
        raise UnknownAttribute(owner.__name__, name, ", being a value")
    hints = attribute_types(owner)
    if not hints:
        return Any
    if name not in hints:
        near = difflib.get_close_matches(name, hints, n=1)
        hint = f": did you mean {near[0]!r}?" if near else ""
        raise UnknownAttribute(owner.__name__, name, hint)
    return hints[name]


@lru_cache(maxsize=1_024)
def attribute_types(owner: Any) -> dict[str, Any]:
    """Return the public attributes that a type declares, with their types less `None`."""
    try:
        hints = typing.get_type_hints(owner)
    except (TypeError, NameError, AttributeError):
        return {}
    for each in reversed(getattr(owner, "__mro__", ())):
        for name, member in vars(each).items():
            if isinstance(member, property) and member.fget is not None and name not in hints:
                try:
                    hints[name] = typing.get_type_hints(member.fget).get("return", Any)
                except (TypeError, NameError, AttributeError):
                    hints[name] = Any
    return {
        name: _without_none(hint)
        for name, hint in hints.items()
        if not name.startswith("_") and typing.get_origin(hint) is not typing.ClassVar
    }


@lru_cache(maxsize=1_024)
def kinds_of(candidate_type: type) -> dict[str, str]:
    """Return the kinds of the attributes that a type declares, where they can be compared."""
    kinds = {name: kind_of_type(hint) for name, hint in attribute_types(candidate_type).items()}
    enums = {
        name
        for name, hint in attribute_types(candidate_type).items()
        if isinstance(hint, type) and issubclass(hint, Enum)
    }
    return {name: kind for name, kind in kinds.items() if kind and name not in enums}


def kind_of_type(hint: Any) -> str | None:
    """Return the kind of a declared type's values; None if they cannot be compared."""
    if not isinstance(hint, type):
        return None
    if issubclass(hint, Enum):
        kinds = {kind_of(member.value) for member in hint}
        return kinds.pop() if len(kinds) == 1 else None
    return KINDS.get(hint) or next((k for t, k in KINDS.items() if issubclass(hint, t)), None)


def _without_none(hint: Any) -> Any:
    if isinstance(hint, typing.NewType):
        return _without_none(hint.__supertype__)
    if typing.get_origin(hint) is typing.Literal:
        types_found = {type(value) for value in typing.get_args(hint) if value is not None}
        return types_found.pop() if len(types_found) == 1 else Any
    if typing.get_origin(hint) is typing.Annotated:
        return _without_none(typing.get_args(hint)[0])
    if typing.get_origin(hint) in {typing.Union, types.UnionType}:
        parts = [_without_none(part) for part in typing.get_args(hint) if part is not type(None)]
        return parts[0] if len(parts) == 1 else Any
    return hint
