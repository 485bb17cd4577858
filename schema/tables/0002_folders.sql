-- Which folders of a domain's mailboxes come along, and what was left out.

CREATE TABLE folder_rule (
    id               bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    domain_id        bigint NOT NULL REFERENCES domain (id) ON DELETE CASCADE,
    kind             text NOT NULL CHECK (kind IN ('name', 'pattern', 'special-use', 'exchange-items', 'common-names')),
    folder           text NOT NULL DEFAULT '',
    action           text NOT NULL CHECK (action IN ('leave-out', 'copy', 'once')),
    name_here        text NOT NULL DEFAULT '',
    special_use_here text NOT NULL DEFAULT '',
    created_at       timestamptz NOT NULL DEFAULT clock_timestamp(),
    UNIQUE (domain_id, kind, folder),
    CHECK ((folder = '') = (kind IN ('exchange-items', 'common-names')))
);
COMMENT ON TABLE folder_rule IS
    'Which folders of a domain''s mailboxes come along, and under which name. One rule decides a folder: by its name, '
    'else the longest pattern, else its special use, else exchange-items. For who has moved, the rules of the flip hold.';
COMMENT ON COLUMN folder_rule.kind IS
    'What the folder is known by. exchange-items: calendars, contacts, journals, notes and tasks that Exchange lists; '
    'common-names: special uses by the names that are common, where the legacy server says none';
COMMENT ON COLUMN folder_rule.folder IS
    'A name, a pattern with * for anything, or an attribute as \Junk (RFC 6154). In letters, not in modified UTF-7, '
    'with the separator and the prefix of the legacy server';
COMMENT ON COLUMN folder_rule.action IS
    'leave-out; copy; once: only the messages that are in no other folder which comes along (Gmail)';
COMMENT ON COLUMN folder_rule.name_here IS 'What a folder that comes along is called here; empty: as there';
COMMENT ON COLUMN folder_rule.special_use_here IS 'As which it is shown here, as \Sent; empty: as there';


CREATE TABLE left_out_folder (
    mailbox_id bigint NOT NULL REFERENCES mailbox (id) ON DELETE CASCADE,
    folder     text NOT NULL,
    reason     text NOT NULL,
    messages   bigint,
    noted_at   timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (mailbox_id, folder)
);
COMMENT ON TABLE left_out_folder IS
    'A folder of a legacy mailbox that a rule leaves out: as the last passes saw it, and from the flip on as it was then';
COMMENT ON COLUMN left_out_folder.folder IS 'As on the wire (modified UTF-7, RFC 3501 section 5.1.3)';
COMMENT ON COLUMN left_out_folder.messages IS 'How many it had; null: the legacy server does not say';
