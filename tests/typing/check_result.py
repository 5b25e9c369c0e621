"""Results: matching is exhaustive, and their types are covariant."""
# pyright: strict, reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

from typing import assert_never, assert_type

from leftfold.domain import Err, Ok, Personal, Result


def tell(result: Result[int, str]) -> str:
    match result:
        case Ok(value):
            assert_type(value, int)
            return str(value)
        case Err(error):
            assert_type(error, str)
            return error
        case _:
            assert_never(result)


def forgetful(result: Result[int, str]) -> str:
    match result:
        case Ok(value):
            return str(value)
        case _:
            assert_never(result)  # type: ignore[arg-type]


def narrowing(result: Result[int, str]) -> None:
    if isinstance(result, Ok):
        assert_type(result, Ok[int])
    else:
        assert_type(result, Err[str])


def widened(result: Result[bool, KeyError]) -> Result[int, LookupError]:
    return result


def narrowed(result: Result[int, LookupError]) -> Result[bool, LookupError]:
    return result  # type: ignore[return-value]


def methods(result: Result[int, str]) -> None:
    assert_type(result.unwrap(), int)
    assert_type(result.unwrap_or(None), int | None)
    assert_type(result.map(str), Ok[str] | Err[str])
    assert_type(result.map_err(len), Ok[int] | Err[int])


def half(number: int) -> Result[float, KeyError]:
    return Ok(number / 2)


def chained(result: Result[int, str]) -> None:
    assert_type(result.and_then(half), Ok[float] | Err[KeyError] | Err[str])


def personal(name: Personal[str]) -> None:
    assert_type(name.reveal(), str)
    assert_type(shown(name), str)


def shown(anything: Personal[object]) -> str:
    return str(anything)
