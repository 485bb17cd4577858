-- Administration.

CREATE OR REPLACE FUNCTION domain_named(domain_name text)
RETURNS domain LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
DECLARE
    found_domain domain;
BEGIN
    SELECT * INTO found_domain FROM domain WHERE name = lower(domain_name) FOR NO KEY UPDATE;
    IF found_domain IS NULL THEN
        RAISE EXCEPTION 'no domain % is known here', domain_name
            USING ERRCODE = 'BA003', HINT = 'Record its legacy server first: bascule domain add.';
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
    PERFORM note(the_domain, 'url rotated');
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
    PERFORM note(domain_of(alias_address), 'alias', 'of ' || lower(mailbox_address), alias_address);
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
    PERFORM note(the_domain, 'alias removed', NULL, lower(alias_address));
END
$$;
COMMENT ON FUNCTION remove_alias IS 'Take an alias back: its mail goes to the legacy server again';

CREATE OR REPLACE FUNCTION expect(address text, first_name text DEFAULT '', last_name text DEFAULT '')
RETURNS boolean LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
DECLARE
    the_domain domain := lock_domain_of(address);
BEGIN
    IF the_domain.mode = 'closed' THEN
        RAISE EXCEPTION '% is closed: nobody can be moved', the_domain.name USING ERRCODE = 'BA002';
    END IF;
    PERFORM refuse_alias(the_domain.id, address);
    INSERT INTO mailbox (domain_id, local_part, store, first_name, last_name)
    VALUES (the_domain.id, local_part_of(address), the_domain.store, expect.first_name, expect.last_name)
    ON CONFLICT DO NOTHING;
    IF FOUND THEN
        PERFORM note(the_domain, 'expected', NULL, lower(address));
    END IF;
    RETURN FOUND;
END
$$;
COMMENT ON FUNCTION expect IS
    'Tell of a mailbox at the legacy server: until it has moved or is waived, the domain cannot be closed. False: it was known';

CREATE OR REPLACE FUNCTION set_login_name(address text, login_name text)
RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
DECLARE
    the_domain domain := lock_domain_of(address);
    box mailbox;
BEGIN
    IF the_domain.mode = 'closed' THEN
        RAISE EXCEPTION '% is closed: the legacy server is not asked any more', the_domain.name USING ERRCODE = 'BA002';
    END IF;
    PERFORM refuse_alias(the_domain.id, address);
    IF nullif(login_name, '') !~ '^[^[:cntrl:]]{1,255}$' THEN
        RAISE EXCEPTION 'the login name of % is too long, or has a control character in it', lower(address)
            USING ERRCODE = 'BA002';
    END IF;
    box := lock_mailbox(the_domain, address);
    IF box.legacy_login IS DISTINCT FROM nullif(login_name, '') THEN
        UPDATE mailbox SET legacy_login = nullif(login_name, '') WHERE id = box.id;
        PERFORM note(box, 'login name', coalesce('there: ' || nullif(login_name, ''), 'there: as the domain''s login_form has it'));
    END IF;
END
$$;
COMMENT ON FUNCTION set_login_name IS
    'By which name the legacy server knows the user of an address, if its domain''s login_form does not tell; empty: that form again. '
    'The user goes on to log in here with the address.';

CREATE OR REPLACE FUNCTION place(address text, store_name text)
RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
DECLARE
    the_domain domain := domain_of(address);
    box mailbox;
BEGIN
    IF NOT EXISTS (SELECT FROM store WHERE name = store_name) THEN
        RAISE EXCEPTION 'no store % is known', store_name USING ERRCODE = 'BA003', HINT = 'Record it first: bascule store.';
    END IF;
    box := lock_mailbox(the_domain, address);
    UPDATE mailbox SET store = store_name WHERE id = box.id AND state = 'legacy';
    IF NOT FOUND THEN
        RAISE EXCEPTION '% moves or has moved: it stays at its store', address USING ERRCODE = 'BA002';
    END IF;
    PERFORM note(the_domain, 'placed', 'at ' || store_name, lower(address));
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
    PERFORM note(the_domain, 'waived', waive_address.reason, lower(address));
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
    PERFORM note(the_domain, 'waiver taken back', NULL, lower(address));
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
    PERFORM note(box, 'paused', pause.reason);
END
$$;
COMMENT ON FUNCTION pause IS
    'Have workers leave a mailbox alone until resume(): no copy, no cutover, no sweep. '
    'A copy that is under way stops; what it brought is kept.';

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
    PERFORM note(box, 'resumed');
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
    PERFORM note(the_domain, 'paused', pause_domain.reason);
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
    PERFORM note(the_domain, 'resumed');
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
    PERFORM note(box, 'retry');
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
    UPDATE mailbox SET state = 'legacy', needs_credential = false, sealed_credential = NULL WHERE id = box.id;
    PERFORM forget_trouble(box.id);
END
$$;
COMMENT ON FUNCTION give_up IS
    'Send a mailbox that has not flipped back to state legacy: a copy that is under way stops, its password is erased; '
    'what was copied stays for another time';

CREATE OR REPLACE FUNCTION waive_messages(address text, reason text, folder text DEFAULT NULL, uid bigint DEFAULT NULL)
RETURNS bigint LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
DECLARE
    box mailbox := mailbox_of(address);
    waived bigint;
    waived_folders bigint;
BEGIN
    PERFORM insist_on_reason(waive_messages.reason, format('say why the messages of %s need not move', address));
    UPDATE unreadable_message AS message SET waived_at = clock_timestamp(), waived_reason = waive_messages.reason
     WHERE message.mailbox_id = box.id AND message.waived_at IS NULL
       AND message.folder = coalesce(waive_messages.folder, message.folder)
       AND message.uid = coalesce(waive_messages.uid, message.uid);
    GET DIAGNOSTICS waived = ROW_COUNT;
    IF waive_messages.uid IS NULL THEN
        UPDATE unreadable_folder AS the_folder SET waived_at = clock_timestamp(), waived_reason = waive_messages.reason
         WHERE the_folder.mailbox_id = box.id AND the_folder.waived_at IS NULL
           AND the_folder.folder = coalesce(waive_messages.folder, the_folder.folder);
        GET DIAGNOSTICS waived_folders = ROW_COUNT;
        waived := waived + waived_folders;
    END IF;
    IF waived = 0 THEN
        RAISE EXCEPTION '% has no such unreadable message or folder', address
            USING ERRCODE = 'BA003', HINT = 'They are in the view bascule.unreadable.';
    END IF;
    PERFORM note(box, waived || CASE waived WHEN 1 THEN ' message' ELSE ' messages' END || ' waived', waive_messages.reason);
    IF box.state IN ('requested', 'copying', 'local') THEN
        UPDATE mailbox SET next_try = now() WHERE id = box.id;
        PERFORM enqueue(task_of(box), box.id, box.store, now());
    END IF;
    RETURN waived;
END
$$;
COMMENT ON FUNCTION waive_messages IS
    'Decide that messages and folders which the legacy server does not give need not move: '
    'all of a mailbox, or of one folder, or one UID; how many';

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
            remaining || CASE WHEN how_many > 25
                THEN E'\n... and ' || how_many - 25 || ' more: SELECT * FROM bascule.closing_obstacles' ELSE '' END
            USING ERRCODE = 'BA004',
                  HINT = 'What would happen to each all the same is in bascule.closing_obstacles, column consequence.';
    END IF;
    IF force THEN
        PERFORM insist_on_reason(close_domain.reason, 'closing by force needs a reason');
    END IF;
    IF how_many > 0 THEN
        SELECT string_agg(format('%s (%s): %s', address, why, consequence), E'\n' ORDER BY address)
          INTO remaining FROM closing_obstacles WHERE domain = the_domain.name;
        PERFORM note(the_domain, 'closed by force', close_domain.reason || E'\n' || remaining);
    END IF;
    PERFORM set_config('bascule.reason', 'closed: given up with the domain', true);
    UPDATE mailbox SET state = 'copying', cutover_deadline = NULL WHERE domain_id = the_domain.id AND state = 'cutover';
    UPDATE mailbox SET state = 'local', cutover_deadline = NULL WHERE domain_id = the_domain.id AND state = 'returning';
    UPDATE mailbox SET return_requested_at = NULL, return_reason = NULL WHERE domain_id = the_domain.id;
    UPDATE mailbox SET state = 'legacy' WHERE domain_id = the_domain.id AND state IN ('requested', 'copying');
    PERFORM set_config('bascule.reason', close_domain.reason, true);
    UPDATE domain SET mode = 'closed', url_token = NULL, url_expires_at = NULL WHERE id = the_domain.id;
    UPDATE mailbox SET sealed_credential = NULL, needs_credential = false, paused_at = NULL, pause_reason = NULL,
        imported_hash = CASE WHEN state = 'local' THEN imported_hash END
     WHERE domain_id = the_domain.id;
    PERFORM forget_trouble(id) FROM mailbox WHERE domain_id = the_domain.id;
    UPDATE domain SET copy_login = 'user', sealed_copy_login = NULL, paused_at = NULL, pause_reason = NULL
     WHERE id = the_domain.id;
END
$$;
COMMENT ON FUNCTION close_domain IS
    'End the migration: no relay to the legacy server any more, credentials erased, sweeps ended. '
    'Refused (BA004) while an address would be forgotten, unless forced with a reason.';
