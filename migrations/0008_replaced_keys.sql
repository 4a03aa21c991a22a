-- Which key came in another one's place: a key is rotated once, and its successor is the one to rotate next.
ALTER TABLE api_keys ADD COLUMN replaced_by TEXT;

UPDATE api_keys
SET replaced_by = (
    SELECT details ->> 'new_key' FROM audit_events
    WHERE action = 'key.rotated' AND subject = api_keys.id
    ORDER BY number DESC LIMIT 1
);
