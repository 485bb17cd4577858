"""Requests, closing and the like: what is refused, with which words, and that it changes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from threading import Barrier, Event
from typing import cast

import psycopg
import pytest

from bascule.database import Connection, connect, value
from bascule.lab.postgres import Postgres
from bascule.lab.sites import eventually
from bascule.migrator.acts import Acts, recorded

Acknowledge = Callable[[int, int], None]


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


def test_many_sightings_are_one_statement(owner: Connection) -> None:
    put_local(owner, "moved@lab.test")
    owner.execute("SELECT expect('info@lab.test')")
    told = {"Scanner@Lab.test": 3, "scanner@lab.test": 2, "moved@lab.test": 9, "x@elsewhere.test": 1, "no address": 1}
    assert value(owner, "SELECT record_sightings(%s, %s)", list(told), list(told.values())) == 0
    assert value(owner, "SELECT record_sightings(%s, %s)", ["scanner@lab.test", "door@lab.test"], [1, 1]) == 0
    assert owner.execute("SELECT address, messages FROM forgotten ORDER BY 1").fetchall() == [
        ("door@lab.test", 1),
        ("scanner@lab.test", 6),
    ]


def test_sightings_are_bounded_and_it_is_said(owner: Connection) -> None:
    kept = value(owner, "SELECT sightings_kept()")
    owner.execute(
        "INSERT INTO sighting (domain_id, local_part) SELECT domain.id, 'x' || number FROM domain, "
        "generate_series(1, %s) AS number",
        (kept - 1,),
    )
    full = "SELECT why FROM closing_obstacles WHERE address = '*@lab.test'"
    assert value(owner, full) is None
    told = ["a@lab.test", "b@lab.test", "x1@lab.test"]
    assert value(owner, "SELECT record_sightings(%s, %s)", told, [1, 1, 1]) == 1
    assert value(owner, "SELECT count(*) FROM sighting") == kept
    assert value(owner, "SELECT messages FROM sighting WHERE local_part = 'x1'") == 1
    assert value(owner, full) == "receives mail at more addresses than are counted"


def test_a_return_has_its_own_deadline_and_epoch(owner: Connection, acknowledge: Acknowledge) -> None:
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
    acknowledge(mailbox, epoch)
    owner.execute("SELECT finish_return(%s, %s)", (mailbox, epoch))
    row = owner.execute("SELECT state, password_hash, sealed_credential, return_requested_at FROM mailbox").fetchone()
    assert row == ("legacy", None, None, None)


def test_a_return_that_appended_is_called_off_and_knows_what_it_appended(owner: Connection) -> None:
    mailbox = put_local(owner, "alice@lab.test")
    owner.execute("SELECT return_mailbox('alice@lab.test', 'a reason', true)")
    assert value(owner, "SELECT return_forced FROM mailbox") is True
    owner.execute("SELECT intend_return(%s, 'INBOX', 7, 'guid', 'digest', 9)", (mailbox,))
    owner.execute("SELECT cancel_return('alice@lab.test')")
    row = owner.execute("SELECT return_requested_at, return_forced, last_message_at FROM mailbox").fetchone()
    assert row == (None, False, None)
    assert value(owner, "SELECT count(*) FROM returned_message") == 1


def test_an_append_is_remembered_before_its_uid_is_known(owner: Connection) -> None:
    mailbox = put_local(owner, "alice@lab.test")
    owner.execute("SELECT intend_return(%s, 'INBOX', 7, 'guid', 'digest', 9, 5, 0, '<a@b>')", (mailbox,))
    owner.execute("SELECT appended(%s, 'INBOX', 7)", (mailbox,))
    known = "SELECT appended_at IS NOT NULL, legacy_uid, legacy_uidvalidity, message_id FROM returned_message"
    assert owner.execute(known).fetchone() == (True, None, 5, "<a@b>")
    owner.execute("SELECT returned(%s, 'INBOX', 7, 12)", (mailbox,))
    assert owner.execute(known).fetchone() == (True, 12, 5, "<a@b>")
    owner.execute("SELECT intend_return(%s, 'INBOX', 7, 'another', 'digest', 9)", (mailbox,))
    assert owner.execute(known).fetchone() == (False, None, None, ""), "it is another message's UID by now"


def test_a_failed_return_is_counted_once(owner: Connection) -> None:
    mailbox = put_local(owner, "alice@lab.test")
    owner.execute("SELECT return_mailbox('alice@lab.test', 'a reason')")
    for attempts in (1, 2, 3):
        owner.execute("SELECT begin_return(%s)", (mailbox,))
        owner.execute("SELECT undo_return(%s, 'not clean')", (mailbox,))
        owner.execute("SELECT attempt_failed(%s, 'not clean')", (mailbox,))
        assert value(owner, "SELECT attempts FROM mailbox") == attempts


def test_what_a_return_leaves_behind_is_in_the_journal(owner: Connection, acknowledge: Acknowledge) -> None:
    mailbox = put_local(owner, "alice@lab.test")
    owner.execute("SELECT return_mailbox('alice@lab.test', 'a reason')")
    epoch = value(owner, "SELECT begin_return(%s)", mailbox)
    acknowledge(mailbox, epoch)
    owner.execute("SELECT finish_return(%s, %s, 'a Sieve script')", (mailbox, epoch))
    assert value(owner, "SELECT reason FROM journal WHERE event = 'not returned'") == "a Sieve script"


def test_a_last_message_that_is_not_taken_does_not_end_the_sweeps(owner: Connection) -> None:
    mailbox = put_local(owner, "alice@lab.test")
    owner.execute("UPDATE mailbox SET last_message_at = NULL, attempts = 4")
    owner.execute("SELECT sweep_done(%s, now(), 'last message not written: full', 'Make room')", (mailbox,))
    row = owner.execute("SELECT problem, advice, last_message_at, attempts FROM mailboxes").fetchone()
    assert row == ("last message not written: full", "Make room", None, 0)
    assert value(owner, "SELECT swept_at IS NOT NULL FROM mailbox")
    assert value(owner, "SELECT count(*) FROM queue.procrastinate_jobs WHERE task_name = 'sweep'") == 1
    with pytest.raises(psycopg.Error, match="say why"):
        owner.execute("SELECT waive_last_message('alice@lab.test', ' ')")
    owner.execute("SELECT waive_last_message('alice@lab.test', 'nobody reads it')")
    assert value(owner, "SELECT last_message_at IS NOT NULL FROM mailbox")
    with pytest.raises(psycopg.Error, match="no last message"):
        owner.execute("SELECT waive_last_message('alice@lab.test', 'again')")
    owner.execute("SELECT sweep_done(%s, now())", (mailbox,))
    assert value(owner, "SELECT problem FROM mailboxes") is None


def test_late_messages_that_changed_places_are_renumbered_together(owner: Connection) -> None:
    mailbox = put_local(owner, "alice@lab.test")
    for uid, name in ((6, "a"), (7, "b"), (8, "c")):
        owner.execute(
            "SELECT stage_straggler(%s, 'INBOX', 1, %s, '', '', 0, '{}', %s), straggler_delivered(%s, 'INBOX', 1, %s)",
            (mailbox, uid, name, mailbox, uid),
        )
    moves = [
        {"uidvalidity": 1, "uid": 6, "to_uidvalidity": 1, "to_uid": 7},
        {"uidvalidity": 1, "uid": 7, "to_uidvalidity": 2, "to_uid": 6},
    ]
    owner.execute("SELECT renumber_stragglers(%s, 'INBOX', %s)", (mailbox, json.dumps(moves)))
    kept = owner.execute("SELECT uidvalidity, uid, name FROM straggler ORDER BY name").fetchall()
    assert kept == [(1, 7, "a"), (2, 6, "b"), (1, 8, "c")]
    owner.execute("SELECT stage_straggler(%s, 'INBOX', 1, 8, '', '', 0, '{}', 'd')", (mailbox,))
    found = owner.execute("SELECT name, delivered_at FROM straggler WHERE uid = 8").fetchall()
    assert found == [("d", None)], "another message has its UID"
    owner.execute("SELECT stage_straggler(%s, 'INBOX', 1, 8, '', '', 0, '{}', 'e')", (mailbox,))
    assert value(owner, "SELECT name FROM straggler WHERE uid = 8") == "d", "what is staged is delivered first"


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


@pytest.mark.parametrize(
    "address",
    [
        '"john doe"@lab.test', "a b@lab.test", "a\tb@lab.test", "o'brien@lab.test", "r&d@lab.test", "a+b@lab.test",
        "a/b@lab.test", "../x@lab.test", "a=b@lab.test", "50%@lab.test", "josé@lab.test", "a*@lab.test", "~a@lab.test",
        "a@b@lab.test", "\u200ba@lab.test",
    ],
)  # fmt: skip
@pytest.mark.parametrize("way", ["portal_request('token', %s, 's', '', '', 'en')", "record_login(%s, 's')"])
def test_a_name_that_dovecot_does_not_take_stays(owner: Connection, address: str, way: str) -> None:
    before = everything(owner)
    with pytest.raises(psycopg.Error, match="Dovecot takes no such name of a user") as refused:
        owner.execute(f"SELECT {way}".encode(), (address,))
    assert refused.value.sqlstate == "BA002"
    assert "Have it renamed there" in (refused.value.diag.message_hint or "")
    assert everything(owner) == before


@pytest.mark.parametrize("name", ["alice", "a.b", "a_b", "a-b", "0", "-", "x" * 64])
def test_a_name_that_dovecot_takes_moves(owner: Connection, name: str) -> None:
    owner.execute("SELECT request_migration(%s, 'portal', 'sealed')", (f"{name}@lab.test",))
    assert value(owner, "SELECT state FROM mailbox") == "requested"


def test_a_name_that_cannot_move_is_expected_and_waived(owner: Connection) -> None:
    """The administrator's list may name it: it is in the way of the close until it is decided on."""
    assert value(owner, "SELECT expect('o''brien@lab.test')") is True
    with pytest.raises(psycopg.Error, match="Dovecot takes no such name"):
        owner.execute("SELECT request_migration('o''brien@lab.test', 'administrator', 'sealed')")
    assert value(owner, "SELECT state FROM mailbox") == "legacy"
    owner.execute("SELECT waive_address('o''brien@lab.test', 'renamed')")
    owner.execute("SELECT close_domain('lab.test')")


def test_a_sealed_box_has_bounds(owner: Connection) -> None:
    owner.execute("SELECT record_login('alice@lab.test', %s)", (b"x" * 4096,))
    before = everything(owner)
    with pytest.raises(psycopg.Error, match="a password of 4097 bytes is not taken"):
        owner.execute("SELECT record_login('bob@lab.test', %s)", (b"x" * 4097,))
    assert everything(owner) == before
    owner.execute("UPDATE mailbox SET needs_credential = true")
    with pytest.raises(psycopg.Error, match="is not taken"):
        owner.execute("SELECT record_login('alice@lab.test', %s)", (b"x" * 100_000,))


# Credentials and the server that they are for -------------------------------------------


def moving_and_moved(owner: Connection) -> tuple[int, int]:
    moved = put_local(owner, "moved@lab.test")
    moving = int(value(owner, "SELECT request_migration('moving@lab.test', 'portal', 'sealed')"))
    owner.execute("SELECT begin_copy(%s)", (moving,))
    owner.execute("SELECT expect('expected@lab.test')")
    owner.execute("UPDATE domain SET copy_login = 'master', sealed_copy_login = 'sealed'")
    return moving, moved


@pytest.mark.parametrize(
    "change",
    [
        "imap_host = 'evil.test'",
        "imap_port = 1143",
        "imap_tls = 'none'",
        "pop3_port = 110, pop3_tls = 'none'",
        "sieve_port = 4190, sieve_tls = 'none'",
    ],
)
def test_no_stored_password_goes_to_another_server(owner: Connection, change: str) -> None:
    moving_and_moved(owner)
    notices: list[str] = []
    owner.add_notice_handler(lambda notice: notices.append(notice.message_primary or ""))
    owner.execute(f"UPDATE domain SET {change} WHERE name = 'lab.test'".encode())
    assert owner.execute("SELECT copy_login, sealed_copy_login FROM domain").fetchall() == [("user", None)]
    assert owner.execute(
        "SELECT local_part, state, sealed_credential, needs_credential FROM mailbox ORDER BY 1"
    ).fetchall() == [
        ("expected", "legacy", None, False),
        ("moved", "local", None, True),
        ("moving", "copying", None, True),
    ]
    event = value(owner, "SELECT reason FROM events WHERE event = 'credentials erased'")
    assert "2 stored passwords, the copy login erased" in event
    assert notices == [f"lab.test: {event}"]
    problems = owner.execute("SELECT problem FROM failed ORDER BY address").fetchall()
    assert (
        problems == [("waits for the user's password: the one we kept was erased when the legacy server changed",)] * 2
    )
    owner.execute("DELETE FROM queue.procrastinate_jobs")
    assert value(owner, "SELECT requeue_unattended()") == 0


def test_the_next_login_brings_what_was_erased(owner: Connection) -> None:
    moving_and_moved(owner)
    owner.execute("UPDATE domain SET imap_host = 'new-name.old.test'")
    for name in ("moving", "moved"):
        assert value(owner, "SELECT wants_credential FROM login_state(%s)", f"{name}@lab.test") is True
        owner.execute("SELECT record_login(%s, 'again')", (f"{name}@lab.test",))
    assert owner.execute("SELECT FROM failed").fetchall() == []
    assert owner.execute("SELECT task_name FROM queue.procrastinate_jobs ORDER BY 1").fetchall()[0] == ("migrate",)


@pytest.mark.parametrize(
    "change", ["smtp_host = 'other.test'", "submission_port = 587, submission_tls = 'starttls'", "imap_port = 993"]
)
def test_what_no_password_is_sent_to_may_change(owner: Connection, change: str) -> None:
    moving_and_moved(owner)
    owner.execute(f"UPDATE domain SET {change}".encode())
    assert value(owner, "SELECT count(*) FROM mailbox WHERE sealed_credential IS NOT NULL") == 2
    assert value(owner, "SELECT sealed_copy_login FROM domain") == b"sealed"


def test_where_nothing_is_sealed_nothing_is_erased(owner: Connection) -> None:
    owner.execute("SELECT expect('expected@lab.test')")
    owner.execute("UPDATE domain SET imap_host = 'other.test'")
    assert owner.execute("SELECT FROM events WHERE event = 'credentials erased'").fetchall() == []


def test_an_attempt_that_was_under_way_does_not_end_the_wait(owner: Connection) -> None:
    moving, _ = moving_and_moved(owner)
    owner.execute("UPDATE domain SET imap_host = 'other.test'")
    owner.execute("DELETE FROM queue.procrastinate_jobs")
    owner.execute("SELECT attempt_failed(%s, 'session lost')", (moving,))
    assert owner.execute("SELECT needs_credential, next_try FROM mailbox WHERE id = %s", (moving,)).fetchall() == [
        (True, None)
    ]
    assert owner.execute("SELECT FROM queue.procrastinate_jobs").fetchall() == []


# Two at once ----------------------------------------------------------------------------


def is_blocked(owner: Connection, by: Connection) -> bool:
    return bool(
        value(owner, "SELECT count(*) FROM pg_stat_activity WHERE %s = ANY(pg_blocking_pids(pid))", by.info.backend_pid)
    )


@pytest.mark.parametrize(
    ("act", "outcome"),
    [
        ("SELECT bascule.portal_request('token', 'new@lab.test', 's', '', '', 'en')", "is closed: nobody can be moved"),
        ("SELECT bascule.record_login('new@lab.test', 's')", None),
        ("SELECT bascule.record_login('waits@lab.test', 's')", None),
        ("SELECT bascule.return_mailbox('moved@lab.test', 'why')", "its legacy server is not used any more"),
        ("SELECT bascule.expect('new@lab.test')", "is closed: nobody can be moved"),
    ],
)
def test_who_comes_while_a_domain_is_closed_comes_too_late(owner: Connection, act: str, outcome: str | None) -> None:
    waits = value(owner, "SELECT request_migration('waits@lab.test', 'portal', 'sealed')")
    owner.execute("SELECT attempt_failed(%s, 'refused', true)", (waits,))
    put_local(owner, "moved@lab.test")
    with psycopg.connect(owner.info.dsn) as closing, psycopg.connect(owner.info.dsn, autocommit=True) as coming:
        closing.execute("SELECT bascule.close_domain('lab.test', true, 'x')")
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(coming.execute, act.encode())
            eventually("it waits for the close", lambda: is_blocked(owner, closing), 10)
            closing.commit()
            if outcome is None:
                asked.result(10)
            else:
                with pytest.raises(psycopg.Error, match=outcome):
                    asked.result(10)
    assert value(owner, "SELECT count(*) FROM mailbox WHERE sealed_credential IS NOT NULL") == 0
    assert value(owner, "SELECT count(*) FROM mailbox WHERE state NOT IN ('legacy', 'local')") == 0
    assert value(owner, "SELECT count(*) FROM mailbox WHERE return_requested_at IS NOT NULL") == 0
    assert value(owner, "SELECT requeue_unattended()") == 0


@pytest.mark.parametrize(
    "act",
    [
        "SELECT bascule.portal_request('token', 'alice@lab.test', 's', 'A', 'Q', 'en')",
        "SELECT bascule.record_login('alice@lab.test', 's')",
        "SELECT bascule.expect('alice@lab.test')",
        "SELECT bascule.place('alice@lab.test', 'local')",
    ],
)
def test_two_of_the_same_at_the_same_moment_are_as_one(owner: Connection, act: str) -> None:
    """Telephone and computer log in together, the button is pressed twice."""
    rounds, pairs = 20, 4
    with ExitStack() as stack:
        comers = [stack.enter_context(psycopg.connect(owner.info.dsn, autocommit=True)) for _ in range(pairs)]
        pool = stack.enter_context(ThreadPoolExecutor(pairs))
        for _ in range(rounds):
            owner.execute("DELETE FROM mailbox; DELETE FROM queue.procrastinate_jobs")
            together = Barrier(pairs)

            def come(comer: Connection, together: Barrier = together) -> None:
                together.wait(10)
                comer.execute(act.encode())

            for asked in [pool.submit(come, comer) for comer in comers]:
                asked.result(30)
            assert value(owner, "SELECT count(*) FROM mailbox") == 1
            assert value(owner, "SELECT count(*) FROM queue.procrastinate_jobs") <= 1


def test_the_second_of_two_requests_changes_nothing(owner: Connection) -> None:
    owner.execute("SELECT expect('alice@lab.test')")
    ask = "SELECT bascule.portal_request('token', 'alice@lab.test', %s, '', '', 'en')"
    with psycopg.connect(owner.info.dsn) as first, psycopg.connect(owner.info.dsn, autocommit=True) as second:
        first.execute(ask.encode(), (b"first",))
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(second.execute, ask.encode(), (b"second",))
            eventually("it waits for the first", lambda: is_blocked(owner, first), 10)
            first.commit()
            asked.result(10)
    assert value(owner, "SELECT sealed_credential FROM mailbox") == b"first"


def test_a_sighting_and_a_close_do_not_deadlock(owner: Connection) -> None:
    put_local(owner, "moved@lab.test")
    value(owner, "SELECT request_migration('alice@lab.test', 'portal', 'sealed')")
    with psycopg.connect(owner.info.dsn) as seeing, psycopg.connect(owner.info.dsn) as closing:
        seeing.execute("SELECT FROM bascule.mailbox WHERE local_part = 'alice' FOR SHARE")
        with ThreadPoolExecutor(1) as pool:
            closed = pool.submit(closing.execute, b"SELECT bascule.close_domain('lab.test', true, 'x')")
            eventually("the close waits for the mailbox", lambda: is_blocked(owner, seeing), 10)
            seeing.execute("SELECT bascule.record_sighting('alice@lab.test', 1)")
            seeing.commit()
            closed.result(10)
        closing.commit()


# Stopping, and what is said ---------------------------------------------------------------


def test_what_is_given_up_stops(owner: Connection) -> None:
    mailbox = value(owner, "SELECT request_migration('alice@lab.test', 'portal', 'sealed')")
    owner.execute("SELECT begin_copy(%s)", (mailbox,))
    owner.execute("SELECT attempt_failed(%s, 'away')", (mailbox,))
    assert value(owner, "SELECT report_progress(%s, 1, 10, 100)", mailbox) is True
    owner.execute("SELECT give_up('alice@lab.test', 'not now')")
    assert value(owner, "SELECT report_progress(%s, 2, 10, 200)", mailbox) is False
    assert owner.execute("SELECT FROM failed").fetchall() == []


def test_words_of_a_server_are_fit_for_a_terminal(owner: Connection) -> None:
    mailbox = value(owner, "SELECT request_migration('alice@lab.test', 'portal', 'sealed')")
    owner.execute("SELECT begin_copy(%s)", (mailbox,))
    owner.execute("SELECT attempt_failed(%s, %s)", (mailbox, "it says \x1b]0;x\x07 and \x9b1m" + "x" * 10_000))
    problem = value(owner, "SELECT problem FROM failed")
    assert problem.startswith("it says \ufffd]0;x\ufffd and \ufffd1mxxx")
    assert len(problem) == 2000
    assert value(owner, "SELECT max(length(reason)) FROM events") == 2000


def test_only_what_passes_by_itself_is_said_to(owner: Connection) -> None:
    mailbox = value(owner, "SELECT request_migration('alice@lab.test', 'portal', 'sealed')")
    failed = "SELECT attempt_failed(%s, 'why', false, '0', '', %s)"

    def advice() -> str:
        return str(value(owner, "SELECT advice FROM failed"))

    owner.execute(failed.encode(), (mailbox, True))
    assert advice().startswith("Nothing: it is tried again")
    owner.execute(failed.encode(), (mailbox, False))
    assert "See the log of the worker" in advice()
    owner.execute("UPDATE mailbox SET attempts = 8")
    owner.execute(failed.encode(), (mailbox, True))
    assert advice().startswith("It lasts: bascule check lab.test says what is wrong there")
    owner.execute("UPDATE mailbox SET state = 'copying'")
    owner.execute("SELECT begin_cutover(%s)", (mailbox,))
    owner.execute("SELECT undo_cutover(%s, 'over its time')", (mailbox,))
    assert "cutover_budget" in advice()


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
        ("policy_daemon", "mx", True),
        ("policy_daemon", "mx1", True),
        ("policy_daemon", "mx2", False),
        ("authenticator", "store", True),
    ]
    owner.execute("SELECT sign_off('mx', 'policy_daemon'), sign_off('store', 'authenticator')")
    assert owner.execute("SELECT name, alive FROM parts ORDER BY name").fetchall() == [
        ("mx1", True),
        ("mx2", False),
        ("store", False),
    ]


# As the workers call it --------------------------------------------------------------------


def test_a_copy_stops_with_its_worker_and_a_cutover_does_not(postgres: Postgres, owner: Connection) -> None:
    mailbox = int(value(owner, "SELECT request_migration('alice@lab.test', 'portal', 'sealed')"))
    stopping = Event()
    with connect(postgres.dsn("bascule_worker")) as connection:
        acts = Acts(connection, stopping)
        acts.begin_copy(mailbox)
        assert acts.report_progress(mailbox, 1, 10, 100) is True
        stopping.set()
        assert acts.report_progress(mailbox, 2, 10, 200) is False
        acts.begin_cutover(mailbox)
        assert acts.report_progress(mailbox, 10, 10, 1000) is True
        owner.execute("DELETE FROM mailbox")
        assert acts.report_progress(mailbox, 10, 10, 1000) is False


def test_what_a_server_says_can_always_be_recorded(postgres: Postgres, owner: Connection) -> None:
    """A NUL, or bytes that are no text: the failure is kept, and the next attempt queued for later."""
    mailbox = int(value(owner, "SELECT request_migration('alice@lab.test', 'portal', 'sealed')"))
    said = "it says \0 and " + b"\xff".decode(errors="surrogateescape")
    with connect(postgres.dsn("bascule_worker")) as connection:
        acts = Acts(connection)
        acts.attempt_failed(mailbox, said, advice=said)
        acts.set_unreadable(mailbox, [{"folder": "INBOX", "uidvalidity": 1, "uid": 2, "reason": said}], complete=True)
        names = [b"Gr\xfc", b"Gr\xe4", b"Gr\0"]
        acts.set_unreadable_folders(mailbox, {name.decode(errors="surrogateescape"): said for name in names})
        acts.undo_cutover(mailbox, said)
    assert value(owner, "SELECT last_error FROM mailbox") == "it says \\x00 and \\udcff"
    assert value(owner, "SELECT next_try > now() FROM mailbox")
    reasons = owner.execute("SELECT reason FROM unreadable").fetchall()
    assert reasons == [("it says \\x00 and \\udcff",)] * 4
    assert value(owner, "SELECT waive_messages('alice@lab.test', 'old', 'Gr\\udce4')") == 1
    with connect(postgres.dsn("bascule_worker")) as connection:
        assert Acts(connection).waived_folders(mailbox) == {recorded(b"Gr\xe4".decode(errors="surrogateescape"))}


def test_one_worker_writes_to_a_user(postgres: Postgres, owner: Connection) -> None:
    mailbox = int(value(owner, "SELECT request_migration('alice@lab.test', 'portal', 'sealed')"))
    owner.execute("SELECT attempt_failed(%s, 'refused', true)", (mailbox,))
    dsn = postgres.dsn("bascule_worker")
    with connect(dsn) as first, connect(dsn) as second:
        one, other = Acts(first), Acts(second)
        assert one.waiting_for_password("local") == other.waiting_for_password("local") == [mailbox]
        with one.only_writer(mailbox) as mine, other.only_writer(mailbox) as too:
            assert (mine, too) == (True, False)
            # Nobody who comes with the password waits meanwhile.
            owner.execute("SET statement_timeout = '5s'")
            owner.execute("SELECT trouble_told_at FROM mailbox FOR UPDATE")
            owner.execute("RESET statement_timeout")
            assert one.waits_for_password(mailbox)
            one.trouble_told(mailbox)
        with other.only_writer(mailbox) as mine:
            assert mine
            assert not other.waits_for_password(mailbox)


def test_a_copy_login_that_is_given_anew_lets_the_sweeps_go_on(owner: Connection) -> None:
    moved = put_local(owner, "moved@lab.test")
    owner.execute("UPDATE domain SET copy_login = 'master', sealed_copy_login = 'sealed'")
    owner.execute("UPDATE domain SET imap_host = 'other.test'")
    needs = "SELECT needs_credential FROM mailbox WHERE id = %s"
    assert value(owner, needs, moved) is True
    owner.execute("UPDATE domain SET copy_login = 'master', sealed_copy_login = 'anew'")
    assert value(owner, needs, moved) is False
    owner.execute("UPDATE domain SET copy_login = 'user', sealed_copy_login = NULL")
    assert value(owner, needs, moved) is True


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
