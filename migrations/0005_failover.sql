-- What decides whether another worker can go on exactly, and who is to take no jobs.

ALTER TABLE attempts ADD COLUMN fingerprint TEXT NOT NULL DEFAULT '';  -- weights, number format and tokenizer that ran
ALTER TABLE jobs ADD COLUMN exact INTEGER NOT NULL DEFAULT 1;          -- 0: went on with another fingerprint
ALTER TABLE workers ADD COLUMN paused TEXT NOT NULL DEFAULT '';        -- why it takes no jobs, in its own words
ALTER TABLE workers ADD COLUMN drained_at REAL;                        -- an operator drained it; NULL: takes jobs

DROP VIEW job_records;
DROP VIEW job_listing;

CREATE VIEW job_records AS
SELECT j.*, a.worker_id
FROM jobs AS j LEFT JOIN attempts AS a ON a.job_id = j.id AND a.number = j.attempt;

CREATE VIEW job_listing AS
SELECT j.id, j.tenant_id, j.model, j.version, j.status, j.attempt, j.finish_reason, j.error_code, j.error_message,
    j.prompt_tokens, j.completion_tokens, j.sampling, j.wait, j.stream, j.priority, j.deadline_seconds, j.region,
    j.session_key, j.keep, j.orchestrator_id, j.orchestrator_boot, j.created_at, j.started_at, j.ended_at, j.purged_at,
    j.form, j.user, j.metadata, j.exact, NULL AS input, NULL AS result, a.worker_id
FROM jobs AS j LEFT JOIN attempts AS a ON a.job_id = j.id AND a.number = j.attempt;
