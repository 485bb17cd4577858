-- After the flip: late messages, the last message, and the way back.

DROP FUNCTION IF EXISTS stage_straggler(bigint, text, bigint, bigint);
CREATE OR REPLACE FUNCTION stage_straggler(
    mailbox_id bigint, folder text, uidvalidity bigint, uid bigint, message_id text DEFAULT '', digest bytea DEFAULT NULL,
    internaldate bigint DEFAULT NULL, flags text[] DEFAULT '{}', name text DEFAULT ''
)
RETURNS void LANGUAGE sql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
    INSERT INTO straggler AS old (mailbox_id, folder, uidvalidity, uid, message_id, digest, internaldate, flags, name)
    VALUES (stage_straggler.mailbox_id, stage_straggler.folder, stage_straggler.uidvalidity, stage_straggler.uid,
            stage_straggler.message_id, stage_straggler.digest, stage_straggler.internaldate, stage_straggler.flags,
            stage_straggler.name)
    -- Its UID is another message's now: the former one is no longer at the legacy server.
    ON CONFLICT ON CONSTRAINT straggler_pkey DO UPDATE SET message_id = excluded.message_id, digest = excluded.digest,
        internaldate = excluded.internaldate, flags = excluded.flags, name = excluded.name, place = '', guid = '',
        staged_at = now(), delivered_at = NULL
     WHERE old.delivered_at IS NOT NULL AND old.name <> excluded.name
$$;
COMMENT ON FUNCTION stage_straggler IS 'The file of a late message is complete beside the mailbox; Message-ID and SHA-256 know it again';

DROP FUNCTION IF EXISTS straggler_delivered(bigint, text, bigint, bigint);
CREATE OR REPLACE FUNCTION straggler_delivered(
    mailbox_id bigint, folder text, uidvalidity bigint, uid bigint, place text DEFAULT '', guid text DEFAULT ''
)
RETURNS void LANGUAGE sql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
    UPDATE straggler SET delivered_at = clock_timestamp(), place = straggler_delivered.place,
        guid = straggler_delivered.guid
     WHERE straggler.mailbox_id = straggler_delivered.mailbox_id AND straggler.folder = straggler_delivered.folder
       AND straggler.uidvalidity = straggler_delivered.uidvalidity AND straggler.uid = straggler_delivered.uid
       AND delivered_at IS NULL
$$;
COMMENT ON FUNCTION straggler_delivered IS 'A late message was put into this folder here, and Dovecot calls it so';

CREATE OR REPLACE FUNCTION renumber_stragglers(mailbox_id bigint, folder text, moves jsonb)
RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
DECLARE
    moved jsonb[];
    kept straggler[];
BEGIN
    SELECT array_agg(old), array_agg(jsonb_build_object('uidvalidity', move.to_uidvalidity, 'uid', move.to_uid))
      INTO kept, moved
      FROM straggler AS old
      JOIN jsonb_to_recordset(moves) AS move (uidvalidity bigint, uid bigint, to_uidvalidity bigint, to_uid bigint)
        ON (old.uidvalidity, old.uid) = (move.uidvalidity, move.uid)
     WHERE old.mailbox_id = renumber_stragglers.mailbox_id AND old.folder = renumber_stragglers.folder;
    -- All are taken out first: two may have changed places. What stood in the way is no longer at the legacy server.
    DELETE FROM straggler AS old
     USING jsonb_to_recordset(moves) AS move (uidvalidity bigint, uid bigint, to_uidvalidity bigint, to_uid bigint)
     WHERE old.mailbox_id = renumber_stragglers.mailbox_id AND old.folder = renumber_stragglers.folder
       AND (old.uidvalidity, old.uid) IN ((move.uidvalidity, move.uid), (move.to_uidvalidity, move.to_uid));
    FOR number IN 1 .. coalesce(array_length(kept, 1), 0) LOOP
        INSERT INTO straggler SELECT (jsonb_populate_record(kept[number], moved[number])).*;
    END LOOP;
END
$$;
COMMENT ON FUNCTION renumber_stragglers IS
    'The legacy server has numbered late messages of a folder anew: an array of {uidvalidity, uid, to_uidvalidity, to_uid}';

CREATE OR REPLACE FUNCTION sweep_done(mailbox_id bigint, began timestamptz, trouble text, advice text)
RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
DECLARE
    box mailbox;
    the_domain domain;
BEGIN
    UPDATE mailbox SET attempts = 0, swept_at = began
     WHERE id = sweep_done.mailbox_id AND state = 'local' RETURNING * INTO box;
    PERFORM forget_trouble(box.id);
    UPDATE mailbox SET last_error = printable(sweep_done.trouble), last_advice = sweep_done.advice,
        last_error_at = clock_timestamp()
     WHERE id = box.id AND sweep_done.trouble IS NOT NULL;
    SELECT * INTO the_domain FROM domain WHERE id = box.domain_id;
    IF the_domain.mode = 'active' AND box.paused_at IS NULL AND the_domain.paused_at IS NULL THEN
        PERFORM enqueue('sweep', box.id, box.store, clock_timestamp() + the_domain.sweep_interval);
    END IF;
END
$$;
COMMENT ON FUNCTION sweep_done(bigint, timestamptz, text, text) IS
    'A sweep that began then found all there was; the next one is queued while the domain is active. '
    'trouble: what is wrong all the same, the last message that is not taken, say; and advice.';

CREATE OR REPLACE FUNCTION sweep_done(mailbox_id bigint, began timestamptz)
RETURNS void LANGUAGE sql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
    SELECT sweep_done(mailbox_id, began, NULL, NULL);
    UPDATE mailbox SET last_message_at = coalesce(last_message_at, clock_timestamp())
     WHERE id = sweep_done.mailbox_id AND state = 'local'
$$;
COMMENT ON FUNCTION sweep_done(bigint, timestamptz) IS
    'As the first release''s workers call it: they have written the last message then';

CREATE OR REPLACE FUNCTION last_message_written(mailbox_id bigint)
RETURNS void LANGUAGE sql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
    UPDATE mailbox SET last_message_at = clock_timestamp()
     WHERE id = last_message_written.mailbox_id AND state = 'local' AND last_message_at IS NULL
$$;
COMMENT ON FUNCTION last_message_written IS 'The last message is in the legacy mailbox';

CREATE OR REPLACE FUNCTION waive_last_message(address text, reason text)
RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
DECLARE
    box mailbox := mailbox_of(address);
BEGIN
    PERFORM insist_on_reason(waive_last_message.reason, format('say why %s needs no last message', address));
    IF box.state <> 'local' OR box.last_message_at IS NOT NULL THEN
        RAISE EXCEPTION 'no last message of % is to be written', address USING ERRCODE = 'BA002';
    END IF;
    UPDATE mailbox SET last_message_at = clock_timestamp(), next_try = now() WHERE id = box.id;
    PERFORM note(box, 'last message waived', waive_last_message.reason);
    PERFORM enqueue('sweep', box.id, box.store, now());
END
$$;
COMMENT ON FUNCTION waive_last_message IS
    'Decide that the last message, which the legacy server does not take, need not be in the legacy mailbox';

DROP FUNCTION IF EXISTS return_mailbox(text, text);
CREATE OR REPLACE FUNCTION return_mailbox(address text, reason text, force boolean DEFAULT false)
RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
DECLARE
    the_domain domain := lock_domain_of(address);
    box mailbox := mailbox_of(address);
BEGIN
    IF box.state <> 'local' THEN
        RAISE EXCEPTION '% is in state %: only a mailbox that has moved can be returned', address, box.state
            USING ERRCODE = 'BA002', HINT = 'One that is on the move is stopped by bascule give-up.';
    END IF;
    IF the_domain.mode <> 'active' THEN
        RAISE EXCEPTION '% is %: its legacy server is not used any more', the_domain.name, the_domain.mode
            USING ERRCODE = 'BA002';
    END IF;
    PERFORM insist_on_reason(return_mailbox.reason, format('say why %s is to be returned', address));
    UPDATE mailbox SET return_requested_at = clock_timestamp(), return_reason = return_mailbox.reason,
        return_forced = return_mailbox.force, attempts = 0
     WHERE id = box.id;
    PERFORM enqueue('return', box.id, box.store);
    PERFORM note(the_domain, CASE WHEN force THEN 'return requested by force' ELSE 'return requested' END,
                 return_mailbox.reason, lower(address));
END
$$;
COMMENT ON FUNCTION return_mailbox IS
    'Send a mailbox that has moved back to the legacy server: what is new or changed here is written there, then the route '
    'flips. force: also when most of a folder is gone here, or a folder was made anew there.';

CREATE OR REPLACE FUNCTION cancel_return(address text)
RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
DECLARE
    box mailbox := mailbox_of(address);
BEGIN
    IF box.return_requested_at IS NULL OR box.state <> 'local' THEN
        RAISE EXCEPTION 'no return of % can be called off now', address USING ERRCODE = 'BA002';
    END IF;
    -- What was appended there stays, and returned_message knows it: no sweep brings it here, no later return appends
    -- it again. The last message may be gone there already: the next sweep writes it again if so.
    UPDATE mailbox SET return_requested_at = NULL, return_reason = NULL, return_forced = false, last_message_at = NULL,
        attempts = 0
     WHERE id = box.id;
    PERFORM forget_trouble(box.id);
    PERFORM note(box, 'return called off');
    PERFORM enqueue('sweep', box.id, box.store);
END
$$;
COMMENT ON FUNCTION cancel_return IS
    'Call off a return; what it has appended at the legacy server stays there, and is not taken for late mail';

CREATE OR REPLACE FUNCTION begin_return(mailbox_id bigint)
RETURNS bigint LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
DECLARE
    box mailbox;
BEGIN
    PERFORM set_config('bascule.reason', (SELECT return_reason FROM mailbox WHERE id = begin_return.mailbox_id), true);
    UPDATE mailbox SET state = 'returning',
        cutover_deadline = clock_timestamp() + (SELECT cutover_budget FROM domain WHERE domain.id = mailbox.domain_id)
     WHERE id = begin_return.mailbox_id AND state = 'local' AND return_requested_at IS NOT NULL RETURNING * INTO box;
    IF box.id IS NULL THEN
        RAISE EXCEPTION 'mailbox % is not to be returned', begin_return.mailbox_id USING ERRCODE = 'BA002',
            HINT = 'Its return was called off, or its domain closed, meanwhile.';
    END IF;
    PERFORM refuse_silent_nodes(box);
    RETURN box.epoch;
END
$$;
COMMENT ON FUNCTION begin_return IS
    'Hold the mailbox''s mail and logins for the last step of its return, for at most the domain''s cutover budget';

CREATE OR REPLACE FUNCTION undo_return(mailbox_id bigint, reason text)
RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
DECLARE
    box mailbox;
BEGIN
    PERFORM set_config('bascule.reason', printable(undo_return.reason), true);
    -- attempt_failed() counts the attempt, if a worker is there to call it.
    UPDATE mailbox SET state = 'local', cutover_deadline = NULL, last_error = printable(undo_return.reason),
        last_advice = undone_advice(), last_error_at = clock_timestamp(),
        next_try = clock_timestamp() + pause_after(attempts + 1)
     WHERE id = undo_return.mailbox_id AND state = 'returning' RETURNING * INTO box;
    PERFORM set_config('bascule.reason', '', true);
    IF box.id IS NOT NULL THEN
        PERFORM enqueue('return', box.id, box.store, box.next_try);
    END IF;
END
$$;
COMMENT ON FUNCTION undo_return IS 'Deliver the held mail here and try the return again later';

DROP FUNCTION IF EXISTS finish_return(bigint, bigint);
CREATE OR REPLACE FUNCTION finish_return(mailbox_id bigint, epoch bigint, left_behind text DEFAULT '')
RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
DECLARE
    box mailbox;
BEGIN
    PERFORM set_config('bascule.reason', (SELECT return_reason FROM mailbox WHERE id = finish_return.mailbox_id), true);
    UPDATE mailbox SET state = 'legacy', cutover_deadline = NULL, return_requested_at = NULL, return_reason = NULL,
        return_forced = false, password_hash = NULL, sealed_credential = NULL, needs_credential = false,
        migrated_at = NULL, last_message_at = NULL, swept_at = NULL, attempts = 0
     WHERE id = finish_return.mailbox_id AND state = 'returning' AND mailbox.epoch = finish_return.epoch
       AND cutover_deadline > clock_timestamp()
    RETURNING * INTO box;
    IF box.id IS NULL THEN
        RAISE EXCEPTION 'the return of mailbox % is over its time or was undone', finish_return.mailbox_id
            USING ERRCODE = 'BA002';
    END IF;
    PERFORM refuse_unacknowledged(finish_return.mailbox_id, finish_return.epoch);
    PERFORM forget_trouble(finish_return.mailbox_id);
    IF left_behind <> '' THEN
        PERFORM note(box, 'not returned', printable(left_behind));
    END IF;
    DELETE FROM verification WHERE verification.mailbox_id = finish_return.mailbox_id;
    DELETE FROM mailbox_folder WHERE mailbox_folder.mailbox_id = finish_return.mailbox_id;
    DELETE FROM straggler WHERE straggler.mailbox_id = finish_return.mailbox_id;
    DELETE FROM returned_message WHERE returned_message.mailbox_id = finish_return.mailbox_id;
    DELETE FROM unreadable_message WHERE unreadable_message.mailbox_id = finish_return.mailbox_id;
    DELETE FROM unreadable_folder WHERE unreadable_folder.mailbox_id = finish_return.mailbox_id;
END
$$;
COMMENT ON FUNCTION finish_return IS
    'The flip back. Refused (BA002) when the return was undone, its time is over, or a node has not acknowledged it. '
    'left_behind: what was not written there, in words, for the journal.';

DROP FUNCTION IF EXISTS intend_return(bigint, text, bigint, text, bytea, bigint);
CREATE OR REPLACE FUNCTION intend_return(
    mailbox_id bigint, folder text, uid bigint, guid text, digest bytea, legacy_uidnext bigint,
    legacy_uidvalidity bigint DEFAULT NULL, internaldate bigint DEFAULT NULL, message_id text DEFAULT ''
)
RETURNS void LANGUAGE sql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
    INSERT INTO returned_message
        (mailbox_id, folder, uid, guid, digest, legacy_uidnext, legacy_uidvalidity, internaldate, message_id)
    VALUES (intend_return.mailbox_id, intend_return.folder, intend_return.uid, intend_return.guid, intend_return.digest,
            intend_return.legacy_uidnext, intend_return.legacy_uidvalidity, intend_return.internaldate,
            intend_return.message_id)
    ON CONFLICT ON CONSTRAINT returned_message_pkey DO UPDATE SET guid = excluded.guid, digest = excluded.digest,
        legacy_uidnext = excluded.legacy_uidnext, legacy_uidvalidity = excluded.legacy_uidvalidity,
        internaldate = excluded.internaldate, message_id = excluded.message_id, legacy_uid = NULL, appended_at = NULL
$$;
COMMENT ON FUNCTION intend_return IS 'A message is about to be appended to the legacy mailbox';

CREATE OR REPLACE FUNCTION appended(mailbox_id bigint, folder text, uid bigint)
RETURNS void LANGUAGE sql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
    UPDATE returned_message SET appended_at = clock_timestamp()
     WHERE returned_message.mailbox_id = appended.mailbox_id AND returned_message.folder = appended.folder
       AND returned_message.uid = appended.uid
$$;
COMMENT ON FUNCTION appended IS 'The legacy server said OK to the APPEND, and not which UID it gave';

CREATE OR REPLACE FUNCTION returned(mailbox_id bigint, folder text, uid bigint, legacy_uid bigint)
RETURNS void LANGUAGE sql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
    UPDATE returned_message
       SET legacy_uid = returned.legacy_uid, appended_at = coalesce(appended_at, clock_timestamp())
     WHERE returned_message.mailbox_id = returned.mailbox_id AND returned_message.folder = returned.folder
       AND returned_message.uid = returned.uid
$$;
COMMENT ON FUNCTION returned IS 'The message is in the legacy mailbox, with this UID there';
