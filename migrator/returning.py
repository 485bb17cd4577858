"""Sending a user who has moved back to the legacy server.

First while the user works on as normal, again and again until little is left;
then the mailbox is held like at a cutover, the rest is written, and the route
flips. The legacy mailbox is made equal to the one here: what came here is
appended there, flags are set, what the user removed or moved here is expunged
there. What came late to the legacy mailbox is already where it belongs.

A message is appended exactly once. That it will be is noted in the database
before, that it was after. After a death in between, the message can only be
among those that came to the folder since: it is looked for there, by its bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from hashlib import sha256

from bascule import log
from bascule.errors import BasculeError, LegacyUnavailable, LocalUnavailable
from bascule.imap.reader import Batch, Message, Reader, Wanted, insisted
from bascule.imap.wire import PIECE
from bascule.imap.writer import Writer
from bascule.migrator.acts import Note
from bascule.migrator.attempt import Attempt
from bascule.migrator.cutover import MAX_PASSES, SMALL_PASS
from bascule.migrator.hold import await_acknowledgements, undo
from bascule.migrator.letters import message_id
from bascule.migrator.storage import digest_of, straggler_name
from bascule.migrator.sweep import UidvalidityChanged

FINAL_PASSES = 4  # the last of them must find nothing to do

_STRAGGLER = re.compile(r"^\d+\.L(?P<name>\d+\.\d+\.[0-9a-f]{16})\.bascule")


class NotClean(BasculeError):
    """Both sides did not become equal in time; the return is undone and tried again."""


def give_back(attempt: Attempt) -> None:
    """Take a mailbox whose return was requested to state legacy, or raise having left it in state local.

    Raises:
        BasculeError, OSError: why it did not come to the flip. What was written is kept.
    """
    acts, account, home, storage = attempt.acts, attempt.account, attempt.home, attempt.storage
    logger = log.get().bind(address=str(account.address))
    if account.state == "returning":
        acts.undo_return(account.id, "its worker died")
    storage.hand_over(home)  # a worker may have died right after the flip
    storage.reopen(home)
    attempt.sessions.reserve(1)
    with attempt.sessions.open_target() as there:
        for number in range(1, MAX_PASSES + 1):
            changes = _write(attempt, there, None)
            logger.info("return pass done", number=number, changes=changes)
            if changes <= SMALL_PASS:
                break
        epoch = acts.begin_return(account.id)
        try:
            await_acknowledgements(acts, account.id, epoch)
            attempt.local.end_sessions(account.address)
            storage.close(home)
            _write_the_rest(attempt, there, storage.closed_location(home))
            acts.finish_return(account.id, epoch)
        except BaseException as error:
            storage.reopen(home)
            undo(acts.undo_return, account.id, error)
            raise
    storage.leave(home)
    logger.info("returned")


def _write_the_rest(attempt: Attempt, there: Writer, location: str) -> None:
    for _ in range(FINAL_PASSES):
        if not _write(attempt, there, location):
            return
    raise NotClean("the legacy mailbox does not become equal to the one here")


def _write(attempt: Attempt, there: Writer, location: str | None) -> int:
    """One pass over all folders; how much was written."""
    account = attempt.account
    with attempt.local.open(account.address, location=location) as here:
        layout, theirs = here.layout(), there.layout()
        names = [folder.name for folder in layout.folders if folder.selectable]
        known_there = {folder.name for folder in theirs.folders if folder.selectable}
        changes = 0
        for name in names:
            if name not in known_there:
                there.create(name)
                changes += 1
        for name in (set(layout.subscribed) ^ set(theirs.subscribed)) & set(names):
            changes += there.subscribe(name, wanted=name in layout.subscribed)
        flipped = attempt.acts.flipped_folders(account.id)
        # Appended first, in all folders; only then is anything removed.
        folders = [
            _Folder(attempt, here, there, name, flipped.get(name), is_here=name in names)
            for name in dict.fromkeys([*names, *(name for name in flipped if name in known_there)])
        ]
        for folder in folders:
            changes += folder.append()
        for folder in folders:
            changes += folder.align()
        return changes


class _Folder:
    """One folder, here and there."""

    def __init__(
        self,
        attempt: Attempt,
        here: Reader,
        there: Writer,
        name: str,
        flipped: tuple[int, int] | None,
        *,
        is_here: bool,
    ) -> None:
        self._acts, self._account = attempt.acts, attempt.account
        self._here, self._there, self._name = here, there, name
        self._spool = attempt.home / ".bascule-return"
        account = self._account
        self._is_here = is_here
        there_now = next(insisted(there.changes([(name, None)])))
        if flipped is not None and flipped[0] != there_now.uidvalidity:
            raise UidvalidityChanged(
                f"the folder {name!r} of {account.address} has a new UIDVALIDITY on the legacy server",
                hint="It was made anew there: copy what is new here by hand, or leave the user here.",
            )
        self._present = {message.uid: message for message in there_now.new}
        self._uidnext = there_now.uidnext
        self._messages: dict[int, Message] = {}
        self._guids: dict[int, str] = {}
        same_uids = False
        if is_here:
            here_now = next(insisted(here.changes([(name, None)])))
            self._messages = {message.uid: message for message in here_now.new}
            self._guids = here.guids(name) if self._messages else {}
            same_uids = flipped is not None and here_now.uidvalidity == flipped[0]
        first_new = self._first_new = flipped[1] if flipped else 1
        stragglers = {
            straggler_name(name, each.uidvalidity, each.uid): each.uid
            for each in self._acts.stragglers(account.id)
            if each.folder == name and each.delivered
        }
        self._notes = {note.uid: note for note in self._acts.notes(account.id) if note.folder == name}
        waived = {uid for folder, _, uid in self._acts.waived_messages(account.id) if folder == name}
        #: What at the legacy server is by us, or was here once: it is removed when it is here no more.
        self._ours = {uid for uid in self._present if uid < first_new} - waived
        self._ours |= set(stragglers.values()) | {note.legacy_uid or 0 for note in self._notes.values()}
        #: Legacy UID by UID here, for what is in both places.
        self._there_uid: dict[int, int] = {}
        for uid in self._messages:
            guid = self._guids.get(uid, "")
            note = self._notes.get(uid)
            straggler = _STRAGGLER.match(guid)
            candidates = (
                note.legacy_uid if note is not None and note.guid == guid else None,
                stragglers.get(straggler["name"]) if straggler else None,
                uid if same_uids and uid < first_new else None,
            )
            found = next((each for each in candidates if each is not None and each in self._present), None)
            if found is not None:
                self._there_uid[uid] = found

    def append(self) -> int:
        """Append what is not there; how many."""
        self._resolve_stale_notes()
        missing = [message for uid, message in sorted(self._messages.items()) if uid not in self._there_uid]
        for message in missing:
            digest = self._read_here(message)
            note = self._notes.get(message.uid)
            legacy_uid = None
            if note is not None and note.legacy_uid is None and note.digest == digest:
                legacy_uid = self._find(note.legacy_uidnext, digest)
            if legacy_uid is None:
                guid = self._guids.get(message.uid, "")
                self._acts.intend_return(
                    self._account.id, Note(self._name, message.uid, guid, digest, self._uidnext, None)
                )
                with self._spool.open("rb") as body:
                    pieces = iter(lambda: body.read(PIECE), b"")
                    legacy_uid = self._there.append(
                        self._name, message.flags, message.internaldate, self._spool.stat().st_size, pieces
                    )
                legacy_uid = legacy_uid or self._find(self._uidnext, digest)
                if legacy_uid is None:
                    raise LegacyUnavailable(f"a message appended to {self._name!r} is not found there")
            self._acts.returned(self._account.id, self._name, message.uid, legacy_uid)
            self._there_uid[message.uid] = legacy_uid
            self._present.setdefault(legacy_uid, message)
            self._uidnext = max(self._uidnext, legacy_uid + 1)
        self._spool.unlink(missing_ok=True)
        return len(missing)

    def align(self) -> int:
        """Set flags there and remove what is here no more; how many messages were changed."""
        kept = self._there.select(self._name)
        changes = 0
        by_flags: dict[frozenset[str], list[int]] = {}
        for uid, there_uid in self._there_uid.items():
            wanted = self._messages[uid].flags if kept is None else self._messages[uid].flags & kept
            if self._present[there_uid].flags != wanted:
                by_flags.setdefault(wanted, []).append(there_uid)
        for flags, uids in by_flags.items():
            self._there.store(uids, flags)
            changes += len(uids)
        ours = self._ours
        if self._name.upper() == "INBOX":
            ours = ours | self._there.with_message_id(message_id("last", self._account), self._first_new)
        gone = (ours & self._present.keys()) - set(self._there_uid.values())
        if gone:
            self._there.expunge(sorted(gone))
        if not self._is_here and not self._present.keys() - gone:
            self._there.delete(self._name)
        return changes + len(gone)

    def _resolve_stale_notes(self) -> None:
        """Notes of messages that are here no more: what they may have appended is removed like everything of ours."""
        for uid, note in list(self._notes.items()):
            if uid in self._messages and self._guids.get(uid, "") == note.guid:
                continue
            if note.legacy_uid is None and (found := self._find(note.legacy_uidnext, note.digest)) is not None:
                self._ours.add(found)
                self._acts.returned(self._account.id, self._name, uid, found)

    def _read_here(self, message: Message) -> bytes:
        """Put a message into the spool file; the SHA-256 of its bytes."""
        digest = sha256()

        def receive(_size: int, pieces: Iterator[bytes]) -> object:
            with self._spool.open("wb") as file:
                for piece in pieces:
                    digest.update(piece)
                    file.write(piece)
            return True

        wanted = Wanted([Batch(self._name, (message,))])
        self._here.bodies(wanted, receive, lambda *_: None)
        if wanted.not_given_at_all:
            raise LocalUnavailable(f"Dovecot does not give the message with UID {message.uid} of {self._name!r} here")
        return digest.digest()

    def _find(self, uidnext: int, digest: bytes) -> int | None:
        """The UID of a message there with these bytes, from ``uidnext`` on, that is no other's."""
        taken = set(self._there_uid.values())
        now = next(insisted(self._there.newer([(self._name, uidnext)])))
        for message in now.new:
            if message.uid in taken:
                continue
            if digest_of(self._there, self._name, message) == digest:
                self._present.setdefault(message.uid, message)
                return message.uid
        return None
