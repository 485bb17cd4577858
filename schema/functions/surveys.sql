-- What is seen of mailboxes before they move.

CREATE OR REPLACE FUNCTION record_survey(
    address text, messages bigint, folders integer, bytes bigint, largest bigint, findings jsonb)
RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
#variable_conflict use_column
BEGIN
    INSERT INTO survey (domain_id, local_part, messages, folders, bytes, largest, findings)
    VALUES ((domain_of(record_survey.address)).id, local_part_of(record_survey.address), record_survey.messages,
            record_survey.folders, record_survey.bytes, record_survey.largest, record_survey.findings)
    ON CONFLICT ON CONSTRAINT survey_pkey DO UPDATE
        SET surveyed_at = clock_timestamp(), messages = excluded.messages, folders = excluded.folders,
            bytes = excluded.bytes, largest = excluded.largest, findings = excluded.findings;
END
$$;
COMMENT ON FUNCTION record_survey IS
    'What a survey saw of a legacy mailbox, in place of what the last one saw: sizes in bytes, findings [{"level", "text", "remedy", "name"}]';
