-- Revision 0001: the tables of the first release.
--
-- Files in tables/ are history: each is applied once and never edited after
-- its release. Functions, views and roles are in the files beside this
-- folder; they are applied whole at every upgrade.

CREATE TYPE domain_mode AS ENUM ('prepared', 'active', 'closed');
COMMENT ON TYPE domain_mode IS
    'prepared: settings known, nobody moves; active: users may move; closed: the legacy server is no longer used';

CREATE TYPE mailbox_state AS ENUM ('legacy', 'requested', 'copying', 'cutover', 'local', 'returning');
COMMENT ON TYPE mailbox_state IS
    'Where a mailbox stands between the legacy server and here. What Postfix and Dovecot do follows from it alone.';

CREATE TYPE request_trigger AS ENUM ('portal', 'login', 'administrator');
COMMENT ON TYPE request_trigger IS 'Who set a migration off: the user at the URL, the user''s login, or an administrator';

CREATE TYPE tls_mode AS ENUM ('implicit', 'starttls', 'none');
COMMENT ON TYPE tls_mode IS 'How a connection to the legacy server is secured (RFC 8314: implicit is preferred)';

CREATE TYPE login_form AS ENUM ('address', 'local_part');
COMMENT ON TYPE login_form IS 'What the legacy server expects as the user name';


CREATE TYPE copy_login AS ENUM ('user', 'master', 'xoauth2');
COMMENT ON TYPE copy_login IS
    'user: with the user''s own password; master: with a master user''s (SASL PLAIN with an authorization identity); '
    'xoauth2: with an access token of an OAuth 2.0 client';

CREATE TYPE user_language AS ENUM ('en', 'fr', 'ar');
COMMENT ON TYPE user_language IS 'The languages in which users are written to (RFC 5646)';


CREATE TABLE store (
    name          text PRIMARY KEY,
    lmtp_next_hop text NOT NULL CHECK (lmtp_next_hop ~ '^(unix|inet):.+'),
    login_host    text CHECK (login_host <> '')
);
COMMENT ON TABLE store IS 'A Dovecot host that keeps mailboxes; its name is also the name of its workers'' queue';
COMMENT ON COLUMN store.lmtp_next_hop IS 'As in transport(5) after "lmtp:", e.g. unix:private/dovecot-lmtp or inet:store1:24';
COMMENT ON COLUMN store.login_host IS
    'Where Dovecot on other hosts proxies the store''s users to, at the usual ports with STARTTLS; null: there is one store';


CREATE TABLE domain (
    id                   bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name                 text NOT NULL UNIQUE CHECK (name = lower(name) AND name ~ '^[a-z0-9._-]+\.[a-z0-9-]+$'),
    mode                 domain_mode NOT NULL DEFAULT 'prepared',
    store                text NOT NULL REFERENCES store (name),
    imap_host            text NOT NULL CHECK (imap_host <> ''),
    imap_port            integer NOT NULL CHECK (imap_port BETWEEN 1 AND 65535),
    imap_tls             tls_mode NOT NULL,
    smtp_host            text NOT NULL CHECK (smtp_host <> ''),
    smtp_port            integer NOT NULL CHECK (smtp_port BETWEEN 1 AND 65535),
    pop3_port            integer CHECK (pop3_port BETWEEN 1 AND 65535),
    pop3_tls             tls_mode,
    submission_port      integer CHECK (submission_port BETWEEN 1 AND 65535),
    submission_tls       tls_mode,
    sieve_port           integer CHECK (sieve_port BETWEEN 1 AND 65535),
    sieve_tls            tls_mode,
    login_form           login_form NOT NULL DEFAULT 'address',
    copy_login           copy_login NOT NULL DEFAULT 'user',
    sealed_copy_login    bytea,
    connections          integer NOT NULL DEFAULT 20 CHECK (connections >= 1),
    connections_per_mailbox integer NOT NULL DEFAULT 2 CHECK (connections_per_mailbox >= 1),
    bytes_per_second     bigint CHECK (bytes_per_second > 0),
    first_login_migrates boolean NOT NULL DEFAULT true,
    cutover_budget       interval NOT NULL DEFAULT '60 seconds' CHECK (cutover_budget > '0'),
    sweep_interval       interval NOT NULL DEFAULT '5 minutes' CHECK (sweep_interval > '0'),
    quiet_period         interval NOT NULL DEFAULT '1 day' CHECK (quiet_period >= '0'),
    language             user_language NOT NULL DEFAULT 'en',
    writes_to_users      boolean NOT NULL DEFAULT true,
    paused_at            timestamptz,
    pause_reason         text,
    url_token            text UNIQUE,
    url_expires_at       timestamptz,
    created_at           timestamptz NOT NULL DEFAULT now(),
    CHECK ((pop3_port IS NULL) = (pop3_tls IS NULL)),
    CHECK ((submission_port IS NULL) = (submission_tls IS NULL)),
    CHECK ((sieve_port IS NULL) = (sieve_tls IS NULL)),
    CHECK ((copy_login = 'user') = (sealed_copy_login IS NULL)),
    CHECK ((url_token IS NULL) = (url_expires_at IS NULL)),
    CHECK (mode <> 'active' OR url_token IS NOT NULL),
    CHECK ((paused_at IS NULL) = (pause_reason IS NULL))
);
COMMENT ON TABLE domain IS 'A mail domain in migration, and how its legacy server is reached';
COMMENT ON COLUMN domain.name IS 'In A-labels (RFC 5890): xn--exmple-cua.test, not exämple.test';
COMMENT ON COLUMN domain.smtp_host IS 'Next hop for mail of users who have not moved; an MX is never looked up for it';
COMMENT ON COLUMN domain.pop3_port IS 'Legacy POP3, on imap_host; null: POP3 is not proxied';
COMMENT ON COLUMN domain.submission_port IS 'Legacy submission, on imap_host; null: submission is not proxied';
COMMENT ON COLUMN domain.sieve_port IS 'Legacy ManageSieve (RFC 5804), on imap_host; null: no scripts are copied';
COMMENT ON COLUMN domain.copy_login IS 'As whom workers log in to copy a mailbox; the user''s own password is checked before the flip in any case but xoauth2';
COMMENT ON COLUMN domain.sealed_copy_login IS 'The master user or OAuth 2.0 client, sealed to the workers'' key; made by bascule copy-login';
COMMENT ON COLUMN domain.connections IS 'The most IMAP sessions that all workers together have at the legacy server';
COMMENT ON COLUMN domain.connections_per_mailbox IS 'The most IMAP sessions that are used for one mailbox at a time';
COMMENT ON COLUMN domain.bytes_per_second IS 'The most message bytes a second that all workers together read from the legacy server; null: no limit';
COMMENT ON COLUMN domain.first_login_migrates IS 'Whether a first login on the new server is a request to be moved';
COMMENT ON COLUMN domain.cutover_budget IS 'The longest time that a user''s mail may be held; a cutover not done by then undoes itself';
COMMENT ON COLUMN domain.sweep_interval IS 'How often the legacy mailbox of a migrated user is looked at for stragglers';
COMMENT ON COLUMN domain.quiet_period IS 'How long no late message may have come to any legacy mailbox before the domain is closed';
COMMENT ON COLUMN domain.language IS 'In which users are written to who chose none at the URL';
COMMENT ON COLUMN domain.writes_to_users IS 'Whether users get a welcome here, and a message when their move waits for their new password; the last message is written in any case';
COMMENT ON COLUMN domain.paused_at IS 'Workers leave the legacy server of a paused domain alone; mail and logins go on';
COMMENT ON COLUMN domain.url_token IS 'The secret part of the users'' URL; rotated by rotate_url()';


CREATE TABLE mailbox (
    id                 bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    domain_id          bigint NOT NULL REFERENCES domain (id),
    local_part         text NOT NULL CHECK (local_part <> '' AND local_part = lower(local_part)),
    full_address       text NOT NULL UNIQUE,
    state              mailbox_state NOT NULL DEFAULT 'legacy',
    epoch              bigint NOT NULL DEFAULT 0,
    store              text NOT NULL REFERENCES store (name),
    trigger            request_trigger,
    first_name         text NOT NULL DEFAULT '',
    last_name          text NOT NULL DEFAULT '',
    sealed_credential  bytea,
    needs_credential   boolean NOT NULL DEFAULT false,
    language           user_language,
    password_hash      text CHECK (password_hash LIKE '{ARGON2ID}%'),
    hierarchy_separator text NOT NULL DEFAULT '/' CHECK (length(hierarchy_separator) = 1),
    namespace_prefix   text NOT NULL DEFAULT '',
    special_uses       jsonb NOT NULL DEFAULT '{}',
    created_at         timestamptz NOT NULL DEFAULT now(),
    state_since        timestamptz NOT NULL DEFAULT now(),
    cutover_deadline   timestamptz,
    messages_total     bigint NOT NULL DEFAULT 0 CHECK (messages_total >= 0),
    messages_copied    bigint NOT NULL DEFAULT 0 CHECK (messages_copied >= 0),
    bytes_copied       bigint NOT NULL DEFAULT 0 CHECK (bytes_copied >= 0),
    attempts           integer NOT NULL DEFAULT 0,
    copy_began_at      timestamptz,
    copied_before      bigint,
    paused_at          timestamptz,
    pause_reason       text,
    last_error         text,
    last_advice        text,
    last_error_at      timestamptz,
    next_try           timestamptz,
    migrated_at        timestamptz,
    last_message_at    timestamptz,
    welcomed_at        timestamptz,
    trouble_told_at    timestamptz,
    swept_at           timestamptz,
    return_requested_at timestamptz,
    return_reason      text,
    UNIQUE (domain_id, local_part),
    CHECK (state <> 'local' OR password_hash IS NOT NULL),
    CHECK ((state IN ('cutover', 'returning')) = (cutover_deadline IS NOT NULL)),
    CHECK ((paused_at IS NULL) = (pause_reason IS NULL)),
    CHECK (return_requested_at IS NULL OR state IN ('local', 'returning')),
    CHECK (state NOT IN ('requested', 'copying', 'cutover') OR sealed_credential IS NOT NULL)
);
COMMENT ON TABLE mailbox IS 'One user of a domain. A user without a row is in state legacy.';
COMMENT ON COLUMN mailbox.full_address IS 'local_part@domain.name, so that it can be looked for; set when the row is made, for a domain keeps its name';
COMMENT ON COLUMN mailbox.epoch IS 'Counts changes of state: an acknowledgement names the change that it saw';
COMMENT ON COLUMN mailbox.sealed_credential IS 'Legacy password in a libsodium sealed box; only workers hold the private key. Erased when the domain closes.';
COMMENT ON COLUMN mailbox.needs_credential IS 'The legacy server refuses the sealed password: the next good login or request brings the new one';
COMMENT ON COLUMN mailbox.password_hash IS 'What Dovecot checks from the flip on, in its ARGON2ID scheme';
COMMENT ON COLUMN mailbox.language IS 'Of the page on which the user asked; null: the domain''s';
COMMENT ON COLUMN mailbox.copy_began_at IS 'When a worker last took the copy up; with copied_before, the messages that were here then, it gives the rate';
COMMENT ON COLUMN mailbox.paused_at IS 'Workers leave a paused mailbox alone, but for a cutover that has begun';
COMMENT ON COLUMN mailbox.last_advice IS 'What an administrator can do about last_error, if there is something';
COMMENT ON COLUMN mailbox.trouble_told_at IS 'When the user was last written to that the move waits for the new password';
COMMENT ON COLUMN mailbox.hierarchy_separator IS 'The legacy server''s, kept for this user so that the client sees the same folder names';
COMMENT ON COLUMN mailbox.namespace_prefix IS 'The legacy server''s prefix of the personal namespace (RFC 2342), e.g. INBOX.';
COMMENT ON COLUMN mailbox.special_uses IS 'The legacy server''s special uses (RFC 6154): {"sent": "name of the folder, in UTF-8, without the prefix"}';
COMMENT ON COLUMN mailbox.swept_at IS 'When the last complete sweep of the legacy mailbox began: what was there then is here';

COMMENT ON COLUMN mailbox.cutover_deadline IS 'When a cutover, or the last step of a return, undoes itself';
COMMENT ON COLUMN mailbox.return_requested_at IS 'An administrator wants the mailbox back at the legacy server: what is new here is written there';

CREATE INDEX mailbox_state_idx ON mailbox (domain_id, state);
CREATE INDEX mailbox_pending_idx ON mailbox (domain_id)
 WHERE state IN ('requested', 'copying', 'cutover', 'returning') OR return_requested_at IS NOT NULL;
CREATE INDEX mailbox_failed_idx ON mailbox (domain_id)
 WHERE needs_credential OR last_error IS NOT NULL OR paused_at IS NOT NULL;
CREATE INDEX mailbox_waiting_idx ON mailbox (store, state_since) WHERE state = 'requested';
CREATE INDEX mailbox_migrated_idx ON mailbox (store, migrated_at);
CREATE INDEX mailbox_last_move_idx ON mailbox (domain_id, migrated_at) WHERE state = 'local';


CREATE TABLE mailbox_folder (
    mailbox_id  bigint NOT NULL REFERENCES mailbox (id) ON DELETE CASCADE,
    name        text NOT NULL,
    uidvalidity bigint NOT NULL CHECK (uidvalidity BETWEEN 1 AND 4294967295),
    uidnext     bigint NOT NULL CHECK (uidnext BETWEEN 1 AND 4294967296),
    PRIMARY KEY (mailbox_id, name)
);
COMMENT ON TABLE mailbox_folder IS 'What the final pass saw of each legacy folder: a UID at or above uidnext is a straggler';
COMMENT ON COLUMN mailbox_folder.name IS 'As on the wire (modified UTF-7, RFC 3501 section 5.1.3)';


CREATE TABLE verification (
    mailbox_id bigint PRIMARY KEY REFERENCES mailbox (id) ON DELETE CASCADE,
    report     jsonb NOT NULL
);
COMMENT ON TABLE verification IS 'What was compared at the cutover of a mailbox, folder by folder; kept as evidence';


CREATE TABLE straggler (
    mailbox_id   bigint NOT NULL REFERENCES mailbox (id) ON DELETE CASCADE,
    folder       text NOT NULL,
    uidvalidity  bigint NOT NULL,
    uid          bigint NOT NULL,
    staged_at    timestamptz NOT NULL DEFAULT now(),
    delivered_at timestamptz,
    PRIMARY KEY (mailbox_id, folder, uidvalidity, uid)
);
COMMENT ON TABLE straggler IS
    'A message that reached the legacy mailbox after its owner moved. Staged: its file is complete beside the mailbox, '
    'under a name made of this key; delivered: it was renamed into the mailbox.';


CREATE TABLE unreadable_message (
    mailbox_id    bigint NOT NULL REFERENCES mailbox (id) ON DELETE CASCADE,
    folder        text NOT NULL,
    uidvalidity   bigint NOT NULL,
    uid           bigint NOT NULL,
    reason        text NOT NULL,
    first_seen    timestamptz NOT NULL DEFAULT clock_timestamp(),
    last_seen     timestamptz NOT NULL DEFAULT clock_timestamp(),
    waived_at     timestamptz,
    waived_reason text,
    PRIMARY KEY (mailbox_id, folder, uidvalidity, uid),
    CHECK ((waived_at IS NULL) = (waived_reason IS NULL))
);
COMMENT ON TABLE unreadable_message IS
    'A message that the legacy server says it has and does not give. The cutover waits until it is given or waived.';


CREATE TABLE returned_message (
    mailbox_id     bigint NOT NULL REFERENCES mailbox (id) ON DELETE CASCADE,
    folder         text NOT NULL,
    uid            bigint NOT NULL,
    guid           text NOT NULL,
    digest         bytea NOT NULL,
    legacy_uidnext bigint NOT NULL,
    legacy_uid     bigint,
    PRIMARY KEY (mailbox_id, folder, uid)
);
COMMENT ON COLUMN returned_message.guid IS 'Dovecot''s name of the message: a UID may be used anew when its folder is';
COMMENT ON COLUMN returned_message.digest IS 'SHA-256 of its bytes, by which it is looked for after a death';
COMMENT ON TABLE returned_message IS
    'A message of this side that a return writes to the legacy server. legacy_uid is null from just before the APPEND '
    'until it is known to be there; meanwhile it can only be at legacy_uidnext or above.';


CREATE TABLE alias (
    domain_id  bigint NOT NULL REFERENCES domain (id),
    local_part text NOT NULL CHECK (local_part <> '' AND local_part = lower(local_part)),
    mailbox_id bigint NOT NULL REFERENCES mailbox (id),
    PRIMARY KEY (domain_id, local_part)
);
COMMENT ON TABLE alias IS 'An address of the domain that is another name of a mailbox here';


CREATE TABLE sighting (
    domain_id     bigint NOT NULL REFERENCES domain (id),
    local_part    text NOT NULL CHECK (local_part <> '' AND local_part = lower(local_part)),
    messages      bigint NOT NULL DEFAULT 0,
    first_seen    timestamptz NOT NULL DEFAULT now(),
    last_seen     timestamptz NOT NULL DEFAULT now(),
    waived_at     timestamptz,
    waived_reason text,
    PRIMARY KEY (domain_id, local_part),
    CHECK ((waived_at IS NULL) = (waived_reason IS NULL))
);
COMMENT ON TABLE sighting IS
    'A recipient that the legacy server accepted: how often and when it was last written to. Gone when it has moved or is an alias.';
COMMENT ON COLUMN sighting.waived_reason IS 'Why an administrator decided that this address need not move';


CREATE TABLE node (
    name         text NOT NULL,
    part         text NOT NULL CHECK (part IN ('policy_daemon', 'authenticator')),
    heartbeat_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (name, part)
);
COMMENT ON TABLE node IS 'A running policy daemon or authenticator. One that was silent for 15 seconds is not waited for.';

CREATE TABLE acknowledgement (
    mailbox_id bigint NOT NULL REFERENCES mailbox (id) ON DELETE CASCADE,
    node       text NOT NULL,
    part       text NOT NULL,
    epoch      bigint NOT NULL,
    PRIMARY KEY (mailbox_id, node, part)
);
COMMENT ON TABLE acknowledgement IS
    'A node has put a mailbox''s change of state into force: the policy daemon when the queue manager resolves '
    'recipients anew and no older delivery is under way, the authenticator when the proxied sessions are gone';


CREATE TABLE journal (
    id         bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at         timestamptz NOT NULL DEFAULT clock_timestamp(),
    actor      text NOT NULL DEFAULT session_user,
    domain     text,
    address    text,
    event      text NOT NULL,
    from_state text,
    to_state   text,
    reason     text
);
COMMENT ON TABLE journal IS 'Every change of state: when, who, why. Append-only.';
CREATE INDEX journal_address_idx ON journal (address, id);
CREATE INDEX journal_domain_idx ON journal (domain, id);
