-- lowest reader: 1

-- The job store: one record for each publish of a job whose class has `keep=`. `stage` is the place of the state within one pass: the
-- job waits (0), runs (1) or has ended (2). `keep_until_ms` is a moment of the server's clock, and changes in steps: an update that
-- leaves it as it was touches no index. `seq` counts the records, by batches and places in them. `waiters` are the channels of those
-- who wait for the end.
CREATE SEQUENCE {schema}.record_batches;
CREATE TABLE {schema}.records (
    seq bigint NOT NULL,
    publish bigint NOT NULL,
    passes bigint NOT NULL,
    attempt bigint NOT NULL,
    created_ms bigint NOT NULL,
    started_ms bigint,
    at_ms bigint NOT NULL,
    keep_until_ms bigint NOT NULL,
    progress double precision,
    stage smallint NOT NULL,
    asked boolean NOT NULL DEFAULT false,
    job_id text COLLATE "C" NOT NULL,
    queue text NOT NULL,
    job text NOT NULL,
    state text NOT NULL,
    note text NOT NULL DEFAULT '',
    content_type text NOT NULL,
    error text NOT NULL,
    reason text NOT NULL,
    waiters text[],
    result bytea,
    body bytea,
    PRIMARY KEY (job_id, publish)
) WITH (
    fillfactor = 50,
    autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 5000, autovacuum_vacuum_cost_delay = 0,
    toast.autovacuum_vacuum_scale_factor = 0.02, toast.autovacuum_vacuum_threshold = 5000, toast.autovacuum_vacuum_cost_delay = 0
);
CREATE INDEX records_seq ON {schema}.records (seq);
CREATE INDEX records_keep ON {schema}.records (keep_until_ms);

-- Enter changes: one array for each column. Each publish is there at most once, and they are sorted: then two callers never wait for
-- each other in a circle. `places` has the order in which they happened. A change that is late has no effect. `begins`: all are runs that begin; one that was asked to end becomes aborted instead.
-- Returns what the records are afterwards, in order, if `begins`.
CREATE FUNCTION {schema}.enter_records(
    begins boolean, places integer[], job_ids text[], publishes bigint[], queues text[], jobs text[], states text[], stages smallint[], passes_ bigint[],
    attempts bigint[], ats_ms bigint[], keeps_ms bigint[], content_types text[], errors text[], reasons text[], results bytea[],
    bodies bytea[]
) RETURNS TABLE (passes bigint, stage smallint, state text)
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = {schema}, pg_temp
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off SET enable_material = off
SET plan_cache_mode = force_generic_plan SET jit = off AS $$
#variable_conflict use_column
DECLARE
    now_ms bigint := floor(extract(epoch FROM clock_timestamp()) * 1000);
    batch bigint := nextval('record_batches') << 20;
    told record;
BEGIN
    FOR told IN
        WITH entered AS (
            INSERT INTO records AS r (
                seq, job_id, publish, queue, job, state, stage, passes, attempt, created_ms, started_ms, at_ms, keep_until_ms, content_type,
                error, reason, result, body
            )
            SELECT batch + c.place, c.job_id, c.publish, c.queue, c.job, c.state, c.stage, c.passes, c.attempt, c.at_ms,
                   CASE WHEN c.stage = 1 THEN c.at_ms END, c.at_ms,
                   ((now_ms + c.keep_ms) / greatest(1, c.keep_ms / 64) + 1) * greatest(1, c.keep_ms / 64),
                   c.content_type, c.error, c.reason, c.result, c.body
            FROM unnest(places, job_ids, publishes, queues, jobs, states, stages, passes_, attempts, ats_ms, keeps_ms, content_types, errors,
                        reasons, results, bodies)
                 AS c(place, job_id, publish, queue, job, state, stage, passes, attempt, at_ms, keep_ms, content_type, error, reason, result,
                      body)
            ON CONFLICT (job_id, publish) DO UPDATE SET
                queue = excluded.queue, job = excluded.job, passes = excluded.passes, attempt = excluded.attempt,
                state = CASE WHEN begins AND r.asked THEN 'aborted' ELSE excluded.state END,
                stage = CASE WHEN begins AND r.asked THEN 2 ELSE excluded.stage END,
                started_ms = CASE WHEN begins AND r.asked THEN r.started_ms ELSE coalesce(excluded.started_ms, r.started_ms) END,
                at_ms = excluded.at_ms, keep_until_ms = excluded.keep_until_ms,
                progress = CASE WHEN excluded.stage <> 1 OR begins AND r.asked THEN r.progress END,
                note = CASE WHEN excluded.stage <> 1 OR begins AND r.asked THEN r.note ELSE '' END,
                asked = r.asked AND excluded.stage < 2 AND NOT begins,
                content_type = excluded.content_type, error = excluded.error, reason = excluded.reason, result = excluded.result,
                body = coalesce(excluded.body, r.body)
            WHERE CASE
                WHEN begins AND (r.passes > excluded.passes OR r.passes = excluded.passes AND r.stage = 2) THEN false
                WHEN begins AND r.asked THEN true
                ELSE (excluded.passes, excluded.attempt, excluded.stage) > (r.passes, r.attempt, r.stage)
            END
            RETURNING r.publish, r.stage, r.waiters
        )
        SELECT w.channel, array_agg(e.publish) AS ended FROM entered e, unnest(e.waiters) AS w(channel) WHERE e.stage = 2 GROUP BY 1
    LOOP
        PERFORM tell_ended(told.channel, told.ended);
    END LOOP;
    IF begins THEN
        RETURN QUERY
            SELECT r.passes, r.stage, r.state
            FROM unnest(job_ids, publishes) WITH ORDINALITY AS k(job_id, publish, place)
            JOIN records r ON r.job_id = k.job_id AND r.publish = k.publish ORDER BY k.place;
    END IF;
END $$;

-- Tell who waits for these publishes that they have ended, once the transaction is committed. A notice holds no more than 8000 bytes:
-- without numbers it says that some have.
CREATE FUNCTION {schema}.tell_ended(channel text, publishes bigint[]) RETURNS void
LANGUAGE sql AS $$
    SELECT pg_notify(channel, CASE WHEN cardinality(publishes) <= 300 THEN array_to_string(publishes, ',') ELSE '' END)
$$;

-- Note how far runs are; `passes_` and `attempts` say of which run.
CREATE FUNCTION {schema}.note_progress(
    job_ids text[], publishes bigint[], passes_ bigint[], attempts bigint[], fractions double precision[], notes text[]
) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = {schema}, pg_temp
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off SET enable_material = off
SET join_collapse_limit = 1 SET plan_cache_mode = force_generic_plan SET jit = off AS $$
BEGIN
    UPDATE records r SET progress = p.fraction, note = p.note
    FROM unnest(job_ids, publishes, passes_, attempts, fractions, notes) AS p(job_id, publish, passes, attempt, fraction, note)
    WHERE r.job_id = p.job_id AND r.publish = p.publish AND r.passes = p.passes AND r.attempt = p.attempt AND r.stage = 1;
END $$;

-- Abort a publish: one that waits ends, one that runs is marked. Returns its state afterwards, null if there is no record.
CREATE FUNCTION {schema}.abort_record(of_job text, of_publish bigint) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = {schema}, pg_temp SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off AS $$
DECLARE
    after text;
    found_at smallint;
    channels text[];
BEGIN
    LOOP
        UPDATE records r SET
            state = CASE r.stage WHEN 0 THEN 'aborted' ELSE r.state END, stage = CASE r.stage WHEN 0 THEN 2 ELSE r.stage END,
            at_ms = CASE r.stage WHEN 0 THEN floor(extract(epoch FROM clock_timestamp()) * 1000)::bigint ELSE r.at_ms END, asked = r.stage = 1
        WHERE r.job_id = of_job AND r.publish = of_publish AND r.stage < 2
        RETURNING r.state, r.waiters INTO after, channels;
        IF FOUND THEN
            IF after = 'aborted' THEN
                PERFORM tell_ended(w.channel, ARRAY[of_publish]) FROM unnest(channels) AS w(channel);
            END IF;
            RETURN after;
        END IF;
        SELECT r.state, r.stage INTO after, found_at FROM records r WHERE r.job_id = of_job AND r.publish = of_publish;
        IF NOT FOUND OR found_at = 2 THEN
            RETURN after;
        END IF;
        -- the record came between the two statements, so the update didn't see it
    END LOOP;
END $$;

-- Return the records of these publishes; with `at_least`, those whose stage is at least that.
CREATE FUNCTION {schema}.find_records(job_ids text[], publishes bigint[], at_least smallint) RETURNS SETOF {schema}.records
LANGUAGE plpgsql STABLE SECURITY DEFINER
SET search_path = {schema}, pg_temp
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off SET enable_material = off
SET join_collapse_limit = 1 SET plan_cache_mode = force_generic_plan SET jit = off AS $$
BEGIN
    RETURN QUERY
        SELECT r.* FROM unnest(job_ids, publishes) AS k(job_id, publish)
        JOIN records r ON r.job_id = k.job_id AND r.publish = k.publish WHERE r.stage >= at_least;
END $$;

-- Let `channel` hear of the ends of those of these publishes that haven't ended. A record keeps the last eight who wait.
CREATE FUNCTION {schema}.await_ends(channel text, job_ids text[], publishes bigint[]) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = {schema}, pg_temp
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off SET enable_material = off
SET join_collapse_limit = 1 SET plan_cache_mode = force_generic_plan SET jit = off AS $$
BEGIN
    UPDATE records r SET waiters = (channel || r.waiters)[1:8]
    FROM unnest(job_ids, publishes) AS k(job_id, publish)
    WHERE r.job_id = k.job_id AND r.publish = k.publish AND r.stage < 2 AND channel <> ALL (coalesce(r.waiters, '{}'));
END $$;

-- The publish of this id of which the store heard last for the first time. `+ 0`: by the index of `seq` an unknown id would read it all.
CREATE FUNCTION {schema}.newest_record(of_job text) RETURNS bigint
LANGUAGE sql STABLE SECURITY DEFINER
SET search_path = {schema}, pg_temp SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off AS $$
    SELECT r.publish FROM records r WHERE r.job_id = of_job ORDER BY r.seq + 0 DESC LIMIT 1
$$;

CREATE FUNCTION {schema}.drop_records(job_ids text[], publishes bigint[]) RETURNS integer
LANGUAGE plpgsql
SET search_path = {schema}, pg_temp
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off SET enable_material = off
SET join_collapse_limit = 1 SET plan_cache_mode = force_generic_plan SET jit = off AS $$
DECLARE
    dropped integer;
BEGIN
    DELETE FROM records r USING unnest(job_ids, publishes) AS k(job_id, publish) WHERE r.job_id = k.job_id AND r.publish = k.publish;
    GET DIAGNOSTICS dropped = ROW_COUNT;
    RETURN dropped;
END $$;

-- Delete at most `at_most` records whose time is over, and return how many.
CREATE FUNCTION {schema}.trim_records(at_most integer) RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = {schema}, pg_temp SET enable_seqscan = off SET plan_cache_mode = force_generic_plan SET jit = off AS $$
DECLARE
    trimmed integer;
BEGIN
    DELETE FROM records WHERE ctid = ANY (ARRAY(
        SELECT r.ctid FROM records r WHERE r.keep_until_ms <= floor(extract(epoch FROM clock_timestamp()) * 1000)::bigint
        ORDER BY r.keep_until_ms LIMIT at_most FOR UPDATE SKIP LOCKED
    ));
    GET DIAGNOSTICS trimmed = ROW_COUNT;
    RETURN trimmed;
END $$;

REVOKE ALL ON FUNCTION
    {schema}.enter_records, {schema}.tell_ended, {schema}.note_progress, {schema}.abort_record, {schema}.find_records,
    {schema}.await_ends, {schema}.newest_record, {schema}.drop_records, {schema}.trim_records
FROM PUBLIC;
