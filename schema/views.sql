-- Views: what administrators and programs may read. The columns are a public
-- interface; a column is added at the end, never renamed or removed.

DROP VIEW IF EXISTS domains, mailboxes, migrated, pending, forgotten, closing_obstacles, stragglers, unreadable, events,
    routing_domain, routing_mailbox, routing_alias, dovecot_user CASCADE;

CREATE VIEW mailboxes AS
SELECT mailbox.local_part || '@' || domain.name AS address, domain.name AS domain, mailbox.state, mailbox.trigger,
       mailbox.first_name, mailbox.last_name, mailbox.store,
       mailbox.messages_copied, mailbox.messages_total, mailbox.bytes_copied, mailbox.state_since,
       mailbox.attempts,
       CASE WHEN mailbox.needs_credential THEN
                'waits for the user''s new password: the legacy server refuses the one we keep'
            WHEN EXISTS (SELECT FROM unreadable_message AS message
                          WHERE message.mailbox_id = mailbox.id AND message.waived_at IS NULL) THEN
                'the legacy server does not give every message: see bascule.unreadable; waive them (bascule waive-message) or mend them there'
            WHEN mailbox.last_error IS NOT NULL THEN mailbox.last_error END AS problem,
       mailbox.last_error_at AS problem_at, mailbox.next_try, mailbox.migrated_at, mailbox.last_message_at,
       mailbox.swept_at, mailbox.return_requested_at
  FROM mailbox JOIN domain ON domain.id = mailbox.domain_id;
COMMENT ON VIEW mailboxes IS 'Every mailbox we know of, where it stands, and what the last trouble with it was';

CREATE VIEW migrated AS SELECT * FROM mailboxes WHERE state = 'local' AND return_requested_at IS NULL;
COMMENT ON VIEW migrated IS 'Users who have moved';

CREATE VIEW pending AS
SELECT * FROM mailboxes WHERE state IN ('requested', 'copying', 'cutover', 'returning') OR return_requested_at IS NOT NULL;
COMMENT ON VIEW pending IS 'Users who are on the move';

CREATE VIEW forgotten AS
SELECT sighting.local_part || '@' || domain.name AS address, domain.name AS domain,
       sighting.messages, sighting.first_seen, sighting.last_seen
  FROM sighting JOIN domain ON domain.id = sighting.domain_id
 WHERE sighting.waived_at IS NULL
   AND NOT EXISTS (SELECT FROM mailbox WHERE mailbox.domain_id = sighting.domain_id
                      AND mailbox.local_part = sighting.local_part AND mailbox.state <> 'legacy')
   AND NOT EXISTS (SELECT FROM alias WHERE alias.domain_id = sighting.domain_id
                      AND alias.local_part = sighting.local_part);
COMMENT ON VIEW forgotten IS
    'Addresses that the legacy server takes mail for and that are neither moved, nor moving, nor an alias here, nor '
    'waived: people who did not come, and technical addresses that nobody thinks of';

CREATE VIEW stragglers AS
SELECT mailbox.local_part || '@' || domain.name AS address, straggler.folder, straggler.uid,
       straggler.staged_at, straggler.delivered_at, domain.name AS domain
  FROM straggler JOIN mailbox ON mailbox.id = straggler.mailbox_id JOIN domain ON domain.id = mailbox.domain_id;
COMMENT ON VIEW stragglers IS 'Messages that reached a legacy mailbox after its owner moved, and when each was brought here';

CREATE VIEW unreadable AS
SELECT mailbox.local_part || '@' || domain.name AS address, message.folder, message.uid, message.reason,
       message.first_seen, message.last_seen, message.waived_at, message.waived_reason, domain.name AS domain
  FROM unreadable_message AS message
  JOIN mailbox ON mailbox.id = message.mailbox_id JOIN domain ON domain.id = mailbox.domain_id;
COMMENT ON VIEW unreadable IS
    'Messages that the legacy server says it has and does not give, and which of them were waived: a mailbox with one that is not waived is copied but not cut over';

CREATE VIEW closing_obstacles AS
SELECT domain, address, 'receives mail at the legacy server, last on ' || to_char(last_seen, 'YYYY-MM-DD HH24:MI') AS why
  FROM forgotten
UNION ALL
SELECT domain, address, CASE WHEN return_requested_at IS NULL THEN 'in state ' || state ELSE 'is being returned' END
  FROM pending
UNION ALL
SELECT mailboxes.domain, mailboxes.address, 'has asked or logged in before, but is in state legacy'
  FROM mailboxes
 WHERE state = 'legacy'
   AND NOT EXISTS (SELECT FROM forgotten WHERE forgotten.address = mailboxes.address)
   AND NOT EXISTS (SELECT FROM sighting JOIN domain ON domain.id = sighting.domain_id
                    WHERE sighting.local_part || '@' || domain.name = mailboxes.address
                      AND sighting.waived_at IS NOT NULL)
UNION ALL
SELECT domain, address, 'a message that came late is not yet in the mailbox here'
  FROM stragglers WHERE delivered_at IS NULL
UNION ALL
SELECT domain, address, 'moved, but its last message is not yet written' FROM migrated WHERE last_message_at IS NULL
UNION ALL
-- As long as one user is there, the legacy server may deliver to those who have moved.
SELECT domain, address, 'moved, but its legacy mailbox was not looked at since the last user moved' FROM migrated
 WHERE last_message_at IS NOT NULL
   AND swept_at < (SELECT max(others.migrated_at) FROM migrated AS others WHERE others.domain = migrated.domain);
COMMENT ON VIEW closing_obstacles IS 'Why a domain cannot be closed, address by address';

CREATE VIEW domains AS
SELECT domain.name AS domain, domain.mode, domain.url_token, domain.url_expires_at,
       domain.imap_host || ':' || domain.imap_port AS legacy_imap,
       domain.smtp_host || ':' || domain.smtp_port AS legacy_smtp,
       (SELECT count(*) FROM migrated WHERE migrated.domain = domain.name) AS migrated,
       (SELECT count(*) FROM pending WHERE pending.domain = domain.name) AS pending,
       (SELECT count(*) FROM forgotten WHERE forgotten.domain = domain.name) AS forgotten
  FROM domain;
COMMENT ON VIEW domains IS 'The domains in migration, and how far each is';

CREATE VIEW events AS SELECT * FROM journal;
COMMENT ON VIEW events IS 'The journal: every change of state, when, who and why';

-- For the parts ----------------------------------------------------------------

CREATE VIEW routing_domain AS
SELECT id, name, mode, imap_host, imap_port, imap_tls, smtp_host, smtp_port, pop3_port, pop3_tls,
       submission_port, submission_tls, sieve_port, sieve_tls, login_form
  FROM domain;
COMMENT ON VIEW routing_domain IS 'What policy daemons and authenticators hold of each domain';

CREATE VIEW routing_mailbox AS
SELECT mailbox.id, mailbox.domain_id, mailbox.local_part, mailbox.state, mailbox.epoch, store.lmtp_next_hop
  FROM mailbox JOIN store ON store.name = mailbox.store
 WHERE mailbox.state IN ('cutover', 'local', 'returning');
COMMENT ON VIEW routing_mailbox IS 'The mailboxes that are not where mail goes by default, that is, to the legacy server';

CREATE VIEW routing_alias AS
SELECT alias.domain_id, alias.local_part, mailbox.local_part || '@' || domain.name AS target
  FROM alias JOIN mailbox ON mailbox.id = alias.mailbox_id JOIN domain ON domain.id = mailbox.domain_id;
COMMENT ON VIEW routing_alias IS 'Other names of mailboxes';

CREATE VIEW dovecot_user AS
SELECT mailbox.local_part || '@' || domain.name AS "user", mailbox.state,
       CASE WHEN mailbox.state = 'local' THEN mailbox.password_hash END AS password,
       home_of(domain.name, mailbox.local_part) AS home, mailbox.hierarchy_separator, mailbox.namespace_prefix,
       mailbox.special_uses, mailbox.store, store.login_host
  FROM mailbox JOIN domain ON domain.id = mailbox.domain_id JOIN store ON store.name = mailbox.store
 WHERE mailbox.state <> 'legacy';
COMMENT ON VIEW dovecot_user IS 'For Dovecot''s passdb (state local only) and userdb';
