"""How quickly the administrators' views answer for a domain of 100,000 mailboxes.

    venv/bin/python bench/views.py [--mailboxes 100000] [--explain docs/explain.md]

A real PostgreSQL of its own, asked as ``bascule_admin`` asks, with what an
administrator types. Each query is timed as the client sees it, median of seven;
``--explain`` writes how PostgreSQL answers each.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import psycopg

from bascule.database import Connection
from bascule.lab.postgres import Postgres
from bascule.lab.table import Table, parser

ROUNDS = 7

#: What is asked, and how an administrator would write it.
QUERIES = {
    "domains and readiness": "SELECT * FROM bascule.domains",
    "one mailbox": "SELECT * FROM bascule.mailboxes WHERE address = 'user-777@bench.test'",
    "how many in each state": "SELECT state, count(*) FROM bascule.mailboxes GROUP BY state",
    "the last who moved": "SELECT address, migrated_at FROM bascule.migrated ORDER BY migrated_at DESC LIMIT 50",
    "who is on the move": "SELECT address, state, percent, messages_per_second, remaining FROM bascule.pending",
    "what is wrong": "SELECT * FROM bascule.failed",
    "forgotten addresses": "SELECT * FROM bascule.forgotten ORDER BY last_seen DESC",
    "late messages": "SELECT * FROM bascule.stragglers ORDER BY staged_at DESC LIMIT 50",
    "messages that are not given": "SELECT * FROM bascule.unreadable WHERE waived_at IS NULL",
    "why it cannot be closed": "SELECT * FROM bascule.closing_obstacles LIMIT 50",
    "how many obstacles": "SELECT count(*) FROM bascule.closing_obstacles",
    "one verification": "SELECT * FROM bascule.verifications WHERE address = 'user-777@bench.test'",
    "the journal of one": "SELECT * FROM bascule.events WHERE address = 'user-777@bench.test' ORDER BY id",
    "the last events": "SELECT * FROM bascule.events ORDER BY id DESC LIMIT 100",
}


#: Four fifths have moved, some are on the move, some fail, the rest did not come; ten events for each.
FILL = """
SET search_path = bascule, queue;
SET session_replication_role = replica;  -- the triggers' work is not measured here
INSERT INTO store VALUES ('local', 'unix:/run/dovecot/lmtp');
INSERT INTO domain (name, mode, store, imap_host, imap_port, imap_tls, smtp_host, smtp_port, url_token, url_expires_at)
VALUES ('bench.test', 'active', 'local', 'old.test', 993, 'implicit', 'old.test', 25, 'x', now() + interval '1 day');
INSERT INTO mailbox (domain_id, local_part, full_address, store, state, password_hash, sealed_credential,
                     messages_total, messages_copied, migrated_at, last_message_at, swept_at, copy_began_at,
                     copied_before, last_error, last_error_at, next_try, needs_credential)
SELECT domain.id, 'user-' || n, 'user-' || n || '@bench.test', 'local', state::mailbox_state,
       CASE state WHEN 'local' THEN '{ARGON2ID}x' END, 'sealed', 5000,
       CASE state WHEN 'local' THEN 5000 ELSE n % 5000 END,
       CASE state WHEN 'local' THEN now() - n * interval '1 second' END,
       CASE state WHEN 'local' THEN now() END, CASE state WHEN 'local' THEN now() END,
       now() - interval '1 minute', 0,
       CASE WHEN n % 200 = 0 THEN 'old.test:993 does not answer in time' END, CASE WHEN n % 200 = 0 THEN now() END,
       CASE WHEN n % 200 = 0 THEN now() END, n % 1000 = 0
  FROM domain, generate_series(1, MAILBOXES) AS n,
       LATERAL (SELECT CASE WHEN n % 5 <> 0 THEN 'local' WHEN n % 100 = 0 THEN 'copying'
                            WHEN n % 50 = 0 THEN 'requested' ELSE 'legacy' END AS state) AS chosen;
INSERT INTO verification
SELECT id, (SELECT jsonb_build_object('waived', '[]'::jsonb, 'notes', '[]'::jsonb, 'odd_sizes', '[]'::jsonb, 'folders',
                jsonb_agg(jsonb_build_object('name', 'folder-' || f, 'uidvalidity', 1, 'uidnext', 500,
                                             'messages', 500, 'bytes', 5000000)))
              FROM generate_series(1, 10) AS f)
  FROM mailbox WHERE state = 'local';
INSERT INTO sighting (domain_id, local_part, messages)
SELECT domain.id, 'user-' || n, n FROM domain, generate_series(1, MAILBOXES) AS n WHERE n % 5 = 0;
INSERT INTO straggler SELECT id, 'INBOX', 1, id, now() - interval '3 days', now() FROM mailbox WHERE id % 20 = 0;
INSERT INTO unreadable_message (mailbox_id, folder, uidvalidity, uid, reason)
SELECT id, 'INBOX', 1, 1, 'NO' FROM mailbox WHERE state = 'copying' AND id % 300 = 0;
INSERT INTO journal (domain, address, event)
SELECT 'bench.test', 'user-' || n || '@bench.test', 'state'
  FROM generate_series(1, 10) AS event, generate_series(1, MAILBOXES) AS n;
SET session_replication_role = origin
"""


def fill(connection: Connection, mailboxes: int) -> None:
    """One domain with so many mailboxes."""
    for statement in FILL.replace("MAILBOXES", str(mailboxes)).split(";\n"):
        connection.execute(statement.encode())
    connection.execute("VACUUM ANALYZE")


def timed(connection: Connection, query: str) -> tuple[float, int]:
    """Milliseconds, median, and rows."""
    taken = []
    rows = 0
    for _ in range(ROUNDS):
        began = time.perf_counter()
        rows = len(connection.execute(query.encode()).fetchall())
        taken.append(1000 * (time.perf_counter() - began))
    return statistics.median(taken), rows


def main() -> None:
    """Print the table."""
    options_of = parser(__doc__)
    options_of.add_argument("--mailboxes", type=int, default=100_000)
    options_of.add_argument("--explain", type=Path)
    arguments = options_of.parse_args()
    with tempfile.TemporaryDirectory(prefix="bascule-bench-") as name:
        Path(name).chmod(0o755)
        postgres = Postgres(Path(name) / "postgres")
        plans = []
        try:
            postgres.create()
            with psycopg.connect(postgres.dsn("postgres"), autocommit=True) as owner:
                fill(owner, arguments.mailboxes)
            with psycopg.connect(postgres.dsn("bascule_admin"), autocommit=True) as connection:
                table = Table("query", "rows", "ms", markdown=arguments.markdown)
                for what, query in QUERIES.items():
                    milliseconds, rows = timed(connection, query)
                    table.row(what, rows, milliseconds)
                    # The owner may look behind the views; the plan is the same.
                    plan = connection.execute(f"EXPLAIN (ANALYZE) {query}".encode()).fetchall()
                    plans.append((what, query, "\n".join(row[0] for row in plan)))
        finally:
            postgres.stop("immediate")
    if arguments.explain is not None:
        title = (
            "# How PostgreSQL answers the views\n\n"
            f"Written by `bench/views.py --explain`, {arguments.mailboxes:,} mailboxes.\n"
        )
        body = [f"## {what}\n\n    {query}\n\n```\n{plan}\n```\n" for what, query, plan in plans]
        arguments.explain.write_text("\n".join([title, *body]))


if __name__ == "__main__":
    main()
