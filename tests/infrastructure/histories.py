"""Programs of commands whose processes are killed and whose answers are lost, and their law.

Run as a program, this supervises workers: each is a process of its own, forked, that dispatches
commands and tells every answer in a line. Imported, it checks what they left behind.
"""

from __future__ import annotations

import asyncio
import json
import os
import select
import signal
import time
import traceback
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from random import Random
from threading import Timer
from uuid import UUID

from eventsourcing.persistence import OperationalError

from leftfold.application import Conflict, EventStoreUnavailable, OutcomeUnknown
from leftfold.application.items import item_model
from leftfold.application.ports import Failed
from leftfold.domain import Ok
from leftfold.domain.items import Item
from leftfold.infrastructure import Runtime, Settings, StoreUnavailableError

DEATHS = ("killed before writing", "killed after writing", "killed before telling")
LOSSES = (
    *("lost before writing", "lost after writing", "lost, and written later"),
    *("failed before writing", "raised before writing", "raised after writing"),
)

# What is checked ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """What one caller dispatches until it has an answer: a command, or a batch of them."""

    commands: tuple[tuple[UUID, str, dict], ...]

    @property
    def ids(self):
        return [command_id for command_id, _, _ in self.commands]


@dataclass(frozen=True)
class Answer:
    job: Job
    since: int
    """The highest position that the caller knew of when it dispatched."""
    receipts: tuple[tuple[UUID, dict[UUID, int], int, bool], ...] | None
    """Of each command: its id, versions, position, and whether it was a repetition."""
    refusal: str = ""
    facts: dict = field(default_factory=dict)


@dataclass
class History:
    """What callers were told, and what the store holds after all of them have their answers."""

    answers: list[Answer]
    log: list
    """All events with their positions."""
    told: dict
    """The same events as queries tell them, by aggregate and version."""
    recorded: dict
    """What the log keeps of the commands that were dispatched."""
    stored_ids: set[UUID]
    """All ids of commands that the store has, whoever dispatched them."""
    followed: list
    """What a reader saw who read on after the last position, from the beginning."""
    rows: dict[str, int]
    """What the view says is on hand, by SKU."""


def check_history(history):
    """Check that all callers' answers and all that is stored are one legal history."""
    _check_order(history)
    written = _check_commands(history)
    _check_answers(history, written)
    _check_batches(history, written)
    _check_stock(history)
    _check_refusals(history)


def effects(name, data):
    """Return what a command does if it is carried out: items, events and quantities, in order."""
    if name != "RecordInvoice":
        kind = {"RegisterItem": "registered", "ReceiveStock": "stock_received"}.get(
            name, "stock_sold"
        )
        return [(data["sku"], kind, data.get("quantity", data.get("opening_stock")))]
    kinds = {"sale": "stock_sold", "receipt": "stock_received"}
    lines = data["lines"]
    return [
        (sku, kinds[line["kind"]], line["quantity"])
        for sku in dict.fromkeys(line["sku"] for line in lines)
        for line in lines
        if line["sku"] == sku
    ]


def _check_order(history):
    positions = [event.position for event in history.log]
    assert all(a < b for a, b in pairwise(positions)), f"positions do not ascend: {positions}"
    versions = defaultdict(list)
    for event in history.log:
        versions[event.aggregate_id].append(event.version)
    for aggregate_id, found in versions.items():
        assert found == list(range(1, len(found) + 1)), (
            f"the versions of {aggregate_id}, by position, are {found}"
        )
    followed = [event.position for event in history.followed]
    assert followed == positions, (
        f"who followed the log missed {sorted({*positions} - {*followed})}, "
        f"saw {sorted({*followed} - {*positions})} that are not there, or saw them in another order"
    )
    assert history.followed == history.log, "who followed the log saw other events there"


def _check_commands(history):
    """Check that each stored command is whole, once, and as the log's record of it says."""
    dispatched = {i: (n, d) for a in history.answers for i, n, d in a.job.commands}
    written = defaultdict(list)
    at = {}
    for n, event in enumerate(history.log):
        cause = UUID(history.told[event.aggregate_id, event.version].metadata.causation_id)
        written[cause].append(event)
        at.setdefault(cause, []).append(n)
    unknown = (history.stored_ids | written.keys()) - dispatched.keys()
    assert not unknown, f"commands are stored that nobody dispatched: {unknown}"
    assert history.stored_ids == written.keys(), (
        f"with an id and no events: {history.stored_ids - written.keys()}, "
        f"with events and no id: {written.keys() - history.stored_ids}"
    )
    assert history.recorded.keys() == written.keys(), "the log does not know all stored commands"
    for command_id, events in written.items():
        name, data = dispatched[command_id]
        found = [_effect(history.told[e.aggregate_id, e.version]) for e in events]
        wanted = [(Item.id_of(sku), kind, n) for sku, kind, n in effects(name, data)]
        assert found == wanted, (
            f"{name} {command_id} should have written {wanted} once and whole, and wrote {found}"
        )
        places = at[command_id]
        assert places == list(range(places[0], places[0] + len(places))), (
            f"other commands' events lie between those of {name} {command_id}: {places}"
        )
        kept = history.recorded[command_id]
        true = (name, {e.aggregate_id: e.version for e in events}, events[-1].position)
        assert (kept.command, dict(kept.aggregates), kept.position) == true, (
            f"the log keeps of {command_id} {kept}, and has {true}"
        )
    return written


def _effect(told):
    kind = told.event_type.rpartition(".")[2]
    quantity = told.payload.get("quantity", told.payload.get("opening_stock"))
    return UUID(told.aggregate_id), kind, quantity


def _check_answers(history, written):
    carried_out, firsts = set(), Counter()
    for answer in history.answers:
        if answer.receipts is None:
            continue
        assert [i for i, *_ in answer.receipts] == answer.job.ids, (
            f"{answer.job.ids} were answered with receipts of others: {answer.receipts}"
        )
        for command_id, versions, position, repeated in answer.receipts:
            carried_out.add(command_id)
            events = written.get(command_id)
            assert events, f"{command_id} was acknowledged at {position}, and is not there"
            true = ({e.aggregate_id: e.version for e in events}, events[-1].position)
            assert (versions, position) == true, (
                f"the receipt of {command_id} says {(versions, position)}, the log has {true}"
            )
            if not repeated:
                firsts[command_id] += 1
                assert position > answer.since, (
                    f"{command_id} was dispatched after {answer.since} was seen, "
                    f"and stands before it, at {position}"
                )
    for answer in history.answers:
        for command_id in answer.job.ids:
            assert command_id in carried_out or command_id not in written, (
                f"{command_id} is stored, and all who dispatched it were refused: {answer.refusal}"
            )
    twice = [command_id for command_id, n in firsts.items() if n > 1]
    assert not twice, f"several callers were told that theirs was the first dispatch of {twice}"


def _check_batches(history, written):
    places = {event.position: n for n, event in enumerate(history.log)}
    dispatches = Counter(
        i for job in {id(a.job): a.job for a in history.answers}.values() for i in job.ids
    )
    for answer in history.answers:
        own = [command_id for command_id in answer.job.ids if dispatches[command_id] == 1]
        there = [command_id for command_id in own if command_id in written]
        assert there in ([], own), f"of the batch {own} only {there} was written"
        if there:
            found = [places[e.position] for command_id in own for e in written[command_id]]
            assert found == sorted(found), f"the batch {own} was written in another order: {found}"
        if there and len(own) == len(answer.job.ids):
            assert found[-1] - found[0] == len(found) - 1, (
                f"something was written between the commands of the batch {own}: {found}"
            )


def _check_stock(history):
    """Check that no update was lost: the callers' sums are the log's, at no time below zero."""
    levels = Counter()
    for event in history.log:
        item, kind, quantity = _effect(history.told[event.aggregate_id, event.version])
        levels[item] += -quantity if kind == "stock_sold" else quantity
        assert levels[item] >= 0, f"{item} falls to {levels[item]} at {event.position}"
    acknowledged = {}
    for answer in history.answers:
        if answer.receipts is not None:
            acknowledged.update({i: (name, data) for i, name, data in answer.job.commands})
    wanted = Counter()
    for name, data in acknowledged.values():
        for sku, kind, quantity in effects(name, data):
            wanted[sku] += -quantity if kind == "stock_sold" else quantity
    found = {sku: levels[Item.id_of(sku)] for sku in wanted}
    assert found == dict(wanted), f"acknowledged commands leave {dict(wanted)}, the log {found}"
    assert history.rows == found, f"the view says {history.rows}, the log {found}"


def _check_refusals(history):
    """Check that nobody was refused for a state that was over when the command was dispatched."""
    states = defaultdict(list)
    for event in history.log:
        item, kind, quantity = _effect(history.told[event.aggregate_id, event.version])
        level = states[item][-1][1] if states[item] else 0
        change = -quantity if kind == "stock_sold" else quantity
        states[item].append((event.position, level + change))
    for answer in history.answers:
        if answer.receipts is not None or len(answer.job.commands) > 1:
            continue
        item = Item.id_of(answer.facts["sku"]) if "sku" in answer.facts else None
        times = states[item]
        match answer.refusal:
            case "ItemNotFound":
                assert not times or times[0][0] > answer.since, (
                    f"{answer.facts} was said after {answer.since} was seen, "
                    f"and it was there since {times[0][0]}"
                )
            case "ItemAlreadyRegistered":
                assert times, f"{answer.facts} was said, and it is not"
            case "InsufficientStock" if answer.job.commands[0][1] == "SellStock":
                ends = [position for position, _ in times[1:]] + [float("inf")]
                levels = {n for (_, n), end in zip(times, ends, strict=True) if end > answer.since}
                assert answer.facts["available"] in levels, (
                    f"{answer.facts} was said after {answer.since} was seen; "
                    f"since then there were {levels}"
                )


# The program ----------------------------------------------------------------------------------


def say(**words):
    """Tell something in a line, whole, also from threads: once written it outlives us."""
    os.write(1, (json.dumps(words) + "\n").encode())


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class Harm:
    """Decides at which commits something is lost, and what."""

    def __init__(self, who, random, kinds, chance, schedule):
        self._who, self._random = who, random
        self._kinds, self._chance, self._schedule = kinds, chance, schedule
        self._spares_next = False
        self.dies_before_telling = False

    def begin(self):
        """Return what is to happen at this commit, if anything."""
        kind = None
        if self._schedule:
            kind = self._schedule.pop(0)
        elif self._kinds and not self._spares_next and self._random.random() < self._chance:
            kind = self._random.choice(self._kinds)
        # A log does not raise after it has written; one that did is asked again.
        self._spares_next = kind == "raised after writing"
        if kind is not None:
            say(who=self._who, harm=kind)
        return kind


class LossyLog:
    """A log that loses answers."""

    def __init__(self, log, harm, random):
        self._log, self._harm, self._random = log, harm, random
        self.later = []

    def __getattr__(self, name):
        return getattr(self._log, name)

    def commit(self, groups):
        kind = self._harm.begin()
        lost = self.before(kind, groups)
        return lost or self.after(kind, self._log.commit(groups))

    def before(self, kind, groups):
        match kind:
            case "killed before writing":
                die()
            case "lost before writing":
                return _lost(groups, in_doubt=True)
            case "failed before writing":
                return _lost(groups, in_doubt=False)
            case "raised before writing":
                raise OperationalError(kind)
            case "lost, and written later":
                timer = Timer(self._random.uniform(0, 0.03), self._log.commit, (groups,))
                timer.start()
                self.later.append(timer)
                return _lost(groups, in_doubt=True)
            case "killed before telling":
                self._harm.dies_before_telling = True
        return None

    def after(self, kind, verdicts):
        match kind:
            case "killed after writing":
                die()
            case "lost after writing":
                return _lost(verdicts, in_doubt=True)
            case "raised after writing":
                raise OperationalError(kind)
        return verdicts


def _lost(groups, *, in_doubt):
    return [Failed("lost by the test", in_doubt=in_doubt)] * len(groups)


class LossyStore:
    """A store whose log loses answers, whichever way it is asked to commit."""

    def __init__(self, store, harm, random, *, in_thread):
        self._store, self._harm, self._random = store, harm, random
        self._in_thread = in_thread

    def __getattr__(self, name):
        return getattr(self._store, name)

    def open(self, *args, **options):
        self._store.open(*args, **options)
        self.log = LossyLog(self._store.log, self._harm, self._random)

    def committing(self):
        genuine = None if self._in_thread else self._store.committing()
        if genuine is None:
            return None

        async def commit(groups):
            kind = self._harm.begin()
            lost = self.log.before(kind, groups)
            return lost or self.log.after(kind, await genuine(groups))

        return commit


class Worker:
    """Dispatches jobs from several tasks, each again and again until its outcome is known."""

    def __init__(self, order):
        self.order = order
        self.random = Random(order["seed"])
        self.seen = order["seen"]
        self.harm = Harm(
            *(order["who"], self.random, order["kinds"], order["chance"], order["schedule"])
        )

    async def work(self):
        shop = await self._open()
        jobs = iter(self.order["jobs"])
        try:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(self.order["tasks"]):
                    tasks.create_task(self._work_off(shop, jobs))
            for timer in shop._store.log.later:
                timer.join()
        finally:
            await shop.close()

    async def _open(self):
        order = self.order
        settings = Settings(store=order["url"], lock_timeout=1, store_timeout=1)
        for attempts_left in reversed(range(50)):
            shop = Runtime(item_model, settings=settings)
            shop._store = LossyStore(
                shop._store, self.harm, self.random, in_thread=order["in_thread"]
            )
            try:
                return await shop.open()
            except StoreUnavailableError:
                if not attempts_left:
                    raise
                await asyncio.sleep(0.02)
        raise AssertionError

    async def _work_off(self, shop, jobs):
        for job in jobs:
            commands = [shop.commands.parse(n, d).unwrap() for _, n, d in job["commands"]]
            ids = [UUID(command_id) for command_id, _, _ in job["commands"]]
            await self._finish(shop, job, commands, ids)

    async def _finish(self, shop, job, commands, ids):
        is_doubtful = job["is_doubtful"]
        while True:
            since = self.seen
            try:
                outcome = await self._dispatch(shop, commands, ids)
            except TimeoutError:
                say(who=self.order["who"], harm="its caller went away")
                is_doubtful = True
                continue
            if self.harm.dies_before_telling:
                die()
            told = {"who": self.order["who"], "job": job["number"], "since": since}
            if isinstance(outcome, Ok):
                receipts = outcome.value
                self.seen = max(self.seen, *(r.position for r in receipts))
                say(**told, receipts=[_dumped(r) for r in receipts])
                return
            error = outcome.error
            if isinstance(error, OutcomeUnknown):
                say(who=self.order["who"], harm="told that the outcome is not known")
                is_doubtful = True
                continue
            if isinstance(error, (EventStoreUnavailable, Conflict)) and (
                is_doubtful or self.random.random() < 0.5
            ):
                await asyncio.sleep(0.01)
                continue
            say(**told, refusal=type(error).__name__, facts=json.loads(_json(error.facts())))
            return

    async def _dispatch(self, shop, commands, ids):
        patience = None
        if self.random.random() < self.order["impatience"]:
            patience = self.random.uniform(0, 0.01)
        async with asyncio.timeout(patience):
            if len(commands) > 1:
                return await shop.commands.dispatch_all(commands, command_ids=ids)
            outcome = await shop.commands.dispatch(commands[0], command_id=ids[0])
        return Ok((outcome.value,)) if isinstance(outcome, Ok) else outcome


def _dumped(receipt):
    versions = {i.hex: version for i, version in receipt.aggregates}
    return [receipt.command_id.hex, versions, receipt.position, receipt.repeated]


def _json(facts):
    return json.dumps(facts, default=str)


def begin(order):
    """Fork a worker; it tells what it does in the supervisor's place."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        asyncio.run(Worker(order).work())
        status = 0
    except BaseException:  # noqa: BLE001 - a forked child ends here; the test fails for what it says
        with suppress(BrokenPipeError):
            say(who=order["who"], bug=traceback.format_exc()[-3_000:])
    os._exit(status)


def supervise():
    """Begin and kill workers as told, and tell when each has ended, after all that it said."""
    workers, heard, is_over = {}, b"", False
    while not is_over or workers:
        if is_over:
            time.sleep(0.002)
        elif select.select([0], [], [], 0.002)[0]:
            read = os.read(0, 1 << 20)
            *lines, heard = (heard + read).split(b"\n")
            for order in map(json.loads, lines):
                if "kill" in order:
                    for pid in [pid for pid, who in workers.items() if who == order["kill"]]:
                        os.kill(pid, signal.SIGKILL)
                else:
                    workers[begin(order)] = order["who"]
            if not read:
                is_over = True
                for pid in workers:
                    os.kill(pid, signal.SIGKILL)
        pid, status = os.waitpid(-1, os.WNOHANG) if workers else (0, 0)
        if pid:
            say(who=workers.pop(pid), ended=os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    supervise()
