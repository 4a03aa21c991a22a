-- The audit log. Each of these stands before the act that it tells of, in one transaction, under the act's own condition:
-- what changed nothing has no line, and neither has what is sent again.

-- name: audit
INSERT INTO audit_events (id, at, action, who, subject, details)
VALUES (:event_id, :now, :action, :who, :subject, :details)
ON CONFLICT DO NOTHING;

-- name: audit_new_tenant
INSERT INTO audit_events (id, at, action, who, subject, details)
SELECT :event_id, :now, :action, :who, :subject, :details
WHERE NOT EXISTS (SELECT 1 FROM tenants WHERE id = :subject)
ON CONFLICT DO NOTHING;

-- name: audit_known_tenant
INSERT INTO audit_events (id, at, action, who, subject, details)
SELECT :event_id, :now, :action, :who, :subject, :details FROM tenants WHERE id = :subject
ON CONFLICT DO NOTHING;

-- name: audit_unrevoked_key
INSERT INTO audit_events (id, at, action, who, subject, details)
SELECT :event_id, :now, :action, :who, :subject, :details FROM api_keys WHERE id = :subject AND revoked_at IS NULL
ON CONFLICT DO NOTHING;

-- name: audit_unrevoked_keys
-- A line for each key of a tenant.
INSERT INTO audit_events (id, at, action, who, subject, details)
SELECT :event_id || ' ' || id, :now, :action, :who, id, :details FROM api_keys
WHERE tenant_id = :subject AND revoked_at IS NULL ORDER BY created_at, id
ON CONFLICT DO NOTHING;

-- name: audit_undrained_worker
INSERT INTO audit_events (id, at, action, who, subject, details)
SELECT :event_id, :now, :action, :who, :subject, :details FROM workers WHERE id = :subject AND drained_at IS NULL
ON CONFLICT DO NOTHING;

-- name: audit_drained_worker
INSERT INTO audit_events (id, at, action, who, subject, details)
SELECT :event_id, :now, :action, :who, :subject, :details FROM workers WHERE id = :subject AND drained_at IS NOT NULL
ON CONFLICT DO NOTHING;

-- name: audit_live_batch
INSERT INTO audit_events (id, at, action, who, subject, details)
SELECT :event_id, :now, :action, :who, :subject, :details FROM batches
WHERE id = :subject AND status IN ('validating', 'in_progress')
ON CONFLICT DO NOTHING;

-- name: audit_live_job
INSERT INTO audit_events (id, at, action, who, subject, details)
SELECT :event_id, :now, :action, :who, :subject, :details FROM jobs
WHERE id = :subject AND status IN ('queued', 'running')
ON CONFLICT DO NOTHING;

-- name: audit_kept_job
INSERT INTO audit_events (id, at, action, who, subject, details)
SELECT :event_id, :now, :action, :who, :subject, :details FROM jobs
WHERE id = :subject AND status NOT IN ('queued', 'running') AND keep <> 'nothing'
ON CONFLICT DO NOTHING;

-- name: audit_known_file
INSERT INTO audit_events (id, at, action, who, subject, details)
SELECT :event_id, :now, :action, :who, :subject, :details FROM files WHERE id = :subject
ON CONFLICT DO NOTHING;

-- name: audit_event
-- What a repeated act finds of itself: its line, or those of its keys.
SELECT 1 AS found FROM audit_events WHERE id = :event_id OR id LIKE :event_id || ' %' LIMIT 1;

-- name: audit_events
SELECT at, action, who, subject, details FROM audit_events
WHERE at >= :since ORDER BY number DESC LIMIT :limit;
