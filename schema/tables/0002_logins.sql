-- First logins by policy, and what logins leave behind: guesses, and where owners come from.

ALTER TABLE domain
    ADD COLUMN first_login_delay interval NOT NULL DEFAULT '0' CHECK (first_login_delay >= '0');
COMMENT ON COLUMN domain.first_login_delay IS
    'How long after a first login the request is made, if first_login_migrates: time for the user to object';

ALTER TABLE mailbox
    ADD COLUMN first_login_at timestamptz,
    ADD COLUMN first_login_told_at timestamptz,
    ADD COLUMN first_login_declined_at timestamptz;
COMMENT ON COLUMN mailbox.first_login_at IS
    'When a first login here set the move off, or began the domain''s first_login_delay';
COMMENT ON COLUMN mailbox.first_login_told_at IS
    'When the notice of it was written to the legacy INBOX; null: not yet';
COMMENT ON COLUMN mailbox.first_login_declined_at IS
    'Since when no login of this user sets a move off: they objected, or an administrator did for them';
CREATE INDEX mailbox_first_login_idx ON mailbox (first_login_at)
 WHERE first_login_at IS NOT NULL AND state = 'legacy' AND first_login_declined_at IS NULL;


CREATE TABLE login_guess (
    id       bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    instance text NOT NULL,
    part     text NOT NULL CHECK (part IN ('authenticator', 'portal')),
    kind     text NOT NULL CHECK (kind IN ('account', 'source', 'domain')),
    subject  text NOT NULL CHECK (length(subject) <= 400),
    guesses  integer NOT NULL CHECK (guesses BETWEEN 1 AND 10000),
    at       timestamptz NOT NULL DEFAULT clock_timestamp()
);
COMMENT ON TABLE login_guess IS
    'Wrong passwords of the last ten minutes, by account, source and domain, as each running instance counted them';
COMMENT ON COLUMN login_guess.instance IS 'A name that a process gives itself at its start: it does not count its own again';
CREATE INDEX login_guess_at_idx ON login_guess (at);

CREATE TABLE login_source (
    address   text NOT NULL CHECK (length(address) <= 400),
    site      text NOT NULL CHECK (site <> '' AND length(site) <= 64),
    last_seen timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (address, site)
);
COMMENT ON TABLE login_source IS
    'From where (an IPv4 address, an IPv6 /64) a user logged in within a day: guesses of others do not slow these down';
CREATE INDEX login_source_seen_idx ON login_source (last_seen);
