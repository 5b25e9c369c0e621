from __future__ import annotations

import copy
import pickle
from datetime import date

import pytest
from pydantic import BaseModel, ValidationError

from leftfold.domain import Personal
from leftfold.domain.items import StockSold


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
