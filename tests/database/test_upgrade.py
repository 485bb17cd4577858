"""From the first release's schema to this one's: with data, with an operator's own views, while its parts are at work.

``data/0001`` is the replaceable text of the first release, as it was.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from procrastinate.schema import SchemaManager

from bascule import schema
from bascule.database import Connection, value
from bascule.errors import BasculeError
from bascule.lab.postgres import Postgres

FORMER = Path(__file__).parent / "data" / "0001"

#: As the first release's parts ask, by role: each must be answered before, during and after the upgrade.
CALLS = {
    "portal": [
        "SELECT name, imap_host, imap_port, imap_tls, smtp_host, smtp_port, pop3_port, pop3_tls, submission_port, "
        "submission_tls, sieve_port, sieve_tls, login_form FROM bascule.portal_domain('token')",
        "SELECT bascule.portal_request('token', 'carol@lab.test', 'sealed', 'Carol', 'Dock', 'fr')",
        "SELECT * FROM bascule.portal_progress(1)",
    ],
    "worker": [
        "SELECT bascule.begin_copy(2)",
        "SELECT bascule.report_progress(2, 5, 10, 1000)",
        "SELECT bascule.attempt_failed(2, 'away', false, make_interval(secs => 0), '')",
        "SELECT bascule.stage_straggler(1, 'INBOX', 1, 7)",
        "SELECT bascule.straggler_delivered(1, 'INBOX', 1, 7)",
        "SELECT bascule.set_unreadable(2, '[]', true)",
        "SELECT bascule.sweep_done(1, clock_timestamp())",
        "SELECT bascule.requeue_unattended()",
        "SELECT part, node FROM bascule.unacknowledged(2, 1)",
        "SELECT folder, uidvalidity, uid, delivered_at FROM bascule.straggler WHERE mailbox_id = 1",
        "SELECT * FROM bascule.gauges",
    ],
    "policy_daemon": [
        "SELECT bascule.beat('mx', 'policy_daemon')",
        "SELECT bascule.acknowledge(1, 'mx', 'policy_daemon', 3)",
        "SELECT bascule.record_sighting('scanner@lab.test', 1)",
        "SELECT bascule.undo_overdue_cutovers()",
        "SELECT id, mode, name, imap_host, login_form FROM bascule.routing_domain",
        "SELECT domain_id, local_part, id, state::text, epoch, lmtp_next_hop FROM bascule.routing_mailbox",
        "SELECT domain_id, local_part, target FROM bascule.routing_alias",
    ],
    "authenticator": [
        "SELECT bascule.beat('store', 'authenticator')",
        "SELECT bascule.acknowledge(1, 'store', 'authenticator', 3)",
        "SELECT * FROM bascule.login_state('alice@lab.test')",
        "SELECT bascule.record_login('bob@lab.test', 'sealed')",
    ],
    "dovecot": ['SELECT "user", password, home FROM bascule.dovecot_user'],
    "admin": [
        "SELECT domain, migrated, readiness FROM bascule.domains",
        "SELECT address, state, problem, advice, needs_password FROM bascule.mailboxes",
        "SELECT * FROM bascule.failed",
        "SELECT * FROM bascule.closing_obstacles",
        "SELECT problem FROM ops.trouble",
    ],
}

DATA = """
INSERT INTO store VALUES ('local', 'unix:/run/lmtp');
INSERT INTO domain (name, store, imap_host, imap_port, imap_tls, smtp_host, smtp_port)
VALUES ('lab.test', 'local', 'imap.old.test', 993, 'implicit', 'mx.old.test', 25);
SELECT activate_domain('lab.test', 'token');
SELECT beat('mx', 'policy_daemon'), beat('store', 'authenticator'), beat('long-gone', 'policy_daemon');
UPDATE node SET heartbeat_at = now() - interval '40 days' WHERE name = 'long-gone';
SELECT request_migration('alice@lab.test', 'portal', 'sealed');
SELECT begin_copy(1);
SELECT begin_cutover(1);
SELECT acknowledge(1, 'mx', 'policy_daemon', 3), acknowledge(1, 'store', 'authenticator', 3);
SELECT finish_cutover(1, 3, '{ARGON2ID}x', '{"folders": [{"name": "INBOX", "uidvalidity": 1, "uidnext": 5}]}');
SELECT stage_straggler(1, 'INBOX', 1, 6);
SELECT request_migration('bob@lab.test', 'login', 'sealed');
SELECT portal_request('token', 'carol@lab.test', 'sealed', 'Carol', 'Dock', 'fr');
SELECT expect('o''brien@lab.test');
SELECT record_sighting('scanner@lab.test', 3);
SELECT assign_alias('info@lab.test', 'alice@lab.test');
UPDATE domain SET copy_login = 'master', sealed_copy_login = 'sealed';
CREATE SCHEMA ops;
CREATE VIEW ops.trouble AS SELECT address, problem, advice FROM bascule.failed;
CREATE VIEW ops.who AS
  SELECT events.address, mailboxes.state FROM bascule.mailboxes JOIN bascule.events USING (address);
GRANT SELECT ON bascule.migrated TO auditor;
GRANT USAGE ON SCHEMA bascule, ops TO auditor;
GRANT SELECT ON ops.trouble, ops.who TO auditor, bascule_admin;
GRANT USAGE ON SCHEMA ops TO bascule_admin
"""


@contextmanager
def first_release(postgres: Postgres) -> Iterator[str]:
    """A database as the first release made it, with some of everything; its name."""
    with psycopg.connect(postgres.dsn("postgres"), autocommit=True) as connection:
        connection.execute("DROP DATABASE IF EXISTS former WITH (FORCE)")
        connection.execute("CREATE DATABASE former")
        if not connection.execute("SELECT FROM pg_roles WHERE rolname = 'auditor'").fetchall():
            connection.execute("CREATE ROLE auditor LOGIN")
    with psycopg.connect(postgres.dsn("postgres", "former"), autocommit=True) as connection:
        connection.execute("CREATE SCHEMA bascule; CREATE SCHEMA queue; SET search_path = queue")
        connection.execute(SchemaManager.get_schema().encode())
        connection.execute("SET search_path = bascule")
        connection.execute((schema.FOLDER / "tables" / "0001_initial.sql").read_bytes())
        for name in ("states", "functions", "views", "roles"):
            connection.execute((FORMER / f"{name}.sql").read_bytes())
        connection.execute("CREATE TABLE alembic_version (version_num varchar(32) PRIMARY KEY)")
        connection.execute("INSERT INTO alembic_version VALUES ('0001')")
        for statement in DATA.split(";\n"):
            connection.execute(statement.encode())
    yield "former"
    with psycopg.connect(postgres.dsn("postgres"), autocommit=True) as connection:
        connection.execute("DROP DATABASE former WITH (FORCE)")


@pytest.fixture
def former(postgres: Postgres) -> Iterator[str]:
    with first_release(postgres) as name:
        yield postgres.dsn("postgres", name)


class Part(threading.Thread):
    """A part of the first release: makes its calls again and again until it is stopped."""

    def __init__(self, postgres: Postgres, role: str) -> None:
        super().__init__(name=role)
        self._dsn = postgres.dsn(f"bascule_{role}", "former")
        self._calls = CALLS[role]
        self.rounds = 0
        self.errors: list[str] = []
        self.stopping = threading.Event()

    @staticmethod
    def _call(connection: Connection, call: str) -> None:
        try:
            connection.execute(call.encode())
        except psycopg.errors.DatatypeMismatch:
            # It waited within a function of the former version, whose table got a column meanwhile: once, and no more.
            connection.execute(call.encode())

    def run(self) -> None:
        with psycopg.connect(self._dsn, autocommit=True) as connection:
            while not self.stopping.is_set():
                for call in self._calls:
                    try:
                        self._call(connection, call)
                    except psycopg.Error as error:
                        self.errors.append(f"{self.name}: {call}: {error}")
                    self.stopping.wait(0.01)  # some hundred calls a second in all
                self.rounds += 1


def test_the_parts_of_the_first_release_go_on_through_an_upgrade(postgres: Postgres, former: str) -> None:
    parts = [Part(postgres, role) for role in CALLS for _ in range(2)]
    for part in parts:
        part.start()

    def have_gone_round(times: int) -> None:
        wanted = [part.rounds + times for part in parts]
        while any(part.rounds < rounds and part.is_alive() for part, rounds in zip(parts, wanted, strict=True)):
            parts[0].stopping.wait(0.01)

    try:
        have_gone_round(5)
        schema.upgrade(former)
        have_gone_round(5)
    finally:
        for part in parts:
            part.stopping.set()
        for part in parts:
            part.join()
    assert [error for part in parts for error in part.errors] == []
    assert schema.is_current(former)


def test_what_was_there_is_there(former: str) -> None:
    tables = ("domain", "mailbox", "mailbox_folder", "verification", "alias", "sighting", "journal")

    def content(connection: Connection) -> dict[str, list[Any]]:
        return {
            name: connection.execute(f"SELECT to_jsonb(t) FROM bascule.{name} AS t ORDER BY 1".encode()).fetchall()
            for name in tables
        }

    with psycopg.connect(former, autocommit=True) as connection:
        before = content(connection)
        schema.upgrade(former)
        after = content(connection)
        assert {
            name: [{key: row[key] for key in former} for (former,), (row,) in zip(rows, after[name], strict=True)]
            for name, rows in before.items()
        } == {name: [row for (row,) in rows] for name, rows in before.items()}
        assert value(connection, "SELECT digest IS NULL AND message_id = '' FROM bascule.straggler") is True
        # Those who were not waited for before, for they are long gone, are not waited for now.
        assert connection.execute("SELECT name, speaker FROM bascule.node ORDER BY 1").fetchall() == [
            ("mx", ""),
            ("store", ""),
        ]


def test_what_an_operator_built_on_our_views_is_left(postgres: Postgres, former: str) -> None:
    with psycopg.connect(postgres.dsn("auditor", "former"), autocommit=True) as auditor:
        asked = ("SELECT * FROM ops.trouble", "SELECT count(*) FROM ops.who", "SELECT address FROM bascule.migrated")
        before = [auditor.execute(query.encode()).fetchall() for query in asked]
        schema.upgrade(former)
        assert [auditor.execute(query.encode()).fetchall() for query in asked] == before
        assert before[2] == [("alice@lab.test",)]


def test_columns_of_the_first_release_keep_their_names_types_and_places(former: str) -> None:
    query = (
        "SELECT relname, attnum, attname, format_type(atttypid, atttypmod) FROM pg_attribute "
        "JOIN pg_class ON pg_class.oid = attrelid WHERE relnamespace = 'bascule'::regnamespace AND relkind = 'v'"
    )
    with psycopg.connect(former, autocommit=True) as connection:
        before = set(connection.execute(query.encode()).fetchall())
        schema.upgrade(former)
        after = set(connection.execute(query.encode()).fetchall())
    assert before - after == set()


def test_rights_are_as_in_a_new_database(postgres: Postgres, former: str) -> None:
    """What the first release granted too much of is taken back."""
    query = """
        SELECT grantee, table_name, column_name, privilege_type FROM information_schema.column_privileges
         WHERE table_schema = 'bascule' AND grantee LIKE 'bascule%'
        UNION ALL
        SELECT role.rolname, proc.oid::regprocedure::text, '', 'EXECUTE' FROM pg_proc AS proc, pg_roles AS role
         WHERE pronamespace = 'bascule'::regnamespace AND role.rolname LIKE 'bascule%'
           AND has_function_privilege(role.rolname, proc.oid, 'EXECUTE')"""
    schema.upgrade(former)
    with psycopg.connect(former) as upgraded, psycopg.connect(postgres.dsn("postgres")) as new:
        assert set(upgraded.execute(query).fetchall()) == set(new.execute(query).fetchall())


def test_both_ways_lead_to_one_schema(postgres: Postgres, former: str) -> None:
    queries = [
        "SELECT table_name, column_name, data_type, is_nullable, column_default FROM information_schema.columns "
        "WHERE table_schema = 'bascule'",
        "SELECT conrelid::regclass::text, pg_get_constraintdef(oid) FROM pg_constraint "
        "WHERE connamespace = 'bascule'::regnamespace",
        "SELECT oid::regprocedure::text, prosrc, provolatile, prosecdef FROM pg_proc "
        "WHERE pronamespace = 'bascule'::regnamespace",
        "SELECT viewname, definition FROM pg_views WHERE schemaname = 'bascule'",
        "SELECT tgrelid::regclass::text, pg_get_triggerdef(oid) FROM pg_trigger WHERE NOT tgisinternal",
    ]
    schema.upgrade(former)
    with psycopg.connect(former) as upgraded, psycopg.connect(postgres.dsn("postgres")) as new:
        for query in queries:
            assert set(upgraded.execute(query.encode()).fetchall()) == set(new.execute(query.encode()).fetchall())


def test_an_upgrade_that_would_take_a_column_away_stops(former: str) -> None:
    with psycopg.connect(former, autocommit=True) as connection:
        connection.execute("ALTER VIEW bascule.parts RENAME COLUMN alive TO living")
        with pytest.raises(BasculeError, match="cannot be brought to this version") as stopped:
            schema.upgrade(former)
        assert "living" in stopped.value.message
        assert "Nothing was changed" in stopped.value.hint
        assert schema.current(former) == "0001"
        assert value(connection, "SELECT count(*) FROM bascule.parts WHERE living") == 2
