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

-- Put a task for a mailbox on its store's queue, unless the same task is
-- already waiting there. Two tasks of one mailbox never run at once (lock).
-- Somebody waits for a move or a return; nobody waits for a sweep.
CREATE OR REPLACE FUNCTION enqueue(task text, mailbox_id bigint, store text, at timestamptz DEFAULT NULL)
RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = queue, pg_temp AS $$
DECLARE
    key text := 'mailbox:' || mailbox_id;
BEGIN
    PERFORM procrastinate_defer_jobs_v1(ARRAY[
        ROW(store, task, CASE task WHEN 'sweep' THEN 0 ELSE 1 END, key, task || ':' || key, jsonb_build_object('mailbox_id', mailbox_id), at)
    ]::procrastinate_job_to_defer_v1[]);
EXCEPTION WHEN unique_violation THEN
    -- Already waiting; bring it forward if this call wants it sooner.
    UPDATE procrastinate_jobs SET scheduled_at = at
     WHERE queueing_lock = task || ':' || key AND status = 'todo'
       AND scheduled_at > coalesce(at, now());
    PERFORM pg_notify('procrastinate_queue_v1#' || store, jsonb_build_object('type', 'job_inserted')::text);
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
            RAISE EXCEPTION '% cannot move: Dovecot takes no such name of a user', NEW.local_part
                USING ERRCODE = 'BA002', HINT = 'Its mail goes to the legacy server. Waive it, or make it an alias.';
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
    NEW.epoch := OLD.epoch + 1;
    NEW.state_since := clock_timestamp();
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

CREATE OR REPLACE TRIGGER guard_state BEFORE INSERT OR UPDATE ON mailbox
    FOR EACH ROW EXECUTE FUNCTION guard_mailbox_state();
CREATE OR REPLACE TRIGGER follow_state AFTER UPDATE OF state ON mailbox
    FOR EACH ROW EXECUTE FUNCTION follow_mailbox_state();

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
