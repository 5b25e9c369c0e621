from __future__ import annotations

import copy
import json
import pickle
from datetime import date

import pytest
from pydantic import BaseModel, TypeAdapter, ValidationError

from leftfold.domain import DomainError, Event, Personal
from leftfold.domain.items import StockSold
from leftfold.domain.personal import note, noting


class Guest(BaseModel):
    name: Personal[str]
    born: Personal[date] | None = None


@pytest.mark.parametrize("show", [repr, str, "{}".format, "%s".__mod__])
def test_a_personal_value_is_not_shown(show):
    assert "Ada" not in show(Personal("Ada"))


def test_a_model_does_not_show_its_personal_field():
    assert "Ada" not in repr(Guest(name=Personal("Ada")))


def test_reveal_shows_the_value():
    assert Personal("Ada").reveal() == "Ada"


def test_personal_values_compare_by_what_they_hold():
    assert Personal("Ada") == Personal("Ada")
    assert Personal("Ada") != Personal("Bob")
    assert hash(Personal("Ada")) == hash(Personal("Ada"))


def test_a_personal_value_is_not_equal_to_the_value():
    assert Personal("Ada") != "Ada"


@pytest.mark.parametrize("duplicate", [lambda p: pickle.loads(pickle.dumps(p)), copy.deepcopy])
def test_a_personal_value_is_equal_after_pickling_and_copying(duplicate):
    assert duplicate(Personal("Ada")) == Personal("Ada")


def test_a_plain_value_is_wrapped():
    assert Guest(name="Ada").name == Personal("Ada")


def test_the_value_inside_is_validated():
    with pytest.raises(ValidationError):
        Guest(name=17)


def test_json_holds_the_value_itself():
    assert Guest(name="Ada", born=date(1815, 12, 10)).model_dump_json() == (
        '{"name":"Ada","born":"1815-12-10"}'
    )


def test_a_personal_value_comes_back_from_json():
    guest = Guest(name="Ada", born=date(1815, 12, 10))
    assert Guest.model_validate_json(guest.model_dump_json()) == guest


def test_python_dump_holds_the_value_itself_and_comes_back():
    guest = Guest(name="Ada")
    assert guest.model_dump(mode="python") == {"name": "Ada", "born": None}
    assert Guest.model_validate(guest.model_dump(mode="python")) == guest


@pytest.mark.parametrize("customer", [Personal("17850"), None])
def test_an_event_keeps_its_personal_field_through_json(customer):
    sold = StockSold(
        invoice="536365", quantity=6, unit_price="2.55", country="France", customer_id=customer
    )
    assert StockSold.model_validate_json(sold.model_dump_json()) == sold


def test_facts_of_an_event_hide_its_personal_field():
    sold = StockSold(
        invoice="536365", quantity=6, unit_price="2.55", country="", customer_id="17850"
    )
    assert "17850" not in repr(sold.facts())


class Seen(Event, topic="test.seen"):
    born: Personal[date] | None = None
    name: Personal[str] | None = None


class Banned(DomainError, message="{name} is banned"):
    name: Personal[str]


def test_the_value_in_a_personal_is_validated_too():
    with pytest.raises(ValidationError):
        Seen(born=Personal("the tenth of December"))
    with pytest.raises(ValidationError):
        Guest(name=Personal(17))


def test_a_value_in_a_personal_is_converted_as_one_outside_is():
    assert Seen(born=Personal("1815-12-10")).born.reveal() == date(1815, 12, 10)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Seen(born="Lovelace"),
        lambda: Seen(born=Personal("Lovelace")),
        lambda: Seen(surname="Lovelace"),
    ],
)
def test_errors_of_events_do_not_quote_what_they_were_given(make):
    with pytest.raises(ValidationError) as raised:
        make()
    assert "Lovelace" not in str(raised.value)


def test_an_event_has_a_personal_value_of_its_own():
    ada = Personal("Ada")
    event = Seen(name=ada)
    assert event.name == ada
    assert event.name is not ada


def test_an_error_shows_no_personal_fact():
    error = Banned(Personal("Ada"))
    assert json.loads(TypeAdapter(Banned).dump_json(error)) == {
        "error": "Banned",
        "message": "Personal(***) is banned",
        "name": "Personal(***)",
    }


def test_blocks_that_note_what_is_revealed_nest():
    with noting() as outer:
        with noting() as inner:
            note([Personal("Ada")])
        assert len(inner) == len(outer) == 1
