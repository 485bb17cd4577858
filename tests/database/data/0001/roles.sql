-- Roles: each part may do what it must, and no more.
--
--   bascule_admin          administrators: all views, all acts of administration
--   bascule_worker         workers: the only ones that read sealed credentials
--   bascule_portal         the users' page: sees a domain by its URL, makes requests
--   bascule_authenticator  records logins; reads no credential
--   bascule_policy_daemon  reads routes, records sightings
--   bascule_dovecot        Dovecot's SQL passdb and userdb

DO $$
DECLARE
    part text;
BEGIN
    FOREACH part IN ARRAY ARRAY['admin', 'worker', 'portal', 'authenticator', 'policy_daemon', 'dovecot'] LOOP
        IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'bascule_' || part) THEN
            EXECUTE format('CREATE ROLE %I LOGIN', 'bascule_' || part);
        END IF;
    END LOOP;
END
$$;

REVOKE ALL ON SCHEMA bascule, queue FROM PUBLIC;
REVOKE ALL ON ALL TABLES IN SCHEMA bascule, queue FROM PUBLIC;
REVOKE ALL ON ALL FUNCTIONS IN SCHEMA bascule, queue FROM PUBLIC;
GRANT USAGE ON SCHEMA bascule TO bascule_admin, bascule_worker, bascule_portal, bascule_authenticator,
    bascule_policy_daemon, bascule_dovecot;

GRANT SELECT ON domains, mailboxes, migrated, pending, failed, forgotten, closing_obstacles, stragglers, unreadable,
    verifications, events, parts, store, node TO bascule_admin;
GRANT INSERT, UPDATE ON store TO bascule_admin;
-- Mode and URL change only through activate_domain(), rotate_url() and close_domain().
GRANT SELECT ON domain TO bascule_admin;
GRANT INSERT (name, store, imap_host, imap_port, imap_tls, smtp_host, smtp_port, pop3_port, pop3_tls, submission_port,
    submission_tls, sieve_port, sieve_tls, login_form, copy_login, sealed_copy_login, connections,
    connections_per_mailbox, bytes_per_second, first_login_migrates, cutover_budget, sweep_interval, quiet_period,
    language, writes_to_users) ON domain TO bascule_admin;
GRANT UPDATE (store, imap_host, imap_port, imap_tls, smtp_host, smtp_port, pop3_port, pop3_tls, submission_port,
    submission_tls, sieve_port, sieve_tls, login_form, copy_login, sealed_copy_login, connections,
    connections_per_mailbox, bytes_per_second, first_login_migrates, cutover_budget, sweep_interval, quiet_period,
    language, writes_to_users) ON domain TO bascule_admin;
GRANT EXECUTE ON FUNCTION activate_domain, rotate_url, place, expect, assign_alias, remove_alias, waive_address,
    unwaive_address, pause, resume, pause_domain, resume_domain, retry, give_up, return_mailbox, cancel_return,
    waive_messages, close_domain, request_migration, messages_per_second, remaining TO bascule_admin;

GRANT SELECT ON domain, mailbox, mailbox_folder, straggler, unreadable_message, returned_message, routing_domain, gauges
    TO bascule_worker;
GRANT EXECUTE ON FUNCTION begin_copy, report_progress, attempt_failed, begin_cutover, unacknowledged, finish_cutover,
    undo_cutover, undo_overdue_cutovers, stage_straggler, straggler_delivered, sweep_done, requeue_unattended,
    take_connections, set_unreadable, set_hierarchy, begin_return, undo_return, finish_return, intend_return, returned,
    welcomed, trouble_told, home_of, reseal_mailbox, reseal_domain TO bascule_worker;
GRANT USAGE ON SCHEMA queue TO bascule_worker;
GRANT ALL ON ALL TABLES IN SCHEMA queue TO bascule_worker;
GRANT ALL ON ALL SEQUENCES IN SCHEMA queue TO bascule_worker;
GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA queue TO bascule_worker;

GRANT EXECUTE ON FUNCTION portal_domain, portal_progress, portal_request TO bascule_portal;

GRANT SELECT ON routing_domain, routing_mailbox, routing_alias TO bascule_authenticator, bascule_policy_daemon;
GRANT EXECUTE ON FUNCTION beat, sign_off, acknowledge TO bascule_authenticator, bascule_policy_daemon;
GRANT EXECUTE ON FUNCTION record_login, login_state TO bascule_authenticator;
GRANT EXECUTE ON FUNCTION record_sighting, undo_overdue_cutovers TO bascule_policy_daemon;

GRANT SELECT ON dovecot_user TO bascule_dovecot;
GRANT EXECUTE ON FUNCTION home_of TO bascule_dovecot;
