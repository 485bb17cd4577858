"""Moves on an administrator's word, their hours, brought hashes, first passwords, names at the legacy server."""

from __future__ import annotations

from collections.abc import Callable

import psycopg
import pytest

from bascule.database import Connection, value
from bascule.lab.postgres import Postgres

Acknowledge = Callable[[int, int], None]

HASH, OTHER, OWN = "{SSHA}former", "{SHA512-CRYPT}$6$x", "{ARGON2ID}$argon2id$own"


@pytest.fixture(autouse=True)
def _copied_by_a_master_user(owner: Connection) -> None:
    owner.execute("UPDATE domain SET copy_login = 'master', sealed_copy_login = 'sealed'")


def move(owner: Connection, name: str, *, flip_at: str | None = None, without_password: bool = False) -> int:
    return int(value(owner, "SELECT move_mailbox(%s, %s, %s)", f"{name}@lab.test", flip_at, without_password))


def row(owner: Connection, name: str, columns: str) -> tuple[object, ...]:
    found = owner.execute(f"SELECT {columns} FROM mailbox WHERE full_address = %s".encode(), (f"{name}@lab.test",))
    one = found.fetchone()
    assert one is not None
    return one


def bring(owner: Connection, **hashes: str) -> list[str]:
    rows = owner.execute(
        "SELECT outcome FROM import_passwords('lab.test', %s, %s)",
        ([f"{name}@lab.test" for name in hashes], list(hashes.values())),
    ).fetchall()
    return [outcome for (outcome,) in rows]


def flip(owner: Connection, acknowledge: Acknowledge, mailbox: int, hashed: str | None) -> None:
    owner.execute("SELECT begin_copy(%s)", (mailbox,))
    epoch = value(owner, "SELECT begin_cutover(%s)", mailbox)
    acknowledge(mailbox, epoch)
    owner.execute("SELECT finish_cutover(%s, %s, %s, '{\"folders\": []}')", (mailbox, epoch, hashed))


def tasks(owner: Connection) -> list[tuple[object, ...]]:
    return owner.execute(
        "SELECT task_name, scheduled_at > now() FROM queue.procrastinate_jobs WHERE status = 'todo'"
    ).fetchall()


def test_a_mailbox_moves_on_an_administrators_word(owner: Connection) -> None:
    move(owner, "anna")
    assert row(owner, "anna", "state, proof, trigger, sealed_credential, needs_credential, flip_at") == (
        "requested", "word", "administrator", None, False, None,
    )  # fmt: skip
    assert tasks(owner) == [("migrate", None)]
    reason = value(owner, "SELECT reason FROM journal WHERE address = 'anna@lab.test'")
    assert reason == "requested on an administrator's word; flips as soon as it can"


@pytest.mark.parametrize(
    ("act", "code", "words"),
    [
        ("SELECT move_mailbox('here@lab.test')", "BA002", "has already moved"),
        ("SELECT move_mailbox('flipping@lab.test')", "BA002", "is already on the move"),
        ("SELECT move_mailbox('info@lab.test')", "BA005", "is an alias"),
        ("SELECT move_mailbox('x@elsewhere.test')", "BA001", "not an address of a domain known here"),
        (
            "SELECT import_passwords('lab.test', '{x@elsewhere.test}', '{\"{SSHA}x\"}')",
            "BA001",
            "not an address of a domain",
        ),
        ("SELECT import_passwords('lab.test', '{info@lab.test}', '{\"{SSHA}x\"}')", "BA005", "is an alias"),
        ("SELECT import_passwords('lab.test', '{flipping@lab.test}', '{\"{SSHA}x\"}')", "BA002", "over in a moment"),
        ("SELECT import_passwords('lab.test', '{x@lab.test}', '{seKret}')", "BA002", "no hash in a scheme's form"),
        ("SELECT import_passwords('lab.test', '{x@lab.test}', '{NULL}')", "BA002", "no hash in a scheme's form"),
        ("SELECT import_passwords('lab.test', '{x@lab.test,y@lab.test}', '{\"{SSHA}x\"}')", "BA002", "no hash"),
        ("SELECT import_passwords('other.test', '{}', '{}')", "BA003", "no domain other.test"),
        ("SELECT set_login_name('x@lab.test', E'a\\tb')", "BA002", "control character"),
        ("SELECT set_login_name('info@lab.test', 'x')", "BA005", "is an alias"),
        ("SELECT set_login_name('x@lab.test', repeat('x', 256))", "BA002", "too long"),
    ],
)
def test_what_is_not_possible_is_refused_and_changes_nothing(
    owner: Connection, acknowledge: Acknowledge, act: str, code: str, words: str
) -> None:
    flip(owner, acknowledge, move(owner, "here", without_password=True), OWN)
    flipping = move(owner, "flipping")
    owner.execute("SELECT begin_copy(%s)", (flipping,))
    owner.execute("SELECT begin_cutover(%s)", (flipping,))
    owner.execute("SELECT assign_alias('info@lab.test', 'here@lab.test')")
    everything = "SELECT m::text FROM mailbox AS m UNION ALL SELECT j::text FROM journal AS j ORDER BY 1"
    before = owner.execute(everything.encode()).fetchall()
    with pytest.raises(psycopg.Error, match=words) as refused:
        owner.execute(act.encode())
    assert refused.value.sqlstate == code
    assert "seKret" not in str(refused.value)
    assert owner.execute(everything.encode()).fetchall() == before


def test_without_a_copy_login_or_an_active_domain_there_is_no_word(owner: Connection) -> None:
    owner.execute("UPDATE domain SET copy_login = 'user', sealed_copy_login = NULL")
    with pytest.raises(psycopg.Error, match="workers log in at the legacy server as each user"):
        move(owner, "anna")
    owner.execute("UPDATE domain SET copy_login = 'master', sealed_copy_login = 'sealed'")
    owner.execute("SELECT close_domain('lab.test')")
    with pytest.raises(psycopg.Error, match="is closed: nobody can be moved"):
        move(owner, "anna")
    with pytest.raises(psycopg.Error, match=r"is closed, and anna@lab\.test has not moved"):
        bring(owner, anna=HASH)


def test_a_mailbox_waits_for_its_hour_and_is_kept_fresh(owner: Connection) -> None:
    mailbox = move(owner, "anna", flip_at="infinity")
    owner.execute("DELETE FROM queue.procrastinate_jobs")
    owner.execute("SELECT begin_copy(%s)", (mailbox,))
    assert value(owner, "SELECT stage(%s)", mailbox)
    assert tasks(owner) == [("migrate", True)]
    assert row(owner, "anna", "state, staged_at IS NOT NULL, next_try < now() + interval '2 hours'") == (
        "copying",
        True,
        True,
    )
    # An hour is set, soon: it is looked at again then.
    move(owner, "anna", flip_at=None)
    assert tasks(owner) == [("migrate", None)]
    assert not value(owner, "SELECT stage(%s)", mailbox), "it flips now"
    owner.execute("UPDATE mailbox SET flip_at = now() + interval '10 minutes'")
    assert value(owner, "SELECT stage(%s)", mailbox)
    assert row(owner, "anna", "next_try = flip_at") == (True,)
    events = owner.execute("SELECT event FROM journal WHERE event = 'copied ahead'").fetchall()
    assert len(events) == 1


def test_who_has_no_hour_does_not_wait(owner: Connection) -> None:
    mailbox = move(owner, "anna")
    owner.execute("SELECT begin_copy(%s)", (mailbox,))
    assert not value(owner, "SELECT stage(%s)", mailbox)
    assert row(owner, "anna", "staged_at") == (None,)


def test_giving_up_forgets_the_word_and_keeps_the_hash(owner: Connection) -> None:
    move(owner, "anna", flip_at="infinity", without_password=True)
    bring(owner, anna=HASH)
    owner.execute("SELECT give_up('anna@lab.test', 'x')")
    assert row(owner, "anna", "proof, flip_at, without_password, imported_hash") == ("password", None, False, HASH)


def test_a_move_that_waits_for_a_password_goes_on_by_word(owner: Connection) -> None:
    mailbox = value(owner, "SELECT request_migration('anna@lab.test', 'portal', 'sealed')")
    owner.execute("SELECT begin_copy(%s)", (mailbox,))
    owner.execute("SELECT attempt_failed(%s, 'refused', true)", (mailbox,))
    owner.execute("DELETE FROM queue.procrastinate_jobs")
    move(owner, "anna")
    assert row(owner, "anna", "state, needs_credential, sealed_credential, last_error") == (
        "copying",
        False,
        None,
        None,
    )
    assert tasks(owner) == [("migrate", None)]


def test_a_password_that_is_given_meanwhile_is_taken_and_wins(owner: Connection, acknowledge: Acknowledge) -> None:
    mailbox = move(owner, "anna")
    assert bring(owner, anna=HASH) == ["kept"]
    assert value(owner, "SELECT needs_credential FROM login_mailbox WHERE local_part = 'anna'")
    owner.execute("SELECT record_login('anna@lab.test', 'sealed')")
    assert row(owner, "anna", "sealed_credential") == (b"sealed",)
    assert not value(owner, "SELECT needs_credential FROM login_mailbox WHERE local_part = 'anna'")
    assert value(owner, "SELECT password FROM mailboxes") == "proved"
    assert bring(owner, anna=OTHER) == ["proved"]
    flip(owner, acknowledge, mailbox, OWN)
    assert row(owner, "anna", "password_hash, imported_hash") == (OWN, None)
    assert bring(owner, anna=OTHER) == ["own"]
    assert row(owner, "anna", "password_hash, imported_hash") == (OWN, None)


def test_who_asks_at_the_page_gives_the_password_too(owner: Connection) -> None:
    move(owner, "anna")
    owner.execute("SELECT portal_request('token', 'anna@lab.test', 'sealed', '', '', 'en')")
    assert row(owner, "anna", "sealed_credential, proof") == (b"sealed", "word")


def test_a_brought_hash_is_in_force_until_a_login_renews_it(owner: Connection, acknowledge: Acknowledge) -> None:
    mailbox = move(owner, "anna")
    bring(owner, anna=HASH)
    flip(owner, acknowledge, mailbox, None)
    view = "SELECT password_hash, imported FROM login_mailbox WHERE local_part = 'anna'"
    assert owner.execute(view.encode()).fetchone() == (HASH, True)
    assert bring(owner, anna=OTHER) == ["in force"]
    assert owner.execute(view.encode()).fetchone() == (OTHER, True)
    for former, hashed in ((HASH, OWN), (OTHER, "{SSHA}weak"), (OTHER, "{ARGON2ID}nonsense")):
        assert not value(owner, "SELECT renew_password('anna@lab.test', %s, %s)", former, hashed)
    assert value(owner, "SELECT renew_password('anna@lab.test', %s, %s)", OTHER, OWN)
    assert owner.execute(view.encode()).fetchone() == (OWN, False)
    assert not value(owner, "SELECT renew_password('anna@lab.test', %s, %s)", OWN, OWN + "2")
    said = str(owner.execute("SELECT event, reason FROM journal").fetchall())
    assert "{SHA512-CRYPT} to {ARGON2ID}" in said
    assert "$6$x" not in said


def test_nothing_flips_without_a_password_unless_it_is_wanted(owner: Connection, acknowledge: Acknowledge) -> None:
    mailbox = move(owner, "anna")
    with pytest.raises(psycopg.Error, match="nobody could log in"):
        flip(owner, acknowledge, mailbox, None)
    owner.execute("SELECT undo_cutover(%s, 'x')", (mailbox,))
    move(owner, "anna", without_password=True)
    flip(owner, acknowledge, mailbox, None)
    why = "SELECT count(*) FROM closing_obstacles WHERE why LIKE '%%no password is known here%%'"
    assert value(owner, why) == 1
    for hashed in ("{SSHA}x", "{ARGON2ID}x"):
        assert not value(owner, "SELECT take_first_password('anna@lab.test', %s)", hashed)
    assert value(owner, "SELECT take_first_password('anna@lab.test', %s)", OWN)
    assert not value(owner, "SELECT take_first_password('anna@lab.test', %s)", OWN + "2")
    assert row(owner, "anna", "password_hash, without_password") == (OWN, False)
    assert value(owner, why) == 0


def test_who_moved_without_a_password_can_be_brought_one_after_the_close(
    owner: Connection, acknowledge: Acknowledge
) -> None:
    flip(owner, acknowledge, move(owner, "anna", without_password=True), None)
    owner.execute("SELECT close_domain('lab.test', true, 'x')")
    assert not value(owner, "SELECT take_first_password('anna@lab.test', %s)", OWN), "the legacy server is not asked"
    assert bring(owner, anna=HASH) == ["in force"]


def test_a_return_forgets_the_hash(owner: Connection, acknowledge: Acknowledge) -> None:
    mailbox = move(owner, "anna")
    bring(owner, anna=HASH)
    flip(owner, acknowledge, mailbox, None)
    owner.execute("SELECT return_mailbox('anna@lab.test', 'x')")
    epoch = value(owner, "SELECT begin_return(%s)", mailbox)
    acknowledge(mailbox, epoch)
    owner.execute("SELECT finish_return(%s, %s)", (mailbox, epoch))
    assert row(owner, "anna", "state, password_hash, imported_hash") == ("legacy", None, None)


def test_all_hashes_or_none(owner: Connection) -> None:
    with pytest.raises(psycopg.Error, match="no hash in a scheme's form"):
        bring(owner, anna=HASH, bert="plain")
    assert owner.execute("SELECT FROM mailbox").fetchall() == []


def test_a_brought_hash_wakes_a_move_that_waits_for_it(owner: Connection) -> None:
    mailbox = move(owner, "anna")
    owner.execute("SELECT begin_copy(%s)", (mailbox,))
    owner.execute("SELECT attempt_failed(%s, 'nobody could log in', false, interval '1 hour')", (mailbox,))
    bring(owner, anna=HASH)
    assert value(owner, "SELECT bool_and(scheduled_at IS NULL) FROM queue.procrastinate_jobs WHERE status = 'todo'")


def test_another_legacy_server_erases_what_was_proved_and_a_word_waits_for_nothing(owner: Connection) -> None:
    move(owner, "anna")
    owner.execute("SELECT record_login('anna@lab.test', 'sealed')")
    owner.execute("UPDATE domain SET imap_host = 'another.test'")
    assert row(owner, "anna", "sealed_credential, needs_credential, state") == (None, False, "requested")


def test_a_name_at_the_legacy_server(owner: Connection) -> None:
    owner.execute("SELECT set_login_name('anna@lab.test', 'OLD\\anna')")
    assert value(owner, "SELECT legacy_login FROM login_mailbox WHERE local_part = 'anna'") == "OLD\\anna"
    assert value(owner, "SELECT portal_login_name('token', 'Anna@lab.test')") == "OLD\\anna"
    assert value(owner, "SELECT portal_login_name('token', 'bert@lab.test')") is None
    with pytest.raises(psycopg.Error, match="this link is not known"):
        owner.execute("SELECT portal_login_name('wrong', 'anna@lab.test')")
    owner.execute("SELECT set_login_name('anna@lab.test', '')")
    assert value(owner, "SELECT count(*) FROM login_mailbox") == 0


def test_authenticators_hear_of_each_change(owner: Connection, acknowledge: Acknowledge, postgres: Postgres) -> None:
    with psycopg.connect(postgres.dsn("postgres"), autocommit=True) as other:
        other.execute("LISTEN bascule_mailbox")

        def is_told() -> bool:
            return bool(list(other.notifies(timeout=0.2)))

        mailbox = move(owner, "anna")
        assert is_told()
        for act in ("record_login('anna@lab.test', 'sealed')", "set_login_name('anna@lab.test', 'x')"):
            owner.execute(f"SELECT {act}".encode())
            assert is_told(), act
        owner.execute("UPDATE mailbox SET sealed_credential = NULL")
        bring(owner, anna=HASH)
        flip(owner, acknowledge, mailbox, None)
        assert is_told()
        bring(owner, anna=OTHER)
        assert is_told()
        owner.execute("SELECT renew_password('anna@lab.test', %s, %s)", (OTHER, OWN))
        assert is_told()
