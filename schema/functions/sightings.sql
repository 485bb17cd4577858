-- Sightings: who still receives mail at the legacy server.

CREATE OR REPLACE FUNCTION sightings_kept()
RETURNS integer LANGUAGE sql IMMUTABLE AS $$ SELECT 10000 $$;
COMMENT ON FUNCTION sightings_kept IS
    'The most addresses of a domain that are counted: where a legacy server takes any address, there is no end of them';

CREATE OR REPLACE FUNCTION record_sightings(addresses text[], counts bigint[])
RETURNS bigint LANGUAGE sql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
    WITH seen AS (
        SELECT domain.id AS domain_id, local_part_of(told.address) AS local_part, sum(told.messages)::bigint AS messages
          FROM unnest(addresses, counts) AS told (address, messages)
          JOIN domain ON domain.name = lower(substring(told.address FROM '@([^@]+)$'))
         WHERE told.address ~ '^.+@[^@]+$'
         GROUP BY 1, 2
    ), boxes AS (
        -- An address may have moved since it was seen; the lock has a flip that is under way come before or after.
        SELECT mailbox.domain_id, mailbox.local_part, mailbox.state
          FROM mailbox JOIN seen USING (domain_id, local_part)
         ORDER BY mailbox.id FOR SHARE OF mailbox
    ), staying AS (
        SELECT seen.*, known.domain_id IS NOT NULL AS is_known,
               row_number() OVER (PARTITION BY seen.domain_id, known.domain_id IS NOT NULL ORDER BY seen.local_part) AS rank
          FROM seen
          LEFT JOIN sighting AS known USING (domain_id, local_part)
         WHERE NOT EXISTS (SELECT FROM boxes WHERE boxes.domain_id = seen.domain_id
                              AND boxes.local_part = seen.local_part AND boxes.state = 'local')
           AND NOT EXISTS (SELECT FROM alias WHERE alias.domain_id = seen.domain_id
                              AND alias.local_part = seen.local_part)
    ), full_by AS (
        SELECT sighting.domain_id, count(*) AS rows FROM sighting
         WHERE sighting.domain_id IN (SELECT domain_id FROM staying WHERE NOT is_known) GROUP BY 1
    ), counted AS (
        INSERT INTO sighting AS former (domain_id, local_part, messages)
        SELECT staying.domain_id, staying.local_part, staying.messages
          FROM staying LEFT JOIN full_by USING (domain_id)
         WHERE staying.is_known OR coalesce(full_by.rows, 0) + staying.rank <= sightings_kept()
         ORDER BY staying.domain_id, staying.local_part
        ON CONFLICT (domain_id, local_part)
        DO UPDATE SET messages = former.messages + excluded.messages, last_seen = clock_timestamp()
        RETURNING 1
    )
    SELECT (SELECT count(*) FROM staying) - (SELECT count(*) FROM counted)
$$;
COMMENT ON FUNCTION record_sightings IS
    'The legacy server accepted these recipients, and that many messages for each entered; how many addresses found no '
    'place, see sightings_kept(). One statement for many: a policy daemon records what it saw between two heartbeats.';

CREATE OR REPLACE FUNCTION record_sighting(address text, messages bigint)
RETURNS void LANGUAGE plpgsql SECURITY DEFINER SET search_path = bascule, pg_temp AS $$
BEGIN
    PERFORM domain_of(address);
    PERFORM record_sightings(ARRAY[address], ARRAY[messages]);
END
$$;
COMMENT ON FUNCTION record_sighting IS 'One address of record_sightings()';
