-- Routing: policy daemons and authenticators.


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
