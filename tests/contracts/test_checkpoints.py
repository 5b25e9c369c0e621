"""What every store of checkpoints must do: who is how far, and what a page writes all or none."""

from __future__ import annotations

from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from decimal import Decimal
from threading import Thread
from time import monotonic, sleep
from uuid import UUID, uuid4

import pytest

from leftfold.application import Projection
from leftfold.application.checkpoints import Change, Comparison, DeadLetter
from leftfold.application.errors import NotUnique
from leftfold.application.ports import Committed, EncodedEvent, Group, Save
from leftfold.application.subscriber import Subscriber
from leftfold.domain import attr
from leftfold.domain.items import ItemRegistered, StockSold
from leftfold.infrastructure import ValueOutOfRangeError, ViewChangedError
from leftfold.infrastructure.settings import load_settings
from leftfold.infrastructure.stores import make_store

A, B = UUID(int=1), UUID(int=2)


@dataclass(frozen=True, slots=True)
class Stock:
    name: str
    on_hand: int
    price: Decimal | None = None


@dataclass(frozen=True, slots=True)
class Named:
    name: str


def view(name="stock", version=1, row=Stock, events=(), **options):
    projection = Projection(name, version=version, row=row, **options)
    for event_type in events:
        projection.on(event_type)(lambda row, _: row)
    return projection


stock, sales, newer = view(), view("sales"), view(version=2)
READERS = (stock, sales, newer)
CUP, JUG, POT = Stock("Cup", 1), Stock("Jug", 2, Decimal("2.5")), Stock("Pot", 3)


@contextmanager
def opened(url, readers=READERS):
    store = make_store(load_settings(store=url))
    store.open(readers, create_tables=True)
    yield store
    store.close()


def save(aggregate_id=A, version=1, command_id=None):
    event = EncodedEvent(aggregate_id, version, "sold", b"{}")
    return Save(command_id or uuid4(), "Sell", [event], ((aggregate_id, version),), None)


def letter(position, key="k", error="ValueError", aggregate_id=A):
    parked_at = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
    return DeadLetter(position, key, aggregate_id, 7, "sold", error, parked_at)


def at(views, reader):
    return views.checkpoints([reader])[0]


def change(views, reader, rows=(), **options):
    """What a page changes that begins where the reader is."""
    return Change(reader, at(views, reader), dict(rows), **options)


def rows(views, projection):
    return dict(views.select(projection, None, None))


class CheckpointContract:
    @pytest.fixture
    def store(self, url):
        with opened(url) as store:
            yield store

    @pytest.fixture
    def views(self, store):
        return store.views

    # How far readers are

    def test_checkpoints_come_in_the_order_asked_for(self, views):
        views.write([change(views, sales)], 5)
        views.write([change(views, newer)], 9)
        found = views.checkpoints([newer, stock, sales])
        assert [checkpoint.position for checkpoint in found] == [9, 0, 5]

    def test_a_new_reader_of_an_empty_log_is_built_and_is_nobodys(self, views):
        found = at(views, stock)
        assert (found.position, found.owner, found.is_held) == (0, "", False)
        assert (found.is_built, found.dead_letters) == (True, 0)

    def test_a_new_view_of_a_log_with_events_is_not_built_yet(self, store):
        store.log.commit([Group([save()])])
        late = view("late")
        store.views.define(late)
        assert (at(store.views, late).position, at(store.views, late).is_built) == (0, False)

    def test_a_new_subscriber_begins_at_the_logs_end_unless_it_wants_all(self, store):
        store.log.commit([Group([save(version=1)]), Group([save(version=2)])])
        late, early = Subscriber("late"), Subscriber("early", from_beginning=True)
        store.views.define(late)
        store.views.define(early)
        assert at(store.views, late)[:1] == (store.log.head(),)
        assert at(store.views, late).is_built
        assert (at(store.views, early).position, at(store.views, early).is_built) == (0, False)

    # Who may move them on

    def test_who_holds_a_free_reader_is_its_owner(self, views):
        before = at(views, stock)
        (held,) = views.hold([stock], "me", 60)
        assert (held.owner, held.is_held, held.position) == ("me", True, 0)
        assert held.epoch > before.epoch
        assert held == at(views, stock)

    def test_holding_again_gives_no_other_epoch(self, views):
        (first,) = views.hold([stock], "me", 60)
        assert views.hold([stock], "me", 60) == [first]

    def test_what_another_holds_stays_the_others(self, views):
        (theirs,) = views.hold([stock], "them", 60)
        found = views.hold([sales, stock], "me", 60)
        assert [checkpoint.owner for checkpoint in found] == ["me", "them"]
        assert found[1] == theirs == at(views, stock)

    def test_of_those_that_hold_at_once_one_is_the_owner(self, views):
        answers = []

        def race(owner):
            answers.append(views.hold([stock, sales], owner, 60))

        racers = [Thread(target=race, args=(f"{n}",)) for n in range(4)]
        for racer in racers:
            racer.start()
        for racer in racers:
            racer.join(20)
        owners = {checkpoint.owner for answer in answers for checkpoint in answer}
        assert len(answers) == 4
        assert len(owners - {""}) == 1  # who came too late may not have seen whose it will be

    def test_what_is_released_another_may_hold_in_another_epoch(self, views):
        (mine,) = views.hold([stock], "me", 60)
        views.hold([sales], "them", 60)
        views.release("me")
        free = at(views, stock)
        assert (free.owner, free.is_held, free.position) == ("", False, 0)
        assert at(views, sales).owner == "them"
        (theirs,) = views.hold([stock], "them", 60)
        assert theirs.owner == "them"
        assert theirs.epoch > mine.epoch

    def test_who_holds_nothing_may_release_it(self, views):
        (held,) = views.hold([stock], "me", 60)
        views.release("nobody")
        assert at(views, stock) == held

    def test_holding_moves_no_checkpoint(self, views):
        views.write([change(views, stock, {"a": CUP}, parked=[letter(3)])], 5, is_built=True)
        (held,) = views.hold([stock], "me", 60)
        assert (held.position, held.is_built, held.dead_letters) == (5, True, 1)

    # What a page writes

    def test_a_page_of_several_readers_moves_all_of_them(self, views):
        changes = [
            change(views, stock, {"a": CUP}),
            change(views, sales, {"b": JUG}),
            change(views, newer),
        ]
        assert views.write(changes, 7)
        assert [c.position for c in views.checkpoints(READERS)] == [7, 7, 7]
        assert rows(views, stock) == {"a": CUP}
        assert rows(views, sales) == {"b": JUG}

    @pytest.mark.parametrize("wrong", [{"position": 6}, {"epoch": -1}])
    @pytest.mark.parametrize("late", [0, 1])
    def test_a_page_of_several_readers_writes_nothing_if_one_is_elsewhere(self, views, wrong, late):
        views.write([change(views, stock, {"a": CUP}), change(views, sales, {"a": CUP})], 5)
        before = views.checkpoints(READERS)
        changes = [
            change(views, stock, {"a": None, "b": JUG}, parked=[letter(6)]),
            change(views, sales, {"a": None, "b": JUG}, parked=[letter(6)]),
        ]
        elsewhere = changes[late].checkpoint._replace(**wrong)
        changes[late] = replace(changes[late], checkpoint=elsewhere)
        assert not views.write(changes, 9, is_built=True, is_fence=True)
        assert views.checkpoints(READERS) == before
        assert (rows(views, stock), rows(views, sales)) == ({"a": CUP}, {"a": CUP})
        assert views.dead_letters(stock) == []

    def test_what_was_begun_before_another_owner_is_not_written(self, views):
        views.hold([stock], "me", 60)
        begun = change(views, stock, {"a": CUP})
        views.release("me")
        views.hold([stock], "them", 60)
        assert not views.write([begun], 5)
        assert (at(views, stock).position, rows(views, stock)) == (0, {})

    def test_what_was_begun_before_another_owner_is_not_written_though_it_is_free_again(
        self, views
    ):
        views.hold([stock], "me", 60)
        begun = change(views, stock, {"a": CUP})
        views.release("me")
        views.hold([stock], "them", 60)
        views.release("them")
        assert not views.write([begun], 5)

    def test_a_page_stays_valid_while_its_owner_holds_on(self, views):
        views.hold([stock], "me", 60)
        begun = change(views, stock, {"a": CUP})
        views.hold([stock], "me", 60)
        assert views.write([begun], 5)

    def test_a_page_keeps_owner_and_epoch(self, views):
        (held,) = views.hold([stock], "me", 60)
        views.write([change(views, stock)], 5)
        assert at(views, stock) == held._replace(position=5)

    def test_a_fence_makes_what_was_begun_before_it_invalid(self, views):
        views.hold([stock], "me", 60)
        begun = change(views, stock, {"a": CUP})
        assert views.write([begun], 0, is_fence=True)
        assert not views.write([begun], 5)
        assert at(views, stock).epoch == begun.checkpoint.epoch + 1
        assert (at(views, stock).position, at(views, stock).owner) == (0, "me")

    def test_why_a_reader_stopped_is_kept_until_another_takes_it_over(self, views):
        views.hold([stock], "me", 60)
        views.halt(stock, at(views, stock), "it is bad")
        assert at(views, stock).failure == "it is bad"
        assert at(views, sales).failure == ""
        views.hold([stock], "me", 60)
        views.release("me")
        assert at(views, stock).failure == "it is bad"
        views.hold([stock], "other", 60)
        assert at(views, stock).failure == ""
        views.halt(stock, at(views, stock), "it is bad still")
        assert at(views, stock).failure == "it is bad still"

    def test_why_a_reader_stopped_is_forgotten_with_a_change_from_outside(self, views):
        views.halt(stock, at(views, stock), "it is bad")
        assert views.write([change(views, stock)], 0, is_fence=True)
        assert at(views, stock).failure == ""

    def test_who_was_moved_on_has_not_stopped_where_it_was(self, views):
        before = at(views, stock)
        views.write([change(views, stock)], 5)
        views.halt(stock, before, "it is bad")
        in_an_older_epoch = at(views, stock)
        views.hold([stock], "me", 60)
        views.halt(stock, in_an_older_epoch, "it is bad")
        assert at(views, stock).failure == ""

    def test_a_view_is_built_once_a_page_says_so_and_stays_it(self, store):
        store.log.commit([Group([save()])])
        late, views = view("late"), store.views
        views.define(late)
        views.write([change(views, late)], 1)
        assert not at(views, late).is_built
        views.write([change(views, late)], 2, is_built=True)
        assert at(views, late).is_built
        views.write([change(views, late)], 3)
        assert at(views, late).is_built

    def test_a_row_that_cannot_be_kept_leaves_all_readers_where_they_are(self, views):
        changes = [change(views, stock, {"a": CUP}), change(views, sales, {"b": Stock("\0", 1)})]
        with pytest.raises(ValueOutOfRangeError):
            views.write(changes, 7)
        assert [c.position for c in views.checkpoints(READERS)] == [0, 0, 0]
        assert rows(views, stock) == {}

    def test_what_has_no_rows_has_a_checkpoint_too(self, views):
        told = Subscriber("told")
        views.define(told)
        views.write([change(views, told, parked=[letter(3)])], 5)
        assert (at(views, told).position, at(views, told).dead_letters) == (5, 1)

    # Dead letters

    def test_dead_letters_come_back_as_they_went_by_position_and_key(self, views):
        letters = [letter(9, "b", ""), letter(3, "ü"), letter(3, "Z", aggregate_id=B)]
        views.write([change(views, stock, parked=letters)], 9)
        assert views.dead_letters(stock) == [letters[2], letters[1], letters[0]]
        assert at(views, stock).dead_letters == 3

    def test_the_first_of_some_events_that_was_put_aside_is_found(self, views):
        letters = [letter(3, "a"), letter(3, "b"), letter(5, "a", aggregate_id=B), letter(9, "a")]
        views.write([change(views, stock, parked=letters)], 9)
        assert views.parked(stock, [9, 3, 5], []) == 3
        assert views.parked(stock, [4, 5], []) == 5
        assert views.parked(stock, [4], [(B, 7)]) == 5
        assert views.parked(stock, [], [(A, 7), (B, 7)]) == 3
        assert views.parked(stock, [4], [(A, 6), (B, 8)]) is None
        assert views.parked(stock, [], []) is None
        assert views.parked(sales, [3], [(A, 7)]) is None
        many = [(uuid4(), 7) for _ in range(1_000)]
        assert views.parked(stock, range(100, 1_100), [*many, (B, 7)]) == 5

    def test_each_reader_has_its_own_dead_letters(self, views):
        views.write([change(views, stock, parked=[letter(3)])], 9)
        assert (views.dead_letters(sales), views.dead_letters(newer)) == ([], [])
        assert at(views, sales).dead_letters == 0

    def test_a_dead_letter_that_is_released_is_none_any_more(self, views):
        letters = [letter(3, "a"), letter(3, "b"), letter(5, "a")]
        views.write([change(views, stock, parked=letters)], 9)
        views.write([change(views, stock, {"a": CUP}, released=letters[:1])], 9, is_fence=True)
        assert views.dead_letters(stock) == letters[1:]
        assert at(views, stock).dead_letters == 2
        assert rows(views, stock) == {"a": CUP}

    def test_a_dead_letter_that_is_put_aside_again_has_the_newest_error(self, views):
        again = replace(letter(3), error="KeyError", parked_at=datetime(2027, 1, 1, tzinfo=UTC))
        views.write([change(views, stock, parked=[letter(3)])], 9)
        views.write([change(views, stock, parked=[again])], 9, is_fence=True)
        assert views.dead_letters(stock) == [again]

    # Events that are written with a page

    def test_events_are_written_with_a_page(self, store):
        views, written = store.views, save()
        assert views.write([change(views, stock, {"a": CUP})], 7, group=Group([written]))
        assert [e.aggregate_id for e in store.log.read(0, 9)] == [A]
        assert set(store.log.commands([written.command_id])) == {written.command_id}
        assert (at(views, stock).position, rows(views, stock)) == (7, {"a": CUP})

    @pytest.mark.parametrize("refused", ["stale", "repeated", "looked at"])
    def test_a_page_is_not_written_if_its_events_are_not(self, store, refused):
        views, first = store.views, save()
        assert store.log.commit([Group([first])]) == [Committed((store.log.head(),))]
        group = {
            "stale": Group([save(B), save(A, 1)]),
            "repeated": Group([save(B), save(A, 2, first.command_id)]),
            "looked at": Group([save(B)], [(A, 0)]),
        }[refused]
        before = at(views, stock)
        begun = change(views, stock, {"a": CUP}, parked=[letter(3)])
        assert not views.write([begun], 7, group=group, is_fence=True)
        assert (at(views, stock), rows(views, stock)) == (before, {})
        assert views.dead_letters(stock) == []
        assert store.log.versions([A, B]) == {A: 1}

    def test_a_group_that_contradicts_itself_is_not_written_and_neither_is_its_page(self, store):
        views = store.views
        group = Group([save(A, 1), save(A, 1)])
        assert not views.write([change(views, stock, {"a": CUP})], 7, group=group)
        assert (at(views, stock).position, rows(views, stock)) == (0, {})
        assert store.log.head() == 0

    def test_events_are_not_written_if_their_page_is_not(self, store):
        views = store.views
        elsewhere = Change(stock, at(views, stock)._replace(position=6), {"a": CUP})
        assert not views.write([elsewhere], 7, group=Group([save()]))
        assert (store.log.head(), store.log.versions([A])) == (0, {})

    # Readers that come and go

    def test_to_define_a_reader_again_changes_nothing(self, views):
        views.write([change(views, stock, {"a": CUP})], 5)
        before = at(views, stock)
        views.define(stock)
        assert (at(views, stock), rows(views, stock)) == (before, {"a": CUP})

    @pytest.mark.parametrize(
        "changed",
        [
            view("kept", row=Named, events=[StockSold]),
            view("kept", events=[StockSold, ItemRegistered]),
            view("kept", events=[StockSold], specification=attr("on_hand") > 0),
            view("kept", events=[StockSold], where=attr("quantity") > 0),
        ],
    )
    def test_a_changed_view_is_refused_without_a_new_version(self, views, changed):
        views.define(view("kept", events=[StockSold]))
        with pytest.raises(ViewChangedError) as refusal:
            views.define(changed)
        assert refusal.value.projection == "kept_v1"
        views.define(view("kept", events=[StockSold]))
        newer = copy(changed)
        newer.version = 2
        views.define(newer)

    def test_the_order_of_event_types_and_the_functions_may_change(self, views):
        views.define(view("kept", events=[StockSold, ItemRegistered]))
        views.define(view("kept", events=[ItemRegistered, StockSold]))

    def test_what_is_dropped_is_gone_and_others_stay(self, views):
        for reader in (stock, newer):
            views.write([change(views, reader, {"a": CUP}, parked=[letter(3)])], 5)
        views.drop(stock)
        assert (views.versions("stock"), views.dead_letters(stock)) == ({2: False}, [])
        assert (at(views, newer).position, rows(views, newer)) == (5, {"a": CUP})
        views.define(stock)
        assert (at(views, stock).position, rows(views, stock)) == (0, {})

    def test_what_is_dropped_may_be_something_else_afterwards(self, views):
        other = view("stock", row=Named)
        with pytest.raises(ViewChangedError):
            views.define(other)
        views.drop(stock)
        views.define(other)

    def test_what_is_not_there_can_be_dropped(self, views):
        views.drop(view("never"))

    def test_whose_view_was_dropped_is_told_that_it_is_not_built_and_writes_nothing(self, views):
        views.write([change(views, stock)], 5)
        views.hold([stock, sales], "me", 60)
        begun = change(views, stock, {"a": CUP})
        views.drop(stock)
        found = views.checkpoints([stock, sales])
        assert (found[0].is_built, found[0].position, found[0].owner) == (False, 0, "")
        assert found[1].owner == "me"
        assert not views.write([begun], 6)
        assert not views.write([change(views, sales), begun], 6)
        assert at(views, sales).position == 0

    def test_versions_tell_which_somebody_holds(self, views):
        views.hold([newer, sales], "me", 60)
        assert views.versions("stock") == {1: False, 2: True}
        assert views.versions("sales") == {1: True}
        assert views.versions("unknown") == {}

    def test_the_version_before_is_found_where_its_columns_are_the_same(self, views):
        before = views.before(newer)
        assert (before.name, before.version, before.table) == ("stock", 1, stock.table)
        assert views.before(stock) is None
        assert views.before(sales) is None
        views.drop(stock)
        assert views.before(newer) is None

    def test_a_version_before_with_other_columns_is_not_compared(self, views):
        other = view("stock", 3, row=Named)
        views.define(other)
        assert views.before(other) is None
        later = view("stock", 4)
        views.define(later)
        assert views.before(later) is None  # what lies between is not skipped

    # Comparing, and taking over

    def test_two_views_are_compared_row_by_row(self, views):
        views.write([change(views, newer, {"a": CUP, "b": JUG, "d": POT, "e": POT})], 5)
        views.write([change(views, stock, {"a": CUP, "b": CUP, "c": POT, "e": POT})], 5)
        assert views.compare(newer, stock) == Comparison(same=2, changed=1, added=1, removed=1)
        assert views.compare(stock, newer) == Comparison(same=2, changed=1, added=1, removed=1)

    def test_empty_views_are_the_same(self, views):
        assert views.compare(newer, stock) == Comparison(0, 0, 0, 0)

    def test_none_is_the_same_as_none_only(self, views):
        views.write([change(views, newer, {"a": CUP, "b": replace(CUP, price=Decimal(0))})], 5)
        views.write([change(views, stock, {"a": CUP, "b": CUP})], 5)
        assert views.compare(newer, stock) == Comparison(1, 1, 0, 0)

    def test_a_row_that_is_shown_by_one_view_only_differs(self, views):
        shown = view("stock", 3, specification=attr("on_hand") > 1)
        views.define(shown)
        for reader in (shown, stock):
            views.write([change(views, reader, {"a": CUP, "b": JUG})], 5)
        assert views.compare(shown, stock) == Comparison(1, 1, 0, 0)

    def test_views_that_are_not_equally_far_are_not_compared(self, views):
        views.write([change(views, newer, {"a": CUP})], 5)
        assert views.compare(newer, stock) is None
        assert views.compare(stock, newer) is None

    @pytest.fixture
    def anew(self, views):
        """The stock, being built beside itself."""
        anew = stock.anew()
        views.define(anew)
        return anew

    def test_a_view_takes_over_the_rows_that_were_built_beside_it(self, views, anew):
        right = {"a": CUP, "b": JUG, "d": POT}
        views.write([change(views, stock, {"a": CUP, "b": CUP, "c": POT})], 5)
        views.write([change(views, anew, right)], 5)
        assert views.take_over(stock, anew) == Comparison(1, 1, 1, 1)
        assert rows(views, stock) == right
        assert views.load(stock, list("abcd")) == right

    def test_what_was_taken_over_is_no_more(self, views, anew):
        views.take_over(stock, anew)
        assert views.versions("stock") == {1: False, 2: False}
        views.define(anew)
        assert (at(views, anew).position, rows(views, anew)) == (0, {})

    def test_a_view_that_was_taken_over_is_where_it_was_in_another_epoch(self, views, anew):
        views.hold([stock], "me", 60)
        for reader in (stock, anew):
            views.write([change(views, reader)], 5)
        begun = change(views, stock, {"a": CUP})
        assert views.take_over(stock, anew) == Comparison(0, 0, 0, 0)
        assert at(views, stock) == begun.checkpoint._replace(epoch=begun.checkpoint.epoch + 1)
        assert not views.write([begun], 6)

    def test_what_is_dropped_has_not_stopped_once_it_is_there_again(self, views, anew):
        views.halt(anew, at(views, anew), "it is bad")
        views.drop(anew)
        views.define(anew)
        assert at(views, anew).failure == ""

    def test_a_view_that_stopped_goes_on_with_the_rows_that_it_takes_over(self, views, anew):
        views.halt(stock, at(views, stock), "it is bad")
        views.take_over(stock, anew)
        assert at(views, stock).failure == ""

    def test_a_view_takes_over_the_dead_letters_too(self, views, anew):
        views.write([change(views, stock, parked=[letter(3, "a"), letter(4, "b")])], 5)
        views.write([change(views, anew, parked=[letter(4, "b", "KeyError")])], 5)
        views.write([change(views, newer, parked=[letter(2)])], 5)
        views.take_over(stock, anew)
        assert views.dead_letters(stock) == [letter(4, "b", "KeyError")]
        assert views.dead_letters(newer) == [letter(2)]

    def test_nothing_is_taken_over_from_who_is_not_equally_far(self, views, anew):
        views.write([change(views, stock, {"a": CUP}, parked=[letter(3)])], 5)
        views.write([change(views, anew, {"b": JUG})], 4)
        before = views.checkpoints([stock, anew])
        assert views.take_over(stock, anew) is None
        assert views.checkpoints([stock, anew]) == before
        assert (rows(views, stock), rows(views, anew)) == ({"a": CUP}, {"b": JUG})
        assert views.dead_letters(stock) == [letter(3)]

    def test_a_view_that_is_not_built_is_not_built_by_taking_over(self, store):
        store.log.commit([Group([save()])])
        late, views = view("late"), store.views
        anew = late.anew()
        for reader in (late, anew):
            views.define(reader)
        assert views.take_over(late, anew) is not None
        assert not at(views, late).is_built

    def test_rows_that_are_no_members_are_taken_over_as_such(self, views):
        shown = view("shown", specification=attr("on_hand") > 1)
        anew = shown.anew()
        for reader in (shown, anew):
            views.define(reader)
        views.write([change(views, shown, {"a": JUG, "b": JUG})], 5)
        views.write([change(views, anew, {"a": CUP, "b": JUG})], 5)
        assert views.take_over(shown, anew) == Comparison(1, 1, 0, 0)
        assert rows(views, shown) == {"b": JUG}
        assert views.load(shown, ["a", "b"]) == {"a": CUP, "b": JUG}

    @pytest.mark.parametrize("order", [1, -1])
    def test_rows_may_change_places_in_a_unique_column(self, views, order):
        unique = view("only", unique=["name"], inline=True)
        views.define(unique)
        views.write([change(views, unique, {"a": CUP, "b": JUG})], 5)
        changed = {"a": JUG, "b": CUP}
        assert views.write([change(views, unique, list(changed.items())[::order])], 6)
        assert rows(views, unique) == changed
        changed = {"a": POT, "b": JUG, "c": CUP}
        assert views.write([change(views, unique, list(changed.items())[::order])], 7)
        assert rows(views, unique) == changed
        with pytest.raises(NotUnique):
            views.write([change(views, unique, {"d": CUP, "a": None})], 8)
        assert rows(views, unique) == changed

    def test_rows_may_have_changed_places_in_a_unique_column_of_what_is_taken_over(self, views):
        unique = view("only", unique=["name"], inline=True)
        anew = view("only", inline=True).anew()
        for reader in (unique, anew):
            views.define(reader)
        views.write([change(views, unique, {"a": CUP, "b": JUG})], 5)
        views.write([change(views, anew, {"a": JUG, "b": CUP})], 5)
        assert views.take_over(unique, anew) == Comparison(0, 2, 0, 0)
        assert rows(views, unique) == {"a": JUG, "b": CUP}

    # Leases that run out

    def test_a_lease_that_has_run_out_is_anybodys(self, views):
        (mine,) = views.hold([stock], "me", 0.05)
        sleep(0.1)
        over = at(views, stock)
        assert (over.owner, over.is_held) == ("me", False)
        assert views.versions("stock")[1] is False
        (theirs,) = views.hold([stock], "them", 60)
        assert (theirs.owner, theirs.is_held) == ("them", True)
        assert theirs.epoch > mine.epoch

    def test_who_comes_back_in_time_is_the_owner_still(self, views):
        (mine,) = views.hold([stock], "me", 0.05)
        begun = change(views, stock, {"a": CUP})
        sleep(0.1)
        assert views.hold([stock], "me", 60) == [mine]
        assert views.write([begun], 5)

    def test_a_lease_lasts_as_long_as_it_was_renewed_for(self, views):
        views.hold([stock], "me", 0.3)
        begun = monotonic()
        while views.hold([stock], "them", 60)[0].owner == "me":
            assert monotonic() - begun < 3
            sleep(0.01)
        assert monotonic() - begun > 0.25


def test_another_connection_sees_the_same(shared_url):
    with opened(shared_url) as store, opened(shared_url) as other:
        views, others = store.views, other.views
        (held,) = views.hold([stock], "me", 60)
        views.write([change(views, stock, parked=[letter(3)])], 5)
        assert at(others, stock) == held._replace(position=5, dead_letters=1)
        assert not others.write([Change(stock, held)], 6)
        assert others.hold([stock], "them", 60)[0].owner == "me"


class TestMemoryCheckpoints(CheckpointContract):
    @pytest.fixture
    def url(self):
        return "memory:"


class TestSQLiteCheckpoints(CheckpointContract):
    @pytest.fixture
    def url(self, sqlite_url):
        return sqlite_url


class TestPostgresCheckpoints(CheckpointContract):
    @pytest.fixture
    def url(self, postgres_url):
        return postgres_url
