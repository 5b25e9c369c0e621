"""Specifications: a question about a thing, as a small frozen tree that can be combined.

Logic is two-valued: an ordering against `None` is not satisfied, and its negation is; `==` and
`!=` treat `None` as a value like any other.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeAlias, TypeVar

from leftfold.domain.errors import LeftfoldError

T_contra = TypeVar("T_contra", contravariant=True)


class UnknownAttribute(LeftfoldError, message="{candidate_type} has no attribute {name!r}"):
    """A specification names an attribute that the candidate does not have."""

    candidate_type: str
    name: str


class PrivateAttribute(LeftfoldError, message="{name!r} begins with an underscore"):
    """A specification may not look at private attributes."""

    name: str


class UnlikeTypes(LeftfoldError, message="cannot compare {left} with {right}"):
    """Two values of these types have no order."""

    left: str
    right: str


class Specification(Generic[T_contra]):
    """A yes-or-no question about a candidate: an aggregate, event, row, model or mapping.

    A named business specification subclasses it and says in `tree` what it stands for:

        class NeedsReorder(Specification[Item]):
            def tree(self) -> Specification[Item]:
                return attr("on_hand") <= attr("reorder_level")
    """

    __slots__ = ()

    def tree(self) -> Specification[T_contra]:
        """Return the tree that a named specification stands for; a node stands for itself."""
        return self

    def is_satisfied_by(self, candidate: T_contra) -> bool:
        """Tell whether the candidate meets the specification.

        Raises `UnknownAttribute` and `UnlikeTypes`.
        """
        return self.tree().is_satisfied_by(candidate)

    def __eq__(self, other: object) -> bool:
        """Tell whether it is the same question: of the same name, with the same tree."""
        return isinstance(other, type(self)) and self.tree() == other.tree()

    def __hash__(self) -> int:
        return hash((type(self), self.tree()))

    def and_spec(self, other: Specification[T_contra]) -> Specification[T_contra]:
        """Return what both satisfy."""
        return All((self, other))

    def or_spec(self, other: Specification[T_contra]) -> Specification[T_contra]:
        """Return what either satisfies."""
        return AnyOf((self, other))

    def not_spec(self) -> Specification[T_contra]:
        """Return what does not satisfy this one."""
        return Not(self)

    def __and__(self, other: Specification[T_contra]) -> Specification[T_contra]:
        return self.and_spec(other)

    def __or__(self, other: Specification[T_contra]) -> Specification[T_contra]:
        return self.or_spec(other)

    def __invert__(self) -> Specification[T_contra]:
        return self.not_spec()

    def __bool__(self) -> bool:
        """Refuse `spec_a and spec_b`, which would silently drop one of them."""
        msg = "a specification is neither true nor false; combine with & | ~"
        raise TypeError(msg)


@dataclass(frozen=True, slots=True)
class All(Specification[T_contra]):
    """Satisfied by what satisfies every part; with no parts, by everything."""

    parts: tuple[Specification[T_contra], ...]

    def is_satisfied_by(self, candidate: T_contra) -> bool:
        """Tell whether the candidate meets it."""
        return all(part.is_satisfied_by(candidate) for part in self.parts)


@dataclass(frozen=True, slots=True)
class AnyOf(Specification[T_contra]):
    """Satisfied by what satisfies some part; with no parts, by nothing."""

    parts: tuple[Specification[T_contra], ...]

    def is_satisfied_by(self, candidate: T_contra) -> bool:
        """Tell whether the candidate meets it."""
        return any(part.is_satisfied_by(candidate) for part in self.parts)


@dataclass(frozen=True, slots=True)
class Not(Specification[T_contra]):
    """Satisfied by what does not satisfy the part."""

    part: Specification[T_contra]

    def is_satisfied_by(self, candidate: T_contra) -> bool:
        """Tell whether the candidate meets it."""
        return not self.part.is_satisfied_by(candidate)


def _distinct(left: object, right: object) -> bool:
    return left != right


def _ordered(compare: Callable[[Any, Any], object]) -> Callable[[object, object], bool]:
    def compare_two_valued(left: object, right: object) -> bool:
        if left is None or right is None:
            return False
        try:
            return bool(compare(left, right))
        except TypeError:
            raise UnlikeTypes(type(left).__name__, type(right).__name__) from None

    return compare_two_valued


@dataclass(frozen=True, slots=True, eq=False)  # comparing attributes would make specifications
class Compare(Specification[object]):
    """An attribute against a constant or against another attribute."""

    left: Attribute
    sign: str
    right: object

    OPERATORS: ClassVar[Mapping[str, Callable[[object, object], bool]]] = {
        "==": operator.eq,
        "!=": _distinct,
        "<": _ordered(operator.lt),
        "<=": _ordered(operator.le),
        ">": _ordered(operator.gt),
        ">=": _ordered(operator.ge),
    }

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Compare) and self._facts() == other._facts()

    def __hash__(self) -> int:
        return hash(self._facts())

    def _facts(self) -> tuple[object, ...]:
        is_attribute = isinstance(self.right, Attribute)
        right = self.right.path if isinstance(self.right, Attribute) else self.right
        return self.left.path, self.sign, is_attribute, type(right), right

    def is_satisfied_by(self, candidate: object) -> bool:
        """Tell whether the candidate meets it."""
        right = self.right.of(candidate) if isinstance(self.right, Attribute) else self.right
        return self.OPERATORS[self.sign](self.left.of(candidate), right)


class Attribute:
    """A candidate's attribute, by its dotted path; comparing it makes a specification."""

    __slots__ = ("path",)

    def __init__(self, path: str) -> None:
        for name in path.split("."):
            if not name.isidentifier():
                raise UnknownAttribute("any candidate", name)
            if name.startswith("_"):
                raise PrivateAttribute(name)
        self.path = path

    def of(self, candidate: object) -> object:
        """Return the attribute's value; `None` where a step on the way to it is `None`."""
        value = candidate
        for name in self.path.split("."):
            if value is None:
                return None
            owner = value
            try:
                value = owner[name] if isinstance(owner, Mapping) else getattr(owner, name)
            except (KeyError, AttributeError):
                raise UnknownAttribute(type(owner).__name__, name) from None
        return value

    def __eq__(self, other: object) -> Compare:  # type: ignore[override]  # builds a specification, as == is meant to here
        return Compare(self, "==", other)

    def __ne__(self, other: object) -> Compare:  # type: ignore[override]  # see __eq__
        return Compare(self, "!=", other)

    def __lt__(self, other: object) -> Compare:
        return Compare(self, "<", other)

    def __le__(self, other: object) -> Compare:
        return Compare(self, "<=", other)

    def __gt__(self, other: object) -> Compare:
        return Compare(self, ">", other)

    def __ge__(self, other: object) -> Compare:
        return Compare(self, ">=", other)

    def __hash__(self) -> int:
        return hash(self.path)

    def __repr__(self) -> str:
        return f"attr({self.path!r})"


Spec: TypeAlias = Specification[object]


def attr(path: str) -> Attribute:
    """Name an attribute, `"on_hand"` or `"address.city"`; compare it to make a specification.

    Raises `PrivateAttribute` for a name that begins with an underscore.
    """
    return Attribute(path)


def all_of(*parts: Specification[T_contra]) -> Specification[T_contra]:
    """Return the specification that every part must satisfy."""
    return All(parts)


def any_of(*parts: Specification[T_contra]) -> Specification[T_contra]:
    """Return the specification that some part must satisfy."""
    return AnyOf(parts)


ALWAYS: Spec = All(())
NEVER: Spec = AnyOf(())
