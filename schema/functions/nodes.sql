-- Nodes: the policy daemons and authenticators that must put a hold into force before a mailbox flips.
--
-- Every node that is registered is waited for, also one that is silent: what it still does is not known. A policy
-- daemon that signs off is not: without it, Postfix on its host defers all mail. An authenticator that signs off is:
-- Dovecot on its host may go on proxying sessions to the legacy server, and only the authenticator ends them.

CREATE OR REPLACE FUNCTION is_silent(the_node node)
RETURNS boolean LANGUAGE sql VOLATILE AS $$
    -- Three heartbeats.
    SELECT the_node.signed_off_at IS NOT NULL OR the_node.heartbeat_at <= clock_timestamp() - interval '15 seconds'
$$;
COMMENT ON FUNCTION is_silent IS 'Whether a node gives no sign of life';

-- Who speaks, as far as the database can know it: the role that logged in, and the address from which it came.
-- Behind a pooler, and for programs on the database's own host, the address is the same for all.
CREATE OR REPLACE FUNCTION speak_for(node text, part text)
RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
DECLARE
    who text := session_user || ' at ' || coalesce(host(inet_client_addr()), 'the database host');
    known node;
BEGIN
    IF part NOT IN ('policy_daemon', 'authenticator') OR NOT pg_has_role(session_user, 'bascule_' || part, 'MEMBER') THEN
        RAISE EXCEPTION 'the role % does not speak for the part %', session_user, part USING ERRCODE = '42501';
    END IF;
    SELECT * INTO known FROM node WHERE name = speak_for.node AND node.part = speak_for.part FOR UPDATE;
    IF known.speaker NOT IN (who, '') THEN
        IF NOT is_silent(known) THEN
            RAISE EXCEPTION '% does not speak for % on %: that is %', who, part, node, known.speaker
                USING ERRCODE = '42501', HINT = 'Each host needs a name of its own: node, in bascule.toml.';
        END IF;
        INSERT INTO journal (event, reason)
        VALUES ('node moved', format('%s on %s: %s, before %s', part, node, who, known.speaker));
    END IF;
    INSERT INTO node AS old (name, part, heartbeat_at, speaker)
    VALUES (speak_for.node, speak_for.part, clock_timestamp(), who)
    ON CONFLICT ON CONSTRAINT node_pkey
    DO UPDATE SET heartbeat_at = excluded.heartbeat_at, speaker = excluded.speaker, signed_off_at = NULL;
END
$$;
COMMENT ON FUNCTION speak_for IS
    'A sign of life of a node; refused (42501) to a role that is not of this part, and to another host while this one is alive';

CREATE OR REPLACE FUNCTION beat(node text, part text)
RETURNS void LANGUAGE sql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
    SELECT speak_for(beat.node, beat.part)
$$;
COMMENT ON FUNCTION beat IS 'A node''s heartbeat, every 5 seconds';

CREATE OR REPLACE FUNCTION sign_off(node text, part text)
RETURNS void LANGUAGE sql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
    SELECT speak_for(sign_off.node, sign_off.part);
    UPDATE node SET signed_off_at = clock_timestamp() WHERE node.name = sign_off.node AND node.part = sign_off.part;
    DELETE FROM node WHERE node.name = sign_off.node AND node.part = sign_off.part AND node.part = 'policy_daemon'
$$;
COMMENT ON FUNCTION sign_off IS 'A node stopped in good order. A policy daemon is not waited for; an authenticator is, until it is back.';

CREATE OR REPLACE FUNCTION acknowledge(mailbox_id bigint, node text, part text, epoch bigint)
RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
BEGIN
    PERFORM speak_for(acknowledge.node, acknowledge.part);
    INSERT INTO acknowledgement AS ack (mailbox_id, node, part, epoch)
    -- None can be ahead of what has happened.
    SELECT mailbox.id, acknowledge.node, acknowledge.part, least(acknowledge.epoch, mailbox.epoch)
      FROM mailbox WHERE mailbox.id = acknowledge.mailbox_id
    ON CONFLICT ON CONSTRAINT acknowledgement_pkey DO UPDATE SET epoch = greatest(ack.epoch, excluded.epoch);
    PERFORM pg_notify('bascule_acknowledgement', acknowledge.mailbox_id::text);
END
$$;
COMMENT ON FUNCTION acknowledge IS 'A node has put the change of state with this epoch into force';

DROP FUNCTION IF EXISTS forget_node(text, text, text);
CREATE OR REPLACE FUNCTION forget_node(name text, part text, reason text, serves_nobody boolean DEFAULT false)
RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
DECLARE
    known node;
BEGIN
    PERFORM insist_on_reason(forget_node.reason, format('say why %s on %s is not to be waited for', part, name));
    SELECT * INTO known FROM node WHERE node.name = forget_node.name AND node.part = forget_node.part FOR UPDATE;
    IF known.name IS NULL THEN
        RAISE EXCEPTION 'no % on % is known', part, name USING ERRCODE = 'BA003', HINT = 'They are in the view bascule.parts.';
    END IF;
    IF NOT is_silent(known) THEN
        RAISE EXCEPTION '% on % is alive: it is waited for', part, name USING ERRCODE = 'BA002', HINT = 'Stop it first.';
    END IF;
    -- hooks/deputy.py, GOOD
    IF known.part = 'authenticator' AND NOT serves_nobody AND known.heartbeat_at > clock_timestamp() - interval '1 day' THEN
        RAISE EXCEPTION 'Dovecot on % may go on with logins until %, by what its authenticator left', known.name,
            to_char(known.heartbeat_at + interval '1 day', 'YYYY-MM-DD HH24:MI:SS')
            USING ERRCODE = 'BA002',
                  HINT = format('Stop Dovecot there, or make sure that the host is off. Then: bascule node forget %s %s, '
                                'or forget_node(..., serves_nobody => true).', known.name, known.part);
    END IF;
    DELETE FROM node WHERE node.name = forget_node.name AND node.part = forget_node.part;
    INSERT INTO journal (event, reason) VALUES ('node forgotten', format('%s on %s: %s', part, name, forget_node.reason));
END
$$;
COMMENT ON FUNCTION forget_node IS
    'A node that gives no sign of life is gone for good, or cannot do harm: it is not waited for until it is back. '
    'Of an authenticator it is refused (BA002) for a day after its last heartbeat, as long as Dovecot on its host may go on '
    'by what it left; who makes sure that Dovecot serves nobody there says so (serves_nobody).';

CREATE OR REPLACE FUNCTION unacknowledged(mailbox_id bigint, epoch bigint)
RETURNS TABLE (part text, node text) LANGUAGE sql STABLE SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
    SELECT node.part, node.name FROM node
     WHERE NOT EXISTS (SELECT FROM acknowledgement AS ack
                        WHERE ack.mailbox_id = unacknowledged.mailbox_id AND ack.node = node.name
                          AND ack.part = node.part AND ack.epoch >= unacknowledged.epoch)
    UNION ALL
    SELECT needed.part, 'any host' FROM unnest(ARRAY['policy_daemon', 'authenticator']) AS needed (part)
     WHERE NOT EXISTS (SELECT FROM node WHERE node.part = needed.part)
$$;
COMMENT ON FUNCTION unacknowledged IS
    'Who has not yet put a change of state into force. "any host": there is none of that part at all.';

CREATE OR REPLACE FUNCTION refuse_unacknowledged(mailbox_id bigint, epoch bigint)
RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
DECLARE
    waiting text := (SELECT string_agg(format('%s on %s', part, node), ', ') FROM unacknowledged(mailbox_id, epoch));
BEGIN
    IF waiting IS NOT NULL THEN
        RAISE EXCEPTION 'not acknowledged by: %', waiting USING ERRCODE = 'BA002', HINT = node_hint();
    END IF;
END
$$;

CREATE OR REPLACE FUNCTION refuse_silent_nodes(box mailbox)
RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
DECLARE
    who text;
BEGIN
    SELECT string_agg(each.part || ' on ' || coalesce(each.node || to_char(each.last_sign, '" since "YYYY-MM-DD HH24:MI:SS'),
                                                      'any host'), ', ')
      INTO who FROM silent AS each;
    IF who IS NOT NULL THEN
        RAISE EXCEPTION 'the mail of % cannot be held: there is no sign of life of %', box.full_address, who
            USING ERRCODE = 'BA002', HINT = node_hint();
    END IF;
END
$$;
COMMENT ON FUNCTION refuse_silent_nodes IS 'No mail is held for a flip that cannot come';

CREATE OR REPLACE FUNCTION node_hint()
RETURNS text LANGUAGE sql IMMUTABLE AS $$
    SELECT 'Is it in order? See its log there. If that host is gone for good: '
           'bascule node forget HOST PART --reason WHY. It is tried again at next_try'
$$;
