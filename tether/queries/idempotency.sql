-- name: claim_key
INSERT INTO idempotency_keys (tenant_id, key, fingerprint, job_id, created_at)
VALUES (:tenant_id, :key, :fingerprint, :job_id, :now)
ON CONFLICT DO NOTHING;

-- name: claimed_key
SELECT job_id, fingerprint FROM idempotency_keys WHERE tenant_id = :tenant_id AND key = :key;

-- name: release_claim
-- Comes after `end_job` of a job that was refused after all: its client asks with the same key again.
DELETE FROM idempotency_keys
WHERE job_id = :id AND EXISTS (SELECT 1 FROM jobs WHERE id = :id AND status = :status AND ended_at = :now);

-- name: purge_claimed_keys
DELETE FROM idempotency_keys WHERE created_at < :before;
