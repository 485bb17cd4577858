-- Views: what administrators and programs may read. They are a public interface:
-- a column keeps its name and meaning, new ones are added at the end, and none is
-- ever dropped, for an operator's own views and grants stand on it. See docs/administration.md.

CREATE OR REPLACE VIEW mailboxes AS
SELECT mailbox.full_address AS address, domain.name AS domain, mailbox.state, mailbox.trigger,
       mailbox.first_name, mailbox.last_name, mailbox.store,
       mailbox.messages_copied, mailbox.messages_total, mailbox.bytes_copied, mailbox.state_since,
       mailbox.attempts,
       CASE WHEN mailbox.paused_at IS NOT NULL THEN 'paused: ' || mailbox.pause_reason
            WHEN mailbox.needs_credential AND mailbox.sealed_credential IS NULL THEN
                'waits for the user''s password: the one we kept was erased when the legacy server changed'
            WHEN mailbox.needs_credential THEN
                'waits for the user''s new password: the legacy server refuses the one we keep'
            WHEN unreadable.mailbox_id IS NOT NULL THEN 'the legacy server does not give every message or folder'
            ELSE mailbox.last_error END AS problem,
       mailbox.last_error_at AS problem_at, mailbox.next_try, mailbox.migrated_at, mailbox.last_message_at,
       mailbox.swept_at, mailbox.return_requested_at,
       CASE WHEN mailbox.state = 'local' THEN 100
            WHEN mailbox.state IN ('copying', 'cutover') AND mailbox.messages_total > 0
                THEN least(100 * mailbox.messages_copied / mailbox.messages_total, 100)
            ELSE 0 END::integer AS percent,
       messages_per_second(mailbox) AS messages_per_second,
       CASE WHEN mailbox.state = 'copying' THEN remaining(mailbox) END AS remaining,
       CASE WHEN mailbox.paused_at IS NOT NULL THEN 'Let it go on when it may: bascule resume'
            WHEN mailbox.needs_credential AND mailbox.state = 'local' THEN
                'Late messages are not brought until then: bascule request, if you know the new one'
            WHEN mailbox.needs_credential THEN
                'Have the user log in here, or ask at the URL, with the new one; or bascule request, if you know it'
            WHEN unreadable.mailbox_id IS NOT NULL THEN
                'See bascule.unreadable: have them mended at the legacy server, or bascule waive-messages'
            WHEN mailbox.last_error IS NOT NULL THEN
                coalesce(nullif(mailbox.last_advice, ''),
                         'See the log of the worker at its store; then bascule retry, which does not wait for next_try')
            END AS advice,
       coalesce(mailbox.language, domain.language) AS language, mailbox.needs_credential AS needs_password,
       mailbox.flip_at, mailbox.staged_at,
       CASE WHEN mailbox.state IN ('local', 'returning') THEN
                CASE WHEN mailbox.password_hash IS NULL THEN 'none'
                     WHEN mailbox.password_hash = mailbox.imported_hash THEN 'imported' ELSE 'proved' END
            WHEN mailbox.sealed_credential IS NOT NULL AND NOT mailbox.needs_credential THEN 'proved'
            WHEN mailbox.imported_hash IS NOT NULL THEN 'imported' ELSE 'none' END AS password,
       mailbox.legacy_login
  FROM mailbox JOIN domain ON domain.id = mailbox.domain_id
  LEFT JOIN (SELECT mailbox_id FROM unreadable_message WHERE waived_at IS NULL
              UNION SELECT mailbox_id FROM unreadable_folder WHERE waived_at IS NULL) AS unreadable
    ON unreadable.mailbox_id = mailbox.id;
COMMENT ON VIEW mailboxes IS 'Every mailbox we know of, where it stands, and what the last trouble with it was';
COMMENT ON COLUMN mailboxes.percent IS 'Of the messages, how many are copied; 100: the mailbox has moved';
COMMENT ON COLUMN mailboxes.messages_per_second IS 'Since its worker took it up; null: it is not being copied';
COMMENT ON COLUMN mailboxes.remaining IS 'How long the rest of the copy will take at this rate';
COMMENT ON COLUMN mailboxes.problem IS 'The last trouble, in words; null: none';
COMMENT ON COLUMN mailboxes.needs_password IS 'Whether it waits for the user''s new password';
COMMENT ON COLUMN mailboxes.flip_at IS
    'It is copied and kept fresh, and does not flip before; infinity: until an administrator says when; null: it flips as soon as it can';
COMMENT ON COLUMN mailboxes.staged_at IS 'When it was last complete here, but for the flip; null: it was not yet';
COMMENT ON COLUMN mailboxes.password IS
    'Which password is good here after the flip: proved (the legacy server took it, or a login here renewed it), imported (a hash '
    'that was brought), none';
COMMENT ON COLUMN mailboxes.legacy_login IS
    'The name by which the legacy server knows the user; null: what the domain''s login_form makes of the address';
COMMENT ON COLUMN mailboxes.advice IS 'What to do about the problem';

CREATE OR REPLACE VIEW migrated AS SELECT * FROM mailboxes WHERE state = 'local' AND return_requested_at IS NULL;
COMMENT ON VIEW migrated IS 'Users who have moved';

CREATE OR REPLACE VIEW pending AS
SELECT * FROM mailboxes WHERE state IN ('requested', 'copying', 'cutover', 'returning') OR return_requested_at IS NOT NULL;
COMMENT ON VIEW pending IS 'Users who are on the move';

CREATE OR REPLACE VIEW failed AS
SELECT address, domain, state, problem, advice, attempts, problem_at, next_try FROM mailboxes WHERE problem IS NOT NULL;
COMMENT ON VIEW failed IS
    'Mailboxes with which something is wrong: what it is, what to do, and when it is tried again (null: not by itself)';

CREATE OR REPLACE VIEW forgotten AS
SELECT sighting.local_part || '@' || domain.name AS address, domain.name AS domain,
       sighting.messages, sighting.first_seen, sighting.last_seen
  FROM sighting JOIN domain ON domain.id = sighting.domain_id
 WHERE sighting.waived_at IS NULL
   AND NOT EXISTS (SELECT FROM mailbox WHERE mailbox.domain_id = sighting.domain_id
                      AND mailbox.local_part = sighting.local_part
                      AND mailbox.state IN ('requested', 'copying', 'cutover', 'returning'));
COMMENT ON VIEW forgotten IS
    'Addresses that the legacy server takes mail for and that are neither moved, nor moving, nor an alias here, nor '
    'waived: people who did not come, and technical addresses that nobody thinks of';

CREATE OR REPLACE VIEW stragglers AS
SELECT mailbox.full_address AS address, straggler.folder, straggler.uid,
       straggler.staged_at, straggler.delivered_at, domain.name AS domain
  FROM straggler JOIN mailbox ON mailbox.id = straggler.mailbox_id JOIN domain ON domain.id = mailbox.domain_id;
COMMENT ON VIEW stragglers IS 'Messages that reached a legacy mailbox after its owner moved, and when each was brought here';

CREATE OR REPLACE VIEW unreadable AS
SELECT mailbox.full_address AS address, message.folder, message.uid, message.reason,
       message.first_seen, message.last_seen, message.waived_at, message.waived_reason, domain.name AS domain
  FROM (SELECT mailbox_id, folder, uid, reason, first_seen, last_seen, waived_at, waived_reason FROM unreadable_message
         UNION ALL
        SELECT mailbox_id, folder, NULL, reason, first_seen, last_seen, waived_at, waived_reason FROM unreadable_folder) AS message
  JOIN mailbox ON mailbox.id = message.mailbox_id JOIN domain ON domain.id = mailbox.domain_id;
COMMENT ON VIEW unreadable IS
    'Messages, and whole folders (uid is null), that the legacy server says it has and does not give, and which of them '
    'were waived: a mailbox with one that is not waived is copied but not cut over';

CREATE OR REPLACE VIEW folder_rules AS
SELECT domain.name AS domain, rule.kind, rule.folder, rule.action, rule.name_here, rule.special_use_here, rule.created_at
  FROM folder_rule AS rule JOIN domain ON domain.id = rule.domain_id;
COMMENT ON VIEW folder_rules IS
    'Which folders are left out, or get another name or special use here: add_folder_rule(), remove_folder_rule()';

CREATE OR REPLACE VIEW left_out AS
SELECT mailbox.full_address AS address, left_out_folder.folder, left_out_folder.messages, left_out_folder.reason,
       left_out_folder.noted_at, mailbox.state, domain.name AS domain
  FROM left_out_folder JOIN mailbox ON mailbox.id = left_out_folder.mailbox_id
  JOIN domain ON domain.id = mailbox.domain_id;
COMMENT ON VIEW left_out IS
    'The folders that a rule leaves at the legacy server, mailbox by mailbox: before the flip as the last pass saw them, after it as they were then';
COMMENT ON COLUMN left_out.folder IS 'As on the wire (modified UTF-7)';
COMMENT ON COLUMN left_out.messages IS 'How many it had; null: the legacy server does not say';

CREATE OR REPLACE VIEW verifications AS
SELECT mailbox.full_address AS address, domain.name AS domain, mailbox.first_name, mailbox.last_name,
       mailbox.trigger, mailbox.migrated_at,
       jsonb_array_length(report -> 'folders') AS folders, counted.messages, counted.bytes,
       report -> 'folders' AS folder_list, report -> 'waived' AS waived, report -> 'notes' AS notes,
       report -> 'odd_sizes' AS odd_sizes,
       (SELECT count(*) FROM straggler WHERE straggler.mailbox_id = mailbox.id AND delivered_at IS NOT NULL) AS stragglers,
       (report ->> 'bodies_compared')::bigint AS bodies_compared, verification.verified_again_at, verification.again,
       CASE WHEN mailbox.password_hash IS NULL THEN 'none'
            WHEN mailbox.password_hash = mailbox.imported_hash THEN 'imported' ELSE 'proved' END AS password,
       (SELECT coalesce(jsonb_agg(jsonb_build_object('name', folder, 'reason', reason, 'messages', left_out_folder.messages)
                                  ORDER BY folder), '[]')
          FROM left_out_folder WHERE left_out_folder.mailbox_id = mailbox.id) AS left_out
  FROM verification JOIN mailbox ON mailbox.id = verification.mailbox_id JOIN domain ON domain.id = mailbox.domain_id,
       LATERAL (SELECT coalesce(sum((folder ->> 'messages')::bigint), 0)::bigint AS messages,
                       coalesce(sum((folder ->> 'bytes')::bigint), 0)::bigint AS bytes
                  FROM jsonb_array_elements(report -> 'folders') AS folder) AS counted;
COMMENT ON VIEW verifications IS
    'What was compared at each cutover, folder by folder, and found equal on both sides: UIDVALIDITY, UIDs, flags, keywords, INTERNALDATE';
COMMENT ON COLUMN verifications.folder_list IS '[{"name", "uidvalidity", "uidnext", "messages", "bytes"}], names in modified UTF-7';
COMMENT ON COLUMN verifications.waived IS 'Messages that did not come, as an administrator decided';
COMMENT ON COLUMN verifications.notes IS 'What could not be taken along, in words: POP3 UIDLs, Sieve scripts';
COMMENT ON COLUMN verifications.password IS 'Which password is good here now, as in mailboxes: of "none", nobody can log in without the legacy server';
COMMENT ON COLUMN verifications.odd_sizes IS 'Messages whose size the legacy server states wrongly';
COMMENT ON COLUMN verifications.left_out IS
    '[{"name", "reason", "messages" or null}]: folders that a rule left at the legacy server, names in modified UTF-7';
COMMENT ON COLUMN verifications.stragglers IS 'Messages that were brought after the cutover';

CREATE OR REPLACE VIEW closing_obstacles AS
SELECT domain, address, 'receives mail at the legacy server, last on ' || to_char(last_seen, 'YYYY-MM-DD HH24:MI') AS why,
       'Move it (bascule request), assign it to a mailbox (bascule alias), or give it up (bascule waive)' AS remedy,
       'mail for it will be refused' AS consequence, true AS is_forgotten
  FROM forgotten
UNION ALL
SELECT domain.name, '*@' || domain.name, 'receives mail at more addresses than are counted',
       'The legacy server takes mail for any address. Give up what is not a person''s (bascule waive), and have it take no more',
       'mail for those that are not counted will be refused', true
  FROM domain WHERE (SELECT count(*) FROM sighting WHERE domain_id = domain.id) >= sightings_kept()
UNION ALL
SELECT domain, address, CASE WHEN return_requested_at IS NULL THEN 'in state ' || state ELSE 'is being returned' END
           || coalesce(': ' || problem, ''),
       coalesce(advice, 'Wait until it is done, or stop it (bascule give-up, bascule cancel-return)'),
       CASE WHEN return_requested_at IS NULL THEN 'its move will be given up; mail for it will be refused'
            ELSE 'its return will be called off; it stays here' END, false
  FROM pending
UNION ALL
SELECT domain.name, mailbox.full_address, 'is known, but has not moved',
       'Move it (bascule request), or give it up (bascule waive)', 'mail for it will be refused', false
  FROM mailbox JOIN domain ON domain.id = mailbox.domain_id
  LEFT JOIN sighting ON sighting.domain_id = mailbox.domain_id AND sighting.local_part = mailbox.local_part
 WHERE mailbox.state = 'legacy' AND sighting.domain_id IS NULL
UNION ALL
SELECT domain, address, 'a message that came late is not yet in the mailbox here',
       'Wait for the next sweep, or do not: bascule retry', 'that message will stay at the legacy server', false
  FROM stragglers WHERE delivered_at IS NULL
UNION ALL
SELECT stragglers.domain, stragglers.address,
       'a message still reached the legacy mailbox on ' || to_char(max(staged_at), 'YYYY-MM-DD HH24:MI'),
       'Somebody writes there past the MX: find out who (see bascule.stragglers), and wait for a quiet period',
       'what comes there from now on will not be brought here', false
  FROM stragglers JOIN domain ON domain.name = stragglers.domain
 WHERE delivered_at IS NOT NULL AND staged_at > now() - domain.quiet_period
 GROUP BY 1, 2
UNION ALL
SELECT domain.name, mailbox.full_address, 'moved, but no password is known here: its first login is asked about at the legacy server',
       'Have its user log in here once, or bring its hash (bascule password import)', 'nobody will be able to log in to it', false
  FROM mailbox JOIN domain ON domain.id = mailbox.domain_id
 WHERE mailbox.state = 'local' AND mailbox.password_hash IS NULL
UNION ALL
-- As long as one user is there, the legacy server may deliver to those who have moved.
SELECT domain.name, mailbox.full_address,
       CASE WHEN mailbox.last_message_at IS NULL THEN 'moved, but its last message is not yet written'
            ELSE 'moved, but its legacy mailbox was not looked at since the last user moved' END,
       CASE WHEN mailbox.last_error IS NULL THEN 'Wait for the next sweep, or do not: bascule retry'
            ELSE 'Its sweeps fail: see bascule.failed' END,
       'what a colleague wrote there meanwhile will not be brought here', false
  FROM domain
  JOIN mailbox ON mailbox.domain_id = domain.id AND mailbox.state = 'local' AND mailbox.return_requested_at IS NULL,
       LATERAL (SELECT max(migrated_at) AS last_move FROM mailbox AS other
                 WHERE other.domain_id = domain.id AND other.state = 'local') AS moves
 WHERE mailbox.last_message_at IS NULL OR mailbox.swept_at < moves.last_move;
COMMENT ON VIEW closing_obstacles IS 'Why a domain cannot be closed, address by address';
COMMENT ON COLUMN closing_obstacles.remedy IS 'What to do about it';
COMMENT ON COLUMN closing_obstacles.consequence IS 'What happens if the domain is closed by force all the same';
COMMENT ON COLUMN closing_obstacles.is_forgotten IS 'Whether it is an address of the view forgotten';

CREATE OR REPLACE VIEW domains AS
SELECT domain.name AS domain, domain.mode, domain.url_token, domain.url_expires_at,
       domain.imap_host || ':' || domain.imap_port AS legacy_imap,
       domain.smtp_host || ':' || domain.smtp_port AS legacy_smtp,
       boxes.local - moving.to_be_returned AS migrated, moving.pending,
       coalesce(obstacles.forgotten, 0) AS forgotten,
       boxes.known, trouble.failed,
       coalesce(obstacles.count, 0) AS obstacles,
       lately.moved_last_hour,
       interval '1 hour' * moving.pending / nullif(lately.moved_last_hour, 0) AS remaining,
       CASE WHEN domain.mode = 'prepared' THEN 'not yet activated: bascule check, then bascule activate'
            WHEN domain.mode = 'closed' THEN 'done: the legacy server is not used any more'
            WHEN domain.paused_at IS NOT NULL THEN 'paused: ' || domain.pause_reason
            WHEN domain.url_expires_at < now() THEN 'the users'' URL has expired: bascule rotate-url'
            WHEN obstacles.count > 0
                THEN 'under way: bascule.closing_obstacles says what is left'
            ELSE 'ready to be closed: bascule close' END AS readiness
  FROM domain
  -- Each count is asked for as an index can tell it.
  LEFT JOIN LATERAL (SELECT count(*) AS known, count(*) FILTER (WHERE state = 'local') AS local
               FROM mailbox WHERE domain_id = domain.id) AS boxes ON true
  LEFT JOIN LATERAL (SELECT count(*) AS pending, count(*) FILTER (WHERE state = 'local') AS to_be_returned
               FROM mailbox WHERE domain_id = domain.id
                AND (state IN ('requested', 'copying', 'cutover', 'returning') OR return_requested_at IS NOT NULL)) AS moving ON true
  LEFT JOIN LATERAL (SELECT count(*) AS failed FROM mailbox WHERE domain_id = domain.id
                AND (needs_credential OR last_error IS NOT NULL OR paused_at IS NOT NULL)) AS trouble ON true
  LEFT JOIN LATERAL (SELECT count(*) AS moved_last_hour FROM mailbox WHERE domain_id = domain.id
                AND state = 'local' AND migrated_at > now() - interval '1 hour') AS lately ON true
  LEFT JOIN (SELECT domain, count(*), count(*) FILTER (WHERE is_forgotten) AS forgotten
               FROM closing_obstacles GROUP BY domain) AS obstacles ON obstacles.domain = domain.name;
COMMENT ON VIEW domains IS 'The domains in migration, how far each is, and what it waits for';
COMMENT ON COLUMN domains.known IS 'Mailboxes that we know of, in any state';
COMMENT ON COLUMN domains.remaining IS 'How long those that are pending will take at the rate of the last hour; null: nobody moved in it';
COMMENT ON COLUMN domains.readiness IS 'What the domain waits for, in words';

CREATE OR REPLACE VIEW events AS SELECT * FROM journal;
COMMENT ON VIEW events IS 'The journal: every change of state, when, who and why';

CREATE OR REPLACE VIEW parts AS
SELECT part, name, heartbeat_at,
       signed_off_at IS NULL AND heartbeat_at > clock_timestamp() - interval '15 seconds' AS alive FROM node
UNION ALL
SELECT 'worker', 'worker ' || id, last_heartbeat, last_heartbeat > clock_timestamp() - interval '15 seconds'
  FROM queue.procrastinate_workers;
COMMENT ON VIEW parts IS
    'The running parts and their last sign of life. One that ended in good order is not here, but for an authenticator: '
    'flips wait for each that is here and is not a worker.';

CREATE OR REPLACE VIEW silent AS
SELECT node.part, node.name AS node, node.heartbeat_at AS last_sign,
       format('%s on %s gives no sign of life since %s: no mailbox flips', node.part, node.name,
              to_char(node.heartbeat_at, 'YYYY-MM-DD HH24:MI:SS')) AS problem,
       format('Start it there, or see its log. If that host is gone for good: bascule node forget %s %s --reason WHY',
              node.name, node.part) AS advice
  FROM node WHERE is_silent(node)
UNION ALL
SELECT needed.part, NULL, NULL, format('no %s runs on any host: no mailbox flips', needed.part),
       format('Start bascule-%s', replace(needed.part, '_', '-'))
  FROM unnest(ARRAY['policy_daemon', 'authenticator']) AS needed (part)
 WHERE NOT EXISTS (SELECT FROM node WHERE node.part = needed.part);
COMMENT ON VIEW silent IS
    'Policy daemons and authenticators that give no sign of life: each flip waits for them, until they are back or forgotten';
COMMENT ON COLUMN silent.node IS 'Null: there is none of that part at all';

CREATE OR REPLACE VIEW surveys AS
SELECT survey.local_part || '@' || domain.name AS address, domain.name AS domain, survey.surveyed_at,
       survey.messages, survey.folders, survey.bytes, survey.largest,
       CASE WHEN survey.findings @> '[{"level": "wrong"}]' THEN 'wrong'
            WHEN survey.findings @> '[{"level": "note"}]' THEN 'note' ELSE 'good' END AS level,
       ARRAY(SELECT each ->> 'text' FROM jsonb_array_elements(survey.findings) AS each) AS differences,
       survey.findings
  FROM survey JOIN domain ON domain.id = survey.domain_id;
COMMENT ON VIEW surveys IS
    'What bascule survey saw of each legacy mailbox, and what of it will not come along or look different';
COMMENT ON COLUMN surveys.level IS 'good: it comes along as it is; note: with these differences; wrong: not until it is corrected';
COMMENT ON COLUMN surveys.differences IS 'In words';
COMMENT ON COLUMN surveys.findings IS '[{"level", "area", "text", "remedy", "name"}]; name: the check, see bascule check --list';
