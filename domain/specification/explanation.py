"""Explanations: why a candidate does or does not meet a specification."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from typing import Any

from leftfold.domain.specification.language import sentence
from leftfold.domain.specification.tree import (
    All,
    AnyOf,
    Attribute,
    Compare,
    Not,
    Specification,
    expand,
    name_of,
)

MARKS = {True: "✓", False: "✗"}


@dataclass(frozen=True)
class Explanation:
    """One node of a specification, asked of one candidate."""

    text: str
    """The node as a sentence, or its name."""
    is_satisfied: bool
    seen: tuple[tuple[str, object], ...] = ()
    """The attributes that the node looked at, and their values."""
    parts: tuple[Explanation, ...] = ()

    def lines(self, depth: int = 0) -> Iterator[str]:
        """Yield the lines of the tree, each part indented under its whole."""
        yield f"{'  ' * depth}{MARKS[self.is_satisfied]} {self.told}"
        for part in self.parts:
            yield from part.lines(depth + 1)

    @property
    def told(self) -> str:
        """The node and the values seen, on one line."""
        seen = ", ".join(f"{path} is {value!r}" for path, value in self.seen)
        return f"{self.text} ({seen})" if seen else self.text

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def to_html(self) -> str:
        """Return the tree as nested lists."""
        inner = "".join(part.to_html() for part in self.parts)
        nested = f"<ul>{inner}</ul>" if inner else ""
        colour = "green" if self.is_satisfied else "crimson"
        mark = MARKS[self.is_satisfied]
        return f'<li><span style="color:{colour}">{mark}</span> {escape(self.told)}{nested}</li>'

    def _repr_html_(self) -> str:
        return f'<ul style="list-style:none">{self.to_html()}</ul>'

    def to_mermaid(self) -> str:
        """Return the tree as a Mermaid flowchart."""
        lines = ["flowchart TD"]
        self._draw(lines, "n")
        lines.append("classDef met stroke:green")
        lines.append("classDef unmet stroke:crimson")
        return "\n".join(lines)

    def _draw(self, lines: list[str], node: str) -> None:
        text = "".join(c if c.isalnum() or c in " ._" else f"#{ord(c)};" for c in self.told)
        lines.append(f'{node}["{text}"]:::{"met" if self.is_satisfied else "unmet"}')
        for number, part in enumerate(self.parts):
            lines.append(f"{node} --> {node}_{number}")
            part._draw(lines, f"{node}_{number}")


def explain(specification: Specification[Any], candidate: object) -> Explanation:
    """Explain node by node; no node is left out because another decided already."""
    node = expand(specification)
    name = name_of(specification)
    parts: tuple[Explanation, ...] = ()
    seen: tuple[tuple[str, object], ...] = ()
    match node:
        case All(()) | AnyOf(()):
            text = sentence(node)
            is_satisfied = node.check(candidate)
        case All(members):
            parts = tuple(explain(part, candidate) for part in members)
            text, is_satisfied = "all of", all(part.is_satisfied for part in parts)
        case AnyOf(members):
            parts = tuple(explain(part, candidate) for part in members)
            text, is_satisfied = "any of", any(part.is_satisfied for part in parts)
        case Not(member):
            parts = (explain(member, candidate),)
            text, is_satisfied = "not", not parts[0].is_satisfied
        case Compare(left, _, right):
            looked_at = (left, right) if isinstance(right, Attribute) else (left,)
            seen = tuple((attribute.path, attribute.of(candidate)) for attribute in looked_at)
            text, is_satisfied = sentence(node), node.check(candidate)
        case _:
            text, is_satisfied = sentence(node), node.check(candidate)
    if name:
        return Explanation(f"{name}: {text}", is_satisfied, seen, parts)
    return Explanation(text, is_satisfied, seen, parts)
