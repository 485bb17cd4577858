"""A mailbox in memory, with sessions that look like a Reader and a Writer: for tests of what uses them.

It can do what no real server can be made to do at will: give UIDs that do not
last, alter what is appended, keep a UID for itself, refuse, and die at any
command. A scripted server on a socket, for the reader itself, is another thing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path

from bascule.errors import LegacyUnavailable
from bascule.imap import profiles
from bascule.imap.pipeline import CommandRefused, Receive
from bascule.imap.reader import Changes, FolderRefused, Layout, ListedFolder, Message, Status, Wanted

SYSTEM = frozenset(("\\Answered", "\\Deleted", "\\Draft", "\\Flagged", "\\Seen"))


@dataclass(slots=True)
class Mail:
    """A message; ``order`` is where it sorts in a folder whose UIDs do not last."""

    body: bytes
    internaldate: int = 0
    flags: frozenset[str] = frozenset()
    guid: str = ""
    order: int = 0
    #: Gmail's number of it, which it has in every folder; 0: it has none.
    message_id: int = 0


@dataclass(slots=True)
class MemoryFolder:
    uidvalidity: int
    uidnext: int = 1
    mails: dict[int, Mail] = field(default_factory=dict)
    attributes: frozenset[str] = frozenset()

    def add(self, mail: Mail) -> int:
        uid = self.uidnext
        self.mails[uid] = mail
        self.uidnext += 1
        return uid


class MemoryServer:
    """One mailbox, and what is odd about its server."""

    def __init__(self, *, folders: Iterable[str] = ("INBOX",), first_uidvalidity: int = 100) -> None:
        self._uidvalidities = count(first_uidvalidity)
        self._guids = count(1)
        self.folders = {name: MemoryFolder(next(self._uidvalidities)) for name in folders}
        self.subscribed: set[str] = set()
        #: Called before and after each change: a test may raise here, as if somebody had died.
        self.tick: Callable[[], None] = lambda: None
        #: Called before anything is read: a Maildir that others write into is read anew.
        self.refresh: Callable[[], None] = lambda: None
        self.has_uidplus = True
        self.alters: Callable[[bytes], bytes] = lambda body: body
        #: Whether the date of an APPEND is heeded.
        self.keeps_dates = True
        self.kept: frozenset[str] | None = None
        #: Flags that are taken and forgotten, and flags that are refused.
        self.forgets: frozenset[str] = frozenset()
        self.refuses: frozenset[str] = frozenset()
        self.append_refusal = ""
        #: Whether APPEND is refused where the folder is open read-only.
        self.insists_on_select = False
        #: Whether it gives Gmail's numbers.
        self.is_gmail = False
        self.unreadable: set[tuple[str, int]] = set()
        self.closed_folders: set[str] = set()
        #: Folders that LIST leaves out.
        self.unlisted: set[str] = set()
        #: What STATUS says of a folder for ever, whatever happens there.
        self.stale: dict[str, Status] = {}
        #: What was written there, in words.
        self.written: list[str] = []

    def make(self, name: str) -> MemoryFolder:
        """A folder with a new UIDVALIDITY, whether there was one or not."""
        self.folders[name] = MemoryFolder(next(self._uidvalidities))
        return self.folders[name]

    def put(self, name: str, body: bytes, *, date: int = 0, flags: Iterable[str] = (), order: int = 0) -> int:
        """Deliver a message; its UID."""
        return self.folders[name].add(Mail(body, date, frozenset(flags), f"g{next(self._guids)}", order))

    def renumber(self, name: str, first: int) -> None:
        """Give the messages from ``first`` on UIDs in the order in which they sort: none of theirs was to last."""
        folder = self.folders[name]
        ordered = sorted(
            (mail for uid, mail in folder.mails.items() if uid >= first),
            key=lambda mail: (mail.internaldate, mail.order),
        )
        folder.mails = {uid: mail for uid, mail in folder.mails.items() if uid < first}
        folder.mails |= dict(zip(count(first), ordered, strict=False))
        folder.uidnext = first + len(ordered)

    def move(self, name: str, uid: int, target: str) -> int:
        """As a client's MOVE: the message keeps its GUID."""
        return self.folders[target].add(self.folders[name].mails.pop(uid))

    def contents(self) -> dict[str, list[tuple[bytes, int, tuple[str, ...]]]]:
        """What every folder holds, whatever the UIDs are."""
        self.refresh()
        return {
            name: sorted((mail.body, mail.internaldate, tuple(sorted(mail.flags))) for mail in folder.mails.values())
            for name, folder in self.folders.items()
        }

    @contextmanager
    def open(self, *_: object, **__: object) -> Iterator[MemorySession]:
        yield MemorySession(self)


class MemorySession:
    """A session with a :class:`MemoryServer`, in the shape of a Writer."""

    def __init__(self, server: MemoryServer) -> None:
        self._server = server
        self._selected = self._examined = ""
        self.uidvalidity = 0

    @property
    def expunges_singly(self) -> bool:
        return self._server.has_uidplus

    # Reading ------------------------------------------------------------------------

    profile = profiles.UNKNOWN

    def announces(self, capability: str) -> bool:
        return capability == "X-GM-EXT-1" and self._server.is_gmail

    def message_ids(self, folders: Sequence[str]) -> Iterator[tuple[str, dict[int, int]]]:
        for name in folders:
            self._selected, self._examined = "", name
            yield name, {uid: mail.message_id for uid, mail in self._folder(name).mails.items() if mail.message_id}

    def layout(self, also: Iterable[str] = ()) -> Layout:
        self._server.refresh()
        unlisted = self._server.unlisted & self._server.folders.keys()
        folders = tuple(
            ListedFolder(name, selectable=True, attributes=frozenset() if name in unlisted else folder.attributes)
            for name, folder in sorted(self._server.folders.items())
            if name not in unlisted - set(also)
        )
        return Layout(
            "/", "", folders, tuple(sorted(self._server.subscribed)), unlisted=frozenset(unlisted & set(also))
        )

    def statuses(self, folders: Sequence[str]) -> dict[str, Status | FolderRefused]:
        self._server.refresh()
        return {name: self._status(name) for name in folders}

    def opened(self, folders: Sequence[str]) -> dict[str, Status | FolderRefused]:
        return {name: self._status(name, is_opened=True) for name in folders}

    def _status(self, name: str, *, is_opened: bool = False) -> Status | FolderRefused:
        if name in self._server.closed_folders:
            return FolderRefused(name, "no right")
        folder = self._folder(name)
        if name in self._server.stale and not is_opened:
            return self._server.stale[name]
        return Status(folder.uidvalidity, folder.uidnext, len(folder.mails))

    def _folder(self, name: str) -> MemoryFolder:
        if name in self._server.closed_folders or name not in self._server.folders:
            raise LegacyUnavailable(f"the folder {name!r} cannot be opened")
        return self._server.folders[name]

    def changes(
        self, wanted: Iterable[tuple[str, Status | None]], *, sizes: bool = True
    ) -> Iterator[Changes | FolderRefused]:
        self._server.refresh()
        for name, _ in wanted:
            yield self._listed(name, 1, sizes=sizes)

    def newer(self, wanted: Iterable[tuple[str, int]]) -> Iterator[Changes | FolderRefused]:
        self._server.refresh()
        for name, first in wanted:
            yield self._listed(name, first, sizes=False)

    def _listed(self, name: str, first: int, *, sizes: bool) -> Changes:
        folder = self._folder(name)
        self._selected, self._examined = "", name
        new = [_message(uid, mail, sizes=sizes) for uid, mail in sorted(folder.mails.items()) if uid >= first]
        return Changes(name, folder.uidvalidity, folder.uidnext, len(folder.mails), new=new)

    def bodies(self, wanted: Wanted, receive: Receive, keep: Callable[[str, Message, object], None]) -> None:
        self._server.refresh()
        while (batch := wanted.take()) is not None:
            self._selected, self._examined = "", batch.folder
            for message in batch.messages:
                mail = self._folder(batch.folder).mails.get(message.uid)
                if mail is None or (batch.folder, message.uid) in self._server.unreadable:
                    wanted.not_given(replace(batch, messages=(message,)), "the legacy server answers without it")
                else:
                    keep(batch.folder, message, receive(len(mail.body), iter((mail.body,))))
                    wanted.came(batch.folder, message)
            wanted.settled()

    def which_are_there(self, folder: str, uids: list[int]) -> set[int]:
        return self._folder(folder).mails.keys() & set(uids)

    def guids(self, folder: str) -> dict[int, str]:
        self._server.refresh()
        return {uid: mail.guid for uid, mail in self._folder(folder).mails.items()}

    # Writing ------------------------------------------------------------------------

    def create(self, folder: str) -> None:
        if folder not in self._server.folders:
            self._server.tick()
            self._server.make(folder)
            self._note("CREATE", folder)

    def delete(self, folder: str) -> None:
        self._server.tick()
        del self._server.folders[folder]
        self._note("DELETE", folder)

    def subscribe(self, folder: str, *, wanted: bool) -> bool:
        (self._server.subscribed.add if wanted else self._server.subscribed.discard)(folder)
        return True

    def select(self, folder: str) -> frozenset[str] | None:
        self._server.refresh()
        self.uidvalidity = self._folder(folder).uidvalidity
        self._selected, self._examined = folder, ""
        return self._server.kept

    def append(
        self, folder: str, flags: frozenset[str], internaldate: int, size: int, pieces: Iterator[bytes]
    ) -> int | None:
        self._server.tick()
        body = b"".join(pieces)
        if len(body) != size:
            raise ValueError("a literal of the wrong length")
        if self._server.append_refusal or (self._server.insists_on_select and self._examined == folder):
            raise LegacyUnavailable(f"the legacy server does not take a message: {self._server.append_refusal}")
        if {flag.lower() for flag in flags} & self._server.refuses:
            raise LegacyUnavailable("the legacy server does not take a message: what is that keyword?")
        self._folder(folder)
        date = internaldate if self._server.keeps_dates else 7777
        uid = self._server.put(folder, self._server.alters(body), date=date, flags=self._stays(flags))
        self._note("APPEND", folder)
        return uid if self._server.has_uidplus else None

    def change_flags(self, uids: Sequence[int], flags: AbstractSet[str], *, wanted: bool) -> None:
        if {flag.lower() for flag in flags} & self._server.refuses:
            raise CommandRefused("NO what is that keyword?")
        self._server.tick()
        self._opened(self._selected or "?")
        for uid in uids:
            if (mail := self._folder(self._selected).mails.get(uid)) is not None:
                lower = {flag.lower() for flag in flags}
                others = frozenset(flag for flag in mail.flags if flag.lower() not in lower)
                mail.flags = others | self._stays(flags) if wanted else others
        self._note("STORE", self._selected)

    def look_again(self, folder: str, uids: Sequence[int]) -> list[Message]:
        mails = self._folder(self._opened(folder)).mails
        return [_message(uid, mails[uid], sizes=True) for uid in uids if uid in mails]

    def marked_deleted(self) -> set[int]:
        return {uid for uid, mail in self._folder(self._selected).mails.items() if "\\Deleted" in mail.flags}

    def expunge(self, uids: Sequence[int]) -> None:
        self._opened(self._selected or "?")
        if not self._server.has_uidplus and self.marked_deleted() - set(uids):
            raise LegacyUnavailable("others are marked deleted")
        self._server.tick()
        for uid in uids:
            self._folder(self._selected).mails.pop(uid, None)
        self._note("EXPUNGE", self._selected)

    def _opened(self, folder: str) -> str:
        if folder != self._selected:
            raise ValueError(f"{folder!r} is not open for writing")
        return folder

    def _stays(self, flags: AbstractSet[str]) -> frozenset[str]:
        kept = self._server.kept
        return frozenset(
            flag for flag in flags if flag.lower() not in self._server.forgets and (kept is None or flag in kept)
        )

    def _note(self, command: str, folder: str) -> None:
        self._server.written.append(f"{command} {folder}")
        self._server.tick()


def _message(uid: int, mail: Mail, *, sizes: bool) -> Message:
    return Message(uid, len(mail.body) if sizes else 0, mail.internaldate, mail.flags)


def follow_maildir(server: MemoryServer, root: Path, letters: dict[str, str]) -> Callable[[], None]:
    """What has a server take up files that were put into a Maildir (``LAYOUT=fs``), as Dovecot does.

    ``letters`` are the flags by their letter. A file that was taken up once is
    not seen again: it is in memory from then on.
    """
    seen: set[str] = set()

    def refresh() -> None:
        for name, folder in server.folders.items():
            path = root if name == "INBOX" else root / name
            for file in sorted((*(path / "new").glob("*"), *(path / "cur").glob("*"))):
                guid, _, flags = file.name.partition(":2,")
                if guid not in seen:
                    seen.add(guid)
                    set_flags = frozenset(letters[letter] for letter in flags)
                    folder.add(Mail(file.read_bytes(), int(file.stat().st_mtime), set_flags, guid))

    return refresh
