-- Each write here may be applied twice. What a batch's runner writes counts only while it holds the batch: the orchestrator
-- and its boot are in the condition.

-- name: insert_file_part
INSERT INTO file_parts (file_id, number, content, created_at)
SELECT :file_id, :number, :content, :now
WHERE NOT EXISTS (SELECT 1 FROM files WHERE id = :file_id)
ON CONFLICT DO NOTHING;

-- name: insert_file
-- All of its parts are there, and its tenant's files are not too much together.
INSERT INTO files (id, tenant_id, filename, purpose, num_bytes, num_parts, created_at, expires_at)
SELECT :id, :tenant_id, :filename, :purpose, :num_bytes, :num_parts, :created_at, :expires_at
WHERE :num_parts = (SELECT count(*) FROM file_parts WHERE file_id = :id)
    AND :num_bytes + (SELECT coalesce(sum(num_bytes), 0) FROM files WHERE tenant_id = :tenant_id) <= :most_bytes
ON CONFLICT DO NOTHING;

-- name: file
SELECT * FROM files WHERE id = :id;

-- name: files_newest_first
SELECT * FROM files
WHERE tenant_id = coalesce(:tenant_id, tenant_id) AND purpose = coalesce(:purpose, purpose) AND id < :after
ORDER BY id DESC LIMIT :limit;

-- name: files_oldest_first
SELECT * FROM files
WHERE tenant_id = coalesce(:tenant_id, tenant_id) AND purpose = coalesce(:purpose, purpose) AND id > :after
ORDER BY id LIMIT :limit;

-- name: file_part
SELECT content FROM file_parts WHERE file_id = :file_id AND number = :number;

-- name: delete_file
DELETE FROM files WHERE id = :id AND tenant_id = :tenant_id;

-- name: delete_file_parts
-- Comes after `delete_file`.
DELETE FROM file_parts WHERE file_id = :id AND NOT EXISTS (SELECT 1 FROM files WHERE id = :id);

-- name: purge_files
DELETE FROM files WHERE expires_at < :now OR created_at < :before;

-- name: purge_file_parts
-- Parts of no file: of one that was purged, or whose upload broke off.
DELETE FROM file_parts
WHERE rowid IN (
    SELECT p.rowid FROM file_parts AS p
    WHERE p.created_at < :before AND NOT EXISTS (SELECT 1 FROM files WHERE id = p.file_id) LIMIT :limit
);

-- name: insert_batch
INSERT INTO batches (
    id, tenant_id, key_id, endpoint, input_file_id, status, metadata, keep, requests_per_minute, output_seconds,
    orchestrator_id, orchestrator_boot, created_at, expires_at
)
SELECT :id, :tenant_id, :key_id, :endpoint, :input_file_id, 'validating', :metadata, :keep, :requests_per_minute,
    :output_seconds, :orchestrator_id, :orchestrator_boot, :created_at, :expires_at
FROM files WHERE id = :input_file_id AND tenant_id = :tenant_id AND purpose = 'batch' AND :most > (
    SELECT count(*) FROM batches
    WHERE tenant_id = :tenant_id AND status IN ('validating', 'in_progress', 'finalizing', 'cancelling')
)
ON CONFLICT DO NOTHING;

-- name: batch
SELECT * FROM batches WHERE id = :id;

-- name: batches
SELECT * FROM batches
WHERE tenant_id = coalesce(:tenant_id, tenant_id) AND status = coalesce(:status, status) AND id < :after
ORDER BY id DESC LIMIT :limit;

-- name: live_batches
-- A batch that came without a key has none that could end.
SELECT id, status, orchestrator_id, orchestrator_boot,
    EXISTS (
        SELECT 1 FROM api_keys AS k
        WHERE k.id = batches.key_id AND (k.revoked_at IS NOT NULL OR k.expires_at <= :now)
    ) AS key_has_ended
FROM batches
WHERE status IN ('validating', 'in_progress', 'finalizing', 'cancelling')
ORDER BY id;

-- name: claim_batch
-- From whoever held it, and from nobody else.
UPDATE batches SET orchestrator_id = :orchestrator_id, orchestrator_boot = :orchestrator_boot
WHERE id = :id AND orchestrator_id = :old_id AND orchestrator_boot = :old_boot
    AND status IN ('validating', 'in_progress', 'finalizing', 'cancelling');

-- name: release_batches
UPDATE batches SET orchestrator_id = '', orchestrator_boot = ''
WHERE orchestrator_id = :orchestrator_id AND orchestrator_boot = :orchestrator_boot
    AND status IN ('validating', 'in_progress', 'finalizing', 'cancelling');

-- name: insert_batch_lines
INSERT INTO batch_lines (batch_id, number, custom_id, status, request)
SELECT :id, value ->> 0, value ->> 1, 'waiting', value ->> 2
FROM json_each(:lines)
WHERE EXISTS (
    SELECT 1 FROM batches
    WHERE id = :id AND status = 'validating'
        AND orchestrator_id = :orchestrator_id AND orchestrator_boot = :orchestrator_boot
)
ON CONFLICT DO NOTHING;

-- name: begin_batch
UPDATE batches SET status = 'in_progress', in_progress_at = :now, num_lines = :num_lines, model = :model
WHERE id = :id AND status = 'validating'
    AND orchestrator_id = :orchestrator_id AND orchestrator_boot = :orchestrator_boot;

-- name: fail_batch
UPDATE batches SET status = 'failed', ended_at = :now, errors = :errors, num_lines = 0
WHERE id = :id AND status = 'validating'
    AND orchestrator_id = :orchestrator_id AND orchestrator_boot = :orchestrator_boot;

-- name: cancel_batch
UPDATE batches SET status = 'cancelling', cancelling_at = :now
WHERE id = :id AND status IN ('validating', 'in_progress');

-- name: revoke_batch
-- As a cancel, but with the reason for which it will have failed.
UPDATE batches SET status = 'cancelling', cancelling_at = :now, errors = :errors
WHERE id = :id AND status IN ('validating', 'in_progress')
    AND orchestrator_id = :orchestrator_id AND orchestrator_boot = :orchestrator_boot;

-- name: revoke_batches_of_tenant
-- Comes before `remove_tenant`. Whoever runs them sees to it.
UPDATE batches SET status = 'cancelling', cancelling_at = :now, errors = :errors
WHERE tenant_id = :id AND status IN ('validating', 'in_progress') AND EXISTS (SELECT 1 FROM tenants WHERE id = :id);

-- name: waiting_lines
SELECT number, custom_id, request FROM batch_lines
WHERE batch_id = :id AND status = 'waiting' AND number > :after
ORDER BY number LIMIT :limit;

-- name: end_line
UPDATE batch_lines SET status = :status, outcome = :outcome, request = NULL
WHERE batch_id = :id AND number = :number AND status = 'waiting' AND EXISTS (
    SELECT 1 FROM batches
    WHERE id = :id AND orchestrator_id = :orchestrator_id AND orchestrator_boot = :orchestrator_boot
);

-- name: count_line
-- Comes right after `end_line`.
UPDATE batches
SET num_completed = num_completed + iif(:status = 'completed', 1, 0),
    num_failed = num_failed + iif(:status = 'completed', 0, 1)
WHERE id = :id AND changes() > 0;

-- name: drop_answer
-- Comes after `end_line`, which has done nothing for who lost the batch: the answer of a job that was kept for its batch's
-- sake alone.
UPDATE jobs SET result = NULL, logprobs = NULL
WHERE id = :job_id AND status NOT IN ('queued', 'running')
    AND NOT EXISTS (SELECT 1 FROM batch_lines WHERE batch_id = :id AND number = :number AND status = 'waiting');

-- name: end_waiting_lines
-- The lines that were never run, in the form of the error file.
UPDATE batch_lines
SET status = 'failed', request = NULL,
    outcome = json_object(
        'id', replace(:id, 'batch_', 'batch_req_') || '_' || number, 'custom_id', custom_id, 'response', NULL,
        'error', json_object('code', :code, 'message', :message)
    )
WHERE batch_id = :id AND status = 'waiting' AND EXISTS (
    SELECT 1 FROM batches
    WHERE id = :id AND orchestrator_id = :orchestrator_id AND orchestrator_boot = :orchestrator_boot
);

-- name: finalize_batch
-- Comes after `end_waiting_lines`, and counts anew.
UPDATE batches
SET status = iif(status = 'in_progress', 'finalizing', status), finalizing_at = :now,
    num_failed = (SELECT count(*) FROM batch_lines WHERE batch_id = :id AND status = 'failed')
WHERE id = :id AND status IN ('in_progress', 'cancelling')
    AND orchestrator_id = :orchestrator_id AND orchestrator_boot = :orchestrator_boot;

-- name: ended_lines
SELECT number, outcome FROM batch_lines
WHERE batch_id = :id AND status = :status AND number > :after
ORDER BY number LIMIT :limit;

-- name: insert_batch_file
INSERT INTO files (id, tenant_id, filename, purpose, num_bytes, num_parts, created_at, expires_at)
SELECT :file_id, tenant_id, :filename, 'batch_output', :num_bytes, :num_parts, :now, :now + output_seconds
FROM batches
WHERE id = :id AND status IN ('finalizing', 'cancelling')
    AND orchestrator_id = :orchestrator_id AND orchestrator_boot = :orchestrator_boot
    AND :num_parts = (SELECT count(*) FROM file_parts WHERE file_id = :file_id)
ON CONFLICT DO NOTHING;

-- name: end_batch
-- Comes after its files, and needs them.
UPDATE batches
SET status = :status, ended_at = :now, output_file_id = :output_file_id, error_file_id = :error_file_id
WHERE id = :id AND status IN ('finalizing', 'cancelling')
    AND (SELECT count(*) FROM files WHERE id IN (:output_file_id, :error_file_id))
        = (:output_file_id IS NOT NULL) + (:error_file_id IS NOT NULL)
    AND orchestrator_id = :orchestrator_id AND orchestrator_boot = :orchestrator_boot;

-- name: delete_batch_lines
-- Comes after the batch's end.
DELETE FROM batch_lines
WHERE batch_id = :id
    AND EXISTS (SELECT 1 FROM batches WHERE id = :id AND status IN ('completed', 'failed', 'expired', 'cancelled'));

-- name: purge_batches
DELETE FROM batches WHERE ended_at < :before;
