-- Logins: the authenticators.

-- Until 0.1 it had no third parameter; who calls it with two means a login by IMAP.
DROP FUNCTION IF EXISTS record_login(text, bytea);
CREATE OR REPLACE FUNCTION record_login(address text, sealed bytea, service text DEFAULT 'imap')
RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
DECLARE
    the_domain domain := lock_domain_of(address);
    box mailbox;
BEGIN
    SELECT * INTO box FROM mailbox WHERE domain_id = the_domain.id AND local_part = local_part_of(address);
    IF wants_credential(box) AND box.state IN ('requested', 'copying', 'local') THEN
        PERFORM take_credential(box.id, sealed);
    ELSIF coalesce(box.state, 'legacy') = 'legacy' AND the_domain.mode = 'active' AND the_domain.first_login_migrates
        -- Who only sends, or edits a filter, has not come to read mail here.
        AND record_login.service IN ('imap', 'pop3') AND box.first_login_declined_at IS NULL
        AND NOT is_alias(the_domain.id, address) THEN
        PERFORM begin_first_login(address, the_domain, sealed);
    END IF;
END
$$;
COMMENT ON FUNCTION record_login IS
    'A login that the legacy server accepted: a request if the domain''s policy says so and it came by IMAP or POP3, '
    'or the new password that a mailbox waits for';

CREATE OR REPLACE FUNCTION begin_first_login(address text, the_domain domain, sealed bytea)
RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
DECLARE
    box mailbox := lock_mailbox(the_domain, address);
BEGIN
    PERFORM refuse_oversized(begin_first_login.sealed);
    IF box.state <> 'legacy' THEN  -- another login was quicker
        RETURN;
    END IF;
    UPDATE mailbox SET first_login_at = coalesce(first_login_at, clock_timestamp()),
        sealed_credential = begin_first_login.sealed
     WHERE domain_id = the_domain.id AND local_part = local_part_of(address) AND state = 'legacy';
    IF the_domain.first_login_delay = '0' THEN
        PERFORM request_migration(address, 'login', begin_first_login.sealed);
    END IF;
END
$$;

CREATE OR REPLACE FUNCTION request_due_first_logins()
RETURNS void LANGUAGE sql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
    SELECT request_migration(mailbox.full_address, 'login', mailbox.sealed_credential)
      FROM mailbox JOIN domain ON domain.id = mailbox.domain_id
     WHERE mailbox.state = 'legacy' AND mailbox.first_login_at IS NOT NULL AND mailbox.first_login_declined_at IS NULL
       AND mailbox.sealed_credential IS NOT NULL
       -- Nobody is moved in silence: the notice comes first, and the delay begins with it.
       AND coalesce(mailbox.first_login_told_at, CASE WHEN NOT domain.writes_to_users THEN mailbox.first_login_at END)
           + domain.first_login_delay <= clock_timestamp()
       AND domain.mode = 'active' AND domain.first_login_migrates
       AND NOT is_alias(domain.id, mailbox.full_address)
$$;
COMMENT ON FUNCTION request_due_first_logins IS
    'Called at each heartbeat of an authenticator: requests for those whose first login is first_login_delay ago';

CREATE OR REPLACE FUNCTION decline_first_login(address text)
RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
DECLARE
    box mailbox := mailbox_of(address);
BEGIN
    IF box.state <> 'legacy' THEN
        RAISE EXCEPTION '% is on the move already (%)', address, box.state
            USING ERRCODE = 'BA002', HINT = 'To stop the move: bascule give-up. To undo it: bascule return.';
    END IF;
    UPDATE mailbox SET first_login_declined_at = clock_timestamp(), sealed_credential = NULL WHERE id = box.id;
    INSERT INTO journal (domain, address, event)
    SELECT domain.name, box.full_address, 'first login declined' FROM domain WHERE id = box.domain_id;
END
$$;
COMMENT ON FUNCTION decline_first_login IS
    'The user does not want to be moved by logging in: the waiting move is dropped, and no login sets one off again; a request still does';

CREATE OR REPLACE FUNCTION first_login_told(mailbox_id bigint)
RETURNS void LANGUAGE sql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
    UPDATE mailbox SET first_login_told_at = clock_timestamp() WHERE id = first_login_told.mailbox_id
$$;
COMMENT ON FUNCTION first_login_told IS 'The notice of a first login is in the legacy INBOX';

CREATE OR REPLACE FUNCTION follow_login()
RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
BEGIN
    PERFORM pg_notify('bascule_mailbox', NEW.full_address);
    RETURN NULL;
END
$$;
COMMENT ON FUNCTION follow_login IS 'Authenticators hold what Dovecot must know of a mailbox: they hear of each change of it';
CREATE OR REPLACE TRIGGER follow_login
    AFTER UPDATE OF password_hash, imported_hash, needs_credential, sealed_credential, proof, legacy_login,
        first_login_declined_at, hierarchy_separator, namespace_prefix, special_uses, store ON mailbox
    FOR EACH ROW
    WHEN ((OLD.password_hash, OLD.imported_hash, OLD.needs_credential, OLD.sealed_credential IS NULL, OLD.proof,
           OLD.legacy_login, OLD.first_login_declined_at, OLD.hierarchy_separator, OLD.namespace_prefix, OLD.special_uses,
           OLD.store)
          IS DISTINCT FROM
          (NEW.password_hash, NEW.imported_hash, NEW.needs_credential, NEW.sealed_credential IS NULL, NEW.proof,
           NEW.legacy_login, NEW.first_login_declined_at, NEW.hierarchy_separator, NEW.namespace_prefix, NEW.special_uses,
           NEW.store))
    EXECUTE FUNCTION follow_login();

-- Guesses ----------------------------------------------------------------------

CREATE OR REPLACE FUNCTION share_guesses(instance text, after bigint, mine jsonb)
RETURNS TABLE (id bigint, kind text, subject text, guesses integer)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
#variable_conflict use_column
BEGIN
    DELETE FROM login_guess WHERE at < clock_timestamp() - interval '10 minutes';
    INSERT INTO login_guess (instance, part, kind, subject, guesses)
    SELECT share_guesses.instance, replace(session_user, 'bascule_', ''), each.kind, each.subject, each.guesses
      FROM jsonb_to_recordset(mine) AS each (kind text, subject text, guesses integer);
    RETURN QUERY SELECT other.id, other.kind, other.subject, other.guesses FROM login_guess AS other
                  WHERE other.id > share_guesses.after AND other.instance <> share_guesses.instance
                  ORDER BY other.id LIMIT 100000;
END
$$;
COMMENT ON FUNCTION share_guesses IS
    'Wrong passwords that an instance counted, for the others, and theirs since the row "after", for it; none older than ten minutes';

CREATE OR REPLACE FUNCTION share_sources(after timestamptz, mine jsonb)
RETURNS TABLE (address text, site text, last_seen timestamptz)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
#variable_conflict use_column
BEGIN
    DELETE FROM login_source WHERE last_seen < clock_timestamp() - interval '1 day';
    INSERT INTO login_source AS known (address, site)
    SELECT DISTINCT each.address, each.site FROM jsonb_to_recordset(mine) AS each (address text, site text)
    ON CONFLICT ON CONSTRAINT login_source_pkey DO UPDATE SET last_seen = clock_timestamp();
    RETURN QUERY SELECT known.address, known.site, known.last_seen FROM login_source AS known
                  WHERE known.last_seen > share_sources.after ORDER BY known.last_seen DESC LIMIT 200000;
END
$$;
COMMENT ON FUNCTION share_sources IS
    'From where users logged in, for the other instances, and what they saw since "after"; none older than a day';

CREATE OR REPLACE FUNCTION logged_in_from(address text, site text)
RETURNS boolean LANGUAGE sql STABLE SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
    SELECT EXISTS (SELECT FROM login_source AS known
                    WHERE known.address = logged_in_from.address AND known.site = logged_in_from.site
                      AND known.last_seen >= clock_timestamp() - interval '1 day')
$$;
COMMENT ON FUNCTION logged_in_from IS
    'For the page: whether a user logged in from there (an IPv4 address, an IPv6 /64) within a day; it can read no other source';

-- For the authenticators of the version before ----------------------------------

CREATE OR REPLACE FUNCTION login_state(address text)
RETURNS TABLE (state mailbox_state, password_hash text, store text, store_host text, wants_credential boolean)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
    SELECT coalesce(mailbox.state, 'legacy'), CASE WHEN mailbox.state = 'local' THEN mailbox.password_hash END,
           store.name, store.login_host,
           CASE WHEN mailbox.needs_credential THEN mailbox.state IN ('requested', 'copying', 'local')
                ELSE domain.mode = 'active' AND domain.first_login_migrates AND coalesce(mailbox.state, 'legacy') = 'legacy' END
      FROM domain LEFT JOIN mailbox ON mailbox.domain_id = domain.id AND mailbox.local_part = local_part_of(address)
           JOIN store ON store.name = coalesce(mailbox.store, domain.store)
     WHERE domain.name = lower(substring(address FROM '@([^@]+)$'))
$$;
COMMENT ON FUNCTION login_state IS
    'For the authenticator: where a login is to be checked, which store has the mailbox, and whether record_login() has a use for the credential';
