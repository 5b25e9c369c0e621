"""The log on PostgreSQL: its tables, and the function that commits to it."""

from __future__ import annotations

# The lock makes the order of commits the order of positions.
LOCK = "LOCK TABLE stored_events IN EXCLUSIVE MODE; NOTIFY stored_events"

# Positions have no gaps in one call: nobody else draws any while the lock is held.
INSERT = """
CREATE OR REPLACE FUNCTION leftfold_insert(
    ids uuid[], versions bigint[], topics text[], states bytea[], OUT first bigint
) LANGUAGE sql AS $$
    WITH made AS (
        INSERT INTO stored_events (originator_id, originator_version, topic, state)
        SELECT i, v, t, s FROM unnest(ids, versions, topics, states)
        WITH ORDINALITY AS given (i, v, t, s, n) ORDER BY n
        RETURNING notification_id
    ) SELECT min(notification_id) FROM made
$$"""
CALL_INSERT = b"SELECT leftfold_insert(%b::uuid[], %b::bigint[], %b::text[], %b::bytea[])"

# Writes the events and commands of all groups but the refused. Element n of the arrays of groups
# is the group of event or command n; element n of `lasts` is the last event of command n, 0 if it
# has none.
WRITE = """
CREATE OR REPLACE FUNCTION leftfold_write(
    ids uuid[], versions bigint[], topics text[], states bytea[], event_groups int[],
    commands uuid[], names text[], written text[], answers bytea[], lasts int[],
    command_groups int[], refused int[], OUT positions bigint[]
) LANGUAGE plpgsql AS $$
DECLARE
    before bigint;
    ranks bigint[];
BEGIN
    IF cardinality(refused) > 0 THEN
        SELECT array_agg(rank ORDER BY n) INTO ranks FROM (
            SELECT n, count(*) FILTER (WHERE g <> ALL (refused)) OVER (ORDER BY n) AS rank
            FROM unnest(event_groups) WITH ORDINALITY AS given (g, n)
        ) AS ranked;
        SELECT array_agg(i ORDER BY n), array_agg(v ORDER BY n), array_agg(t ORDER BY n),
            array_agg(s ORDER BY n) INTO ids, versions, topics, states
        FROM unnest(ids, versions, topics, states, event_groups)
        WITH ORDINALITY AS given (i, v, t, s, g, n) WHERE g <> ALL (refused);
    END IF;
    before := leftfold_insert(ids, versions, topics, states) - 1;
    positions := array(
        SELECT CASE WHEN l = 0 OR g = ANY (refused) THEN 0 ELSE before + coalesce(ranks[l], l) END
        FROM unnest(lasts, command_groups) WITH ORDINALITY AS given (l, g, n) ORDER BY n);
    INSERT INTO leftfold_commands (command_id, command, position, aggregates, answer)
    SELECT c, m, p, w, a
    FROM unnest(commands, names, positions, written, answers, command_groups)
        AS given (c, m, p, w, a, g)
    WHERE g <> ALL (refused);
END $$"""

# All groups of a run, in one statement, which is a transaction. Under the lock it is looked whether
# each may be written, and then all that may are written at once: `bases` are the versions that the
# groups rest on, 0 for an aggregate that is absent.
# The planner knows nothing of the arrays, and first plans for empty tables: it is kept to indexes.
COMMIT = """
CREATE OR REPLACE FUNCTION leftfold_commit(
    base_ids uuid[], base_versions bigint[], base_groups int[],
    ids uuid[], versions bigint[], topics text[], states bytea[], event_groups int[],
    commands uuid[], names text[], written text[], answers bytea[], lasts int[],
    command_groups int[], number_of_groups int, OUT verdicts text[], OUT positions bigint[]
) LANGUAGE plpgsql SET enable_seqscan = off SET enable_bitmapscan = off AS $$
DECLARE
    stale int[];
    repeated int[];
BEGIN
    LOCK TABLE stored_events IN EXCLUSIVE MODE;
    NOTIFY stored_events;
    stale := array(
        SELECT g FROM unnest(base_ids, base_versions, base_groups) AS given (i, v, g)
        WHERE v <> coalesce((SELECT max(originator_version) FROM stored_events
            WHERE originator_id = i AND originator_version >= v), 0));
    repeated := array(
        SELECT g FROM unnest(commands, command_groups) AS given (i, g),
        LATERAL (SELECT FROM leftfold_commands WHERE command_id = i OFFSET 0) AS there);
    positions := leftfold_write(ids, versions, topics, states, event_groups,
        commands, names, written, answers, lasts, command_groups, stale || repeated);
    verdicts := array(
        SELECT CASE WHEN g = ANY (stale) THEN 'stale' WHEN g = ANY (repeated) THEN 'repeated'
            ELSE 'committed' END
        FROM generate_series(1, number_of_groups) AS g ORDER BY g);
END $$"""
COMMIT_PARAMETERS = (
    *("uuid[]", "bigint[]", "int[]"),
    *("uuid[]", "bigint[]", "text[]", "bytea[]", "int[]"),
    *("uuid[]", "text[]", "text[]", "bytea[]", "int[]", "int[]", "int"),
)

STATEMENTS = (
    """CREATE TABLE IF NOT EXISTS stored_events (
        originator_id uuid NOT NULL,
        originator_version bigint NOT NULL,
        topic text NOT NULL,
        state bytea NOT NULL,
        notification_id bigserial UNIQUE,
        PRIMARY KEY (originator_id, originator_version))""",
    """CREATE TABLE IF NOT EXISTS leftfold_commands (
        command_id uuid PRIMARY KEY,
        command text NOT NULL,
        recorded_at timestamptz NOT NULL DEFAULT now(),
        position bigint NOT NULL,
        aggregates text NOT NULL,
        answer bytea)""",
    """CREATE INDEX IF NOT EXISTS leftfold_commands_recorded
        ON leftfold_commands USING brin (recorded_at)""",
    """CREATE TABLE IF NOT EXISTS leftfold_snapshots (
        originator_id uuid PRIMARY KEY,
        originator_version bigint NOT NULL,
        shape text NOT NULL,
        state bytea NOT NULL)""",
    """CREATE TABLE IF NOT EXISTS leftfold_checkpoints (
        name text NOT NULL,
        version int NOT NULL,
        position bigint NOT NULL,
        definition text NOT NULL,
        owner text,
        epoch bigint NOT NULL DEFAULT 0,
        lease timestamptz,
        PRIMARY KEY (name, version))""",
    "ALTER TABLE leftfold_checkpoints ADD COLUMN IF NOT EXISTS reads text NOT NULL DEFAULT ''",
    "ALTER TABLE leftfold_checkpoints ADD COLUMN IF NOT EXISTS built bool NOT NULL DEFAULT true",
    "ALTER TABLE leftfold_checkpoints ADD COLUMN IF NOT EXISTS failure text",
    "ALTER TABLE leftfold_checkpoints ADD COLUMN IF NOT EXISTS failed_in bigint",
    """CREATE TABLE IF NOT EXISTS leftfold_dead_letters (
        name text NOT NULL,
        version int NOT NULL,
        position bigint NOT NULL,
        key text NOT NULL,
        originator_id uuid NOT NULL,
        originator_version bigint NOT NULL,
        topic text NOT NULL,
        error text NOT NULL,
        parked_at timestamptz NOT NULL,
        PRIMARY KEY (name, version, position, key))""",
    """CREATE INDEX IF NOT EXISTS stored_events_topic
        ON stored_events (topic, notification_id)""",
    """CREATE TABLE IF NOT EXISTS notification_tracking (
        application_name text PRIMARY KEY,
        notification_id bigint)""",
    "CREATE TABLE IF NOT EXISTS leftfold_schema (version int NOT NULL)",
    INSERT,
    WRITE,
    COMMIT,
)
