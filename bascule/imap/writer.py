"""Writing to a mailbox over IMAP, when a user is sent back to the legacy server."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet

from bascule import log
from bascule.errors import ServerUnavailable
from bascule.imap import responses
from bascule.imap.pipeline import CommandRefused, quoted
from bascule.imap.reader import FolderRefused, Reader, sets
from bascule.imap.responses import Malformed

MAX_FOUND = 2_000_000  # messages in the answer to a SEARCH


class Writer(Reader):
    """A session that may write, used by one thread."""

    def create(self, folder: str) -> None:
        """Make a folder, unless it is there already.

        Raises:
            ServerUnavailable: it is refused.
        """
        try:
            self._pipeline.run(b"CREATE %s" % quoted(folder))
        except CommandRefused as error:
            if error.code != "ALREADYEXISTS":
                raise self._refuses(f"does not make the folder {folder!r}", error) from error

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

    #: UIDVALIDITY of the folder that :meth:`select` opened; 0: the server does not give it.
    uidvalidity = 0

    def select(self, folder: str) -> frozenset[str] | None:
        """Open a folder for writing; the flags that it keeps, or None if it keeps any.

        Raises:
            FolderNotReadable, ServerUnavailable
        """
        kept: frozenset[str] | None = None
        self.uidvalidity = 0
        try:
            for untagged in self._pipeline.run(b"SELECT %s" % quoted(folder)):
                if untagged.text[:3].upper() != b"OK ":
                    continue
                code = responses.code(untagged.text[3:])
                if code.name == "PERMANENTFLAGS":
                    names = self.flags(code.argument.strip("()").encode("utf-8", "surrogateescape"))
                    kept = None if "\\*" in names else names
                elif code.name == "UIDVALIDITY" and code.argument.isdigit():
                    self.uidvalidity = int(code.argument)
        except CommandRefused as error:
            raise FolderRefused(folder, error.message).error() from error
        return kept

    def append(
        self, folder: str, flags: frozenset[str], internaldate: int, size: int, pieces: Iterator[bytes]
    ) -> int | None:
        """Append a message; its UID if the server gives it (RFC 4315).

        Raises:
            ServerUnavailable: it is refused.
        """
        date = time.strftime("%d-%b-%Y %H:%M:%S +0000", time.gmtime(internaldate))
        names = " ".join(sorted(flags)).encode("utf-8", "surrogateescape")
        tagged = self._pipeline.append(
            b'APPEND %s (%s) "%s"' % (quoted(folder), names, date.encode()),
            size,
            pieces,
            at_once=self._has("LITERAL+"),
        )
        if tagged.refused is not None:
            raise self._refuses(
                f"does not take a message for {folder!r}", tagged.refused, hint="Is the mailbox full there?"
            ) from tagged.refused
        code = responses.code(tagged.text)
        if code.name != "APPENDUID":
            return None
        try:
            return responses.number(code.argument.partition(" ")[2], least=1)
        except Malformed:
            return None

    def with_message_id(self, message_id: str, first: int) -> set[int]:
        """The messages of the folder that is open with this Message-ID, from a UID on."""
        return self._search(b"UID %d:* HEADER Message-ID %s" % (first, quoted(message_id)))

    def _search(self, criteria: bytes) -> set[int]:
        found: set[int] = set()
        for each in self._pipeline.run(b"UID SEARCH %s" % criteria):
            if each.text[:6].upper() not in {b"SEARCH", b"ESEARC"}:
                continue
            for first, last in self._sure(lambda untagged: list(responses.searched(untagged.text)), each):
                if last - first > MAX_FOUND:
                    raise self._peer.violates(each.text)
                found.update(range(first, last + 1))
        return found

    def change_flags(self, uids: Sequence[int], flags: AbstractSet[str], *, wanted: bool) -> None:
        """Set flags of messages of the folder that is open, or take them away; their other flags stay.

        Raises:
            CommandRefused: the server does not keep one of them.
        """
        names = " ".join(sorted(flags)).encode("utf-8", "surrogateescape")
        for part in sets(sorted(uids)):
            self._pipeline.run(b"UID STORE %s %sFLAGS.SILENT (%s)" % (part, b"+" if wanted else b"-", names))

    @property
    def expunges_singly(self) -> bool:
        """Whether :meth:`expunge` leaves alone what others have marked \\Deleted (UIDPLUS, RFC 4315)."""
        return self._has("UIDPLUS")

    def marked_deleted(self) -> set[int]:
        """The messages of the folder that is open which are marked \\Deleted."""
        return self._search(b"DELETED")

    def expunge(self, uids: Sequence[int]) -> None:
        """Remove messages of the folder that is open, and no others.

        Raises:
            ServerUnavailable: the server can only remove others with them, and nothing was removed; or it refuses.
        """
        if not self.expunges_singly:
            self._insist_on_no_other(uids)
        for part in sets(sorted(uids)):
            self._store(b"UID STORE %s +FLAGS.SILENT (\\Deleted)" % part)
            if self.expunges_singly:
                self._store(b"UID EXPUNGE %s" % part)
        if self.expunges_singly:
            return
        try:
            self._insist_on_no_other(uids)
        except ServerUnavailable:
            self.change_flags(uids, {"\\Deleted"}, wanted=False)
            raise
        self._store(b"EXPUNGE")

    def _insist_on_no_other(self, uids: Sequence[int]) -> None:
        if others := self.marked_deleted() - set(uids):
            raise self._peer.unavailable(
                f"{self._peer.name} cannot expunge single messages (no UIDPLUS), and others are marked deleted, "
                f"UID {min(others)} first",
                hint="Expunge them there, or unmark them.",
            )

    def _store(self, command: bytes) -> None:
        try:
            self._pipeline.run(command)
        except CommandRefused as error:
            what = command[:40].decode("ascii", "replace")
            raise self._refuses(f"refuses {what!r}", error) from error

    def _refuses(self, what: str, error: CommandRefused, hint: str = "") -> ServerUnavailable:
        return self._peer.unavailable(f"{self._peer.name} {what}: {error.message}", hint=hint)
