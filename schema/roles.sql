-- Roles: each part may do what it must, and no more.
--
--   bascule_admin          administrators: all views, all acts of administration
--   bascule_worker         workers: the only ones that read sealed credentials
--   bascule_portal         the users' page: sees a domain by its URL, makes requests
--   bascule_authenticator  records logins, reads what Dovecot must know of a mailbox; reads no credential
--   bascule_policy_daemon  reads routes, records sightings
--   bascule_dovecot        an SQL passdb and userdb of the operator's own; bascule's configuration does not use it

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
-- Of a domain all but the sealed copy login. (REVOKE takes back what the first release granted on the whole table.)
REVOKE ALL ON domain FROM bascule_admin;
GRANT SELECT (id, name, mode, store, imap_host, imap_port, imap_tls, smtp_host, smtp_port, pop3_port, pop3_tls,
    submission_port, submission_tls, sieve_port, sieve_tls, login_form, copy_login, connections,
    connections_per_mailbox, bytes_per_second, first_login_migrates, first_login_delay, cutover_budget, sweep_interval, quiet_period,
    language, writes_to_users, on_difference, smtp_tls, paused_at, pause_reason, url_token, url_expires_at, created_at) ON domain TO bascule_admin;
GRANT INSERT (name, store, imap_host, imap_port, imap_tls, smtp_host, smtp_port, pop3_port, pop3_tls, submission_port,
    submission_tls, sieve_port, sieve_tls, login_form, copy_login, sealed_copy_login, connections,
    connections_per_mailbox, bytes_per_second, first_login_migrates, first_login_delay, cutover_budget, sweep_interval, quiet_period,
    language, writes_to_users, on_difference, smtp_tls) ON domain TO bascule_admin;
GRANT UPDATE (store, imap_host, imap_port, imap_tls, smtp_host, smtp_port, pop3_port, pop3_tls, submission_port,
    submission_tls, sieve_port, sieve_tls, login_form, copy_login, sealed_copy_login, connections,
    connections_per_mailbox, bytes_per_second, first_login_migrates, first_login_delay, cutover_budget, sweep_interval, quiet_period,
    language, writes_to_users, on_difference, smtp_tls) ON domain TO bascule_admin;
GRANT EXECUTE ON FUNCTION activate_domain, rotate_url, place, expect, assign_alias, remove_alias, waive_address,
    unwaive_address, pause, resume, pause_domain, resume_domain, retry, give_up, return_mailbox, cancel_return,
    waive_messages, waive_last_message, verify_mailbox, close_domain, request_migration, move_mailbox, import_passwords,
    set_login_name, messages_per_second, remaining,
    sightings_kept,
    forget_node TO bascule_admin;

-- Which folders come along.
GRANT SELECT ON folder_rules, left_out TO bascule_admin;
GRANT EXECUTE ON FUNCTION add_folder_rule, remove_folder_rule TO bascule_admin;
GRANT SELECT ON folder_rule, left_out_folder TO bascule_worker;
GRANT EXECUTE ON FUNCTION set_left_out TO bascule_worker;

GRANT SELECT ON domain, mailbox, mailbox_folder, verification, straggler, unreadable_message, unreadable_folder, returned_message,
    routing_domain, gauges TO bascule_worker;
GRANT EXECUTE ON FUNCTION begin_copy, report_progress, stage, begin_cutover, unacknowledged, finish_cutover, undo_cutover,
    undo_overdue_cutovers, stage_straggler, straggler_delivered, renumber_stragglers, requeue_unattended, take_connections, set_unreadable,
    set_unreadable_folders, set_hierarchy, last_message_written, record_verification, begin_return, undo_return, finish_return, intend_return,
    appended, returned, welcomed, trouble_told, home_of, reseal_mailbox, reseal_domain,
    attempt_failed(bigint, text, boolean, interval, text, boolean), attempt_failed(bigint, text, boolean, interval, text),
    sweep_done(bigint, timestamptz, text, text), sweep_done(bigint, timestamptz)
    TO bascule_worker;
GRANT USAGE ON SCHEMA queue TO bascule_worker;
GRANT ALL ON ALL TABLES IN SCHEMA queue TO bascule_worker;
GRANT ALL ON ALL SEQUENCES IN SCHEMA queue TO bascule_worker;
GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA queue TO bascule_worker;

-- It was portal_domain() in the first release.
REVOKE ALL ON FUNCTION domain_of_url FROM bascule_portal;
GRANT EXECUTE ON FUNCTION portal_domain, portal_progress, portal_request, portal_login_name, logged_in_from
    TO bascule_portal;

GRANT SELECT ON routing_domain, routing_mailbox, routing_alias TO bascule_authenticator, bascule_policy_daemon;
GRANT EXECUTE ON FUNCTION beat, sign_off, acknowledge TO bascule_authenticator, bascule_policy_daemon;
GRANT SELECT ON login_mailbox TO bascule_authenticator;
GRANT EXECUTE ON FUNCTION record_login, login_state, request_due_first_logins, share_sources, wants_credential,
    renew_password, take_first_password TO bascule_authenticator;
GRANT EXECUTE ON FUNCTION share_guesses TO bascule_authenticator, bascule_portal;
GRANT EXECUTE ON FUNCTION decline_first_login TO bascule_admin;
GRANT EXECUTE ON FUNCTION first_login_told TO bascule_worker;
GRANT EXECUTE ON FUNCTION record_sighting, record_sightings, undo_overdue_cutovers TO bascule_policy_daemon;
GRANT SELECT ON routing_unmoved TO bascule_policy_daemon, bascule_authenticator;

-- What nodes find by themselves; what an administrator does about a domain that is not to be.
GRANT SELECT ON findings, silent, surveys TO bascule_admin;
GRANT EXECUTE ON FUNCTION record_survey TO bascule_admin;
GRANT EXECUTE ON FUNCTION is_silent TO bascule_admin;
GRANT EXECUTE ON FUNCTION record_findings TO bascule_policy_daemon, bascule_authenticator, bascule_worker;
GRANT EXECUTE ON FUNCTION activate_domain_regardless, remove_domain TO bascule_admin;

GRANT SELECT ON dovecot_user TO bascule_dovecot;
GRANT EXECUTE ON FUNCTION home_of TO bascule_dovecot, bascule_authenticator;
