-- What was seen of mailboxes before they move.

CREATE TABLE survey (
    domain_id   bigint NOT NULL REFERENCES domain ON DELETE CASCADE,
    local_part  text NOT NULL CHECK (local_part <> ''),
    surveyed_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    messages    bigint NOT NULL CHECK (messages >= 0),
    folders     integer NOT NULL CHECK (folders >= 0),
    bytes       bigint NOT NULL CHECK (bytes >= 0),
    largest     bigint NOT NULL CHECK (largest >= 0),
    findings    jsonb NOT NULL CHECK (jsonb_typeof(findings) = 'array'),
    PRIMARY KEY (domain_id, local_part)
);
COMMENT ON TABLE survey IS 'The last look at each legacy mailbox, before anybody moves: bascule survey';
