-- What did not come along is kept by folder, too, and may be waived by folder.

CREATE TABLE unreadable_folder (
    mailbox_id    bigint NOT NULL REFERENCES mailbox (id) ON DELETE CASCADE,
    folder        text NOT NULL,
    reason        text NOT NULL,
    first_seen    timestamptz NOT NULL DEFAULT clock_timestamp(),
    last_seen     timestamptz NOT NULL DEFAULT clock_timestamp(),
    waived_at     timestamptz,
    waived_reason text,
    PRIMARY KEY (mailbox_id, folder),
    CHECK ((waived_at IS NULL) = (waived_reason IS NULL))
);
COMMENT ON TABLE unreadable_folder IS
    'A folder that the legacy server lists and does not open. The cutover waits until it is opened or waived.';

ALTER TABLE straggler
    ADD COLUMN message_id text NOT NULL DEFAULT '',
    ADD COLUMN digest bytea;
COMMENT ON COLUMN straggler.message_id IS 'The Message-ID of the message, or empty: with the digest it is known again after the folder was numbered anew';
COMMENT ON COLUMN straggler.digest IS 'SHA-256 of its bytes; null for what was brought by a version that kept none';

ALTER TABLE domain ADD COLUMN on_difference text NOT NULL DEFAULT 'note' CHECK (on_difference IN ('note', 'wait'));
COMMENT ON COLUMN domain.on_difference IS
    'Where a folder''s name or a keyword cannot be kept as it is: note: the mailbox moves, and its report says what differs; wait: it waits for an administrator';

ALTER TABLE verification ADD COLUMN verified_again_at timestamptz, ADD COLUMN again jsonb;
COMMENT ON COLUMN verification.again IS
    'What verify_mailbox() found: compared, moved, gone and differing messages, and those that the legacy server has and nobody brought';
