"""Specifications as SQL: conditions with bound values on a view's own columns.

Specifications that differ in their constants alone have one form, and so one statement, which is
written once: a query costs what its rows do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import sqlalchemy as sa
from pydantic_core import to_json

from leftfold.domain import Specification
from leftfold.domain.specification import UnknownAttribute
from leftfold.domain.specification.tree import (
    ORDERINGS,
    TEXTUAL,
    All,
    AnyOf,
    Attribute,
    Compare,
    Not,
    expand,
)
from leftfold.domain.specification.values import Value

Condition = sa.ColumnElement[bool]

OPPOSITE = {"<": ">=", "<=": ">", ">": "<=", ">=": "<", "==": "!=", "!=": "=="}


def form_of(specification: Specification[Any]) -> tuple[Specification[Any], list[Compare]]:
    """Return its form, whose constants are their numbers, and the comparisons that hold them.

    Names are expanded; there are no callables, or it raises `TypeError`.
    """
    constants: list[Compare] = []

    def form(specification: Specification[Any]) -> Specification[Any]:
        match expand(specification):
            case All(parts):
                return All(tuple(map(form, parts)))
            case AnyOf(parts):
                return AnyOf(tuple(map(form, parts)))
            case Not(part):
                return Not(form(part))
            case Compare(left, sign, right) as leaf:
                if right is None or isinstance(right, Attribute):
                    return leaf
                constants.append(leaf)
                return Compare(left, sign, len(constants) - 1)
        raise TypeError(specification)

    return form(specification), constants


class Conditions:
    """Writes conditions on one table's columns, and the values they are asked with.

    Logic is two-valued, as in Python: where a column is absent, an ordering does not hold and
    its negation does. Comparisons that are not negated are plain, so that indexes serve.
    """

    def __init__(
        self,
        columns: Mapping[str, sa.Column[Any]],
        encode: Callable[[str, object], object],
        *,
        is_sqlite: bool,
    ) -> None:
        """Write for these columns; `encode` turns a constant into what a column holds."""
        self._columns = columns
        self._encode = encode
        self._is_sqlite = is_sqlite

    def values(self, constants: Sequence[Compare]) -> dict[str, object]:
        """Return what the constants of a form are bound to.

        Raises `UnknownAttribute`, and what `encode` does.
        """
        values: dict[str, object] = {}
        for number, leaf in enumerate(constants):
            path, right = leaf.left.path, leaf.right
            self._column(leaf.left)
            name = _name(number)
            if leaf.sign == "in":
                listed = cast("tuple[Value, ...]", right)  # what `in` compares with
                encoded = [self._encode(path, value) for value in listed]
                values[name] = to_json(encoded).decode() if self._is_sqlite else encoded
            elif isinstance(right, str) and leaf.sign in TEXTUAL:
                values[name] = right
                values[_length(name)] = len(right)
            else:
                values[name] = self._encode(path, right)
        return values

    def write(self, form: Specification[Any], *, negated: bool = False) -> Condition:
        """Return the condition that a form stands for. Raises `UnknownAttribute`."""
        match form:
            case All(parts) if not negated:
                return sa.and_(sa.true(), *(self.write(part) for part in parts))
            case All(parts):
                return sa.or_(sa.false(), *(self.write(part, negated=True) for part in parts))
            case AnyOf(parts) if not negated:
                return sa.or_(sa.false(), *(self.write(part) for part in parts))
            case AnyOf(parts):
                return sa.and_(sa.true(), *(self.write(part, negated=True) for part in parts))
            case Not(part):
                return self.write(part, negated=not negated)
            case Compare() as leaf:
                return self._leaf(leaf, negated=negated)
        raise TypeError(form)

    def _leaf(self, leaf: Compare, *, negated: bool) -> Condition:
        column = self._column(leaf.left)
        sign, right = leaf.sign, leaf.right
        if sign in {"==", "!="}:
            is_equality = (sign == "==") is not negated
            return self._equality(column, leaf, is_equality=is_equality)
        if right is None:
            return sa.true() if negated else sa.false()
        absent: list[sa.Column[Any]] = [column]
        condition: Condition
        if isinstance(right, Attribute):
            other = self._column(right)
            absent.append(other)
            condition = _ordering(column, OPPOSITE[sign] if negated else sign, other)
        elif sign in ORDERINGS:
            value = _bound(leaf, column.type)
            condition = _ordering(column, OPPOSITE[sign] if negated else sign, value)
        else:
            condition = self._listed(leaf, column) if sign == "in" else self._text(leaf, column)
            condition = sa.not_(condition) if negated else condition
        if not negated:
            return condition
        return sa.or_(*(each.is_(None) for each in absent if each.nullable), condition)

    def _equality(self, column: sa.Column[Any], leaf: Compare, *, is_equality: bool) -> Condition:
        right = leaf.right
        if right is None:
            return column.is_(None) if is_equality else column.is_not(None)
        if isinstance(right, Attribute):
            other = self._column(right)
            if is_equality:
                return column.is_not_distinct_from(other)
            return column.is_distinct_from(other)
        value = _bound(leaf, column.type)
        condition: Condition = column == value if is_equality else column != value
        if is_equality or not column.nullable:
            return condition
        return column.is_distinct_from(value)

    def _listed(self, leaf: Compare, column: sa.Column[Any]) -> Condition:
        """Be in a list that is one bound value, however long it is."""
        if self._is_sqlite:
            each = sa.func.json_each(_bound(leaf, sa.Text())).table_valued("value")
            return column.in_(sa.select(each.c.value))
        array = sa.ARRAY(column.type)
        return column == sa.any_(sa.cast(_bound(leaf, array), array))

    def _text(self, leaf: Compare, column: sa.Column[Any]) -> Condition:
        text = _bound(leaf, sa.Text())
        if leaf.sign == "contains":
            find = sa.func.instr if self._is_sqlite else sa.func.strpos
            found: sa.ColumnElement[int] = find(column, text)
            return found > 0
        length = sa.bindparam(_length(text.key), type_=sa.Integer())
        if not self._is_sqlite:
            end = sa.func.left if leaf.sign == "starts with" else sa.func.right
            return end(column, length) == text
        begin = 1 if leaf.sign == "starts with" else -length
        return sa.func.substr(column, begin, length) == text

    def _column(self, attribute: Attribute) -> sa.Column[Any]:
        column = self._columns.get(attribute.path)
        if column is None:
            raise UnknownAttribute("the view", attribute.path)
        return column


def _bound(leaf: Compare, kind: sa.types.TypeEngine[Any]) -> sa.BindParameter[Any]:
    number = cast("int", leaf.right)  # a form's constants are numbers
    return sa.bindparam(_name(number), type_=kind)


def _name(number: int) -> str:
    return f"constant_{number}"


def _length(name: str) -> str:
    return f"{name}_length"


def _ordering(left: sa.Column[Any], sign: str, right: Any) -> Condition:
    condition: Condition = left.op(sign, is_comparison=True)(right)
    return condition
