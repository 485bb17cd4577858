"""The state machine of a mailbox, enforced in the database; what each change sets off."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bascule.database import Connection

STATES = ("legacy", "requested", "copying", "cutover", "local", "returning")
LEGAL = {
    ("legacy", "requested"),
    ("requested", "copying"),
    ("requested", "legacy"),
    ("copying", "cutover"),
    ("copying", "legacy"),
    ("cutover", "copying"),
    ("cutover", "local"),
    ("local", "returning"),
    ("returning", "local"),
    ("returning", "legacy"),
}
#: The shortest way from legacy to each state.
WAY = {
    "legacy": (),
    "requested": ("requested",),
    "copying": ("requested", "copying"),
    "cutover": ("requested", "copying", "cutover"),
    "local": ("requested", "copying", "cutover", "local"),
    "returning": ("requested", "copying", "cutover", "local", "returning"),
}


def one(connection: Connection, query: str, *parameters: object) -> Any:
    row = connection.execute(query.encode(), parameters).fetchone()
    assert row is not None
    return row[0]


def put(connection: Connection, state: str) -> None:
    """Change the state with the columns that go with it."""
    connection.execute(
        "UPDATE mailbox SET state = %s, sealed_credential = 'x', password_hash = '{ARGON2ID}x', "
        "cutover_deadline = CASE WHEN %s IN ('cutover', 'returning') THEN now() + interval '1 minute' END",
        (state, state),
    )


def new_mailbox(connection: Connection, name: str = "alice") -> int:
    return int(
        one(
            connection,
            "INSERT INTO mailbox (domain_id, local_part, store) SELECT id, %s, 'local' FROM domain RETURNING id",
            name,
        )
    )


@pytest.mark.parametrize(("before", "after"), list(itertools.permutations(STATES, 2)))
def test_only_legal_changes_are_made(owner: Connection, before: str, after: str) -> None:
    new_mailbox(owner)
    for state in WAY[before]:
        put(owner, state)
    events = one(owner, "SELECT count(*) FROM journal")
    if (before, after) in LEGAL:
        put(owner, after)
        assert one(owner, "SELECT state FROM mailbox") == after
        assert (
            one(owner, "SELECT from_state || '>' || to_state FROM journal ORDER BY id DESC LIMIT 1")
            == f"{before}>{after}"
        )
        return
    with pytest.raises(psycopg.Error, match=f"cannot go from {before} to {after}") as refused:
        put(owner, after)
    assert refused.value.sqlstate == "BA002"
    assert one(owner, "SELECT state FROM mailbox") == before
    assert one(owner, "SELECT count(*) FROM journal") == events


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(STATES), max_size=12))
def test_any_walk_is_journalled_step_by_step(owner: Connection, walk: list[str]) -> None:
    owner.execute("DELETE FROM mailbox")
    mailbox = new_mailbox(owner)
    first = one(owner, "SELECT coalesce(max(id), 0) FROM journal")
    state, steps = "legacy", []
    for wanted in walk:
        try:
            put(owner, wanted)
        except psycopg.Error:
            assert (state, wanted) not in LEGAL
            continue
        if wanted != state:
            assert (state, wanted) in LEGAL
            steps.append((state, wanted))
        state = wanted
    rows = owner.execute("SELECT from_state, to_state FROM journal WHERE id > %s ORDER BY id", (first,)).fetchall()
    assert rows == steps
    assert one(owner, "SELECT epoch FROM mailbox WHERE id = %s", mailbox) == len(steps)


def test_a_mailbox_begins_at_legacy(owner: Connection) -> None:
    with pytest.raises(psycopg.Error, match="begins in state legacy"):
        owner.execute(
            "INSERT INTO mailbox (domain_id, local_part, store, state, sealed_credential) "
            "SELECT id, 'x', 'local', 'requested', 'x' FROM domain"
        )


def test_the_journal_is_append_only(owner: Connection) -> None:
    for act in ("UPDATE journal SET reason = 'other'", "DELETE FROM journal", "TRUNCATE journal"):
        with pytest.raises(psycopg.Error, match="append-only"):
            owner.execute(act.encode())


def test_changes_are_notified_and_queued(owner: Connection) -> None:
    owner.execute("LISTEN bascule_mailbox")
    mailbox = one(owner, "SELECT request_migration('Alice@Lab.Test', 'portal', 'sealed', 'A', 'Q')")
    notified = list(owner.notifies(timeout=5, stop_after=1))
    assert [each.payload for each in notified] == ["alice@lab.test"]
    jobs = owner.execute("SELECT queue_name, task_name, lock, args FROM queue.procrastinate_jobs").fetchall()
    assert jobs == [("local", "migrate", f"mailbox:{mailbox}", {"mailbox_id": mailbox})]


def test_the_flip_needs_the_epoch_and_the_time(owner: Connection, acknowledge: Callable[[int, int], None]) -> None:
    mailbox = one(owner, "SELECT request_migration('alice@lab.test', 'portal', 'sealed')")
    owner.execute("SELECT begin_copy(%s)", (mailbox,))
    epoch = one(owner, "SELECT begin_cutover(%s)", mailbox)
    flip = 'SELECT finish_cutover(%s, %s, \'{ARGON2ID}x\', \'{"separator": "/", "prefix": "", "folders": []}\')'
    with pytest.raises(psycopg.Error, match="over its time or was undone"):
        owner.execute(flip.encode(), (mailbox, epoch - 1))
    owner.execute("UPDATE mailbox SET cutover_deadline = now() - interval '1 second'")
    with pytest.raises(psycopg.Error, match="over its time or was undone"):
        owner.execute(flip.encode(), (mailbox, epoch))
    owner.execute("SELECT undo_overdue_cutovers()")
    state, error = owner.execute("SELECT state, last_error FROM mailbox").fetchone() or ("", "")
    assert (state, error) == ("copying", "the cutover was not done within its time")
    epoch = one(owner, "SELECT begin_cutover(%s)", mailbox)
    acknowledge(mailbox, epoch)
    owner.execute(flip.encode(), (mailbox, epoch))
    assert one(owner, "SELECT state FROM mailbox") == "local"
    assert one(owner, "SELECT count(*) FROM queue.procrastinate_jobs WHERE task_name = 'sweep'") == 1


def test_attempts_are_tried_again_later_and_later(owner: Connection) -> None:
    mailbox = one(owner, "SELECT request_migration('alice@lab.test', 'portal', 'sealed')")
    waits = []
    for _ in range(4):
        owner.execute("SELECT begin_copy(%s)", (mailbox,))
        owner.execute("SELECT attempt_failed(%s, 'the legacy server is away')", (mailbox,))
        waits.append(float(one(owner, "SELECT extract(epoch FROM next_try - last_error_at) FROM mailbox")))
    for wait, middle in zip(waits, (5, 10, 20, 40), strict=True):
        assert 0.8 * middle - 0.1 <= wait <= 1.2 * middle + 0.1
    assert one(owner, "SELECT problem FROM mailboxes") == "the legacy server is away"
    assert one(owner, "SELECT count(*) FROM queue.procrastinate_jobs") == 1


def test_unattended_mailboxes_are_queued_again(owner: Connection) -> None:
    one(owner, "SELECT request_migration('alice@lab.test', 'portal', 'sealed')")
    assert one(owner, "SELECT requeue_unattended()") == 0
    owner.execute("DELETE FROM queue.procrastinate_jobs")
    assert one(owner, "SELECT requeue_unattended()") == 1
    assert one(owner, "SELECT count(*) FROM queue.procrastinate_jobs") == 1


def test_no_two_attempts_wait_equally_long(owner: Connection) -> None:
    """Whatever stopped many mailboxes at once does not start them all at once again."""
    waits = owner.execute("SELECT extract(epoch FROM pause_after(20)) FROM generate_series(1, 100)").fetchall()
    assert len(set(waits)) > 90
    assert 0.8 * 900 <= min(waits)[0] < 0.9 * 900
    assert 1.1 * 900 < max(waits)[0] <= 1.2 * 900


def test_an_attempt_at_a_return_counts_once(owner: Connection) -> None:
    mailbox = new_mailbox(owner)
    for state in WAY["local"]:
        put(owner, state)
    owner.execute("SELECT return_mailbox('alice@lab.test', 'why')")
    attempts = []
    for _ in range(3):
        owner.execute("SELECT begin_return(%s)", (mailbox,))
        owner.execute("SELECT undo_return(%s, 'not clean')", (mailbox,))
        owner.execute("SELECT attempt_failed(%s, 'not clean')", (mailbox,))
        attempts.append(one(owner, "SELECT attempts FROM mailbox"))
    owner.execute("SELECT begin_return(%s)", (mailbox,))
    owner.execute("UPDATE mailbox SET cutover_deadline = now()")
    owner.execute("SELECT undo_overdue_cutovers()")  # its worker died: nobody else counts
    attempts.append(one(owner, "SELECT attempts FROM mailbox"))
    assert attempts == [1, 2, 3, 4]
