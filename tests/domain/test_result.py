from __future__ import annotations

import pickle

import pytest
from pydantic import TypeAdapter

from leftfold.domain import Err, Ok, Result
from leftfold.domain.items import InsufficientStock
from leftfold.domain.result import UnwrapError

ANSWERS: TypeAdapter[Result[int, str]] = TypeAdapter(Result[int, str])


def half(number: int) -> Result[int, str]:
    return Err("odd") if number % 2 else Ok(number // 2)


def never(_: object) -> object:
    pytest.fail("was called")


def tell(result: Result[int, str]) -> str:
    match result:
        case Ok(value):
            return f"ok {value}"
        case Err(error):
            return f"err {error}"


def test_ok_is_ok():
    assert Ok(1).is_ok() is True


def test_err_is_not_ok():
    assert Err("no").is_ok() is False


def test_ok_unwraps_to_its_value():
    assert Ok(1).unwrap() == 1


def test_err_unwraps_by_raising_the_very_error():
    refusal = InsufficientStock("A", 2, 1)
    with pytest.raises(InsufficientStock) as raised:
        Err(refusal).unwrap()
    assert raised.value is refusal


def test_an_error_that_is_no_exception_is_raised_inside_unwrap_error():
    with pytest.raises(UnwrapError, match="no stock") as raised:
        Err("no stock").unwrap()
    assert raised.value.error == "no stock"


def test_ok_does_not_need_the_default():
    assert Ok(1).unwrap_or(2) == 1


def test_err_gives_the_default():
    assert Err("no").unwrap_or(2) == 2


def test_map_changes_the_value_of_ok():
    assert Ok(2).map(str) == Ok("2")


def test_map_leaves_err_alone():
    assert Err("no").map(never) == Err("no")


def test_map_err_changes_the_error_of_err():
    assert Err("no").map_err(len) == Err(2)


def test_map_err_leaves_ok_alone():
    assert Ok(1).map_err(never) == Ok(1)


@pytest.mark.parametrize(("number", "answer"), [(8, Ok(2)), (6, Err("odd")), (3, Err("odd"))])
def test_and_then_goes_on_until_the_first_refusal(number, answer):
    assert half(number).and_then(half) == answer


def test_and_then_does_not_begin_after_err():
    assert Err("no").and_then(never) == Err("no")


def test_match_takes_both_apart():
    assert [tell(Ok(1)), tell(Err("no"))] == ["ok 1", "err no"]


def test_ok_and_err_of_one_value_differ():
    assert Ok(1) != Err(1)


def test_results_can_be_in_a_set():
    assert {Ok(1), Ok(1), Err(1)} == {Ok(1), Err(1)}


def test_ok_is_frozen():
    with pytest.raises(AttributeError):
        Ok(1).value = 2


def test_err_is_frozen():
    with pytest.raises(AttributeError):
        Err("no").error = "yes"


@pytest.mark.parametrize("result", [Ok(1), Err("no")])
def test_a_result_pickles(result):
    assert pickle.loads(pickle.dumps(result)) == result


@pytest.mark.parametrize(
    ("result", "document"), [(Ok(1), b'{"value":1}'), (Err("no"), b'{"error":"no"}')]
)
def test_pydantic_writes_a_result_as_json_and_reads_it_back(result, document):
    assert ANSWERS.dump_json(result) == document
    assert ANSWERS.validate_json(document) == result


def test_pydantic_writes_a_typed_refusal_with_its_facts():
    answers: TypeAdapter[Result[int, InsufficientStock]] = TypeAdapter(
        Result[int, InsufficientStock]
    )
    assert answers.dump_python(Err(InsufficientStock("A", 2, 1)), mode="json") == {
        "error": {
            "error": "InsufficientStock",
            "message": "A: 2 requested, 1 available",
            "sku": "A",
            "requested": 2,
            "available": 1,
        }
    }
