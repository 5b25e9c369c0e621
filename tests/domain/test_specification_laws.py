"""What holds for every specification, whatever it looks at."""

from __future__ import annotations

import copy
import os
import pickle
from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal
from enum import Enum
from uuid import UUID

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from leftfold.domain import ALWAYS, NEVER, Specification, all_of, any_of, attr
from leftfold.domain.specification.tree import Compare, Not
from leftfold.infrastructure.testing import candidates, satisfying, specifications, violating

CASES = int(os.environ.get("LEFTFOLD_LAW_CASES", "200"))
laws = settings(max_examples=CASES)


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True)
class Thing:
    whole: int | None
    other: int | None
    price: Decimal | None
    ratio: float | None
    name: str | None
    label: str
    is_old: bool | None
    seen: datetime | None
    day: date | None
    ident: UUID | None
    colour: Colour | None


specs = specifications(Thing, max_leaves=4)
middling = specifications(Thing, max_leaves=3)
small = specifications(Thing, max_leaves=2)
things = candidates(Thing)


@st.composite
def asked(draw):
    """A specification, and a candidate near its bounds."""
    spec = draw(specs)
    return spec, draw(candidates(Thing, spec))


@laws
@given(specs, small, things)
def test_and_or_and_not_are_those_of_python(a, b, x):
    is_a, is_b = a.is_satisfied_by(x), b.is_satisfied_by(x)
    assert (a & b).is_satisfied_by(x) is (is_a and is_b)
    assert (a | b).is_satisfied_by(x) is (is_a or is_b)
    assert (~a).is_satisfied_by(x) is (not is_a)


@laws
@given(small, small, small, things)
def test_the_laws_of_boolean_algebra_hold(a, b, c, x):
    def same(left, right):
        return left.is_satisfied_by(x) is right.is_satisfied_by(x)

    assert same(~(a & b), ~a | ~b)
    assert same(~(a | b), ~a & ~b)
    assert same(a & b, b & a)
    assert same(a | b, b | a)
    assert same((a & b) & c, a & (b & c))
    assert same((a | b) | c, a | (b | c))
    assert same(a & (a | b), a)
    assert same(a | (a & b), a)
    assert same(a & (b | c), (a & b) | (a & c))
    assert same(~~a, a)


@laws
@given(asked())
def test_the_compiled_function_says_what_the_tree_says(pair):
    spec, x = pair
    assert spec.is_satisfied_by(x) is spec.check(x)


@laws
@given(asked())
def test_a_mapping_is_judged_as_an_object_is(pair):
    spec, x = pair
    assert spec.is_satisfied_by(dict(vars(x))) is spec.check(x)


@laws
@given(asked())
def test_binding_keeps_the_meaning(pair):
    spec, x = pair
    assert spec.bind(Thing).is_satisfied_by(x) is spec.check(x)


@laws
@given(asked())
def test_simplifying_keeps_the_meaning(pair):
    spec, x = pair
    assert spec.simplify().check(x) is spec.check(x)


@laws
@given(specs)
def test_simplifying_twice_changes_nothing_more(spec):
    once = spec.simplify()
    assert once.simplify() == once


@laws
@given(specs)
def test_a_simple_specification_is_negated_at_its_leaves_only(spec):
    waiting = [spec.simplify()]
    while waiting:
        node = waiting.pop()
        if isinstance(node, Not):
            assert isinstance(node.part, Compare)
        else:
            waiting.extend(getattr(node, "parts", ()))


@laws
@given(asked())
def test_json_gives_the_same_tree(pair):
    spec, x = pair
    again = Specification.from_json(spec.to_json())
    assert again == spec
    assert again.check(x) is spec.check(x)


@laws
@given(asked())
def test_a_sentence_is_read_as_it_was_meant(pair):
    spec, x = pair
    again = Specification.parse(str(spec))
    assert again.check(x) is spec.check(x)
    assert Specification.parse(str(again)) == again


@laws
@given(specs)
def test_repr_evaluates_back(spec):
    import datetime as dt

    scope = {
        "ALWAYS": ALWAYS,
        "NEVER": NEVER,
        "all_of": all_of,
        "any_of": any_of,
        "attr": attr,
        "Decimal": Decimal,
        "UUID": UUID,
        "datetime": dt,
    }
    assert eval(repr(spec), scope) == spec


@laws
@given(specs)
def test_copies_are_equal_and_ask_the_same(spec):
    spec.is_satisfied_by  # noqa: B018 - so that something is compiled
    assert pickle.loads(pickle.dumps(spec)) == copy.deepcopy(spec) == spec
    assert hash(copy.copy(spec)) == hash(spec)


@laws
@given(asked())
def test_an_explanation_agrees(pair):
    spec, x = pair
    explanation = spec.explain(x)
    assert explanation.is_satisfied is spec.check(x)
    assert str(explanation)
    assert explanation.to_html()
    assert explanation.to_mermaid()


@st.composite
def related(draw):
    """Two specifications that have much in common, and a candidate near their bounds."""
    part, other = draw(middling), draw(middling)
    a = draw(st.sampled_from([part, part & other, ~part]))
    b = draw(st.sampled_from([part, part | other, other, ~other, part.simplify()]))
    return a, b, draw(candidates(Thing, all_of(a, b)))


@laws
@given(related())
def test_implies_is_never_wrong(triple):
    a, b, x = triple
    if a.implies(b) and a.check(x):
        assert b.check(x)


@dataclass(frozen=True)
class Whole:
    whole: int | None


@dataclass(frozen=True)
class Price:
    price: Decimal | None


@dataclass(frozen=True)
class Name:
    name: str | None


@dataclass(frozen=True)
class Ratio:
    ratio: float | None


OF_ONE = {
    name: (model, specifications(model, max_leaves=2))
    for name, model in {"whole": Whole, "price": Price, "name": Name, "ratio": Ratio}.items()
}


@laws
@given(st.sampled_from(["whole", "price", "name", "ratio"]), st.data())
def test_implies_is_never_wrong_of_leaves_on_one_attribute(name, data):
    model, smaller = OF_ONE[name]
    a, b = data.draw(smaller), data.draw(smaller)
    x = data.draw(candidates(model, all_of(a, b)))
    if a.implies(b):
        assert b.check(x) or not a.check(x)
    assert (a & b).simplify().check(x) is (a & b).check(x)
    assert (a | b).simplify().check(x) is (a | b).check(x)


@laws
@given(specs, specs)
def test_implication_is_reflexive_and_follows_from_more(a, b):
    assume(len(repr(a)) + len(repr(b)) < 2_000)
    assert a.implies(a)
    assert (a & b).implies(a)
    assert a.implies(a | b)


@given(st.data())
def test_candidates_can_be_drawn_that_satisfy_or_violate(data):
    spec = (attr("whole") > 100) & attr("name").startswith("a")
    assert spec.check(data.draw(satisfying(spec, Thing)))
    assert not spec.check(data.draw(violating(spec, Thing)))
