-- The acts. Each is the only way to do what it does; each refuses with a
-- message for a person (SQLSTATE class BA) and then has changed nothing.
--
--   BA001  the address is not in a domain that we know
--   BA002  this may not be done in the present state
--   BA003  no such domain, mailbox or URL
--   BA004  the domain cannot be closed yet
--   BA005  the address is another name of a mailbox

-- Addresses --------------------------------------------------------------

CREATE OR REPLACE FUNCTION domain_of(address text)
RETURNS domain LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
DECLARE
    found_domain domain;
BEGIN
    SELECT * INTO found_domain FROM domain WHERE name = lower(substring(address FROM '@([^@]+)$'));
    IF found_domain IS NULL OR address !~ '^.+@[^@]+$' THEN
        RAISE EXCEPTION '% is not an address of a domain known here', address
            USING ERRCODE = 'BA001', HINT = 'The domains are in the view bascule.domains.';
    END IF;
    RETURN found_domain;
END
$$;
COMMENT ON FUNCTION domain_of IS 'The domain of an address, or BA001';

CREATE OR REPLACE FUNCTION local_part_of(address text)
RETURNS text LANGUAGE sql IMMUTABLE AS $$ SELECT lower(regexp_replace(address, '@[^@]+$', '')) $$;

CREATE OR REPLACE FUNCTION home_of(domain_name text, local_part text)
RETURNS text LANGUAGE sql IMMUTABLE AS $$
    SELECT domain_name || '/' || regexp_replace(replace(local_part, '/', '%2F'), '^\.', '%2E')
$$;
COMMENT ON FUNCTION home_of IS 'The home of a mailbox below mail_root; the local part is one path component';

CREATE OR REPLACE FUNCTION mailbox_of(address text)
RETURNS mailbox LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
DECLARE
    found_mailbox mailbox;
BEGIN
    SELECT * INTO found_mailbox FROM mailbox
     WHERE domain_id = (domain_of(address)).id AND local_part = local_part_of(address);
    IF found_mailbox IS NULL THEN
        RAISE EXCEPTION 'nothing is known of a mailbox %', address
            USING ERRCODE = 'BA003', HINT = 'The mailboxes are in the view bascule.mailboxes.';
    END IF;
    RETURN found_mailbox;
END
$$;
COMMENT ON FUNCTION mailbox_of IS 'The mailbox of an address, or BA001, BA003';

CREATE OR REPLACE FUNCTION is_alias(domain_id bigint, address text)
RETURNS boolean LANGUAGE sql STABLE SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
    SELECT EXISTS (SELECT FROM alias WHERE alias.domain_id = is_alias.domain_id AND local_part = local_part_of(address))
$$;

CREATE OR REPLACE FUNCTION refuse_alias(domain_id bigint, address text)
RETURNS void LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
BEGIN
    IF is_alias(domain_id, address) THEN
        RAISE EXCEPTION '% is an alias, not a mailbox', address USING ERRCODE = 'BA005';
    END IF;
END
$$;

CREATE OR REPLACE FUNCTION insist_on_reason(reason text, message text)
RETURNS void LANGUAGE plpgsql IMMUTABLE AS $$
BEGIN
    IF coalesce(trim(reason), '') = '' THEN
        RAISE EXCEPTION '%', message USING ERRCODE = 'BA002';
    END IF;
END
$$;


-- Administration ---------------------------------------------------------

CREATE OR REPLACE FUNCTION domain_named(domain_name text)
RETURNS domain LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
DECLARE
    found_domain domain;
BEGIN
    SELECT * INTO found_domain FROM domain WHERE name = lower(domain_name) FOR UPDATE;
    IF found_domain IS NULL THEN
        RAISE EXCEPTION 'no domain % is known here', domain_name
            USING ERRCODE = 'BA003', HINT = 'Tell its legacy server first: bascule prepare.';
    END IF;
    RETURN found_domain;
END
$$;

CREATE OR REPLACE FUNCTION activate_domain(domain_name text, token text, valid_for interval DEFAULT '90 days')
RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
DECLARE
    the_domain domain := domain_named(domain_name);
BEGIN
    IF the_domain.mode <> 'prepared' THEN
        RAISE EXCEPTION '% is already %', the_domain.name, the_domain.mode USING ERRCODE = 'BA002';
    END IF;
    UPDATE domain SET mode = 'active', url_token = token, url_expires_at = now() + valid_for
     WHERE id = the_domain.id;
END
$$;
COMMENT ON FUNCTION activate_domain IS
    'Open a domain for migration. The token, made by the CLI from a secure source, is the secret part of its URL.';

CREATE OR REPLACE FUNCTION rotate_url(domain_name text, token text, valid_for interval DEFAULT '90 days')
RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
DECLARE
    the_domain domain := domain_named(domain_name);
BEGIN
    IF the_domain.mode <> 'active' THEN
        RAISE EXCEPTION '% is %, it has no URL', the_domain.name, the_domain.mode USING ERRCODE = 'BA002';
    END IF;
    UPDATE domain SET url_token = token, url_expires_at = now() + valid_for WHERE id = the_domain.id;
    INSERT INTO journal (domain, event) VALUES (the_domain.name, 'url rotated');
END
$$;
COMMENT ON FUNCTION rotate_url IS 'Replace the URL of an active domain; the former one stops working at once';

CREATE OR REPLACE FUNCTION assign_alias(alias_address text, mailbox_address text)
RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
DECLARE
    target mailbox := mailbox_of(mailbox_address);
BEGIN
    IF (domain_of(alias_address)).id <> target.domain_id THEN
        RAISE EXCEPTION '% and % are not of one domain', alias_address, mailbox_address USING ERRCODE = 'BA001';
    END IF;
    IF EXISTS (SELECT FROM mailbox WHERE domain_id = target.domain_id
                  AND local_part = local_part_of(alias_address) AND state <> 'legacy') THEN
        RAISE EXCEPTION '% is a mailbox that moves or has moved', alias_address USING ERRCODE = 'BA002';
    END IF;
    INSERT INTO alias (domain_id, local_part, mailbox_id)
    VALUES (target.domain_id, local_part_of(alias_address), target.id)
    ON CONFLICT (domain_id, local_part) DO UPDATE SET mailbox_id = excluded.mailbox_id;
    DELETE FROM sighting WHERE domain_id = target.domain_id AND local_part = local_part_of(alias_address);
    INSERT INTO journal (domain, address, event, reason)
    VALUES ((domain_of(alias_address)).name, lower(alias_address), 'alias', 'of ' || lower(mailbox_address));
END
$$;
COMMENT ON FUNCTION assign_alias IS 'Make an address another name of a mailbox: its mail goes where that mailbox is';

CREATE OR REPLACE FUNCTION remove_alias(alias_address text)
RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
DECLARE
    the_domain domain := domain_of(alias_address);
BEGIN
    DELETE FROM alias WHERE domain_id = the_domain.id AND local_part = local_part_of(alias_address);
    IF NOT FOUND THEN
        RAISE EXCEPTION '% is no alias', alias_address USING ERRCODE = 'BA003';
    END IF;
    INSERT INTO journal (domain, address, event) VALUES (the_domain.name, lower(alias_address), 'alias removed');
END
$$;
COMMENT ON FUNCTION remove_alias IS 'Take an alias back: its mail goes to the legacy server again';

CREATE OR REPLACE FUNCTION expect(address text, first_name text DEFAULT '', last_name text DEFAULT '')
RETURNS boolean LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
DECLARE
    the_domain domain := domain_of(address);
BEGIN
    IF the_domain.mode = 'closed' THEN
        RAISE EXCEPTION '% is closed: nobody can be moved', the_domain.name USING ERRCODE = 'BA002';
    END IF;
    PERFORM refuse_alias(the_domain.id, address);
    INSERT INTO mailbox (domain_id, local_part, store, first_name, last_name)
    VALUES (the_domain.id, local_part_of(address), the_domain.store, expect.first_name, expect.last_name)
    ON CONFLICT (domain_id, local_part) DO NOTHING;
    IF FOUND THEN
        INSERT INTO journal (domain, address, event) VALUES (the_domain.name, lower(address), 'expected');
    END IF;
    RETURN FOUND;
END
$$;
COMMENT ON FUNCTION expect IS
    'Tell of a mailbox at the legacy server: until it has moved or is waived, the domain cannot be closed. False: it was known';

CREATE OR REPLACE FUNCTION place(address text, store_name text)
RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
DECLARE
    the_domain domain := domain_of(address);
BEGIN
    IF NOT EXISTS (SELECT FROM store WHERE name = store_name) THEN
        RAISE EXCEPTION 'no store % is known', store_name USING ERRCODE = 'BA003', HINT = 'Tell it first: bascule store.';
    END IF;
    INSERT INTO mailbox AS box (domain_id, local_part, store)
    VALUES (the_domain.id, local_part_of(address), store_name)
    ON CONFLICT (domain_id, local_part) DO UPDATE SET store = excluded.store WHERE box.state = 'legacy';
    IF NOT FOUND THEN
        RAISE EXCEPTION '% moves or has moved: it stays at its store', address USING ERRCODE = 'BA002';
    END IF;
    INSERT INTO journal (domain, address, event, reason)
    VALUES (the_domain.name, lower(address), 'placed', 'at ' || store_name);
END
$$;
COMMENT ON FUNCTION place IS 'Have a mailbox kept at another store than its domain''s; before it moves';

CREATE OR REPLACE FUNCTION waive_address(address text, reason text)
RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
DECLARE
    the_domain domain := domain_of(address);
BEGIN
    PERFORM insist_on_reason(waive_address.reason, format('say why %s need not move', address));
    INSERT INTO sighting (domain_id, local_part, waived_at, waived_reason)
    VALUES (the_domain.id, local_part_of(address), now(), waive_address.reason)
    ON CONFLICT (domain_id, local_part) DO UPDATE SET waived_at = now(), waived_reason = excluded.waived_reason;
    INSERT INTO journal (domain, address, event, reason)
    VALUES (the_domain.name, lower(address), 'waived', waive_address.reason);
END
$$;
COMMENT ON FUNCTION waive_address IS 'Decide that an address is given up: it will be refused when the domain is closed';

CREATE OR REPLACE FUNCTION unwaive_address(address text)
RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
DECLARE
    the_domain domain := domain_of(address);
BEGIN
    UPDATE sighting SET waived_at = NULL, waived_reason = NULL
     WHERE domain_id = the_domain.id AND local_part = local_part_of(address) AND waived_at IS NOT NULL;
    IF NOT FOUND THEN
        RAISE EXCEPTION '% is not waived', address USING ERRCODE = 'BA003';
    END IF;
    INSERT INTO journal (domain, address, event) VALUES (the_domain.name, lower(address), 'waiver taken back');
END
$$;
COMMENT ON FUNCTION unwaive_address IS 'Take back that an address is given up';

CREATE OR REPLACE FUNCTION pause(address text, reason text)
RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
DECLARE
    box mailbox := mailbox_of(address);
BEGIN
    PERFORM insist_on_reason(pause.reason, format('say why %s is to wait', address));
    IF box.state IN ('cutover', 'returning') THEN
        RAISE EXCEPTION '% is in state %: it is over in a moment', address, box.state USING ERRCODE = 'BA002';
    END IF;
    UPDATE mailbox SET paused_at = clock_timestamp(), pause_reason = pause.reason WHERE id = box.id;
    INSERT INTO journal (domain, address, event, reason)
    VALUES ((domain_of(address)).name, lower(address), 'paused', pause.reason);
END
$$;
COMMENT ON FUNCTION pause IS
    'Have workers leave a mailbox alone until resume(): no copy, no cutover, no sweep. A copy that is under way stops; what it brought is kept.';

CREATE OR REPLACE FUNCTION resume(address text)
RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
DECLARE
    box mailbox := mailbox_of(address);
BEGIN
    IF box.paused_at IS NULL THEN
        RAISE EXCEPTION '% is not paused', address USING ERRCODE = 'BA002',
            HINT = 'Its domain may be: see bascule.domains.';
    END IF;
    UPDATE mailbox SET paused_at = NULL, pause_reason = NULL WHERE id = box.id;
    INSERT INTO journal (domain, address, event) VALUES ((domain_of(address)).name, lower(address), 'resumed');
END
$$;
COMMENT ON FUNCTION resume IS 'Let a paused mailbox go on where it stopped; a worker takes it up within seconds';

CREATE OR REPLACE FUNCTION pause_domain(domain_name text, reason text)
RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
DECLARE
    the_domain domain := domain_named(domain_name);
BEGIN
    PERFORM insist_on_reason(pause_domain.reason, format('say why %s is to wait', the_domain.name));
    UPDATE domain SET paused_at = clock_timestamp(), pause_reason = pause_domain.reason WHERE id = the_domain.id;
    INSERT INTO journal (domain, event, reason) VALUES (the_domain.name, 'paused', pause_domain.reason);
END
$$;
COMMENT ON FUNCTION pause_domain IS
    'Have workers leave a legacy server alone until resume_domain(). Requests are taken, mail and logins go on.';

CREATE OR REPLACE FUNCTION resume_domain(domain_name text)
RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
DECLARE
    the_domain domain := domain_named(domain_name);
BEGIN
    IF the_domain.paused_at IS NULL THEN
        RAISE EXCEPTION '% is not paused', the_domain.name USING ERRCODE = 'BA002';
    END IF;
    UPDATE domain SET paused_at = NULL, pause_reason = NULL WHERE id = the_domain.id;
    INSERT INTO journal (domain, event) VALUES (the_domain.name, 'resumed');
END
$$;
COMMENT ON FUNCTION resume_domain IS 'Let the mailboxes of a paused domain go on';

CREATE OR REPLACE FUNCTION retry(address text)
RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
DECLARE
    box mailbox := mailbox_of(address);
BEGIN
    IF box.state = 'legacy' THEN
        RAISE EXCEPTION '% is in state %: nothing to try again', address, box.state USING ERRCODE = 'BA002';
    END IF;
    IF box.paused_at IS NOT NULL OR (domain_of(address)).paused_at IS NOT NULL THEN
        RAISE EXCEPTION '% is paused', address USING ERRCODE = 'BA002', HINT = 'Resume it: bascule resume.';
    END IF;
    IF box.needs_credential THEN
        RAISE EXCEPTION '% waits for the user''s new password: to try the old one again is no use', address
            USING ERRCODE = 'BA002', HINT = 'bascule request gives the new one, if you know it.';
    END IF;
    UPDATE mailbox SET next_try = now() WHERE id = box.id;
    PERFORM enqueue(task_of(box), box.id, box.store, now());
    INSERT INTO journal (domain, address, event)
    VALUES ((domain_of(address)).name, lower(address), 'retry');
END
$$;
COMMENT ON FUNCTION retry IS 'Do not wait for next_try: try the migration, the return or the sweep again now';

CREATE OR REPLACE FUNCTION give_up(address text, reason text)
RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
DECLARE
    box mailbox := mailbox_of(address);
BEGIN
    IF box.state = 'local' THEN
        RAISE EXCEPTION '% has moved already', address
            USING ERRCODE = 'BA002', HINT = 'bascule return sends it back, with what is new here.';
    END IF;
    PERFORM set_config('bascule.reason', give_up.reason, true);
    UPDATE mailbox SET state = 'legacy', next_try = NULL, needs_credential = false, sealed_credential = NULL
     WHERE id = box.id;
END
$$;
COMMENT ON FUNCTION give_up IS 'Send a mailbox that has not flipped back to state legacy; its password is erased, what was copied stays for another time';

CREATE OR REPLACE FUNCTION return_mailbox(address text, reason text)
RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
DECLARE
    box mailbox := mailbox_of(address);
    the_domain domain := domain_of(address);
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
    UPDATE mailbox SET return_requested_at = clock_timestamp(), return_reason = return_mailbox.reason, attempts = 0
     WHERE id = box.id;
    PERFORM enqueue('return', box.id, box.store);
    INSERT INTO journal (domain, address, event, reason)
    VALUES (the_domain.name, lower(address), 'return requested', return_mailbox.reason);
END
$$;
COMMENT ON FUNCTION return_mailbox IS
    'Send a mailbox that has moved back to the legacy server: what is new or changed here is written there, then the route flips';

CREATE OR REPLACE FUNCTION cancel_return(address text)
RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
DECLARE
    box mailbox := mailbox_of(address);
BEGIN
    IF box.return_requested_at IS NULL OR box.state <> 'local' THEN
        RAISE EXCEPTION 'no return of % can be called off now', address USING ERRCODE = 'BA002';
    END IF;
    IF EXISTS (SELECT FROM returned_message WHERE mailbox_id = box.id) THEN
        RAISE EXCEPTION 'the return of % has begun to append messages at the legacy server', address
            USING ERRCODE = 'BA002', HINT = 'Let it end, then request the migration again.';
    END IF;
    -- The last message may be gone there already: the next sweep writes it again if so.
    UPDATE mailbox SET return_requested_at = NULL, return_reason = NULL, last_message_at = NULL, attempts = 0,
        last_error = NULL, last_advice = NULL, last_error_at = NULL, next_try = NULL WHERE id = box.id;
    INSERT INTO journal (domain, address, event) VALUES ((domain_of(address)).name, lower(address), 'return called off');
    PERFORM enqueue('sweep', box.id, box.store);
END
$$;
COMMENT ON FUNCTION cancel_return IS 'Call off a return that has not yet appended anything at the legacy server';

CREATE OR REPLACE FUNCTION waive_messages(address text, reason text, folder text DEFAULT NULL, uid bigint DEFAULT NULL)
RETURNS bigint LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
DECLARE
    box mailbox := mailbox_of(address);
    waived bigint;
BEGIN
    PERFORM insist_on_reason(waive_messages.reason, format('say why the messages of %s need not move', address));
    UPDATE unreadable_message AS message SET waived_at = clock_timestamp(), waived_reason = waive_messages.reason
     WHERE message.mailbox_id = box.id AND message.waived_at IS NULL
       AND message.folder = coalesce(waive_messages.folder, message.folder)
       AND message.uid = coalesce(waive_messages.uid, message.uid);
    GET DIAGNOSTICS waived = ROW_COUNT;
    IF waived = 0 THEN
        RAISE EXCEPTION '% has no such unreadable message', address
            USING ERRCODE = 'BA003', HINT = 'They are in the view bascule.unreadable.';
    END IF;
    INSERT INTO journal (domain, address, event, reason)
    VALUES ((domain_of(address)).name, lower(address),
            waived || CASE waived WHEN 1 THEN ' message' ELSE ' messages' END || ' waived', waive_messages.reason);
    IF box.state IN ('requested', 'copying') THEN
        UPDATE mailbox SET next_try = now() WHERE id = box.id;
        PERFORM enqueue('migrate', box.id, box.store, now());
    END IF;
    RETURN waived;
END
$$;
COMMENT ON FUNCTION waive_messages IS
    'Decide that messages which the legacy server does not give need not move: all of a mailbox, or of one folder, or one UID; how many';

CREATE OR REPLACE FUNCTION close_domain(domain_name text, force boolean DEFAULT false, reason text DEFAULT '')
RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
DECLARE
    the_domain domain := domain_named(domain_name);
    remaining text;
    how_many bigint;
BEGIN
    IF the_domain.mode <> 'active' THEN
        RAISE EXCEPTION '% is %, only an active domain can be closed', the_domain.name, the_domain.mode
            USING ERRCODE = 'BA002';
    END IF;
    SELECT count(*) INTO how_many FROM closing_obstacles WHERE domain = the_domain.name;
    IF how_many > 0 AND NOT force THEN
        SELECT string_agg(line, E'\n') INTO remaining FROM (
            SELECT format('%s (%s). %s', address, why, remedy) AS line FROM closing_obstacles
             WHERE domain = the_domain.name ORDER BY address LIMIT 25) AS first;
        RAISE EXCEPTION E'% cannot be closed, % in the way:\n%', the_domain.name,
            CASE how_many WHEN 1 THEN 'one thing is' ELSE how_many || ' things are' END,
            remaining || CASE WHEN how_many > 25 THEN E'\n... and ' || how_many - 25 || ' more: SELECT * FROM bascule.closing_obstacles' ELSE '' END
            USING ERRCODE = 'BA004', HINT = 'What would happen to each all the same is in bascule.closing_obstacles, column consequence.';
    END IF;
    IF force THEN
        PERFORM insist_on_reason(close_domain.reason, 'closing by force needs a reason');
    END IF;
    IF how_many > 0 THEN
        SELECT string_agg(format('%s (%s): %s', address, why, consequence), E'\n' ORDER BY address)
          INTO remaining FROM closing_obstacles WHERE domain = the_domain.name;
        INSERT INTO journal (domain, event, reason)
        VALUES (the_domain.name, 'closed by force', close_domain.reason || E'\n' || remaining);
    END IF;
    PERFORM set_config('bascule.reason', 'closed: given up with the domain', true);
    UPDATE mailbox SET state = 'copying', cutover_deadline = NULL WHERE domain_id = the_domain.id AND state = 'cutover';
    UPDATE mailbox SET state = 'local', cutover_deadline = NULL WHERE domain_id = the_domain.id AND state = 'returning';
    UPDATE mailbox SET return_requested_at = NULL, return_reason = NULL WHERE domain_id = the_domain.id;
    UPDATE mailbox SET state = 'legacy' WHERE domain_id = the_domain.id AND state IN ('requested', 'copying');
    PERFORM set_config('bascule.reason', close_domain.reason, true);
    UPDATE domain SET mode = 'closed', url_token = NULL, url_expires_at = NULL WHERE id = the_domain.id;
    UPDATE mailbox SET sealed_credential = NULL, needs_credential = false, paused_at = NULL, pause_reason = NULL
     WHERE domain_id = the_domain.id;
    UPDATE domain SET copy_login = 'user', sealed_copy_login = NULL, paused_at = NULL, pause_reason = NULL
     WHERE id = the_domain.id;
END
$$;
COMMENT ON FUNCTION close_domain IS
    'End the migration: no relay to the legacy server any more, credentials erased, sweeps ended. '
    'Refused (BA004) while an address would be forgotten, unless forced with a reason.';


-- Requests: portal, first login, CLI ----------------------------------------

CREATE OR REPLACE FUNCTION request_migration(
    address text, how request_trigger, sealed bytea, first_name text DEFAULT '', last_name text DEFAULT ''
)
RETURNS bigint LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
DECLARE
    the_domain domain := domain_of(address);
    box mailbox;
BEGIN
    IF the_domain.mode <> 'active' THEN
        RAISE EXCEPTION '% is %: nobody can be moved', the_domain.name, the_domain.mode USING ERRCODE = 'BA002';
    END IF;
    PERFORM refuse_alias(the_domain.id, address);
    INSERT INTO mailbox (domain_id, local_part, store)
    VALUES (the_domain.id, local_part_of(address), the_domain.store)
    ON CONFLICT (domain_id, local_part) DO NOTHING;
    SELECT * INTO box FROM mailbox
     WHERE domain_id = the_domain.id AND local_part = local_part_of(address) FOR UPDATE;

    IF box.state = 'legacy' THEN
        PERFORM set_config('bascule.reason', 'requested by ' || CASE how
            WHEN 'portal' THEN 'the user at the URL' WHEN 'login' THEN 'the user''s login' ELSE 'an administrator' END, true);
        UPDATE mailbox SET state = 'requested', trigger = how, sealed_credential = sealed, needs_credential = false,
            first_name = coalesce(nullif(request_migration.first_name, ''), mailbox.first_name),
            last_name = coalesce(nullif(request_migration.last_name, ''), mailbox.last_name),
            messages_copied = 0, messages_total = 0, bytes_copied = 0, copy_began_at = NULL, trouble_told_at = NULL,
            attempts = 0, last_error = NULL, last_advice = NULL, last_error_at = NULL, next_try = NULL
         WHERE id = box.id;
    ELSIF box.needs_credential AND box.state IN ('requested', 'copying', 'local') THEN
        PERFORM take_credential(box.id, sealed);  -- for the sweeps, if the mailbox has moved
    ELSIF box.state = 'local' THEN
        RAISE EXCEPTION '% has already moved', address USING ERRCODE = 'BA002';
    ELSE
        RAISE EXCEPTION '% is already on the move (%)', address, box.state USING ERRCODE = 'BA002';
    END IF;
    RETURN box.id;
END
$$;
COMMENT ON FUNCTION request_migration IS
    'Ask for a mailbox to be moved, with its legacy password sealed to the workers'' key. '
    'The caller has made sure that the legacy server accepts that password.';

CREATE OR REPLACE FUNCTION take_credential(mailbox_id bigint, sealed bytea)
RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
DECLARE
    box mailbox;
BEGIN
    UPDATE mailbox SET sealed_credential = sealed, needs_credential = false, trouble_told_at = NULL,
        last_error = NULL, last_advice = NULL, last_error_at = NULL, next_try = NULL
     WHERE id = take_credential.mailbox_id RETURNING * INTO box;
    INSERT INTO journal (domain, address, event)
    SELECT domain.name, box.full_address, 'new password taken up' FROM domain WHERE id = box.domain_id;
    PERFORM enqueue(task_of(box), box.id, box.store);
END
$$;

CREATE OR REPLACE FUNCTION record_login(address text, sealed bytea)
RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
DECLARE
    the_domain domain := domain_of(address);
    box mailbox;
BEGIN
    SELECT * INTO box FROM mailbox WHERE domain_id = the_domain.id AND local_part = local_part_of(address);
    IF box.needs_credential AND box.state IN ('requested', 'copying') THEN
        PERFORM take_credential(box.id, sealed);
    ELSIF coalesce(box.state, 'legacy') = 'legacy' AND the_domain.mode = 'active' AND the_domain.first_login_migrates
        AND NOT is_alias(the_domain.id, address) THEN
        PERFORM request_migration(address, 'login', sealed);
    END IF;
END
$$;
COMMENT ON FUNCTION record_login IS
    'A login that the legacy server accepted: a request if the domain''s policy says so, or the new password that a mailbox waits for';

CREATE OR REPLACE FUNCTION login_state(address text)
RETURNS TABLE (state mailbox_state, password_hash text, store text, store_host text, wants_credential boolean)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
    SELECT coalesce(mailbox.state, 'legacy'), CASE WHEN mailbox.state = 'local' THEN mailbox.password_hash END,
           store.name, store.login_host,
           CASE WHEN mailbox.needs_credential THEN mailbox.state IN ('requested', 'copying')
                ELSE domain.mode = 'active' AND domain.first_login_migrates AND coalesce(mailbox.state, 'legacy') = 'legacy' END
      FROM domain LEFT JOIN mailbox ON mailbox.domain_id = domain.id AND mailbox.local_part = local_part_of(address)
           JOIN store ON store.name = coalesce(mailbox.store, domain.store)
     WHERE domain.name = lower(substring(address FROM '@([^@]+)$'))
$$;
COMMENT ON FUNCTION login_state IS
    'For the authenticator: where a login is to be checked, which store has the mailbox, and whether record_login() has a use for the credential';

CREATE OR REPLACE FUNCTION messages_per_second(box mailbox)
RETURNS numeric LANGUAGE sql STABLE AS $$
    SELECT CASE WHEN box.state = 'copying' AND box.messages_copied > box.copied_before AND box.last_error IS NULL THEN
        round((box.messages_copied - box.copied_before)
              / greatest(extract(epoch FROM clock_timestamp() - box.copy_began_at), 0.1), 1) END
$$;
COMMENT ON FUNCTION messages_per_second IS 'How quickly a mailbox is being copied since its worker took it up; null: it is not';

CREATE OR REPLACE FUNCTION remaining(box mailbox)
RETURNS interval LANGUAGE sql STABLE AS $$
    SELECT make_interval(secs => ceil((box.messages_total - box.messages_copied)
                                      / nullif(bascule.messages_per_second(box), 0))::double precision)
$$;
COMMENT ON FUNCTION remaining IS 'How long the rest of a copy will take at its present rate; null: nobody knows';

CREATE OR REPLACE FUNCTION portal_domain(token text)
RETURNS SETOF domain LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
BEGIN
    RETURN QUERY SELECT * FROM domain WHERE url_token = token AND mode = 'active' AND url_expires_at > now();
    IF NOT FOUND THEN
        IF EXISTS (SELECT FROM domain WHERE url_token = token AND mode = 'active') THEN
            RAISE EXCEPTION 'this link has expired' USING ERRCODE = 'BA003', HINT = 'expired';
        END IF;
        RAISE EXCEPTION 'this link is not known' USING ERRCODE = 'BA003', HINT = 'unknown';
    END IF;
END
$$;
COMMENT ON FUNCTION portal_domain IS 'The domain of a users'' URL, or BA003 whose hint is "expired" or "unknown"';

CREATE OR REPLACE FUNCTION portal_request(
    token text, address text, sealed bytea, first_name text, last_name text, language user_language
)
RETURNS bigint LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
DECLARE
    the_domain domain := portal_domain(token);
    box mailbox;
BEGIN
    IF (domain_of(address)).id <> the_domain.id THEN
        RAISE EXCEPTION '% is not an address of %', address, the_domain.name USING ERRCODE = 'BA001';
    END IF;
    SELECT * INTO box FROM mailbox WHERE domain_id = the_domain.id AND local_part = local_part_of(address);
    IF box.state IS NULL OR box.state = 'legacy' OR box.needs_credential THEN
        box.id := request_migration(address, 'portal', sealed, first_name, last_name);
    END IF;
    UPDATE mailbox SET language = portal_request.language WHERE id = box.id;
    RETURN box.id;
END
$$;
COMMENT ON FUNCTION portal_request IS
    'For the users'' page: request_migration() for an address of the token''s domain; who has asked before is only looked up';

CREATE OR REPLACE FUNCTION portal_progress(mailbox_id bigint)
RETURNS TABLE (address text, state mailbox_state, messages_copied bigint, messages_total bigint, needs_credential boolean,
               paused boolean, ahead bigint, remaining interval)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
    SELECT mailbox.full_address, mailbox.state, mailbox.messages_copied, mailbox.messages_total, mailbox.needs_credential,
           is_paused.is_paused, queue.ahead,
           CASE WHEN is_paused.is_paused THEN NULL
                WHEN mailbox.state = 'requested' AND queue.moves > 0 THEN interval '1 hour' * (queue.ahead + 1) / queue.moves
                ELSE remaining(mailbox) END
      FROM mailbox JOIN domain ON domain.id = mailbox.domain_id,
           LATERAL (SELECT domain.paused_at IS NOT NULL OR mailbox.paused_at IS NOT NULL AS is_paused) AS is_paused,
           -- Only who waits has others before.
           LATERAL (SELECT count(*) FILTER (WHERE other.state = 'requested' AND other.state_since < mailbox.state_since) AS ahead,
                           count(*) FILTER (WHERE other.migrated_at > now() - interval '1 hour') AS moves
                      FROM mailbox AS other
                     WHERE mailbox.state = 'requested' AND other.store = mailbox.store
                       AND (other.state = 'requested' OR other.migrated_at > now() - interval '1 hour')) AS queue
     WHERE mailbox.id = portal_progress.mailbox_id
$$;
COMMENT ON FUNCTION portal_progress IS
    'For the users'' page: how far a mailbox is, how many are served before it, how long it will probably take (null: nobody knows)';


-- Migration: the workers ------------------------------------------------------

CREATE OR REPLACE FUNCTION begin_copy(mailbox_id bigint)
RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
BEGIN
    UPDATE mailbox SET state = 'copying' WHERE id = begin_copy.mailbox_id AND state = 'requested';
    UPDATE mailbox SET attempts = attempts + 1, next_try = NULL, copy_began_at = clock_timestamp(), copied_before = NULL
     WHERE id = begin_copy.mailbox_id AND state IN ('copying', 'cutover');
END
$$;
COMMENT ON FUNCTION begin_copy IS 'A worker has taken the mailbox up';

CREATE OR REPLACE FUNCTION report_progress(mailbox_id bigint, copied bigint, total bigint, bytes bigint)
RETURNS boolean LANGUAGE sql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
    UPDATE mailbox SET messages_copied = copied, messages_total = total, bytes_copied = bytes,
        copied_before = coalesce(copied_before, copied)
      FROM domain
     WHERE mailbox.id = report_progress.mailbox_id AND domain.id = mailbox.domain_id
    RETURNING mailbox.state <> 'copying' OR (mailbox.paused_at IS NULL AND domain.paused_at IS NULL)
$$;
COMMENT ON FUNCTION report_progress IS 'How far a copy is; false: it was paused, and is to stop';

CREATE OR REPLACE FUNCTION pause_after(attempts integer)
RETURNS interval LANGUAGE sql IMMUTABLE AS $$
    SELECT least(interval '5 seconds' * 2 ^ least(greatest(attempts - 1, 0), 10), interval '15 minutes')
$$;
COMMENT ON FUNCTION pause_after IS 'How long to wait after so many attempts without success: 5 s, 10 s, 20 s, ... at most 15 minutes';

CREATE OR REPLACE FUNCTION task_of(box mailbox)
RETURNS text LANGUAGE sql IMMUTABLE AS $$
    SELECT CASE WHEN box.return_requested_at IS NOT NULL THEN 'return'
                WHEN box.state = 'local' THEN 'sweep' ELSE 'migrate' END
$$;
COMMENT ON FUNCTION task_of IS 'What a worker has to do for a mailbox that is not in state legacy';

CREATE OR REPLACE FUNCTION attempt_failed(
    mailbox_id bigint, message text, refused boolean DEFAULT false, at_least interval DEFAULT '0', advice text DEFAULT ''
)
RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
DECLARE
    box mailbox;
BEGIN
    SELECT * INTO box FROM mailbox WHERE id = attempt_failed.mailbox_id FOR UPDATE;
    IF box.state NOT IN ('requested', 'copying', 'local') THEN
        RETURN;
    END IF;
    UPDATE mailbox SET last_error = message, last_advice = advice, last_error_at = clock_timestamp(), needs_credential = refused,
        attempts = CASE WHEN mailbox.state = 'local' THEN attempts + 1 ELSE attempts END,
        next_try = CASE WHEN NOT refused THEN clock_timestamp() + greatest(pause_after(attempts), at_least) END
     WHERE id = box.id RETURNING * INTO box;
    INSERT INTO journal (domain, address, event, reason)
    SELECT domain.name, box.full_address, 'attempt failed', message FROM domain WHERE id = box.domain_id;
    IF NOT refused THEN
        PERFORM enqueue(task_of(box), box.id, box.store, box.next_try);
    END IF;
END
$$;
COMMENT ON FUNCTION attempt_failed IS
    'The last attempt did not succeed: kept for the views, and tried again at next_try, no sooner than at_least from now; '
    'refused: the legacy server no longer takes the sealed password, so wait for the new one';

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
    'Reserve up to so many of the domain''s IMAP sessions at the legacy server, until this database session ends; how many were free';

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
    'The messages that the legacy server did not give in the last pass; after a complete pass those not among them are forgotten. What is waived stays waived.';

CREATE OR REPLACE FUNCTION set_hierarchy(mailbox_id bigint, separator text, prefix text)
RETURNS void LANGUAGE sql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
    UPDATE mailbox SET hierarchy_separator = separator, namespace_prefix = prefix
     WHERE id = set_hierarchy.mailbox_id AND state = 'copying' AND (hierarchy_separator, namespace_prefix) <> (separator, prefix)
$$;
COMMENT ON FUNCTION set_hierarchy IS 'How the legacy server writes folder names; it stays so here';

CREATE OR REPLACE FUNCTION begin_cutover(mailbox_id bigint)
RETURNS bigint LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
DECLARE
    box mailbox;
BEGIN
    UPDATE mailbox SET state = 'cutover',
        cutover_deadline = clock_timestamp() + (SELECT cutover_budget FROM domain WHERE domain.id = mailbox.domain_id)
     WHERE id = begin_cutover.mailbox_id AND state = 'copying' RETURNING * INTO box;
    IF box IS NULL THEN
        RAISE EXCEPTION 'mailbox % is not copying: no cutover', begin_cutover.mailbox_id USING ERRCODE = 'BA002';
    END IF;
    RETURN box.epoch;
END
$$;
COMMENT ON FUNCTION begin_cutover IS 'Hold the mailbox''s mail and logins, for at most the domain''s cutover budget; gives the epoch to be acknowledged';

CREATE OR REPLACE FUNCTION unacknowledged(mailbox_id bigint, epoch bigint)
RETURNS TABLE (part text, node text) LANGUAGE sql STABLE SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
    SELECT node.part, node.name FROM node
     WHERE node.heartbeat_at > clock_timestamp() - interval '15 seconds'
       AND NOT EXISTS (SELECT FROM acknowledgement AS ack
                        WHERE ack.mailbox_id = unacknowledged.mailbox_id AND ack.node = node.name
                          AND ack.part = node.part AND ack.epoch >= unacknowledged.epoch)
$$;
COMMENT ON FUNCTION unacknowledged IS 'The live nodes that have not yet put a change of state into force';

CREATE OR REPLACE FUNCTION finish_cutover(mailbox_id bigint, epoch bigint, hash text, report jsonb)
RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
BEGIN
    UPDATE mailbox SET state = 'local', cutover_deadline = NULL, password_hash = hash,
        special_uses = coalesce(finish_cutover.report -> 'special_uses', '{}'),
        migrated_at = clock_timestamp(), last_message_at = NULL, welcomed_at = NULL, swept_at = NULL, attempts = 0, last_error = NULL, last_advice = NULL, last_error_at = NULL, next_try = NULL
     WHERE id = finish_cutover.mailbox_id AND state = 'cutover' AND mailbox.epoch = finish_cutover.epoch
       AND cutover_deadline > clock_timestamp();
    IF NOT FOUND THEN
        RAISE EXCEPTION 'the cutover of mailbox % is over its time or was undone', finish_cutover.mailbox_id
            USING ERRCODE = 'BA002';
    END IF;
    INSERT INTO verification AS old (mailbox_id, report) VALUES (finish_cutover.mailbox_id, finish_cutover.report)
    ON CONFLICT ON CONSTRAINT verification_pkey DO UPDATE SET report = excluded.report;
    DELETE FROM mailbox_folder WHERE mailbox_folder.mailbox_id = finish_cutover.mailbox_id;
    INSERT INTO mailbox_folder (mailbox_id, name, uidvalidity, uidnext)
    SELECT finish_cutover.mailbox_id, folder.name, folder.uidvalidity, folder.uidnext
      FROM jsonb_to_recordset(finish_cutover.report -> 'folders')
        AS folder (name text, uidvalidity bigint, uidnext bigint);
END
$$;
COMMENT ON FUNCTION finish_cutover IS 'The flip. Refused when the cutover was undone or its time is over.';

CREATE OR REPLACE FUNCTION undo_cutover(mailbox_id bigint, reason text)
RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
BEGIN
    PERFORM set_config('bascule.reason', undo_cutover.reason, true);
    UPDATE mailbox SET state = 'copying', cutover_deadline = NULL, last_error = undo_cutover.reason, last_advice = NULL,
        last_error_at = clock_timestamp(),
        next_try = clock_timestamp() + pause_after(attempts)
     WHERE id = undo_cutover.mailbox_id AND state = 'cutover';
    PERFORM set_config('bascule.reason', '', true);
END
$$;
COMMENT ON FUNCTION undo_cutover IS 'Release the held mail to the legacy server and go on copying';

CREATE OR REPLACE FUNCTION begin_return(mailbox_id bigint)
RETURNS bigint LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
DECLARE
    box mailbox;
BEGIN
    PERFORM set_config('bascule.reason', (SELECT return_reason FROM mailbox WHERE id = begin_return.mailbox_id), true);
    UPDATE mailbox SET state = 'returning',
        cutover_deadline = clock_timestamp() + (SELECT cutover_budget FROM domain WHERE domain.id = mailbox.domain_id)
     WHERE id = begin_return.mailbox_id AND state = 'local' AND return_requested_at IS NOT NULL RETURNING * INTO box;
    IF box IS NULL THEN
        RAISE EXCEPTION 'mailbox % is not to be returned', begin_return.mailbox_id USING ERRCODE = 'BA002';
    END IF;
    RETURN box.epoch;
END
$$;
COMMENT ON FUNCTION begin_return IS 'Hold the mailbox''s mail and logins for the last step of its return, for at most the domain''s cutover budget';

CREATE OR REPLACE FUNCTION undo_return(mailbox_id bigint, reason text)
RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
DECLARE
    box mailbox;
BEGIN
    PERFORM set_config('bascule.reason', undo_return.reason, true);
    UPDATE mailbox SET state = 'local', cutover_deadline = NULL, last_error = undo_return.reason, last_advice = NULL,
        last_error_at = clock_timestamp(), attempts = attempts + 1, next_try = clock_timestamp() + pause_after(attempts + 1)
     WHERE id = undo_return.mailbox_id AND state = 'returning' RETURNING * INTO box;
    PERFORM set_config('bascule.reason', '', true);
    IF box IS NOT NULL THEN
        PERFORM enqueue('return', box.id, box.store, box.next_try);
    END IF;
END
$$;
COMMENT ON FUNCTION undo_return IS 'Deliver the held mail here and try the return again later';

CREATE OR REPLACE FUNCTION finish_return(mailbox_id bigint, epoch bigint)
RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
BEGIN
    PERFORM set_config('bascule.reason', (SELECT return_reason FROM mailbox WHERE id = finish_return.mailbox_id), true);
    UPDATE mailbox SET state = 'legacy', cutover_deadline = NULL, return_requested_at = NULL, return_reason = NULL,
        password_hash = NULL, sealed_credential = NULL, migrated_at = NULL, last_message_at = NULL,
        swept_at = NULL, attempts = 0, last_error = NULL, last_advice = NULL, last_error_at = NULL, next_try = NULL
     WHERE id = finish_return.mailbox_id AND state = 'returning' AND mailbox.epoch = finish_return.epoch
       AND cutover_deadline > clock_timestamp();
    IF NOT FOUND THEN
        RAISE EXCEPTION 'the return of mailbox % is over its time or was undone', finish_return.mailbox_id
            USING ERRCODE = 'BA002';
    END IF;
    DELETE FROM verification WHERE verification.mailbox_id = finish_return.mailbox_id;
    DELETE FROM mailbox_folder WHERE mailbox_folder.mailbox_id = finish_return.mailbox_id;
    DELETE FROM straggler WHERE straggler.mailbox_id = finish_return.mailbox_id;
    DELETE FROM returned_message WHERE returned_message.mailbox_id = finish_return.mailbox_id;
    DELETE FROM unreadable_message WHERE unreadable_message.mailbox_id = finish_return.mailbox_id;
END
$$;
COMMENT ON FUNCTION finish_return IS 'The flip back. Refused when the return was undone or its time is over.';

CREATE OR REPLACE FUNCTION intend_return(
    mailbox_id bigint, folder text, uid bigint, guid text, digest bytea, legacy_uidnext bigint
)
RETURNS void LANGUAGE sql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
    INSERT INTO returned_message (mailbox_id, folder, uid, guid, digest, legacy_uidnext)
    VALUES (intend_return.mailbox_id, intend_return.folder, intend_return.uid, intend_return.guid, intend_return.digest,
            intend_return.legacy_uidnext)
    ON CONFLICT ON CONSTRAINT returned_message_pkey DO UPDATE SET guid = excluded.guid, digest = excluded.digest,
        legacy_uidnext = excluded.legacy_uidnext, legacy_uid = NULL
$$;
COMMENT ON FUNCTION intend_return IS 'A message is about to be appended to the legacy mailbox';

CREATE OR REPLACE FUNCTION returned(mailbox_id bigint, folder text, uid bigint, legacy_uid bigint)
RETURNS void LANGUAGE sql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
    UPDATE returned_message SET legacy_uid = returned.legacy_uid
     WHERE returned_message.mailbox_id = returned.mailbox_id AND returned_message.folder = returned.folder
       AND returned_message.uid = returned.uid
$$;
COMMENT ON FUNCTION returned IS 'The message is in the legacy mailbox, with this UID there';

CREATE OR REPLACE FUNCTION undo_overdue_cutovers()
RETURNS void LANGUAGE sql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
    SELECT undo_cutover(id, 'the cutover was not done within its time') FROM mailbox
     WHERE state = 'cutover' AND cutover_deadline <= clock_timestamp();
    SELECT undo_return(id, 'the return was not done within its time') FROM mailbox
     WHERE state = 'returning' AND cutover_deadline <= clock_timestamp()
$$;
COMMENT ON FUNCTION undo_overdue_cutovers IS 'Called at each heartbeat of a policy daemon, so that a dead worker holds nobody''s mail';

CREATE OR REPLACE FUNCTION stage_straggler(mailbox_id bigint, folder text, uidvalidity bigint, uid bigint)
RETURNS void LANGUAGE sql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
    INSERT INTO straggler (mailbox_id, folder, uidvalidity, uid)
    VALUES (stage_straggler.mailbox_id, stage_straggler.folder, stage_straggler.uidvalidity, stage_straggler.uid)
    ON CONFLICT DO NOTHING
$$;

CREATE OR REPLACE FUNCTION straggler_delivered(mailbox_id bigint, folder text, uidvalidity bigint, uid bigint)
RETURNS void LANGUAGE sql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
    UPDATE straggler SET delivered_at = clock_timestamp()
     WHERE straggler.mailbox_id = straggler_delivered.mailbox_id AND straggler.folder = straggler_delivered.folder
       AND straggler.uidvalidity = straggler_delivered.uidvalidity AND straggler.uid = straggler_delivered.uid
       AND delivered_at IS NULL
$$;

CREATE OR REPLACE FUNCTION sweep_done(mailbox_id bigint, began timestamptz)
RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
DECLARE
    box mailbox;
    the_domain domain;
BEGIN
    UPDATE mailbox SET attempts = 0, last_error = NULL, last_advice = NULL, last_error_at = NULL, next_try = NULL,
        last_message_at = coalesce(last_message_at, clock_timestamp()), swept_at = began
     WHERE id = sweep_done.mailbox_id AND state = 'local' RETURNING * INTO box;
    SELECT * INTO the_domain FROM domain WHERE id = box.domain_id;
    IF the_domain.mode = 'active' AND box.paused_at IS NULL AND the_domain.paused_at IS NULL THEN
        PERFORM enqueue('sweep', box.id, box.store, clock_timestamp() + the_domain.sweep_interval);
    END IF;
END
$$;
COMMENT ON FUNCTION sweep_done IS 'A sweep that began then found all there was, and the last message is written; the next one is queued while the domain is active';

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
COMMENT ON FUNCTION trouble_told IS 'True: the user is to be written to now that the move waits for the new password. Each time only once.';

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
COMMENT ON FUNCTION requeue_unattended IS 'The state is the truth, the queue only follows it: queue work for mailboxes that have none waiting';


-- Routing: policy daemons and authenticators ---------------------------------

CREATE OR REPLACE FUNCTION beat(node text, part text)
RETURNS void LANGUAGE sql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
    INSERT INTO node (name, part, heartbeat_at) VALUES (beat.node, beat.part, clock_timestamp())
    ON CONFLICT (name, part) DO UPDATE SET heartbeat_at = excluded.heartbeat_at
$$;
COMMENT ON FUNCTION beat IS 'A node''s heartbeat, every 5 seconds';

CREATE OR REPLACE FUNCTION sign_off(node text, part text)
RETURNS void LANGUAGE sql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
    DELETE FROM node WHERE node.name = sign_off.node AND node.part = sign_off.part
$$;
COMMENT ON FUNCTION sign_off IS 'A node stopped in good order: it is not waited for';

CREATE OR REPLACE FUNCTION acknowledge(mailbox_id bigint, node text, part text, epoch bigint)
RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
BEGIN
    INSERT INTO acknowledgement AS ack (mailbox_id, node, part, epoch)
    VALUES (acknowledge.mailbox_id, acknowledge.node, acknowledge.part, acknowledge.epoch)
    ON CONFLICT ON CONSTRAINT acknowledgement_pkey DO UPDATE SET epoch = greatest(ack.epoch, excluded.epoch);
    PERFORM pg_notify('bascule_acknowledgement', acknowledge.mailbox_id::text);
END
$$;
COMMENT ON FUNCTION acknowledge IS 'A node has put the change of state with this epoch into force';

CREATE OR REPLACE FUNCTION record_sighting(address text, messages bigint)
RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
DECLARE
    the_domain domain := domain_of(address);
    box mailbox;
BEGIN
    -- It may have moved since it was seen; the lock has a flip that is under way come before or after.
    SELECT * INTO box FROM mailbox WHERE domain_id = the_domain.id AND local_part = local_part_of(address) FOR SHARE;
    IF box.state = 'local' OR is_alias(the_domain.id, address) THEN
        RETURN;
    END IF;
    INSERT INTO sighting AS seen (domain_id, local_part, messages)
    VALUES (the_domain.id, local_part_of(address), record_sighting.messages)
    ON CONFLICT (domain_id, local_part) DO UPDATE SET messages = seen.messages + excluded.messages, last_seen = clock_timestamp();
END
$$;
COMMENT ON FUNCTION record_sighting IS 'The legacy server accepts this recipient, and that many messages for it entered';

-- Only who holds the private key can know that both are the same password; so only workers may call these.
CREATE OR REPLACE FUNCTION reseal_mailbox(mailbox_id bigint, former bytea, sealed bytea)
RETURNS boolean LANGUAGE sql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
    UPDATE mailbox SET sealed_credential = sealed WHERE id = mailbox_id AND sealed_credential = former RETURNING true
$$;
COMMENT ON FUNCTION reseal_mailbox IS 'The same credential, sealed to the workers'' new key; null if it has changed meanwhile';

CREATE OR REPLACE FUNCTION reseal_domain(domain_id bigint, former bytea, sealed bytea)
RETURNS boolean LANGUAGE sql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
    UPDATE domain SET sealed_copy_login = sealed WHERE id = domain_id AND sealed_copy_login = former RETURNING true
$$;
COMMENT ON FUNCTION reseal_domain IS 'The same master user or OAuth 2.0 client, sealed to the workers'' new key; null if it has changed meanwhile';
