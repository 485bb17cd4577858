-- What checks find: by running nodes, by an administrator who knows better; and domains that are taken out again.

CREATE OR REPLACE FUNCTION record_findings(node text, findings jsonb)
RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
DECLARE
    the_part text := substring(session_user FROM '^bascule_(.+)$');  -- a part speaks for itself only
BEGIN
    DELETE FROM finding AS known
     WHERE known.node = record_findings.node AND known.part = the_part
       AND NOT EXISTS (
           SELECT FROM jsonb_to_recordset(findings) AS found (name text, domain text, text text)
            WHERE found.name = known.name AND found.text = known.text
              AND (SELECT id FROM domain WHERE domain.name = found.domain) IS NOT DISTINCT FROM known.domain_id);
    INSERT INTO finding AS known (node, part, domain_id, name, level, text, remedy)
    SELECT DISTINCT ON (found.name, found.text, domain.id)
           record_findings.node, the_part, domain.id, found.name, found.level, found.text, coalesce(found.remedy, '')
      FROM jsonb_to_recordset(findings) AS found (name text, domain text, level text, text text, remedy text)
      LEFT JOIN domain ON domain.name = found.domain
     WHERE found.domain IS NULL OR domain.id IS NOT NULL
    ON CONFLICT ON CONSTRAINT finding_node_part_domain_id_name_text_key
    DO UPDATE SET level = excluded.level, remedy = excluded.remedy, last_seen = clock_timestamp();
END
$$;
COMMENT ON FUNCTION record_findings IS
    'All that a part of a node finds now: [{"name", "domain" or null, "level", "text", "remedy"}]; what is not among it is no more';

-- An address that bascule check invented to see what happens to one that does not exist is no address of anybody's.
CREATE OR REPLACE FUNCTION leave_out_invented()
RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.waived_at IS NULL AND NEW.local_part ~ '^bascule-check-[0-9a-f]{12}$' THEN
        RETURN NULL;
    END IF;
    RETURN NEW;
END
$$;
CREATE OR REPLACE TRIGGER leave_out_invented BEFORE INSERT ON sighting
    FOR EACH ROW EXECUTE FUNCTION leave_out_invented();
DELETE FROM sighting WHERE waived_at IS NULL AND local_part ~ '^bascule-check-[0-9a-f]{12}$';

CREATE OR REPLACE FUNCTION activate_domain_regardless(
    domain_name text, token text, valid_for interval, reason text, findings text)
RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
BEGIN
    PERFORM insist_on_reason(activate_domain_regardless.reason, 'activating against what check found needs a reason');
    PERFORM activate_domain(domain_name, token, valid_for);
    INSERT INTO journal (domain, event, reason)
    VALUES (lower(domain_name), 'activated by force',
            activate_domain_regardless.reason || E'\n' || activate_domain_regardless.findings);
END
$$;
COMMENT ON FUNCTION activate_domain_regardless IS
    'activate_domain() for who knows better than bascule check: the journal keeps the reason, and what was found';

CREATE OR REPLACE FUNCTION remove_domain(domain_name text, reason text DEFAULT '')
RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
DECLARE
    the_domain domain := domain_named(domain_name);
    moved text;
BEGIN
    SELECT string_agg(full_address, ', ') INTO moved
      FROM (SELECT full_address FROM mailbox WHERE domain_id = the_domain.id AND state <> 'legacy'
             ORDER BY full_address LIMIT 5) AS first;
    IF moved IS NOT NULL THEN
        RAISE EXCEPTION '% cannot be taken out: % moved, or on the move', the_domain.name, moved
            USING ERRCODE = 'BA002', HINT = 'Send them back first: bascule return, bascule give-up. A migration that is done ends with bascule close.';
    END IF;
    IF the_domain.mode <> 'prepared' AND EXISTS (SELECT FROM mailbox WHERE domain_id = the_domain.id AND migrated_at IS NOT NULL) THEN
        PERFORM insist_on_reason(remove_domain.reason, format('users of %s had moved: say why it is taken out', the_domain.name));
    END IF;
    DELETE FROM alias WHERE domain_id = the_domain.id;
    DELETE FROM sighting WHERE domain_id = the_domain.id;
    DELETE FROM mailbox WHERE domain_id = the_domain.id;
    DELETE FROM domain WHERE id = the_domain.id;
    INSERT INTO journal (domain, event, from_state, reason)
    VALUES (the_domain.name, 'removed', the_domain.mode, nullif(remove_domain.reason, ''));
    PERFORM pg_notify('bascule_domain', the_domain.id::text);
END
$$;
COMMENT ON FUNCTION remove_domain IS
    'Take a domain out again, with all that is known of it: before it is activated, or while nobody has moved. The journal stays.';

CREATE OR REPLACE VIEW findings AS
SELECT finding.node, domain.name AS domain, finding.name, finding.level, finding.text, finding.remedy,
       finding.first_seen, finding.last_seen
  FROM finding LEFT JOIN domain ON domain.id = finding.domain_id
 WHERE finding.last_seen > clock_timestamp() - interval '1 day';
COMMENT ON VIEW findings IS
    'What nodes find wrong with their Postfix or Dovecot by themselves, again and again; what was not seen for a day is of a node that is no more';
COMMENT ON COLUMN findings.domain IS 'The domain that it is about; null: the host';
COMMENT ON COLUMN findings.name IS 'Of the check: bascule check --list';
