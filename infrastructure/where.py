"""Specifications as SQL: conditions with bound values on a view's own columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import sqlalchemy as sa
from pydantic_core import to_json

from leftfold.domain import Specification
from leftfold.domain.specification import UnknownAttribute
from leftfold.domain.specification.tree import (
    ORDERINGS,
    All,
    AnyOf,
    Attribute,
    Compare,
    Not,
    expand,
)

Condition = sa.ColumnElement[bool]

OPPOSITE = {"<": ">=", "<=": ">", ">": "<=", ">=": "<", "==": "!=", "!=": "=="}


class Conditions:
    """Writes conditions on one table's columns.

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

    def write(self, specification: Specification[Any], *, negated: bool = False) -> Condition:
        """Return the condition. Raises `UnknownAttribute`; the specification has no callables."""
        match expand(specification):
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
        raise TypeError(specification)

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
            value = self._value(leaf.left, column, right)
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
        value = self._value(leaf.left, column, right)
        condition: Condition = column == value if is_equality else column != value
        if is_equality or not column.nullable:
            return condition
        return column.is_distinct_from(value)

    def _listed(self, leaf: Compare, column: sa.Column[Any]) -> Condition:
        """Be in a list that is one bound value, however long it is."""
        listed = cast("tuple[Any, ...]", leaf.right)  # what `in` compares with
        values = [self._encode(leaf.left.path, value) for value in listed]
        if self._is_sqlite:
            each = sa.func.json_each(sa.literal(to_json(values).decode())).table_valued("value")
            return column.in_(sa.select(each.c.value))
        array = sa.ARRAY(column.type)
        return column == sa.any_(sa.cast(sa.literal(values, array), array))

    def _text(self, leaf: Compare, column: sa.Column[Any]) -> Condition:
        text = cast("str", leaf.right)  # what text is compared with
        value = sa.literal(text, sa.Text())
        if leaf.sign == "contains":
            found: sa.ColumnElement[int] = (
                sa.func.instr(column, value) if self._is_sqlite else sa.func.strpos(column, value)
            )
            return found > 0
        length = sa.literal(len(text), sa.Integer())
        if leaf.sign == "starts with":
            if self._is_sqlite:
                return sa.func.substr(column, 1, length) == value
            return sa.func.starts_with(column, value)
        if not self._is_sqlite:
            return sa.func.right(column, length) == value
        if not text:
            return sa.func.length(column) >= 0
        return sa.func.substr(column, -len(text)) == value

    def _column(self, attribute: Attribute) -> sa.Column[Any]:
        column = self._columns.get(attribute.path)
        if column is None:
            raise UnknownAttribute("the view", attribute.path)
        return column

    def _value(self, left: Attribute, column: sa.Column[Any], value: object) -> Any:
        return sa.literal(self._encode(left.path, value), column.type)


def _ordering(left: sa.Column[Any], sign: str, right: Any) -> Condition:
    condition: Condition = left.op(sign, is_comparison=True)(right)
    return condition
