-- What clients upload for a batch, and what a batch answers. A file is there from the row that names it on; parts that
-- came for a file that never was completed are dropped after a while.
CREATE TABLE files (
    id TEXT NOT NULL PRIMARY KEY,              -- sorts by time
    tenant_id TEXT NOT NULL,
    filename TEXT NOT NULL,
    purpose TEXT NOT NULL CHECK (purpose IN ('batch', 'batch_output')),
    num_bytes INTEGER NOT NULL,
    num_parts INTEGER NOT NULL,
    created_at REAL NOT NULL,
    expires_at REAL
) STRICT;

CREATE INDEX files_of_tenant ON files (tenant_id, id);

CREATE TABLE file_parts (
    file_id TEXT NOT NULL,
    number INTEGER NOT NULL,                   -- from 0
    content TEXT NOT NULL,
    created_at REAL NOT NULL,
    PRIMARY KEY (file_id, number)
) STRICT;

CREATE INDEX file_parts_by_age ON file_parts (created_at);

CREATE TABLE batches (
    id TEXT NOT NULL PRIMARY KEY,              -- sorts by time
    tenant_id TEXT NOT NULL,
    key_id TEXT NOT NULL,
    endpoint TEXT NOT NULL,
    input_file_id TEXT NOT NULL,
    status TEXT NOT NULL CHECK (status IN (
        'validating', 'in_progress', 'finalizing', 'completed', 'failed', 'expired', 'cancelling', 'cancelled'
    )),
    model TEXT,                                -- as the lines name it; NULL until they are checked
    errors TEXT NOT NULL DEFAULT '[]',         -- what is wrong with the input file, as JSON
    metadata TEXT NOT NULL,
    keep TEXT NOT NULL CHECK (keep IN ('all', 'result', 'nothing')),
    requests_per_minute INTEGER,               -- the gateway's default limit for its tenant
    output_seconds REAL,                       -- how long its files are kept; NULL: as long as any
    num_lines INTEGER NOT NULL DEFAULT 0,
    num_completed INTEGER NOT NULL DEFAULT 0,
    num_failed INTEGER NOT NULL DEFAULT 0,
    output_file_id TEXT,
    error_file_id TEXT,
    orchestrator_id TEXT NOT NULL,             -- who runs it, and in which life; '': nobody at present
    orchestrator_boot TEXT NOT NULL,
    created_at REAL NOT NULL,
    expires_at REAL NOT NULL,
    in_progress_at REAL,
    finalizing_at REAL,
    cancelling_at REAL,
    ended_at REAL
) STRICT;

CREATE INDEX batches_of_tenant ON batches (tenant_id, id);
CREATE INDEX batches_live ON batches (orchestrator_id)
    WHERE status IN ('validating', 'in_progress', 'finalizing', 'cancelling');

-- The lines of the batches that are live; at a batch's end they become its files.
CREATE TABLE batch_lines (
    batch_id TEXT NOT NULL,
    number INTEGER NOT NULL,                   -- of the line in the input file, from 1
    custom_id TEXT NOT NULL,
    status TEXT NOT NULL CHECK (status IN ('waiting', 'completed', 'failed')),
    request TEXT,                              -- the request's body, while it waits
    outcome TEXT,                              -- its line in the output or error file, when it has an end
    PRIMARY KEY (batch_id, number)
) STRICT;

CREATE INDEX batch_lines_with_status ON batch_lines (batch_id, status, number);
