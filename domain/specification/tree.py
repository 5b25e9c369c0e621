"""The tree of a specification: a question about a thing, small, frozen and combinable."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, is_dataclass
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self, TypeAlias, TypeVar, cast

from leftfold.domain.errors import LeftfoldError
from leftfold.domain.specification.values import (
    UnlikeTypes,
    Value,
    are_alike,
    constant,
    is_aware,
    is_exact_float,
    kind_of,
    plain,
)

if TYPE_CHECKING:
    from pydantic import GetCoreSchemaHandler
    from pydantic_core import CoreSchema

    from leftfold.domain.specification.explanation import Explanation

T_contra = TypeVar("T_contra", contravariant=True)
T = TypeVar("T")

MAX_NAMES = 32
"""Names that may stand for one another before one stands for a tree."""
MAX_NAME = 255
"""Characters of a name."""


class UnknownAttribute(LeftfoldError, message="{candidate_type} has no attribute {name!r}{hint}"):
    """A specification names an attribute that the candidate does not have."""

    candidate_type: str
    name: str
    hint: str = ""


class PrivateAttribute(LeftfoldError, message="{name!r} begins with an underscore"):
    """A specification may not look at private attributes."""

    name: str


class Specification(Generic[T_contra]):
    """A yes-or-no question about a candidate: an aggregate, event, row, model or mapping.

    A named business specification subclasses it and says in `tree` what it stands for:

        class NeedsReorder(Specification[Item]):
            def tree(self) -> Specification[Item]:
                return attr("on_hand") <= attr("reorder_level")

    Logic is two-valued: an ordering against `None` is not satisfied, and its negation is; `==`
    and `!=` treat `None` as a value like any other.
    """

    def tree(self) -> Specification[T_contra]:
        """Return the tree that a named specification stands for; a node stands for itself."""
        return self

    if TYPE_CHECKING:

        def is_satisfied_by(self, candidate: T_contra) -> bool:
            """Tell whether the candidate meets the specification.

            Raises `UnknownAttribute` and `UnlikeTypes`.
            """
            raise NotImplementedError

    else:

        @cached_property
        def is_satisfied_by(self) -> Callable[[T_contra], bool]:
            """Hold the compiled function itself."""
            # The compiled function itself: a method around it would cost as much as it does.
            from leftfold.domain.specification.compiled import compile_for_first

            return compile_for_first(self)

    def check(self, candidate: T_contra) -> bool:
        """Tell the same node by node: the reference of what a specification means."""
        return expand(self).check(candidate)

    def explain(self, candidate: T_contra) -> Explanation:
        """Tell why the candidate does or does not meet it: each node, with the values seen."""
        from leftfold.domain.specification.explanation import explain

        return explain(self, candidate)

    def bind(self, model_type: type[T]) -> Specification[T]:
        """Return it for candidates of one type, its names and types checked early.

        Raises `UnknownAttribute`, which suggests a near name, and `UnlikeTypes`.
        """
        from leftfold.domain.specification.binding import bind

        return bind(self, model_type)

    def simplify(self) -> Specification[T_contra]:
        """Return a specification of the same meaning without what is redundant."""
        from leftfold.domain.specification.logic import simplify

        return simplify(self)

    def implies(self, other: Specification[T_contra]) -> bool:
        """Tell whether it is proved that whatever satisfies this satisfies the other."""
        from leftfold.domain.specification.logic import implies

        return implies(self, other)

    def to_json(self) -> str:
        """Return it as a JSON document; see `docs/specification.schema.json`.

        Raises `OpaqueSpecification` if it holds a wrapped callable.
        """
        from leftfold.domain.specification.document import to_json

        return to_json(self)

    @staticmethod
    def from_json(document: str | bytes | Mapping[str, object]) -> Specification[Any]:
        """Read a JSON document. Raises `InvalidSpecification` with the place of the fault."""
        from leftfold.domain.specification.document import from_json

        return from_json(document)

    @staticmethod
    def parse(text: str) -> Specification[Any]:
        """Read a sentence such as `on_hand < 10 and name contains 'HEART'`.

        Raises `InvalidSpecification` with a caret under the fault.
        """
        from leftfold.domain.specification.reading import parse

        return parse(text)

    def __str__(self) -> str:
        from leftfold.domain.specification.language import sentence

        return sentence(self)

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    def __eq__(self, other: object) -> bool:
        """Tell whether it is the same question: of the same name, with the same tree."""
        tree = self.tree()
        if tree is self or type(self) is not type(other):  # one without a tree is only itself
            return self is other
        return tree == cast("Self", other).tree()

    def __hash__(self) -> int:
        tree = self.tree()
        return id(self) if tree is self else hash((type(self), tree))

    def __getstate__(self) -> dict[str, object]:
        # What was compiled cannot be pickled, and is made again.
        return {k: v for k, v in self.__dict__.items() if k != "is_satisfied_by"}

    def and_spec(self, other: Specification[T_contra]) -> Specification[T_contra]:
        """Return what both satisfy."""
        return _joined(All, self, other)

    def or_spec(self, other: Specification[T_contra]) -> Specification[T_contra]:
        """Return what either satisfies."""
        return _joined(AnyOf, self, other)

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

    @classmethod
    def __get_pydantic_core_schema__(
        cls, source: object, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        """Let messages carry specifications: as they are, as JSON documents, or as sentences."""
        from leftfold.domain.specification.document import core_schema_of

        return core_schema_of(Specification)


def _joined(
    kind: type[All[Any] | AnyOf[Any]], one: Specification[Any], other: Specification[Any]
) -> Specification[Any]:
    """Join two without nesting, so that a long chain of `&` or `|` is one flat node."""
    parts = tuple(
        part
        for each in _checked((one, other))
        for part in (each.parts if type(each) is kind else (each,))
    )
    return parts[0] if len(parts) == 1 else kind(parts)


def _checked(parts: tuple[Specification[T], ...]) -> tuple[Specification[T], ...]:
    """Return them. Raises `TypeError` for what is no specification, as a bare callable."""
    for part in parts:
        if not isinstance(part, Specification):
            msg = f"{part!r} is not a specification; `satisfies` wraps a callable"
            raise TypeError(msg)
    return parts


def expand(specification: Specification[T]) -> Specification[T]:
    """Return the node that a specification stands for.

    A subclass that has no tree and overrides `is_satisfied_by` is a wrapped callable.
    """
    named = specification
    for _ in range(MAX_NAMES):
        if isinstance(specification, NODES):
            return specification
        tree = specification.tree()
        if tree is specification:
            if type(specification).is_satisfied_by is Specification.is_satisfied_by:
                msg = f"{type(specification).__name__} needs a tree"
                raise TypeError(msg)
            return Opaque(specification.is_satisfied_by, name_of(specification))
        specification = tree
    msg = f"the tree of {type(named).__name__} leads to no node: does it stand for itself?"
    raise TypeError(msg)


def name_of(specification: Specification[Any]) -> str:
    """Return the name of a named specification, with its arguments; empty for a plain node."""
    if isinstance(specification, Named):
        return specification.name
    if isinstance(specification, NODES):
        return ""
    name = repr(specification) if is_dataclass(specification) else type(specification).__name__
    name = name.removesuffix("()")
    return name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 1]}…"


@dataclass(frozen=True)
class All(Specification[T_contra]):
    """Satisfied by what satisfies every part; with no parts, by everything."""

    parts: tuple[Specification[T_contra], ...]

    def check(self, candidate: T_contra) -> bool:
        """Tell whether the candidate meets it."""
        return all(part.check(candidate) for part in self.parts)

    def __repr__(self) -> str:
        return f"all_of({', '.join(map(repr, self.parts))})" if self.parts else "ALWAYS"


@dataclass(frozen=True)
class AnyOf(Specification[T_contra]):
    """Satisfied by what satisfies some part; with no parts, by nothing."""

    parts: tuple[Specification[T_contra], ...]

    def check(self, candidate: T_contra) -> bool:
        """Tell whether the candidate meets it."""
        return any(part.check(candidate) for part in self.parts)

    def __repr__(self) -> str:
        return f"any_of({', '.join(map(repr, self.parts))})" if self.parts else "NEVER"


@dataclass(frozen=True)
class Not(Specification[T_contra]):
    """Satisfied by what does not satisfy the part."""

    part: Specification[T_contra]

    def check(self, candidate: T_contra) -> bool:
        """Tell whether the candidate meets it."""
        return not self.part.check(candidate)

    def __repr__(self) -> str:
        return f"~({self.part!r})"


@dataclass(frozen=True)
class Named(Specification[T_contra]):
    """A named specification as a document tells it: its name, and what it stood for."""

    name: str
    part: Specification[T_contra]

    def tree(self) -> Specification[T_contra]:
        """Return what it stands for."""
        return self.part.tree()

    def __repr__(self) -> str:
        return f"Named({self.name!r}, {self.part!r})"


@dataclass(frozen=True)
class Opaque(Specification[T_contra]):
    """A callable of the program: usable in Python, and nowhere else."""

    function: Callable[[T_contra], bool]
    name: str

    def check(self, candidate: T_contra) -> bool:
        """Tell whether the callable says so."""
        return bool(self.function(candidate))

    def __hash__(self) -> int:
        return hash(self.name)  # the callable may have none

    def __repr__(self) -> str:
        return f"satisfies({getattr(self.function, '__qualname__', '…')}, name={self.name!r})"


ORDERINGS: Mapping[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
TEXTUAL: Mapping[str, Callable[[str, str], bool]] = {
    "contains": operator.contains,
    "starts with": str.startswith,
    "ends with": str.endswith,
}
SIGNS = ("==", "!=", *ORDERINGS, "in", *TEXTUAL)


@dataclass(frozen=True, eq=False)  # comparing attributes would make specifications
class Compare(Specification[object]):
    """An attribute against a constant, several constants (`in`), or another attribute."""

    left: Attribute
    sign: str
    right: Attribute | Value | tuple[Value, ...] | None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Compare) and self._facts() == other._facts()

    def __hash__(self) -> int:
        return hash(self._facts())

    def _facts(self) -> tuple[object, ...]:
        right: object = self.right
        if isinstance(right, Attribute):
            right = right.path
        elif isinstance(right, tuple):
            right = tuple((type(value), value) for value in right)
        return self.left.path, self.sign, type(self.right), right

    def check(self, candidate: object) -> bool:
        """Tell whether the candidate meets it."""
        right = self.right.of(candidate) if isinstance(self.right, Attribute) else self.right
        return self.test(self.left.of(candidate), right)

    def test(self, left: object, right: object) -> bool:
        """Tell whether two values meet it. Raises `UnlikeTypes`."""
        left = plain(left)
        if self.sign == "in":
            values = cast("tuple[Value, ...]", right)  # what `is_in` keeps
            return left is not None and any(_equal(left, value) for value in values)
        right = plain(right)
        if self.sign in {"==", "!="}:
            is_equal = left is right if left is None or right is None else _equal(left, right)
            return is_equal is (self.sign == "==")
        if left is None or right is None:
            return False
        _check_alike(left, right)
        if self.sign in ORDERINGS:
            return ORDERINGS[self.sign](left, right)
        if not isinstance(left, str) or not isinstance(right, str):
            raise UnlikeTypes(type(left).__name__, "text")
        return TEXTUAL[self.sign](left, right)

    def __repr__(self) -> str:
        match self.sign:
            case "in":
                return f"{self.left!r}.is_in({self.right!r})"
            case "contains" | "starts with" | "ends with":
                return f"{self.left!r}.{self.sign.replace(' ', '')}({self.right!r})"
            case "==" if self.right is None:
                return f"{self.left!r}.is_none()"
            case _:
                return f"({self.left!r} {self.sign} {self.right!r})"


def _equal(left: object, right: object) -> bool:
    _check_alike(left, right)
    return left == right


def _check_alike(left: object, right: object) -> None:
    kinds = kind_of(left), kind_of(right)
    is_alike = are_alike(*kinds)
    if is_alike and "datetime" in kinds:
        is_alike = all(isinstance(v, datetime) and is_aware(v) for v in (left, right))
    if is_alike and kinds[0] != kinds[1] and "float" in kinds:
        whole = cast("int", left if kinds[0] == "int" else right)  # what a float is alike to
        is_alike = is_exact_float(whole)
    if not is_alike:
        raise UnlikeTypes(type(left).__name__, type(right).__name__)


NODES = (All, AnyOf, Not, Compare, Opaque)


class Attribute:
    """A candidate's attribute, by its dotted path; comparing it makes a specification.

    All comparisons raise `InvalidValue` for a constant that would not mean the same everywhere.
    """

    __slots__ = ("path",)
    MAX_PATH: ClassVar[int] = 255

    def __init__(self, path: str) -> None:
        for name in path.split("."):
            if not name.isidentifier() or len(path) > self.MAX_PATH:
                raise UnknownAttribute("any candidate", name[: self.MAX_PATH])
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

    def is_in(self, values: Any) -> Compare:  # any iterable but a text, which is checked
        """Be one of these values, none of which is `None`."""
        if isinstance(values, str) or not isinstance(values, Iterable):
            raise UnlikeTypes("is_in", f"a single {type(values).__name__}")
        constants = [constant(value) for value in values]
        kept = tuple({(type(value), value): value for value in constants}.values())
        if None in kept:
            raise UnlikeTypes("is_in", "None: combine with is_none()")
        return Compare(self, "in", cast("tuple[Value, ...]", kept))  # None was refused

    def between(self, low: object, high: object) -> Specification[object]:
        """Be at least the one and at most the other."""
        return All((self >= low, self <= high))

    def is_none(self) -> Compare:
        """Be absent."""
        return Compare(self, "==", None)

    def contains(self, text: str) -> Compare:
        """Have this text somewhere in it."""
        return self._text("contains", text)

    def startswith(self, text: str) -> Compare:
        """Begin with this text."""
        return self._text("starts with", text)

    def endswith(self, text: str) -> Compare:
        """End with this text."""
        return self._text("ends with", text)

    def compare(self, sign: str, other: object) -> Compare:
        """Compare by a sign: `==`, `!=`, `<`, `<=`, `>` or `>=`."""
        return Compare(self, sign, other if isinstance(other, Attribute) else constant(other))

    def _text(self, sign: str, text: object) -> Compare:
        kept = constant(text)
        if not isinstance(kept, str):
            raise UnlikeTypes(sign, type(text).__name__)
        return Compare(self, sign, kept)

    def __eq__(self, other: object) -> Compare:  # type: ignore[override]  # builds a specification, as == is meant to here
        return self.compare("==", other)

    def __ne__(self, other: object) -> Compare:  # type: ignore[override]  # see __eq__
        return self.compare("!=", other)

    def __lt__(self, other: object) -> Compare:
        return self.compare("<", other)

    def __le__(self, other: object) -> Compare:
        return self.compare("<=", other)

    def __gt__(self, other: object) -> Compare:
        return self.compare(">", other)

    def __ge__(self, other: object) -> Compare:
        return self.compare(">=", other)

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
    return All(_checked(parts))


def any_of(*parts: Specification[T_contra]) -> Specification[T_contra]:
    """Return the specification that some part must satisfy."""
    return AnyOf(_checked(parts))


def satisfies(function: Callable[[T], bool], *, name: str) -> Specification[T]:
    """Wrap a callable: usable in Python; elsewhere split off, or refused by name."""
    return Opaque(function, name)


ALWAYS: Spec = All(())
NEVER: Spec = AnyOf(())
