"""Reading a legacy mailbox: folders, flags, bodies. Nothing there is changed.

Folders are opened with EXAMINE and bodies read with BODY.PEEK (RFC 3501
sections 6.3.2 and 6.4.5): no message becomes seen, none loses its \\Recent.
"""

from __future__ import annotations

import re
from calendar import timegm
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from threading import Lock
from typing import Self

from imapclient import IMAPClient

from bascule.errors import BasculeError, LegacyUnavailable
from bascule.imap.pipeline import CommandRefused, Pipeline, Receive, Token, Untagged, Wire, quoted, uid_set, unquoted

AHEAD = 32  # commands that are sent before their turn, at most
BATCH_MESSAGES, BATCH_BYTES = 100, 4 << 20  # that one FETCH asks for, at most (a larger message comes alone)
EVERYTHING = b"(UID FLAGS RFC822.SIZE INTERNALDATE)"  # but the body
BUT_SIZES = b"(UID FLAGS INTERNALDATE)"

_FETCH = re.compile(rb"\d+ FETCH \(", re.IGNORECASE)
_ITEM = re.compile(rb'([A-Z0-9.\[\]<>-]+) (\([^()]*\)|"(?:[^"\\]|\\.)*"|~?\{\d+\+?\}|[^ ()]+)', re.IGNORECASE)
_CODE = re.compile(rb"^OK \[(UIDVALIDITY|UIDNEXT|HIGHESTMODSEQ) (\d+)\]", re.IGNORECASE)
_STATUS = re.compile(rb"(MESSAGES|UIDNEXT|UIDVALIDITY|HIGHESTMODSEQ) (\d+)", re.IGNORECASE)
_DATE = re.compile(rb'"([ \d]\d)-([A-Za-z]{3})-(\d{4}) (\d\d):(\d\d):(\d\d) ([+-])(\d\d)(\d\d)"')
_MONTHS = {name: n for n, name in enumerate(b"Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split(), 1)}
#: System flags are compared without case.
_CANONICAL = {flag.lower(): flag for flag in ("\\Draft", "\\Flagged", "\\Answered", "\\Seen", "\\Deleted")}
#: RFC 6154 section 2, but for the two that name a view of all folders.
SPECIAL_USES = frozenset({"\\Archive", "\\Drafts", "\\Junk", "\\Sent", "\\Trash"})


@dataclass(frozen=True, slots=True)
class ListedFolder:
    """A folder as listed. ``name`` is as on the wire; ``special_use`` is empty or one of RFC 6154."""

    name: str
    selectable: bool
    special_use: str = ""
    #: Its own hierarchy delimiter; empty: the name is flat.
    delimiter: str = "/"


@dataclass(frozen=True, slots=True)
class Layout:
    """The folder tree: its separator, the prefix of the personal namespace, the folders, the subscribed names."""

    separator: str
    prefix: str
    folders: tuple[ListedFolder, ...]
    subscribed: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Status:
    """A folder as STATUS gives it; ``highestmodseq`` is 0 where there is none (RFC 7162)."""

    uidvalidity: int
    uidnext: int
    messages: int
    highestmodseq: int = 0


@dataclass(frozen=True, slots=True)
class Message:
    """``size`` is RFC822.SIZE, which need not be true, or 0 where the server does not tell it.

    ``internaldate`` is in seconds since 1970.
    """

    uid: int
    size: int
    internaldate: int
    flags: frozenset[str]


@dataclass(slots=True)
class Changes:
    """What a folder has and had.

    ``complete``: whether ``flags`` names every message of the folder below
    ``new``; else only those that changed, and ``vanished`` those that are gone.
    ``new`` are the messages from a first UID on, with everything but their bodies.
    """

    folder: str
    uidvalidity: int = 0
    uidnext: int = 0
    exists: int = 0
    #: The highest UID that was seen, for whoever needs it.
    seen: int = 0
    complete: bool = True
    flags: dict[int, frozenset[str]] = field(default_factory=dict)
    vanished: list[tuple[int, int]] = field(default_factory=list)
    new: list[Message] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Batch:
    """Messages of one folder whose bodies are asked for together."""

    folder: str
    messages: tuple[Message, ...]


class Wanted:
    """The batches that are still to be fetched, shared by the sessions of one mailbox.

    Messages that did not come are wanted again, each by itself; what does not
    come then either is in ``not_given_at_all``, by folder and UID with the reason.
    """

    def __init__(self, batches: Iterable[Batch]) -> None:
        self._batches = deque(batches)
        self._singles: set[tuple[str, int]] = set()
        self._lock = Lock()
        self.not_given_at_all: dict[tuple[str, int], str] = {}

    def __len__(self) -> int:
        return len(self._batches)

    def take(self) -> Batch | None:
        with self._lock:
            return self._batches.popleft() if self._batches else None

    def stop(self) -> None:
        """Want nothing any more."""
        with self._lock:
            self._batches.clear()

    def put_back(self, batches: Iterable[Batch]) -> None:
        with self._lock:
            self._batches.extendleft(reversed(list(batches)))

    def not_given(self, batch: Batch, reason: str) -> None:
        with self._lock:
            for message in batch.messages:
                key = (batch.folder, message.uid)
                if key in self._singles:
                    self.not_given_at_all[key] = reason
                else:
                    self._singles.add(key)
                    self._batches.append(Batch(batch.folder, (message,)))


def batches(folder: str, messages: Iterable[Message]) -> Iterator[Batch]:
    """Cut messages into what one FETCH may ask for."""
    group: list[Message] = []
    size = 0
    for message in messages:
        if group and (len(group) == BATCH_MESSAGES or size + message.size > BATCH_BYTES):
            yield Batch(folder, tuple(group))
            group, size = [], 0
        group.append(message)
        size += message.size
    if group:
        yield Batch(folder, tuple(group))


class Reader:
    """A logged-in session, used by one thread at a time."""

    def __init__(
        self, wire: Wire, capabilities: AbstractSet[str], spent: Callable[[int], None] = lambda _: None
    ) -> None:
        #: For another's use while nothing is under way here.
        self.wire = wire
        self._pipeline = Pipeline(wire, spent)
        self._capabilities = capabilities
        self._interned: dict[bytes, frozenset[str]] = {}
        if "QRESYNC" in self._capabilities and "ENABLE" in self._capabilities:
            self._pipeline.run(b"ENABLE QRESYNC")

    @property
    def _has_modseq(self) -> bool:
        return bool({"CONDSTORE", "QRESYNC"} & self._capabilities)

    @classmethod
    def of(cls, client: IMAPClient, spent: Callable[[int], None] = lambda _: None) -> Self:
        """A source on the connection of a client that has just logged in."""
        said = (each.decode(errors="replace") if isinstance(each, bytes) else each for each in client.capabilities())
        # What imaplib has read ahead is read by its own public read and readline, and by nothing else.
        return cls(client._imap, frozenset(each.upper() for each in said), spent)

    # The tree -----------------------------------------------------------------

    def layout(self) -> Layout:
        """The folders, in one round trip; what others share with the user stays theirs (RFC 2342)."""
        extended = {"LIST-EXTENDED", "SPECIAL-USE"} <= self._capabilities
        commands = [b'LIST "" "*" RETURN (SPECIAL-USE)' if extended else b'LIST "" "*"', b'LSUB "" "*"']
        if "NAMESPACE" in self._capabilities:
            commands.append(b"NAMESPACE")
        listed, subscribed, prefix = [], [], ""
        foreign: list[str] = []
        for untagged in self._pipeline.run(*commands):
            kind = untagged.text[:5].upper()
            if kind == b"LIST ":
                listed.append(_listed(untagged))
            elif kind == b"LSUB ":
                subscribed.append(_listed(untagged))
            elif untagged.text[:10].upper() == b"NAMESPACE ":
                prefix, foreign = _namespaces(untagged)
        others = tuple(foreign)
        separator = next((delimiter for _, delimiter, _ in listed if delimiter), "/")
        return Layout(
            separator,
            prefix,
            tuple(_folder(flags, delimiter, name) for flags, delimiter, name in listed if not name.startswith(others)),
            tuple(
                name
                for flags, _, name in subscribed
                # In an LSUB answer it means: not subscribed, but something below is (RFC 3501 section 6.3.9).
                if "\\noselect" not in flags and not name.startswith(others)
            ),
        )

    def statuses(self, folders: Sequence[str]) -> dict[str, Status]:
        """The STATUS of many folders, in about one round trip.

        Raises:
            LegacyUnavailable: one cannot be opened.
        """
        items = b"MESSAGES UIDNEXT UIDVALIDITY" + (b" HIGHESTMODSEQ" if self._has_modseq else b"")
        found = {}
        for start in range(0, len(folders), AHEAD):
            some = folders[start : start + AHEAD]
            tags = self._pipeline.send(*(b"STATUS %s (%s)" % (quoted(name), items) for name in some))
            for untagged in self._opening(f"one of {', '.join(some)}", self._pipeline.answers(tags)):
                if untagged.text[:7].upper() != b"STATUS ":
                    continue
                name = _text(untagged.tokens()[1])
                # The items are the last parentheses; the name before them may hold anything.
                last = untagged.text.rpartition(b"(")[2]
                values = {key.upper(): int(value) for key, value in _STATUS.findall(last)}
                found["INBOX" if name.upper() == "INBOX" else name] = Status(
                    values.get(b"UIDVALIDITY", 0),
                    values.get(b"UIDNEXT", 0),
                    values.get(b"MESSAGES", 0),
                    values.get(b"HIGHESTMODSEQ", 0),
                )
        for name in folders:
            if name not in found or not found[name].uidvalidity:
                raise LegacyUnavailable(f"the legacy server gives no UIDVALIDITY for {name!r}")
        return {name: found[name] for name in folders}

    # What changed ---------------------------------------------------------------

    def changes(self, wanted: Iterable[tuple[str, Status | None]], *, sizes: bool = True) -> Iterator[Changes]:
        """For each folder, what changed since a former STATUS; without one, everything it has.

        The folders are asked ahead of their turn. ``sizes``: whether the sizes of
        new messages are asked for; a server may fail for all because of one.

        Raises:
            LegacyUnavailable: a folder cannot be opened, or has no persistent UIDs.
        """
        since_of = dict(wanted)
        refused = []

        def commands(folder: str) -> list[bytes]:
            return self._changes_commands(folder, since_of[folder], EVERYTHING if sizes else BUT_SIZES)

        for folder, answers in self._ahead(list(since_of), commands):
            try:
                yield self._changes(folder, since_of[folder], answers)
            except CommandRefused:
                refused.append(folder)
        # One message that the server cannot read, and it refuses the sizes of all.
        for folder in refused:
            tags = self._pipeline.send(*self._changes_commands(folder, since_of[folder], BUT_SIZES))
            yield self._changes(folder, since_of[folder], self._opening(folder, self._pipeline.answers(tags)))

    def _changes(self, folder: str, since: Status | None, answers: Iterator[Untagged]) -> Changes:
        changes = Changes(folder, complete=since is None or not since.highestmodseq)
        first = since.uidnext if since is not None else 1
        self._read_changes(changes, answers, first)
        if not changes.uidvalidity:
            raise LegacyUnavailable(f"the legacy server gives no UIDVALIDITY for {folder!r}")
        # UIDNEXT is optional before RFC 9051, and may have been outrun while we asked.
        top = max((message.uid for message in changes.new), default=0)
        changes.uidnext = max(changes.uidnext, top + 1, first)
        return changes

    def newer(self, wanted: Iterable[tuple[str, int]]) -> Iterator[Changes]:
        """For each folder, the messages from a UID on, without their sizes.

        Raises:
            LegacyUnavailable: as :meth:`changes`.
        """
        first_of = dict(wanted)

        def commands(folder: str) -> list[bytes]:
            return [b"EXAMINE %s" % quoted(folder), b"UID FETCH %d:* %s" % (first_of[folder], BUT_SIZES)]

        for folder, answers in self._ahead(list(first_of), commands):
            changes = Changes(folder)
            self._read_changes(changes, self._opening(folder, answers), first_of[folder])
            yield changes

    def _changes_commands(self, folder: str, since: Status | None, items: bytes) -> list[bytes]:
        name = quoted(folder)
        if since is None:
            return [b"EXAMINE %s" % name, b"UID FETCH 1:* %s" % items]
        newer = b"UID FETCH %d:* %s" % (since.uidnext, items)
        older = b"1:%d" % max(since.uidnext - 1, 1)
        if not since.highestmodseq:
            return [b"EXAMINE %s" % name, b"UID FETCH %s (UID FLAGS)" % older, newer]
        if "QRESYNC" in self._capabilities:
            known = b"%d %d" % (since.uidvalidity, since.highestmodseq)
            return [b"EXAMINE %s (QRESYNC (%s))" % (name, known), newer]
        changed = b"UID FETCH %s (UID FLAGS) (CHANGEDSINCE %d)" % (older, since.highestmodseq)
        return [b"EXAMINE %s (CONDSTORE)" % name, changed, newer]

    def _read_changes(self, changes: Changes, answers: Iterator[Untagged], first: int) -> None:
        for untagged in answers:
            text = untagged.text
            if (items := _fetched(text)) is not None:
                if b"UID" not in items or b"FLAGS" not in items:
                    continue  # somebody changes flags meanwhile: the next pass sees it
                uid, flags = int(items[b"UID"]), self._flags(items[b"FLAGS"])
                # "n:*" means at least the last message, even when its UID is below n (RFC 3501 section 9, seq-range).
                if b"INTERNALDATE" in items and uid >= first:
                    date = _internaldate(items[b"INTERNALDATE"])
                    changes.new.append(Message(uid, int(items.get(b"RFC822.SIZE", b"0")), date, flags))
                elif uid < first:
                    changes.flags[uid] = flags
            elif text[:9].upper() == b"VANISHED ":
                for part in text.rpartition(b" ")[2].split(b","):
                    start, _, end = part.partition(b":")
                    changes.vanished.append((int(start), int(end or start)))
            elif (code := _CODE.match(text)) is not None:
                if code[1].upper() == b"UIDVALIDITY":
                    changes.uidvalidity = int(code[2])
                elif code[1].upper() == b"UIDNEXT":
                    changes.uidnext = int(code[2])
            elif text[-7:].upper() == b" EXISTS":
                changes.exists = int(text[:-7])
            elif text[:17].upper() == b"NO [UIDNOTSTICKY]":
                raise LegacyUnavailable(f"the folder {changes.folder!r} has no persistent UIDs on the legacy server")

    # Bodies -------------------------------------------------------------------

    def bodies(
        self,
        wanted: Wanted,
        receive: Receive,
        keep: Callable[[str, Message, object], None],
    ) -> None:
        """Fetch the bodies that are wanted, several commands ahead, until there are none left.

        ``receive`` takes a body off the line, ``keep`` gets what it made of it.
        A message that is gone meanwhile is left out. Whatever happens, what was
        asked for and not answered is wanted again.
        """
        asked: dict[bytes, Batch | str] = {}  # by tag; a string: the EXAMINE of that folder
        last_examined = opened = ""
        missing: dict[tuple[str, int], Message] = {}
        try:
            while True:
                while len(asked) < AHEAD and (batch := wanted.take()) is not None:
                    if batch.folder != last_examined:
                        last_examined = batch.folder
                        asked[self._pipeline.send(b"EXAMINE %s" % quoted(last_examined))[0]] = last_examined
                    missing |= {(batch.folder, message.uid): message for message in batch.messages}
                    uids = uid_set([message.uid for message in batch.messages])
                    asked[self._pipeline.send(b"UID FETCH %s (UID BODY.PEEK[])" % uids)[0]] = batch
                if not asked:
                    return
                response = self._pipeline.read(receive)
                if isinstance(response, Untagged):
                    self._take(opened, response, missing, receive, keep)
                    continue
                done, refused = asked.pop(response.tag), response.refused
                if isinstance(done, str):
                    _insist_on_open(done, refused)
                    opened = done
                    continue
                left = [message for message in done.messages if missing.pop((done.folder, message.uid), None)]
                if left:
                    why = f"refuses it: {refused.message}" if refused else "answers without it"
                    wanted.not_given(Batch(done.folder, tuple(left)), f"the legacy server {why}")
        except BaseException:
            unanswered = [
                Batch(each.folder, tuple(m for m in each.messages if (each.folder, m.uid) in missing))
                for each in asked.values()
                if not isinstance(each, str)
            ]
            # Those of the folder that is open were being answered: the server may have failed because of one.
            for batch in unanswered:
                if batch.folder == opened and batch is unanswered[0]:
                    wanted.not_given(batch, "the legacy server ends the session when it is asked for")
                elif batch.messages:
                    wanted.put_back([batch])
            raise

    def _take(
        self,
        folder: str,
        untagged: Untagged,
        missing: dict[tuple[str, int], Message],
        receive: Receive,
        keep: Callable[[str, Message, object], None],
    ) -> None:
        items = _fetched(untagged.text)
        if items is None:
            return
        message = missing.get((folder, int(items.get(b"UID", b"0"))))
        if message is None or b"BODY[]" not in items:
            return
        body = untagged.body
        if body is None:
            value = items[b"BODY[]"]
            if value.upper() == b"NIL":
                return
            text = unquoted(value)  # a short one may be a quoted string
            body = receive(len(text), iter((text,)))
        del missing[folder, message.uid]
        keep(folder, message, body)

    def which_are_there(self, folder: str, uids: list[int]) -> set[int]:
        """Those of the UIDs that the folder still has."""
        tags = self._pipeline.send(b"EXAMINE %s" % quoted(folder), b"UID FETCH %s (UID FLAGS)" % uid_set(uids))
        found = Changes(folder)
        self._read_changes(found, self._opening(folder, self._pipeline.answers(tags)), 1 << 33)
        return found.flags.keys() & set(uids)

    def guids(self, folder: str) -> dict[int, str]:
        """The GUID that Dovecot gives each message (its own FETCH item X-GUID), by UID."""
        tags = self._pipeline.send(b"EXAMINE %s" % quoted(folder), b"UID FETCH 1:* (UID X-GUID)")
        found = {}
        for untagged in self._opening(folder, self._pipeline.answers(tags)):
            items = _fetched(untagged.text) or {}
            if b"UID" in items and b"X-GUID" in items:
                found[int(items[b"UID"])] = items[b"X-GUID"].strip(b'"').decode()
        return found

    # Answers --------------------------------------------------------------------

    def _ahead(
        self, folders: Sequence[str], commands: Callable[[str], list[bytes]]
    ) -> Iterator[tuple[str, Iterator[Untagged]]]:
        """Send each folder's commands, the first an EXAMINE, ahead of its turn; gives the folder and its answers."""
        upcoming = iter(folders)
        waiting: deque[tuple[str, list[bytes]]] = deque()
        while True:
            while len(self._pipeline) < AHEAD and (folder := next(upcoming, None)) is not None:
                waiting.append((folder, self._pipeline.send(*commands(folder))))
            if not waiting:
                return
            folder, tags = waiting.popleft()
            yield folder, self._pipeline.answers(tags)

    def _opening(self, folder: str, answers: Iterator[Untagged]) -> Iterator[Untagged]:
        try:
            yield from answers
        except CommandRefused as error:
            raise _cannot_open(folder, error) from error

    def _flags(self, raw: bytes) -> frozenset[str]:
        """Flags and keywords but for \\Recent, which belongs to a session (RFC 3501 section 2.3.2)."""
        if (known := self._interned.get(raw)) is None:
            names = raw.strip(b"()").decode(errors="replace").split()
            known = frozenset(_CANONICAL.get(name.lower(), name) for name in names if name.lower() != "\\recent")
            self._interned[raw] = known
        return known


def _fetched(text: bytes) -> dict[bytes, bytes] | None:
    """The items of a FETCH response by name, upper case; None for any other response."""
    fetch = _FETCH.match(text)
    return None if fetch is None else {key.upper(): value for key, value in _ITEM.findall(text, fetch.end())}


def _insist_on_open(folder: str, refused: CommandRefused | None) -> None:
    if refused is not None:
        raise _cannot_open(folder, refused)


def _cannot_open(folder: str, refused: CommandRefused) -> LegacyUnavailable:
    return LegacyUnavailable(f"the folder {folder!r} cannot be opened on the legacy server: {refused.message}")


def _namespaces(untagged: Untagged) -> tuple[str, list[str]]:
    """The prefix of the personal namespace, and those of other users' and shared ones."""
    personal, *others = [each if isinstance(each, list) else [] for each in untagged.tokens()[1:]]
    first = personal[0] if personal else None
    prefix = _text(first[0]) if isinstance(first, list) else ""
    found = [namespace[0] for other in others for namespace in other if isinstance(namespace, list)]
    return prefix, [_text(each) for each in found if each]  # an empty prefix would mean every folder


def _text(name: Token) -> str:
    if not isinstance(name, bytes):
        return ""
    try:
        return name.decode()
    except UnicodeDecodeError as error:
        raise BasculeError(f"the legacy server has a folder whose name is not text: {name!r}") from error


def _listed(untagged: Untagged) -> tuple[frozenset[str], str, str]:
    """Attributes (lower case), separator and name of a LIST or LSUB response."""
    match untagged.tokens():
        case [_, list(attributes), delimiter, name, *_]:
            return frozenset(_text(each).lower() for each in attributes), _text(delimiter), _text(name)
    raise LegacyUnavailable(f"the legacy server does not speak IMAP: {untagged.text[:80]!r}")


def _folder(attributes: frozenset[str], delimiter: str, name: str) -> ListedFolder:
    uses = [use for use in SPECIAL_USES if use.lower() in attributes]
    return ListedFolder(name, not {"\\noselect", "\\nonexistent"} & attributes, uses[0] if uses else "", delimiter)


def _internaldate(raw: bytes) -> int:
    """Seconds since 1970 of a quoted date-time (RFC 3501 section 9)."""
    match = _DATE.fullmatch(raw)
    if match is None or match[2].title() not in _MONTHS:
        raise LegacyUnavailable(f"the legacy server gives {raw!r} for a date")
    day, month, year, hour, minute, second, sign, hours, minutes = match.groups()
    local = timegm((int(year), _MONTHS[month.title()], int(day), int(hour), int(minute), int(second)))
    offset = int(hours) * 3600 + int(minutes) * 60
    return local + offset if sign == b"-" else local - offset
