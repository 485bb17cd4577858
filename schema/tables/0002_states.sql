-- Who speaks for a node, and a password that is waited for because it was erased.

ALTER TABLE node
    ADD COLUMN speaker text NOT NULL DEFAULT '',
    ADD COLUMN signed_off_at timestamptz;
COMMENT ON TABLE node IS
    'A policy daemon or authenticator that is waited for at each flip, alive or not; see schema/functions/nodes.sql';
COMMENT ON COLUMN node.speaker IS 'The role and the address from which it last spoke; empty: it has not spoken since the upgrade';
COMMENT ON COLUMN node.signed_off_at IS 'When an authenticator stopped in good order';
-- Nobody waited for those until now.
DELETE FROM node WHERE heartbeat_at < now() - interval '1 day';

ALTER TABLE mailbox
    DROP CONSTRAINT mailbox_check4,
    ADD CONSTRAINT mailbox_credential_check
        CHECK (state NOT IN ('requested', 'copying', 'cutover') OR sealed_credential IS NOT NULL OR needs_credential);
COMMENT ON COLUMN mailbox.needs_credential IS
    'The legacy server refuses the sealed password, or it was erased when that server changed: '
    'the next good login or request brings the new one';

-- Local parts that may hold a recipient delimiter: see the view routing_unmoved.
CREATE INDEX mailbox_own_name_idx ON mailbox (domain_id) WHERE local_part ~ '[^a-z0-9._]';
