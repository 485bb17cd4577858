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
