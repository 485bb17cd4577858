-- Requests: portal, first login, CLI.

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
