"""Requests, closing and the like: what is refused, with which words, and that it changes nothing."""

from __future__ import annotations

import json
from typing import cast

import psycopg
import pytest

from bascule.database import Connection, value
from bascule.lab.postgres import Postgres
from bascule.lab.sites import eventually


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
        ("SELECT request_migration('info@lab.test', 'portal', 's')", "BA005", "is an alias"),
        ("SELECT activate_domain('lab.test', 't')", "BA002", "is already active"),
        ("SELECT activate_domain('other.test', 't')", "BA003", "no domain other.test is known"),
        ("SELECT rotate_url('other.test', 't')", "BA003", "no domain other.test is known"),
        ("SELECT assign_alias('x@elsewhere.test', 'here@lab.test')", "BA001", "not an address of a domain known here"),
        ("SELECT assign_alias('x@lab.test', 'nobody@lab.test')", "BA003", "nothing is known of a mailbox"),
        ("SELECT assign_alias('moving@lab.test', 'here@lab.test')", "BA002", "is a mailbox that moves"),
        ("SELECT waive_address('x@lab.test', ' ')", "BA002", "say why"),
        ("SELECT retry('expected@lab.test')", "BA002", "nothing to try again"),
        ("SELECT retry('paused@lab.test')", "BA002", "is paused"),
        ("SELECT retry('changed@lab.test')", "BA002", "waits for the user's new password"),
        ("SELECT expect('info@lab.test')", "BA005", "is an alias"),
        ("SELECT expect('x@elsewhere.test')", "BA001", "not an address of a domain known here"),
        ("SELECT remove_alias('here@lab.test')", "BA003", "is no alias"),
        ("SELECT unwaive_address('here@lab.test')", "BA003", "is not waived"),
        ("SELECT pause('here@lab.test', '')", "BA002", "say why"),
        ("SELECT pause('nobody@lab.test', 'x')", "BA003", "nothing is known of a mailbox"),
        ("SELECT resume('here@lab.test')", "BA002", "is not paused"),
        ("SELECT pause_domain('lab.test', ' ')", "BA002", "say why"),
        ("SELECT pause_domain('other.test', 'x')", "BA003", "no domain other.test is known"),
        ("SELECT resume_domain('lab.test')", "BA002", "is not paused"),
        ("SELECT portal_request('wrong', 'x@lab.test', 's', '', '', 'en')", "BA003", "this link is not known"),
        (
            "SELECT portal_request('token', 'x@second.test', 's', '', '', 'en')",
            "BA001",
            "is not an address of lab.test",
        ),
        ("SELECT portal_request('token', 'info@lab.test', 's', '', '', 'fr')", "BA005", "is an alias"),
        ("SELECT give_up('here@lab.test', 'why')", "BA002", "has moved already"),
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
    owner.execute("SELECT expect('expected@lab.test')")
    owner.execute("SELECT request_migration('paused@lab.test', 'login', 'sealed')")
    owner.execute("SELECT pause('paused@lab.test', 'away')")
    changed = value(owner, "SELECT request_migration('changed@lab.test', 'login', 'sealed')")
    owner.execute("SELECT attempt_failed(%s, 'refused', true)", (changed,))
    owner.execute(
        "INSERT INTO domain (name, store, imap_host, imap_port, imap_tls, smtp_host, smtp_port) "
        "VALUES ('second.test', 'local', 'imap.old.test', 993, 'implicit', 'mx.old.test', 25)"
    )
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
    assert "4 things are in the way" in words
    assert "Move it (bascule request), assign it to a mailbox (bascule alias), or give it up (bascule waive)" in words
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
    assert "scanner@lab.test (receives mail" in reason
    assert "mail for it will be refused" in reason
    assert "moving@lab.test (in state requested): its move will be given up" in reason
    assert owner.execute("SELECT state FROM mailbox").fetchall() == [("legacy",)]


def test_sightings_are_counted(owner: Connection) -> None:
    owner.execute("SELECT record_sighting('Scanner@Lab.test', 3)")
    owner.execute("SELECT record_sighting('scanner@lab.test', 2)")
    assert owner.execute("SELECT address, messages FROM forgotten").fetchall() == [("scanner@lab.test", 5)]
    put_local(owner, "scanner@lab.test")
    assert owner.execute("SELECT address FROM forgotten").fetchall() == []


def test_a_return_has_its_own_deadline_and_epoch(owner: Connection) -> None:
    mailbox = put_local(owner, "alice@lab.test")
    with pytest.raises(psycopg.Error, match="is not to be returned"):
        owner.execute("SELECT begin_return(%s)", (mailbox,))
    with pytest.raises(psycopg.Error, match="say why"):
        owner.execute("SELECT return_mailbox('alice@lab.test', ' ')")
    owner.execute("SELECT return_mailbox('alice@lab.test', 'a reason')")
    assert value(owner, "SELECT count(*) FROM queue.procrastinate_jobs WHERE task_name = 'return'") == 1
    epoch = value(owner, "SELECT begin_return(%s)", mailbox)
    assert value(owner, "SELECT reason FROM journal ORDER BY id DESC LIMIT 1") == "a reason"
    owner.execute("UPDATE mailbox SET cutover_deadline = now() - interval '1 second'")
    with pytest.raises(psycopg.Error, match="over its time or was undone"):
        owner.execute("SELECT finish_return(%s, %s)", (mailbox, epoch))
    owner.execute("SELECT undo_overdue_cutovers()")
    assert value(owner, "SELECT state FROM mailbox") == "local"
    assert value(owner, "SELECT return_requested_at IS NOT NULL FROM mailbox")
    epoch = value(owner, "SELECT begin_return(%s)", mailbox)
    owner.execute("SELECT finish_return(%s, %s)", (mailbox, epoch))
    row = owner.execute("SELECT state, password_hash, sealed_credential, return_requested_at FROM mailbox").fetchone()
    assert row == ("legacy", None, None, None)


def test_a_return_that_appended_cannot_be_called_off(owner: Connection) -> None:
    mailbox = put_local(owner, "alice@lab.test")
    owner.execute("SELECT return_mailbox('alice@lab.test', 'a reason')")
    owner.execute("SELECT intend_return(%s, 'INBOX', 7, 'guid', 'digest', 9)", (mailbox,))
    with pytest.raises(psycopg.Error, match="has begun to append"):
        owner.execute("SELECT cancel_return('alice@lab.test')")
    owner.execute("SELECT close_domain('lab.test', true, 'enough')")
    assert value(owner, "SELECT return_requested_at FROM mailbox") is None


def test_who_has_not_moved_cannot_be_returned(owner: Connection) -> None:
    value(owner, "SELECT request_migration('alice@lab.test', 'portal', 'sealed')")
    with pytest.raises(psycopg.Error, match="only a mailbox that has moved"):
        owner.execute("SELECT return_mailbox('alice@lab.test', 'a reason')")


def test_unreadable_messages_are_forgotten_when_they_come_and_stay_when_waived(owner: Connection) -> None:
    mailbox = int(value(owner, "SELECT request_migration('alice@lab.test', 'portal', 'sealed')"))
    owner.execute("SELECT begin_copy(%s)", (mailbox,))

    def named(*uids: int) -> str:
        return json.dumps([{"folder": "INBOX", "uidvalidity": 5, "uid": uid, "reason": "r"} for uid in uids])

    owner.execute("SELECT set_unreadable(%s, %s, true)", (mailbox, named(1, 2, 3)))
    assert value(owner, "SELECT waive_messages('alice@lab.test', 'a joke', 'INBOX', 2)") == 1
    owner.execute("SELECT set_unreadable(%s, %s, true)", (mailbox, named(3)))
    assert owner.execute("SELECT uid FROM unreadable ORDER BY uid").fetchall() == [(2,), (3,)]
    owner.execute("SELECT set_unreadable(%s, %s, false)", (mailbox, named(9)))  # a pass that failed
    assert owner.execute("SELECT uid FROM unreadable ORDER BY uid").fetchall() == [(2,), (3,), (9,)]
    assert "does not give every message" in value(owner, "SELECT problem FROM mailboxes")
    with pytest.raises(psycopg.Error, match="say why"):
        owner.execute("SELECT waive_messages('alice@lab.test', '')")
    assert value(owner, "SELECT waive_messages('alice@lab.test', 'all of them')") == 2
    assert value(owner, "SELECT problem FROM mailboxes") is None


def test_sessions_are_reserved_until_the_worker_is_gone(owner: Connection) -> None:
    owner.execute("UPDATE domain SET connections = 3")
    domain = value(owner, "SELECT id FROM domain")
    dsn = owner.info.dsn
    with psycopg.connect(dsn, autocommit=True) as first:
        assert value(first, "SELECT bascule.take_connections(%s, 2)", domain) == 2
        with psycopg.connect(dsn, autocommit=True) as second:
            assert value(second, "SELECT bascule.take_connections(%s, 2)", domain) == 1
            assert value(owner, "SELECT take_connections(%s, 1)", domain) == 0
    # PostgreSQL notices a moment later that they are gone.
    eventually("they are free again", lambda: value(owner, "SELECT take_connections(%s, 1)", domain) == 1, 10)


def test_a_legacy_server_that_asks_for_time_gets_it(owner: Connection) -> None:
    mailbox = value(owner, "SELECT request_migration('alice@lab.test', 'portal', 'sealed')")
    owner.execute("SELECT begin_copy(%s)", (mailbox,))
    owner.execute("SELECT attempt_failed(%s, 'over quota', false, '15 minutes')", (mailbox,))
    assert value(owner, "SELECT next_try - last_error_at >= interval '15 minutes' FROM mailbox")


def test_a_new_legacy_password_is_taken_for_the_sweeps(owner: Connection) -> None:
    mailbox = put_local(owner, "alice@lab.test")
    owner.execute("SELECT attempt_failed(%s, 'refused', true)", (mailbox,))
    value(owner, "SELECT request_migration('alice@lab.test', 'administrator', 'new')")
    assert owner.execute("SELECT state, sealed_credential, needs_credential FROM mailbox").fetchone() == (
        "local",
        b"new",
        False,
    )
    with pytest.raises(psycopg.Error, match="has already moved"):
        owner.execute("SELECT request_migration('alice@lab.test', 'administrator', 'other')")


def test_a_mailbox_is_placed_before_it_moves(owner: Connection) -> None:
    owner.execute("INSERT INTO store VALUES ('second', 'inet:store2.test:24', 'store2.test')")
    owner.execute("SELECT place('Alice@lab.test', 'second')")
    owner.execute("SELECT place('alice@lab.test', 'second')")
    mailbox = value(owner, "SELECT request_migration('alice@lab.test', 'portal', 'sealed')")
    assert value(owner, "SELECT store FROM mailbox WHERE id = %s", mailbox) == "second"
    assert value(owner, "SELECT queue_name FROM queue.procrastinate_jobs") == "second"
    with pytest.raises(psycopg.Error, match="it stays at its store"):
        owner.execute("SELECT place('alice@lab.test', 'local')")
    with pytest.raises(psycopg.Error, match="no store nowhere is known"):
        owner.execute("SELECT place('bob@lab.test', 'nowhere')")
    assert value(owner, "SELECT count(*) FROM mailbox") == 1


@pytest.mark.parametrize("address", ['"john doe"@lab.test', "a b@lab.test", "a\tb@lab.test"])
def test_a_local_part_that_must_be_quoted_stays(owner: Connection, address: str) -> None:
    """Dovecot takes no such name of a user."""
    with pytest.raises(psycopg.Error, match="Dovecot takes no such name of a user"):
        owner.execute("SELECT request_migration(%s, 'administrator', 'sealed')", (address,))


LOGIN_STATE = "SELECT state::text, store, store_host, wants_credential FROM login_state('alice@lab.test')"


def test_what_the_authenticator_is_told(owner: Connection) -> None:
    def told() -> object:
        return owner.execute(LOGIN_STATE.encode()).fetchall()

    assert told() == [("legacy", "local", None, True)]
    owner.execute("UPDATE domain SET first_login_migrates = false")
    assert told() == [("legacy", "local", None, False)]
    mailbox = value(owner, "SELECT request_migration('alice@lab.test', 'portal', 'sealed')")
    assert told() == [("requested", "local", None, False)]
    owner.execute("SELECT begin_copy(%s)", (mailbox,))
    owner.execute("UPDATE mailbox SET needs_credential = true")
    assert told() == [("copying", "local", None, True)]
    assert owner.execute("SELECT * FROM login_state('alice@elsewhere.test')").fetchall() == []


def test_who_waits_for_a_move_does_not_wait_for_sweeps(owner: Connection) -> None:
    for task in ("sweep", "migrate", "return"):
        owner.execute("SELECT enqueue(%s, 1, 'local')", (task,))
    priorities: dict[str, int] = dict(
        owner.execute("SELECT task_name, priority FROM queue.procrastinate_jobs").fetchall()
    )
    assert priorities["sweep"] < priorities["migrate"] == priorities["return"]


def test_a_paused_mailbox_is_left_alone(owner: Connection) -> None:
    mailbox = value(owner, "SELECT request_migration('alice@lab.test', 'portal', 'sealed')")
    owner.execute("SELECT begin_copy(%s)", (mailbox,))
    assert value(owner, "SELECT report_progress(%s, 1, 10, 100)", mailbox) is True
    owner.execute("SELECT pause('alice@lab.test', 'she gives a lecture')")
    assert value(owner, "SELECT report_progress(%s, 2, 10, 200)", mailbox) is False
    owner.execute("DELETE FROM queue.procrastinate_jobs")
    assert value(owner, "SELECT requeue_unattended()") == 0
    assert owner.execute("SELECT problem, advice FROM failed").fetchall() == [
        ("paused: she gives a lecture", "Let it go on when it may: bascule resume")
    ]
    owner.execute("SELECT resume('alice@lab.test')")
    assert value(owner, "SELECT requeue_unattended()") == 1
    assert value(owner, "SELECT report_progress(%s, 3, 10, 300)", mailbox) is True
    assert owner.execute("SELECT event, reason FROM events WHERE event IN ('paused', 'resumed')").fetchall() == [
        ("paused", "she gives a lecture"),
        ("resumed", None),
    ]


def test_a_paused_domain_is_left_alone_and_takes_requests(owner: Connection) -> None:
    moved = put_local(owner, "moved@lab.test")
    owner.execute("SELECT pause_domain('lab.test', 'backup of the legacy server')")
    mailbox = value(owner, "SELECT request_migration('alice@lab.test', 'portal', 'sealed')")
    owner.execute("DELETE FROM queue.procrastinate_jobs")
    owner.execute("SELECT sweep_done(%s, clock_timestamp())", (moved,))
    assert value(owner, "SELECT requeue_unattended()") == 0
    assert value(owner, "SELECT count(*) FROM queue.procrastinate_jobs") == 0
    assert value(owner, "SELECT readiness FROM domains") == "paused: backup of the legacy server"
    assert value(owner, "SELECT paused FROM portal_progress(%s)", mailbox)
    owner.execute("SELECT resume_domain('lab.test')")
    assert value(owner, "SELECT requeue_unattended()") == 2


def test_a_cutover_that_has_begun_is_not_stopped_by_a_pause(owner: Connection) -> None:
    mailbox = value(owner, "SELECT request_migration('alice@lab.test', 'portal', 'sealed')")
    owner.execute("SELECT begin_copy(%s)", (mailbox,))
    owner.execute("SELECT begin_cutover(%s)", (mailbox,))
    with pytest.raises(psycopg.Error, match="it is over in a moment"):
        owner.execute("SELECT pause('alice@lab.test', 'x')")
    owner.execute("SELECT pause_domain('lab.test', 'x')")
    assert value(owner, "SELECT report_progress(%s, 3, 10, 300)", mailbox) is True


def test_who_is_expected_is_not_forgotten(owner: Connection) -> None:
    """A mailbox that gets no mail and whose owner never came, but which is on the administrator's list."""
    assert value(owner, "SELECT expect('Archive@lab.test', 'Old', 'Mail')") is True
    assert value(owner, "SELECT expect('archive@lab.test')") is False
    assert value(owner, "SELECT known FROM domains") == 1
    with pytest.raises(psycopg.Error, match=r"archive@lab.test \(is known, but has not moved\)"):
        owner.execute("SELECT close_domain('lab.test')")
    owner.execute("SELECT waive_address('archive@lab.test', 'nobody wants it')")
    assert owner.execute("SELECT FROM closing_obstacles").fetchall() == []
    owner.execute("SELECT unwaive_address('archive@lab.test')")
    assert len(owner.execute("SELECT FROM closing_obstacles").fetchall()) == 1


def test_a_late_message_holds_the_close_up_for_a_quiet_period(owner: Connection) -> None:
    mailbox = put_local(owner, "alice@lab.test")
    owner.execute("SELECT stage_straggler(%s, 'INBOX', 1, 7)", (mailbox,))
    with pytest.raises(psycopg.Error, match="a message that came late is not yet in the mailbox here"):
        owner.execute("SELECT close_domain('lab.test')")
    owner.execute("SELECT straggler_delivered(%s, 'INBOX', 1, 7)", (mailbox,))
    with pytest.raises(psycopg.Error, match="a message still reached the legacy mailbox on"):
        owner.execute("SELECT close_domain('lab.test')")
    owner.execute("UPDATE straggler SET staged_at = now() - interval '25 hours'")
    owner.execute("SELECT close_domain('lab.test')")


def test_many_obstacles_are_not_all_written_out(owner: Connection) -> None:
    for number in range(30):
        owner.execute("SELECT record_sighting(%s, 1)", (f"device-{number}@lab.test",))
    with pytest.raises(psycopg.Error, match="30 things are in the way") as refused:
        owner.execute("SELECT close_domain('lab.test')")
    assert str(refused.value).count("receives mail") == 25
    assert "... and 5 more: SELECT * FROM bascule.closing_obstacles" in str(refused.value)


def test_a_sighting_ends_with_the_move(owner: Connection) -> None:
    owner.execute("SELECT record_sighting('alice@lab.test', 5)")
    owner.execute("SELECT record_sighting('info@lab.test', 5)")
    put_local(owner, "alice@lab.test")
    owner.execute("SELECT assign_alias('info@lab.test', 'alice@lab.test')")
    # What a policy daemon had counted before, and tells now.
    owner.execute("SELECT record_sighting('alice@lab.test', 1)")
    owner.execute("SELECT record_sighting('info@lab.test', 1)")
    assert owner.execute("SELECT FROM sighting").fetchall() == []
    owner.execute("SELECT remove_alias('info@lab.test')")
    owner.execute("SELECT record_sighting('info@lab.test', 1)")
    assert owner.execute("SELECT address FROM forgotten").fetchall() == [("info@lab.test",)]


def test_who_asks_again_at_the_url_is_only_looked_up(owner: Connection) -> None:
    ask = "SELECT portal_request('token', 'alice@lab.test', %s, 'Alice', 'Quay', %s)"
    mailbox = value(owner, ask, b"first", "fr")
    assert value(owner, ask, b"second", "ar") == mailbox
    kept = "SELECT sealed_credential, language, first_name FROM mailbox"
    assert owner.execute(kept.encode()).fetchall() == [(b"first", "ar", "Alice")]
    owner.execute("SELECT attempt_failed(%s, 'refused', true)", (mailbox,))
    assert value(owner, ask, b"third", "ar") == mailbox
    assert value(owner, "SELECT sealed_credential FROM mailbox") == b"third"
    assert value(owner, "SELECT language FROM mailboxes") == "ar"


def test_rate_and_estimate(owner: Connection) -> None:
    mailbox = value(owner, "SELECT request_migration('alice@lab.test', 'portal', 'sealed')")
    owner.execute("SELECT begin_copy(%s)", (mailbox,))
    owner.execute("SELECT report_progress(%s, 1000, 9000, 1)", (mailbox,))  # what an earlier attempt had brought
    assert owner.execute("SELECT messages_per_second, remaining FROM mailboxes").fetchall() == [(None, None)]
    owner.execute("SELECT report_progress(%s, 3000, 9000, 1)", (mailbox,))
    owner.execute("UPDATE mailbox SET copy_began_at = clock_timestamp() - interval '100 seconds'")
    percent, rate, seconds = owner.execute(
        "SELECT percent, messages_per_second, extract(epoch FROM remaining) FROM mailboxes"
    ).fetchall()[0]
    assert (percent, round(rate), round(seconds, -1)) == (33, 20, 300)
    assert value(owner, "SELECT round(extract(epoch FROM remaining), -1) FROM portal_progress(%s)", mailbox) == 300
    owner.execute("SELECT attempt_failed(%s, 'away')", (mailbox,))
    assert value(owner, "SELECT messages_per_second FROM mailboxes") is None


def test_an_estimate_for_who_waits(owner: Connection) -> None:
    for number in range(4):
        put_local(owner, f"moved-{number}@lab.test")
    value(owner, "SELECT request_migration('first@lab.test', 'portal', 'sealed')")
    second = value(owner, "SELECT request_migration('second@lab.test', 'portal', 'sealed')")
    # Four moved in the last hour: one in a quarter of an hour.
    row = owner.execute(
        "SELECT ahead, extract(epoch FROM remaining)::integer FROM portal_progress(%s)", (second,)
    ).fetchone()
    assert row == (1, 1800)
    assert value(owner, "SELECT extract(epoch FROM remaining)::integer FROM domains") == 1800


def test_advice_is_kept_with_the_error(owner: Connection) -> None:
    mailbox = value(owner, "SELECT request_migration('alice@lab.test', 'portal', 'sealed')")
    failed = "SELECT problem, advice FROM failed"
    owner.execute("SELECT attempt_failed(%s, 'the disk is full', false, '0', 'Make room.')", (mailbox,))
    assert owner.execute(failed.encode()).fetchall() == [("the disk is full", "Make room.")]
    owner.execute("SELECT attempt_failed(%s, 'it does not answer')", (mailbox,))
    assert owner.execute(failed.encode()).fetchall() == [
        ("it does not answer", "Nothing: it is tried again at next_try; bascule retry does not wait")
    ]
    owner.execute("SELECT attempt_failed(%s, 'refused', true)", (mailbox,))
    assert "Have the user log in here" in value(owner, "SELECT advice FROM failed")


def test_a_user_is_told_of_trouble_once(owner: Connection) -> None:
    mailbox = value(owner, "SELECT request_migration('alice@lab.test', 'portal', 'sealed')")
    assert value(owner, "SELECT trouble_told(%s)", mailbox) is False
    owner.execute("SELECT attempt_failed(%s, 'refused', true)", (mailbox,))
    assert value(owner, "SELECT trouble_told(%s)", mailbox) is True
    assert value(owner, "SELECT trouble_told(%s)", mailbox) is False
    owner.execute("SELECT record_login('alice@lab.test', 'new')")
    owner.execute("SELECT attempt_failed(%s, 'refused', true)", (mailbox,))
    owner.execute("UPDATE domain SET writes_to_users = false")
    assert value(owner, "SELECT trouble_told(%s)", mailbox) is False


def test_the_parts_that_run(owner: Connection) -> None:
    owner.execute("SELECT beat('mx1', 'policy_daemon')")
    owner.execute("SELECT beat('mx2', 'policy_daemon')")
    owner.execute("UPDATE node SET heartbeat_at = now() - interval '1 minute' WHERE name = 'mx2'")
    assert owner.execute("SELECT part, name, alive FROM parts ORDER BY name").fetchall() == [
        ("policy_daemon", "mx1", True),
        ("policy_daemon", "mx2", False),
    ]


# Logins ------------------------------------------------------------------------------


def first_login(owner: Connection, service: str = "imap") -> str | None:
    owner.execute("SELECT record_login('new@lab.test', 'sealed', %s)", (service,))
    row = owner.execute("SELECT state::text FROM mailbox WHERE full_address = 'new@lab.test'").fetchone()
    return None if row is None else row[0]


@pytest.mark.parametrize(("service", "state"), [("imap", "requested"), ("pop3", "requested"), ("submission", None)])
def test_only_who_reads_mail_is_moved_by_a_login(owner: Connection, service: str, state: str | None) -> None:
    assert first_login(owner, service) == state


def test_a_first_login_moves_after_a_delay_that_begins_with_the_notice(owner: Connection) -> None:
    owner.execute("UPDATE domain SET first_login_delay = '1 day'")
    assert first_login(owner) == "legacy"

    def due() -> str:
        owner.execute("SELECT request_due_first_logins()")
        return str(owner.execute("SELECT state FROM mailbox").fetchone()[0])  # type: ignore[index]

    owner.execute("UPDATE mailbox SET first_login_at = now() - interval '2 days'")
    assert due() == "legacy", "nobody has told them yet"
    owner.execute("SELECT first_login_told(id) FROM mailbox")
    assert due() == "legacy"
    owner.execute("UPDATE mailbox SET first_login_told_at = now() - interval '2 days'")
    assert due() == "requested"


def test_a_first_login_that_was_declined_moves_nobody(owner: Connection) -> None:
    owner.execute("UPDATE domain SET first_login_delay = '1 day'")
    first_login(owner)
    owner.execute("SELECT decline_first_login('new@lab.test')")
    owner.execute("UPDATE mailbox SET first_login_told_at = now() - interval '2 days'")
    owner.execute("SELECT request_due_first_logins()")
    assert first_login(owner) == "legacy"
    assert owner.execute("SELECT sealed_credential FROM mailbox").fetchone() == (None,)
    owner.execute("UPDATE domain SET first_login_delay = '0'")
    assert first_login(owner) == "legacy"
    # Who asks is moved all the same.
    owner.execute("SELECT request_migration('new@lab.test', 'portal', 'sealed')")
    with pytest.raises(psycopg.DatabaseError, match="on the move already"):
        owner.execute("SELECT decline_first_login('new@lab.test')")


def test_guesses_are_shared_and_nobody_hears_their_own(postgres: Postgres, owner: Connection) -> None:
    mine = '[{"kind": "account", "subject": "a@lab.test", "guesses": 3}]'
    with psycopg.connect(postgres.dsn("bascule_authenticator"), autocommit=True) as node:

        def share(instance: str, after: int, guesses: str) -> list[tuple[object, ...]]:
            return node.execute(
                "SELECT id, kind, subject, guesses FROM bascule.share_guesses(%s, %s, %s)", (instance, after, guesses)
            ).fetchall()

        assert share("one", 0, mine) == []
        heard = share("two", 0, "[]")
        assert [row[1:] for row in heard] == [("account", "a@lab.test", 3)]
        assert share("two", cast("int", heard[0][0]), "[]") == []
        owner.execute("UPDATE login_guess SET at = now() - interval '11 minutes'")
        assert share("three", 0, "[]") == []
        assert owner.execute("SELECT count(*) FROM login_guess").fetchone() == (0,)
        sources = node.execute(
            "SELECT address, site FROM bascule.share_sources('1970-01-01', %s)",
            ('[{"address": "a@lab.test", "site": "192.0.2.1"}]',),
        ).fetchall()
        assert sources == [("a@lab.test", "192.0.2.1")]


def test_authenticators_hear_of_what_dovecot_must_know(owner: Connection) -> None:
    first_login(owner)
    owner.execute("LISTEN bascule_mailbox")
    owner.execute("UPDATE mailbox SET state = 'copying'")
    owner.execute("SELECT set_hierarchy(id, '.', 'INBOX.') FROM mailbox")
    owner.execute("UPDATE mailbox SET last_error = 'x'")
    assert [each.payload for each in owner.notifies(timeout=1)] == ["new@lab.test"] * 2
