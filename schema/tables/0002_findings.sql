-- What running nodes find wrong by themselves, between two runs of bascule check.

CREATE TABLE finding (
    node        text NOT NULL,
    part        text NOT NULL,
    domain_id   bigint REFERENCES domain (id) ON DELETE CASCADE,
    name        text NOT NULL CHECK (name <> ''),
    level       text NOT NULL CHECK (level IN ('note', 'wrong')),
    text        text NOT NULL,
    remedy      text NOT NULL DEFAULT '',
    first_seen  timestamptz NOT NULL DEFAULT clock_timestamp(),
    last_seen   timestamptz NOT NULL DEFAULT clock_timestamp(),
    UNIQUE NULLS NOT DISTINCT (node, part, domain_id, name, text)
);
COMMENT ON TABLE finding IS
    'What a node found when it last looked at its Postfix or Dovecot; gone as soon as it finds it no more';
COMMENT ON COLUMN finding.domain_id IS 'The domain that it is about; null: the host';
COMMENT ON COLUMN finding.name IS 'Of the check: bascule check --list';
