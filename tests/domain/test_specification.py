from __future__ import annotations

import operator
from dataclasses import dataclass
from decimal import Decimal
from itertools import product
from types import MappingProxyType, SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leftfold.domain import ALWAYS, NEVER, Specification, all_of, any_of, attr
from leftfold.domain.items import InStock, Item, NeedsReorder
from leftfold.domain.specification import PrivateAttribute, UnknownAttribute, UnlikeTypes

OPERATORS = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
NAMES = ("on_hand", "reorder_level")


@dataclass(frozen=True, slots=True)
class Row:
    on_hand: int | None = 0
    reorder_level: int | None = 0
    name: str = ""
    place: object = None


def met(specification, **attributes):
    return specification.is_satisfied_by(Row(**attributes))


# Any specification of two attributes, and any row to try it on.
numbers = st.none() | st.integers(-2, 2)
rows = st.builds(Row, on_hand=numbers, reorder_level=numbers)
leaves = st.builds(
    lambda left, op, right: OPERATORS[op](attr(left), right),
    st.sampled_from(NAMES),
    st.sampled_from(list(OPERATORS)),
    numbers | st.sampled_from(NAMES).map(attr),
) | st.sampled_from([ALWAYS, NEVER, InStock()])
specifications = st.recursive(
    leaves,
    lambda inner: (
        st.builds(operator.and_, inner, inner)
        | st.builds(operator.or_, inner, inner)
        | st.builds(operator.invert, inner)
        | st.lists(inner, max_size=3).map(lambda parts: all_of(*parts))
        | st.lists(inner, max_size=3).map(lambda parts: any_of(*parts))
    ),
    max_leaves=6,
)


@given(specifications, specifications, rows)
def test_specification_composition(a, b, x):
    """Property 1 of the design card."""
    is_a, is_b = a.is_satisfied_by(x), b.is_satisfied_by(x)
    assert a.and_spec(b).is_satisfied_by(x) is (is_a and is_b)
    assert a.or_spec(b).is_satisfied_by(x) is (is_a or is_b)
    assert a.not_spec().is_satisfied_by(x) is (not is_a)


@given(specifications, specifications, rows)
def test_the_operators_mean_the_same_as_the_methods(a, b, x):
    assert (a & b).is_satisfied_by(x) is a.and_spec(b).is_satisfied_by(x)
    assert (a | b).is_satisfied_by(x) is a.or_spec(b).is_satisfied_by(x)
    assert (~a).is_satisfied_by(x) is a.not_spec().is_satisfied_by(x)


@given(specifications, specifications, rows)
def test_de_morgans_laws_hold(a, b, x):
    assert (~(a & b)).is_satisfied_by(x) is (~a | ~b).is_satisfied_by(x)
    assert (~(a | b)).is_satisfied_by(x) is (~a & ~b).is_satisfied_by(x)


@given(st.lists(specifications, max_size=4), rows)
def test_all_of_and_any_of_are_the_long_and_and_or(parts, x):
    answers = [part.is_satisfied_by(x) for part in parts]
    assert all_of(*parts).is_satisfied_by(x) is all(answers)
    assert any_of(*parts).is_satisfied_by(x) is any(answers)


@pytest.mark.parametrize(("a", "b"), list(product([ALWAYS, NEVER], repeat=2)))
def test_truth_table(a, b):
    is_a, is_b = a is ALWAYS, b is ALWAYS
    assert [met(a & b), met(a | b), met(~a)] == [is_a and is_b, is_a or is_b, not is_a]


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("value", [1, 2, 3])
def test_an_attribute_compares_with_a_constant(name, value):
    compare = OPERATORS[name]
    assert met(compare(attr("on_hand"), 2), on_hand=value) is compare(value, 2)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("level", [1, 2, 3])
def test_an_attribute_compares_with_another_attribute(name, level):
    compare = OPERATORS[name]
    specification = compare(attr("on_hand"), attr("reorder_level"))
    assert met(specification, on_hand=2, reorder_level=level) is compare(2, level)


@pytest.mark.parametrize("name", ["<", "<=", ">", ">="])
@pytest.mark.parametrize(("left", "right"), [(None, 1), (1, None), (None, None)])
def test_an_ordering_against_none_is_not_met_and_its_negation_is(name, left, right):
    specification = OPERATORS[name](attr("on_hand"), attr("reorder_level"))
    assert met(specification, on_hand=left, reorder_level=right) is False
    assert met(~specification, on_hand=left, reorder_level=right) is True


@pytest.mark.parametrize(("value", "is_none"), [(None, True), (1, False)])
def test_none_is_equal_to_none_only(value, is_none):
    absent = attr("on_hand") == None  # noqa: E711 - builds a specification
    present = attr("on_hand") != None  # noqa: E711 - see above
    assert met(absent, on_hand=value) is is_none
    assert met(present, on_hand=value) is not is_none


def test_a_decimal_compares_with_a_whole_number():
    assert (attr("price") > 2).is_satisfied_by({"price": Decimal("2.001")})


def test_a_dotted_path_goes_inward():
    assert met(attr("place.shelf.number") == 7, place=SimpleNamespace(shelf={"number": 7}))


def test_a_path_through_none_is_none():
    assert met(attr("place.shelf") == None, place=None)  # noqa: E711 - builds a specification


@pytest.mark.parametrize(
    "candidate",
    [
        {"on_hand": 3},
        MappingProxyType({"on_hand": 3}),
        Row(on_hand=3),
        SimpleNamespace(on_hand=3),
        Item.register("A", "Cup", Decimal(1), opening_stock=3),
    ],
    ids=lambda candidate: type(candidate).__name__,
)
def test_a_candidate_may_be_a_mapping_or_any_object(candidate):
    assert (attr("on_hand") == 3).is_satisfied_by(candidate)


def test_a_mappings_own_methods_are_no_attributes():
    with pytest.raises(UnknownAttribute):
        (attr("items") == 1).is_satisfied_by({"on_hand": 3})


@pytest.mark.parametrize("path", ["_secret", "place._secret", "__class__", "place.__class__"])
def test_private_names_are_refused(path):
    with pytest.raises(PrivateAttribute):
        attr(path)


@pytest.mark.parametrize("path", ["", "a b", "a..b", "a()", "1a", "a.", "a; import os"])
def test_what_is_no_name_is_refused(path):
    with pytest.raises(UnknownAttribute):
        attr(path)


@pytest.mark.parametrize("candidate", [Row(), {"on_hand": 1}])
def test_an_unknown_attribute_is_named(candidate):
    with pytest.raises(UnknownAttribute) as raised:
        (attr("colour") == "red").is_satisfied_by(candidate)
    assert raised.value == UnknownAttribute(type(candidate).__name__, "colour")


def test_an_unknown_attribute_on_the_way_is_named_with_its_owner():
    with pytest.raises(UnknownAttribute) as raised:
        met(attr("place.shelf") == 1, place=SimpleNamespace())
    assert raised.value == UnknownAttribute("SimpleNamespace", "shelf")


def test_types_without_an_order_are_named():
    with pytest.raises(UnlikeTypes) as raised:
        met(attr("name") < 3, name="Cup")
    assert raised.value == UnlikeTypes("str", "int")


def test_unlike_types_are_not_silently_unequal():
    with pytest.raises(UnlikeTypes):
        met(attr("name") != 3, name="Cup")


def test_a_specification_is_neither_true_nor_false():
    with pytest.raises(TypeError, match=r"combine with & \| ~"):
        bool(attr("on_hand") > 0)


def test_a_chained_comparison_is_refused():
    with pytest.raises(TypeError, match=r"combine with & \| ~"):
        0 < attr("on_hand") < 9  # noqa: B015 - the comparison raises


def test_a_constant_on_the_left_means_the_same():
    specification = 2 < attr("on_hand")  # noqa: SIM300 - the point of the test
    assert [met(specification, on_hand=n) for n in (2, 3)] == [False, True]


class Cheap(Specification[Row]):
    def tree(self):
        return attr("price") < 1


def test_a_named_specification_stands_for_its_tree():
    assert Cheap().is_satisfied_by({"price": 0})
    assert not Cheap().is_satisfied_by({"price": 1})


def test_a_named_specification_combines_like_any_other():
    either = Cheap() | (attr("on_hand") > 5)
    assert either.is_satisfied_by({"price": 3, "on_hand": 6})
    assert not (~Cheap() & ALWAYS).is_satisfied_by({"price": 0})


def test_equal_specifications_are_equal():
    assert (attr("on_hand") > 5) == (attr("on_hand") > 5)
    assert (attr("on_hand") > 5) != (attr("on_hand") > 6)


def test_specifications_can_be_in_a_set():
    assert len({attr("on_hand") > 5, attr("on_hand") > 5, attr("on_hand") < 5}) == 2


@pytest.mark.parametrize(("on_hand", "is_met"), [(0, False), (1, True)])
def test_in_stock(on_hand, is_met):
    assert met(InStock(), on_hand=on_hand) is is_met


@pytest.mark.parametrize(
    ("on_hand", "discontinued", "is_met"),
    [(4, False, True), (5, False, True), (6, False, False), (4, True, False)],
)
def test_needs_reorder(on_hand, discontinued, is_met):
    candidate = {"on_hand": on_hand, "reorder_level": 5, "discontinued": discontinued}
    assert NeedsReorder().is_satisfied_by(candidate) is is_met
