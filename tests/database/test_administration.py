"""The psql session in docs/administration.md, run verbatim.

After a change that is meant, ``BASCULE_WRITE_DOCS=1 pytest tests/database/test_administration.py``
writes what psql says now into the page; read the difference before it is committed.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from bascule.database import Connection
from bascule.lab.postgres import Postgres
from bascule.lab.process import program

PAGE = Path(__file__).parents[2] / "docs" / "administration.md"
PROMPT = "bascule=> "
BLOCK = re.compile(r"(```psql\n)(.*?)(```)", re.DOTALL)

#: A company in the middle of its migration.
STORY = """
SET session_replication_role = replica;
TRUNCATE domain CASCADE;
INSERT INTO domain (name, mode, store, imap_host, imap_port, imap_tls, smtp_host, smtp_port, url_token, url_expires_at)
VALUES ('example.org', 'active', 'local', 'imap.old.example', 993, 'implicit', 'mx.old.example', 25, 'QxR7vT',
        now() + interval '60 days');
INSERT INTO mailbox (domain_id, local_part, full_address, store, state, trigger, first_name, last_name,
                     sealed_credential, password_hash, messages_total, messages_copied, migrated_at, last_message_at,
                     swept_at, copy_began_at, copied_before, attempts, needs_credential, last_error, last_advice,
                     last_error_at, next_try)
SELECT domain.id, box.name, box.name || '@example.org', 'local', box.state::mailbox_state, box.how::request_trigger,
       initcap(box.name), box.last_name, 'sealed', '{ARGON2ID}x', box.total, box.copied, box.migrated::timestamptz,
       box.migrated::timestamptz, box.migrated::timestamptz, clock_timestamp(), box.copied, box.attempts, box.waits,
       box.error, box.advice, CASE WHEN box.error IS NOT NULL THEN '2026-11-24 10:02 UTC'::timestamptz END,
       CASE WHEN box.error IS NOT NULL AND NOT box.waits THEN '2026-11-24 10:17 UTC'::timestamptz END
  FROM domain, (VALUES
    ('alice', 'Quay',  'local',     'portal',        12840, 12840, '2026-11-20 09:14:07 UTC', 1, false, NULL, NULL),
    ('bob',   'Mole',  'copying',   'login',          8000,  3200, NULL,                      1, false, NULL, NULL),
    ('carol', 'Dock',  'copying',   'portal',         5100,  4000, NULL,                      3, true,
     'imap.old.example:993 refuses the login of carol@example.org: [AUTHENTICATIONFAILED] Authentication failed.', ''),
    ('dave',  'Crane', 'copying',   'administrator', 91000, 42000, NULL,                      7, false,
     'this host cannot store the mail: No space left on device', 'Make room; the copy goes on where it stopped.'),
    ('erin',  'Sluice', 'requested', 'portal',           0,     0, NULL,                      0, false, NULL, NULL)
  ) AS box (name, last_name, state, how, total, copied, migrated, attempts, waits, error, advice);
INSERT INTO straggler SELECT id, 'INBOX', 1, 90001, '2026-11-21 08:00 UTC', '2026-11-21 08:00:02 UTC'
  FROM mailbox WHERE local_part = 'alice';
INSERT INTO verification SELECT id, '{"folders": [
  {"name": "INBOX", "uidvalidity": 1, "uidnext": 9000, "messages": 12000, "bytes": 734003200},
  {"name": "Sent", "uidvalidity": 2, "uidnext": 841, "messages": 840, "bytes": 51380224}],
  "waived": [], "notes": [], "odd_sizes": []}' FROM mailbox WHERE local_part = 'alice';
INSERT INTO sighting (domain_id, local_part, messages, first_seen, last_seen)
SELECT domain.id, seen.name, seen.messages, '2026-11-18 06:00 UTC', seen.last_seen::timestamptz FROM domain, (VALUES
    ('scanner', 212, '2026-11-24 09:58 UTC'), ('info', 64, '2026-11-24 08:41 UTC'),
    ('frank', 9, '2026-11-23 17:20 UTC'),
    ('old-list', 1, '2026-11-19 11:11 UTC')) AS seen (name, messages, last_seen);
INSERT INTO journal (at, actor, domain, address, event, from_state, to_state, reason)
SELECT at::timestamptz, 'bascule_' || part, 'example.org', 'alice@example.org', 'state', from_state, to_state, reason
  FROM (VALUES
    ('2026-11-20 08:51:33 UTC', 'portal', 'legacy',    'requested', 'requested by the user at the URL'),
    ('2026-11-20 08:51:34 UTC', 'worker', 'requested', 'copying',   NULL),
    ('2026-11-20 09:14:06 UTC', 'worker', 'copying',   'cutover',   NULL),
    ('2026-11-20 09:14:07 UTC', 'worker', 'cutover',   'local',     NULL)
  ) AS event (at, part, from_state, to_state, reason);
SET session_replication_role = origin
"""


def psql(postgres: Postgres, statement: str) -> str:
    """What psql prints, results and errors in the order in which they come."""
    done = subprocess.run(
        [
            program("psql"),
            "--no-psqlrc",
            "-v",
            "SHOW_CONTEXT=never",
            "-d",
            postgres.dsn("bascule_admin"),
            "-c",
            statement,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        env=os.environ | {"PGTZ": "UTC", "PGOPTIONS": "-c search_path=bascule", "PAGER": "", "LC_ALL": "C.UTF-8"},
    )
    return done.stdout


def replayed(postgres: Postgres, block: str) -> str:
    """The block with what psql says now."""
    lines = []
    for part in block.split(PROMPT)[1:]:
        statement = part[: part.index(";\n") + 1]
        output = psql(postgres, statement).rstrip("\n")
        lines.append(f"{PROMPT}{statement}\n{output}\n\n")
    return "".join(lines).rstrip("\n") + "\n"


def test_the_session_is_as_the_page_says(postgres: Postgres, owner: Connection) -> None:
    for statement in STORY.split(";\n"):
        owner.execute(statement.encode())
    page = PAGE.read_text()
    now = BLOCK.sub(lambda found: found[1] + replayed(postgres, found[2]) + found[3], page)
    if os.environ.get("BASCULE_WRITE_DOCS"):
        PAGE.write_text(now)
    assert now == page


def test_every_public_view_and_act_is_on_the_page(owner: Connection) -> None:
    page = PAGE.read_text()
    views = owner.execute(
        "SELECT relname FROM pg_class WHERE relnamespace = 'bascule'::regnamespace AND relkind = 'v' "
        "AND has_table_privilege('bascule_admin', oid, 'SELECT')"
    ).fetchall()
    acts = owner.execute(
        "SELECT proname FROM pg_proc WHERE pronamespace = 'bascule'::regnamespace "
        "AND has_function_privilege('bascule_admin', oid, 'EXECUTE')"
    ).fetchall()
    missing = [name for (name,) in [*views, *acts] if f"`{name}" not in page]
    assert missing == []
