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

import json
import os
from collections.abc import Iterator
from email.parser import BytesHeaderParser
from email.policy import compat32
from itertools import count
from pathlib import Path

from bascule import log
from bascule.credential import Unsealer
from bascule.database import Connection, value
from bascule.errors import BasculeError, LegacyUnavailable
from bascule.legacy import Trust
from bascule.migrator import maildir, metrics
from bascule.migrator.account import Account, flipped_folders, waived_of
from bascule.migrator.letters import Letters, message_id
from bascule.migrator.sessions import Sessions
from bascule.migrator.source import Changes, Layout, Message, Source, Wanted, batches
from bascule.migrator.storage import Storage, straggler_name


class UidvalidityChanged(BasculeError):
    """A legacy folder has new UIDs: which of its messages came late cannot be told any more."""


def sweep(
    connection: Connection,
    account: Account,
    home: Path,
    storage: Storage,
    trust: Trust,
    unsealer: Unsealer,
    letters: Letters,
) -> None:
    """Bring what came late, and write the last message and the welcome if they are not there yet.

    Raises:
        BasculeError, OSError: what was brought until then is kept.
    """
    storage.hand_over(home)  # a worker may have died right after the flip
    began = value(connection, "SELECT clock_timestamp()")
    sessions = Sessions(connection, account, trust, unsealer)
    sessions.reserve(1)
    with sessions.open() as source:
        layout = source.layout()
        seen = flipped_folders(connection, account.id)
        now = source.statuses([folder.name for folder in layout.folders if folder.selectable])
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
        for changes in list(source.newer(first.items())):
            uidvalidity = now[changes.folder].uidvalidity
            _Late(connection, account, changes, uidvalidity, home, storage, layout).bring(source)
    if account.last_message_at is None:
        with sessions.open_client() as client:
            client.select_folder("INBOX", readonly=True)
            # Only among what came since: the search may fail on an old message that cannot be read.
            since = f"{seen.get('INBOX', (0, 1))[1]}:*"
            if not client.search(["UID", since, "HEADER", "Message-ID", message_id("last", account)]):
                client.append("INBOX", letters.last(account))
        log.get().info("last message written", address=str(account.address))
        if account.to_be_welcomed:
            letters.welcome(account)
            connection.execute("SELECT bascule.welcomed(%s)", (account.id,))
    connection.execute("SELECT bascule.sweep_done(%s, %s)", (account.id, began))


class _Late:
    """The messages of one folder that came late."""

    def __init__(
        self,
        connection: Connection,
        account: Account,
        changes: Changes,
        uidvalidity: int,
        home: Path,
        storage: Storage,
        layout: Layout,
    ) -> None:
        self._connection = connection
        self._account = account
        self._changes = changes
        self._uidvalidity = uidvalidity
        self._home, self._storage, self._layout = home, storage, layout
        self._staging = home / ".bascule-staged"

    def bring(self, source: Source) -> None:
        """Bring those that are not here yet, each in its steps.

        Raises:
            LegacyUnavailable: the legacy server does not give one of them; the others were brought.
        """
        brought: dict[int, bool] = dict(
            self._connection.execute(
                "SELECT uid, delivered_at IS NOT NULL FROM bascule.straggler "
                "WHERE mailbox_id = %s AND folder = %s AND uidvalidity = %s",
                (self._account.id, self._changes.folder, self._uidvalidity),
            ).fetchall()
        )
        waived = {
            uid
            for folder, uidvalidity, uid in waived_of(self._connection, self._account.id)
            if (folder, uidvalidity) == (self._changes.folder, self._uidvalidity)
        }
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
                self._connection.execute(
                    "SELECT bascule.set_unreadable(%s, %s, false)", (self._account.id, json.dumps(named))
                )
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
        self._connection.execute("SELECT bascule.stage_straggler(%s, %s, %s, %s)", self._identity(message))
        self._deliver(message, again=False)

    def _deliver(self, message: Message, *, again: bool) -> None:
        staged = self._staged(message)
        if staged.exists():
            self._storage.deliver(
                self._account.address, self._home, self._layout, self._changes.folder, message, staged, again=again
            )
        self._connection.execute("SELECT bascule.straggler_delivered(%s, %s, %s, %s)", self._identity(message))
        metrics.STRAGGLERS.inc()
        log.get().info(
            "straggler brought", address=str(self._account.address), folder=self._changes.folder, uid=message.uid
        )

    def _staged(self, message: Message) -> Path:
        return self._staging / straggler_name(self._changes.folder, self._uidvalidity, message.uid)

    def _identity(self, message: Message) -> tuple[int, str, int, int]:
        return (self._account.id, self._changes.folder, self._uidvalidity, message.uid)


def _received(body: object) -> maildir.Received:
    if not isinstance(body, maildir.Received):
        raise TypeError(f"not a received body: {type(body).__name__}")
    return body


def _message_id(path: Path) -> str:
    with path.open("rb") as file:
        return str(BytesHeaderParser(policy=compat32).parse(file).get("Message-ID", "")).strip()
