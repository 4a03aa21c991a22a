-- Times are Unix seconds of the orchestrator that wrote them. Flags are 0 or 1. Lists and settings are JSON.

CREATE TABLE jobs (
    id TEXT NOT NULL PRIMARY KEY,              -- a UUIDv7: sorts by time
    tenant_id TEXT NOT NULL,
    model TEXT NOT NULL,
    version TEXT NOT NULL,
    status TEXT NOT NULL CHECK (status IN ('queued', 'running', 'completed', 'failed', 'cancelled', 'expired')),
    attempt INTEGER NOT NULL DEFAULT 0,        -- the newest attempt's number; 0 before the first
    finish_reason TEXT,
    error_code TEXT,
    error_message TEXT,
    prompt_tokens INTEGER NOT NULL DEFAULT 0,
    completion_tokens INTEGER NOT NULL DEFAULT 0,
    sampling TEXT NOT NULL,                    -- with the seed: a resumed job draws the same numbers
    wait INTEGER NOT NULL,
    stream INTEGER NOT NULL,
    priority INTEGER NOT NULL,
    deadline_seconds REAL NOT NULL,
    region TEXT,
    session_key TEXT,
    keep TEXT NOT NULL CHECK (keep IN ('all', 'result', 'nothing')),
    orchestrator_id TEXT NOT NULL,             -- who holds the job, and in which life
    orchestrator_boot TEXT NOT NULL,
    created_at REAL NOT NULL,
    started_at REAL,
    ended_at REAL,
    purged_at REAL,                            -- when the texts were dropped for their age
    input TEXT,                                -- the long columns come last: a listing never reads over them
    result TEXT
) STRICT;

CREATE INDEX jobs_of_tenant ON jobs (tenant_id, id);
CREATE INDEX jobs_with_status ON jobs (status, id);
CREATE INDEX jobs_of_model ON jobs (model, id);
CREATE INDEX jobs_held ON jobs (orchestrator_id, id) WHERE status IN ('queued', 'running');
CREATE INDEX jobs_by_end ON jobs (purged_at IS NULL, ended_at) WHERE ended_at IS NOT NULL;

-- A running attempt is the reservation of a slot on its worker.
CREATE TABLE attempts (
    job_id TEXT NOT NULL,
    number INTEGER NOT NULL,
    worker_id TEXT NOT NULL,
    worker_boot TEXT NOT NULL,
    orchestrator_id TEXT NOT NULL,
    status TEXT NOT NULL
        CHECK (status IN ('running', 'completed', 'failed', 'lost', 'busy', 'cancelled', 'expired')),
    error_code TEXT,
    completion_tokens INTEGER NOT NULL DEFAULT 0,
    started_at REAL NOT NULL,
    ended_at REAL,
    PRIMARY KEY (job_id, number)
) STRICT, WITHOUT ROWID;

CREATE INDEX attempts_running ON attempts (worker_id, worker_boot) WHERE status = 'running';

CREATE TABLE workers (
    id TEXT NOT NULL PRIMARY KEY,
    boot_id TEXT NOT NULL,
    sequence INTEGER NOT NULL,
    name TEXT NOT NULL,
    region TEXT NOT NULL,
    gpu_class TEXT NOT NULL,
    status TEXT NOT NULL CHECK (status IN ('ready', 'loading', 'draining', 'gone')),
    models TEXT NOT NULL,
    running INTEGER NOT NULL,
    orchestrator_id TEXT NOT NULL,             -- who saw it last
    joined_at REAL NOT NULL,
    seen_at REAL NOT NULL
) STRICT;

-- An orchestrator's lease covers all jobs that its boot holds. Others judge it by whether the count of renewals moves
-- against their own clock, so that no two clocks are ever compared.
CREATE TABLE nodes (
    id TEXT NOT NULL,
    role TEXT NOT NULL,
    boot_id TEXT NOT NULL,
    name TEXT NOT NULL,
    region TEXT NOT NULL,
    addresses TEXT NOT NULL,
    version TEXT NOT NULL,
    lease_renewals INTEGER NOT NULL DEFAULT 0,
    started_at REAL NOT NULL,
    seen_at REAL NOT NULL,
    PRIMARY KEY (id, role)
) STRICT;

CREATE TABLE models (
    name TEXT NOT NULL,
    version TEXT NOT NULL,
    description TEXT NOT NULL,
    toy INTEGER NOT NULL,
    context_tokens INTEGER NOT NULL,
    first_seen_at REAL NOT NULL,
    seen_at REAL NOT NULL,
    PRIMARY KEY (name, version)
) STRICT;

CREATE TABLE tenants (
    id TEXT NOT NULL PRIMARY KEY,
    requests_per_minute INTEGER,               -- NULL: the gateway's default
    weight REAL NOT NULL DEFAULT 1.0,          -- its share of the queue beside other tenants
    created_at REAL NOT NULL
) STRICT;

CREATE TABLE api_keys (
    id TEXT NOT NULL PRIMARY KEY,
    tenant_id TEXT NOT NULL,
    hash TEXT NOT NULL UNIQUE,                 -- hexadecimal; the key itself is shown once and never kept
    prefix TEXT NOT NULL,                      -- its first characters, so that people can tell keys apart
    name TEXT NOT NULL DEFAULT '',
    scopes TEXT NOT NULL,
    created_at REAL NOT NULL,
    expires_at REAL,
    revoked_at REAL,
    last_used_at REAL
) STRICT;

CREATE INDEX api_keys_of_tenant ON api_keys (tenant_id, id);

CREATE TABLE quota_counters (
    tenant_id TEXT NOT NULL,
    key_id TEXT NOT NULL DEFAULT '',           -- '' and '': of the tenant as a whole
    model TEXT NOT NULL DEFAULT '',
    unit TEXT NOT NULL CHECK (unit IN ('requests', 'tokens')),
    window_seconds INTEGER NOT NULL,
    window_start INTEGER NOT NULL,
    used INTEGER NOT NULL DEFAULT 0,
    reserved INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (tenant_id, key_id, model, unit, window_seconds, window_start)
) STRICT, WITHOUT ROWID;

CREATE VIEW job_records AS
SELECT j.*, a.worker_id
FROM jobs AS j LEFT JOIN attempts AS a ON a.job_id = j.id AND a.number = j.attempt;

-- Without the texts: a page of long prompts fits neither a screen nor a frame.
CREATE VIEW job_listing AS
SELECT j.id, j.tenant_id, j.model, j.version, j.status, j.attempt, j.finish_reason, j.error_code, j.error_message,
    j.prompt_tokens, j.completion_tokens, j.sampling, j.wait, j.stream, j.priority, j.deadline_seconds, j.region,
    j.session_key, j.keep, j.orchestrator_id, j.orchestrator_boot, j.created_at, j.started_at, j.ended_at, j.purged_at,
    NULL AS input, NULL AS result, a.worker_id
FROM jobs AS j LEFT JOIN attempts AS a ON a.job_id = j.id AND a.number = j.attempt;
