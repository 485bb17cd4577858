-- Mailboxes that move without their user's password: on an administrator's word, in waves, with a hash that was
-- brought from the legacy side; and users whom the legacy server knows by another name than their address.

ALTER TABLE mailbox
    ADD COLUMN proof text NOT NULL DEFAULT 'password' CHECK (proof IN ('password', 'word')),
    ADD COLUMN flip_at timestamptz,
    ADD COLUMN staged_at timestamptz,
    ADD COLUMN without_password boolean NOT NULL DEFAULT false,
    ADD COLUMN imported_hash text CHECK (imported_hash ~ '^\{[A-Z0-9.-]+\}.'),
    ADD COLUMN legacy_login text CHECK (legacy_login ~ '^[^[:cntrl:]]{1,255}$');
COMMENT ON COLUMN mailbox.proof IS
    'Why a mailbox may move. password: the user''s, which the legacy server takes; word: an administrator''s, and it is read with the domain''s copy login';
COMMENT ON COLUMN mailbox.flip_at IS
    'Until then it is copied and kept fresh, and does not flip; infinity: until an administrator says when; null: it flips as soon as it can';
COMMENT ON COLUMN mailbox.staged_at IS 'When it was last complete here, but for the flip; null: it was not yet';
COMMENT ON COLUMN mailbox.without_password IS
    'It flips though no password is known for here: its user''s first login is asked about at the legacy server';
COMMENT ON COLUMN mailbox.imported_hash IS
    'A hash that was brought from the legacy side, in a scheme of Dovecot''s. It is in force from the flip on if no password is '
    'proved by then, and gone when a login has renewed it.';
COMMENT ON COLUMN mailbox.legacy_login IS
    'The name by which the legacy server knows the user; null: what the domain''s login_form makes of the address';

ALTER TABLE mailbox
    DROP CONSTRAINT mailbox_password_hash_check,
    ADD CONSTRAINT mailbox_password_hash_check CHECK (password_hash ~ '^\{[A-Z0-9.-]+\}.'),
    DROP CONSTRAINT mailbox_check,
    ADD CONSTRAINT mailbox_password_check CHECK (state <> 'local' OR password_hash IS NOT NULL OR without_password),
    DROP CONSTRAINT mailbox_credential_check,
    ADD CONSTRAINT mailbox_credential_check CHECK (
        state NOT IN ('requested', 'copying', 'cutover') OR sealed_credential IS NOT NULL OR needs_credential OR proof = 'word');
COMMENT ON COLUMN mailbox.password_hash IS
    'What is checked here from the flip on, in a scheme of Dovecot''s: ARGON2ID, or as it was brought from the legacy side until the first login renews it; null: no password is known';

-- For the obstacles to closing; there are few.
CREATE INDEX mailbox_no_password_idx ON mailbox (domain_id) WHERE state = 'local' AND password_hash IS NULL;
