-- What is kept of a conversation whose input is not (`keep` is 'result'), as JSON: the names of its tools and how they may be
-- called, by which its answer is told. NULL: there is nothing to say. Kept as long as the answer is.

ALTER TABLE jobs ADD COLUMN outline TEXT;
