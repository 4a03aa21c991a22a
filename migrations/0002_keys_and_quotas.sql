-- What may be used at most: for a tenant ('' and ''), for one of its keys, for a model, or for a key on a model.
CREATE TABLE quota_limits (
    tenant_id TEXT NOT NULL,
    key_id TEXT NOT NULL DEFAULT '',
    model TEXT NOT NULL DEFAULT '',
    unit TEXT NOT NULL CHECK (unit IN ('requests', 'tokens', 'jobs', 'job_tokens')),
    window_seconds INTEGER NOT NULL,           -- 60 or 86400; 0 for jobs at once and for one job's tokens
    most INTEGER NOT NULL CHECK (most >= 0),
    PRIMARY KEY (tenant_id, key_id, model, unit, window_seconds)
) STRICT, WITHOUT ROWID;

INSERT INTO quota_limits (tenant_id, unit, window_seconds, most)
SELECT id, 'requests', 60, requests_per_minute FROM tenants WHERE requests_per_minute IS NOT NULL;

ALTER TABLE tenants DROP COLUMN requests_per_minute;

ALTER TABLE jobs ADD COLUMN key_id TEXT NOT NULL DEFAULT '';
ALTER TABLE jobs ADD COLUMN reserved_tokens INTEGER NOT NULL DEFAULT 0;
-- The counters that the job was counted in, as JSON: [[key_id, model, unit, window_seconds, window_start], ...]. Its end
-- settles these and no others, whatever limits were set or removed meanwhile.
ALTER TABLE jobs ADD COLUMN charges TEXT;

CREATE INDEX jobs_live ON jobs (tenant_id, key_id, model) WHERE status IN ('queued', 'running');

-- What all orchestrators of a network have to know alike, and nobody else.
CREATE TABLE secrets (
    name TEXT NOT NULL PRIMARY KEY,
    value TEXT NOT NULL,
    created_at REAL NOT NULL
) STRICT;
