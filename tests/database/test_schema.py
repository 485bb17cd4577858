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
    ("portal", "SELECT bascule.record_findings('x', '[]')"),
    ("portal", "SELECT * FROM bascule.findings"),
    ("dovecot", "SELECT bascule.record_findings('x', '[]')"),
    ("worker", "SELECT bascule.remove_domain('lab.test')"),
    ("policy_daemon", "DELETE FROM bascule.finding"),
    ("admin", "DELETE FROM bascule.domain"),
    ("policy_daemon", "SELECT bascule.activate_domain_regardless('lab.test', 'x', '1 day', 'x', 'x')"),
    ("portal", "SELECT sealed_credential FROM bascule.mailbox"),
    ("portal", "SELECT * FROM bascule.mailboxes"),
    ("portal", "SELECT * FROM bascule.domain"),
    ("portal", "UPDATE bascule.mailbox SET state = 'legacy'"),
    ("portal", "SELECT bascule.close_domain('lab.test')"),
    ("portal", "SELECT bascule.enqueue('migrate', 1, 'local')"),
    ("portal", "SELECT sealed_copy_login FROM bascule.domain"),
    ("portal", "SELECT * FROM bascule.domain_of_url('token')"),
    ("portal", "SELECT * FROM bascule.domain_of('x@lab.test')"),
    ("portal", "SELECT bascule.beat('page', 'authenticator')"),
    ("authenticator", "SELECT sealed_credential FROM bascule.mailbox"),
    ("authenticator", "SELECT password_hash FROM bascule.mailbox"),
    ("authenticator", "SELECT bascule.begin_cutover(1)"),
    ("authenticator", "SELECT bascule.take_credential(1, 'x')"),
    ("authenticator", "SELECT sealed_copy_login FROM bascule.domain"),
    ("authenticator", "SELECT * FROM bascule.mailbox_of('alice@lab.test')"),
    ("authenticator", "SELECT bascule.beat('x', 'policy_daemon')"),
    ("authenticator", "SELECT bascule.sign_off('mx', 'policy_daemon')"),
    ("authenticator", "SELECT bascule.acknowledge(1, 'mx', 'policy_daemon', 1)"),
    ("authenticator", "SELECT bascule.forget_node('mx', 'policy_daemon', 'x')"),
    ("authenticator", "SELECT bascule.speak_for('x', 'policy_daemon')"),
    ("authenticator", "DELETE FROM bascule.node"),
    ("authenticator", "SELECT imported_hash FROM bascule.mailbox"),
    ("authenticator", "SELECT bascule.move_mailbox('alice@lab.test')"),
    ("authenticator", "SELECT bascule.import_passwords('lab.test', '{}', '{}')"),
    ("authenticator", "SELECT bascule.set_login_name('alice@lab.test', 'x')"),
    ("portal", "SELECT bascule.move_mailbox('alice@lab.test')"),
    ("portal", "SELECT bascule.import_passwords('lab.test', '{}', '{}')"),
    ("portal", "SELECT bascule.take_first_password('alice@lab.test', '{ARGON2ID}$argon2id$x')"),
    ("portal", "SELECT legacy_login FROM bascule.mailbox"),
    ("worker", "SELECT bascule.move_mailbox('alice@lab.test')"),
    ("worker", "SELECT bascule.renew_password('alice@lab.test', 'x', 'y')"),
    ("policy_daemon", "SELECT bascule.take_first_password('alice@lab.test', '{ARGON2ID}$argon2id$x')"),
    ("admin", "SELECT imported_hash FROM bascule.mailbox"),
    ("admin", "SELECT bascule.renew_password('alice@lab.test', 'x', 'y')"),
    ("admin", "SELECT bascule.stage(1)"),
    ("policy_daemon", "SELECT sealed_credential FROM bascule.mailbox"),
    ("policy_daemon", "SELECT bascule.login_state('alice@lab.test')"),
    ("policy_daemon", "SELECT sealed_copy_login FROM bascule.domain"),
    ("policy_daemon", "SELECT bascule.beat('store', 'authenticator')"),
    ("policy_daemon", "SELECT bascule.sign_off('store', 'authenticator')"),
    ("policy_daemon", "SELECT bascule.acknowledge(1, 'store', 'authenticator', 1)"),
    ("policy_daemon", "SELECT bascule.forget_node('store', 'authenticator', 'x')"),
    ("policy_daemon", "UPDATE bascule.node SET heartbeat_at = now()"),
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
    ("policy_daemon", "SELECT bascule.logged_in_from('alice@lab.test', '192.0.2.1')"),
    ("authenticator", "SELECT bascule.record_sighting('alice@lab.test', 1)"),
    ("authenticator", "SELECT bascule.record_sightings('{alice@lab.test}', '{1}')"),
    ("dovecot", "SELECT bascule.beat('x', 'policy_daemon')"),
    ("dovecot", "SELECT sealed_credential FROM bascule.mailbox"),
    ("dovecot", "SELECT * FROM bascule.routing_mailbox"),
    ("worker", "UPDATE bascule.mailbox SET state = 'local'"),
    ("worker", "SELECT bascule.close_domain('lab.test', true, 'x')"),
    ("worker", "INSERT INTO bascule.journal (event) VALUES ('x')"),
    ("worker", "SELECT bascule.acknowledge(1, 'mx', 'policy_daemon', 1)"),
    ("worker", "SELECT bascule.forget_node('mx', 'policy_daemon', 'x')"),
    ("worker", "UPDATE bascule.domain SET imap_host = 'x.test'"),
    ("admin", "SELECT sealed_credential FROM bascule.mailbox"),
    ("admin", "SELECT password_hash FROM bascule.mailbox"),
    ("admin", "SELECT sealed_copy_login FROM bascule.domain"),
    ("admin", "SELECT * FROM bascule.domain"),
    ("admin", "SELECT domain FROM bascule.domain"),  # the whole row as one value
    ("admin", "UPDATE bascule.domain SET connections = 1 RETURNING sealed_copy_login"),
    ("admin", "SELECT bascule.acknowledge(1, 'mx', 'policy_daemon', 1)"),
    ("admin", "SELECT bascule.beat('x', 'policy_daemon')"),
    ("admin", "SELECT bascule.note(NULL::bascule.domain, 'x')"),
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
    ("admin", "SELECT * FROM bascule.findings"),
    ("authenticator", "SELECT bascule.record_findings('n', '[]')"),
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
    ("portal", "SELECT bascule.share_guesses('x', 0, '[]'), bascule.logged_in_from('a@lab.test', '192.0.2.1')"),
    ("policy_daemon", "SELECT * FROM bascule.routing_mailbox"),
    ("policy_daemon", "SELECT bascule.record_sighting('bob@lab.test', 1)"),
    ("policy_daemon", "SELECT bascule.record_sightings('{bob@lab.test}', '{1}')"),
    ("policy_daemon", "SELECT * FROM bascule.routing_unmoved"),
    ("admin", "UPDATE bascule.domain SET smtp_tls = 'verify'"),
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
    ("admin", "SELECT imap_host, copy_login, url_token FROM bascule.domain"),
    ("admin", "UPDATE bascule.domain SET copy_login = 'master', sealed_copy_login = 'x' WHERE name = 'lab.test'"),
    ("worker", "SELECT sealed_copy_login FROM bascule.domain"),
    ("worker", "SELECT bascule.attempt_failed(1, 'x'), bascule.attempt_failed(1, 'x', false, '0', '', true)"),
    ("authenticator", "SELECT bascule.beat('n', 'authenticator'), bascule.sign_off('n', 'authenticator')"),
]


def test_the_page_is_told_nothing_secret(postgres: Postgres, owner: Connection) -> None:
    owner.execute("UPDATE domain SET copy_login = 'master', sealed_copy_login = 'sealed box'")
    with psycopg.connect(postgres.dsn("bascule_portal"), autocommit=True) as portal:
        row = portal.execute("SELECT to_jsonb(found) FROM bascule.portal_domain('token') AS found").fetchone()
    assert row is not None
    assert row[0]["imap_host"] == "imap.old.test"
    assert not {"sealed_copy_login", "url_token", "url_expires_at"} & set(row[0])


def test_nothing_sealed_is_readable_but_by_workers(owner: Connection) -> None:
    """By whatever grant, on whatever table or view, also one that is added later."""
    readable = owner.execute(
        "SELECT role.rolname, attrelid::regclass::text, attname FROM pg_roles AS role CROSS JOIN pg_attribute JOIN "
        "pg_class ON pg_class.oid = attrelid WHERE relnamespace = 'bascule'::regnamespace AND relkind IN ('r', 'v') "
        "AND (attname LIKE 'sealed%' OR attname = 'password_hash') AND NOT attisdropped AND role.rolname LIKE "
        "'bascule\\_%' AND has_column_privilege(role.rolname, attrelid, attnum, 'SELECT')"
    ).fetchall()
    # The authenticator checks the passwords of those who have moved: it needs their hashes.
    assert ("bascule_authenticator", "login_mailbox", "password_hash") in readable
    assert {role for role, _, column in readable if column != "password_hash"} == {"bascule_worker"}
    assert {role for role, _, _ in readable} == {"bascule_worker", "bascule_authenticator"}


@pytest.mark.parametrize(("role", "act"), ALLOWED)
def test_what_a_role_needs(postgres: Postgres, owner: Connection, role: str, act: str) -> None:
    owner.execute("SELECT request_migration('alice@lab.test', 'portal', 'sealed')")
    with psycopg.connect(postgres.dsn(f"bascule_{role}"), autocommit=True) as connection:
        connection.execute(act.encode())
