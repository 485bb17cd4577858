"""From a request to the flip: copy until little changes, hold the mail, copy the rest, verify, flip."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict

from bascule import log
from bascule.errors import BasculeError
from bascule.legacy import authenticate
from bascule.migrator import metrics
from bascule.migrator.acts import Acts
from bascule.migrator.attempt import Attempt
from bascule.migrator.copying import Copy, Pass, Progress
from bascule.migrator.hold import await_acknowledgements, undo
from bascule.migrator.pop3 import uidls
from bascule.migrator.sieve import read_scripts, write_scripts
from bascule.migrator.verification import NotEqual, Verification, verify

SMALL_PASS = 20  # changes; the final pass, while mail is held, will be about as large
MAX_PASSES = 20  # a mailbox that never comes to rest is cut over after so many
PROGRESS_INTERVAL = 0.5  # seconds between reports to the database
FINAL_PASSES = 3  # tries to find both sides equal, for a client may still be at work there


class Paused(BasculeError):
    """An administrator has paused the mailbox or its domain; what was copied is kept."""


class MessagesUnreadable(BasculeError):
    """The legacy server does not give some messages, and nobody has waived them."""


def migrate(attempt: Attempt) -> None:
    """Take a requested mailbox to state local, or raise having left it in state copying.

    Raises:
        BasculeError, OSError: why it did not come to the flip. What was copied is kept.
    """
    acts, account, home, storage = attempt.acts, attempt.account, attempt.home, attempt.storage
    logger = log.get().bind(address=str(account.address))
    if account.state == "cutover":
        acts.undo_cutover(account.id, "its worker died")
    acts.begin_copy(account.id)
    password = attempt.password()
    storage.take_over(home)
    copy = Copy(
        attempt.sessions.open,
        storage.root(home),
        _reporter(acts, account.id),
        sessions=attempt.sessions.reserve(account.limits.per_mailbox),
        waived=acts.waived_messages(account.id),
    )
    with copy:
        try:
            for number in range(1, MAX_PASSES + 1):
                done = copy.run()
                logger.info("pass done", number=number, changes=done.changes)
                if done.changes <= SMALL_PASS:
                    break
        except BaseException:
            _record_unreadable(acts, account.id, copy, complete=False)
            raise
        _record_unreadable(acts, account.id, copy, complete=True)
        if copy.unreadable:
            raise MessagesUnreadable(
                f"the legacy server does not give {len(copy.unreadable)} of the messages",
                hint="See bascule.unreadable; mend them there or waive them.",
            )
        # The copy may have taken hours: is this still the user's password? It will be the one here.
        if account.copy_login != "xoauth2":
            authenticate(account.legacy, attempt.trust, account.address, password)
        acts.set_hierarchy(account.id, done.layout.separator, done.layout.prefix)
        notes = _take_along(attempt, copy)
        storage.settle(account.address, home, done)
        hashed = password.hashed()  # costly on purpose, so before the mail is held
        epoch = acts.begin_cutover(account.id)
        began = time.monotonic()
        try:
            await_acknowledgements(acts, account.id, epoch)
            final, verification = _final_pass(attempt, copy)
            verification.notes += notes
            acts.finish_cutover(account.id, epoch, hashed, verification.report())
        except BaseException as error:
            undo(acts.undo_cutover, account.id, error)
            raise
        held = time.monotonic() - began
        metrics.FLIPS.inc()
        metrics.HELD.observe(held)
        logger.info("flipped", changes=final.changes, held_ms=round(held * 1000))
        copy.forget()
        storage.hand_over(home)


def _final_pass(attempt: Attempt, copy: Copy) -> tuple[Pass, Verification]:
    """Copy what came last, and find both sides equal."""
    address, home, storage = attempt.account.address, attempt.home, attempt.storage
    for remaining in reversed(range(FINAL_PASSES)):
        final = copy.run()
        copy.leave_gap(final)
        storage.carry_over(address, home)
        try:
            with storage.reading(address, home, final) as read:
                return final, verify(copy.source, read, final, waived=copy.waived, sizes=copy.sizes)
        except NotEqual:
            copy.forget()
            if not remaining:
                raise
    raise AssertionError("not reached")


def _take_along(attempt: Attempt, copy: Copy) -> list[str]:
    """POP3 UIDLs and Sieve scripts; what of them could not be taken along, in words.

    Neither is a reason not to move. They are read with the user's own password.
    """
    notes = []
    trust, password, address, legacy = (
        attempt.trust,
        attempt.password(),
        attempt.account.address,
        attempt.account.legacy,
    )
    if legacy.pop3 is not None:
        try:
            inbox = [(message.uid, message.size) for message in copy.inbox()]
            copy.set_uidls(uidls(legacy, legacy.pop3, trust, address, password, inbox))
            copy.run()
        except BasculeError as error:
            notes.append(f"POP3 clients may download INBOX again: {error.message}")
    if legacy.sieve is not None:
        try:
            scripts, active = read_scripts(legacy, legacy.sieve, trust, address, password)
            write_scripts(attempt.home, scripts, active)
        except BasculeError as error:
            notes.append(f"Sieve scripts were not copied: {error.message}")
    return notes


def _record_unreadable(acts: Acts, mailbox_id: int, copy: Copy, *, complete: bool) -> None:
    if (complete or copy.unreadable) and acts.is_connected:
        acts.set_unreadable(mailbox_id, [asdict(each) for each in copy.unreadable.values()], complete=complete)


def _reporter(acts: Acts, mailbox_id: int) -> Callable[[Progress], None]:
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
        if not acts.report_progress(mailbox_id, progress.copied, progress.total, progress.bytes):
            raise Paused("paused, given up, or its worker ends")

    return report
