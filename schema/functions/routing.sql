-- Routing: policy daemons and authenticators.

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
COMMENT ON FUNCTION reseal_domain IS
    'The same master user or OAuth 2.0 client, sealed to the workers'' new key; null if it has changed meanwhile';
