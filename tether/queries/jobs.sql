-- Each write here may be applied twice: pyrqlite's answer can be lost after the commit, and the store sends it again.

-- name: count_request
-- Counts a request in its tenant's window, unless the limit is reached or the job is there already. Without a limit it
-- is counted too: so the job's insert has one condition only, and `changes()` says it.
INSERT INTO quota_counters (tenant_id, unit, window_seconds, window_start, used)
SELECT :tenant_id, 'requests', :window_seconds, :window_start, 1
WHERE NOT EXISTS (SELECT 1 FROM jobs WHERE id = :id)
    AND coalesce((SELECT requests_per_minute FROM tenants WHERE id = :tenant_id), :requests_per_minute, 1) > 0
ON CONFLICT DO UPDATE SET used = used + 1
WHERE used < coalesce((SELECT requests_per_minute FROM tenants WHERE id = :tenant_id), :requests_per_minute, used + 1);

-- name: insert_job
-- Comes right after `count_request`.
INSERT INTO jobs (
    id, tenant_id, model, version, status, attempt, sampling, wait, stream, priority, deadline_seconds, region,
    session_key, keep, orchestrator_id, orchestrator_boot, created_at, started_at, input
)
SELECT :id, :tenant_id, :model, :version, iif(free, 'running', 'queued'), free, :sampling, :wait, :stream, :priority,
    :deadline_seconds, :region, :session_key, :keep, :orchestrator_id, :orchestrator_boot, :created_at,
    iif(free, :now, NULL), :input
FROM (
    SELECT :slots > (
        SELECT count(*) FROM attempts
        WHERE worker_id = :worker_id AND worker_boot = :worker_boot AND status = 'running'
    ) AS free
)
WHERE changes() > 0;

-- name: insert_first_attempt
-- Comes right after `insert_job`, which found the slot free or not.
INSERT INTO attempts (job_id, number, worker_id, worker_boot, orchestrator_id, status, started_at)
SELECT :id, 1, :worker_id, :worker_boot, :orchestrator_id, 'running', :now
FROM jobs WHERE changes() > 0 AND id = :id AND status = 'running'
ON CONFLICT DO NOTHING;

-- name: insert_attempt
INSERT INTO attempts (job_id, number, worker_id, worker_boot, orchestrator_id, status, started_at)
SELECT id, :number, :worker_id, :worker_boot, :orchestrator_id, 'running', :now
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
UPDATE jobs SET status = 'running', attempt = :number, started_at = coalesce(started_at, :now)
WHERE changes() > 0 AND id = :id;

-- name: close_attempt
UPDATE attempts
SET status = :status, error_code = :error_code, completion_tokens = :completion_tokens, ended_at = :now
WHERE job_id = :id AND number = :number AND status = 'running';

-- name: requeue_job
UPDATE jobs SET status = 'queued' WHERE id = :id AND attempt = :number AND status = 'running';

-- name: end_job
-- Writes a job's one end, and keeps of its texts what the job's `keep` allows.
UPDATE jobs
SET status = :status, finish_reason = :finish_reason, error_code = :error_code, error_message = :error_message,
    prompt_tokens = :prompt_tokens, completion_tokens = :completion_tokens, ended_at = :now,
    input = iif(keep = 'all', input, NULL), result = iif(keep = 'nothing', NULL, :result)
WHERE id = :id AND attempt = :number AND status IN ('queued', 'running')
    AND orchestrator_id = coalesce(:orchestrator_id, orchestrator_id)
    AND orchestrator_boot = coalesce(:orchestrator_boot, orchestrator_boot);

-- name: close_last_attempt
-- Comes right after `end_job`: the slot is free in the same transaction.
UPDATE attempts
SET status = :status, error_code = :error_code, completion_tokens = :completion_tokens, ended_at = :now
WHERE changes() > 0 AND job_id = :id AND number = :number AND status = 'running';

-- name: lose_attempts_of_older_boots
UPDATE attempts SET status = 'lost', ended_at = :now
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

-- name: overdue_jobs
SELECT id, attempt, orchestrator_id, orchestrator_boot FROM jobs
WHERE status IN ('queued', 'running') AND orchestrator_id <> :orchestrator_id
    AND created_at + deadline_seconds < :before
ORDER BY id LIMIT :limit;

-- name: job_counts
SELECT status, count(*) AS num_jobs FROM jobs GROUP BY status;

-- name: purge_texts
-- A bounded piece of work, so that no job waits behind it for long.
UPDATE jobs SET input = NULL, result = NULL, purged_at = :now
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
