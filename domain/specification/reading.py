"""Reading sentences: `on_hand < 10 and name contains 'HEART'`."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date, datetime
from decimal import Decimal
from typing import Any, cast
from unicodedata import category
from uuid import UUID

from lark import Lark, Token, Transformer, v_args
from lark.exceptions import UnexpectedInput

from leftfold.domain.errors import LeftfoldError
from leftfold.domain.specification.document import (
    MAX_TEXT,
    MAX_VALUES,
    Budget,
    InvalidSpecification,
)
from leftfold.domain.specification.tree import (
    ALWAYS,
    NEVER,
    All,
    AnyOf,
    Attribute,
    Not,
    Specification,
)
from leftfold.domain.specification.values import SHOWN, Value, constant

GRAMMAR = r"""
?start: either
?either: both ("or" both)*            -> any_of
?both: part ("and" part)*             -> all_of
?part: "not" part                     -> negation
     | "(" either ")"                 -> group
     | "always"                       -> always
     | "never"                        -> never
     | path SIGN operand              -> compare
     | path SIGN "none"               -> compare_none
     | path "is" "none"               -> is_none
     | path "is" "not" "none"         -> is_not_none
     | path "in" "(" [value ("," value)*] ")" -> is_in
     | path "between" value "and" value -> between
     | path "contains" TEXT           -> contains
     | path "starts" "with" TEXT      -> starts_with
     | path "ends" "with" TEXT        -> ends_with
?operand: value | path
path: (NAME | QUOTED) ("." (NAME | QUOTED))*
value: FLOAT                          -> a_float
     | DECIMAL                        -> a_decimal
     | INTEGER                        -> an_integer
     | TEXT                           -> a_text
     | "true"                         -> a_truth
     | "false"                        -> a_falsehood
     | "datetime" TEXT                -> a_datetime
     | "date" TEXT                    -> a_date
     | "uuid" TEXT                    -> a_uuid
SIGN: "==" | "!=" | "<=" | ">=" | "<" | ">" | "="
FLOAT.3: /[+-]?[0-9]+(\.[0-9]+)?[eE][+-]?[0-9]+/
DECIMAL.2: /[+-]?[0-9]+\.[0-9]+/
INTEGER.1: /[+-]?[0-9]+/
TEXT: /'([^']|'')*'/
QUOTED: /"[^"]+"/
NAME: /[^\W\d]\w*/
%ignore /[ \t\r\n]+/
"""


def parse(text: str) -> Specification[Any]:
    """Read a sentence. Raises `InvalidSpecification`."""
    if not isinstance(text, str):
        raise InvalidSpecification("sentence", "is no text")
    if len(text) > MAX_TEXT:
        raise InvalidSpecification("sentence", f"longer than {MAX_TEXT} characters")
    try:
        found: Any = _PARSER.parse(text)  # a specification: the callbacks make it
    except UnexpectedInput as error:
        raise _fault(text, error) from None
    except _Refused as refused:
        place = refused.place
        raise _pointed(text, place.line or 1, place.column or 1, refused.reason) from None
    except InvalidSpecification:
        raise
    except LeftfoldError as error:
        raise InvalidSpecification("sentence", str(error)) from None
    _check_size(found)
    return cast("Specification[Any]", found)  # see above


def _fault(text: str, error: UnexpectedInput) -> InvalidSpecification:
    """Show the line with a caret under the fault, and what could stand there."""
    wanted = getattr(error, "expected", None) or getattr(error, "allowed", None) or ()
    told = ", ".join(sorted({_terminal(name) for name in wanted}))
    reason = f"expected {told}" if told else "not understood"
    token = getattr(error, "token", None)
    if error.line < 1 or (token is not None and token.type == "$END"):
        lines = text.split("\n")
        return _pointed(text, len(lines), len(lines[-1]) + 1, reason)
    return _pointed(text, error.line, error.column, reason)


def _pointed(text: str, line: int, column: int, reason: str) -> InvalidSpecification:
    begin = max(0, column - SHOWN)
    excerpt = _printable(text.split("\n")[line - 1][begin : column + SHOWN])
    caret = " " * (column - 1 - begin) + "^"
    return InvalidSpecification(f"line {line}, column {column}", f"{reason}\n{excerpt}\n{caret}")


def _printable(text: str) -> str:
    """Return it with one mark for each character that an output may refuse, in its place."""
    return "".join("\N{REPLACEMENT CHARACTER}" if category(c) in {"Cc", "Cs"} else c for c in text)


def _terminal(name: str) -> str:
    known = {"LPAR": "(", "RPAR": ")", "COMMA": ",", "DOT": ".", "$END": "the end"}
    kinds = {"NAME": "a name", "QUOTED": "a name", "TEXT": "a text in quotes", "SIGN": "a sign"}
    numbers = {"INTEGER": "a number", "DECIMAL": "a number", "FLOAT": "a number"}
    return {**known, **kinds, **numbers}.get(name, name.lower())


def _check_size(specification: Specification[Any]) -> None:
    budget = Budget()
    waiting = [(specification, 1)]
    while waiting:
        node, depth = waiting.pop()
        budget.spend("sentence", depth)
        match node:
            case All(parts) | AnyOf(parts):
                waiting.extend((part, depth + 1) for part in parts)
            case Not(part):
                waiting.append((part, depth + 1))
            case _:
                pass


class _Refused(Exception):
    """What was read cannot be part of a specification."""

    def __init__(self, place: Token, reason: str) -> None:
        super().__init__(reason)
        self.place = place
        self.reason = reason


# Its callbacks run while it parses, so that deep nesting meets no recursion.
@v_args(inline=True)
class _Builder(Transformer):  # type: ignore[type-arg]  # lark leaves its arguments open
    def any_of(self, *parts: Specification[Any]) -> Specification[Any]:
        return parts[0] if len(parts) == 1 else AnyOf(parts)

    def all_of(self, *parts: Specification[Any]) -> Specification[Any]:
        return parts[0] if len(parts) == 1 else All(parts)

    def negation(self, part: Specification[Any]) -> Specification[Any]:
        return Not(part)

    def group(self, part: Specification[Any]) -> Specification[Any]:
        return part

    def always(self) -> Specification[Any]:
        return ALWAYS

    def never(self) -> Specification[Any]:
        return NEVER

    def path(self, *names: Token) -> Attribute:
        try:
            return Attribute(".".join(name.strip('"') for name in names))
        except LeftfoldError as error:
            raise _Refused(names[0], str(error)) from None

    def compare(self, left: Attribute, sign: Token, right: object) -> Specification[Any]:
        try:
            return left.compare("==" if sign == "=" else str(sign), right)
        except LeftfoldError as error:
            raise _Refused(sign, str(error)) from None

    def compare_none(self, left: Attribute, sign: Token) -> Specification[Any]:
        return self.compare(left, sign, None)

    def is_none(self, left: Attribute) -> Specification[Any]:
        return left.is_none()

    def is_not_none(self, left: Attribute) -> Specification[Any]:
        return left != None  # noqa: E711 - builds a specification

    def is_in(self, left: Attribute, *values: Value) -> Specification[Any]:
        if len(values) > MAX_VALUES:
            raise InvalidSpecification("sentence", f"more than {MAX_VALUES} values")
        return left.is_in(value for value in values if value is not None)  # an empty list has one

    def between(self, left: Attribute, low: Value, high: Value) -> Specification[Any]:
        return left.between(low, high)

    def contains(self, left: Attribute, text: str) -> Specification[Any]:
        return left.contains(_unquoted(text))

    def starts_with(self, left: Attribute, text: str) -> Specification[Any]:
        return left.startswith(_unquoted(text))

    def ends_with(self, left: Attribute, text: str) -> Specification[Any]:
        return left.endswith(_unquoted(text))

    def a_float(self, text: Token) -> Value:
        return _value(float, text, text, "number")

    def a_decimal(self, text: Token) -> Value:
        return _value(Decimal, text, text, "number")

    def an_integer(self, text: Token) -> Value:
        return _value(int, text, text, "number")

    def a_text(self, text: Token) -> Value:
        return _value(str, text, _unquoted(text), "text")

    def a_truth(self) -> bool:
        return True

    def a_falsehood(self) -> bool:
        return False

    def a_datetime(self, text: Token) -> Value:
        return _value(datetime.fromisoformat, text, _unquoted(text), "datetime")

    def a_date(self, text: Token) -> Value:
        return _value(date.fromisoformat, text, _unquoted(text), "date")

    def a_uuid(self, text: Token) -> Value:
        return _value(UUID, text, _unquoted(text), "uuid")


def _unquoted(text: str) -> str:
    return str(text)[1:-1].replace("''", "'")


def _value(read: Callable[[str], Value], place: Token, text: str, name: str) -> Value:
    if name != "text" and len(text) > SHOWN:
        raise _Refused(place, f"longer than {SHOWN} characters")
    try:
        kept = constant(read(text))
    except LeftfoldError as error:
        raise _Refused(place, str(error)) from None
    except ValueError:
        raise _Refused(place, f"no {name}") from None
    assert kept is not None  # noqa: S101 - it was read
    return kept


_PARSER = Lark(GRAMMAR, parser="lalr", transformer=_Builder())
