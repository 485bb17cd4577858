"""Reading a mailbox over IMAP: folders, flags, dates, bodies. Nothing there is changed.

Folders are opened with EXAMINE and bodies read with BODY.PEEK (RFC 3501
sections 6.3.2 and 6.4.5): no message becomes seen, none loses its \\Recent.
Where UIDs are given for good at SELECT only (see :mod:`bascule.imap.profiles`),
that is used, and \\Recent is lost.

A reader does not know whose server it is: what cannot be used now is the
peer's ServerUnavailable. One folder that cannot be opened stops no other: in
its place stands a :class:`FolderRefused`. What a server offers and then refuses
is done without for the rest of the session.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from email.parser import BytesHeaderParser
from email.policy import compat32
from typing import Self, TypeVar

from bascule.errors import BasculeError
from bascule.imap import profiles, responses
from bascule.imap.bodies import (
    AHEAD,
    BATCH_BYTES,
    BATCH_MESSAGES,
    Batch,
    Fetching,
    Keep,
    Message,
    Wanted,
    batches,
    is_told_to_wait,
)
from bascule.imap.pipeline import CommandRefused, Connection, Receive, Untagged, quoted, uid_set
from bascule.imap.responses import MAX_MODSEQ, MAX_NUMBER, Fetched, Listed, Malformed, printable

EVERYTHING = (b"UID", b"FLAGS", b"RFC822.SIZE", b"INTERNALDATE")  # but the body
BUT_SIZES = (b"UID", b"FLAGS", b"INTERNALDATE")
ONLY_FLAGS = (b"UID", b"FLAGS")
MAX_GAPS = 100  # UIDs that nobody named which are tried
MAX_SINGLY = 1_000  # messages of a folder that are asked for one by one
SEARCHED = 20_000  # messages that one SEARCH asks for: its answer is one line
MAX_INTERNED = 10_000  # different sets of flags that are kept once each
MAX_FOLDERS = 50_000
MAX_MESSAGE_ID = 2**64 - 1  # X-GM-MSGID (Gmail's IMAP extensions, "Access to the Gmail unique message ID")
LINE = 4_000  # bytes of one command: servers refuse longer ones, some from 4,096 or 8,000 on (RFC 7162 section 4)
#: Delimiters that a Dovecot can have, too; LIST and the encoding of names have others for themselves.
SEPARATORS = frozenset(bytes([each]) for each in rb"""./\^|:~-$!,;=+@#<>?`' """)
IDENTITY = b'ID ("name" "bascule")'

#: RFC 6154 section 2, but for the two that name a view of all folders.
SPECIAL_USES = frozenset({"\\Archive", "\\Drafts", "\\Junk", "\\Sent", "\\Trash"})

T = TypeVar("T")
#: The tags of what was sent, or why it was not.
_Sent = list[bytes] | CommandRefused


@dataclass(frozen=True, slots=True)
class ListedFolder:
    """A folder as listed.

    ``name`` holds the bytes that were on the wire, whatever they mean
    (PEP 383), but INBOX is ``INBOX``. ``delimiter``: of its hierarchy, empty
    where it is flat. ``special_use`` is empty or one of RFC 6154.
    ``attributes`` are all that LIST gives, in lower case.
    """

    name: str
    selectable: bool
    special_use: str = ""
    delimiter: str = "/"
    attributes: frozenset[str] = frozenset()

    def with_attributes(self, attributes: frozenset[str]) -> ListedFolder:
        """The same, listed with these attributes."""
        return replace(self, attributes=attributes, special_use=_special_use(attributes))


@dataclass(frozen=True, slots=True)
class Layout:
    """The folder tree: its separator, the prefix of the personal namespace, the folders, the subscribed names.

    INBOX is always among the folders, for it always exists (RFC 3501 section 5.1).
    ``foreign`` are names of folders that others share with the user: they are not the mailbox's.
    ``unlisted`` are those of ``folders`` that LIST leaves out and that were asked for by name: of their attributes
    nothing is known.
    """

    separator: str
    prefix: str
    folders: tuple[ListedFolder, ...]
    subscribed: tuple[str, ...]
    foreign: tuple[str, ...] = ()
    unlisted: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Status:
    """A folder as STATUS gives it; ``highestmodseq`` is 0 where there is none (RFC 7162)."""

    uidvalidity: int
    uidnext: int
    messages: int
    highestmodseq: int = 0


@dataclass(frozen=True, slots=True)
class FolderRefused:
    """A folder that the server lists and does not let be read; the others can."""

    folder: str
    reason: str

    def error(self) -> FolderNotReadable:
        """As an exception, where the folder is not to be left out."""
        return FolderNotReadable(
            f"the folder {printable(self.folder, 120)!r} cannot be read: {self.reason}",
            hint="Can the user open it there? Mend or remove it there, or leave it out.",
        )


class FolderNotReadable(BasculeError):
    """One folder cannot be read. It does not pass by itself."""


@dataclass(slots=True)
class Changes:
    """What a folder has and had.

    ``complete``: whether ``flags`` names every message of the folder below
    ``new``; else only those that changed, and ``vanished`` those that are gone.
    ``new`` are the messages from a first UID on, with everything but their bodies.

    ``uidnext`` is the server's, above all that was seen. ``unseen_from``: the UID
    above all that was seen: a message between the two was given its UID and
    was not visible yet.

    ``exists`` is how many messages the server announced. Of those, it did not
    give all that is needed for ``incomplete``, by UID with what is missing, nor
    so much as a UID for as many as ``nameless`` says: neither are in ``new`` or
    ``flags``, and both were asked for once more by themselves.
    """

    folder: str
    uidvalidity: int = 0
    uidnext: int = 0
    exists: int = 0
    unseen_from: int = 1
    complete: bool = True
    flags: dict[int, frozenset[str]] = field(default_factory=dict)
    vanished: list[tuple[int, int]] = field(default_factory=list)
    new: list[Message] = field(default_factory=list)
    incomplete: dict[int, str] = field(default_factory=dict)
    nameless: int = 0


class Reader:
    """A logged-in session, used by one thread at a time."""

    def __init__(self, connection: Connection, spent: Callable[[int], None] | None = None) -> None:
        self._pipeline = connection.pipeline
        #: For another's use while nothing is under way here.
        self.wire = connection.pipeline.wire
        self._peer = connection.pipeline.peer
        if spent is not None:
            self._pipeline.spent = spent
        self._capabilities = connection.capabilities
        self._interned: dict[bytes, frozenset[str]] = {}
        self._is_fresh = True
        #: Capabilities and other things that are offered and were refused.
        self._refused: set[str] = set()
        self.profile = profiles.recognise(connection.greeting, self._capabilities, self._identify())
        if self._has("QRESYNC") and self._has("ENABLE") and not self.profile.no_qresync:
            self._has_qresync = self._optional(b"ENABLE QRESYNC", "QRESYNC") is not None
        else:
            self._has_qresync = False

    @classmethod
    def of(cls, connection: Connection, spent: Callable[[int], None] | None = None) -> Self:
        """A reader on a connection that has just been logged in."""
        return cls(connection, spent)

    def _has(self, capability: str) -> bool:
        return capability in self._capabilities and capability not in self._refused

    def announces(self, capability: str) -> bool:
        """Whether the server says that it can do this."""
        return self._has(capability)

    @property
    def _has_modseq(self) -> bool:
        return self._has("CONDSTORE") or self._has("QRESYNC")

    @property
    def _opening(self) -> bytes:
        return b"SELECT" if self.profile.select_only else b"EXAMINE"

    def _optional(self, command: bytes, capability: str) -> list[Untagged] | None:
        """The answers to a command that can be done without; None where it is refused."""
        try:
            return self._pipeline.run(command)
        except CommandRefused:
            self._refused.add(capability)
            return None

    def _identify(self) -> str:
        """Say who we are, for some servers open no folder before (RFC 2971); what the server says of itself."""
        if not self._has("ID"):
            return ""
        answers = self._optional(IDENTITY, "ID") or []
        return " ".join(printable(each.text) for each in answers if each.text[:3].upper() == b"ID ")

    # The tree -----------------------------------------------------------------

    def layout(self, also: Iterable[str] = ()) -> Layout:
        """The folders, in about one round trip; what others share with the user stays theirs (RFC 2342).

        LIST may leave folders out: those of ``also`` are asked for by name where they are not listed.

        Raises:
            ServerUnavailable
        """
        extended = self._has("LIST-EXTENDED") and self._has("SPECIAL-USE") and "LIST RETURN" not in self._refused
        plain = b'LIST "" "*"'
        commands = {plain + b" RETURN (SPECIAL-USE)" if extended else plain: "LIST"}
        if "LSUB" not in self._refused:
            commands[b'LSUB "" "*"'] = "LSUB"
        if self._has("NAMESPACE"):
            commands[b"NAMESPACE"] = "NAMESPACE"
        refused: dict[bytes, CommandRefused] = {}
        tags = self._pipeline.send(*commands)
        answers = list(self._pipeline.tolerant(tags, refused))
        for tag, what in zip(tags, commands.values(), strict=True):
            if tag in refused:
                self._refused.add("LIST RETURN" if what == "LIST" else what)
        if tags[0] in refused:
            try:
                answers += self._pipeline.run(plain)
            except CommandRefused as error:
                raise self._peer.unavailable(
                    f"{self._peer.name} does not list the folders: {error.message}",
                    hint="The login is taken and opens no mailbox. Has this user a mailbox there, and may use IMAP?",
                ) from error
        layout = self._laid_out(answers)
        listed = {each.name for each in layout.folders}
        found = self.unlisted([name for name in dict.fromkeys(also) if name not in listed])
        more = (ListedFolder(name, selectable=True, delimiter=layout.separator) for name in found)
        return replace(layout, folders=(*layout.folders, *more), unlisted=frozenset(found))

    def unlisted(self, folders: Sequence[str]) -> dict[str, Status]:
        """Those of the folders that LIST leaves out and that exist all the same: they have a STATUS.

        Raises:
            ServerUnavailable
        """
        return self._statuses(folders, modseq=False) if folders else {}

    def _laid_out(self, answers: Iterable[Untagged]) -> Layout:
        listed: dict[str, Listed] = {}
        subscribed: dict[str, None] = {}
        spaces = responses.Namespaces(b"", ())
        for untagged in answers:
            kind = untagged.text[:5].upper()
            if kind == b"LIST ":
                found = self._sure(lambda each: responses.listed(each.text, each.literals), untagged)
                listed.setdefault(_folder_name(found.name), found)
            elif kind == b"LSUB ":
                found = self._sure(lambda each: responses.listed(each.text, each.literals), untagged)
                # In an LSUB answer it means: not subscribed, but something below is (RFC 3501 section 6.3.9).
                if "\\noselect" not in found.attributes:
                    subscribed[_folder_name(found.name)] = None
            elif untagged.text[:10].upper() == b"NAMESPACE ":
                spaces = self._sure(lambda each: responses.namespaces(each.text, each.literals), untagged)
        if len(listed) > MAX_FOLDERS:
            raise self._peer.too_much(f"{len(listed)} folders")
        foreign = tuple(_text(each) for each in spaces.foreign)
        own = [each for name, each in listed.items() if not name.startswith(foreign)]
        separator = next((each.delimiter.decode() for each in own if each.delimiter in SEPARATORS), "/")
        folders = [_folder(name, each) for name, each in listed.items() if not name.startswith(foreign)]
        if "INBOX" not in listed:
            folders.insert(0, ListedFolder("INBOX", selectable=True, delimiter=separator))
        names = tuple(name for name in subscribed if not name.startswith(foreign))
        shared = tuple(name for name in listed if name.startswith(foreign))
        return Layout(separator, _text(spaces.prefix), tuple(folders), names, shared)

    def statuses(self, folders: Sequence[str]) -> dict[str, Status | FolderRefused]:
        """The STATUS of many folders, in about one round trip; of each that can be read.

        That a folder is empty is believed when it says so as it is opened, too:
        there are servers whose STATUS is not true, and nothing would be copied,
        swept or compared of a folder that is not empty.

        Raises:
            ServerUnavailable
        """
        found: dict[str, Status | FolderRefused] = {}
        if not self.profile.select_only:
            found |= self._statuses(folders)
        # It may be refused for its items, or for the folder alone: then opening it says as much.
        left = [name for name in folders if name not in found]
        if left and self._has_modseq and not self.profile.select_only:
            again = self._statuses(left, modseq=False)
            if again:
                self._refused |= {"CONDSTORE", "QRESYNC"}
                self._has_qresync = False
            found |= again
            left = [name for name in left if name not in found]
        empty = [name for name, status in found.items() if isinstance(status, Status) and not status.messages]
        for name, opened in self.opened([*left, *empty]).items():
            if name not in found or isinstance(opened, FolderRefused) or opened.messages:
                found[name] = opened
        return {name: found[name] for name in folders}

    def opened(self, folders: Sequence[str]) -> dict[str, Status | FolderRefused]:
        """The same, of what each folder says as it is opened; without HIGHESTMODSEQ.

        Raises:
            ServerUnavailable
        """
        return dict(self._ahead(folders, lambda folder: [self._open_command(folder)], self._opened_status))

    def _statuses(self, folders: Sequence[str], *, modseq: bool = True) -> dict[str, Status]:
        """The STATUS of those folders for which the server gives it."""
        items = b"MESSAGES UIDNEXT UIDVALIDITY" + (b" HIGHESTMODSEQ" if modseq and self._has_modseq else b"")
        found: dict[str, Status] = {}

        def one(folder: str, tags: _Sent) -> None:
            for untagged in self._tolerated(tags):
                if untagged.text[:7].upper() == b"STATUS ":
                    name, values = self._sure(lambda each: responses.status(each.text, each.literals), untagged)
                    # The servers that spell the name differently answer in turn.
                    said = _folder_name(name)
                    status = _status(values)
                    if status is not None:
                        found[said if said in wanted else folder] = status

        wanted = set(folders)
        for _ in self._ahead(folders, lambda folder: [b"STATUS %s (%s)" % (quoted(folder), items)], one):
            continue
        return {name: status for name, status in found.items() if name in wanted}

    def _opened_status(self, folder: str, tags: _Sent) -> Status | FolderRefused:
        changes = Changes(folder)
        try:
            for untagged in self._answers(tags):
                _note_opening(changes, untagged)
        except CommandRefused as error:
            return FolderRefused(folder, error.message)
        if not changes.uidvalidity:
            return FolderRefused(folder, "the server gives no UIDVALIDITY for it")
        return Status(changes.uidvalidity, changes.uidnext, changes.exists)

    # What changed ---------------------------------------------------------------

    def changes(
        self, wanted: Iterable[tuple[str, Status | None]], *, sizes: bool = True
    ) -> Iterator[Changes | FolderRefused]:
        """For each folder, in any order, what changed since a former STATUS; without one, everything it has.

        The folders are asked ahead of their turn. ``sizes``: whether the sizes of
        new messages are asked for; a server may fail for all because of one.

        Raises:
            ServerUnavailable
        """
        since_of = dict(wanted)
        items = EVERYTHING if sizes else BUT_SIZES
        again: list[str] = []

        def commands(folder: str) -> list[bytes]:
            return self._changes_commands(folder, since_of[folder], items)

        def read(folder: str, tags: _Sent) -> Changes | None:
            since = since_of[folder]
            listing = _Listing(self, folder, since.uidnext if since else 1, items)
            listing.changes.complete = since is None or not since.highestmodseq
            return listing.finish() if self._list(listing, tags) and listing.is_whole() else None

        for folder, changes in self._ahead(list(since_of), commands, read):
            if changes is None:
                again.append(folder)
            else:
                yield changes
        for folder in again:
            yield self._carefully(folder, 1, items)

    def newer(self, wanted: Iterable[tuple[str, int]]) -> Iterator[Changes | FolderRefused]:
        """For each folder, in any order, the messages from a UID on, without their sizes.

        Raises:
            ServerUnavailable
        """
        first_of = dict(wanted)
        again: list[str] = []

        def commands(folder: str) -> list[bytes]:
            return [self._open_command(folder), self._fetch(first_of[folder], BUT_SIZES)]

        def read(folder: str, tags: _Sent) -> Changes | None:
            listing = _Listing(self, folder, first_of[folder], BUT_SIZES)
            return listing.finish() if self._list(listing, tags) and listing.is_whole(some=True) else None

        for folder, changes in self._ahead(list(first_of), commands, read):
            if changes is None:
                again.append(folder)
            else:
                yield changes
        for folder in again:
            yield self._carefully(folder, first_of[folder], BUT_SIZES)

    def _fetch(self, first: int, items: Sequence[bytes]) -> bytes:
        # Above the last UID "n:*" means the last message (RFC 3501 section 9, seq-range), and some servers refuse it.
        last = b"%d" % MAX_NUMBER if "n:*" in self._refused else b"*"
        return b"UID FETCH %d:%s (%s)" % (first, last, b" ".join(items))

    def _changes_commands(self, folder: str, since: Status | None, items: Sequence[bytes]) -> list[bytes]:
        if since is None:
            return [self._open_command(folder), self._fetch(1, items)]
        newer = self._fetch(since.uidnext, items)
        older = b"1:%d" % max(since.uidnext - 1, 1)
        if not since.highestmodseq or not self._has_modseq:
            return [self._open_command(folder), b"UID FETCH %s (UID FLAGS)" % older, newer]
        if self._has_qresync:
            known = b"%d %d" % (since.uidvalidity, since.highestmodseq)
            return [self._open_command(folder, b" (QRESYNC (%s))" % known), newer]
        changed = b"UID FETCH %s (UID FLAGS) (CHANGEDSINCE %d)" % (older, since.highestmodseq)
        return [self._open_command(folder, b" (CONDSTORE)"), changed, newer]

    def _open_command(self, folder: str, parameters: bytes = b"") -> bytes:
        return b"%s %s%s" % (self._opening, quoted(folder), parameters)

    def _list(self, listing: _Listing, tags: _Sent) -> bool:
        """Take in the answers to an opening and what follows it; whether nothing was refused."""
        try:
            first, others = (tags, []) if isinstance(tags, CommandRefused) else (tags[:1], tags[1:])
            try:
                listing.read(self._answers(first), opening=True)
            except CommandRefused:
                # The server may still have the former folder open: what it says to the rest is not of this one.
                for _ in self._tolerated(others):
                    continue
                raise
            listing.read(self._answers(others))
        except CommandRefused:
            return False
        return True

    # One folder, carefully --------------------------------------------------------

    def _carefully(self, folder: str, first: int, items: Sequence[bytes]) -> Changes | FolderRefused:
        """Everything from a UID on, nothing else being under way: what is missing is asked for by itself.

        Raises:
            ServerUnavailable
        """
        listing = _Listing(self, folder, first, items)
        try:
            listing.read(self._pipeline.answers(self._pipeline.send(self._open_command(folder))), opening=True)
        except CommandRefused as error:
            return FolderRefused(folder, error.message)
        changes = listing.changes
        if not changes.uidvalidity:
            return FolderRefused(folder, "the server gives no UIDVALIDITY for it")
        if listing.not_sticky:
            return FolderRefused(folder, "it has no persistent UIDs there (UIDNOTSTICKY)")
        if listing.is_announced and not changes.exists:
            return listing.finish()  # some servers refuse to FETCH from an empty folder
        words = self._list_anyhow(listing)
        if len(listing.partial) > MAX_SINGLY:
            self._ask_together(listing)
        unnamed = self._uids(first, sorted(listing.named())) - listing.named()
        if first == 1 and listing.lacking():
            unnamed |= listing.gaps()
        if len(unnamed) + len(listing.partial) > MAX_SINGLY:
            words = words or "it gives less than it announces"
            return FolderRefused(folder, f"{changes.exists} messages announced, {listing.count()} listed: {words}")
        for uid in [*sorted(listing.partial), *sorted(unnamed)]:
            self._ask_singly(listing, uid)
        if first == 1:
            changes.nameless = listing.lacking()
        if words and changes.nameless == changes.exists:
            return FolderRefused(folder, words)
        return listing.finish()

    def _list_anyhow(self, listing: _Listing) -> str:
        """List the folder as well as the server lets it be listed; why it does not, in its own words, or nothing."""
        words = ""
        commands = [self._fetch(listing.first, listing.items)]
        if listing.first > 1:
            commands.append(b"UID FETCH %d:%d (%s)" % (listing.first, MAX_NUMBER, b" ".join(listing.items)))
        # One message that the server cannot read, and it refuses the sizes of all.
        commands.append(self._fetch(listing.first, BUT_SIZES))
        for command in commands:
            try:
                listing.read(self._pipeline.answers(self._pipeline.send(command)))
            except CommandRefused as error:
                words = words or error.message
                continue
            if words and b":*" not in command:
                self._refused.add("n:*")
            if b"RFC822.SIZE" not in command:
                listing.do_without_sizes()
            return ""
        return words

    def _uids(self, first: int, known: Sequence[int]) -> set[int]:
        """The UIDs that the server names in two other ways, from one on: by SEARCH, and message by message.

        ``known`` are those that it has named, ascending: so many are asked for that each answer is a line of some size.
        """
        found: set[int] = set()
        starts = [first, *(uid for uid in known[SEARCHED::SEARCHED] if uid > first)]
        ends = [*(b"%d" % (start - 1) for start in starts[1:]), b"*"]
        searches = [b"UID SEARCH UID %d:%s" % each for each in zip(starts, ends, strict=True)]
        for command in (*searches, b"FETCH 1:* (UID)"):
            refused: dict[bytes, CommandRefused] = {}
            for untagged in self._pipeline.tolerant(self._pipeline.send(command), refused):
                try:
                    if untagged.text[:6].upper() in {b"SEARCH", b"ESEARC"}:
                        for start, end in responses.searched(untagged.text):
                            if end - start > len(untagged.text) + MAX_SINGLY:
                                raise self._peer.violates(untagged.text)
                            found.update(range(max(start, first), end + 1))
                    elif (fetched := responses.fetched(untagged.text, untagged.literals)) is not None:
                        found.add(fetched.number(b"UID") or 0)
                except Malformed:
                    continue
        return {uid for uid in found if uid >= first}

    def _ask_together(self, listing: _Listing) -> None:
        """Ask once more for what so many messages lack; those that have flags then are messages all the same."""
        for item in listing.items:
            lacking = sorted(uid for uid, items in listing.partial.items() if items.get(item) is None)
            for part in sets(lacking):
                listing.read(self._tolerated(self._pipeline.send(b"UID FETCH %s (UID %s)" % (part, item))))
        if len(listing.partial) <= MAX_SINGLY:
            return
        flagged = {uid: items for uid, items in listing.partial.items() if items.get(b"FLAGS") is not None}
        undated = [
            uid for uid, items in flagged.items() if responses.internaldate(items.get(b"INTERNALDATE")).seconds is None
        ]
        dates = self.header_dates(sorted(undated))
        for uid in flagged:
            listing.conclude(uid, {}, "", dates)

    def _ask_singly(self, listing: _Listing, uid: int) -> None:
        """Ask for one message, then for each of its items, and note what the server does not give at all."""
        former = listing.partial.pop(uid, {})
        words = ""
        for items in (listing.items, *((item,) for item in listing.items if item != b"UID")):
            if listing.is_complete(uid):
                return
            refused: dict[bytes, CommandRefused] = {}
            command = b"UID FETCH %d (%s)" % (uid, b" ".join(dict.fromkeys((b"UID", *items))))
            listing.read(self._pipeline.tolerant(self._pipeline.send(command), refused), only=uid)
            words = words or next((error.message for error in refused.values()), "")
        # Nothing in answer, and nothing refused: it is gone.
        if uid in listing.partial or words:
            listing.conclude(uid, former, words)

    def header_dates(self, uids: Sequence[int]) -> dict[int, responses.Date]:
        """The dates of messages of the folder that is open, from their headers: when received, else written.

        Raises:
            ServerUnavailable
        """
        found: dict[int, responses.Date] = {}
        for part in sets(uids):
            command = b"UID FETCH %s (UID BODY.PEEK[HEADER.FIELDS (RECEIVED DATE)])" % part
            for untagged in self._tolerated(self._pipeline.send(command)):
                try:
                    fetched = responses.fetched(untagged.text, untagged.literals)
                except Malformed:
                    continue
                if fetched is None:
                    continue
                # Of one that was asked for by itself the UID need not be said.
                uid = fetched.number(b"UID") or (uids[0] if len(uids) == 1 else 0)
                for item, value in fetched.items.items():
                    if item.startswith(b"BODY[") and value:
                        found[uid] = _date_of(value)
        return found

    # Bodies -------------------------------------------------------------------

    def bodies(self, wanted: Wanted, receive: Receive, keep: Keep) -> None:
        """Fetch the bodies that are wanted, several commands ahead, until there are none left.

        ``receive`` takes a body off the line, ``keep`` gets what it made of it.
        A message that is gone meanwhile is left out. Whatever happens, what was
        asked for and not answered is wanted again, or suspected.

        Raises:
            ServerUnavailable: the session is over; another one may go on.
        """
        fresh, self._is_fresh = self._is_fresh, False
        Fetching(self._pipeline, self._opening, wanted, receive, keep).run(is_fresh=fresh)

    def found(self, folder: str) -> set[int]:
        """The UIDs that SEARCH finds in a folder, or that its messages have when they are named one by one.

        Raises:
            FolderNotReadable, ServerUnavailable
        """
        try:
            self._pipeline.run(self._open_command(folder))
        except CommandRefused as error:
            raise FolderRefused(folder, error.message).error() from error
        return self._uids(1, ())

    def which_are_there(self, folder: str, uids: Sequence[int]) -> set[int]:
        """Those of the UIDs that the folder still has.

        Raises:
            FolderNotReadable, ServerUnavailable
        """
        listing = _Listing(self, folder, MAX_NUMBER + 1, ONLY_FLAGS)
        try:
            listing.read(self._pipeline.answers(self._pipeline.send(self._open_command(folder))), opening=True)
            for part in sets(sorted(uids)):
                listing.read(self._pipeline.answers(self._pipeline.send(b"UID FETCH %s (UID FLAGS)" % part)))
        except CommandRefused as error:
            raise FolderRefused(folder, error.message).error() from error
        return (listing.changes.flags.keys() | listing.partial.keys()) & set(uids)

    def look_again(self, folder: str, uids: Sequence[int]) -> list[Message]:
        """Those of the messages that the folder, which is open, has now, as far as the server shows them.

        Raises:
            FolderNotReadable, ServerUnavailable
        """
        listing = _Listing(self, folder, 1, EVERYTHING)
        try:
            for part in sets(sorted(uids)):
                command = b"UID FETCH %s (%s)" % (part, b" ".join(EVERYTHING))
                listing.read(self._pipeline.answers(self._pipeline.send(command)))
        except CommandRefused as error:
            raise FolderRefused(folder, error.message).error() from error
        return listing.finish().new

    def guids(self, folder: str) -> dict[int, str]:
        """The GUID that Dovecot gives each message (its own FETCH item X-GUID), by UID.

        Raises:
            FolderNotReadable, ServerUnavailable
        """
        found = {}
        try:
            for untagged in self._pipeline.run(self._open_command(folder), b"UID FETCH 1:* (UID X-GUID)"):
                fetched = self._sure(lambda each: responses.fetched(each.text, each.literals), untagged)
                guid = fetched.items.get(b"X-GUID") if fetched is not None else None
                uid = fetched.number(b"UID") if fetched is not None else None
                if guid is not None and uid is not None:
                    found[uid] = printable(guid)
        except CommandRefused as error:
            raise FolderRefused(folder, error.message).error() from error
        return found

    def message_ids(self, folders: Sequence[str]) -> Iterator[tuple[str, dict[int, int]]]:
        """For each folder, Gmail's X-GM-MSGID of each message by UID: one message has it in every folder.

        What the server does not give is left out; of a folder that it refuses, all.

        Raises:
            ServerUnavailable
        """

        def read(_: str, tags: _Sent) -> dict[int, int]:
            found: dict[int, int] = {}
            try:
                first, others = ([], []) if isinstance(tags, CommandRefused) else (tags[:1], tags[1:])
                try:
                    for _answer in self._answers(first):
                        continue
                except CommandRefused:
                    for _answer in self._tolerated(others):  # of whatever folder is still open
                        continue
                    return {}
                for untagged in self._answers(others):
                    fetched = self._sure(lambda each: responses.fetched(each.text, each.literals), untagged)
                    uid = fetched.number(b"UID") if fetched is not None else None
                    number = fetched.number(b"X-GM-MSGID", MAX_MESSAGE_ID) if fetched is not None else None
                    if uid is not None and number is not None:
                        found[uid] = number
            except CommandRefused:
                return {}
            return found

        yield from self._ahead(
            folders, lambda folder: [self._open_command(folder), b"UID FETCH 1:* (UID X-GM-MSGID)"], read
        )

    # Answers --------------------------------------------------------------------

    def _ahead(
        self, folders: Sequence[str], commands: Callable[[str], list[bytes]], read: Callable[[str, _Sent], T]
    ) -> Iterator[tuple[str, T]]:
        """Send each folder's commands ahead of their turn; gives each folder and what was read from its answers."""
        upcoming = iter(folders)
        waiting: deque[tuple[str, _Sent]] = deque()
        while True:
            while len(self._pipeline) < AHEAD and (folder := next(upcoming, None)) is not None:
                try:
                    waiting.append((folder, self._pipeline.send(*commands(folder))))
                except CommandRefused as error:  # its name cannot be sent
                    waiting.append((folder, error))
            if not waiting:
                return
            folder, tags = waiting.popleft()
            yield folder, read(folder, tags)

    def _answers(self, tags: _Sent) -> Iterator[Untagged]:
        if isinstance(tags, CommandRefused):
            raise tags
        return self._pipeline.answers(tags)

    def _tolerated(self, tags: _Sent) -> Iterator[Untagged]:
        """The answers to what can be done without."""
        return iter(()) if isinstance(tags, CommandRefused) else self._pipeline.tolerant(tags, {})

    def _sure(self, parse: Callable[[Untagged], T], untagged: Untagged) -> T:
        """What a response means, where there is no going on without it."""
        try:
            return parse(untagged)
        except Malformed as error:
            raise self._peer.violates(untagged.text) from error

    def flags(self, raw: bytes) -> frozenset[str]:
        """Flags as the server said them; equal ones are kept once."""
        if (known := self._interned.get(raw)) is None:
            if len(self._interned) >= MAX_INTERNED:
                self._interned.clear()
            known = self._interned[raw] = responses.flags(raw)
        return known


class _Listing:
    """The messages of a folder while they are listed, from however many responses (RFC 3501 section 7.4.2).

    ``items`` are what each must have; ``partial`` is what has come of those that have not all.
    """

    def __init__(self, reader: Reader, folder: str, first: int, items: Sequence[bytes]) -> None:
        self._reader = reader
        self.changes = Changes(folder)
        self.first = first
        self.items = tuple(items)
        self.not_sticky = self.is_announced = False
        self.partial: dict[int, dict[bytes, bytes | None]] = {}
        self._new: dict[int, Message] = {}
        self._gone = 0
        #: UIDs by sequence number, and what came without a UID, until a message is expunged and the numbers change.
        self._uid_at: dict[int, int] = {}
        self._without_uid: dict[int, dict[bytes, bytes | None]] = {}

    def read(self, answers: Iterator[Untagged], *, opening: bool = False, only: int = 0) -> None:
        """Take in the answers to a FETCH.

        ``opening``: to SELECT or EXAMINE. How many messages it announces is what
        has to be listed; what comes later need not. ``only``: the one message that was asked for.

        Raises:
            CommandRefused: as ``answers``.
        """
        for untagged in answers:
            text = untagged.text
            try:
                fetched = responses.fetched(text, untagged.literals)
                if fetched is not None:
                    self._take(fetched, only)
                elif text[:9].upper() == b"VANISHED ":
                    self._vanished(text)
                elif text[-8:].upper() == b" EXPUNGE":
                    self._expunged()
                elif text[:17].upper() == b"NO [UIDNOTSTICKY]":
                    self.not_sticky = True
                elif opening:
                    _note_opening(self.changes, untagged)
                    self.is_announced |= text[-7:].upper() == b" EXISTS"
            except Malformed:
                continue  # as if it had not come: what is missing is found out
        for sequence, items in self._without_uid.items():
            if sequence in self._uid_at:
                self._merge(self._uid_at[sequence], items)
        self._without_uid = {}

    def _take(self, fetched: Fetched, only: int) -> None:
        items = fetched.items
        uid = fetched.number(b"UID")
        if uid is None and only and items.keys() - {b"FLAGS", b"MODSEQ"}:
            uid = only  # flags alone may be another message's, that somebody changes meanwhile
        if uid is None:
            if items.keys() & set(self.items):
                self._without_uid.setdefault(fetched.sequence, {}).update(items)
            return
        if uid not in self._new and uid not in self.changes.flags and uid not in self.partial:
            # Most come whole.
            if not self._complete(uid, items):
                self._uid_at[fetched.sequence] = uid
                self.partial[uid] = dict(items)
            return
        self._merge(uid, items)

    def _merge(self, uid: int, items: dict[bytes, bytes | None]) -> None:
        if uid in self.partial:
            self.partial[uid].update(items)
            if self._complete(uid, self.partial[uid]):
                del self.partial[uid]
            return
        raw = items.get(b"FLAGS")
        if raw is None:
            return
        # Somebody changes flags meanwhile.
        if (message := self._new.get(uid)) is not None:
            self._new[uid] = Message(
                uid, message.size, message.internaldate, self._reader.flags(raw), message.remarks, message.is_dated
            )
        elif uid in self.changes.flags:
            self.changes.flags[uid] = self._reader.flags(raw)

    def _complete(self, uid: int, items: Mapping[bytes, bytes | None]) -> bool:
        """Take in a message of which everything is known; whether it is."""
        raw = items.get(b"FLAGS")
        if raw is None:
            return False
        if uid < self.first:
            # "n:*" means at least the last message, even when its UID is below n (RFC 3501 section 9, seq-range).
            self.changes.flags[uid] = self._reader.flags(raw)
            return True
        date = items.get(b"INTERNALDATE")
        size = items.get(b"RFC822.SIZE", b"")
        if date is None or (size == b"" and b"RFC822.SIZE" in self.items):
            return False
        when = responses.internaldate(date)
        if when.seconds is None:
            return False
        remarks = (when.remark,) if when.remark else ()
        self._new[uid] = Message(uid, _size(size), when.seconds, self._reader.flags(raw), remarks)
        return True

    def do_without_sizes(self) -> None:
        """The server refuses them: nobody lacks them."""
        self.items = BUT_SIZES
        for uid in list(self.partial):
            if self._complete(uid, self.partial[uid]):
                del self.partial[uid]

    def conclude(
        self,
        uid: int,
        former: Mapping[bytes, bytes | None],
        words: str,
        dates: Mapping[int, responses.Date] | None = None,
    ) -> None:
        """All was asked for: a message without a date or size is one all the same, one without flags is not.

        ``former``: what came before it was asked for by itself; ``words``: why some of it is refused;
        ``dates``: those of headers, where they were asked for already.
        """
        items = {**former, **self.partial.pop(uid, {})}
        raw = items.get(b"FLAGS")
        if raw is None:
            self.changes.incomplete[uid] = (
                f"the server refuses it: {words}" if words else "the server does not give its flags"
            )
            return
        flags, size = self._reader.flags(raw), _size(items.get(b"RFC822.SIZE"))
        when = responses.internaldate(items.get(b"INTERNALDATE"))
        if when.seconds is not None:
            self._new[uid] = Message(uid, size, when.seconds, flags, (when.remark,) if when.remark else ())
            return
        found = (self._reader.header_dates([uid]) if dates is None else dates).get(uid, responses.Date(None))
        if found.seconds is not None:
            seconds, remark = found.seconds, f"{when.remark}; the date of its header is taken"
        else:
            seconds = int(time.time())
            remark = f"{when.remark}, nor is there one in its header; the present time is taken"
        self._new[uid] = Message(uid, size, seconds, flags, (remark,), is_dated=False)

    def _vanished(self, text: bytes) -> None:
        gone = responses.vanished(text)
        self.changes.vanished += gone
        if b"(EARLIER)" not in text.upper():
            self._expunged(sum(last - first + 1 for first, last in gone))

    def _expunged(self, messages: int = 1) -> None:
        self._gone += messages
        self._uid_at.clear()
        self._without_uid.clear()

    def is_complete(self, uid: int) -> bool:
        """Whether everything of a message is known."""
        return uid in self._new or uid in self.changes.flags

    def named(self) -> set[int]:
        """The UIDs that came, with whatever else."""
        return self._new.keys() | self.changes.flags.keys() | self.partial.keys()

    def count(self) -> int:
        """How many messages are accounted for: listed, or expunged meanwhile."""
        return len(self._new) + len(self.changes.flags) + self._gone

    def lacking(self) -> int:
        """How many of the messages that were announced have not come, not even in part."""
        return max(0, self.changes.exists - self.count() - len(self.partial) - len(self.changes.incomplete))

    def gaps(self) -> set[int]:
        """The UIDs below UIDNEXT that were not named, if they are few: a message without a UID has one of them."""
        named = self.named()
        free = self.changes.uidnext - 1 - len(named)
        return set(range(1, self.changes.uidnext)) - named if 0 < free <= MAX_GAPS else set()

    def finish(self) -> Changes:
        """What was listed."""
        changes = self.changes
        changes.new = sorted(self._new.values(), key=lambda message: message.uid)
        changes.unseen_from = max(self.first, max((message.uid for message in changes.new), default=0) + 1)
        # It is optional before RFC 9051, and may have been outrun while we asked.
        changes.uidnext = max(changes.uidnext, changes.unseen_from)
        return changes

    def is_whole(self, *, some: bool = False) -> bool:
        """Whether all that was announced has come, with everything; ``some``: only some were asked for."""
        if self.partial or self.not_sticky or not self.changes.uidvalidity:
            return False
        return some or not self.changes.complete or self.count() >= self.changes.exists


def _note_opening(changes: Changes, untagged: Untagged) -> None:
    """What the answer to SELECT or EXAMINE says of the folder (RFC 3501 section 7.3.1)."""
    text = untagged.text
    try:
        if text[-7:].upper() == b" EXISTS":
            changes.exists = responses.number(text[:-7])
        elif text[:3].upper() == b"OK ":
            code = responses.code(text[3:])
            if code.name == "UIDVALIDITY":
                changes.uidvalidity = responses.number(code.argument, least=1)
            elif code.name == "UIDNEXT":
                changes.uidnext = responses.number(code.argument, least=1)
    except Malformed:
        return  # as if it had not been said


def _size(raw: bytes | None) -> int:
    try:
        return responses.number(raw or b"", MAX_MODSEQ)
    except Malformed:
        return 0


def _status(values: Mapping[str, int]) -> Status | None:
    """None where the items say nothing: no UIDVALIDITY or MESSAGES, or more than there can be."""
    uidvalidity, uidnext, messages = (values.get(key, 0) for key in ("UIDVALIDITY", "UIDNEXT", "MESSAGES"))
    if "MESSAGES" not in values:
        return None
    if not 0 < uidvalidity <= MAX_NUMBER or uidnext > MAX_NUMBER or messages > MAX_NUMBER:
        return None
    return Status(uidvalidity, uidnext, messages, values.get("HIGHESTMODSEQ", 0))


def _date_of(header: bytes) -> responses.Date:
    """When a message was received last, else written, by its header."""
    parsed = BytesHeaderParser(policy=compat32).parsebytes(header[:65536])
    received = [str(each).rpartition(";")[2].strip() for each in parsed.get_all("Received", [])][:1]
    for text in (*received, str(parsed.get("Date", ""))):
        found = responses.header_date(text.encode("ascii", "replace"))
        if found.seconds is not None:
            return found
    return responses.Date(None)


def _text(name: bytes) -> str:
    """Bytes of a server as text that is the same bytes again when it is sent (PEP 383)."""
    return name.decode("utf-8", "surrogateescape")


def _folder_name(name: bytes) -> str:
    """INBOX in any case is INBOX (RFC 3501 section 5.1); any other name is as it is."""
    return "INBOX" if name.upper() == b"INBOX" else _text(name)


def _folder(name: str, listed: Listed) -> ListedFolder:
    attributes = frozenset(listed.attributes)
    selectable = not {"\\noselect", "\\nonexistent"} & attributes
    return ListedFolder(name, selectable, _special_use(attributes), _text(listed.delimiter), attributes)


def _special_use(attributes: frozenset[str]) -> str:
    return next((use for use in sorted(SPECIAL_USES) if use.lower() in attributes), "")


def sets(uids: Sequence[int]) -> Iterator[bytes]:
    """Ascending UIDs as sequence sets that are short enough for one command each."""
    step = LINE // 11  # digits of the longest, and a comma
    for start in range(0, len(uids), step):
        yield uid_set(list(uids[start : start + step]))


def insist(statuses: Mapping[str, T | FolderRefused]) -> dict[str, T]:
    """The same, where no folder may be left out.

    Raises:
        FolderNotReadable: the first that cannot be read.
    """
    found: dict[str, T] = {}
    for name, status in statuses.items():
        if isinstance(status, FolderRefused):
            raise status.error()
        found[name] = status
    return found


def insisted(changes: Iterable[Changes | FolderRefused]) -> Iterator[Changes]:
    """The same, where no folder and no message may be left out.

    Raises:
        FolderNotReadable: a folder cannot be read, or a message of it has not all that a message must have.
    """
    for each in changes:
        if isinstance(each, FolderRefused):
            raise each.error()
        if each.incomplete or each.nameless:
            raise unlisted(each)
        yield each


def unlisted(changes: Changes) -> FolderNotReadable:
    """The error that the server announces more messages of a folder than it lists."""
    lost = [f"UID {uid}: {reason}" for uid, reason in sorted(changes.incomplete.items())][:5]
    if changes.nameless:
        lost.append(f"{changes.exists} messages announced, {changes.exists - changes.nameless} named")
    return FolderNotReadable(
        f"the folder {printable(changes.folder, 120)!r} is not listed whole: {'; '.join(lost)}",
        hint="Look at the folder there with another program; move or remove the message that it does not show.",
    )


__all__ = [
    "BATCH_BYTES",
    "BATCH_MESSAGES",
    "Batch",
    "Changes",
    "FolderNotReadable",
    "FolderRefused",
    "Layout",
    "ListedFolder",
    "Message",
    "Reader",
    "Status",
    "Wanted",
    "batches",
    "insist",
    "insisted",
    "is_told_to_wait",
    "sets",
    "unlisted",
]
