"""However the groups that wait are put together, each fares as it would alone."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from itertools import pairwise
from uuid import UUID, uuid4

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from leftfold.application.ports import Committed, EncodedEvent, Group, Repeated, Save, Stale

CASES = int(os.environ.get("LEFTFOLD_LAW_CASES", "200"))


@pytest.fixture
def log(opened, store_url):
    with opened(store_url) as log:
        yield log


@dataclass
class Law:
    """What may become of groups: the versions there are, and the commands that are known."""

    versions: dict[int, int] = field(default_factory=dict)
    commands: set[int] = field(default_factory=set)

    def judge(self, group, looked_at):
        """Return the verdicts that are right for a group, and take note of it."""
        right = set()
        if any(self.versions.get(item, 0) != version for item, version in looked_at.items()):
            right.add(Stale)
        if any(command in self.commands for command, _ in group):
            right.add(Repeated)
        if any(self.versions.get(item, 0) >= v for _, events in group for item, v in events):
            right.add(Stale)
        if not right:
            self.commands.update(command for command, _ in group)
            self.versions.update(event for _, events in group for event in events)
        return right or {Committed}


@st.composite
def programs(draw):
    """Groups of saves, each a command and the items' versions it writes, with what is right."""
    law, groups, rights, used = Law(), [], [], set()
    for _ in range(draw(st.integers(1, 12))):
        based_on = {
            item: max(0, law.versions.get(item, 0) - draw(st.sampled_from([0, 0, 0, 0, 1])))
            for item in range(3)
        }
        group = []
        old = st.sampled_from(sorted(used)) if used else st.nothing()
        fresh = st.integers(len(groups) * 10, len(groups) * 10 + 9)
        for command in draw(st.lists(st.one_of(fresh, fresh, fresh, old), max_size=3, unique=True)):
            events = []
            for item in draw(st.lists(st.integers(0, 2), max_size=3)):
                based_on[item] += 1
                events.append((item, based_on[item]))
            group.append((command, events))
            used.add(command)
        written = {item for _, events in group for item, _ in events}
        others = sorted({0, 1, 2} - written)
        looked_at = {
            item: max(0, law.versions.get(item, 0) - draw(st.sampled_from([0, 0, 0, 1])))
            for item in draw(
                st.lists(st.sampled_from(others), unique=True) if others else st.just([])
            )
        }
        groups.append((group, looked_at))
        rights.append(law.judge(group, looked_at))
    return groups, rights


class Committing:
    """A program, with ids of its own, so that all examples share a store."""

    def __init__(self, log, groups):
        self.log, self.begun = log, log.head()
        self.items = [uuid4() for _ in range(3)]
        self.commands = {}
        self.groups = [
            Group(
                [self._save(*save) for save in group],
                [(self.items[item], version) for item, version in looked_at.items()],
            )
            for group, looked_at in groups
        ]
        self.verdicts = []

    def commit(self, sizes):
        """Commit so many groups at a time."""
        left = list(self.groups)
        for size in sizes:
            call, left = left[:size], left[size:]
            self.verdicts += self.log.commit(call)
        assert not left
        return self

    def _save(self, command, events):
        command_id = self.commands.setdefault(command, uuid4())
        encoded = [
            EncodedEvent(self.items[item], version, "sold", b"%d" % command)
            for item, version in events
        ]
        versions = {e.aggregate_id: e.version for e in encoded}
        return Save(command_id, "Sell", encoded, tuple(versions.items()), b"%d" % command)

    @property
    def kinds(self):
        return [type(verdict) for verdict in self.verdicts]

    @property
    def streams(self):
        found = self.log.streams(self.items)
        return [[(e.version, e.state) for e in found[item]] for item in self.items]

    @property
    def read(self):
        """All events in the order of their positions."""
        read = self.log.read(self.begun, 1_000)
        return [(self.items.index(e.aggregate_id), e.version, e.state) for e in read]

    @property
    def order(self):
        """What commands and verdicts say of positions, by their order alone: 0 is none."""
        places = {e.position: n for n, e in enumerate(self.log.read(self.begun, 1_000), 1)}
        places[0] = 0
        known = self.log.commands(list(self.commands.values()))
        return {
            number: (places[known[i].position], dict(_named(known[i].aggregates, self.items)))
            for number, i in self.commands.items()
            if i in known
        }, [
            [places[position] for position in verdict.positions]
            for verdict in self.verdicts
            if isinstance(verdict, Committed)
        ]


def _named(aggregates, items):
    return [(items.index(i), version) for i, version in aggregates]


@st.composite
def sizes_for(draw, number):
    """Return how many groups go into each call."""
    cuts = draw(st.sets(st.integers(1, number - 1))) if number > 1 else set()
    edges = [0, *sorted(cuts), number]
    return [end - begin for begin, end in pairwise(edges)]


@given(st.data())
@settings(
    max_examples=max(60, CASES // 5),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_groups_that_are_committed_together_fare_as_those_committed_one_by_one(log, data):
    groups, rights = data.draw(programs())
    sizes = data.draw(sizes_for(len(groups)))
    alone = Committing(log, groups).commit([1] * len(groups))
    alone_is = (alone.streams, alone.read, alone.order)  # before the others' events come
    together = Committing(log, groups).commit(sizes)
    for kinds in zip(rights, alone.kinds, together.kinds, strict=True):
        right, *found = kinds
        # Of a group that is stale and repeated both may be told, and nothing else.
        assert right >= set(found)
    assert (together.streams, together.read, together.order) == alone_is


@given(st.data())
@settings(
    max_examples=max(40, CASES // 10),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_of_groups_in_one_call_the_refused_leave_nothing_and_the_rest_are_whole(log, data):
    groups, rights = data.draw(programs())
    assume(any(right != {Committed} for right in rights))
    done = Committing(log, groups).commit([len(groups)])
    read = [(e.aggregate_id, e.version, e.state) for e in log.read(done.begun, 1_000)]
    written = [
        save
        for group, right in zip(done.groups, rights, strict=True)
        if right == {Committed}
        for save in group.saves
    ]
    assert read == [(e.aggregate_id, e.version, e.state) for s in written for e in s.events]
    ids: list[UUID] = list(done.commands.values())
    assert log.commands(ids).keys() == {save.command_id for save in written}
