-- Late messages are known by more than their UID, and so is what a return appends.

ALTER TABLE straggler
    ADD COLUMN internaldate bigint,
    ADD COLUMN flags text[] NOT NULL DEFAULT '{}',
    ADD COLUMN name text NOT NULL DEFAULT '',
    ADD COLUMN place text NOT NULL DEFAULT '',
    ADD COLUMN guid text NOT NULL DEFAULT '';
COMMENT ON COLUMN straggler.internaldate IS
    'INTERNALDATE in seconds since 1970; null: not kept. Another one under the same UID is another message.';
COMMENT ON COLUMN straggler.flags IS 'Flags and keywords that it had when it was staged';
COMMENT ON COLUMN straggler.name IS 'The name of its file; empty: made of folder, UIDVALIDITY and UID, as former versions did';
COMMENT ON COLUMN straggler.place IS 'The folder here that it was put into: INBOX where its own is not here; empty: not known';
COMMENT ON COLUMN straggler.guid IS 'Dovecot''s name of it, wherever its owner moves it; empty: not known';

ALTER TABLE returned_message
    ADD COLUMN legacy_uidvalidity bigint,
    ADD COLUMN internaldate bigint,
    ADD COLUMN message_id text NOT NULL DEFAULT '',
    ADD COLUMN appended_at timestamptz;
COMMENT ON COLUMN returned_message.legacy_uidvalidity IS 'UIDVALIDITY of the folder at the legacy server';
COMMENT ON COLUMN returned_message.internaldate IS 'INTERNALDATE that was asked for';
COMMENT ON COLUMN returned_message.message_id IS 'Its Message-ID, or empty: for servers that alter what is appended';
COMMENT ON COLUMN returned_message.appended_at IS
    'When the server said OK: from then on it is never appended again, even if its UID there cannot be found out';

ALTER TABLE mailbox ADD COLUMN return_forced boolean NOT NULL DEFAULT false;
COMMENT ON COLUMN mailbox.return_forced IS 'A return goes on although most of a folder is gone here, or a folder was made anew there';
