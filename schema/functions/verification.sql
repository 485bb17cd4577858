-- Verification of a mailbox that has moved, whenever an administrator wants it.

CREATE OR REPLACE FUNCTION verify_mailbox(address text)
RETURNS timestamptz LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
DECLARE
    box mailbox := mailbox_of(address);
    asked timestamptz := clock_timestamp();
BEGIN
    IF box.state <> 'local' THEN
        RAISE EXCEPTION '% is in state %: it is verified before it moves', address, box.state USING ERRCODE = 'BA002',
            HINT = 'Once it has moved, it can be verified again at any time.';
    END IF;
    PERFORM enqueue('verify', box.id, box.store);
    INSERT INTO journal (domain, address, event) VALUES ((domain_of(address)).name, lower(address), 'verification asked for');
    RETURN asked;
END
$$;
COMMENT ON FUNCTION verify_mailbox IS
    'Have a worker read every message of a mailbox that has moved, as a client does, and compare it with what came in; when it was asked for. '
    'The result is in the view verifications, columns verified_again_at and again.';

CREATE OR REPLACE FUNCTION record_verification(mailbox_id bigint, result jsonb)
RETURNS void LANGUAGE sql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
    UPDATE verification SET verified_again_at = clock_timestamp(), again = result
     WHERE verification.mailbox_id = record_verification.mailbox_id
$$;
COMMENT ON FUNCTION record_verification IS 'What a worker found when it verified a mailbox again';
