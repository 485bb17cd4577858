-- Requests: portal, first login, CLI.

CREATE OR REPLACE FUNCTION lock_mailbox(the_domain domain, address text)
RETURNS mailbox LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
DECLARE
    box mailbox;
BEGIN
    -- No conflict target: of two that come at the same moment the second may meet either unique index first.
    INSERT INTO mailbox (domain_id, local_part, store)
    VALUES (the_domain.id, local_part_of(address), the_domain.store) ON CONFLICT DO NOTHING;
    SELECT * INTO box FROM mailbox WHERE domain_id = the_domain.id AND local_part = local_part_of(address) FOR UPDATE;
    RETURN box;
END
$$;
COMMENT ON FUNCTION lock_mailbox IS
    'The mailbox of an address, made if there is none; nobody else changes it until the end of the transaction';

CREATE OR REPLACE FUNCTION request_migration(
    address text, how request_trigger, sealed bytea, first_name text DEFAULT '', last_name text DEFAULT ''
)
RETURNS bigint LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
DECLARE
    the_domain domain := lock_domain_of(address);
    box mailbox;
BEGIN
    IF the_domain.mode <> 'active' THEN
        RAISE EXCEPTION '% is %: nobody can be moved', the_domain.name, the_domain.mode USING ERRCODE = 'BA002';
    END IF;
    PERFORM refuse_alias(the_domain.id, address);
    PERFORM refuse_oversized(sealed);
    box := lock_mailbox(the_domain, address);
    IF box.state = 'legacy' THEN
        PERFORM set_config('bascule.reason', 'requested by ' || CASE how
            WHEN 'portal' THEN 'the user at the URL' WHEN 'login' THEN 'the user''s login' ELSE 'an administrator' END, true);
        UPDATE mailbox SET state = 'requested', trigger = how, sealed_credential = sealed, needs_credential = false,
            first_name = coalesce(nullif(request_migration.first_name, ''), mailbox.first_name),
            last_name = coalesce(nullif(request_migration.last_name, ''), mailbox.last_name),
            messages_copied = 0, messages_total = 0, bytes_copied = 0, copy_began_at = NULL, trouble_told_at = NULL,
            attempts = 0
         WHERE id = box.id;
        PERFORM forget_trouble(box.id);
    ELSIF wants_credential(box) AND box.state IN ('requested', 'copying', 'local') THEN
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

CREATE OR REPLACE FUNCTION move_mailbox(
    address text, flip_at timestamptz DEFAULT NULL, without_password boolean DEFAULT false,
    first_name text DEFAULT '', last_name text DEFAULT ''
)
RETURNS bigint LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
DECLARE
    the_domain domain := lock_domain_of(address);
    box mailbox;
    words text := 'an administrator''s word; flips ' || CASE
        WHEN move_mailbox.flip_at IS NULL THEN 'as soon as it can'
        WHEN move_mailbox.flip_at = 'infinity' THEN 'when an administrator says so'
        ELSE 'at ' || to_char(move_mailbox.flip_at, 'YYYY-MM-DD HH24:MI:SS TZ') END
        || CASE WHEN move_mailbox.without_password THEN ', with no password if none is known' ELSE '' END;
BEGIN
    IF the_domain.mode <> 'active' THEN
        RAISE EXCEPTION '% is %: nobody can be moved', the_domain.name, the_domain.mode USING ERRCODE = 'BA002';
    END IF;
    PERFORM refuse_alias(the_domain.id, address);
    IF the_domain.copy_login = 'user' THEN
        RAISE EXCEPTION '% cannot move on your word: workers log in at the legacy server as each user', lower(address)
            USING ERRCODE = 'BA002',
                  HINT = 'Give them a login that reads every mailbox: bascule copy-login master. '
                         'Or give this user''s password: bascule request.';
    END IF;
    box := lock_mailbox(the_domain, address);
    IF box.state = 'legacy' THEN
        PERFORM set_config('bascule.reason', 'requested on ' || words, true);
        UPDATE mailbox SET state = 'requested', trigger = 'administrator', proof = 'word', needs_credential = false,
            flip_at = move_mailbox.flip_at, without_password = move_mailbox.without_password,
            first_name = coalesce(nullif(move_mailbox.first_name, ''), mailbox.first_name),
            last_name = coalesce(nullif(move_mailbox.last_name, ''), mailbox.last_name),
            messages_copied = 0, messages_total = 0, bytes_copied = 0, copy_began_at = NULL, trouble_told_at = NULL,
            attempts = 0
         WHERE id = box.id;
        PERFORM forget_trouble(box.id);
    ELSIF box.state IN ('requested', 'copying') THEN
        -- A password that the legacy server refuses is no use to anybody, and is not waited for any more.
        UPDATE mailbox SET proof = 'word', flip_at = move_mailbox.flip_at,
            without_password = mailbox.without_password OR move_mailbox.without_password,
            sealed_credential = CASE WHEN NOT needs_credential THEN sealed_credential END, needs_credential = false,
            trouble_told_at = NULL
         WHERE id = box.id;
        PERFORM forget_trouble(box.id);
        PERFORM note(box, 'moves on an administrator''s word', words);
        PERFORM enqueue('migrate', box.id, box.store);
    ELSIF box.state = 'local' THEN
        RAISE EXCEPTION '% has already moved', lower(address) USING ERRCODE = 'BA002';
    ELSE
        RAISE EXCEPTION '% is already on the move (%)', lower(address), box.state USING ERRCODE = 'BA002';
    END IF;
    RETURN box.id;
END
$$;
COMMENT ON FUNCTION move_mailbox IS
    'Move a mailbox on an administrator''s word, without its user''s password, read with the domain''s copy login. It is copied at '
    'once and flips at flip_at (null: as soon as it can; infinity: not yet); called again for one that is on the move, it '
    'sets the hour anew. Without a password that is proved or imported it flips only with without_password.';

CREATE OR REPLACE FUNCTION take_credential(mailbox_id bigint, sealed bytea)
RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
DECLARE
    box mailbox;
BEGIN
    PERFORM refuse_oversized(sealed);
    UPDATE mailbox SET sealed_credential = sealed, needs_credential = false, trouble_told_at = NULL
     WHERE id = take_credential.mailbox_id AND wants_credential(mailbox) RETURNING * INTO box;
    IF box.id IS NULL THEN
        RETURN;  -- another request was quicker, or the domain is closed
    END IF;
    PERFORM forget_trouble(box.id);
    PERFORM note(box, 'new password taken up');
    -- One that waits for its hour flips no sooner for it.
    IF box.staged_at IS NULL OR coalesce(box.flip_at, '-infinity') <= clock_timestamp() THEN
        PERFORM enqueue(task_of(box), box.id, box.store);
    END IF;
END
$$;

CREATE OR REPLACE FUNCTION refuse_oversized(sealed bytea)
RETURNS void LANGUAGE plpgsql IMMUTABLE AS $$
BEGIN
    IF octet_length(sealed) > 4096 THEN
        RAISE EXCEPTION 'a password of % bytes is not taken', octet_length(sealed) USING ERRCODE = 'BA002';
    END IF;
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

-- The first release's portal_domain() gave the whole row, sealed copy login and all. Under another name it goes on,
-- for our own use: whoever calls it while the schema is upgraded has an answer.
DO $$
BEGIN
    IF 'bascule.domain'::regtype = (SELECT prorettype FROM pg_proc WHERE oid = to_regprocedure('bascule.portal_domain(text)')) THEN
        ALTER FUNCTION portal_domain(text) RENAME TO domain_of_url;
    END IF;
END
$$;

CREATE OR REPLACE FUNCTION domain_of_url(token text)
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
COMMENT ON FUNCTION domain_of_url IS 'The domain of a users'' URL, or BA003 whose hint is "expired" or "unknown"';

CREATE OR REPLACE FUNCTION portal_domain(token text)
RETURNS SETOF routing_domain LANGUAGE sql STABLE SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
    SELECT routing_domain.* FROM domain_of_url(token) AS found JOIN routing_domain ON routing_domain.id = found.id
$$;
COMMENT ON FUNCTION portal_domain IS
    'For the users'' page: the domain of a URL and its servers, or BA003 whose hint is "expired" or "unknown"';

CREATE OR REPLACE FUNCTION portal_login_name(token text, address text)
RETURNS text LANGUAGE sql STABLE SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
    SELECT mailbox.legacy_login FROM domain_of_url(token) AS found
      JOIN mailbox ON mailbox.domain_id = found.id AND mailbox.local_part = local_part_of(address)
     WHERE lower(substring(address FROM '@([^@]+)$')) = found.name
$$;
COMMENT ON FUNCTION portal_login_name IS
    'For the users'' page: by which name the legacy server knows the user of an address; null: as the domain''s login_form has it';

CREATE OR REPLACE FUNCTION portal_request(
    token text, address text, sealed bytea, first_name text, last_name text, language user_language
)
RETURNS bigint LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
DECLARE
    the_domain domain := domain_of_url(token);
    box mailbox;
BEGIN
    IF (domain_of(address)).id <> the_domain.id THEN
        RAISE EXCEPTION '% is not an address of %', address, the_domain.name USING ERRCODE = 'BA001';
    END IF;
    box := lock_mailbox(lock_domain_of(address), address);
    IF box.state = 'legacy' OR wants_credential(box) THEN
        PERFORM request_migration(address, 'portal', sealed, first_name, last_name);
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
