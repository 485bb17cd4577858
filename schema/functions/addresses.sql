-- The acts. Each is the only way to do what it does; each refuses with a
-- message for a person (SQLSTATE class BA) and then has changed nothing.
--
--   BA001  the address is not in a domain that we know
--   BA002  this may not be done in the present state
--   BA003  no such domain, mailbox or URL
--   BA004  the domain cannot be closed yet
--   BA005  the address is another name of a mailbox

-- Addresses.

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

CREATE OR REPLACE FUNCTION lock_domain_of(address text)
RETURNS domain LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
DECLARE
    the_domain domain;
BEGIN
    SELECT * INTO the_domain FROM domain WHERE id = (domain_of(address)).id FOR SHARE;
    RETURN the_domain;
END
$$;
COMMENT ON FUNCTION lock_domain_of IS
    'The domain of an address, or BA001; its mode and its servers stay as they are until the end of the transaction';

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

-- The journal, and what was wrong.

CREATE OR REPLACE FUNCTION note(box mailbox, event text, reason text DEFAULT NULL)
RETURNS void LANGUAGE sql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
    INSERT INTO journal (domain, address, event, reason)
    SELECT domain.name, box.full_address, note.event, note.reason FROM domain WHERE domain.id = box.domain_id
$$;
COMMENT ON FUNCTION note(mailbox, text, text) IS 'Write an event of a mailbox into the journal';

CREATE OR REPLACE FUNCTION note(the_domain domain, event text, reason text DEFAULT NULL, address text DEFAULT NULL)
RETURNS void LANGUAGE sql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
    INSERT INTO journal (domain, address, event, reason) VALUES (the_domain.name, lower(note.address), note.event, note.reason)
$$;
COMMENT ON FUNCTION note(domain, text, text, text) IS 'Write an event of a domain, or of one of its addresses, into the journal';

CREATE OR REPLACE FUNCTION forget_trouble(mailbox_id bigint)
RETURNS void LANGUAGE sql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
    UPDATE mailbox SET last_error = NULL, last_advice = NULL, last_error_at = NULL, next_try = NULL
     WHERE id = forget_trouble.mailbox_id
       AND (last_error, last_advice, last_error_at, next_try) IS DISTINCT FROM (NULL, NULL, NULL, NULL)
$$;
COMMENT ON FUNCTION forget_trouble IS 'What was wrong with a mailbox is over';

CREATE OR REPLACE FUNCTION printable(words text)
RETURNS text LANGUAGE sql IMMUTABLE AS $$
    -- Longer than any sentence of ours, shorter than what a hostile server may say.
    SELECT left(regexp_replace(words, '[\u0001-\u0008\u000b-\u001f\u007f-\u009f]', U&'\FFFD', 'g'), 2000)
$$;
COMMENT ON FUNCTION printable IS
    'Words that may be shown on a terminal: a server may have had its say in them, and put control characters in';
