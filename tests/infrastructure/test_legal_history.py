"""Whatever is killed or lost, and whenever: callers' answers and the log are one legal history."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sqlite3
import sys
from collections import Counter
from contextlib import closing, suppress
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from queue import Empty, Queue
from random import Random
from threading import Event, Thread
from time import monotonic, sleep
from uuid import UUID

import psycopg
import pytest
from proxy import Proxy

from leftfold.application.items import FindItems, ItemHistory, item_model
from leftfold.infrastructure.items import open_items
from leftfold.infrastructure.settings import load_settings
from leftfold.infrastructure.stores import make_store

sys.path.append(str(Path(__file__).parent))  # tests are no package

from histories import DEATHS, LOSSES, Answer, History, Job, check_history, effects

CASES = int(os.environ.get("LEFTFOLD_LAW_CASES", "200"))
SEEDS = range(max(3, CASES // 400))
SKUS = ("A", "B", "C", "D", "E")
PROGRAM = str(Path(__file__).with_name("histories.py"))
SUPERVISOR = "import runpy; runpy.run_path(sys.argv[2], run_name='__main__')"

# The commands ---------------------------------------------------------------------------------


def a_registration(random, sku=None):
    return "RegisterItem", {
        "sku": sku or random.choice(SKUS),
        "name": "Cup",
        "unit_price": "2.55",
        "opening_stock": random.randint(0, 20),
    }


def a_movement(random):
    sku, kind = random.choice(SKUS), random.choice(["sale", "sale", "receipt"])
    if kind == "sale":  # one in ten of more than there ever is
        quantity = 1_000 if random.random() < 0.1 else random.randint(1, 8)
        return "SellStock", {"sku": sku, "quantity": quantity, "invoice": "1"}
    return "ReceiveStock", {"sku": sku, "quantity": random.randint(1, 8)}


def an_invoice(random):
    kinds = ("sale", "receipt")
    lines = [
        {"kind": random.choice(kinds), "sku": random.choice(SKUS), "quantity": random.randint(1, 5)}
        for _ in range(random.randint(1, 4))
    ]
    return "RecordInvoice", {"invoice": "1", "lines": lines}


def new(random, make, *args):
    return UUID(int=random.getrandbits(128), version=4), *make(random, *args)


def a_job(random, earlier):
    """Return a command or a batch of them, or what somebody else dispatches too."""
    draw = random.random()
    if draw < 0.2 and earlier:
        return random.choice(earlier)
    if draw < 0.3:
        return Job((new(random, a_registration),))
    if draw < 0.4:
        return Job((new(random, an_invoice),))
    if draw < 0.75:
        return Job((new(random, a_movement),))
    commands = [new(random, a_movement) for _ in range(random.randint(2, 4))]
    if earlier and random.random() < 0.3:  # with one that may have been carried out
        commands.append(random.choice(random.choice(earlier).commands))
    return Job(tuple(commands))


def jobs_for(random, workers, number):
    """Return jobs for each worker; some are given to several workers, or to one twice."""
    jobs_of = {who: [] for who in range(workers)}
    earlier = [Job((new(random, a_registration, sku),)) for sku in SKUS]
    while len(earlier) < number:
        earlier.append(a_job(random, earlier))
    for job in earlier:
        jobs_of[random.randrange(workers)].append(job)
    return jobs_of


# Running them ---------------------------------------------------------------------------------


class Reader(Thread):
    """Reads the log after the last position it saw, until it is told that nothing more comes."""

    def __init__(self, log, random):
        super().__init__(daemon=True)
        self._log, self._random = log, random
        self._is_over = Event()
        self.followed = []

    def run(self):
        is_over = False
        while not is_over:
            is_over = self._is_over.is_set()
            while page := self._log.read(self._position, self._random.randint(1, 5)):
                self.followed += page
            sleep(0.001)

    @property
    def _position(self):
        return self.followed[-1].position if self.followed else 0

    def end(self):
        self._is_over.set()
        self.join(20)
        assert not self.is_alive()
        return self.followed


class Run:
    """Workers in processes of their own, each with its jobs, and the journal of their answers."""

    def __init__(self, supervisor, url, random, *, kinds=(), chance=0.0, kills=0, **order):
        self._supervisor, self._url, self._random = supervisor, url, random
        self._kinds, self._chance, self._order = kinds, chance, order
        self._kills, self._deaths = kills, 6
        self._jobs = {}
        self._schedules = {}
        self._working = set()
        self._lines = Queue()
        self.answers = {}
        self.counts = Counter()

    def carry_out(self, jobs_of, schedule=(), harm=lambda: None):
        """Have jobs carried out, by worker; return all answers."""
        Thread(target=self._listen, daemon=True).start()
        for who, jobs in jobs_of.items():
            self._jobs[who] = dict(enumerate(jobs))
            self._schedules[who] = list(schedule)
            self._working.add(who)
            self._begin(who, is_new=True)
        until = monotonic() + 60
        while self._working:
            assert monotonic() < until, f"not done in time: {self.counts} {self._supervisor.errors}"
            with suppress(Empty):
                self._hear(**self._lines.get(timeout=0.01))
                self._kill_somebody()
            harm()
        return list(self.answers.values())

    def _listen(self):
        for line in self._supervisor.process.stdout:
            self._lines.put(json.loads(line))

    def _begin(self, who, *, is_new=False):
        jobs = [
            {
                "number": number,
                "is_doubtful": not is_new,
                "commands": [[str(i), *rest] for i, *rest in job.commands],
            }
            for number, job in self._jobs[who].items()
            if (who, number) not in self.answers
        ]
        known = [r[2] for a in self.answers.values() for r in a.receipts or ()]
        order = {
            "who": who,
            "url": self._url,
            "seed": self._random.getrandbits(32),
            "jobs": jobs,
            "seen": max(known, default=0),
            "kinds": [k for k in self._kinds if self._deaths > 0 or k not in DEATHS],
            "chance": self._chance,
            "schedule": self._schedules[who],
            "in_thread": self._random.random() < 0.5,
            "tasks": self._random.randint(2, 8),
            "impatience": 0.0,
            **self._order,
        }
        self._supervisor.tell(json.dumps(order))

    def _hear(self, who, **said):
        """Take note of what a worker said, and begin it again if it was killed."""
        match said:
            case {"harm": kind}:
                self.counts[kind] += 1
                self._deaths -= kind in DEATHS
                if kind in self._schedules[who][:1]:
                    self._schedules[who].pop(0)
            case {"job": number, "since": since, **told}:
                self.counts["refused" if "refusal" in told else "acknowledged"] += 1
                receipts = told.pop("receipts", None)
                if receipts is not None:
                    receipts = tuple(_receipt(*each) for each in receipts)
                assert (who, number) not in self.answers
                self.answers[who, number] = Answer(self._jobs[who][number], since, receipts, **told)
            case {"ended": 0}:
                self._working.remove(who)
            case {"ended": status}:
                assert status == -signal.SIGKILL, self._supervisor.errors
                self.counts["killed"] += 1
                self._begin(who)
            case {"bug": trace}:
                pytest.fail(trace)

    def _kill_somebody(self):
        if self._kills and self._working and self._random.random() < 0.05:
            self._kills -= 1
            sleep(self._random.uniform(0, 0.01))
            self._supervisor.tell(json.dumps({"kill": self._random.choice(sorted(self._working))}))


def _receipt(command_id, versions, position, repeated):
    return UUID(command_id), {UUID(i): v for i, v in versions.items()}, position, repeated


def stored_ids(url):
    """Return the ids of all commands that are stored, whoever dispatched them."""
    every = "SELECT command_id FROM leftfold_commands"
    if url.startswith("sqlite"):
        with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as connection:
            return {UUID(bytes=command_id) for (command_id,) in connection.execute(every)}
    with psycopg.connect(url) as connection:
        return {command_id for (command_id,) in connection.execute(every)}


async def collect(shop, answers, followed, ids):
    """Return what was answered, and what the store holds."""
    (await shop.catch_up()).unwrap()
    commands = [command for answer in answers for command in answer.job.commands]
    told = {}
    for sku in {sku for _, name, data in commands for sku, _, _ in effects(name, data)}:
        history = await shop.queries.dispatch(ItemHistory(sku=sku))
        for event in history.value if history.is_ok() else ():
            told[UUID(event.aggregate_id), event.version] = event
    log = shop._store.log
    return History(
        answers,
        log.read(0, 100_000),
        told,
        log.commands([command_id for command_id, *_ in commands]),
        ids,
        followed,
        {r.sku: r.on_hand for r in (await shop.queries.dispatch(FindItems())).unwrap().rows},
    )


@pytest.fixture
def carry_out(start, record_property):
    """Have jobs carried out, and check that what they leave behind is a legal history."""

    def carry_out(url, random, jobs_of, *, through=None, schedule=(), harm=lambda: None, **options):
        store = make_store(load_settings(store=url))
        store.open(item_model.projections, create_tables=True)
        try:
            reader = Reader(store.log, Random(random.random()))
            reader.start()
            run = Run(start(SUPERVISOR, "", PROGRAM), through or url, random, **options)
            answers = run.carry_out(jobs_of, schedule, harm)
            followed = reader.end()
        finally:
            store.close()

        async def look():
            async with open_items(url) as shop:
                return await collect(shop, answers, followed, stored_ids(url))

        history = asyncio.run(look())
        record_property("outage", f"{len(history.log)} events, {dict(run.counts)}")
        check_history(history)
        return run.counts

    return carry_out


# The law --------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("seed", SEEDS)
def test_what_killed_processes_and_lost_answers_leave_behind_is_a_legal_history(
    shared_url, carry_out, seed
):
    random = Random(seed)
    jobs_of = jobs_for(random, random.choice([2, 3]), 120)
    harms = {"kinds": (*DEATHS, *LOSSES), "chance": 0.3, "kills": 4, "impatience": 0.1}
    counts = carry_out(shared_url, random, jobs_of, **harms)
    assert counts["killed"]


class Network(Proxy):
    """A proxy that also passes on that a client was killed, as its operating system does."""

    def _pump(self, source, sink):
        super()._pump(source, sink)
        with suppress(OSError):
            sink.shutdown(socket.SHUT_WR)


@pytest.fixture
def proxy_type():
    return Network


@pytest.mark.long
@pytest.mark.parametrize("seed", SEEDS)
def test_what_cut_connections_leave_behind_is_a_legal_history(postgres_url, proxy, carry_out, seed):
    random = Random(seed)
    harms = iter(random.choice(["cut", "swallow", "half-close"]) for _ in range(12))

    def harm():
        if random.random() > 0.06:
            return
        match next(harms, None):
            case None:
                return
            case "swallow":  # what is on its way is lost, in both directions
                proxy.swallows = True
            case "half-close":
                proxy.half_close()
        sleep(random.uniform(0, 0.01))
        proxy.swallows = False
        proxy.cut()

    proxy.delay = 0.001  # answers are long on their way
    jobs_of = jobs_for(random, 3, 120)
    carry_out(postgres_url, random, jobs_of, through=proxy.url, harm=harm, kills=2)


@pytest.mark.long
def test_a_command_is_carried_out_once_wherever_on_its_way_it_is_lost(shared_url, carry_out):
    random, kinds = Random(0), (*DEATHS, *LOSSES)
    schedule = [kind for each in kinds for kind in (each, "nothing", each, "nothing")]
    jobs = jobs_for(random, 1, 80)[0]
    counts = carry_out(shared_url, random, {0: jobs, 1: jobs}, schedule=schedule, tasks=1)
    assert [counts[kind] for kind in kinds] == [4] * len(kinds)


# The check ------------------------------------------------------------------------------------


def without(events, *places):
    return [event for n, event in enumerate(events) if n not in places]


def a_lost_event(history):
    history.log = history.followed = without(history.log, 1)


def an_event_twice(history):
    last = history.log[-1]
    again = last._replace(position=last.position + 1, version=last.version + 1)
    history.told[again.aggregate_id, again.version] = history.told[last.aggregate_id, last.version]
    history.log = history.followed = [*history.log, again]


def a_position_given_late(history):
    history.log = history.followed = [history.log[1], history.log[0], *history.log[2:]]


def an_event_that_a_reader_missed(history):
    history.followed = without(history.log, 2)


def a_reader_who_saw_another_order(history):
    history.followed = [history.log[1], history.log[0], *history.log[2:]]


def a_command_without_its_id(history):
    history.stored_ids.discard(history.answers[0].job.ids[0])


def a_command_of_nobody(history):
    history.stored_ids.add(UUID(int=0))


def a_false_record(history):
    first = history.answers[0].job.ids[0]
    history.recorded[first] = history.recorded[first]._replace(position=99)


def a_false_receipt(history):
    answer = history.answers[0]
    ((command_id, versions, position, repeated),) = answer.receipts
    false = {item: version + 1 for item, version in versions.items()}
    history.answers[0] = replace(answer, receipts=((command_id, false, position, repeated),))


def a_receipt_for_nothing(history):
    refused = next(a for a in history.answers if a.refusal)
    at = history.answers.index(refused)
    receipts = ((refused.job.ids[0], {UUID(int=0): 1}, 1, False),)
    history.answers[at] = replace(refused, receipts=receipts, refusal="")


def a_refusal_of_what_was_written(history):
    history.answers[2] = replace(history.answers[2], receipts=None, refusal="Conflict")


def two_firsts(history):
    history.answers.append(history.answers[1])


def a_command_before_what_its_caller_saw(history):
    history.answers[1] = replace(history.answers[1], since=99)


def a_view_that_lost_an_update(history):
    history.rows["A"] += 1


def a_refusal_for_a_state_that_was_over(history):
    refused = next(a for a in history.answers if a.refusal == "InsufficientStock")
    at = history.answers.index(refused)
    history.answers[at] = replace(refused, facts={**refused.facts, "available": 10})


@pytest.fixture(scope="module")
def legal():
    """The history of five jobs in memory."""
    random = Random(0)
    jobs = [
        Job((new(random, a_registration, "A"),)),
        Job(((UUID(int=1), "ReceiveStock", {"sku": "A", "quantity": 2}),)),
        Job(
            (
                (UUID(int=2), "SellStock", {"sku": "A", "quantity": 1, "invoice": "1"}),
                (UUID(int=3), "ReceiveStock", {"sku": "A", "quantity": 4}),
            )
        ),
        Job(((UUID(int=4), "SellStock", {"sku": "A", "quantity": 999, "invoice": "1"}),)),
    ]

    async def carry_out():
        async with open_items("memory:") as shop:
            answers = []
            for job in jobs:
                commands = [shop.commands.parse(n, d).unwrap() for _, n, d in job.commands]
                outcome = await shop.commands.dispatch_all(commands, command_ids=job.ids)
                if outcome.is_ok():
                    receipts = tuple(
                        (r.command_id, dict(r.aggregates), r.position, r.repeated)
                        for r in outcome.value
                    )
                    answers.append(Answer(job, 0, receipts))
                else:
                    refusal, facts = type(outcome.error).__name__, outcome.error.facts()
                    answers.append(Answer(job, 2, None, refusal, facts))
            ids = {i for a in answers if a.receipts for i in a.job.ids}
            log = shop._store.log
            return await collect(shop, answers, log.read(0, 100), ids)

    return asyncio.run(carry_out())


def test_the_check_finds_a_legal_history_legal(legal):
    check_history(legal)


@pytest.mark.parametrize(
    ("falsify", "complaint"),
    [
        (a_lost_event, "the versions of"),
        (an_event_twice, "once and whole"),
        (a_position_given_late, "do not ascend"),
        (an_event_that_a_reader_missed, r"missed \[3\]"),
        (a_reader_who_saw_another_order, "another order"),
        (a_command_without_its_id, "events and no id"),
        (a_command_of_nobody, "nobody dispatched"),
        (a_false_record, "the log keeps of"),
        (a_false_receipt, "the receipt of"),
        (a_receipt_for_nothing, "is not there"),
        (a_refusal_of_what_was_written, "were refused"),
        (two_firsts, "first dispatch"),
        (a_command_before_what_its_caller_saw, "stands before it"),
        (a_view_that_lost_an_update, "the view says"),
        (a_refusal_for_a_state_that_was_over, "since then there were"),
    ],
)
def test_the_check_finds_what_is_not_legal(legal, falsify, complaint):
    history = deepcopy(legal)
    falsify(history)
    with pytest.raises(AssertionError, match=complaint):
        check_history(history)
