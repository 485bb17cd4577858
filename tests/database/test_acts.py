"""Requests, closing and the like: what is refused, with which words, and that it changes nothing."""

from __future__ import annotations

import psycopg
import pytest

from bascule.database import Connection


def everything(connection: Connection) -> list[tuple[object, ...]]:
    """All that a refused act must leave as it is."""
    rows: list[tuple[object, ...]] = []
    for table in ("domain", "mailbox", "alias", "sighting", "journal", "queue.procrastinate_jobs"):
        rows += connection.execute(f"SELECT t::text FROM {table} AS t ORDER BY 1".encode()).fetchall()
    return rows


def put_local(connection: Connection, address: str) -> int:
    row = connection.execute("SELECT request_migration(%s, 'portal', 'sealed')", (address,)).fetchone()
    assert row is not None
    connection.execute("SELECT begin_copy(%s)", row)
    connection.execute("SELECT begin_cutover(%s)", row)
    connection.execute(
        "UPDATE mailbox SET state = 'local', cutover_deadline = NULL, password_hash = '{ARGON2ID}x', "
        "migrated_at = now(), last_message_at = now(), swept_at = now() WHERE id = %s",
        row,
    )
    return int(row[0])


@pytest.mark.parametrize(
    ("act", "code", "words"),
    [
        (
            "SELECT request_migration('x@elsewhere.test', 'portal', 's')",
            "BA001",
            "not an address of a domain known here",
        ),
        ("SELECT request_migration('no-domain', 'portal', 's')", "BA001", "not an address of a domain known here"),
        ("SELECT request_migration('moving@lab.test', 'portal', 's')", "BA002", "already on the move"),
        ("SELECT request_migration('here@lab.test', 'portal', 's')", "BA002", "has already moved"),
        ("SELECT request_migration('info@lab.test', 'portal', 's')", "BA002", "is an alias"),
        ("SELECT activate_domain('lab.test', 't')", "BA002", "is already active"),
        ("SELECT activate_domain('other.test', 't')", "BA003", "no domain other.test is known"),
        ("SELECT rotate_url('other.test', 't')", "BA003", "no domain other.test is known"),
        ("SELECT assign_alias('x@elsewhere.test', 'here@lab.test')", "BA001", "not an address of a domain known here"),
        ("SELECT assign_alias('x@lab.test', 'nobody@lab.test')", "BA003", "nothing is known of a mailbox"),
        ("SELECT assign_alias('moving@lab.test', 'here@lab.test')", "BA002", "is a mailbox that moves"),
        ("SELECT waive_address('x@lab.test', ' ')", "BA002", "say why"),
        ("SELECT retry('here@lab.test')", "BA002", "nothing to try again"),
        ("SELECT give_up('here@lab.test', 'why')", "BA002", "cannot go from local to legacy"),
        ("SELECT close_domain('lab.test')", "BA004", "cannot be closed"),
        ("SELECT close_domain('lab.test', true)", "BA002", "needs a reason"),
        ("SELECT close_domain('other.test')", "BA003", "no domain other.test is known"),
        ("SELECT * FROM portal_domain('wrong')", "BA003", "this link is not known"),
    ],
)
def test_bad_input_gets_a_clear_error_and_changes_nothing(owner: Connection, act: str, code: str, words: str) -> None:
    put_local(owner, "here@lab.test")
    owner.execute("SELECT request_migration('moving@lab.test', 'login', 'sealed')")
    owner.execute("SELECT assign_alias('info@lab.test', 'here@lab.test')")
    before = everything(owner)
    with pytest.raises(psycopg.Error, match=words) as refused:
        owner.execute(act.encode())
    assert refused.value.sqlstate == code
    assert everything(owner) == before


def test_an_expired_link_is_told_apart_from_a_wrong_one(owner: Connection) -> None:
    owner.execute("UPDATE domain SET url_expires_at = now() - interval '1 second'")
    with pytest.raises(psycopg.Error, match="this link has expired"):
        owner.execute("SELECT * FROM portal_domain('token')")


def test_a_rotated_url_ends_the_former_one(owner: Connection) -> None:
    owner.execute("SELECT rotate_url('lab.test', 'new-token')")
    assert owner.execute("SELECT name FROM portal_domain('new-token')").fetchall() == [("lab.test",)]
    with pytest.raises(psycopg.Error, match="not known"):
        owner.execute("SELECT * FROM portal_domain('token')")


def test_a_first_login_is_a_request_if_the_domain_says_so(owner: Connection) -> None:
    owner.execute("UPDATE domain SET first_login_migrates = false")
    owner.execute("SELECT record_login('alice@lab.test', 'sealed')")
    assert owner.execute("SELECT 1 FROM mailbox").fetchall() == []
    owner.execute("UPDATE domain SET first_login_migrates = true")
    for _ in range(2):  # the second changes nothing
        owner.execute("SELECT record_login('alice@lab.test', 'sealed')")
    assert owner.execute("SELECT state, trigger FROM mailbox").fetchall() == [("requested", "login")]
    assert owner.execute("SELECT count(*) FROM journal WHERE event = 'state'").fetchall() == [(1,)]


def test_a_refused_password_waits_for_the_new_one(owner: Connection) -> None:
    owner.execute("SELECT request_migration('alice@lab.test', 'portal', 'old')")
    mailbox = owner.execute("SELECT id FROM mailbox").fetchone()
    assert mailbox is not None
    owner.execute("SELECT begin_copy(%s)", mailbox)
    owner.execute("DELETE FROM queue.procrastinate_jobs")  # the worker took it
    owner.execute("SELECT attempt_failed(%s, 'refused', true)", mailbox)
    assert (
        owner.execute("SELECT problem FROM mailboxes").fetchall()[0][0].startswith("waits for the user's new password")
    )
    assert owner.execute("SELECT requeue_unattended()").fetchall() == [(0,)]
    owner.execute("SELECT record_login('alice@lab.test', 'new')")
    assert owner.execute("SELECT state, sealed_credential, needs_credential FROM mailbox").fetchall() == [
        ("copying", b"new", False)
    ]
    assert owner.execute("SELECT task_name FROM queue.procrastinate_jobs").fetchall() == [("migrate",)]


def test_closing_names_everybody_who_would_be_forgotten(owner: Connection) -> None:
    put_local(owner, "here@lab.test")
    owner.execute("SELECT record_sighting('scanner@lab.test', 3)")
    owner.execute("SELECT record_sighting('info@lab.test', 1)")
    owner.execute("SELECT request_migration('moving@lab.test', 'portal', 'sealed')")
    owner.execute("SELECT request_migration('gave-up@lab.test', 'portal', 'sealed')")
    owner.execute("SELECT give_up('gave-up@lab.test', 'not now')")
    erased = owner.execute("SELECT sealed_credential FROM mailbox WHERE local_part = 'gave-up'").fetchall()
    assert erased == [(None,)]
    with pytest.raises(psycopg.Error) as refused:
        owner.execute("SELECT close_domain('lab.test')")
    words = str(refused.value)
    assert "4 addresses" in words
    for name in ("scanner", "info", "moving", "gave-up"):
        assert f"{name}@lab.test (" in words

    owner.execute("SELECT assign_alias('info@lab.test', 'here@lab.test')")
    owner.execute("SELECT waive_address('scanner@lab.test', 'scrapped')")
    owner.execute("SELECT waive_address('gave-up@lab.test', 'left the company')")
    assert owner.execute("SELECT address FROM closing_obstacles").fetchall() == [("moving@lab.test",)]
    owner.execute("SELECT give_up('moving@lab.test', 'x')")
    owner.execute("SELECT waive_address('moving@lab.test', 'x')")
    owner.execute("SELECT close_domain('lab.test')")
    assert owner.execute("SELECT mode FROM domains").fetchall() == [("closed",)]
    assert owner.execute("SELECT count(*) FROM mailbox WHERE sealed_credential IS NOT NULL").fetchall() == [(0,)]


def test_closing_waits_for_a_sweep_after_the_last_move(owner: Connection) -> None:
    """Until the last user has moved, a colleague may write to the others inside the legacy server."""
    first = put_local(owner, "first@lab.test")
    put_local(owner, "last@lab.test")
    with pytest.raises(psycopg.Error, match="was not looked at since the last user moved") as refused:
        owner.execute("SELECT close_domain('lab.test')")
    assert "first@lab.test" in str(refused.value)
    assert "last@lab.test" not in str(refused.value)
    owner.execute("SELECT sweep_done(%s, clock_timestamp())", (first,))
    owner.execute("SELECT close_domain('lab.test')")


def test_closing_by_force_names_them_in_the_journal(owner: Connection) -> None:
    owner.execute("SELECT record_sighting('scanner@lab.test', 1)")
    owner.execute("SELECT request_migration('moving@lab.test', 'portal', 'sealed')")
    owner.execute("SELECT close_domain('lab.test', true, 'contract ends today')")
    reason = owner.execute("SELECT reason FROM journal WHERE event = 'closed by force'").fetchall()[0][0]
    assert "contract ends today" in reason
    assert "scanner@lab.test" in reason
    assert owner.execute("SELECT state FROM mailbox").fetchall() == [("legacy",)]


def test_sightings_are_counted(owner: Connection) -> None:
    owner.execute("SELECT record_sighting('Scanner@Lab.test', 3)")
    owner.execute("SELECT record_sighting('scanner@lab.test', 2)")
    assert owner.execute("SELECT address, messages FROM forgotten").fetchall() == [("scanner@lab.test", 5)]
    put_local(owner, "scanner@lab.test")
    assert owner.execute("SELECT address FROM forgotten").fetchall() == []
