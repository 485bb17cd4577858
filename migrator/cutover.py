"""From a request to the flip: copy until little changes, hold the mail, copy the rest, verify, flip."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import psycopg

from bascule import log
from bascule.credential import Password, Unsealer
from bascule.database import Connection, translated, value
from bascule.errors import BasculeError
from bascule.legacy import Trust, authenticate
from bascule.migrator import metrics
from bascule.migrator.account import Account, waived_of
from bascule.migrator.copying import Copy, Pass, Progress
from bascule.migrator.pop3 import uidls
from bascule.migrator.sessions import Sessions
from bascule.migrator.sieve import read_scripts, write_scripts
from bascule.migrator.storage import Storage
from bascule.migrator.verification import NotEqual, Verification, verify

SMALL_PASS = 20  # changes; the final pass, while mail is held, will be about as large
MAX_PASSES = 20  # a mailbox that never comes to rest is cut over after so many
PROGRESS_INTERVAL = 0.5  # seconds between reports to the database
MARGIN = 5.0  # seconds of the budget that must be left for verification and flip
FINAL_PASSES = 3  # tries to find both sides equal, for a client may still be at work there


class NotAcknowledged(BasculeError):
    """A live node has not put the cutover into force in time; the cutover is undone."""


class Paused(BasculeError):
    """An administrator has paused the mailbox or its domain; what was copied is kept."""


class MessagesUnreadable(BasculeError):
    """The legacy server does not give some messages, and nobody has waived them."""


def migrate(
    connection: Connection, account: Account, home: Path, storage: Storage, trust: Trust, unsealer: Unsealer
) -> None:
    """Take a requested mailbox to state local, or raise having left it in state copying.

    Raises:
        BasculeError, OSError: why it did not come to the flip. What was copied is kept.
    """
    logger = log.get().bind(address=str(account.address))
    if account.state == "cutover":
        connection.execute("SELECT bascule.undo_cutover(%s, 'its worker died')", (account.id,))
    connection.execute("SELECT bascule.begin_copy(%s)", (account.id,))
    password = account.password(unsealer)
    sessions = Sessions(connection, account, trust, unsealer)
    storage.take_over(home)
    copy = Copy(
        sessions.open,
        storage.root(home),
        _reporter(connection, account.id),
        sessions=sessions.reserve(account.limits.per_mailbox),
        waived=waived_of(connection, account.id),
    )
    with copy:
        try:
            for number in range(1, MAX_PASSES + 1):
                done = copy.run()
                logger.info("pass done", number=number, changes=done.changes)
                if done.changes <= SMALL_PASS:
                    break
        except BaseException:
            _record_unreadable(connection, account.id, copy, complete=False)
            raise
        _record_unreadable(connection, account.id, copy, complete=True)
        if copy.unreadable:
            raise MessagesUnreadable(
                f"the legacy server does not give {len(copy.unreadable)} of the messages",
                hint="See bascule.unreadable; mend them there or waive them.",
            )
        # The copy may have taken hours: is this still the user's password? It will be the one here.
        if account.copy_login != "xoauth2":
            authenticate(account.legacy, trust, account.address, password)
        connection.execute(
            "SELECT bascule.set_hierarchy(%s, %s, %s)", (account.id, done.layout.separator, done.layout.prefix)
        )
        notes = _take_along(account, home, trust, password, copy)
        storage.settle(account.address, home, done)
        hashed = password.hashed()  # costly on purpose, so before the mail is held
        epoch = int(value(connection, "SELECT bascule.begin_cutover(%s)", account.id))
        began = time.monotonic()
        try:
            await_acknowledgements(connection, account.id, epoch)
            final, verification = _final_pass(copy, account, home, storage)
            verification.notes += notes
            connection.execute(
                "SELECT bascule.finish_cutover(%s, %s, %s, %s)",
                (account.id, epoch, hashed, json.dumps(verification.report())),
            )
        except BaseException as error:
            undo(connection, "SELECT bascule.undo_cutover(%s, %s)", account.id, error)
            raise
        held = time.monotonic() - began
        metrics.FLIPS.inc()
        metrics.HELD.observe(held)
        logger.info("flipped", changes=final.changes, held_ms=round(held * 1000))
        copy.forget()
        storage.hand_over(home)


def _final_pass(copy: Copy, account: Account, home: Path, storage: Storage) -> tuple[Pass, Verification]:
    """Copy what came last, and find both sides equal."""
    for remaining in reversed(range(FINAL_PASSES)):
        final = copy.run()
        copy.leave_gap(final)
        storage.carry_over(account.address, home)
        try:
            with storage.reading(account.address, home, final) as read:
                return final, verify(copy.source, read, final, waived=copy.waived, sizes=copy.sizes)
        except NotEqual:
            copy.forget()
            if not remaining:
                raise
    raise AssertionError("not reached")


def _take_along(account: Account, home: Path, trust: Trust, password: Password, copy: Copy) -> list[str]:
    """POP3 UIDLs and Sieve scripts; what of them could not be taken along, in words.

    Neither is a reason not to move. They are read with the user's own password.
    """
    notes = []
    legacy = account.legacy
    if legacy.pop3 is not None:
        try:
            inbox = [(message.uid, message.size) for message in copy.inbox()]
            copy.set_uidls(uidls(legacy, legacy.pop3, trust, account.address, password, inbox))
            copy.run()
        except BasculeError as error:
            notes.append(f"POP3 clients may download INBOX again: {error.message}")
    if legacy.sieve is not None:
        try:
            scripts, active = read_scripts(legacy, legacy.sieve, trust, account.address, password)
            write_scripts(home, scripts, active)
        except BasculeError as error:
            notes.append(f"Sieve scripts were not copied: {error.message}")
    return notes


def _record_unreadable(connection: Connection, mailbox_id: int, copy: Copy, *, complete: bool) -> None:
    messages = json.dumps([asdict(each) for each in copy.unreadable.values()])
    if (complete or copy.unreadable) and not connection.broken:
        connection.execute("SELECT bascule.set_unreadable(%s, %s, %s)", (mailbox_id, messages, complete))


def undo(connection: Connection, act: str, mailbox_id: int, error: BaseException) -> None:
    """Take back a cutover or a return for which ``error`` is the reason."""
    if isinstance(error, psycopg.OperationalError):
        return  # the database is away; a policy daemon undoes it when its time is over
    if isinstance(error, psycopg.Error):
        error = translated(error)
    reason = error.message if isinstance(error, BasculeError) else type(error).__name__
    connection.execute(act.encode(), (mailbox_id, reason))


def await_acknowledgements(connection: Connection, mailbox_id: int, epoch: int) -> None:
    """Return when every live node has acknowledged ``epoch``.

    Raises:
        NotAcknowledged
    """
    connection.execute("LISTEN bascule_acknowledgement")
    deadline = (
        time.monotonic()
        + float(
            value(
                connection,
                "SELECT extract(epoch FROM cutover_deadline - clock_timestamp()) FROM bascule.mailbox WHERE id = %s",
                mailbox_id,
            )
            or 0
        )
        - MARGIN
    )
    while waiting := connection.execute(
        "SELECT part, node FROM bascule.unacknowledged(%s, %s)", (mailbox_id, epoch)
    ).fetchall():
        if time.monotonic() > deadline:
            names = ", ".join(f"{part} on {node}" for part, node in waiting)
            raise NotAcknowledged(f"not acknowledged in time by: {names}", hint="Is that part in order? See its log.")
        list(connection.notifies(timeout=1, stop_after=1))
    connection.execute("UNLISTEN bascule_acknowledgement")


def _reporter(connection: Connection, mailbox_id: int) -> Callable[[Progress], None]:
    last = 0.0
    counted = 0

    def report(progress: Progress) -> None:
        nonlocal last, counted
        now = time.monotonic()
        if progress.copied < progress.total and now - last < PROGRESS_INTERVAL:
            return
        last = now
        metrics.COPIED.inc(max(progress.bytes - counted, 0))
        counted = progress.bytes  # each pass counts from nothing
        goes_on = value(
            connection,
            "SELECT bascule.report_progress(%s, %s, %s, %s)",
            mailbox_id,
            progress.copied,
            progress.total,
            progress.bytes,
        )
        if goes_on is False:
            raise Paused("paused by an administrator")

    return report
