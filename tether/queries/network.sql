-- name: save_workers
-- All states in one statement; a state that is older than the one kept, of the same boot, changes nothing.
INSERT INTO workers (
    id, boot_id, sequence, name, region, gpu_class, status, models, running, paused, orchestrator_id, joined_at, seen_at
)
SELECT value ->> 'worker_id', value ->> 'boot_id', value ->> 'sequence', value ->> 'name', value ->> 'region',
    value ->> 'gpu_class',
    CASE WHEN value ->> 'draining' OR coalesce(value ->> 'paused', '') <> '' THEN 'draining' WHEN value ->> 'loading' THEN 'loading' ELSE 'ready' END,
    value -> 'models', value ->> 'running', coalesce(value ->> 'paused', ''), :orchestrator_id, :now, :now
FROM json_each(:states)
WHERE true
ON CONFLICT (id) DO UPDATE SET
    joined_at = iif(boot_id = excluded.boot_id, joined_at, excluded.joined_at),
    boot_id = excluded.boot_id, sequence = excluded.sequence, name = excluded.name, region = excluded.region,
    gpu_class = excluded.gpu_class, status = excluded.status, models = excluded.models, running = excluded.running, paused = excluded.paused,
    orchestrator_id = excluded.orchestrator_id, seen_at = excluded.seen_at
WHERE boot_id <> excluded.boot_id OR sequence <= excluded.sequence;

-- name: worker_gone
-- Only of the boot that left, and only by the orchestrator that saw it last: another may have it by now.
UPDATE workers SET status = 'gone', running = 0, seen_at = :now
WHERE id = :id AND boot_id = :boot_id AND orchestrator_id = :orchestrator_id AND status <> 'gone';

-- name: workers
SELECT * FROM workers ORDER BY status = 'gone', name, id;

-- name: drain_worker
-- The first time counts.
UPDATE workers SET drained_at = coalesce(drained_at, :now) WHERE id = :id;

-- name: resume_worker
UPDATE workers SET drained_at = NULL WHERE id = :id;

-- name: drained_workers
SELECT id, drained_at FROM workers WHERE drained_at IS NOT NULL;

-- name: save_node
INSERT INTO nodes (id, role, boot_id, name, region, addresses, version, started_at, seen_at)
VALUES (:id, :role, :boot_id, :name, :region, :addresses, :version, :started_at, :seen_at)
ON CONFLICT (id, role) DO UPDATE SET
    lease_renewals = iif(boot_id = excluded.boot_id, lease_renewals, 0),
    boot_id = excluded.boot_id, name = excluded.name, region = excluded.region, addresses = excluded.addresses,
    version = excluded.version, started_at = iif(boot_id = excluded.boot_id, started_at, excluded.started_at),
    seen_at = excluded.seen_at;

-- name: node_gone
-- Only of the boot that left. No boot of it lives after this, and a renewal of its lease that is late finds nothing.
UPDATE nodes SET boot_id = '', seen_at = :now WHERE id = :id AND role = :role AND boot_id = :boot_id;

-- name: nodes
SELECT *, iif(boot_id = '', 'gone', 'up') AS status FROM nodes ORDER BY boot_id = '', role, name, id;

-- name: renew_lease
-- Counted twice does no harm: others only look whether it moved.
UPDATE nodes SET lease_renewals = lease_renewals + 1, seen_at = :now
WHERE id = :id AND role = 'orchestrator' AND boot_id = :boot_id;

-- name: save_model
INSERT INTO models (name, version, description, toy, context_tokens, first_seen_at, seen_at)
VALUES (:name, :version, :description, :toy, :context_tokens, :now, :now)
ON CONFLICT (name, version) DO UPDATE SET
    description = iif(excluded.description = '', description, excluded.description),
    toy = excluded.toy, context_tokens = excluded.context_tokens, seen_at = excluded.seen_at;

-- name: forget_models
DELETE FROM models
WHERE (name, version) IN (SELECT name, version FROM models ORDER BY seen_at DESC, name, version LIMIT -1 OFFSET :most);

-- name: models
SELECT * FROM models ORDER BY name, version;

-- name: ping
SELECT 1 AS alive;
