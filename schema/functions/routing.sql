-- Routing: policy daemons and authenticators.

CREATE OR REPLACE FUNCTION beat(node text, part text)
RETURNS void LANGUAGE sql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
    INSERT INTO node (name, part, heartbeat_at) VALUES (beat.node, beat.part, clock_timestamp())
    ON CONFLICT (name, part) DO UPDATE SET heartbeat_at = excluded.heartbeat_at
$$;
COMMENT ON FUNCTION beat IS 'A node''s heartbeat, every 5 seconds';

CREATE OR REPLACE FUNCTION sign_off(node text, part text)
RETURNS void LANGUAGE sql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
    DELETE FROM node WHERE node.name = sign_off.node AND node.part = sign_off.part
$$;
COMMENT ON FUNCTION sign_off IS 'A node stopped in good order: it is not waited for';

CREATE OR REPLACE FUNCTION acknowledge(mailbox_id bigint, node text, part text, epoch bigint)
RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
BEGIN
    INSERT INTO acknowledgement AS ack (mailbox_id, node, part, epoch)
    VALUES (acknowledge.mailbox_id, acknowledge.node, acknowledge.part, acknowledge.epoch)
    ON CONFLICT ON CONSTRAINT acknowledgement_pkey DO UPDATE SET epoch = greatest(ack.epoch, excluded.epoch);
    PERFORM pg_notify('bascule_acknowledgement', acknowledge.mailbox_id::text);
END
$$;
COMMENT ON FUNCTION acknowledge IS 'A node has put the change of state with this epoch into force';

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
COMMENT ON FUNCTION reseal_domain IS 'The same master user or OAuth 2.0 client, sealed to the workers'' new key; null if it has changed meanwhile';
