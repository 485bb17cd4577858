-- Migration: the workers.

CREATE OR REPLACE FUNCTION begin_copy(mailbox_id bigint)
RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
BEGIN
    UPDATE mailbox SET state = 'copying' WHERE id = begin_copy.mailbox_id AND state = 'requested';
    UPDATE mailbox SET attempts = attempts + 1, next_try = NULL, copy_began_at = clock_timestamp(), copied_before = NULL
     WHERE id = begin_copy.mailbox_id AND state = 'copying';
    IF NOT FOUND THEN
        RAISE EXCEPTION 'mailbox % is not to be copied', begin_copy.mailbox_id USING ERRCODE = 'BA002',
            HINT = 'It moved, or was given up, meanwhile.';
    END IF;
END
$$;
COMMENT ON FUNCTION begin_copy IS 'A worker has taken the mailbox up; refused (BA002) when it is not to be copied';

CREATE OR REPLACE FUNCTION report_progress(mailbox_id bigint, copied bigint, total bigint, bytes bigint)
RETURNS boolean LANGUAGE sql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
    UPDATE mailbox SET messages_copied = copied, messages_total = total, bytes_copied = bytes,
        copied_before = coalesce(copied_before, copied)
      FROM domain
     WHERE mailbox.id = report_progress.mailbox_id AND domain.id = mailbox.domain_id
    RETURNING mailbox.state = 'cutover'
           OR (mailbox.state = 'copying' AND mailbox.paused_at IS NULL AND domain.paused_at IS NULL)
$$;
COMMENT ON FUNCTION report_progress IS
    'How far a copy is. False or null: it was paused, given up, or its domain closed, and is to stop.';

CREATE OR REPLACE FUNCTION pause_after(attempts integer)
RETURNS interval LANGUAGE sql VOLATILE AS $$
    -- Whatever stopped many mailboxes at once does not start them all at once again.
    SELECT least(interval '5 seconds' * 2 ^ least(greatest(attempts - 1, 0), 10), interval '15 minutes')
         * (0.8 + 0.4 * random())
$$;
COMMENT ON FUNCTION pause_after IS
    'How long to wait after so many attempts without success: 5 s, 10 s, 20 s, ... at most 15 minutes, '
    'each a fifth shorter or longer at random';

CREATE OR REPLACE FUNCTION task_of(box mailbox)
RETURNS text LANGUAGE sql IMMUTABLE AS $$
    SELECT CASE WHEN box.return_requested_at IS NOT NULL THEN 'return'
                WHEN box.state = 'local' THEN 'sweep' ELSE 'migrate' END
$$;
COMMENT ON FUNCTION task_of IS 'What a worker has to do for a mailbox that is not in state legacy';

CREATE OR REPLACE FUNCTION attempt_failed(
    mailbox_id bigint, message text, refused boolean, at_least interval, advice text, passes boolean
)
RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
DECLARE
    box mailbox;
    the_domain domain;
BEGIN
    SELECT * INTO box FROM mailbox WHERE id = attempt_failed.mailbox_id FOR UPDATE;
    SELECT * INTO the_domain FROM domain WHERE id = box.domain_id;
    IF coalesce(box.state NOT IN ('requested', 'copying', 'local') OR the_domain.mode <> 'active', true) THEN
        RETURN;
    END IF;
    IF advice = '' AND passes THEN
        advice := CASE WHEN box.attempts < 8 THEN 'Nothing: it is tried again at next_try; bascule retry does not wait'
            ELSE 'It lasts: bascule check ' || the_domain.name || ' says what is wrong there. It is tried again at next_try' END;
    END IF;
    UPDATE mailbox SET last_error = printable(message), last_advice = printable(advice), last_error_at = clock_timestamp(),
        -- What was erased meanwhile is waited for, however this attempt ended.
        needs_credential = refused OR (needs_credential AND sealed_credential IS NULL),
        attempts = CASE WHEN mailbox.state = 'local' THEN attempts + 1 ELSE attempts END
     WHERE id = box.id RETURNING * INTO box;
    UPDATE mailbox SET next_try = CASE WHEN NOT box.needs_credential
                                  THEN clock_timestamp() + greatest(pause_after(box.attempts), at_least) END
     WHERE id = box.id RETURNING * INTO box;
    PERFORM note(box, 'attempt failed', box.last_error);
    IF NOT box.needs_credential THEN
        PERFORM enqueue(task_of(box), box.id, box.store, box.next_try);
    END IF;
END
$$;
COMMENT ON FUNCTION attempt_failed(bigint, text, boolean, interval, text, boolean) IS
    'The last attempt did not succeed: kept for the views, and tried again at next_try, no sooner than at_least from now; '
    'refused: the legacy server no longer takes the sealed password, so wait for the new one; '
    'passes: the trouble is of a kind that ends by itself, if there is no other advice';

CREATE OR REPLACE FUNCTION attempt_failed(
    mailbox_id bigint, message text, refused boolean DEFAULT false, at_least interval DEFAULT '0', advice text DEFAULT ''
)
RETURNS void LANGUAGE sql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
    SELECT attempt_failed(mailbox_id, message, refused, at_least, advice, true)
$$;
COMMENT ON FUNCTION attempt_failed(bigint, text, boolean, interval, text) IS
    'As the first release''s workers call it: without other advice, it is tried again';

CREATE OR REPLACE FUNCTION take_connections(domain_id bigint, wanted integer)
RETURNS integer LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
DECLARE
    free integer := (SELECT connections FROM domain WHERE id = take_connections.domain_id);
    taken integer := 0;
BEGIN
    FOR slot IN 1..free LOOP
        EXIT WHEN taken = wanted;
        -- The lock is the worker's session's: it ends with the worker, however that ends.
        IF pg_try_advisory_lock(hashtext('bascule ' || take_connections.domain_id), slot) THEN
            taken := taken + 1;
        END IF;
    END LOOP;
    RETURN taken;
END
$$;
COMMENT ON FUNCTION take_connections IS
    'Reserve up to so many of the domain''s IMAP sessions at the legacy server, until this database session ends; '
    'how many were free';

CREATE OR REPLACE FUNCTION set_unreadable(mailbox_id bigint, messages jsonb, complete boolean)
RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
BEGIN
    DELETE FROM unreadable_message AS old
     WHERE complete AND old.mailbox_id = set_unreadable.mailbox_id AND old.waived_at IS NULL
       AND NOT EXISTS (SELECT FROM jsonb_to_recordset(messages) AS now (folder text, uidvalidity bigint, uid bigint)
                        WHERE (now.folder, now.uidvalidity, now.uid) = (old.folder, old.uidvalidity, old.uid));
    INSERT INTO unreadable_message AS old (mailbox_id, folder, uidvalidity, uid, reason)
    SELECT set_unreadable.mailbox_id, now.folder, now.uidvalidity, now.uid, now.reason
      FROM jsonb_to_recordset(messages) AS now (folder text, uidvalidity bigint, uid bigint, reason text)
    ON CONFLICT ON CONSTRAINT unreadable_message_pkey
    DO UPDATE SET reason = excluded.reason, last_seen = clock_timestamp();
END
$$;
COMMENT ON FUNCTION set_unreadable IS
    'The messages that the legacy server did not give in the last pass; after a complete pass those not among them '
    'are forgotten. What is waived stays waived.';

CREATE OR REPLACE FUNCTION set_unreadable_folders(mailbox_id bigint, reasons jsonb)
RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
BEGIN
    DELETE FROM unreadable_folder AS old
     WHERE old.mailbox_id = set_unreadable_folders.mailbox_id AND old.waived_at IS NULL AND NOT reasons ? old.folder;
    INSERT INTO unreadable_folder AS old (mailbox_id, folder, reason)
    SELECT set_unreadable_folders.mailbox_id, now.key, now.value FROM jsonb_each_text(reasons) AS now
    ON CONFLICT ON CONSTRAINT unreadable_folder_pkey
    DO UPDATE SET reason = excluded.reason, last_seen = clock_timestamp();
END
$$;
COMMENT ON FUNCTION set_unreadable_folders IS
    'The folders that the legacy server lists and that could not be opened or stored, with the reason of each; '
    'others are forgotten. What is waived stays waived.';

DROP FUNCTION IF EXISTS set_hierarchy(bigint, text, text);
CREATE OR REPLACE FUNCTION set_hierarchy(mailbox_id bigint, separator text, prefix text, special_uses jsonb DEFAULT NULL)
RETURNS void LANGUAGE sql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
    UPDATE mailbox SET hierarchy_separator = separator, namespace_prefix = prefix,
        special_uses = coalesce(set_hierarchy.special_uses, mailbox.special_uses)
     WHERE id = set_hierarchy.mailbox_id AND state = 'copying'
       AND (hierarchy_separator, namespace_prefix, mailbox.special_uses)
           IS DISTINCT FROM (separator, prefix, coalesce(set_hierarchy.special_uses, mailbox.special_uses))
$$;
COMMENT ON FUNCTION set_hierarchy IS 'How the legacy server writes folder names, and which folders have a special use; it stays so here';

CREATE OR REPLACE FUNCTION stage(mailbox_id bigint)
RETURNS boolean LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
DECLARE
    before mailbox;
    box mailbox;
BEGIN
    SELECT * INTO before FROM mailbox WHERE id = stage.mailbox_id FOR UPDATE;
    UPDATE mailbox SET staged_at = clock_timestamp(), attempts = 0
     WHERE id = stage.mailbox_id AND state = 'copying' AND flip_at > clock_timestamp() RETURNING * INTO box;
    IF box.id IS NULL THEN
        RETURN false;
    END IF;
    IF before.staged_at IS NULL THEN
        PERFORM note(box, 'copied ahead');
    END IF;
    PERFORM forget_trouble(box.id);
    -- What comes there until the flip is copied now and then, so that little is left for its hour.
    UPDATE mailbox SET next_try = least(flip_at, clock_timestamp() + interval '1 hour' * (0.8 + 0.4 * random()))
     WHERE id = box.id RETURNING * INTO box;
    PERFORM enqueue('migrate', box.id, box.store, box.next_try);
    RETURN true;
END
$$;
COMMENT ON FUNCTION stage IS
    'A mailbox is complete here. True: its hour to flip has not come; it is kept fresh until then. False: it flips now';

CREATE OR REPLACE FUNCTION begin_cutover(mailbox_id bigint)
RETURNS bigint LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
DECLARE
    box mailbox;
BEGIN
    UPDATE mailbox SET state = 'cutover',
        cutover_deadline = clock_timestamp() + (SELECT cutover_budget FROM domain WHERE domain.id = mailbox.domain_id)
     WHERE id = begin_cutover.mailbox_id AND state = 'copying' RETURNING * INTO box;
    IF box.id IS NULL THEN
        RAISE EXCEPTION 'mailbox % is not copying: no cutover', begin_cutover.mailbox_id USING ERRCODE = 'BA002',
            HINT = 'It was paused, given up, or its domain closed, meanwhile.';
    END IF;
    PERFORM refuse_silent_nodes(box);
    RETURN box.epoch;
END
$$;
COMMENT ON FUNCTION begin_cutover IS
    'Hold the mailbox''s mail and logins, for at most the domain''s cutover budget; gives the epoch to be acknowledged. '
    'Refused (BA002) while a node gives no sign of life.';

CREATE OR REPLACE FUNCTION finish_cutover(mailbox_id bigint, epoch bigint, hash text, report jsonb)
RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
BEGIN
    IF hash IS NULL AND EXISTS (SELECT FROM mailbox WHERE id = finish_cutover.mailbox_id
                                   AND imported_hash IS NULL AND NOT without_password) THEN
        RAISE EXCEPTION 'nobody could log in to mailbox % here: no password is known', finish_cutover.mailbox_id
            USING ERRCODE = 'BA002';
    END IF;
    -- The proved password is the newer one: a hash that was brought before is forgotten for it.
    UPDATE mailbox SET state = 'local', cutover_deadline = NULL, password_hash = coalesce(hash, imported_hash),
        imported_hash = CASE WHEN hash IS NULL THEN imported_hash END,
        without_password = hash IS NULL AND imported_hash IS NULL, flip_at = NULL, staged_at = NULL,
        special_uses = coalesce(finish_cutover.report -> 'special_uses', '{}'),
        migrated_at = clock_timestamp(), last_message_at = NULL, welcomed_at = NULL, swept_at = NULL, attempts = 0
     WHERE id = finish_cutover.mailbox_id AND state = 'cutover' AND mailbox.epoch = finish_cutover.epoch
       AND cutover_deadline > clock_timestamp();
    IF NOT FOUND THEN
        RAISE EXCEPTION 'the cutover of mailbox % is over its time or was undone', finish_cutover.mailbox_id
            USING ERRCODE = 'BA002';
    END IF;
    PERFORM refuse_unacknowledged(finish_cutover.mailbox_id, finish_cutover.epoch);
    PERFORM forget_trouble(finish_cutover.mailbox_id);
    INSERT INTO verification AS old (mailbox_id, report) VALUES (finish_cutover.mailbox_id, finish_cutover.report)
    ON CONFLICT ON CONSTRAINT verification_pkey DO UPDATE SET report = excluded.report;
    DELETE FROM mailbox_folder WHERE mailbox_folder.mailbox_id = finish_cutover.mailbox_id;
    INSERT INTO mailbox_folder (mailbox_id, name, uidvalidity, uidnext)
    SELECT finish_cutover.mailbox_id, folder.name, folder.uidvalidity, folder.uidnext
      FROM jsonb_to_recordset(finish_cutover.report -> 'folders')
        AS folder (name text, uidvalidity bigint, uidnext bigint);
    PERFORM set_left_out(finish_cutover.mailbox_id, coalesce(finish_cutover.report -> 'left_out', '[]'), true);
END
$$;
COMMENT ON FUNCTION finish_cutover IS
    'The flip. Refused (BA002) when the cutover was undone, its time is over, or a node has not acknowledged it.';

CREATE OR REPLACE FUNCTION undone_advice()
RETURNS text LANGUAGE sql IMMUTABLE AS $$
    SELECT 'It is tried again at next_try. If it happens again: see the log of its store''s worker, '
           'and whether the domain''s cutover_budget is long enough'
$$;

CREATE OR REPLACE FUNCTION undo_cutover(mailbox_id bigint, reason text)
RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
BEGIN
    PERFORM set_config('bascule.reason', printable(undo_cutover.reason), true);
    UPDATE mailbox SET state = 'copying', cutover_deadline = NULL, last_error = printable(undo_cutover.reason),
        last_advice = undone_advice(), last_error_at = clock_timestamp(),
        next_try = clock_timestamp() + pause_after(attempts)
     WHERE id = undo_cutover.mailbox_id AND state = 'cutover';
    PERFORM set_config('bascule.reason', '', true);
END
$$;
COMMENT ON FUNCTION undo_cutover IS 'Release the held mail to the legacy server and go on copying';

CREATE OR REPLACE FUNCTION undo_overdue_cutovers()
RETURNS void LANGUAGE sql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
    SELECT undo_cutover(id, 'the cutover was not done within its time') FROM mailbox
     WHERE state = 'cutover' AND cutover_deadline <= clock_timestamp();
    WITH overdue AS (
        UPDATE mailbox SET attempts = attempts + 1
         WHERE state = 'returning' AND cutover_deadline <= clock_timestamp() RETURNING id
    )
    SELECT undo_return(id, 'the return was not done within its time') FROM overdue
$$;
COMMENT ON FUNCTION undo_overdue_cutovers IS 'Called at each heartbeat of a policy daemon, so that a dead worker holds nobody''s mail';

CREATE OR REPLACE FUNCTION welcomed(mailbox_id bigint)
RETURNS void LANGUAGE sql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
    UPDATE mailbox SET welcomed_at = clock_timestamp() WHERE id = welcomed.mailbox_id AND state = 'local'
$$;
COMMENT ON FUNCTION welcomed IS 'The welcome is in the mailbox here';

CREATE OR REPLACE FUNCTION trouble_told(mailbox_id bigint)
RETURNS boolean LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
BEGIN
    UPDATE mailbox SET trouble_told_at = clock_timestamp()
     WHERE id = trouble_told.mailbox_id AND needs_credential AND trouble_told_at IS NULL AND state IN ('requested', 'copying')
       AND (SELECT writes_to_users AND mode = 'active' FROM domain WHERE domain.id = mailbox.domain_id);
    RETURN FOUND;
END
$$;
COMMENT ON FUNCTION trouble_told IS
    'True: the user is to be written to now that the move waits for the new password. Each time only once.';

CREATE OR REPLACE FUNCTION requeue_unattended()
RETURNS bigint LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
DECLARE
    box record;
    requeued bigint := 0;
BEGIN
    FOR box IN
        SELECT mailbox.id, mailbox.store, mailbox.next_try, task_of(mailbox) AS task
          FROM mailbox JOIN domain ON domain.id = mailbox.domain_id AND domain.mode = 'active'
         WHERE mailbox.state <> 'legacy' AND NOT mailbox.needs_credential
           AND mailbox.paused_at IS NULL AND domain.paused_at IS NULL
           AND NOT EXISTS (SELECT FROM queue.procrastinate_jobs AS job
                            WHERE job.lock = 'mailbox:' || mailbox.id AND job.status IN ('todo', 'doing'))
    LOOP
        PERFORM enqueue(box.task, box.id, box.store, box.next_try);
        requeued := requeued + 1;
    END LOOP;
    RETURN requeued;
END
$$;
COMMENT ON FUNCTION requeue_unattended IS
    'The state is the truth, the queue only follows it: queue work for mailboxes that have none waiting';
