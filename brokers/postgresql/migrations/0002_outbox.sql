-- lowest reader: 1

-- The outbox: jobs that a user's transaction published for another broker. Relays take them in the order of `seq`, and delete them
-- in the transaction that locks them. `added_ms` is a moment of the server's clock, from which `delay_ms` counts. The queue's
-- definition is here because the relay declares the queue.
CREATE TABLE {schema}.outbox (
    LIKE {schema}.jobs INCLUDING DEFAULTS INCLUDING CONSTRAINTS INCLUDING IDENTITY,
    queue_type text NOT NULL DEFAULT 'quorum',
    priorities boolean NOT NULL DEFAULT true,
    delay_ms bigint,
    added_ms bigint NOT NULL DEFAULT floor(extract(epoch FROM clock_timestamp()) * 1000),
    PRIMARY KEY (seq)
) WITH (
    autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000, autovacuum_vacuum_cost_delay = 0,
    toast.autovacuum_vacuum_scale_factor = 0, toast.autovacuum_vacuum_threshold = 5000, toast.autovacuum_vacuum_cost_delay = 0
);

-- What the broker will never take, with its error in the headers.
CREATE TABLE {schema}.outbox_dead (
    LIKE {schema}.outbox INCLUDING DEFAULTS INCLUDING CONSTRAINTS,
    buried_ms bigint NOT NULL DEFAULT floor(extract(epoch FROM clock_timestamp()) * 1000),
    PRIMARY KEY (queue, seq)
);

-- The inbox: the jobs whose effect is committed, by the transactions of their handlers.
CREATE TABLE {schema}.inbox (
    queue text COLLATE "C" NOT NULL,
    job_id text COLLATE "C" NOT NULL,
    done_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (queue, job_id)
) WITH (autovacuum_vacuum_scale_factor = 0.02);
CREATE INDEX inbox_done_at ON {schema}.inbox (done_at);

-- Publish jobs through the outbox: one array for each column, in the order of leveret's rows, and the definitions of their queues.
-- A relay that waits shares an advisory lock, as a worker does: see `wake`.
CREATE FUNCTION {schema}.add_outbox(
    queues text[], levels text[], delays_ms bigint[], job_ids text[], jobs text[], content_types text[], content_encodings text[],
    bodies bytea[], created_s bigint[], apps text[], correlation_ids text[], reply_tos text[], headers text[], queue_types text[],
    priorities boolean[]
) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = {schema}, pg_temp SET jit = off AS $$
#variable_conflict use_column
DECLARE
    key bigint := waiting('lv.outbox');
BEGIN
    INSERT INTO outbox (
        queue, level, delay_ms, job_id, job, content_type, content_encoding, body, created_s, app, correlation_id, reply_to, headers,
        queue_type, priorities
    )
    SELECT r.queue, coalesce(array_position(ARRAY['urgent', 'high', 'normal', 'low'], r.level), 0), r.delay_ms, r.job_id, r.job,
           r.content_type, r.content_encoding, r.body, r.created_s, r.app, r.correlation_id, r.reply_to, r.headers, r.queue_type,
           r.priorities
    FROM unnest(queues, levels, delays_ms, job_ids, jobs, content_types, content_encodings, bodies, created_s, apps,
                correlation_ids, reply_tos, headers, queue_types, priorities)
         AS r(queue, level, delay_ms, job_id, job, content_type, content_encoding, body, created_s, app, correlation_id, reply_to,
              headers, queue_type, priorities);
    IF NOT (pg_try_advisory_lock(key) AND pg_advisory_unlock(key)) THEN
        PERFORM pg_notify('leveret_outbox_' || md5('{schema}'), 'new');
    END IF;
END $$;

-- Lock at most `at_most` jobs, oldest first, and return as many of them as have `at_most_bytes` of bodies, at least one.
-- With `of_queue`, of that queue; none of the queues `not_of`. `waited_ms` is null if `added_ms` is before 1970, which no clock says.
CREATE FUNCTION {schema}.take_outbox(at_most integer, at_most_bytes bigint, of_queue text, not_of text[])
RETURNS TABLE (
    seq bigint, waited_ms bigint, delay_ms bigint, queue_type text, priorities boolean, queue text, level text, job_id text, job text,
    content_type text, content_encoding text, body bytea, created_s bigint, app text, correlation_id text, reply_to text, headers text
)
LANGUAGE plpgsql
SET search_path = {schema}, pg_temp
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off SET enable_material = off
SET join_collapse_limit = 1 SET plan_cache_mode = force_generic_plan SET jit = off AS $$
#variable_conflict use_column
DECLARE
    taken bigint[];
BEGIN
    SELECT array_agg(n.seq) INTO taken FROM (
        SELECT o.seq FROM outbox o
        WHERE (of_queue IS NULL OR o.queue = of_queue) AND o.queue <> ALL (not_of)
        ORDER BY o.seq LIMIT at_most FOR UPDATE SKIP LOCKED
    ) n;
    RETURN QUERY
        SELECT s.seq, floor(extract(epoch FROM clock_timestamp()) * 1000)::bigint - CASE WHEN s.added_ms >= 0 THEN s.added_ms END,
            s.delay_ms, s.queue_type, s.priorities, s.queue, coalesce((ARRAY['urgent', 'high', 'normal', 'low'])[s.level], s.level::text), s.job_id, s.job, s.content_type,
            s.content_encoding, s.body, s.created_s, s.app, s.correlation_id, s.reply_to, s.headers
        FROM (
            SELECT o.*, t.place, sum(octet_length(o.body)) OVER (ORDER BY t.place) AS bytes
            FROM unnest(taken) WITH ORDINALITY AS t(seq, place)
            CROSS JOIN LATERAL (SELECT * FROM outbox WHERE seq = t.seq OFFSET 0) o
        ) s
        WHERE s.place = 1 OR s.bytes <= at_most_bytes
        ORDER BY s.place;
END $$;

-- Delete jobs that this transaction has locked: published, or buried in it.
CREATE FUNCTION {schema}.settle_outbox(seqs bigint[]) RETURNS void
LANGUAGE plpgsql
SET search_path = {schema}, pg_temp
SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off SET enable_material = off
SET join_collapse_limit = 1 SET plan_cache_mode = force_generic_plan SET jit = off AS $$
BEGIN
    DELETE FROM outbox WHERE ctid = ANY (ARRAY(
        SELECT o.ctid FROM unnest(seqs) AS s(seq) CROSS JOIN LATERAL (SELECT ctid FROM outbox WHERE seq = s.seq OFFSET 0) o
    ));
END $$;

-- Delete at most `at_most` entries of the inbox that are older than `keep_s`, and return how many.
CREATE FUNCTION {schema}.forget_once(keep_s double precision, at_most integer) RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = {schema}, pg_temp SET enable_seqscan = off SET plan_cache_mode = force_generic_plan SET jit = off AS $$
DECLARE
    forgotten integer;
BEGIN
    DELETE FROM inbox WHERE ctid = ANY (ARRAY(
        SELECT i.ctid FROM inbox i WHERE i.done_at < clock_timestamp() - make_interval(secs => keep_s)
        ORDER BY i.done_at LIMIT at_most FOR UPDATE SKIP LOCKED
    ));
    GET DIAGNOSTICS forgotten = ROW_COUNT;
    RETURN forgotten;
END $$;

-- Note that this transaction has the effect of a job; false if another one has it, for whose end this one waits. One call in a hundred
-- deletes a hundred old entries and more, so that whoever fills the inbox also empties it.
CREATE FUNCTION {schema}.once(of_queue text, of_job text, keep_s double precision) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = {schema}, pg_temp SET jit = off AS $$
DECLARE
    is_first boolean;
BEGIN
    INSERT INTO inbox (queue, job_id) VALUES (of_queue, of_job) ON CONFLICT DO NOTHING;
    is_first := FOUND;
    IF random() < 0.01 AND current_setting('transaction_isolation') = 'read committed' THEN
        PERFORM forget_once(keep_s, 200);
    END IF;
    RETURN is_first;
END $$;

REVOKE ALL ON FUNCTION {schema}.add_outbox, {schema}.take_outbox, {schema}.settle_outbox, {schema}.forget_once, {schema}.once
FROM PUBLIC;
