-- Tenants, their keys and their limits. Each write here may be applied twice, as everywhere.

-- name: tenant
SELECT * FROM tenants WHERE id = :id;

-- name: tenants
SELECT * FROM tenants ORDER BY id;

-- name: set_tenant
-- A weight that is not given stays what it is.
INSERT INTO tenants (id, weight, created_at)
VALUES (:id, coalesce(:weight, 1.0), :now)
ON CONFLICT (id) DO UPDATE SET weight = coalesce(:weight, weight);

-- name: insert_tenant
INSERT INTO tenants (id, weight, created_at)
VALUES (:id, :weight, :now)
ON CONFLICT DO NOTHING;

-- name: remove_tenant
DELETE FROM tenants WHERE id = :id;

-- name: remove_limits
DELETE FROM quota_limits WHERE tenant_id = :id;

-- name: set_limit
INSERT INTO quota_limits (tenant_id, key_id, model, unit, window_seconds, most)
VALUES (:id, :key_id, :model, :unit, :window_seconds, :most)
ON CONFLICT DO UPDATE SET most = excluded.most;

-- name: remove_limit
DELETE FROM quota_limits
WHERE tenant_id = :id AND key_id = :key_id AND model = :model AND unit = :unit AND window_seconds = :window_seconds;

-- name: limits_of_tenant
SELECT key_id, model, unit, window_seconds, most FROM quota_limits
WHERE tenant_id = :id ORDER BY key_id, model, unit, window_seconds;

-- name: limits
SELECT tenant_id, key_id, model, unit, window_seconds, most FROM quota_limits
ORDER BY tenant_id, key_id, model, unit, window_seconds;

-- name: allowances
-- For each of `asked`, a list of [tenant_id, key_id, model, requests_per_minute]: every limit and what of it is spent.
SELECT a.key AS number, l.key_id, l.model, l.unit, l.window_seconds, l.most,
    CASE l.unit
        WHEN 'job_tokens' THEN 0
        WHEN 'jobs' THEN (
            SELECT count(*) FROM jobs AS j
            WHERE j.tenant_id = l.tenant_id AND j.status IN ('queued', 'running')
                AND (l.key_id = '' OR j.key_id = l.key_id) AND (l.model = '' OR j.model = l.model)
        )
        ELSE coalesce((
            SELECT used + reserved FROM quota_counters AS c
            WHERE c.tenant_id = l.tenant_id AND c.key_id = l.key_id AND c.model = l.model AND c.unit = l.unit
                AND c.window_seconds = l.window_seconds
                AND c.window_start = CAST(:now / l.window_seconds AS INTEGER) * l.window_seconds
        ), 0)
    END AS spent
FROM json_each(:asked) AS a JOIN quota_limits AS l
    ON l.tenant_id = a.value ->> 0 AND l.key_id IN ('', a.value ->> 1) AND l.model IN ('', a.value ->> 2)
UNION ALL
SELECT a.key, '', '', 'requests', 60, a.value ->> 3,
    coalesce((
        SELECT used + reserved FROM quota_counters AS c
        WHERE c.tenant_id = a.value ->> 0 AND c.key_id = '' AND c.model = '' AND c.unit = 'requests'
            AND c.window_seconds = 60 AND c.window_start = CAST(:now / 60 AS INTEGER) * 60
    ), 0)
FROM json_each(:asked) AS a
WHERE a.value ->> 3 IS NOT NULL AND NOT EXISTS (
    SELECT 1 FROM quota_limits AS l
    WHERE l.tenant_id = a.value ->> 0 AND l.key_id = '' AND l.model = '' AND l.unit = 'requests'
        AND l.window_seconds = 60
);

-- name: secret
SELECT value FROM secrets WHERE name = :name;

-- name: insert_secret
INSERT INTO secrets (name, value, created_at) VALUES (:name, :value, :now) ON CONFLICT DO NOTHING;

-- name: any_key
-- A revoked key counts too: to take the last one back must not open the door.
SELECT 1 AS found FROM api_keys LIMIT 1;

-- name: insert_key
INSERT INTO api_keys (id, tenant_id, hash, prefix, name, scopes, created_at, expires_at)
VALUES (:id, :tenant_id, :hash, :prefix, :name, :scopes, :now, :expires_at)
ON CONFLICT DO NOTHING;

-- name: copy_limits
-- A new key has the limits of the one that it replaces.
INSERT INTO quota_limits (tenant_id, key_id, model, unit, window_seconds, most)
SELECT tenant_id, :id, model, unit, window_seconds, most FROM quota_limits
WHERE tenant_id = :tenant_id AND key_id = :replaced_id
ON CONFLICT DO NOTHING;

-- name: replace_key
-- Comes with `insert_key`.
UPDATE api_keys SET replaced_by = :id WHERE id = :replaced_id;

-- name: key_with_hash
SELECT * FROM api_keys WHERE hash = :hash;

-- name: key
SELECT * FROM api_keys WHERE id = :id;

-- name: keys
SELECT * FROM api_keys WHERE tenant_id = coalesce(:tenant_id, tenant_id) ORDER BY tenant_id, created_at, id;

-- name: revoke_key
UPDATE api_keys SET revoked_at = :now WHERE id = :id AND revoked_at IS NULL;

-- name: revoke_keys_of_tenant
UPDATE api_keys SET revoked_at = :now WHERE tenant_id = :id AND revoked_at IS NULL;

-- name: expire_key
-- Never later than it would have.
UPDATE api_keys SET expires_at = min(coalesce(expires_at, :expires_at), :expires_at) WHERE id = :id;

-- name: keys_used
-- `used`: a JSON object of key ids and times.
UPDATE api_keys SET last_used_at = max(coalesce(last_used_at, 0), used.at)
FROM (SELECT key AS id, value AS at FROM json_each(:used)) AS used
WHERE api_keys.id = used.id;
