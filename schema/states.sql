-- The states of a mailbox and of a domain, and what every change of them
-- sets off. Nothing else in the database or in the programs decides whether a
-- change is legal, writes the journal, tells the other parts or queues work.

CREATE OR REPLACE FUNCTION is_legal_transition(from_state mailbox_state, to_state mailbox_state)
RETURNS boolean LANGUAGE sql IMMUTABLE AS $$
    SELECT (from_state, to_state) IN (
        ('legacy',    'requested'),
        ('requested', 'copying'),
        ('requested', 'legacy'),     -- given up before it began
        ('copying',   'cutover'),
        ('copying',   'legacy'),     -- given up
        ('cutover',   'copying'),    -- not clean in time
        ('cutover',   'local'),
        ('local',     'returning'),
        ('returning', 'local'),      -- the return was not clean in time
        ('returning', 'legacy')
    )
$$;
COMMENT ON FUNCTION is_legal_transition IS 'The whole state machine of a mailbox';

CREATE OR REPLACE FUNCTION wants_credential(box mailbox)
RETURNS boolean LANGUAGE sql IMMUTABLE AS $$
    SELECT box.needs_credential
        OR box.proof = 'word' AND box.sealed_credential IS NULL AND box.state IN ('requested', 'copying')
$$;
COMMENT ON FUNCTION wants_credential IS
    'Whether there is a use for the password that a user gives now: the move waits for it, or goes on without and is better with it';

-- Put a task for a mailbox on its store's queue, unless the same task is
-- already waiting there. Two tasks of one mailbox never run at once (lock).
-- Somebody waits for a move or a return; nobody waits for a sweep.
CREATE OR REPLACE FUNCTION enqueue(task text, mailbox_id bigint, store text, at timestamptz DEFAULT NULL)
RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = queue, pg_temp AS $$
DECLARE
    key text := 'mailbox:' || mailbox_id;
BEGIN
    PERFORM procrastinate_defer_jobs_v1(ARRAY[
        ROW(store, task, CASE task WHEN 'sweep' THEN 0 ELSE 1 END, key, task || ':' || key,
            jsonb_build_object('mailbox_id', mailbox_id), at)
    ]::procrastinate_job_to_defer_v1[]);
EXCEPTION WHEN unique_violation THEN
    -- Already waiting; bring it forward if this call wants it sooner.
    UPDATE procrastinate_jobs SET scheduled_at = at
     WHERE queueing_lock = task || ':' || key AND status = 'todo'
       AND scheduled_at > coalesce(at, now());
    PERFORM pg_notify('procrastinate_queue_v1#' || store, jsonb_build_object('type', 'job_inserted')::text);
END
$$;

CREATE OR REPLACE FUNCTION refuse_name(local_part text)
RETURNS void LANGUAGE plpgsql IMMUTABLE AS $$
BEGIN
    RAISE EXCEPTION '% cannot move: Dovecot takes no such name of a user, only a-z 0-9 . _ -', local_part
        USING ERRCODE = 'BA002',
              HINT = 'Its mail goes to the legacy server as before. Have it renamed there and move the new name; '
                     'or make it an alias of a mailbox here; or waive it.';
END
$$;

CREATE OR REPLACE FUNCTION guard_mailbox_state()
RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'INSERT' THEN
        IF NEW.state <> 'legacy' THEN
            RAISE EXCEPTION 'a mailbox begins in state legacy, not %', NEW.state USING ERRCODE = 'BA002';
        END IF;
        IF NEW.local_part ~ '[\s[:cntrl:]"]' THEN
            PERFORM bascule.refuse_name(NEW.local_part);
        END IF;
        NEW.full_address := NEW.local_part || '@' || (SELECT name FROM bascule.domain WHERE id = NEW.domain_id);
        RETURN NEW;
    END IF;
    IF NEW.state = OLD.state THEN
        RETURN NEW;
    END IF;
    IF NOT bascule.is_legal_transition(OLD.state, NEW.state) THEN
        RAISE EXCEPTION '% cannot go from % to %', OLD.full_address, OLD.state, NEW.state
            USING ERRCODE = 'BA002';
    END IF;
    -- Dovecot's auth_username_chars, as it is when nobody has set it.
    IF NEW.state = 'requested' AND NEW.local_part !~ '^[a-z0-9._-]+$' THEN
        PERFORM bascule.refuse_name(NEW.local_part);
    END IF;
    NEW.epoch := OLD.epoch + 1;
    NEW.state_since := clock_timestamp();
    IF NEW.state = 'legacy' THEN
        -- Another move begins anew; a hash that was in force here may be of a former password by then.
        NEW.proof := 'password';
        NEW.flip_at := NULL;
        NEW.staged_at := NULL;
        NEW.without_password := false;
        IF OLD.state = 'returning' THEN
            NEW.imported_hash := NULL;
        END IF;
    END IF;
    RETURN NEW;
END
$$;

CREATE OR REPLACE FUNCTION follow_mailbox_state()
RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
BEGIN
    IF NEW.state = OLD.state THEN
        RETURN NULL;
    END IF;
    INSERT INTO journal (domain, address, event, from_state, to_state, reason)
    SELECT domain.name, NEW.full_address, 'state', OLD.state, NEW.state,
           nullif(current_setting('bascule.reason', true), '')
      FROM domain WHERE domain.id = NEW.domain_id;
    -- The reason belongs to this change only, not to a later one in the same transaction.
    PERFORM set_config('bascule.reason', '', true);
    PERFORM pg_notify('bascule_mailbox', NEW.full_address);
    IF NEW.state = 'local' THEN
        DELETE FROM sighting WHERE domain_id = NEW.domain_id AND local_part = NEW.local_part;
    END IF;
    IF NEW.state = 'requested' OR (NEW.state = 'copying' AND OLD.state = 'cutover') THEN
        PERFORM enqueue('migrate', NEW.id, NEW.store, NEW.next_try);
    ELSIF NEW.state = 'local' AND OLD.state = 'cutover' THEN
        PERFORM enqueue('sweep', NEW.id, NEW.store);
    END IF;
    RETURN NULL;
END
$$;

CREATE OR REPLACE FUNCTION follow_new_mailbox()
RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
BEGIN
    PERFORM pg_notify('bascule_mailbox', NEW.full_address);
    RETURN NULL;
END
$$;
-- Its mail may go to the owner of a shorter name until the parts know it: see routing_unmoved.
CREATE OR REPLACE TRIGGER follow_new_mailbox AFTER INSERT ON mailbox
    FOR EACH ROW WHEN (NEW.local_part ~ '[^a-z0-9._]') EXECUTE FUNCTION follow_new_mailbox();

CREATE OR REPLACE TRIGGER guard_state BEFORE INSERT OR UPDATE ON mailbox
    FOR EACH ROW EXECUTE FUNCTION guard_mailbox_state();
CREATE OR REPLACE TRIGGER follow_state AFTER UPDATE OF state ON mailbox
    FOR EACH ROW EXECUTE FUNCTION follow_mailbox_state();

CREATE OR REPLACE FUNCTION follow_new_mailbox()
RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
BEGIN
    -- It could be taken for another mailbox with a detail (RFC 5233).
    IF NEW.local_part ~ '[^a-z0-9.]' THEN
        PERFORM pg_notify('bascule_mailbox', NEW.full_address);
    END IF;
    RETURN NULL;
END
$$;
CREATE OR REPLACE TRIGGER follow_new AFTER INSERT ON mailbox FOR EACH ROW EXECUTE FUNCTION follow_new_mailbox();

-- A password was given for the server that was named then: it is never sent to another.
CREATE OR REPLACE FUNCTION void_credentials()
RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
DECLARE
    of_users bigint;
    of_workers bigint := 0;
    words text;
BEGIN
    UPDATE mailbox SET sealed_credential = NULL, needs_credential = state <> 'legacy' AND proof = 'password',
        trouble_told_at = NULL
     WHERE domain_id = NEW.id AND sealed_credential IS NOT NULL;
    GET DIAGNOSTICS of_users = ROW_COUNT;
    IF NEW.sealed_copy_login = OLD.sealed_copy_login THEN
        NEW.copy_login := 'user';
        NEW.sealed_copy_login := NULL;
        of_workers := 1;
    END IF;
    IF of_users + of_workers > 0 THEN
        words := format('the legacy server is another (%s:%s, before %s:%s): %s erased', NEW.imap_host, NEW.imap_port,
                        OLD.imap_host, OLD.imap_port,
                        concat_ws(', ', of_users || ' stored passwords', CASE of_workers WHEN 1 THEN 'the copy login' END));
        PERFORM note(NEW, 'credentials erased', words);
        RAISE NOTICE '%: %', NEW.name, words
            USING HINT = 'Their moves and sweeps wait for the passwords: the next login here or request at the URL brings each.'
                         ' bascule copy-login gives the copy login anew.';
    END IF;
    RETURN NEW;
END
$$;
CREATE OR REPLACE TRIGGER void_credentials BEFORE UPDATE ON domain
    FOR EACH ROW WHEN (
        (OLD.imap_host, OLD.imap_port, OLD.imap_tls, OLD.pop3_port, OLD.pop3_tls, OLD.sieve_port, OLD.sieve_tls)
        IS DISTINCT FROM
        (NEW.imap_host, NEW.imap_port, NEW.imap_tls, NEW.pop3_port, NEW.pop3_tls, NEW.sieve_port, NEW.sieve_tls))
    EXECUTE FUNCTION void_credentials();

-- Sweeps need no password of the user's where workers log in as somebody else.
CREATE OR REPLACE FUNCTION follow_copy_login()
RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
BEGIN
    UPDATE mailbox SET needs_credential = NEW.copy_login = 'user'
     WHERE domain_id = NEW.id AND state = 'local' AND sealed_credential IS NULL
       AND needs_credential <> (NEW.copy_login = 'user');
    RETURN NULL;
END
$$;
CREATE OR REPLACE TRIGGER follow_copy_login AFTER UPDATE ON domain
    FOR EACH ROW WHEN (NEW.copy_login <> OLD.copy_login AND NEW.mode = 'active')
    EXECUTE FUNCTION follow_copy_login();

CREATE OR REPLACE FUNCTION follow_domain_mode()
RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
BEGIN
    IF TG_OP = 'INSERT' OR NEW.mode <> OLD.mode THEN
        INSERT INTO journal (domain, event, from_state, to_state, reason)
        VALUES (NEW.name, 'mode', CASE WHEN TG_OP = 'UPDATE' THEN OLD.mode END, NEW.mode,
                nullif(current_setting('bascule.reason', true), ''));
        PERFORM set_config('bascule.reason', '', true);
    END IF;
    PERFORM pg_notify('bascule_domain', NEW.id::text);
    RETURN NULL;
END
$$;
CREATE OR REPLACE TRIGGER follow_mode AFTER INSERT OR UPDATE ON domain
    FOR EACH ROW EXECUTE FUNCTION follow_domain_mode();

CREATE OR REPLACE FUNCTION follow_alias()
RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
BEGIN
    PERFORM pg_notify('bascule_domain', coalesce(NEW.domain_id, OLD.domain_id)::text);
    RETURN NULL;
END
$$;
CREATE OR REPLACE TRIGGER follow_alias AFTER INSERT OR UPDATE OR DELETE ON alias
    FOR EACH ROW EXECUTE FUNCTION follow_alias();

CREATE OR REPLACE FUNCTION journal_is_append_only()
RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'the journal is append-only' USING ERRCODE = 'BA002';
END
$$;
CREATE OR REPLACE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON journal
    FOR EACH STATEMENT EXECUTE FUNCTION journal_is_append_only();
