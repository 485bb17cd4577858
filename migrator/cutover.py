"""From a request to the flip: copy until little changes, hold the mail, copy the rest, verify, flip."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial

from bascule import log
from bascule.errors import BasculeError
from bascule.imap.folder_rules import FolderRules
from bascule.legacy import authenticate
from bascule.migrator import metrics
from bascule.migrator.acts import Acts
from bascule.migrator.attempt import Attempt
from bascule.migrator.copying import Copy, Pass, Progress
from bascule.migrator.hold import await_acknowledgements, undo
from bascule.migrator.pop3 import uidls
from bascule.migrator.sieve import place_here, read_scripts, unknown_extensions, write_scripts
from bascule.migrator.verification import NotEqual, NotServed, Verification, special_uses, verify
from bascule.migrator.witness import Witness

SMALL_PASS = 20  # changes; the final pass, while mail is held, will be about as large
MAX_PASSES = 20  # a mailbox that never comes to rest is cut over after so many
PROGRESS_INTERVAL = 0.5  # seconds between reports to the database
TRIES = 3  # to find both sides equal, for a client may still be at work there


class Paused(BasculeError):
    """An administrator has paused the mailbox or its domain; what was copied is kept."""


class MessagesUnreadable(BasculeError):
    """The legacy server does not give some messages or folders, and nobody has waived them."""


class NoPassword(BasculeError):
    """Nobody could log in to the mailbox after the flip, and nobody has said that this is wanted."""


class CannotBeKept(BasculeError):
    """A name or a keyword cannot be kept as it is, and the domain's setting is to wait for an administrator."""


def migrate(attempt: Attempt) -> None:
    """Take a requested mailbox to state local, or leave it in state copying: because its hour to flip has not come, or
    by raising.

    Raises:
        BasculeError, OSError: why it did not come to the flip. What was copied is kept.
    """
    acts, account, home, storage = attempt.acts, attempt.account, attempt.home, attempt.storage
    logger = log.get().bind(address=str(account.address))
    if account.state == "cutover":
        acts.undo_cutover(account.id, "its worker died")
    acts.begin_copy(account.id)
    password = attempt.proved_password()
    storage.take_over(home)
    copy = Copy(
        attempt.sessions.open,
        storage.root(home),
        _reporter(acts, account.id),
        sessions=attempt.sessions.reserve(account.limits.per_mailbox),
        waived=acts.waived_messages(account.id),
        waived_folders=acts.waived_folders(account.id),
        is_staging=not storage.is_maildir,
    )
    with copy:
        try:
            for number in range(1, MAX_PASSES + 1):
                copy.rules = FolderRules(acts.folder_rules(account.domain_id))
                done = copy.run()
                logger.info("pass done", number=number, changes=done.changes)
                if done.changes <= SMALL_PASS:
                    break
        except BaseException:
            _record_unreadable(acts, account.id, copy, complete=False)
            raise
        _record_unreadable(acts, account.id, copy, complete=True)
        counted = _name_left_out(attempt, copy, done)
        _insist_on_whole(attempt, copy, done)
        if account.staged and acts.stage(account.id):
            logger.info("kept fresh until it flips")
            return
        if not account.flips_later:
            _insist_on_a_password(attempt)
        # The copy may have taken hours: is this still the user's password? It will be the one here.
        if password is not None and account.copy_login != "xoauth2":
            with copy.without_session():
                authenticate(account.legacy, attempt.trust, account.address, password)
        acts.set_hierarchy(account.id, done.layout.separator, done.layout.prefix, special_uses(done))
        notes = _take_along(attempt, copy)
        rehearsed = _equal(attempt, copy, {}, done)
        if acts.stage(account.id):
            logger.info("copied ahead")
            return
        _insist_on_a_password(attempt)
        hashed = None if password is None else password.hashed()
        last_pass = _flip(attempt, copy, rehearsed, notes, counted, hashed)
        copy.forget()
        storage.keep_evidence(home, last_pass)
        storage.hand_over(home)


def _flip(
    attempt: Attempt,
    copy: Copy,
    rehearsed: _Verified,
    notes: list[str],
    counted: Mapping[str, int | None],
    hashed: str | None,
) -> Pass:
    """Hold the mail, copy the rest, find both sides equal, and flip; the last pass.

    ``counted``: the messages of each folder that a rule leaves out. ``hashed``: of the proved password. It is costly on
    purpose, so it was made before the mail is held.
    """
    acts, account, home, storage = attempt.acts, attempt.account, attempt.home, attempt.storage
    compared = {state.name: state.uidnext for state in rehearsed.last_pass.folders}
    epoch = acts.begin_cutover(account.id)
    began = time.monotonic()
    try:
        await_acknowledgements(acts, account.id, epoch)
        final = _equal(attempt, copy, compared)
        final.verification.notes += notes
        final.verification.left_out = _left_out(final.last_pass, counted)
        final.verification.bodies_compared += rehearsed.verification.bodies_compared
        storage.leave_gap(account.address, home, final.last_pass)
        acts.finish_cutover(account.id, epoch, hashed, final.verification.report())
    except BaseException as error:
        undo(acts.undo_cutover, account.id, error)
        raise
    held = time.monotonic() - began
    metrics.FLIPS.inc()
    metrics.HELD.observe(held)
    log.get().info(
        "flipped",
        address=str(account.address),
        changes=final.last_pass.changes,
        held_ms=round(held * 1000),
    )
    return final.last_pass


@dataclass(frozen=True, slots=True)
class _Verified:
    last_pass: Pass
    verification: Verification


def _equal(attempt: Attempt, copy: Copy, compared: Mapping[str, int], last: Pass | None = None) -> _Verified:
    """Copy what is left, and find both sides equal: once before the mail is held, and again while it is.

    ``compared``: by folder, the UID below which bodies were compared already.
    ``last``: a pass that was just done, and need not be done again at first.

    Raises:
        NotEqual: also after the last try.
        MessagesUnreadable, CannotBeKept: as after the first passes.
    """
    address, home, storage = attempt.account.address, attempt.home, attempt.storage
    for remaining in reversed(range(TRIES)):
        if last is None:
            done = copy.run()
            _record_unreadable(attempt.acts, attempt.account.id, copy, complete=True)
            _insist_on_whole(attempt, copy, done)
        else:
            done, last = last, None
        if compared:
            storage.carry_over(address, home)
            storage.raise_modseqs(address, done, [name for name in done.unsettled if name in done.modseqs])
        else:
            storage.settle(address, home, done)
        try:
            with attempt.local.witness(address) as here:
                found = verify(
                    copy.source,
                    Witness(copy.source.wire, "the legacy server"),
                    here,
                    done,
                    digests=partial(storage.digests, home, done),
                    sizes=copy.sizes,
                    compared=compared,
                    rules=copy.rules.rules,
                )
        except NotEqual as error:
            if not remaining:
                _name_not_served(attempt, error)
                raise
            log.get().info("not equal yet", address=str(address), reason=error.message)
            copy.distrust(error.folder, error.uids)
            copy.forget()
        else:
            return _Verified(done, found)
    raise AssertionError("the last try returns or raises")


def _name_not_served(attempt: Attempt, error: NotEqual) -> None:
    """Name messages that were fetched again and again, and are never here as they came in, so that they can be waived.

    Raises:
        MessagesUnreadable
    """
    if not isinstance(error, NotServed):
        return
    reason = "Dovecot here does not keep it byte for byte"
    named = [
        {"folder": error.folder, "uidvalidity": error.uidvalidity, "uid": uid, "reason": reason} for uid in error.uids
    ]
    attempt.acts.set_unreadable(attempt.account.id, named, complete=False)
    raise MessagesUnreadable(
        f"{len(named)} of the messages are not here as they came in, UID {error.uids[0]} in {error.folder!r} first: "
        "the storage does not keep them byte for byte",
        hint="See bascule.unreadable; mend them there, or leave them there: "
        f"bascule waive-messages {attempt.account.address}.",
    ) from error


def _name_left_out(attempt: Attempt, copy: Copy, done: Pass) -> Mapping[str, int | None]:
    """Record the folders that a rule leaves out; how many messages each has, None where that is not said."""
    counted = copy.count_left_out(done)
    attempt.acts.set_left_out(attempt.account.id, _left_out(done, counted), complete=True)
    return counted


def _left_out(done: Pass, counted: Mapping[str, int | None]) -> list[dict[str, object]]:
    """The folders that a rule leaves out, as they are recorded."""
    return [
        {"name": name, "reason": reason, "messages": counted.get(name)}
        for name, reason in sorted(done.left_out.items())
    ]


def _insist_on_whole(attempt: Attempt, copy: Copy, done: Pass) -> None:
    """
    Raises:
        MessagesUnreadable: messages or folders are missing, and nobody has waived them.
        CannotBeKept: something would be otherwise here, and the domain's setting is to wait.
    """
    address = attempt.account.address
    if copy.unreadable or copy.refused:
        folders = f" and {len(copy.refused)} of the folders" if copy.refused else ""
        raise MessagesUnreadable(
            f"the legacy server does not give {len(copy.unreadable)} of the messages{folders}",
            hint=f"See bascule.unreadable; mend them there, or waive them: bascule waive-messages {address}.",
        )
    if done.notes and attempt.account.waits_on_difference:
        more = f", and {len(done.notes) - 1} more" if len(done.notes) > 1 else ""
        raise CannotBeKept(
            f"not everything can be kept as it is: {done.notes[0]}{more}",
            hint="Rename it at the legacy server, or accept it: "
            f"bascule domain set {address.domain} --on-difference note.",
        )


def _insist_on_a_password(attempt: Attempt) -> None:
    """
    Raises:
        NoPassword
    """
    account = attempt.account
    if account.sealed_credential is None and not account.has_imported_hash and not account.without_password:
        raise NoPassword(
            f"nobody could log in to {account.address} here: no password is proved, and no hash was imported",
            hint=f"bascule password import {account.address.domain} brings hashes; a login of the user's here proves "
            f"the password; bascule move --without-password {account.address} flips it without.",
        )


def _take_along(attempt: Attempt, copy: Copy) -> list[str]:
    """POP3 UIDLs, Sieve scripts and the password; what of them could not be taken along, in words.

    None is a reason not to move. They are read with the user's own password, or as the master user.
    """
    notes = []
    account, trust = attempt.account, attempt.trust
    address, legacy = account.address, account.legacy
    if account.sealed_credential is None and not account.has_imported_hash:
        notes.append(
            "no password came along: the first login here is asked about at the legacy server, and sets it; "
            "after the close nobody can log in without"
        )
    if legacy.pop3 is None and legacy.sieve is None:
        return notes
    password = attempt.proved_password() or attempt.sessions.master()
    if password is None:
        if legacy.pop3 is not None:
            notes.append("POP3 clients will download INBOX again: their UIDLs are read with the user's password only")
        if legacy.sieve is not None:
            notes.append("Sieve scripts were not copied: they are read with the user's password, or a master user's")
        return notes
    if legacy.pop3 is not None:
        try:
            inbox = [(message.uid, message.size) for message in copy.inbox()]
            found = uidls(legacy, legacy.pop3, trust, address, password, inbox, copy.inbox_header())
            copy.set_uidls(found.by_uid)
            copy.run()
            if found.note:
                notes.append(found.note)
        except BasculeError as error:
            notes.append(f"POP3 clients may download INBOX again: {error.message}")
    if legacy.sieve is not None:
        try:
            scripts = read_scripts(legacy, legacy.sieve, trust, address, password)
            place = place_here(attempt.local.config_file, attempt.home, address)
            notes += write_scripts(attempt.home, scripts, place)
            notes += unknown_extensions(attempt.local.config_file, place)
        except BasculeError as error:
            notes.append(f"Sieve scripts were not copied: {error.message}")
    return notes


def _record_unreadable(acts: Acts, mailbox_id: int, copy: Copy, *, complete: bool) -> None:
    if not acts.is_connected:
        return
    if complete or copy.unreadable:
        acts.set_unreadable(mailbox_id, [asdict(each) for each in copy.unreadable.values()], complete=complete)
    if complete:
        acts.set_unreadable_folders(mailbox_id, copy.refused)


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
