-- What a job's input is (a user's message, a prompt, a conversation as JSON), and what its client wrote on it.

ALTER TABLE jobs ADD COLUMN form TEXT NOT NULL DEFAULT 'text';
ALTER TABLE jobs ADD COLUMN user TEXT;
ALTER TABLE jobs ADD COLUMN metadata TEXT NOT NULL DEFAULT '{}';

-- A key that a client put on its request: the first request with it chose the job's id, and a repeated one finds it here.
CREATE TABLE idempotency_keys (
    tenant_id TEXT NOT NULL,
    key TEXT NOT NULL,
    fingerprint TEXT NOT NULL,                 -- of the request; another request must not have the same key
    job_id TEXT NOT NULL,
    created_at REAL NOT NULL,
    PRIMARY KEY (tenant_id, key)
) STRICT, WITHOUT ROWID;

CREATE INDEX idempotency_keys_by_age ON idempotency_keys (created_at);

DROP VIEW job_records;
DROP VIEW job_listing;

CREATE VIEW job_records AS
SELECT j.*, a.worker_id
FROM jobs AS j LEFT JOIN attempts AS a ON a.job_id = j.id AND a.number = j.attempt;

CREATE VIEW job_listing AS
SELECT j.id, j.tenant_id, j.model, j.version, j.status, j.attempt, j.finish_reason, j.error_code, j.error_message,
    j.prompt_tokens, j.completion_tokens, j.sampling, j.wait, j.stream, j.priority, j.deadline_seconds, j.region,
    j.session_key, j.keep, j.orchestrator_id, j.orchestrator_boot, j.created_at, j.started_at, j.ended_at, j.purged_at,
    j.form, j.user, j.metadata, NULL AS input, NULL AS result, a.worker_id
FROM jobs AS j LEFT JOIN attempts AS a ON a.job_id = j.id AND a.number = j.attempt;
