-- Who let whom in, and who changed what: a line for each act of an operator. Written with the act, and never dropped.
CREATE TABLE audit_events (
    number INTEGER PRIMARY KEY AUTOINCREMENT,  -- the order in which they came, whatever the clocks said
    id TEXT NOT NULL UNIQUE,                   -- so that an act that is sent again has one line
    at REAL NOT NULL,
    action TEXT NOT NULL,
    who TEXT NOT NULL,
    subject TEXT NOT NULL,
    details TEXT NOT NULL                      -- a JSON object, without secrets
) STRICT;

CREATE INDEX audit_events_at ON audit_events (at);
