"""Reading a legacy mailbox: folders, flags, bodies. Nothing there is changed.

Folders are opened with EXAMINE and bodies read with BODY.PEEK (RFC 3501
sections 6.3.2 and 6.4.5): no message becomes seen, none loses its \\Recent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime

from imapclient import IMAPClient
from imapclient.exceptions import IMAPClientAbortError, IMAPClientError

from bascule.errors import BasculeError, LegacyUnavailable

FLAGS_BATCH = 1000  # messages a FETCH of flags
BODIES_BATCH = 1 << 20  # bytes of bodies a FETCH, at most; larger messages are read in parts of that size


class MessageNotReadable(BasculeError):
    """The legacy server does not give a message that it says it has."""


@dataclass(frozen=True, slots=True)
class SourceFolder:
    """A folder as listed. ``name`` is as on the wire."""

    name: str
    selectable: bool


@dataclass(frozen=True, slots=True)
class Layout:
    """The folder tree: its separator, the prefix of the personal namespace, the folders, the subscribed names."""

    separator: str
    prefix: str
    folders: tuple[SourceFolder, ...]
    subscribed: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Selected:
    """What EXAMINE says."""

    uidvalidity: int
    uidnext: int


@dataclass(frozen=True, slots=True)
class Message:
    uid: int
    size: int
    internaldate: datetime
    flags: frozenset[str]


def _text(name: bytes | str) -> str:
    if isinstance(name, str):
        return name
    try:
        return name.decode()
    except UnicodeDecodeError as error:
        raise BasculeError(f"the legacy server has a folder whose name is not text: {name!r}") from error


def _flags(raw: Sequence[bytes]) -> frozenset[str]:
    """Flags and keywords but for \\Recent, which belongs to a session (RFC 3501 section 2.3.2)."""
    names = (flag.decode(errors="replace") for flag in raw)
    return frozenset(_CANONICAL.get(name.lower(), name) for name in names if name.lower() != "\\recent")


#: System flags are compared without case.
_CANONICAL = {flag.lower(): flag for flag in ("\\Draft", "\\Flagged", "\\Answered", "\\Seen", "\\Deleted")}


class Source:
    """A logged-in session, used by one thread."""

    def __init__(self, client: IMAPClient) -> None:
        self._client = client

    def layout(self) -> Layout:
        listed = self._client.list_folders()
        separator = next((_text(delimiter) for _, delimiter, _ in listed if delimiter), "/")
        prefix, foreign = self._namespaces()
        folders = tuple(
            SourceFolder(_text(name), not {b"\\noselect", b"\\nonexistent"} & {flag.lower() for flag in flags})
            for flags, _, name in listed
            if not _text(name).startswith(foreign)
        )
        names = (_text(name) for _, _, name in self._client.list_sub_folders())
        subscribed = tuple(name for name in names if not name.startswith(foreign))
        return Layout(separator, prefix, folders, subscribed)

    def _namespaces(self) -> tuple[str, tuple[str, ...]]:
        """The prefix of the personal namespace, and those of other users' and shared ones (RFC 2342)."""
        if not self._client.has_capability("NAMESPACE"):
            return "", ()
        personal, other, shared = self._client.namespace()
        prefixes = [_text(prefix) for prefix, _ in (*(other or ()), *(shared or ()))]
        # What others share with the user stays theirs; an empty prefix would mean every folder.
        return _text(personal[0][0]) if personal else "", tuple(prefix for prefix in prefixes if prefix)

    def count(self, folder: str) -> int:
        """The number of messages in a folder, without opening it."""
        return int(self._client.folder_status(folder, ["MESSAGES"])[b"MESSAGES"])

    def examine(self, folder: str) -> Selected:
        """
        Raises:
            LegacyUnavailable: the folder is there no more, or has no persistent UIDs (UIDNOTSTICKY).
        """
        try:
            answer = self._client.select_folder(folder, readonly=True)
        except IMAPClientAbortError:
            raise
        except IMAPClientError as error:
            raise LegacyUnavailable(f"the folder {folder!r} cannot be opened on the legacy server: {error}") from error
        if b"UIDVALIDITY" not in answer:
            raise LegacyUnavailable(f"the legacy server gives no UIDVALIDITY for {folder!r}")
        uidvalidity = int(answer[b"UIDVALIDITY"])
        if b"UIDNEXT" in answer:
            return Selected(uidvalidity, int(answer[b"UIDNEXT"]))
        uids = self.uids()  # UIDNEXT is optional before RFC 9051
        return Selected(uidvalidity, max(uids, default=0) + 1)

    def uids(self, first: int = 1) -> list[int]:
        """The UIDs from ``first`` on, of the folder that is open."""
        found = self._client.search(["UID", f"{first}:*"])
        # "n:*" means at least the last message, even when its UID is below n (RFC 3501 section 9, seq-range).
        return sorted(uid for uid in found if uid >= first)

    def messages(self, uids: Sequence[int]) -> Iterator[Message]:
        """Size, date and flags; messages that are gone meanwhile are left out."""
        for batch in _batches(uids):
            for uid, data in self._client.fetch(batch, ["FLAGS", "RFC822.SIZE", "INTERNALDATE"]).items():
                if {b"FLAGS", b"RFC822.SIZE", b"INTERNALDATE"} <= data.keys():
                    yield Message(uid, data[b"RFC822.SIZE"], data[b"INTERNALDATE"], _flags(data[b"FLAGS"]))

    def flags(self, uids: Sequence[int]) -> Iterator[tuple[int, frozenset[str]]]:
        for batch in _batches(uids):
            for uid, data in self._client.fetch(batch, ["FLAGS"]).items():
                if b"FLAGS" in data:
                    yield uid, _flags(data[b"FLAGS"])

    def bodies(self, messages: Sequence[Message]) -> Iterator[tuple[Message, Iterator[bytes]]]:
        """Each message with its bytes, in pieces, so that memory stays small whatever its size.

        A message that is gone meanwhile is left out.

        Raises:
            MessageNotReadable: the server refuses it, or answers without it.
        """
        group: list[Message] = []
        room = BODIES_BATCH
        for message in messages:
            if message.size > BODIES_BATCH:
                if self._exists(message):
                    yield message, self._parts(message)
                continue
            if message.size > room:
                yield from self._together(group)
                group, room = [], BODIES_BATCH
            group.append(message)
            room -= message.size
        yield from self._together(group)

    def header(self, uid: int, name: str) -> str:
        """One header field of a message, unfolded; empty if it has none."""
        item = f"BODY[HEADER.FIELDS ({name.upper()})]".encode()
        data = self._client.fetch([uid], [f"BODY.PEEK[HEADER.FIELDS ({name.upper()})]"]).get(uid, {})
        raw = data.get(item, b"").decode(errors="replace")
        return " ".join(raw.partition(":")[2].split())

    def _together(self, group: Sequence[Message]) -> Iterator[tuple[Message, Iterator[bytes]]]:
        if not group:
            return
        try:
            fetched = self._client.fetch([message.uid for message in group], ["BODY.PEEK[]"])
        except IMAPClientAbortError:
            raise
        except IMAPClientError as error:
            if len(group) > 1:  # find out which one it is
                for message in group:
                    yield from self._together([message])
                return
            raise MessageNotReadable(
                f"the legacy server does not give the message with UID {group[0].uid}: {error}"
            ) from error
        for message in group:
            body = fetched.get(message.uid, {}).get(b"BODY[]")
            if body is not None:
                yield message, iter((body,))
            elif self._exists(message):
                raise MessageNotReadable(f"the legacy server has the message with UID {message.uid} but gives no body")

    def _parts(self, message: Message) -> Iterator[bytes]:
        offset = 0
        while True:
            item = f"BODY.PEEK[]<{offset}.{BODIES_BATCH}>"
            try:
                data = self._client.fetch([message.uid], [item]).get(message.uid, {})
            except IMAPClientAbortError:
                raise
            except IMAPClientError as error:
                raise MessageNotReadable(
                    f"the legacy server does not give the message with UID {message.uid}: {error}"
                ) from error
            part = data.get(f"BODY[]<{offset}>".encode())
            if part is None:
                raise LegacyUnavailable(f"the message with UID {message.uid} went away while it was read")
            yield part
            offset += len(part)
            if len(part) < BODIES_BATCH:
                return

    def _exists(self, message: Message) -> bool:
        return bool(self._client.search(["UID", str(message.uid)]))


def _batches(uids: Sequence[int]) -> Iterator[Sequence[int]]:
    for start in range(0, len(uids), FLAGS_BATCH):
        yield uids[start : start + FLAGS_BATCH]
