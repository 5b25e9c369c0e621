from __future__ import annotations

import asyncio
from contextlib import suppress
from contextvars import Context
from dataclasses import replace
from decimal import Decimal
from threading import Thread
from uuid import UUID, uuid4

import pytest

from leftfold.application import (
    Command,
    Conflict,
    DispatchOverError,
    InvalidAnswerError,
    NestedDispatchError,
    OutcomeUnknown,
    Receipt,
    UnsavedEventsError,
)
from leftfold.application.items import DiscontinueItem, ReceiveStock, RenameItem, SellStock
from leftfold.application.middleware import timeout
from leftfold.application.service import NotInMemory
from leftfold.domain import Aggregate, AggregateNotFound, Err, Ok
from leftfold.domain.items import (
    InsufficientStock,
    Item,
    ItemAlreadyRegistered,
    ItemError,
    ItemIsDiscontinued,
    ItemNotFound,
)

pytestmark = pytest.mark.anyio

ID = UUID(int=7)


class Do(Command[Receipt, ItemError]):
    """Do something to an item; each test says what."""

    sku: str = "A"


class Count(Command[dict[str, int], ItemError]):
    """Receive a piece, and answer how many there are."""

    sku: str = "A"


def receive(shop, quantity=1):
    def handle(command):
        item = shop.repository.load(Item, Item.id_of(command.sku))
        item.receive(quantity)
        return Ok(shop.repository.save(item))

    return handle


def receive_after(shop, gate):
    async def handle(command):
        item = shop.repository.load(Item, Item.id_of(command.sku))
        await gate.wait()
        item.receive(1)
        return Ok(shop.repository.save(item))

    return handle


async def soon():
    for _ in range(5):
        await asyncio.sleep(0)


# What is written


async def test_a_command_writes_its_events(shop, register):
    await shop.bus.dispatch(register("A", stock=4))
    assert shop.on_hand("A") == 4


async def test_the_receipt_tells_aggregates_versions_and_position(shop, sell, invoice):
    await shop.register("A", "B")
    receipt = (
        await shop.bus.dispatch(invoice(("B", 1), ("A", 1), ("B", 2)), command_id=ID)
    ).unwrap()
    assert receipt == Receipt(ID, ((Item.id_of("B"), 3), (Item.id_of("A"), 2)), position=5)


async def test_a_command_without_an_id_is_given_one(shop, register):
    one = (await shop.bus.dispatch(register("A"))).unwrap()
    other = (await shop.bus.dispatch(register("B"))).unwrap()
    assert one.command_id != other.command_id


async def test_a_refused_sale_writes_nothing(shop, sell):
    await shop.register("A", stock=1)
    assert await shop.bus.dispatch(sell("A", 2)) == Err(InsufficientStock("A", 2, 1))
    assert shop.log.head() == 1


async def test_one_refused_line_writes_nothing_of_the_invoice(shop, invoice):
    await shop.register("A", "B", stock=3)
    refused = await shop.bus.dispatch(invoice(("A", 1), ("B", 4)))
    assert refused == Err(InsufficientStock("B", 4, 3))
    assert (shop.on_hand("A"), shop.on_hand("B")) == (3, 3)


async def test_what_a_refused_command_changed_is_forgotten(shop, sell, invoice):
    await shop.register("A", stock=3)
    await shop.bus.dispatch(invoice(("A", 2), ("A", 2)))
    assert (await shop.bus.dispatch(sell("A", 3))).is_ok()


async def test_an_err_after_a_save_writes_nothing(shop):
    await shop.register("A")

    def save_and_refuse(command):
        receive(shop)(command)
        return Err(ItemNotFound("A"))

    shop.add(Do.handled_by(save_and_refuse))
    assert await shop.bus.dispatch(Do()) == Err(ItemNotFound("A"))
    assert (shop.on_hand("A"), shop.log.head()) == (10, 1)


async def test_a_bug_writes_nothing_and_stays_raised(shop, sell):
    await shop.register("A", stock=3)

    def fail(command):
        receive(shop)(command)
        raise ZeroDivisionError

    shop.add(Do.handled_by(fail))
    with pytest.raises(ZeroDivisionError):
        await shop.bus.dispatch(Do())
    assert shop.log.head() == 1
    assert (await shop.bus.dispatch(sell("A", 4))) == Err(InsufficientStock("A", 4, 3))


async def test_a_command_to_an_absent_item_is_refused(shop, sell):
    assert await shop.bus.dispatch(sell("A")) == Err(ItemNotFound("A"))


async def test_loading_an_absent_aggregate_is_a_refusal(shop):
    shop.add(Do.handled_by(receive(shop)))
    assert await shop.bus.dispatch(Do()) == Err(AggregateNotFound("Item", str(Item.id_of("A"))))


async def test_an_item_is_registered_once(shop, register):
    await shop.register("A")
    assert await shop.bus.dispatch(register("A")) == Err(ItemAlreadyRegistered("A"))


async def test_of_two_registrations_at_once_one_is_refused(shop, register):
    answers = await asyncio.gather(*(shop.bus.dispatch(register("A")) for _ in range(2)))
    assert sorted(answer.is_ok() for answer in answers) == [False, True]
    assert shop.log.head() == 1


async def test_only_commits_are_told(shop, sell):
    await shop.register("A", stock=1)
    await shop.bus.dispatch(sell("A", 2))
    assert shop.commits == 1


async def test_events_that_were_not_saved_are_an_error(shop):
    await shop.register("A")

    def forget_to_save(command):
        shop.repository.load(Item, Item.id_of("A")).receive(1)
        return Ok(Receipt(ID, (), 0))

    shop.add(Do.handled_by(forget_to_save))
    with pytest.raises(UnsavedEventsError, match="Do"):
        await shop.bus.dispatch(Do())
    assert shop.on_hand("A") == 10


async def test_a_dispatch_from_within_a_handler_is_an_error(shop, sell):
    await shop.register("A")

    async def dispatch_again(_):
        return await shop.bus.dispatch(sell("A"))

    shop.add(Do.handled_by(dispatch_again))
    with pytest.raises(NestedDispatchError, match="SellStock"):
        await shop.bus.dispatch(Do())
    assert shop.log.head() == 1


async def test_a_blocking_handler_runs_off_the_loop(shop):
    await shop.register("A")

    def block(command):
        with pytest.raises(RuntimeError):
            asyncio.get_running_loop()
        return receive(shop)(command)

    shop.add(Do.handled_by(block, blocking=True))
    assert (await shop.bus.dispatch(Do())).is_ok()
    assert shop.on_hand("A") == 11


async def test_the_librarys_own_save_stages_too(shop):
    await shop.register("A")

    def save_and_refuse(_):
        item = shop.repository.load(Item, Item.id_of("A"))
        item.receive(1)
        shop.service.save(item)
        return Err(ItemNotFound("A"))

    shop.add(Do.handled_by(save_and_refuse))
    await shop.bus.dispatch(Do())
    assert shop.on_hand("A") == 10


# Many at once


async def test_commands_to_one_aggregate_at_once_all_succeed(shop, sell):
    await shop.register("A", stock=50)
    answers = await asyncio.gather(*(shop.bus.dispatch(sell("A")) for _ in range(50)))
    assert all(answer.is_ok() for answer in answers)
    assert (shop.on_hand("A"), shop.stored("A").version) == (0, 51)


async def test_slow_handlers_of_one_aggregate_at_once_all_succeed(shop):
    await shop.register("A")

    async def slow(command):
        item = shop.repository.load(Item, Item.id_of("A"))
        await asyncio.sleep(0.001)
        item.receive(1)
        return Ok(shop.repository.save(item))

    shop.add(Do.handled_by(slow))
    answers = await asyncio.gather(*(shop.bus.dispatch(Do()) for _ in range(20)))
    assert all(answer.is_ok() for answer in answers)
    assert shop.on_hand("A") == 30


async def test_two_commands_that_need_the_same_items_crosswise_do_not_deadlock(shop):
    await shop.register("A", "B")

    async def move_one(command):
        first, second = command.sku
        source = shop.repository.load(Item, Item.id_of(first))
        await asyncio.sleep(0.001)
        target = shop.repository.load(Item, Item.id_of(second))
        await asyncio.sleep(0.001)
        source.write_off(1, "moved")
        target.receive(1)
        return Ok(shop.repository.save(source, target))

    shop.add(Do.handled_by(move_one))
    crosswise = [shop.bus.dispatch(Do(sku=skus)) for skus in ("AB", "BA") * 5]
    answers = await asyncio.wait_for(asyncio.gather(*crosswise), timeout=5)
    assert all(answer.is_ok() for answer in answers)
    assert (shop.on_hand("A"), shop.on_hand("B")) == (10, 10)


async def test_a_cancelled_command_lets_go_of_its_aggregates(shop, sell):
    await shop.register("A")
    shop.add(Do.handled_by(receive_after(shop, asyncio.Event())))
    waiting = asyncio.create_task(shop.bus.dispatch(Do()))
    await soon()
    waiting.cancel()
    with suppress(asyncio.CancelledError):
        await waiting
    assert (await asyncio.wait_for(shop.bus.dispatch(sell("A")), 5)).is_ok()
    assert shop.on_hand("A") == 9


async def test_a_command_that_is_too_slow_can_be_given_again(shop):
    await shop.register("A")
    slow = timeout(0.01)
    gate = asyncio.Event()
    shop.add(Do.handled_by(receive_after(shop, gate)))
    inner = shop.bus._step
    shop.bus._step = lambda dispatch: slow(dispatch, inner)
    assert await shop.bus.dispatch(Do(), command_id=ID) == Err(OutcomeUnknown(ID))
    gate.set()
    assert (await shop.bus.dispatch(Do(), command_id=ID)).is_ok()
    assert shop.on_hand("A") == 11


# Two processes on one log


async def test_a_command_on_an_old_aggregate_conflicts_and_writes_nothing(shops):
    one, other = shops
    await one.register("A")
    await other.bus.dispatch(ReceiveStock(sku="A", quantity=1))
    answer = await one.bus.dispatch(ReceiveStock(sku="A", quantity=1))
    assert answer == Err(Conflict(((Item.id_of("A"), 2),)))
    assert one.on_hand("A") == 11


async def test_after_a_conflict_the_aggregate_is_read_anew(shops):
    one, other = shops
    await one.register("A")
    await other.bus.dispatch(ReceiveStock(sku="A", quantity=1))
    await one.bus.dispatch(ReceiveStock(sku="A", quantity=1))
    assert (await one.bus.dispatch(ReceiveStock(sku="A", quantity=1))).is_ok()
    assert one.on_hand("A") == 12


async def test_a_refusal_based_on_an_old_aggregate_is_not_believed(shops, sell):
    one, other = shops
    await one.register("A", stock=1)
    await other.bus.dispatch(ReceiveStock(sku="A", quantity=5))
    assert (await one.bus.dispatch(sell("A", 4))).is_ok()


async def test_a_refusal_of_a_later_line_on_an_old_aggregate_is_not_believed(shops, invoice):
    one, other = shops
    await one.register("A", stock=5)
    await other.bus.dispatch(ReceiveStock(sku="A", quantity=100))
    answer = await one.bus.dispatch(invoice(("A", 4), ("A", 4)))
    assert not isinstance(getattr(answer, "error", None), InsufficientStock)


async def test_of_two_registrations_in_two_processes_one_is_refused(shops, register):
    one, other = shops
    answers = await asyncio.gather(
        one.bus.dispatch(register("A")), other.bus.dispatch(register("A"))
    )
    assert sorted(answer.is_ok() for answer in answers) == [False, True]
    assert one.log.head() == 1


async def test_many_commands_of_two_processes_are_each_done_once_or_refused(shops):
    one, _ = shops
    await one.register("A")
    answers = await asyncio.gather(
        *(s.bus.dispatch(ReceiveStock(sku="A", quantity=1)) for s in shops for _ in range(20))
    )
    done = sum(answer.is_ok() for answer in answers)
    assert one.on_hand("A") == 10 + done
    assert all(answer.is_ok() or isinstance(answer.error, Conflict) for answer in answers)


# Repetitions


async def test_a_repetition_gives_the_first_receipt_and_writes_nothing(shop, sell):
    await shop.register("A")
    first = (await shop.bus.dispatch(sell("A"), command_id=ID)).unwrap()
    again = (await shop.bus.dispatch(sell("A"), command_id=ID)).unwrap()
    assert again == Receipt(ID, first.aggregates, first.position, repeated=True)
    assert (shop.on_hand("A"), shop.log.head()) == (9, 2)


async def test_the_first_receipt_is_no_repetition(shop, sell):
    await shop.register("A")
    assert (await shop.bus.dispatch(sell("A"), command_id=ID)).unwrap().repeated is False


async def test_a_repetition_is_answered_though_the_domain_would_now_refuse(shop, sell):
    await shop.register("A")
    await shop.bus.dispatch(sell("A"), command_id=ID)
    await shop.bus.dispatch(DiscontinueItem(sku="A"))
    assert (await shop.bus.dispatch(sell("A"), command_id=ID)).unwrap().repeated
    assert await shop.bus.dispatch(sell("A")) == Err(ItemIsDiscontinued("A"))


async def test_a_repeated_registration_is_answered_by_its_first_receipt(shop, register):
    await shop.bus.dispatch(register("A"), command_id=ID)
    assert (await shop.bus.dispatch(register("A"), command_id=ID)).unwrap().repeated


async def test_a_repetition_in_another_process_is_known(shops, sell):
    one, other = shops
    await one.register("A")
    await one.bus.dispatch(sell("A"), command_id=ID)
    assert (await other.bus.dispatch(sell("A"), command_id=ID)).unwrap().repeated
    assert one.on_hand("A") == 9


async def test_a_command_given_twice_at_once_is_done_once(shop):
    await shop.register("A")
    gate = asyncio.Event()
    shop.add(Do.handled_by(receive_after(shop, gate)))
    both = asyncio.gather(*(shop.bus.dispatch(Do(), command_id=ID) for _ in range(2)))
    await soon()
    gate.set()
    receipts = [answer.unwrap() for answer in await both]
    assert sorted(receipt.repeated for receipt in receipts) == [False, True]
    assert shop.on_hand("A") == 11


async def test_a_refused_command_may_be_given_again(shop, sell):
    await shop.register("A", stock=1)
    assert not (await shop.bus.dispatch(sell("A", 2), command_id=ID)).is_ok()
    await shop.bus.dispatch(ReceiveStock(sku="A", quantity=1))
    assert (await shop.bus.dispatch(sell("A", 2), command_id=ID)).unwrap().repeated is False


async def test_an_answer_that_is_no_receipt_is_repeated_truly(shop):
    await shop.register("A")

    def count(command):
        receive(shop)(command)
        return Ok({"A": shop.repository.load(Item, Item.id_of("A")).on_hand})

    shop.add(Count.handled_by(count))
    assert await shop.bus.dispatch(Count(), command_id=ID) == Ok({"A": 11})
    await shop.bus.dispatch(Count())
    assert await shop.bus.dispatch(Count(), command_id=ID) == Ok({"A": 11})
    assert shop.on_hand("A") == 12


async def test_a_repetition_that_would_now_write_nothing_gives_the_first_receipt(shop):
    await shop.register("A")

    def rename_once(_):
        item = shop.repository.load(Item, Item.id_of("A"))
        if item.name != "Mug":
            item.rename("Mug")
        return Ok(shop.repository.save(item))

    shop.add(Do.handled_by(rename_once))
    first = (await shop.bus.dispatch(Do(), command_id=ID)).unwrap()
    again = (await shop.bus.dispatch(Do(), command_id=ID)).unwrap()
    assert again == Receipt(ID, first.aggregates, first.position, repeated=True)


async def test_a_repetition_is_answered_though_the_handler_would_now_raise(shop):
    await shop.register("A")

    def rename_or_break(_):
        item = shop.repository.load(Item, Item.id_of("A"))
        assert item.name != "Mug"
        item.rename("Mug")
        return Ok(shop.repository.save(item))

    shop.add(Do.handled_by(rename_or_break))
    await shop.bus.dispatch(Do(), command_id=ID)
    assert (await shop.bus.dispatch(Do(), command_id=ID)).unwrap().repeated


async def test_a_middleware_may_carry_on_twice(opened, register, sell):
    async def twice(dispatch, call_next):
        await call_next(dispatch)
        return await call_next(dispatch)

    with opened(twice) as shop:
        async with asyncio.timeout(5):
            assert (await shop.bus.dispatch(register("A"))).unwrap().repeated
            assert (await shop.bus.dispatch(sell("A", 2))).unwrap().repeated
        assert shop.on_hand("A") == 8


async def test_a_repetition_that_meets_another_writer_is_answered_by_its_first_receipt(shops):
    one, other = shops
    await one.register("A")
    for shop in shops:
        shop.add(Do.handled_by(receive(shop)))
        await shop.bus.dispatch(Do())  # in memory from now on
    await other.bus.dispatch(Do(), command_id=ID)
    assert (await one.bus.dispatch(Do(), command_id=ID)).unwrap().repeated
    assert one.on_hand("A") == 13


async def test_an_answer_that_could_not_be_repeated_is_an_error_and_nothing_is_written(shop):
    class Measure(Command[float, ItemError]):
        pass

    def measure(command):
        receive(shop)(Do())
        return Ok(float("inf"))

    await shop.register("A")
    shop.add(Measure.handled_by(measure))
    with pytest.raises(InvalidAnswerError):
        await shop.bus.dispatch(Measure())
    assert shop.log.head() == 1


async def test_an_answer_that_is_no_result_is_an_error(shop):
    shop.add(Do.handled_by(lambda _: "done"))
    with pytest.raises(InvalidAnswerError, match="answered str"):
        await shop.bus.dispatch(Do())


# Tasks that handlers start


@pytest.mark.parametrize("is_saved", [True, False])
async def test_what_a_forgotten_task_does_during_the_commit_leaves_no_gap(shops, is_saved):
    shop, _ = shops
    await shop.register("A")
    tasks = []

    def handle(_):
        item = shop.repository.load(Item, Item.id_of("A"))

        async def go_on():
            item.receive(1)
            if is_saved:
                shop.repository.save(item)

        item.receive(1)
        receipt = shop.repository.save(item)
        tasks.append(asyncio.create_task(go_on()))
        return Ok(receipt)

    shop.add(Do.handled_by(handle))
    await shop.bus.dispatch(Do())
    done = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(each) for each in done] == [DispatchOverError if is_saved else type(None)]
    await shop.bus.dispatch(Do())
    assert shop.stored("A").version == 3


async def test_a_task_that_outlives_its_command_can_neither_load_nor_save(shop):
    await shop.register("A")
    tasks, answered = [], asyncio.Event()

    def handle(_):
        item = shop.repository.load(Item, Item.id_of("A"))

        async def go_on():
            await answered.wait()
            with pytest.raises(DispatchOverError):
                shop.repository.load(Item, item.id)
            shop.repository.save(item)

        tasks.append(asyncio.create_task(go_on()))
        return Err(ItemNotFound("A"))

    shop.add(Do.handled_by(handle))
    await shop.bus.dispatch(Do())
    answered.set()
    with pytest.raises(DispatchOverError):
        await tasks[0]


async def test_a_handler_may_load_in_several_tasks(shop):
    await shop.register("A", "B")

    async def handle(_):
        async with asyncio.TaskGroup() as group:
            loads = [group.create_task(loaded(shop, sku)) for sku in ("A", "B")]
        items = [load.result() for load in loads]
        for item in items:
            item.receive(1)
        return Ok(shop.repository.save(*items))

    shop.execution._memory._idle.clear()
    shop.add(Do.handled_by(handle))
    assert (await shop.bus.dispatch(Do())).is_ok()
    assert (shop.on_hand("A"), shop.on_hand("B")) == (11, 11)


async def loaded(shop, sku):
    return shop.repository.load(Item, Item.id_of(sku))


# A commit in doubt


async def test_a_commit_in_doubt_that_was_done_is_answered_as_the_first(doubtful, register):
    receipt = (await doubtful.bus.dispatch(register("A"))).unwrap()
    assert (receipt.position, receipt.repeated) == (1, False)


async def test_a_batch_in_doubt_that_was_done_is_answered_though_a_part_wrote_nothing(
    doubtful, register
):
    doubtful.add(Do.handled_by(lambda _: Ok(doubtful.repository.save())))
    receipts = (await doubtful.bus.dispatch_all([register("A"), Do()])).unwrap()
    assert [receipt.position for receipt in receipts] == [1, 0]


@pytest.mark.parametrize("received_before", [0, 1])
async def test_a_commit_in_doubt_that_another_dispatch_has_done_is_answered_by_its_receipt(
    overtaken, sell, received_before
):
    shop, other = overtaken
    await shop.register("A")
    first = []

    def meanwhile():
        dispatches = [other.bus.dispatch(ReceiveStock(sku="A", quantity=1))] * received_before
        dispatches.append(other.bus.dispatch(sell("A"), command_id=ID))

        async def carry_out():
            first.extend([(await dispatch).unwrap() for dispatch in dispatches][-1:])

        run_in_thread(carry_out)

    shop.log.meanwhile = meanwhile
    receipt = (await shop.bus.dispatch(sell("A"), command_id=ID)).unwrap()
    assert [receipt] == [replace(told, repeated=True) for told in first]
    assert shop.on_hand("A") == 9 + received_before


async def test_a_commit_in_doubt_that_was_not_done_is_said_to_be_unknown(overtaken, sell):
    shop, _ = overtaken
    await shop.register("A")
    shop.log.meanwhile = lambda: None
    assert await shop.bus.dispatch(sell("A"), command_id=ID) == Err(OutcomeUnknown(ID))
    assert (await shop.bus.dispatch(sell("A"), command_id=ID)).unwrap().repeated is False


def run_in_thread(work):
    thread = Thread(target=asyncio.run, args=(work(),))
    thread.start()
    thread.join()


# Batches


async def test_a_batch_carries_out_all_in_order(shop, register, sell):
    answer = await shop.bus.dispatch_all([register("A", 2), sell("A"), sell("A")])
    assert [receipt.position for receipt in answer.unwrap()] == [1, 2, 3]
    assert shop.on_hand("A") == 0


async def test_a_batch_is_one_commit(shop, register, sell):
    await shop.bus.dispatch_all([register("A"), sell("A")])
    assert shop.commits == 1


async def test_one_refusal_refuses_the_whole_batch(shop, sell):
    await shop.register("A", "B", stock=1)
    answer = await shop.bus.dispatch_all([sell("A"), sell("B", 2)])
    assert answer == Err(InsufficientStock("B", 2, 1))
    assert (shop.on_hand("A"), shop.log.head()) == (1, 2)


async def test_an_empty_batch_answers_nothing(shop):
    assert await shop.bus.dispatch_all([]) == Ok(())


async def test_a_batch_skips_what_was_carried_out(shop, sell, ids):
    await shop.register("A")
    await shop.bus.dispatch(sell("A"), command_id=ids[0])
    answer = await shop.bus.dispatch_all([sell("A"), sell("A")], command_ids=ids[:2])
    assert [receipt.repeated for receipt in answer.unwrap()] == [True, False]
    assert shop.on_hand("A") == 8


async def test_a_repeated_batch_gives_the_first_receipts(shop, sell, ids):
    await shop.register("A")
    first = await shop.bus.dispatch_all([sell("A"), sell("A")], command_ids=ids[:2])
    again = await shop.bus.dispatch_all([sell("A"), sell("A")], command_ids=ids[:2])
    assert [r.position for r in again.unwrap()] == [r.position for r in first.unwrap()]
    assert all(receipt.repeated for receipt in again.unwrap())
    assert shop.on_hand("A") == 8


async def test_a_batch_takes_as_many_ids_as_commands(shop, sell, ids):
    with pytest.raises(ValueError, match="zip"):
        await shop.bus.dispatch_all([sell("A")], command_ids=ids[:2])


async def test_one_id_twice_in_a_batch_is_carried_out_once(shop, sell, ids):
    await shop.register("A")
    with suppress(Exception):  # refusing it as an error of the program is as good
        await shop.bus.dispatch_all([sell("A"), sell("A")], command_ids=[ids[0], ids[0]])
    assert shop.on_hand("A") in {9, 10}


async def test_a_batch_notices_what_another_dispatch_has_just_carried_out(shop, sell, ids):
    await shop.register("A")
    gate, calls = asyncio.Event(), 0
    inner = receive_after(shop, gate)

    async def count_calls(command):
        nonlocal calls
        calls += 1
        assert calls < 10, "it goes on for ever"
        return await inner(command)

    shop.add(Do.handled_by(count_calls))
    await shop.bus.dispatch(sell("A"), command_id=ids[0])
    single = asyncio.create_task(shop.bus.dispatch(Do(), command_id=ids[1]))
    await soon()
    batch = asyncio.create_task(shop.bus.dispatch_all([sell("A"), Do()], command_ids=ids[:2]))
    await soon()
    gate.set()
    assert (await single).is_ok()
    assert [receipt.repeated for receipt in (await batch).unwrap()] == [True, True]
    assert shop.on_hand("A") == 10


async def test_a_batch_answers_each_command_though_one_was_just_carried_out(shop, ids):
    await shop.register("A", "B")
    gate = asyncio.Event()

    async def discontinue(command):
        item = shop.repository.load(Item, Item.id_of(command.sku))
        await gate.wait()
        item.discontinue()
        return Ok(shop.repository.save(item))

    shop.add(Do.handled_by(discontinue))
    single = asyncio.create_task(shop.bus.dispatch(Do(), command_id=ids[1]))
    await soon()
    rename = RenameItem(sku="B", name="Mug")
    batch = asyncio.create_task(shop.bus.dispatch_all([rename, Do()], command_ids=ids[:2]))
    await soon()
    gate.set()
    assert (await single).is_ok()
    assert [receipt.repeated for receipt in (await batch).unwrap()] == [False, True]
    assert shop.stored("B").name == "Mug"


# What a command looks at


def receive_unless_discontinued(shop, looked_at="B"):
    def handle(command):
        other = shop.repository.load(Item, Item.id_of(looked_at))
        item = shop.repository.load(Item, Item.id_of(command.sku))
        if other.discontinued:
            return Err(ItemIsDiscontinued(looked_at))
        item.receive(1)
        return Ok(shop.repository.save(item))

    return handle


async def test_a_command_is_not_carried_out_on_an_old_state_of_what_it_only_looks_at(shops):
    one, other = shops
    await one.register("A", "B")
    one.add(Do.handled_by(receive_unless_discontinued(one)))
    assert (await one.bus.dispatch(Do())).is_ok()
    (await other.bus.dispatch(DiscontinueItem(sku="B"))).unwrap()
    assert isinstance((await one.bus.dispatch(Do())).error, Conflict)  # nobody tries again here
    assert await one.bus.dispatch(Do()) == Err(ItemIsDiscontinued("B"))
    assert one.on_hand("A") == 11


async def test_a_command_is_not_carried_out_if_what_was_absent_is_there_by_now(shops, register):
    one, other = shops
    await one.register("A")
    gate = asyncio.Event()

    async def receive_while_absent(command):
        item, absent = one.repository.find_all(Item, [Item.id_of("A"), Item.id_of("B")])
        if absent is not None:
            return Err(ItemAlreadyRegistered("B"))
        await gate.wait()
        item.receive(1)
        return Ok(one.repository.save(item))

    one.add(Do.handled_by(receive_while_absent))
    under_way = asyncio.create_task(one.bus.dispatch(Do()))
    await asyncio.sleep(0.05)
    (await other.bus.dispatch(register("B"))).unwrap()
    gate.set()
    assert isinstance((await under_way).error, Conflict)
    assert await one.bus.dispatch(Do()) == Err(ItemAlreadyRegistered("B"))


async def test_a_refusal_is_not_believed_if_it_rests_on_two_moments(shops):
    one, other = shops
    await one.register("A", "B")
    moved = False

    async def need_twenty(command):
        nonlocal moved
        first = one.repository.load(Item, Item.id_of("A"))
        if not moved:
            moved = True
            await in_a_context_of_its_own(
                other.bus.dispatch_all(
                    [SellStock(sku="B", quantity=5, invoice="1"), ReceiveStock(sku="A", quantity=5)]
                )
            )
        second = one.repository.load(Item, Item.id_of("B"))
        there = first.on_hand + second.on_hand
        return Ok(one.repository.save()) if there == 20 else Err(InsufficientStock("A", 20, there))

    one.execution._memory._idle.clear()
    one.add(Do.handled_by(need_twenty))
    assert (await one.bus.dispatch(Do())).is_ok()
    assert moved


async def in_a_context_of_its_own(work):
    await Context().run(asyncio.get_running_loop().create_task, work)


async def test_what_a_cancelled_command_still_writes_is_known_afterwards(slow_shop):
    shop, gate = slow_shop
    await shop.register("A", "B")
    shop.add(Do.handled_by(receive_unless_discontinued(shop)))
    (await shop.bus.dispatch(Do())).unwrap()
    gate.clear()
    cancelled = asyncio.create_task(shop.bus.dispatch(DiscontinueItem(sku="B")))
    await asyncio.sleep(0.02)
    cancelled.cancel()
    await asyncio.wait([cancelled])
    gate.set()
    # It may be read before it is written; then the commit finds that it is over.
    assert type((await shop.bus.dispatch(Do())).error) in {Conflict, ItemIsDiscontinued}
    assert await shop.bus.dispatch(Do()) == Err(ItemIsDiscontinued("B"))
    assert shop.on_hand("A") == 11


async def test_tasks_of_an_attempt_that_was_given_up_have_no_effect(shop):
    await shop.register("A", "B")

    async def sell_in_a_task(sku, wait):
        await asyncio.sleep(wait)
        item = shop.repository.load(Item, Item.id_of(sku))
        item.sell(1, "1")
        return shop.repository.save(item)

    async def sell_both(command):
        _, receipt = await asyncio.gather(sell_in_a_task("A", 0), sell_in_a_task("B", 0.02))
        return Ok(receipt)

    shop.execution._memory._idle.pop(Item.id_of("A"))
    shop.add(Do.handled_by(sell_both))
    receipt = (await shop.bus.dispatch(Do())).unwrap()
    assert (shop.on_hand("A"), shop.on_hand("B")) == (9, 9)
    assert dict(receipt.aggregates) == {Item.id_of("A"): 2, Item.id_of("B"): 2}


async def test_a_task_that_a_handler_began_may_dispatch_when_the_command_is_over(shop, sell):
    await shop.register("A")
    later = []

    async def sell_later():
        await asyncio.sleep(0.02)
        return await shop.bus.dispatch(sell("A"))

    async def begin(command):
        later.append(asyncio.ensure_future(sell_later()))
        return await soon() or Ok(shop.repository.save())

    shop.add(Do.handled_by(begin))
    (await shop.bus.dispatch(Do())).unwrap()
    assert (await later[0]).is_ok()


async def test_the_moment_of_an_event_is_that_of_the_attempt_that_recorded_it(shop):
    await shop.register("A")
    gate = asyncio.Event()
    shop.add(Do.handled_by(receive_after(shop, gate)))
    first, second = (asyncio.create_task(shop.bus.dispatch(Do())) for _ in range(2))
    await asyncio.sleep(0.02)
    gate.set()
    await asyncio.gather(first, second)
    stream = shop.log.streams([Item.id_of("A")])[Item.id_of("A")]
    times = [event.timestamp for event in shop.mapper.decode_all(stream)]
    assert times == sorted(times)


async def test_a_handler_that_always_wants_more_does_not_hold_the_loop(opened):
    with opened(timeout(0.05)) as shop:

        def want_more(command):
            while True:
                shop.repository.find(Item, uuid4())

        shop.add(Do.handled_by(want_more))
        assert await shop.bus.dispatch(Do(), command_id=ID) == Err(OutcomeUnknown(ID))


async def test_a_store_that_was_set_back_gets_no_gap(shops, sell):
    shop, _ = shops
    await shop.register("A")
    for _ in range(3):
        (await shop.bus.dispatch(sell("A"))).unwrap()
    log, item_id = shop.log, Item.id_of("A")
    lost = log._stored_events.pop()  # as a standby that takes over without the last commit
    del log._stored_events_index[str(item_id)][lost.originator_version]
    assert isinstance((await shop.bus.dispatch(sell("A"))).error, Conflict)
    assert (await shop.bus.dispatch(sell("A"))).is_ok()
    assert [event.version for event in log.streams([item_id])[item_id]] == [1, 2, 3, 4]
    assert shop.on_hand("A") == 7


async def test_a_unit_is_let_go_even_if_its_handler_still_saves_in_a_thread(shop):
    await shop.register("A")
    others = [Item.register(f"X{n}", "Cup", Decimal(1)) for n in range(3_000)]
    is_over = False

    def save_again_and_again(command):
        item = shop.repository.load(Item, Item.id_of("A"))
        try:
            while not is_over:
                shop.repository.save(*others, item)
        except DispatchOverError:
            pass
        return Ok(shop.repository.save())

    shop.add(Do.handled_by(save_again_and_again, blocking=True))
    for _ in range(3):
        with suppress(TimeoutError):
            await asyncio.wait_for(shop.bus.dispatch(Do()), 0.02)
    is_over = True
    assert not shop.execution._memory.is_taken(Item.id_of("A"))


def test_an_aggregate_without_a_topic_has_no_events():
    assert Aggregate.EVENTS == ()


async def test_a_batch_reads_together_what_its_commands_first_ask_for(opened):
    with opened() as shop:
        skus = [f"S{n}" for n in range(20)]
        await shop.register(*skus)
        shop.execution._memory._idle.clear()
        reads = []
        genuine = shop.log.streams

        def streams(ids, after=None):
            reads.append(list(ids))
            return genuine(ids, after or {})

        shop.log.streams = streams
        receive = [ReceiveStock(sku=sku, quantity=1) for sku in skus]
        receipts = (await shop.bus.dispatch_all(receive)).unwrap()
        assert len(receipts) == 20
        assert [len(ids) for ids in reads] == [20]


async def test_looking_ahead_has_no_effect(shop):
    await shop.register("A", "B")
    shop.execution._memory._idle.clear()
    calls = []

    def counted(command):
        calls.append(command.sku)
        return receive(shop)(command)

    shop.add(Do.handled_by(counted))
    first, second = (await shop.bus.dispatch_all([Do(sku="A"), Do(sku="B")])).unwrap()
    assert (shop.on_hand("A"), shop.on_hand("B")) == (11, 11)
    assert [version for r in (first, second) for _, version in r.aggregates] == [2, 2]
    assert calls == ["A", "B", "A", "B"]


async def test_commands_of_a_batch_that_ask_in_two_steps_are_called_a_few_times_each(shop):
    skus = [f"S{n}" for n in range(60)]
    await shop.register(*skus)
    shop.execution._memory._idle.clear()
    calls = 0

    def move(command):
        nonlocal calls
        calls += 1
        source = shop.repository.load(Item, Item.id_of(command.sku))
        target = shop.repository.load(Item, Item.id_of(f"S{(int(command.sku[1:]) + 30) % 60}"))
        source.sell(1, "1")
        target.receive(1)
        return Ok(shop.repository.save(source, target))

    shop.add(Do.handled_by(move))
    (await shop.bus.dispatch_all([Do(sku=sku) for sku in skus])).unwrap()
    assert calls <= 4 * len(skus)
    assert shop.on_hand("S0") == 10


async def test_what_is_saved_unchanged_is_judged_too(shops):
    one, other = shops
    await one.register("A", "B")

    def receive_while_there_are_ten(command):
        item, looked_at = one.repository.find_all(Item, [Item.id_of("A"), Item.id_of("B")])
        item.receive(looked_at.on_hand)
        return Ok(one.repository.save(item, looked_at))

    one.add(Do.handled_by(receive_while_there_are_ten))
    (await one.bus.dispatch(Do())).unwrap()
    (await other.bus.dispatch(ReceiveStock(sku="B", quantity=5))).unwrap()
    assert isinstance((await one.bus.dispatch(Do())).error, Conflict)
    (await one.bus.dispatch(Do())).unwrap()
    assert one.on_hand("A") == 10 + 10 + 15


async def test_two_commands_that_miss_the_same_items_in_another_order_do_not_deadlock(opened):
    with opened(timeout(1)) as shop:
        ids = sorted([Item.id_of("A"), Item.id_of("B")], key=lambda i: i.int)

        class Ask(Do):
            """Ask for items, one after the other or together."""

        def one_by_one(_):
            for item_id in reversed(ids):
                shop.repository.find(Item, item_id)
            return Ok(shop.repository.save())

        def together(_):
            shop.repository.find_all(Item, ids)
            return Ok(shop.repository.save())

        shop.add(Do.handled_by(one_by_one), Ask.handled_by(together))
        for _ in range(20):
            dispatches = [shop.bus.dispatch(Do()), shop.bus.dispatch(Ask())]
            outcomes = await asyncio.gather(*dispatches)
            assert all(outcome.is_ok() for outcome in outcomes)
            shop.execution._memory._idle.clear()


async def test_a_receipt_of_an_earlier_save_names_all_that_was_saved(shop):
    await shop.register("A", "B")

    def save_again(command):
        first, second = (shop.repository.load(Item, Item.id_of(sku)) for sku in ("A", "B"))
        first.receive(1)
        receipt = shop.repository.save(first)
        first.receive(1)
        second.receive(1)
        shop.repository.save(first, second)
        return Ok(receipt)

    shop.add(Do.handled_by(save_again))
    receipt = (await shop.bus.dispatch(Do(), command_id=ID)).unwrap()
    assert receipt.aggregates == ((Item.id_of("A"), 3), (Item.id_of("B"), 2))
    again = (await shop.bus.dispatch(Do(), command_id=ID)).unwrap()
    assert again == replace(receipt, repeated=True)


async def test_a_conflict_names_all_that_others_may_have_changed(shops):
    one, other = shops
    await one.register("A", "B", "C", "D")
    (await other.bus.dispatch(ReceiveStock(sku="A", quantity=1))).unwrap()
    both = [ReceiveStock(sku="A", quantity=1), ReceiveStock(sku="B", quantity=1)]
    answer = await one.bus.dispatch_all(both)
    assert answer == Err(Conflict(((Item.id_of("A"), 2), (Item.id_of("B"), 2))))

    def look_and_receive(command):
        one.repository.load(Item, Item.id_of("D"))
        return receive(one)(command)

    (await other.bus.dispatch(ReceiveStock(sku="D", quantity=1))).unwrap()
    one.add(Do.handled_by(look_and_receive))
    answer = await one.bus.dispatch(Do(sku="C"))
    assert answer == Err(Conflict(((Item.id_of("C"), 2), (Item.id_of("D"), 1))))


# Handlers with tasks and threads of their own


async def test_a_refusal_in_a_task_of_a_handler_is_its_answer(shop):
    async def refuse():
        raise ItemNotFound("A")

    async def handle(command):
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(refuse())

    shop.add(Do.handled_by(handle))
    assert await shop.bus.dispatch(Do()) == Err(ItemNotFound("A"))


async def test_a_bug_in_a_task_of_a_handler_stays_raised(shop):
    async def refuse():
        raise ItemNotFound("A")

    async def fail():
        raise ZeroDivisionError

    async def handle(command):
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(refuse())
            tasks.create_task(fail())

    shop.add(Do.handled_by(handle))
    with pytest.raises(ZeroDivisionError):
        await shop.bus.dispatch(Do())


async def test_what_a_task_asks_for_is_read_before_the_refusal_of_another_counts(shops):
    shop, _ = shops
    await shop.register("A")
    shop.execution._memory._idle.clear()
    attempts = 0

    async def refuse():
        raise ItemNotFound("A")

    async def load():
        shop.repository.load(Item, Item.id_of("A"))

    async def handle(command):
        nonlocal attempts
        attempts += 1
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(load())
            if attempts == 1:
                tasks.create_task(refuse())
        return Ok(shop.repository.save())

    shop.add(Do.handled_by(handle))
    assert (await shop.bus.dispatch(Do())).is_ok()
    assert attempts == 2


async def test_what_a_thread_of_a_handler_asks_for_is_not_taken_in_passing(shop):
    await shop.register("A")
    memory, found = shop.execution._memory, []

    async def handle(command):
        try:
            await asyncio.to_thread(shop.repository.load, Item, Item.id_of("A"))
        except NotInMemory:  # on the loop again, where it could be taken
            found.append(memory.is_taken(Item.id_of("A")))
            raise
        found.append(memory.is_taken(Item.id_of("A")))
        return Ok(shop.repository.save())

    shop.add(Do.handled_by(handle))
    assert (await shop.bus.dispatch(Do())).is_ok()
    assert found == [False, True]
    assert not memory.is_taken(Item.id_of("A"))


async def test_what_is_recorded_after_the_save_of_a_new_aggregate_is_missed(shop):
    def handle(command):
        item = Item.register("N", "Cup", Decimal(1))
        receipt = shop.repository.save(item)
        item.receive(1)
        return Ok(receipt)

    shop.add(Do.handled_by(handle))
    with pytest.raises(UnsavedEventsError):
        await shop.bus.dispatch(Do())
    assert shop.log.head() == 0


async def test_an_answer_of_another_release_is_not_quoted(shop):
    await shop.register("A")

    def answer_with(value):
        def handle(command):
            receive(shop)(command)
            return Ok(value)

        return handle

    class Ask(Command[dict[str, str], ItemError]):
        sku: str = "A"

    shop.add(Ask.handled_by(answer_with({"street": "Secret Street"})))
    (await shop.bus.dispatch(Ask(), command_id=ID)).unwrap()

    class Ask(Command[dict[str, int], ItemError]):  # the next release
        sku: str = "A"

    shop.bus._by_name.clear()
    shop.add(Ask.handled_by(answer_with({"street": 1})))
    with pytest.raises(InvalidAnswerError) as raised:
        await shop.bus.dispatch(Ask(), command_id=ID)
    assert "Secret" not in f"{raised.value} {raised.value.__cause__}"
