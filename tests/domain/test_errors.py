from __future__ import annotations

import copy
import pickle
from contextlib import contextmanager

import pytest
from pydantic import TypeAdapter, ValidationError

from leftfold.domain import AggregateNotFound, DomainError, LeftfoldError
from leftfold.domain.items import InsufficientStock, ItemError, ItemNotFound

SHORT = InsufficientStock(sku="A", requested=3, available=1)


class TooOften(DomainError):
    count: int


class MuchTooOften(TooOften, message="{count} times in {place}"):
    place: str


def test_an_error_carries_its_facts():
    assert SHORT.facts() == {"sku": "A", "requested": 3, "available": 1}


def test_an_error_reads_as_a_sentence():
    assert str(SHORT) == "A: 3 requested, 1 available"


def test_an_error_without_a_sentence_reads_as_its_name():
    assert str(TooOften(3)) == "TooOften"


def test_repr_shows_the_facts():
    assert repr(SHORT) == "InsufficientStock(sku='A', requested=3, available=1)"


def test_a_subclass_adds_its_facts_to_those_it_inherits():
    assert str(MuchTooOften(3, "a row")) == "3 times in a row"


def test_errors_of_one_class_with_equal_facts_are_equal():
    assert InsufficientStock("A", 3, 1) == SHORT


def test_errors_with_other_facts_differ():
    assert InsufficientStock("A", 3, 2) != SHORT


def test_errors_of_two_classes_differ_though_their_facts_are_equal():
    class Another(DomainError):
        sku: str

    assert Another("A") != ItemNotFound("A")


def test_equal_errors_have_one_hash():
    assert len({SHORT, InsufficientStock("A", 3, 1)}) == 1


@pytest.mark.parametrize("duplicate", [lambda e: pickle.loads(pickle.dumps(e)), copy.deepcopy])
def test_an_error_is_equal_after_pickling_and_copying(duplicate):
    assert duplicate(SHORT) == SHORT


def test_every_refusal_of_an_item_is_one_tree():
    assert issubclass(InsufficientStock, ItemError)
    assert issubclass(ItemError, DomainError)
    assert issubclass(DomainError, LeftfoldError)
    assert issubclass(AggregateNotFound, DomainError)


def test_an_error_goes_through_a_context_manager():
    @contextmanager
    def around():
        yield

    with pytest.raises(InsufficientStock) as raised, around():
        raise SHORT
    assert raised.value is SHORT


def test_the_root_of_the_tree_reads_as_its_name():
    assert str(LeftfoldError()) == "LeftfoldError"


def test_pydantic_dumps_name_sentence_and_facts():
    assert TypeAdapter(ItemError).dump_python(SHORT) == {
        "error": "InsufficientStock",
        "message": "A: 3 requested, 1 available",
        "sku": "A",
        "requested": 3,
        "available": 1,
    }


def test_pydantic_takes_the_error_itself():
    assert TypeAdapter(ItemError).validate_python(SHORT) is SHORT


def test_pydantic_refuses_an_error_of_another_branch():
    with pytest.raises(ValidationError):
        TypeAdapter(ItemError).validate_python(TooOften(3))
