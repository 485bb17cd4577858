"""Writing to a legacy mailbox, when a user is sent back there."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet

from bascule import log
from bascule.errors import LegacyUnavailable
from bascule.imap.pipeline import CommandRefused, quoted, uid_set
from bascule.imap.reader import EVERYTHING, Changes, Reader

_APPENDUID = re.compile(r"^\[APPENDUID \d+ (\d+)\]", re.IGNORECASE)
_PERMANENT = re.compile(rb"^OK \[PERMANENTFLAGS \(([^)]*)\)\]", re.IGNORECASE)
_UIDVALIDITY = re.compile(rb"^OK \[UIDVALIDITY (\d+)\]", re.IGNORECASE)
SET_BATCH = 80  # UIDs in one command


class Writer(Reader):
    """A session that may write, used by one thread."""

    def create(self, folder: str) -> None:
        """Make a folder, unless it is there already."""
        try:
            self._pipeline.run(b"CREATE %s" % quoted(folder))
        except CommandRefused as error:
            if error.code != "ALREADYEXISTS":
                raise LegacyUnavailable(
                    f"the legacy server does not make the folder {folder!r}: {error.message}"
                ) from error

    def delete(self, folder: str) -> None:
        """Remove an empty folder; one that the server wants to keep stays."""
        try:
            self._pipeline.run(b"DELETE %s" % quoted(folder))
        except CommandRefused:
            return

    def subscribe(self, folder: str, *, wanted: bool) -> bool:
        """Subscribe to a folder, or no longer; whether the server did it, for it is no reason not to go on."""
        try:
            self._pipeline.run((b"SUBSCRIBE %s" if wanted else b"UNSUBSCRIBE %s") % quoted(folder))
        except CommandRefused as error:
            log.get().warning("the subscription is not changed", folder=folder, reason=error.message)
            return False
        return True

    #: UIDVALIDITY of the folder that :meth:`select` opened.
    uidvalidity = 0

    def select(self, folder: str) -> frozenset[str] | None:
        """Open a folder for writing; the flags that it keeps, or None if it keeps any."""
        kept: frozenset[str] | None = None
        for untagged in self._opening(
            folder, self._pipeline.answers(self._pipeline.send(b"SELECT %s" % quoted(folder)))
        ):
            if (found := _PERMANENT.match(untagged.text)) is not None:
                kept = None if b"\\*" in found[1].split() else self._flags(found[1])
            elif (found := _UIDVALIDITY.match(untagged.text)) is not None:
                self.uidvalidity = int(found[1])
        return kept

    def append(
        self, folder: str, flags: frozenset[str], internaldate: int, size: int, pieces: Iterator[bytes]
    ) -> int | None:
        """Append a message; its UID if the server tells it (RFC 4315).

        Raises:
            LegacyUnavailable: it is refused.
        """
        date = time.strftime("%d-%b-%Y %H:%M:%S +0000", time.gmtime(internaldate))
        names = " ".join(sorted(flags)).encode()
        tagged = self._pipeline.append(
            b'APPEND %s (%s) "%s"' % (quoted(folder), names, date.encode()),
            size,
            pieces,
            at_once="LITERAL+" in self._capabilities,
        )
        if tagged.refused is not None:
            raise LegacyUnavailable(
                f"the legacy server does not take a message for {folder!r}: {tagged.refused.message}",
                hint="Is the mailbox full there?",
            )
        found = _APPENDUID.match(tagged.text)
        return int(found[1]) if found else None

    def with_message_id(self, message_id: str, first: int) -> set[int]:
        """The messages of the folder that is open with this Message-ID, from a UID on."""
        return self._search(b"UID %d:* HEADER Message-ID %s" % (first, quoted(message_id)))

    def _search(self, criteria: bytes) -> set[int]:
        found = self._pipeline.run(b"UID SEARCH %s" % criteria)
        return {int(uid) for each in found if each.text[:6].upper() == b"SEARCH" for uid in each.text.split()[1:]}

    def change_flags(self, uids: Sequence[int], flags: AbstractSet[str], *, wanted: bool) -> None:
        """Set flags of messages of the folder that is open, or take them away; their other flags stay.

        Raises:
            CommandRefused: the server does not keep one of them.
        """
        names = " ".join(sorted(flags)).encode()
        for batch in _batches(uids):
            sign = b"+" if wanted else b"-"
            self._pipeline.run(b"UID STORE %s %sFLAGS.SILENT (%s)" % (uid_set(batch), sign, names))

    def look_again(self, folder: str, uids: Sequence[int]) -> Changes:
        """Those of the messages that the folder, which is open, has now: flags, sizes and dates."""
        found = Changes(folder)
        for batch in _batches(uids):
            tags = self._pipeline.send(b"UID FETCH %s %s" % (uid_set(batch), EVERYTHING))
            self._read_changes(found, self._opening(folder, self._pipeline.answers(tags)), 1)
        return found

    @property
    def expunges_singly(self) -> bool:
        """Whether :meth:`expunge` leaves alone what others have marked \\Deleted (UIDPLUS, RFC 4315)."""
        return "UIDPLUS" in self._capabilities

    def marked_deleted(self) -> set[int]:
        """The messages of the folder that is open which are marked \\Deleted."""
        return self._search(b"DELETED")

    def expunge(self, uids: Sequence[int]) -> None:
        """Remove messages of the folder that is open, and no others.

        Raises:
            LegacyUnavailable: the server can only remove others with them; nothing was removed.
        """
        if not self.expunges_singly:
            self._insist_on_no_other(uids)
        for batch in _batches(uids):
            self.change_flags(batch, {"\\Deleted"}, wanted=True)
            if self.expunges_singly:
                self._pipeline.run(b"UID EXPUNGE %s" % uid_set(batch))
        if self.expunges_singly:
            return
        try:
            self._insist_on_no_other(uids)
        except LegacyUnavailable:
            self.change_flags(uids, {"\\Deleted"}, wanted=False)
            raise
        self._pipeline.run(b"EXPUNGE")

    def _insist_on_no_other(self, uids: Sequence[int]) -> None:
        if others := self.marked_deleted() - set(uids):
            raise LegacyUnavailable(
                "the legacy server cannot expunge single messages (no UIDPLUS), and others are marked deleted, "
                f"UID {min(others)} first",
                hint="Expunge them there, or unmark them.",
            )


def _batches(uids: Sequence[int]) -> Iterator[list[int]]:
    ordered = sorted(uids)
    for start in range(0, len(ordered), SET_BATCH):
        yield ordered[start : start + SET_BATCH]
