-- Which folders of a domain's mailboxes come along.

CREATE OR REPLACE FUNCTION folder_rule_in_words(kind text, folder text, action text, name_here text, special_use_here text)
RETURNS text LANGUAGE sql IMMUTABLE AS $$
    SELECT concat_ws(' ', kind, nullif(folder, '') || ':', action, 'as ' || nullif(name_here, ''),
                     'shown as ' || nullif(special_use_here, ''))
$$;

CREATE OR REPLACE FUNCTION add_folder_rule(
    domain_name text, kind text, folder text, action text, name_here text DEFAULT '', special_use_here text DEFAULT ''
)
RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
#variable_conflict use_variable
DECLARE
    the_domain domain := domain_named(domain_name);
    uses text[] := ARRAY['\All', '\Archive', '\Drafts', '\Flagged', '\Important', '\Junk', '\Sent', '\Trash'];
    uses_here text[] := ARRAY['\Archive', '\Drafts', '\Junk', '\Sent', '\Trash'];
BEGIN
    folder := coalesce(folder, '');
    name_here := coalesce(name_here, '');
    special_use_here := coalesce(special_use_here, '');
    IF the_domain.mode = 'closed' THEN
        RAISE EXCEPTION '% is closed: nobody is moved any more', the_domain.name USING ERRCODE = 'BA002';
    END IF;
    IF kind IS NULL OR kind NOT IN ('name', 'pattern', 'special-use', 'exchange-items', 'common-names') THEN
        RAISE EXCEPTION 'a folder is known by name, pattern, special-use, exchange-items or common-names, not by %',
            coalesce(quote_literal(kind), 'nothing') USING ERRCODE = 'BA001';
    END IF;
    IF action IS NULL OR action NOT IN ('leave-out', 'copy', 'once') THEN
        RAISE EXCEPTION 'a rule says leave-out, copy or once, not %', coalesce(quote_literal(action), 'nothing')
            USING ERRCODE = 'BA001';
    END IF;
    IF kind IN ('name', 'pattern', 'special-use') AND folder = '' THEN
        RAISE EXCEPTION 'a rule by % needs to say which', kind USING ERRCODE = 'BA001';
    END IF;
    IF kind IN ('exchange-items', 'common-names') AND folder <> '' THEN
        RAISE EXCEPTION 'a rule by % is for all such folders: it names none', kind USING ERRCODE = 'BA001';
    END IF;
    IF folder ~ '[[:cntrl:]]' OR name_here ~ '[[:cntrl:]]' OR length(folder) > 400 OR length(name_here) > 400 THEN
        RAISE EXCEPTION 'a folder''s name has at most 400 letters, and no control characters' USING ERRCODE = 'BA001';
    END IF;
    IF kind = 'name' AND upper(folder) = 'INBOX' THEN
        RAISE EXCEPTION 'INBOX always comes along as it is' USING ERRCODE = 'BA001',
            HINT = 'Mail is delivered to it here, and the last message is written to it there.';
    END IF;
    IF kind = 'pattern' AND strpos(folder, '*') = 0 THEN
        RAISE EXCEPTION 'the pattern % has no * in it', quote_literal(folder) USING ERRCODE = 'BA001',
            HINT = 'For one folder, give its name.';
    END IF;
    IF kind = 'special-use' THEN
        IF NOT EXISTS (SELECT FROM unnest(uses) AS use WHERE lower(use) = lower(folder)) THEN
            RAISE EXCEPTION '% is no special use of RFC 6154', quote_literal(folder) USING ERRCODE = 'BA001',
                HINT = 'Those are: ' || array_to_string(uses, ', ') || '.';
        END IF;
        folder := (SELECT use FROM unnest(uses) AS use WHERE lower(use) = lower(folder));
    END IF;
    IF special_use_here <> '' THEN
        IF NOT EXISTS (SELECT FROM unnest(uses_here) AS use WHERE lower(use) = lower(special_use_here)) THEN
            RAISE EXCEPTION 'no folder can be shown here as %', quote_literal(special_use_here) USING ERRCODE = 'BA001',
                HINT = 'One of: ' || array_to_string(uses_here, ', ') || '.';
        END IF;
        special_use_here := (SELECT use FROM unnest(uses_here) AS use WHERE lower(use) = lower(special_use_here));
    END IF;
    IF action = 'leave-out' AND (name_here <> '' OR special_use_here <> '') THEN
        RAISE EXCEPTION 'what is left out has no name and no special use here' USING ERRCODE = 'BA001';
    END IF;
    IF kind = 'exchange-items' AND action <> 'leave-out' THEN
        RAISE EXCEPTION 'Exchange''s calendars and the like come along without a rule: a rule leaves them out'
            USING ERRCODE = 'BA001';
    END IF;
    IF kind = 'common-names' AND (action <> 'copy' OR name_here <> '' OR special_use_here <> '') THEN
        RAISE EXCEPTION 'a rule by common names only says as what folders are shown here' USING ERRCODE = 'BA001';
    END IF;
    IF kind = 'pattern' AND special_use_here <> '' THEN
        RAISE EXCEPTION 'one folder is shown as %, not all that fit a pattern', special_use_here USING ERRCODE = 'BA001';
    END IF;
    IF action = 'once' AND kind = 'pattern' THEN
        RAISE EXCEPTION 'one folder comes once, not all that fit a pattern' USING ERRCODE = 'BA001';
    END IF;
    IF name_here <> '' THEN
        IF upper(name_here) = 'INBOX' THEN
            RAISE EXCEPTION 'INBOX is the place of INBOX, and of no other folder' USING ERRCODE = 'BA001';
        END IF;
        IF kind = 'pattern' AND (length(folder) - length(replace(folder, '*', '')) <> 1
                                 OR length(name_here) - length(replace(name_here, '*', '')) <> 1) THEN
            RAISE EXCEPTION 'to call what fits a pattern otherwise, pattern and new name need one * each'
                USING ERRCODE = 'BA001', HINT = 'As: Public/* to Old/*.';
        END IF;
        IF EXISTS (SELECT FROM folder_rule AS other
                    WHERE other.domain_id = the_domain.id AND other.name_here = add_folder_rule.name_here) THEN
            RAISE EXCEPTION 'another folder is called % here already, by a rule', quote_literal(name_here)
                USING ERRCODE = 'BA002', HINT = 'Two folders cannot become one: their UIDs are to stay.';
        END IF;
    END IF;
    INSERT INTO folder_rule AS known (domain_id, kind, folder, action, name_here, special_use_here)
    VALUES (the_domain.id, kind, folder, action, name_here, special_use_here) ON CONFLICT DO NOTHING;
    IF NOT FOUND THEN
        RAISE EXCEPTION '% has a rule for % already', the_domain.name, concat_ws(' ', kind, nullif(folder, ''))
            USING ERRCODE = 'BA002', HINT = 'Remove it first: bascule folder-rule remove.';
    END IF;
    PERFORM note(the_domain, 'folder rule added',
        folder_rule_in_words(kind, folder, action, name_here, special_use_here));
END
$$;
COMMENT ON FUNCTION add_folder_rule IS
    'Leave folders of a domain''s mailboxes out, or give them another name or special use here: see the table folder_rule. '
    'It holds from the next pass on for those who have not moved; for the others what held at their flip does.';

CREATE OR REPLACE FUNCTION remove_folder_rule(domain_name text, kind text, folder text DEFAULT '')
RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
DECLARE
    the_domain domain := domain_named(domain_name);
BEGIN
    DELETE FROM folder_rule AS rule
     WHERE rule.domain_id = the_domain.id AND rule.kind = remove_folder_rule.kind
       AND (rule.folder = coalesce(remove_folder_rule.folder, '')
            OR rule.kind = 'special-use' AND lower(rule.folder) = lower(remove_folder_rule.folder));
    IF NOT FOUND THEN
        RAISE EXCEPTION '% has no rule for %', the_domain.name, concat_ws(' ', kind, nullif(folder, ''))
            USING ERRCODE = 'BA003', HINT = 'They are in the view bascule.folder_rules.';
    END IF;
    PERFORM note(the_domain, 'folder rule removed', concat_ws(' ', kind, nullif(folder, '')));
END
$$;
COMMENT ON FUNCTION remove_folder_rule IS 'Take a rule for folders back; from the next pass on, for those who have not moved';

CREATE OR REPLACE FUNCTION set_left_out(mailbox_id bigint, folders jsonb, complete boolean)
RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
BEGIN
    DELETE FROM left_out_folder AS old
     WHERE complete AND old.mailbox_id = set_left_out.mailbox_id
       AND NOT EXISTS (SELECT FROM jsonb_to_recordset(folders) AS now (name text) WHERE now.name = old.folder);
    INSERT INTO left_out_folder AS old (mailbox_id, folder, reason, messages)
    SELECT set_left_out.mailbox_id, now.name, now.reason, now.messages
      FROM jsonb_to_recordset(folders) AS now (name text, reason text, messages bigint)
    ON CONFLICT ON CONSTRAINT left_out_folder_pkey
    DO UPDATE SET reason = excluded.reason, messages = coalesce(excluded.messages, old.messages), noted_at = clock_timestamp();
END
$$;
COMMENT ON FUNCTION set_left_out IS
    'The folders of a legacy mailbox that rules leave out: [{"name", "reason", "messages" or null}]; complete: there are no others';
