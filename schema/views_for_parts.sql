-- What the parts read. Not a public interface, but the parts of the version before
-- read on while the schema is upgraded: new columns are added at the end.

CREATE OR REPLACE VIEW gauges AS
SELECT domain.name AS domain, states.state, count(mailbox.id) AS mailboxes,
       count(mailbox.id) FILTER (WHERE mailbox.last_error IS NOT NULL AND NOT mailbox.needs_credential) AS failing,
       count(mailbox.id) FILTER (WHERE mailbox.needs_credential) AS waiting_for_password,
       coalesce(extract(epoch FROM clock_timestamp() - min(mailbox.state_since)), 0)::double precision AS longest_seconds
  FROM domain CROSS JOIN unnest(enum_range(NULL::mailbox_state)) AS states (state)
  LEFT JOIN mailbox ON mailbox.domain_id = domain.id AND mailbox.state = states.state
 WHERE domain.mode = 'active'
 GROUP BY domain.name, states.state;
COMMENT ON VIEW gauges IS
    'For the workers'' metrics: how many mailboxes of each active domain are in each state, and since when the longest of them';

CREATE OR REPLACE VIEW routing_domain AS
SELECT id, name, mode, imap_host, imap_port, imap_tls, smtp_host, smtp_port, pop3_port, pop3_tls,
       submission_port, submission_tls, sieve_port, sieve_tls, login_form, smtp_tls, first_login_migrates
  FROM domain;
COMMENT ON VIEW routing_domain IS 'What policy daemons and authenticators hold of each domain';

CREATE OR REPLACE VIEW routing_mailbox AS
SELECT mailbox.id, mailbox.domain_id, mailbox.local_part, mailbox.state, mailbox.epoch, store.lmtp_next_hop
  FROM mailbox JOIN store ON store.name = mailbox.store
 WHERE mailbox.state IN ('cutover', 'local', 'returning');
COMMENT ON VIEW routing_mailbox IS 'The mailboxes that are not where mail goes by default, that is, to the legacy server';

CREATE OR REPLACE VIEW login_mailbox AS
SELECT mailbox.id, mailbox.domain_id, mailbox.local_part, mailbox.state, mailbox.epoch, store.lmtp_next_hop,
       CASE WHEN mailbox.state = 'local' THEN mailbox.password_hash END AS password_hash,
       wants_credential(mailbox) AS needs_credential, home_of(domain.name, mailbox.local_part) AS home, mailbox.store,
       store.login_host, mailbox.hierarchy_separator, mailbox.namespace_prefix, mailbox.special_uses,
       mailbox.legacy_login, mailbox.first_login_declined_at IS NOT NULL AS declined,
       coalesce(mailbox.state = 'local' AND mailbox.password_hash = mailbox.imported_hash, false) AS imported
  FROM mailbox JOIN domain ON domain.id = mailbox.domain_id JOIN store ON store.name = mailbox.store
 WHERE mailbox.state <> 'legacy' OR mailbox.first_login_declined_at IS NOT NULL OR mailbox.legacy_login IS NOT NULL;
COMMENT ON VIEW login_mailbox IS
    'For authenticators: all that Dovecot must know of the mailboxes on the move and of those that have moved';

CREATE OR REPLACE VIEW routing_unmoved AS
SELECT domain_id, local_part FROM mailbox WHERE state IN ('legacy', 'requested', 'copying');
COMMENT ON VIEW routing_unmoved IS
    'The mailboxes that we know of and that are where mail goes by default; for those whose name looks like another one''s with a detail';

CREATE OR REPLACE VIEW routing_alias AS
SELECT alias.domain_id, alias.local_part, mailbox.full_address AS target
  FROM alias JOIN mailbox ON mailbox.id = alias.mailbox_id;
COMMENT ON VIEW routing_alias IS 'Other names of mailboxes';

CREATE OR REPLACE VIEW dovecot_user AS
SELECT mailbox.full_address AS "user", mailbox.state,
       CASE WHEN mailbox.state = 'local' THEN mailbox.password_hash END AS password,
       home_of(domain.name, mailbox.local_part) AS home, mailbox.hierarchy_separator, mailbox.namespace_prefix,
       mailbox.special_uses, mailbox.store, store.login_host
  FROM mailbox JOIN domain ON domain.id = mailbox.domain_id JOIN store ON store.name = mailbox.store
 WHERE mailbox.state <> 'legacy';
COMMENT ON VIEW dovecot_user IS
    'For an SQL passdb (state local only) and userdb of the operator''s own. bascule does not use it any more; it goes with 0.3.';
