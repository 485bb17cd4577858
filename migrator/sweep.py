"""After the flip: the last message in the legacy mailbox, and stragglers brought here.

A straggler is brought exactly once. Its file is completed in a staging
directory under a name made of its legacy identity, then the database is told
(*staged*), then the file is put into the mailbox, then the database is told
(*delivered*). When a worker dies in between, the next one sees: staged and no
file means put there already, wherever the user has put the message since;
staged and the file still there means, in a Maildir, not yet put there, for that
is a rename; in dbox, that the mailbox must be searched for its bytes first.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from email.parser import BytesHeaderParser
from email.policy import compat32
from hashlib import file_digest
from itertools import count
from pathlib import Path

from bascule import log
from bascule.errors import BasculeError, LegacyUnavailable
from bascule.imap.reader import Changes, Layout, Message, Reader, Wanted, batches, insist, insisted
from bascule.migrator import maildir, metrics
from bascule.migrator.acts import Identity
from bascule.migrator.attempt import Attempt
from bascule.migrator.letters import message_id
from bascule.migrator.storage import straggler_name


class UidvalidityChanged(BasculeError):
    """A legacy folder has new UIDs: which of its messages came late cannot be told any more."""


def sweep(attempt: Attempt) -> None:
    """Bring what came late, and write the last message and the welcome if they are not there yet.

    Raises:
        BasculeError, OSError: what was brought until then is kept.
    """
    acts, account = attempt.acts, attempt.account
    attempt.storage.hand_over(attempt.home)  # a worker may have died right after the flip
    began = acts.now()
    attempt.sessions.reserve(1)
    with attempt.sessions.open() as source:
        layout = source.layout()
        seen = acts.flipped_folders(account.id)
        now = insist(source.statuses([folder.name for folder in layout.folders if folder.selectable]))
        first: dict[str, int] = {}
        for name, status in now.items():
            uidvalidity, uidnext = seen.get(name, (status.uidvalidity, 1))  # a folder made after the flip is all new
            if status.uidvalidity != uidvalidity:
                raise UidvalidityChanged(
                    f"the folder {name!r} of {account.address} has a new UIDVALIDITY on the legacy server",
                    hint="Look there for messages that came after the move, and copy them by hand.",
                )
            if status.messages and (status.uidnext > uidnext or not status.uidnext):
                first[name] = uidnext
        # All answers first: the same session then reads bodies.
        for changes in list(insisted(source.newer(first.items()))):
            _Late(attempt, changes, now[changes.folder].uidvalidity, layout).bring(source)
    if account.last_message_at is None:
        with attempt.sessions.open_client() as client:
            client.select_folder("INBOX", readonly=True)
            # Only among what came since: the search may fail on an old message that cannot be read.
            since = f"{seen.get('INBOX', (0, 1))[1]}:*"
            if not client.search(["UID", since, "HEADER", "Message-ID", message_id("last", account)]):
                client.append("INBOX", attempt.letters.last(account))
        log.get().info("last message written", address=str(account.address))
        if account.to_be_welcomed:
            attempt.letters.welcome(account)
            acts.welcomed(account.id)
    acts.sweep_done(account.id, began)


class _Late:
    """The messages of one folder that came late."""

    def __init__(self, attempt: Attempt, changes: Changes, uidvalidity: int, layout: Layout) -> None:
        self._attempt = attempt
        self._account = attempt.account
        self._changes = changes
        self._uidvalidity = uidvalidity
        self._layout = layout
        self._staging = attempt.home / ".bascule-staged"

    def bring(self, source: Reader) -> None:
        """Bring those that are not here yet, each in its steps.

        Raises:
            LegacyUnavailable: the legacy server does not give one of them; the others were brought.
        """
        here = (self._changes.folder, self._uidvalidity)
        acts = self._attempt.acts
        brought = {
            each.uid: each.delivered
            for each in acts.stragglers(self._account.id)
            if (each.folder, each.uidvalidity) == here
        }
        waived = {uid for *folder, uid in acts.waived_messages(self._account.id) if tuple(folder) == here}
        late = [each for each in self._changes.new if each.uid not in waived and not brought.get(each.uid, False)]
        self._staging.mkdir(mode=0o700, exist_ok=True)
        for message in late:
            if message.uid in brought:
                self._deliver(message, again=True)
        wanted = Wanted(batches(self._changes.folder, (message for message in late if message.uid not in brought)))
        # Bodies are read in one go, with nothing but files written meanwhile; then each is brought.
        received: list[tuple[Message, maildir.Received]] = []
        self._numbers = count(1)
        source.bodies(wanted, self._receive, lambda _, message, body: received.append((message, _received(body))))
        for message, body in received:
            self._stage(message, body)
        for (folder, uid), reason in wanted.not_given_at_all.items():
            if source.which_are_there(folder, [uid]):
                named = [{"folder": folder, "uidvalidity": self._uidvalidity, "uid": uid, "reason": reason}]
                acts.set_unreadable(self._account.id, named, complete=False)
                raise LegacyUnavailable(f"the late message with UID {uid} in {folder!r} cannot be read: {reason}")

    def _receive(self, size: int, pieces: Iterator[bytes]) -> object:
        return maildir.receive(f"{self._staging}/{next(self._numbers)}.new", size, pieces)

    def _stage(self, message: Message, body: maildir.Received) -> None:
        path = Path(body.path)
        if self._changes.folder.upper() == "INBOX" and _message_id(path) == message_id("last", self._account):
            path.unlink()
            return
        os.utime(path, (max(message.internaldate, 0),) * 2)
        staged = path.replace(self._staged(message))
        maildir.make_durable(staged)
        with staged.open("rb") as file:
            digest = file_digest(file, "sha256").digest()
        self._attempt.acts.stage_straggler(self._account.id, self._identity(message), _message_id(staged), digest)
        self._deliver(message, again=False)

    def _deliver(self, message: Message, *, again: bool) -> None:
        staged = self._staged(message)
        if staged.exists():
            self._attempt.storage.deliver(
                self._account.address,
                self._attempt.home,
                self._layout,
                self._changes.folder,
                message,
                staged,
                again=again,
            )
        self._attempt.acts.straggler_delivered(self._account.id, self._identity(message))
        metrics.STRAGGLERS.inc()
        log.get().info(
            "straggler brought", address=str(self._account.address), folder=self._changes.folder, uid=message.uid
        )

    def _staged(self, message: Message) -> Path:
        return self._staging / straggler_name(self._changes.folder, self._uidvalidity, message.uid)

    def _identity(self, message: Message) -> Identity:
        return (self._changes.folder, self._uidvalidity, message.uid)


def _received(body: object) -> maildir.Received:
    if not isinstance(body, maildir.Received):
        raise TypeError(f"not a received body: {type(body).__name__}")
    return body


def _message_id(path: Path) -> str:
    with path.open("rb") as file:
        return str(BytesHeaderParser(policy=compat32).parse(file).get("Message-ID", "")).strip()
