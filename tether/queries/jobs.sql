-- Each write here may be applied twice: pyrqlite's answer can be lost after the commit, and the store sends it again.

-- name: insert_job
-- Writes the job down unless it is there already or would pass a limit of its tenant, of its key or of its model. It
-- remembers the counters that it has to be counted in; without a limit there are none.
INSERT INTO jobs (
    id, tenant_id, key_id, model, version, status, attempt, sampling, wait, stream, priority, deadline_seconds, region,
    session_key, form, user, metadata, keep, orchestrator_id, orchestrator_boot, created_at, started_at, input, outline,
    reserved_tokens, charges
)
WITH limits AS (
    SELECT key_id, model, unit, window_seconds, most,
        iif(window_seconds > 0, CAST(:now / window_seconds AS INTEGER) * window_seconds, 0) AS window_start
    FROM (
        SELECT key_id, model, unit, window_seconds, most FROM quota_limits
        WHERE tenant_id = :tenant_id AND key_id IN ('', :key_id) AND model IN ('', :model)
        UNION ALL
        SELECT '', '', 'requests', 60, :requests_per_minute
        WHERE :requests_per_minute IS NOT NULL AND NOT EXISTS (
            SELECT 1 FROM quota_limits
            WHERE tenant_id = :tenant_id AND key_id = '' AND model = '' AND unit = 'requests' AND window_seconds = 60
        )
    )
)
SELECT :id, :tenant_id, :key_id, :model, :version, iif(free, 'running', 'queued'), free, :sampling, :wait, :stream,
    :priority, :deadline_seconds, :region, :session_key, :form, :user, :metadata, :keep, :orchestrator_id, :orchestrator_boot, :created_at,
    iif(free, :now, NULL), :input, :outline, :reserved_tokens,
    nullif((
        SELECT json_group_array(json_array(key_id, model, unit, window_seconds, window_start))
        FROM limits WHERE window_seconds > 0
    ), '[]')
FROM (
    SELECT :slots > (
        SELECT count(*) FROM attempts
        WHERE worker_id = :worker_id AND worker_boot = :worker_boot AND status = 'running'
    ) AS free
)
WHERE NOT EXISTS (SELECT 1 FROM jobs WHERE id = :id) AND NOT EXISTS (
    SELECT 1 FROM limits AS l
    WHERE most < CASE unit
        WHEN 'job_tokens' THEN :reserved_tokens
        WHEN 'jobs' THEN 1 + (
            SELECT count(*) FROM jobs AS j
            WHERE j.tenant_id = :tenant_id AND j.status IN ('queued', 'running')
                AND (l.key_id = '' OR j.key_id = l.key_id) AND (l.model = '' OR j.model = l.model)
        )
        ELSE iif(unit = 'tokens', :reserved_tokens, 1) + coalesce((
            SELECT used + reserved FROM quota_counters AS c
            WHERE c.tenant_id = :tenant_id AND c.key_id = l.key_id AND c.model = l.model AND c.unit = l.unit
                AND c.window_seconds = l.window_seconds AND c.window_start = l.window_start
        ), 0)
    END
);

-- name: count_job
-- Comes right after `insert_job`: counts the request, reserves the tokens that it may use, and says what is spent then.
INSERT INTO quota_counters (tenant_id, key_id, model, unit, window_seconds, window_start, used, reserved)
SELECT :tenant_id, value ->> 0, value ->> 1, value ->> 2, value ->> 3, value ->> 4,
    iif(value ->> 2 = 'requests', 1, 0), iif(value ->> 2 = 'tokens', :reserved_tokens, 0)
FROM json_each((SELECT charges FROM jobs WHERE id = :id AND changes() > 0))
WHERE true
ON CONFLICT DO UPDATE SET used = used + excluded.used, reserved = reserved + excluded.reserved
RETURNING key_id, model, unit, window_seconds, used + reserved AS spent, coalesce((
    SELECT most FROM quota_limits AS l
    WHERE l.tenant_id = quota_counters.tenant_id AND l.key_id = quota_counters.key_id AND l.model = quota_counters.model
        AND l.unit = quota_counters.unit AND l.window_seconds = quota_counters.window_seconds
), :requests_per_minute) AS most;

-- name: insert_first_attempt
-- Comes after `insert_job`, which found the slot free or not. A running job has its attempt, so a repetition does nothing.
INSERT INTO attempts (job_id, number, worker_id, worker_boot, fingerprint, orchestrator_id, status, started_at)
SELECT :id, 1, :worker_id, :worker_boot, :fingerprint, :orchestrator_id, 'running', :now
FROM jobs WHERE id = :id AND status = 'running' AND attempt = 1
ON CONFLICT DO NOTHING;

-- name: insert_attempt
INSERT INTO attempts (job_id, number, worker_id, worker_boot, fingerprint, orchestrator_id, status, started_at)
SELECT id, :number, :worker_id, :worker_boot, :fingerprint, :orchestrator_id, 'running', :now
FROM jobs
WHERE id = :id AND status IN ('queued', 'running') AND attempt = :number - 1
    AND orchestrator_id = :orchestrator_id AND orchestrator_boot = :orchestrator_boot
    AND :slots > (
        SELECT count(*) FROM attempts
        WHERE worker_id = :worker_id AND worker_boot = :worker_boot AND status = 'running'
    )
    AND NOT EXISTS (SELECT 1 FROM attempts WHERE job_id = :id AND number = :number - 1 AND status = 'running')
ON CONFLICT DO NOTHING;

-- name: start_attempt
-- Comes right after `insert_attempt`.
UPDATE jobs
SET status = 'running', attempt = :number, started_at = coalesce(started_at, :now), exact = min(exact, :exact)
WHERE changes() > 0 AND id = :id;

-- name: close_attempt
UPDATE attempts
SET status = :status, error_code = :error_code, completion_tokens = :completion_tokens, ended_at = :now
WHERE job_id = :id AND number = :number AND status = 'running';

-- name: requeue_job
UPDATE jobs SET status = 'queued'
WHERE id = :id AND attempt = :number AND status = 'running'
    AND orchestrator_id = coalesce(:orchestrator_id, orchestrator_id)
    AND orchestrator_boot = coalesce(:orchestrator_boot, orchestrator_boot);

-- name: release_job
-- Whoever comes first may have the job: no boot holds it any more.
UPDATE jobs SET status = 'queued', orchestrator_boot = ''
WHERE id = :id AND attempt = :number AND status IN ('queued', 'running')
    AND orchestrator_id = :orchestrator_id AND orchestrator_boot = :orchestrator_boot;

-- name: end_job
-- Writes a job's one end, and keeps of its texts what the job's `keep` allows.
UPDATE jobs
SET status = :status, finish_reason = :finish_reason, error_code = :error_code, error_message = :error_message,
    prompt_tokens = :prompt_tokens, completion_tokens = :completion_tokens, ended_at = :now,
    input = iif(keep = 'all', input, NULL), result = iif(keep = 'nothing', NULL, :result),
    logprobs = iif(keep = 'nothing', NULL, :logprobs)
WHERE id = :id AND attempt = :number AND status IN ('queued', 'running')
    AND orchestrator_id = coalesce(:orchestrator_id, orchestrator_id)
    AND orchestrator_boot = coalesce(:orchestrator_boot, orchestrator_boot);

-- name: settle_job
-- Comes right after `end_job`: what was reserved becomes what was used. `given_back`: the job was refused after all, and
-- its request counts for nothing.
UPDATE quota_counters
SET reserved = reserved - iif(unit = 'tokens', (SELECT reserved_tokens FROM jobs WHERE id = :id), 0),
    used = used + iif(unit = 'tokens', :used_tokens, -:given_back)
WHERE (tenant_id, key_id, model, unit, window_seconds, window_start) IN (
    SELECT j.tenant_id, e.value ->> 0, e.value ->> 1, e.value ->> 2, e.value ->> 3, e.value ->> 4
    FROM jobs AS j, json_each(j.charges) AS e WHERE j.id = :id AND changes() > 0
);

-- name: close_last_attempt
-- Comes after `end_job`: the slot is free in the same transaction.
UPDATE attempts
SET status = :status, error_code = :error_code, completion_tokens = :completion_tokens, ended_at = :now
WHERE job_id = :id AND number = :number AND status = 'running' AND EXISTS (
    SELECT 1 FROM jobs WHERE id = :id AND attempt = :number AND status = :status AND ended_at = :now
);

-- name: lose_attempt_of_holder
-- Comes before `take_over_job`, and holds for the same job.
UPDATE attempts SET status = 'lost', error_code = 'orchestrator_lost', ended_at = :now
WHERE job_id = :id AND status = 'running' AND EXISTS (
    SELECT 1 FROM jobs
    WHERE id = :id AND status IN ('queued', 'running')
        AND orchestrator_id = :holder_id AND orchestrator_boot = :holder_boot
);

-- name: take_over_job
-- A compare-and-set: of several that want a job from the same holder, one gets it.
UPDATE jobs
SET status = 'queued', orchestrator_id = :orchestrator_id, orchestrator_boot = :orchestrator_boot
WHERE id = :id AND status IN ('queued', 'running')
    AND orchestrator_id = :holder_id AND orchestrator_boot = :holder_boot;

-- name: lose_attempts_of_older_boots
UPDATE attempts SET status = 'lost', error_code = 'orchestrator_lost', ended_at = :now
WHERE status = 'running' AND job_id IN (
    SELECT id FROM jobs
    WHERE orchestrator_id = :orchestrator_id AND status IN ('queued', 'running')
        AND orchestrator_boot <> :orchestrator_boot
);

-- name: adopt_jobs_of_older_boots
UPDATE jobs SET status = 'queued', orchestrator_boot = :orchestrator_boot
WHERE orchestrator_id = :orchestrator_id AND status IN ('queued', 'running')
    AND orchestrator_boot <> :orchestrator_boot;

-- name: job
SELECT * FROM job_records WHERE id = :id;

-- name: admitted
-- What a repeated admission finds.
SELECT j.*, a.worker_id, a.worker_boot, a.status AS attempt_status
FROM jobs AS j LEFT JOIN attempts AS a ON a.job_id = j.id AND a.number = j.attempt
WHERE j.id = :id;

-- name: attempt
-- What a repeated reservation finds.
SELECT a.*, j.orchestrator_boot
FROM attempts AS a JOIN jobs AS j ON j.id = a.job_id
WHERE a.job_id = :id AND a.number = :number;

-- name: attempts
SELECT * FROM attempts WHERE job_id = :id ORDER BY number;

-- name: jobs
SELECT * FROM job_listing WHERE id < :before ORDER BY id DESC LIMIT :limit;

-- name: jobs_of_tenant
SELECT * FROM job_listing
WHERE tenant_id = :tenant_id AND id < :before
    AND status = coalesce(:status, status) AND model = coalesce(:model, model)
ORDER BY id DESC LIMIT :limit;

-- name: jobs_of_model
SELECT * FROM job_listing
WHERE model = :model AND id < :before AND status = coalesce(:status, status)
ORDER BY id DESC LIMIT :limit;

-- name: jobs_with_status
SELECT * FROM job_listing WHERE status = :status AND id < :before ORDER BY id DESC LIMIT :limit;

-- name: live_jobs
SELECT * FROM job_records
WHERE orchestrator_id = :orchestrator_id AND status IN ('queued', 'running')
ORDER BY id;

-- name: held_job
SELECT id, attempt, orchestrator_id, orchestrator_boot FROM jobs WHERE id = :id AND status IN ('queued', 'running');

-- name: holders
SELECT DISTINCT orchestrator_id, orchestrator_boot FROM jobs WHERE status IN ('queued', 'running');

-- name: held_jobs
SELECT id, attempt, orchestrator_id, orchestrator_boot FROM jobs
WHERE status IN ('queued', 'running') AND orchestrator_id = :orchestrator_id AND orchestrator_boot = :orchestrator_boot
ORDER BY id LIMIT :limit;

-- name: held_job_ids
SELECT id FROM jobs
WHERE status IN ('queued', 'running') AND orchestrator_id = :orchestrator_id AND orchestrator_boot = :orchestrator_boot;

-- name: job_counts
SELECT status, count(*) AS num_jobs FROM jobs GROUP BY status;

-- name: forget_job
UPDATE jobs
SET keep = 'nothing', input = NULL, outline = NULL, result = NULL, logprobs = NULL, user = NULL, metadata = '{}',
    session_key = NULL
WHERE id = :id AND status NOT IN ('queued', 'running');

-- name: purge_texts
-- A bounded piece of work, so that no job waits behind it for long.
UPDATE jobs SET input = NULL, outline = NULL, result = NULL, logprobs = NULL, purged_at = :now
WHERE id IN (SELECT id FROM jobs WHERE (purged_at IS NULL) = 1 AND ended_at < :before ORDER BY ended_at LIMIT :limit);

-- name: purge_attempts
-- Comes before `purge_jobs` in one transaction and takes the same jobs.
DELETE FROM attempts
WHERE job_id IN (
    SELECT id FROM jobs WHERE (purged_at IS NULL) = 0 AND ended_at < :before ORDER BY ended_at, id LIMIT :limit
);

-- name: purge_jobs
DELETE FROM jobs
WHERE id IN (
    SELECT id FROM jobs WHERE (purged_at IS NULL) = 0 AND ended_at < :before ORDER BY ended_at, id LIMIT :limit
);

-- name: purge_quota_counters
DELETE FROM quota_counters WHERE window_start + window_seconds < :before;
