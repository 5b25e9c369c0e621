"""Specifications, projections, repositories and scenarios keep the types they are given."""
# pyright: strict, reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

from dataclasses import dataclass
from typing import assert_type
from uuid import UUID

from leftfold.application import Page, Projection, Repository, Views
from leftfold.domain import Specification, all_of, attr
from leftfold.domain.items import InStock, Item, ItemRegistered, StockSold
from leftfold.infrastructure.testing import Scenario, scenario


@dataclass(frozen=True)
class Shelf:
    pieces: int


class Full(Specification[Shelf]):
    """A shelf that takes no more."""

    def tree(self) -> Specification[Shelf]:
        return attr("pieces") >= 10


def specifications(full: Full, shelf: Shelf, item: Item) -> None:
    assert_type(full.is_satisfied_by(shelf), bool)
    assert_type(~full, Specification[Shelf])
    assert_type(full & InStock(), Specification[Shelf])
    assert_type(all_of(full, attr("pieces") > 1), Specification[Shelf])
    full.is_satisfied_by(item)  # type: ignore[arg-type]


shelves = Projection("shelves", version=1, row=Shelf, specification=Full())


@shelves.on(ItemRegistered)
def registered(row: Shelf | None, event: ItemRegistered) -> Shelf | None:
    return row or Shelf(event.opening_stock)


@shelves.on(StockSold)  # type: ignore[arg-type]
def another_event(row: Shelf | None, event: ItemRegistered) -> Shelf | None:
    return row or Shelf(event.opening_stock)


@shelves.on(StockSold)  # type: ignore[arg-type]
def another_row(row: Item | None, event: StockSold) -> Item | None:
    return row


async def views(views: Views) -> None:
    assert_type(await views.get(shelves, "A"), Shelf | None)
    assert_type(await views.rows(shelves), tuple[Shelf, ...])
    assert_type(await views.page(shelves, "pieces", 10), Page[Shelf])


def repositories(repository: Repository, item_id: UUID) -> None:
    assert_type(repository.load(Item, item_id), Item)
    assert_type(repository.find(Item, item_id), Item | None)
    assert_type(repository.find_all(Item, [item_id]), list[Item | None])


def scenarios() -> None:
    assert_type(scenario(Item), Scenario[Item])
    scenario(Item).when(lambda item: item.sell(1, "536365"))
