-- name: claim_key
INSERT INTO idempotency_keys (tenant_id, key, fingerprint, job_id, created_at)
VALUES (:tenant_id, :key, :fingerprint, :job_id, :now)
ON CONFLICT DO NOTHING;

-- name: claimed_key
SELECT job_id, fingerprint FROM idempotency_keys WHERE tenant_id = :tenant_id AND key = :key;

-- name: purge_claimed_keys
DELETE FROM idempotency_keys WHERE created_at < :before;
