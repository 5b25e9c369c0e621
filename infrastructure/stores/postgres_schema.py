"""The log on PostgreSQL: its tables, and the function that commits to it."""

from __future__ import annotations

# The lock makes the order of commits the order of positions.
LOCK = "LOCK TABLE stored_events IN EXCLUSIVE MODE; NOTIFY stored_events"

INSERT = """
CREATE OR REPLACE FUNCTION leftfold_insert(
    ids uuid[], versions bigint[], topics text[], states bytea[], OUT positions bigint[]
) LANGUAGE plpgsql AS $$
BEGIN
    WITH made AS (
        INSERT INTO stored_events (originator_id, originator_version, topic, state)
        SELECT i, v, t, s FROM unnest(ids, versions, topics, states)
        WITH ORDINALITY AS given (i, v, t, s, n) ORDER BY n
        RETURNING notification_id
    ) SELECT array_agg(notification_id ORDER BY notification_id) INTO positions FROM made;
END $$"""
CALL_INSERT = b"SELECT leftfold_insert(%b::uuid[], %b::bigint[], %b::text[], %b::bytea[])"

# All saves that wait, in one statement, which is a transaction: all groups at once, or, where one
# of them is stale or repeated, each by itself, under the same lock.
# Element n of `event_ends` and `command_ends` is the last of group n's events and commands;
# element n of `lasts` is the last event of command n, 0 if it has none.
COMMIT = """
CREATE OR REPLACE FUNCTION leftfold_commit(
    ids uuid[], versions bigint[], topics text[], states bytea[],
    commands uuid[], names text[], written text[], answers bytea[], lasts int[],
    event_ends int[], command_ends int[], OUT verdicts text[], OUT positions bigint[]
) LANGUAGE plpgsql AS $$
DECLARE
    made bigint[];
    event int := 1;
    command int := 1;
    violated text;
BEGIN
    LOCK TABLE stored_events IN EXCLUSIVE MODE;
    NOTIFY stored_events;
    BEGIN
        made := leftfold_insert(ids, versions, topics, states);
        INSERT INTO leftfold_commands (command_id, command, position, aggregates, answer)
        SELECT c, n, coalesce(made[l], 0), w, a
        FROM unnest(commands, names, written, answers, lasts) AS given (c, n, w, a, l);
        verdicts := array_fill('committed'::text, ARRAY[cardinality(event_ends)]);
        SELECT array_agg(coalesce(made[l], 0) ORDER BY n) INTO positions
        FROM unnest(lasts) WITH ORDINALITY AS given (l, n);
        RETURN;
    EXCEPTION WHEN unique_violation THEN
        positions := array_fill(0::bigint, ARRAY[cardinality(commands)]);
    END;
    FOR g IN 1 .. cardinality(event_ends) LOOP
        BEGIN
            made := leftfold_insert(
                ids[event:event_ends[g]], versions[event:event_ends[g]],
                topics[event:event_ends[g]], states[event:event_ends[g]]);
            FOR c IN command .. command_ends[g] LOOP
                INSERT INTO leftfold_commands (command_id, command, position, aggregates, answer)
                VALUES (commands[c], names[c], coalesce(made[lasts[c] - event + 1], 0),
                    written[c], answers[c]);
            END LOOP;
            -- A refused group must not keep what it would have got.
            FOR c IN command .. command_ends[g] LOOP
                positions[c] := coalesce(made[lasts[c] - event + 1], 0);
            END LOOP;
            verdicts[g] := 'committed';
        EXCEPTION WHEN unique_violation THEN
            GET STACKED DIAGNOSTICS violated = TABLE_NAME;
            verdicts[g] := CASE violated WHEN 'leftfold_commands' THEN 'repeated' ELSE 'stale' END;
        END;
        event := event_ends[g] + 1;
        command := command_ends[g] + 1;
    END LOOP;
END $$"""
CALL_COMMIT = (
    b"SELECT * FROM leftfold_commit(%b::uuid[], %b::bigint[], %b::text[], %b::bytea[], "
    b"%b::uuid[], %b::text[], %b::text[], %b::bytea[], %b::int[], %b::int[], %b::int[])"
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
    """CREATE TABLE IF NOT EXISTS leftfold_checkpoints (
        name text NOT NULL,
        version int NOT NULL,
        position bigint NOT NULL,
        definition text NOT NULL,
        owner text,
        epoch bigint NOT NULL DEFAULT 0,
        lease timestamptz,
        PRIMARY KEY (name, version))""",
    """CREATE TABLE IF NOT EXISTS notification_tracking (
        application_name text PRIMARY KEY,
        notification_id bigint)""",
    "CREATE TABLE IF NOT EXISTS leftfold_schema (version int NOT NULL)",
    INSERT,
    COMMIT,
)
