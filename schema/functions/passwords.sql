-- Which password is good here: brought from the legacy side, renewed, or proved by a first login after the flip.

CREATE OR REPLACE FUNCTION import_passwords(domain_name text, addresses text[], hashes text[])
RETURNS TABLE (address text, outcome text) LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
DECLARE
    the_domain domain := domain_named(domain_name);
    box mailbox;
BEGIN
    FOR number IN 1 .. coalesce(array_length(addresses, 1), 0) LOOP
        address := lower(addresses[number]);
        -- Nothing here quotes a hash: what is said goes to logs.
        IF coalesce(hashes[number] !~ '^\{[A-Z0-9.-]+\}.', true) OR octet_length(hashes[number]) > 1024 THEN
            RAISE EXCEPTION 'what was given for % is no hash in a scheme''s form', address USING ERRCODE = 'BA002';
        END IF;
        IF (domain_of(address)).id <> the_domain.id THEN
            RAISE EXCEPTION '% is not an address of %', address, the_domain.name USING ERRCODE = 'BA001';
        END IF;
        PERFORM refuse_alias(the_domain.id, address);
        box := lock_mailbox(the_domain, address);
        IF box.state IN ('cutover', 'returning') THEN
            RAISE EXCEPTION '% is in state %: it is over in a moment', address, box.state USING ERRCODE = 'BA002',
                HINT = 'Nothing was imported. Do it again then.';
        ELSIF box.state = 'local' AND box.password_hash IS DISTINCT FROM box.imported_hash THEN
            -- Proved or renewed: what was exported some time ago is older.
            outcome := 'own';
        ELSIF box.state = 'local' THEN
            UPDATE mailbox SET password_hash = hashes[number], imported_hash = hashes[number], without_password = false
             WHERE id = box.id;
            outcome := 'in force';
        ELSIF the_domain.mode = 'closed' THEN
            RAISE EXCEPTION '% is closed, and % has not moved', the_domain.name, address USING ERRCODE = 'BA002';
        ELSE
            UPDATE mailbox SET imported_hash = hashes[number] WHERE id = box.id;
            outcome := CASE WHEN box.sealed_credential IS NULL OR box.needs_credential THEN 'kept' ELSE 'proved' END;
            IF box.state IN ('requested', 'copying') AND box.last_error IS NOT NULL AND NOT box.needs_credential THEN
                PERFORM enqueue('migrate', box.id, box.store);  -- it may have waited for just this
            END IF;
        END IF;
        IF outcome <> 'own' THEN
            PERFORM note(box, 'password imported', substring(hashes[number] FROM '^\{[^}]+\}'));
        END IF;
        RETURN NEXT;
    END LOOP;
END
$$;
COMMENT ON FUNCTION import_passwords IS
    'Take hashes in over from the legacy side, all or none, for bascule password import. outcome: kept (in force at the flip), '
    'proved (kept, but the password that the legacy server took wins), in force (moved with none, or with one that was '
    'imported), own (the mailbox has a newer one here, which stays)';

CREATE OR REPLACE FUNCTION renew_password(address text, former text, hash text)
RETURNS boolean LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
DECLARE
    box mailbox := mailbox_of(address);
BEGIN
    UPDATE mailbox SET password_hash = hash, imported_hash = NULL
     WHERE id = box.id AND state = 'local' AND password_hash = former AND imported_hash = former
       AND hash LIKE '{ARGON2ID}$argon2id$%';
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    PERFORM note(box, 'password renewed', substring(former FROM '^\{[^}]+\}') || ' to {ARGON2ID}');
    RETURN true;
END
$$;
COMMENT ON FUNCTION renew_password IS
    'A login was right by an imported hash, "former": from now on the same password is checked by a better one. '
    'False: it is not the one in force';

CREATE OR REPLACE FUNCTION take_first_password(address text, hash text)
RETURNS boolean LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
DECLARE
    the_domain domain := lock_domain_of(address);
    box mailbox := mailbox_of(address);
BEGIN
    UPDATE mailbox SET password_hash = hash, without_password = false
     WHERE id = box.id AND state = 'local' AND password_hash IS NULL AND the_domain.mode = 'active'
       AND hash LIKE '{ARGON2ID}$argon2id$%';
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    PERFORM note(box, 'first password', 'the legacy server took it');
    RETURN true;
END
$$;
COMMENT ON FUNCTION take_first_password IS
    'The first login at a mailbox that moved without a password, which the legacy server took. False: it has one by now';
