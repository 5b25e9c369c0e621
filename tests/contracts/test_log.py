"""What every log must do; the one in memory is the reference."""

from __future__ import annotations

from threading import Thread
from time import monotonic, sleep
from uuid import UUID, uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from leftfold.application.ports import (
    Committed,
    EncodedEvent,
    Group,
    Repeated,
    Save,
    Stale,
    StoredSnapshot,
)
from leftfold.infrastructure.stores.memory import MemoryLog

A, B, C = UUID(int=1), UUID(int=2), UUID(int=3)


def event(aggregate_id=A, version=1, topic="sold", state=b"{}"):
    return EncodedEvent(aggregate_id, version, topic, state)


def save(*events, command_id=None, answer=None):
    versions = {e.aggregate_id: e.version for e in events}
    return Save(command_id or uuid4(), "Sell", events, tuple(versions.items()), answer)


def commit(log, groups):
    return log.commit([g if isinstance(g, Group) else Group(g) for g in groups])


def stream(log, aggregate_id=A):
    return [e.version for e in log.streams([aggregate_id])[aggregate_id]]


class LogContract:
    @pytest.fixture
    def log(self, opened, url):
        with opened(url) as log:
            yield log

    def test_is_empty_at_first(self, log):
        assert log.head() == 0
        assert log.read(0, 10) == []
        assert log.streams([A]) == {A: []}
        assert log.versions([A]) == {}
        assert log.commands([A]) == {}

    def test_nothing_to_commit_has_no_verdict(self, log):
        assert commit(log, []) == []

    def test_a_commit_gives_the_position_of_each_saves_last_event(self, log):
        (verdict,) = commit(log, [[save(event(A, 1), event(A, 2)), save(event(B, 1))]])
        read = {(e.aggregate_id, e.version): e.position for e in log.read(0, 10)}
        assert verdict == Committed((read[A, 2], read[B, 1]))

    def test_a_save_of_no_events_has_position_0_and_keeps_its_command(self, log):
        empty = save()
        assert commit(log, [[empty]]) == [Committed((0,))]
        assert log.commands([empty.command_id])[empty.command_id].position == 0

    def test_a_group_of_no_saves_is_committed(self, log):
        assert commit(log, [[], [save(event())]])[0] == Committed(())
        assert stream(log) == [1]

    def test_positions_ascend_in_the_order_of_commits_groups_saves_and_events(self, log):
        commit(log, [[save(event(A, 1))]])
        commit(log, [[save(event(B, 1), event(A, 2))], [save(event(C, 1)), save(event(B, 2))]])
        commit(log, [[save(event(A, 3))]])
        read = log.read(0, 10)
        assert [(e.aggregate_id, e.version) for e in read] == [
            *[(A, 1), (B, 1), (A, 2), (C, 1), (B, 2), (A, 3)]
        ]
        positions = [e.position for e in read]
        assert positions == sorted(set(positions))
        assert positions[0] > 0

    def test_a_version_that_is_taken_is_stale(self, log):
        commit(log, [[save(event(A, 1))]])
        assert commit(log, [[save(event(A, 1, state=b"other"))]]) == [Stale()]
        assert [e.state for e in log.streams([A])[A]] == [b"{}"]

    def test_a_version_beyond_the_next_is_stale(self, log):
        commit(log, [[save(event(A, 1))]])
        assert commit(log, [[save(event(A, 3))]]) == [Stale()]
        assert commit(log, [[save(event(B, 2))]]) == [Stale()]
        assert (stream(log, A), stream(log, B)) == ([1], [])

    def test_a_group_that_contradicts_itself_is_stale(self, log):
        twice = [save(event(A, 1)), save(event(A, 1))]
        good = [save(event(B, 1))]
        verdicts = commit(log, [good, twice, [save(event(C, 1))]])
        assert [type(v) for v in verdicts] == [Committed, Stale, Committed]
        assert stream(log, A) == []

    @pytest.mark.parametrize(("version", "kind"), [(0, Stale), (1, Stale), (2, Committed)])
    def test_what_a_group_looked_at_must_be_as_it_was(self, log, version, kind):
        commit(log, [[save(event(A, 1), event(A, 2))]])
        group = Group([save(event(B, 1))], [(A, version)])
        assert [type(v) for v in commit(log, [group])] == [kind]
        assert stream(log, B) == ([1] if kind is Committed else [])

    @pytest.mark.parametrize(("version", "kind"), [(0, Committed), (1, Stale)])
    def test_what_a_group_found_absent_must_still_be_absent(self, log, version, kind):
        group = Group([save(event(B, 1))], [(A, version)])
        assert [type(v) for v in commit(log, [group])] == [kind]

    def test_what_a_group_looked_at_may_be_written_by_one_before_it(self, log):
        before = [save(event(A, 1))]
        verdicts = commit(
            log,
            [
                before,
                Group([save(event(B, 1))], [(A, 0)]),
                Group([save(event(C, 1))], [(A, 1)]),
            ],
        )
        assert [type(v) for v in verdicts] == [Committed, Stale, Committed]

    def test_a_command_that_was_carried_out_is_repeated(self, log):
        first = save(event(A, 1))
        commit(log, [[first]])
        assert commit(log, [[save(event(A, 2), command_id=first.command_id)]]) == [Repeated()]
        assert stream(log) == [1]

    def test_a_command_sent_again_as_it_was_is_refused(self, log):
        first = save(event(A, 1))
        commit(log, [[first]])
        (verdict,) = commit(log, [[first]])
        assert verdict in {Repeated(), Stale()}
        assert stream(log) == [1]

    def test_of_a_stream_only_what_is_beyond_a_version_is_read(self, log):
        commit(log, [[save(event(A, 1), event(A, 2), event(A, 3), event(B, 1))]])
        found = log.streams([A, B, C], {A: 1, C: 7})
        assert {i: [e.version for e in events] for i, events in found.items()} == {
            A: [2, 3],
            B: [1],
            C: [],
        }

    def test_of_many_groups_only_those_that_do_not_fit_are_refused(self, log):
        first = save(event(A, 1))
        commit(log, [[first]])
        groups = [
            [save(event(B, 1), event(B, 2))],
            [save(event(A, 1))],
            [save(event(A, 2)), save(event(C, 1), event(A, 3))],
            [save(event(C, 2), command_id=first.command_id)],
            [save(), save(event(B, 3))],
        ]
        verdicts = commit(log, groups)
        kinds = [Committed, Stale, Committed, Repeated, Committed]
        assert [type(verdict) for verdict in verdicts] == kinds
        at = {(e.aggregate_id, e.version): e.position for e in log.read(0, 20)}
        assert verdicts[0].positions == (at[B, 2],)
        assert verdicts[2].positions == (at[A, 2], at[A, 3])
        assert verdicts[4].positions == (0, at[B, 3])
        assert (C, 2) not in at

    def test_there_are_no_snapshots_at_first(self, log):
        assert log.snapshots([A]) == []

    def test_the_newest_snapshot_of_a_shape_is_kept(self, log):
        newer = StoredSnapshot(A, 7, "shape", b"seven")
        log.keep_snapshots([newer, StoredSnapshot(B, 1, "shape", b"b")])
        log.keep_snapshots([StoredSnapshot(A, 5, "shape", b"five")])
        assert log.snapshots([A, C]) == [newer]

    def test_a_snapshot_of_another_shape_takes_its_place(self, log):
        log.keep_snapshots([StoredSnapshot(A, 7, "shape", b"seven")])
        other = StoredSnapshot(A, 5, "another", b"five")
        log.keep_snapshots([other])
        assert log.snapshots([A]) == [other]

    def test_receipts_that_are_old_enough_are_purged(self, log):
        saves = [save(event(A, n)) for n in (1, 2, 3)]
        commit(log, [saves])
        ids = [each.command_id for each in saves]
        assert log.purge(60.0, 10) == 0
        assert set(log.commands(ids)) == set(ids)
        sleep(0.02)
        assert log.purge(0.01, 2) == 2
        assert log.purge(0.01, 2) == 1
        assert log.purge(0.01, 2) == 0
        assert log.commands(ids) == {}
        assert stream(log) == [1, 2, 3]

    def test_reactions_of_processes_are_never_purged(self, log):
        reaction = save(event(A, 1))._replace(command="process reorders")
        commit(log, [[reaction]])
        sleep(0.02)
        assert log.purge(0.01, 10) == 0
        assert set(log.commands([reaction.command_id])) == {reaction.command_id}

    def test_of_two_groups_with_one_command_only_the_first_is_committed(self, log):
        first = save(event(A, 1))
        again = save(event(B, 1), command_id=first.command_id)
        verdicts = commit(log, [[first], [again]])
        assert [type(v) for v in verdicts] == [Committed, Repeated]
        assert (stream(log, A), stream(log, B)) == ([1], [])

    def test_of_two_groups_with_one_version_only_the_first_is_committed(self, log):
        verdicts = commit(log, [[save(event(A, 1, state=b"1"))], [save(event(A, 1, state=b"2"))]])
        assert [type(v) for v in verdicts] == [Committed, Stale]
        assert [e.state for e in log.streams([A])[A]] == [b"1"]

    def test_one_repetition_among_many_groups_costs_little(self, log):
        groups = [[save(event(uuid4(), 1))] for _ in range(1_000)]
        begun = monotonic()
        verdicts = commit(log, [*groups, groups[500]])
        assert monotonic() - begun < 3
        kinds = [type(verdict) for verdict in verdicts]
        assert kinds[:-1] == [Committed] * 1_000
        assert kinds[-1] in {Repeated, Stale}

    def test_a_refused_group_fails_alone(self, log):
        known = save(event(A, 1))
        commit(log, [[known]])
        verdicts = commit(
            log,
            [
                [save(event(B, 1))],
                [save(event(C, 1)), save(event(A, 1))],
                [save(event(B, 2))],
                [save(event(C, 1), command_id=known.command_id)],
                [save(event(A, 2)), save(event(B, 3))],
            ],
        )
        assert [type(v) for v in verdicts] == [Committed, Stale, Committed, Repeated, Committed]
        read = log.read(0, 10)
        assert [(e.aggregate_id, e.version) for e in read] == [
            *[(A, 1), (B, 1), (B, 2), (A, 2), (B, 3)]
        ]
        told = [p for v in verdicts if isinstance(v, Committed) for p in v.positions]
        assert told == [e.position for e in read][1:]

    @pytest.mark.parametrize("others", [0, 1])
    def test_nothing_of_a_refused_group_is_visible(self, log, others):
        commit(log, [[save(event(A, 1))]])
        lost = [save(event(B, 1)), save(event(B, 2), event(A, 1)), save(event(C, 1))]
        commit(log, [lost, *[[save(event(A, 2))]] * others])
        assert log.streams([B, C]) == {B: [], C: []}
        assert log.versions([B, C]) == {}
        assert log.commands([s.command_id for s in lost]) == {}
        assert {e.aggregate_id for e in log.read(0, 10)} == {A}

    def test_a_refused_group_leaves_the_log_usable(self, log):
        commit(log, [[save(event(A, 1))]])
        commit(log, [[save(event(A, 1))]])
        (verdict,) = commit(log, [[save(event(A, 2))]])
        assert isinstance(verdict, Committed)

    def test_streams_are_by_version_with_all_that_was_stored(self, log):
        stored = [
            event(A, 1, "registered", b'{"name":"\xc3\xbc"}'),
            event(A, 2, "sold", bytes(range(256))),
        ]
        commit(log, [[save(stored[0], event(B, 1))], [save(stored[1])]])
        assert log.streams([A, C]) == {A: stored, C: []}

    def test_streams_of_many_aggregates_come_together(self, log):
        ids = [UUID(int=n) for n in range(1, 1_201)]
        commit(log, [[save(*(event(i, 1) for i in ids))]])
        assert log.streams(ids) == {i: [event(i, 1)] for i in ids}
        assert log.versions(ids) == dict.fromkeys(ids, 1)

    def test_versions_are_the_last_ones(self, log):
        commit(log, [[save(event(A, 1), event(A, 2), event(B, 1))]])
        assert log.versions([A, B, C]) == {A: 2, B: 1}

    def test_a_command_is_kept_with_its_aggregates_position_and_answer(self, log):
        first = save(event(A, 1), event(B, 1), answer=b'"\x00\xff"')
        second = save(event(A, 2))
        commit(log, [[first, second]])
        kept = log.commands([first.command_id, second.command_id, uuid4()])
        assert kept.keys() == {first.command_id, second.command_id}
        one, two = kept[first.command_id], kept[second.command_id]
        assert (one.command_id, one.aggregates) == (first.command_id, ((A, 1), (B, 1)))
        assert (one.answer, two.answer) == (b'"\x00\xff"', None)
        assert [one.position, two.position] == [e.position for e in log.read(0, 10)][1:]

    def test_many_commands_are_looked_up_together(self, log):
        saves = [save() for _ in range(1_201)]
        commit(log, [saves])
        assert len(log.commands([s.command_id for s in saves])) == 1_201

    def test_reading_begins_after_a_position_and_ends_at_the_limit(self, log):
        commit(log, [[save(*(event(A, n) for n in range(1, 6)))]])
        positions = [e.position for e in log.read(0, 10)]
        assert [e.version for e in log.read(positions[1], 2)] == [3, 4]
        assert log.read(positions[-1], 10) == []

    def test_reading_can_be_limited_to_topics(self, log):
        topics = ["sold", "received", "sold", "renamed", "sold"]
        commit(log, [[save(*(event(A, n, topic) for n, topic in enumerate(topics, 1)))]])
        assert [e.version for e in log.read(0, 2, ["sold"])] == [1, 3]
        assert [e.version for e in log.read(0, 9, ["renamed", "received"])] == [2, 4]
        assert log.read(0, 9, ["nothing"]) == []

    def test_events_of_some_topics_can_be_read_alone(self, log):
        topics = ["sold", "lost", "received", "sold", "lost"]
        commit(log, [[save(*(event(A, n, t) for n, t in enumerate(topics, 1)))]])
        found = log.read(0, 10, ["lost", "sold", "absent"])
        assert [e.topic for e in found] == ["sold", "lost", "sold", "lost"]
        assert [e.version for e in log.read(found[0].position, 2, ["lost", "sold"])] == [2, 4]

    def test_events_of_very_many_topics_can_be_read(self, log):
        commit(log, [[save(*(event(A, n, f"t{n % 3}") for n in range(1, 10)))]])
        topics = [f"t{n}" for n in range(1, 700)]
        assert [e.version for e in log.read(0, 4, topics)] == [1, 2, 4, 5]

    def test_the_log_tells_its_topics(self, log):
        assert log.topics() == frozenset()
        topics = ["sold", "lost", "sold"]
        commit(log, [[save(*(event(A, n, t) for n, t in enumerate(topics, 1)))]])
        assert log.topics() == {"sold", "lost"}

    def test_the_head_is_the_last_position(self, log):
        commit(log, [[save(event(A, 1))], [save(event(A, 2))]])
        assert log.head() == log.read(0, 10)[-1].position

    def test_a_group_of_4000_events_is_written_whole_and_in_order(self, log):
        (verdict,) = commit(log, [[save(*(event(A, n) for n in range(1, 4_001)))]])
        assert verdict == Committed((log.head(),))
        assert [e.version for e in log.read(0, 5_000)] == list(range(1, 4_001))

    def test_a_group_of_4000_events_is_refused_whole(self, log):
        commit(log, [[save(event(B, 1))]])
        (verdict,) = commit(log, [[save(*(event(A, n) for n in range(1, 4_001)), event(B, 1))]])
        assert verdict == Stale()
        assert stream(log) == []

    def test_threads_that_race_for_one_version_are_served_once(self, log):
        verdicts = []
        racers = [
            Thread(target=lambda: verdicts.extend(commit(log, [[save(event(A, 1))]])))
            for _ in range(4)
        ]
        for racer in racers:
            racer.start()
        for racer in racers:
            racer.join(20)
        assert sorted(type(v).__name__ for v in verdicts) == ["Committed", *["Stale"] * 3]
        assert stream(log) == [1]

    def test_a_reader_who_follows_never_meets_a_lower_position_later(self, log):
        def write(aggregate_id):
            for version in range(1, 26):
                commit(log, [[save(event(aggregate_id, version))]])

        writers = [Thread(target=write, args=(i,)) for i in (A, B, C)]
        for writer in writers:
            writer.start()
        seen = []
        is_writing = True
        while is_writing:
            is_writing = any(writer.is_alive() for writer in writers)
            while page := log.read(seen[-1].position if seen else 0, 7):
                seen += page
        assert seen == log.read(0, 100)
        assert len(seen) == 75


@st.composite
def groups_on(draw, versions, ids, command_ids):
    """Groups as callers make them: based on the present versions, or on somewhat older ones."""
    groups = []
    for _ in range(draw(st.integers(1, 4))):
        behind = draw(st.sampled_from([0, 0, 0, 1]))
        based_on = {i: max(0, versions.get(i, 0) - behind) for i in ids}
        group = []
        for command_id in draw(st.lists(st.sampled_from(command_ids), unique=True, max_size=3)):
            events = []
            for aggregate_id in draw(st.lists(st.sampled_from(ids), max_size=4)):
                based_on[aggregate_id] += 1
                state = draw(st.binary(max_size=3))
                events.append(event(aggregate_id, based_on[aggregate_id], "sold", state))
            answer = draw(st.none() | st.binary(max_size=3))
            group.append(save(*events, command_id=command_id, answer=answer))
        groups.append(group)
    return groups


class TestMemoryLog(LogContract):
    @pytest.fixture
    def url(self):
        return "memory:"


class TestSQLiteLog(LogContract):
    @pytest.fixture
    def url(self, sqlite_url):
        return sqlite_url


class TestPostgresLog(LogContract):
    @pytest.fixture
    def url(self, postgres_url):
        return postgres_url


@pytest.fixture
def shared_log(opened, shared_url):
    with opened(shared_url) as log:
        yield log


@given(st.data())
@settings(
    max_examples=25,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_the_log_agrees_with_the_one_in_memory(shared_log, data):
    reference, begun = MemoryLog(), shared_log.head()
    ids = [uuid4(), uuid4(), uuid4()]
    command_ids = [uuid4() for _ in range(6)]
    for _ in range(data.draw(st.integers(1, 4))):
        groups = data.draw(groups_on(reference.versions(ids), ids, command_ids))
        found, expected = commit(shared_log, groups), commit(reference, groups)
        assert [isinstance(v, Committed) for v in found] == [
            isinstance(v, Committed) for v in expected
        ]
    assert shared_log.streams(ids) == reference.streams(ids)
    assert shared_log.versions(ids) == reference.versions(ids)
    read = shared_log.read(begun, 1_000)
    assert [e[1:] for e in read] == [e[1:] for e in reference.read(0, 1_000)]
    order = {e.position: n for n, e in enumerate(read, 1)} | {0: 0}
    kept, known = shared_log.commands(command_ids), reference.commands(command_ids)
    assert {i: (order[c.position], c.aggregates, c.answer) for i, c in kept.items()} == {
        i: (c.position, c.aggregates, c.answer) for i, c in known.items()
    }
