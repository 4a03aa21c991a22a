-- The log-probabilities of a job's answer, where it asked for them, as JSON: for each choice a list of `TokenLogprobs`. Kept
-- as long as the texts are, and not where they are many.

ALTER TABLE jobs ADD COLUMN logprobs TEXT;

DROP VIEW job_records;
DROP VIEW job_listing;

CREATE VIEW job_records AS
SELECT j.*, a.worker_id, a.fingerprint
FROM jobs AS j LEFT JOIN attempts AS a ON a.job_id = j.id AND a.number = j.attempt;

CREATE VIEW job_listing AS
SELECT j.id, j.tenant_id, j.model, j.version, j.status, j.attempt, j.finish_reason, j.error_code, j.error_message,
    j.prompt_tokens, j.completion_tokens, j.sampling, j.wait, j.stream, j.priority, j.deadline_seconds, j.region,
    j.session_key, j.keep, j.orchestrator_id, j.orchestrator_boot, j.created_at, j.started_at, j.ended_at, j.purged_at,
    j.form, j.user, j.metadata, j.exact, NULL AS input, NULL AS result, NULL AS logprobs, a.worker_id, a.fingerprint
FROM jobs AS j LEFT JOIN attempts AS a ON a.job_id = j.id AND a.number = j.attempt;
