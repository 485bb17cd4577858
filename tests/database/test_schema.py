"""Upgrades, documentation and rights."""

from __future__ import annotations

import psycopg
import pytest

from bascule import schema
from bascule.database import Connection
from bascule.lab.postgres import Postgres

VIEWS = {
    "domains", "mailboxes", "migrated", "pending", "failed", "forgotten", "closing_obstacles", "stragglers",
    "unreadable", "verifications", "events", "parts",
}  # fmt: skip


def test_an_upgrade_is_idempotent_and_reaches_the_head(postgres: Postgres, owner: Connection) -> None:
    def shape() -> list[tuple[object, ...]]:
        return owner.execute(
            "SELECT table_name, column_name, data_type, is_nullable FROM information_schema.columns "
            "WHERE table_schema = 'bascule' ORDER BY 1, ordinal_position"
        ).fetchall()

    before = shape()
    schema.upgrade(postgres.dsn("postgres"))
    assert schema.current(postgres.dsn("postgres")) == schema.head()
    assert shape() == before


def test_an_upgrade_that_waits_for_a_lock_gives_up_and_changes_nothing(postgres: Postgres, owner: Connection) -> None:
    with psycopg.connect(postgres.dsn("postgres")) as reader:
        reader.execute("SELECT * FROM bascule.domains")  # and the transaction stays open
        with pytest.raises(Exception, match="lock timeout"):
            schema.upgrade(postgres.dsn("postgres"))
    assert owner.execute("SELECT count(*) FROM domains").fetchall() == [(1,)]


def test_what_a_later_version_has_changed_is_left_as_it_is(postgres: Postgres, owner: Connection) -> None:
    dsn = postgres.dsn("postgres")
    said = owner.execute("SELECT obj_description('bascule'::regnamespace)").fetchone()
    owner.execute("UPDATE alembic_version SET version_num = 'from the future'")
    owner.execute("COMMENT ON SCHEMA bascule IS 'of a later version'")
    try:
        assert schema.is_later(dsn)
        with pytest.raises(schema.LaterSchema, match="from the future"):
            schema.upgrade(dsn)
        assert owner.execute("SELECT obj_description('bascule'::regnamespace)").fetchone() == ("of a later version",)
    finally:
        owner.execute("UPDATE alembic_version SET version_num = %s", (schema.head(),))
        owner.execute(f"COMMENT ON SCHEMA bascule IS '{said[0] if said else ''}'".encode())
    assert not schema.is_later(dsn)
    assert schema.is_current(dsn)


def test_every_table_and_view_is_documented(owner: Connection) -> None:
    undocumented = owner.execute(
        "SELECT relname FROM pg_class WHERE relnamespace = 'bascule'::regnamespace AND relkind IN ('r', 'v') "
        "AND obj_description(oid) IS NULL AND relname <> 'alembic_version'"
    ).fetchall()
    assert undocumented == []


def test_every_act_of_administration_is_documented(owner: Connection) -> None:
    undocumented = owner.execute(
        "SELECT proname FROM pg_proc WHERE pronamespace = 'bascule'::regnamespace "
        "AND has_function_privilege('bascule_admin', oid, 'EXECUTE') AND obj_description(oid) IS NULL"
    ).fetchall()
    assert undocumented == []


def test_the_public_views_are_there(owner: Connection) -> None:
    names = owner.execute("SELECT viewname FROM pg_views WHERE schemaname = 'bascule'").fetchall()
    assert {row[0] for row in names} >= VIEWS


#: What each role must not be able to do; every line is tried.
FORBIDDEN = [
    ("portal", "SELECT sealed_credential FROM bascule.mailbox"),
    ("portal", "SELECT * FROM bascule.mailboxes"),
    ("portal", "SELECT * FROM bascule.domain"),
    ("portal", "UPDATE bascule.mailbox SET state = 'legacy'"),
    ("portal", "SELECT bascule.close_domain('lab.test')"),
    ("portal", "SELECT bascule.enqueue('migrate', 1, 'local')"),
    ("authenticator", "SELECT sealed_credential FROM bascule.mailbox"),
    ("authenticator", "SELECT password_hash FROM bascule.mailbox"),
    ("authenticator", "SELECT bascule.begin_cutover(1)"),
    ("authenticator", "SELECT bascule.take_credential(1, 'x')"),
    ("policy_daemon", "SELECT sealed_credential FROM bascule.mailbox"),
    ("policy_daemon", "SELECT bascule.login_state('alice@lab.test')"),
    ("policy_daemon", "SELECT bascule.request_migration('alice@lab.test', 'portal', 'x')"),
    ("policy_daemon", "SELECT bascule.record_login('alice@lab.test', 'x')"),
    ("portal", "SELECT bascule.request_migration('alice@lab.test', 'portal', 'x')"),
    ("portal", "SELECT bascule.pause('alice@lab.test', 'x')"),
    ("portal", "SELECT bascule.login_state('alice@lab.test')"),
    ("portal", "SELECT bascule.record_login('alice@lab.test', 'x')"),
    ("portal", "SELECT bascule.place('alice@lab.test', 'local')"),
    ("authenticator", "SELECT bascule.request_migration('alice@lab.test', 'portal', 'x')"),
    ("authenticator", "SELECT * FROM bascule.dovecot_user"),
    ("authenticator", "INSERT INTO bascule.login_guess (instance) VALUES ('x')"),
    ("authenticator", "DELETE FROM bascule.login_guess"),
    ("authenticator", "SELECT * FROM bascule.login_source"),
    ("authenticator", "SELECT bascule.decline_first_login('alice@lab.test')"),
    ("policy_daemon", "SELECT * FROM bascule.login_mailbox"),
    ("portal", "SELECT * FROM bascule.login_mailbox"),
    ("portal", "SELECT bascule.share_sources('1970-01-01', '[]')"),
    ("authenticator", "SELECT bascule.record_sighting('alice@lab.test', 1)"),
    ("dovecot", "SELECT bascule.beat('x', 'policy_daemon')"),
    ("dovecot", "SELECT sealed_credential FROM bascule.mailbox"),
    ("dovecot", "SELECT * FROM bascule.routing_mailbox"),
    ("worker", "UPDATE bascule.mailbox SET state = 'local'"),
    ("worker", "SELECT bascule.close_domain('lab.test', true, 'x')"),
    ("worker", "INSERT INTO bascule.journal (event) VALUES ('x')"),
    ("admin", "SELECT sealed_credential FROM bascule.mailbox"),
    ("admin", "SELECT password_hash FROM bascule.mailbox"),
    ("admin", "UPDATE bascule.domain SET mode = 'closed'"),
    ("admin", "UPDATE bascule.domain SET url_token = 'x'"),
    ("admin", "INSERT INTO bascule.domain (name, mode) VALUES ('x.test', 'closed')"),
    ("admin", "INSERT INTO bascule.journal (event) VALUES ('x')"),
    ("admin", "DELETE FROM bascule.mailbox"),
    ("admin", "SELECT bascule.finish_cutover(1, 1, 'x', '{}')"),
]


@pytest.mark.parametrize(("role", "act"), FORBIDDEN)
def test_what_a_role_cannot_do(postgres: Postgres, owner: Connection, role: str, act: str) -> None:
    owner.execute("SELECT request_migration('alice@lab.test', 'portal', 'sealed')")
    with (
        psycopg.connect(postgres.dsn(f"bascule_{role}"), autocommit=True) as connection,
        pytest.raises(psycopg.errors.InsufficientPrivilege),
    ):
        connection.execute(act.encode())


ALLOWED = [
    ("portal", "SELECT * FROM bascule.portal_domain('token')"),
    ("portal", "SELECT bascule.portal_request('token', 'bob@lab.test', 'x', '', '', 'fr')"),
    ("portal", "SELECT * FROM bascule.portal_progress(1)"),
    ("worker", "SELECT * FROM bascule.gauges"),
    ("worker", "SELECT bascule.trouble_told(1), bascule.welcomed(1)"),
    ("admin", "SELECT * FROM bascule.domains, bascule.failed, bascule.verifications, bascule.parts"),
    ("admin", "SELECT bascule.expect('bob@lab.test'), bascule.pause('alice@lab.test', 'x')"),
    ("admin", "SELECT bascule.pause_domain('lab.test', 'x'), bascule.resume_domain('lab.test')"),
    ("authenticator", "SELECT bascule.record_login('bob@lab.test', 'x')"),
    ("authenticator", "SELECT * FROM bascule.login_state('alice@lab.test')"),
    ("authenticator", "SELECT * FROM bascule.routing_domain, bascule.login_mailbox"),
    ("authenticator", "SELECT bascule.request_due_first_logins(), bascule.share_guesses('x', 0, '[]')"),
    ("authenticator", "SELECT bascule.share_sources('1970-01-01', '[]')"),
    ("portal", "SELECT bascule.share_guesses('x', 0, '[]')"),
    ("policy_daemon", "SELECT * FROM bascule.routing_mailbox"),
    ("policy_daemon", "SELECT bascule.record_sighting('bob@lab.test', 1)"),
    ("policy_daemon", "SELECT bascule.beat('n', 'policy_daemon')"),
    ("policy_daemon", "SELECT bascule.undo_overdue_cutovers()"),
    ("dovecot", "SELECT * FROM bascule.dovecot_user"),
    ("worker", "SELECT sealed_credential FROM bascule.mailbox"),
    ("worker", "SELECT bascule.requeue_unattended()"),
    ("admin", "SELECT * FROM bascule.mailboxes, bascule.events, bascule.stragglers, bascule.closing_obstacles"),
    ("admin", "SELECT bascule.place('bob@lab.test', 'local')"),
    ("admin", "UPDATE bascule.store SET login_host = 'store1.test'"),
    ("admin", "SELECT bascule.retry('alice@lab.test')"),
    ("admin", "UPDATE bascule.domain SET sweep_interval = '1 minute'"),
]


@pytest.mark.parametrize(("role", "act"), ALLOWED)
def test_what_a_role_needs(postgres: Postgres, owner: Connection, role: str, act: str) -> None:
    owner.execute("SELECT request_migration('alice@lab.test', 'portal', 'sealed')")
    with psycopg.connect(postgres.dsn(f"bascule_{role}"), autocommit=True) as connection:
        connection.execute(act.encode())
