"""Which messages of a legacy folder came late, and which are here already: decided without I/O.

First by place: a message is where it was known to be, under its UID, with its
INTERNALDATE. What is not is read, with those of the same second, and looked for
by its content among those that are no longer where they were: the server has
numbered them anew. Each of those accounts for one message, so that two equal
ones stay two. What nobody accounts for came late.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from bascule.imap.reader import Message
from bascule.migrator.acts import Identity, Note, Straggler
from bascule.migrator.known import LAST, Key, Known, Print
from bascule.migrator.maildir import storable_date


@dataclass(frozen=True, slots=True)
class Content:
    """What a message holds: SHA-256 and length of its bytes as Dovecot serves them, and its Message-ID."""

    digest: bytes
    size: int
    message_id: str


class Verdict(Enum):
    """What was found out of a message that is not where something known was."""

    KNOWN = "it is here, and was numbered anew"
    LATE = "it came late"
    UNDECIDED = "it may be one that was removed here, or one that came late"


class Here(Protocol):
    """The mailbox here, for questions about contents."""

    def digest_at(self, uid: int) -> bytes | None:
        """The digest of the message that was copied under this UID, if it is still in its folder."""

    def holds(self, content: Content) -> bool:
        """Whether any folder has such a message."""


@dataclass(slots=True)
class Sorting:
    """The messages of one folder, sorted by place.

    ``doubtful`` are those whose contents must be read; ``is_renumbered``: one of
    them has the INTERNALDATE of a message that is not seen in its own place.
    """

    uidvalidity: int
    doubtful: list[Message] = field(default_factory=list)
    is_renumbered: bool = False
    #: What is known and was not seen in its place.
    free_prints: dict[Key, Print] = field(default_factory=dict)
    free_stragglers: dict[Key, Straggler] = field(default_factory=dict)
    free_notes: list[Note] = field(default_factory=list)


def sort_by_place(
    known: Known,
    uidvalidity: int,
    messages: Iterable[Message],
    stragglers: Iterable[Straggler],
    notes: Iterable[Note],
    waived: AbstractSet[Identity],
) -> Sorting:
    """Sort messages that a folder with ``uidvalidity`` has; all arguments are of this one folder.

    ``known`` learns the messages that need not come.
    """
    all_stragglers = {(each.uidvalidity, each.uid): each for each in stragglers}
    result = Sorting(uidvalidity, free_prints=dict(known.prints), free_stragglers=dict(all_stragglers))
    by_uid = {note.legacy_uid: note for note in notes if note.legacy_uidvalidity in {None, uidvalidity}}
    by_uid.pop(None, None)
    result.free_notes = [note for note in notes if by_uid.get(note.legacy_uid) is not note]
    by_date: dict[int, list[tuple[Message, Key]]] = {}
    for message in messages:
        key = (uidvalidity, message.uid)
        straggler = result.free_stragglers.get(key)
        if (seen := result.free_prints.get(key)) is not None and seen.is_of(message):
            if seen.digest or seen.size:
                by_date.setdefault(message.internaldate, []).append((message, key))
            del result.free_prints[key]
        elif straggler is not None and may_be(straggler, message):
            if straggler.digest is not None:
                by_date.setdefault(message.internaldate, []).append((message, key))
            del result.free_stragglers[key]
        elif message.uid in by_uid:
            del by_uid[message.uid]
        elif seen is None and (_is_presumed(known, key) or (known.folder, *key) in waived):
            origin = message.uid if message.uid < known.uidnext else 0
            known.prints[key] = Print(storable_date(message.internaldate), message.size, origin)
        else:
            result.doubtful.append(message)
    # One of the same second may have taken another's UID: who is where is a question of contents then.
    for date in {message.internaldate for message in result.doubtful}:
        for message, key in by_date.get(date, ()):
            result.doubtful.append(message)
            if key in known.prints:
                result.free_prints[key] = known.prints[key]
            else:
                result.free_stragglers[key] = all_stragglers[key]
    result.doubtful.sort(key=lambda each: each.uid)
    result.free_notes.extend(by_uid.values())
    dates = {each.internaldate for each in result.free_prints.values()}
    dates |= {
        storable_date(each.internaldate) for each in result.free_stragglers.values() if each.internaldate is not None
    }
    result.is_renumbered = any(
        not message.is_dated or storable_date(message.internaldate) in dates for message in result.doubtful
    )
    return result


def _is_presumed(known: Known, key: Key) -> bool:
    uidvalidity, uid = key
    return not known.complete and uidvalidity == known.uidvalidity and uid < known.uidnext


class Identification:
    """Finds out, one after the other, what the doubtful messages of a folder are.

    First :meth:`exactly` for all of them, then :meth:`anyhow` for those that are
    left: two that are equal but for their INTERNALDATE do not take each other's place.
    """

    def __init__(self, sorting: Sorting, known: Known, here: Here) -> None:
        self._sorting = sorting
        self._known = known
        self._here = here
        #: The UIDVALIDITY and UID of each straggler that was numbered anew.
        self.moved_stragglers: dict[Key, Key] = {}
        #: The UID of each note whose message was found.
        self.found_notes: list[tuple[Note, int]] = []
        self._moved_prints: dict[Key, Print] = {}
        self._by_date: dict[int, list[Key]] = {}
        for key, each in sorting.free_prints.items():
            self._by_date.setdefault(each.internaldate, []).append(key)

    def exactly(self, message: Message, content: Content) -> bool:
        """Whether it is one that is known, with the very INTERNALDATE; it is accounted for then."""
        free = self._sorting
        for key, straggler in free.free_stragglers.items():
            if straggler.digest == content.digest and may_be(straggler, message):
                return self._take_straggler(key, message)
        for note in free.free_notes:
            # There are servers that alter what is appended.
            if note.digest == content.digest or (
                note.message_id == content.message_id and note.internaldate == message.internaldate
            ):
                free.free_notes.remove(note)
                self.found_notes.append((note, message.uid))
                return True
        for key in self._candidates(message):
            if self._is_it(key, content):
                return self._take_print(key, message, content)
        return False

    def anyhow(self, message: Message, content: Content) -> Verdict:
        """What a message is that :meth:`exactly` does not know."""
        free = self._sorting
        # In a folder that was made anew the dates may be of the day on which it was; in another they do not change.
        for key, straggler in free.free_stragglers.items():
            if straggler.digest == content.digest and key[0] != free.uidvalidity:
                self._take_straggler(key, message)
                return Verdict.KNOWN
        for key in list(free.free_prints):
            if key[0] != free.uidvalidity and self._is_it(key, content):
                self._take_print(key, message, content)
                return Verdict.KNOWN
        # Without evidence, what its owner removed from its folder here is known by date and size alone.
        for key in self._candidates(message):
            each = free.free_prints.get(key)
            if each is None or each.digest or each.size not in {0, content.size}:
                continue
            if each.origin > 0 and self._here.digest_at(each.origin) is not None:
                continue  # it is here, and another one
            if each.origin > 0 and self._here.holds(content):
                self._take_print(key, message, content)
                return Verdict.KNOWN
            return Verdict.UNDECIDED
        if content.message_id and any(
            note.legacy_uid is None and note.message_id == content.message_id for note in free.free_notes
        ):
            return Verdict.UNDECIDED
        return Verdict.LATE

    def is_last(self, message: Message, content: Content) -> None:
        """It is the last message, which is of our own making."""
        self._moved_prints[self._sorting.uidvalidity, message.uid] = _print(message, content, LAST)

    def finish(self) -> None:
        """Have ``known`` learn what was found out until now."""
        self._known.prints.update(self._moved_prints)  # whoever had one of these UIDs has it no longer
        self._moved_prints = {}

    # ------------------------------------------------------------------------------

    def _candidates(self, message: Message) -> Iterable[Key]:
        """What was known, is not in its place, and has the date of a message."""
        if not message.is_dated:
            return list(self._sorting.free_prints)
        return self._by_date.get(storable_date(message.internaldate), ())

    def _is_it(self, key: Key, content: Content) -> bool:
        """Whether what was known under ``key``, and is not seen there, had this content."""
        each = self._sorting.free_prints.get(key)
        if each is None:
            return False
        if each.digest:
            return content.digest.hex().startswith(each.digest)
        return (
            each.origin > 0 and each.size in {0, content.size} and self._here.digest_at(each.origin) == content.digest
        )

    def _take_straggler(self, key: Key, message: Message) -> bool:
        del self._sorting.free_stragglers[key]
        self.moved_stragglers[key] = (self._sorting.uidvalidity, message.uid)
        return True

    def _take_print(self, key: Key, message: Message, content: Content) -> bool:
        each = self._sorting.free_prints.pop(key)
        self._known.prints.pop(key, None)
        self._moved_prints[self._sorting.uidvalidity, message.uid] = _print(message, content, each.origin)
        return True


def may_be(straggler: Straggler, message: Message) -> bool:
    """Whether the date of a message at the legacy server allows that it is this one."""
    return not message.is_dated or straggler.internaldate in {None, message.internaldate}


def _print(message: Message, content: Content, origin: int) -> Print:
    return Print(storable_date(message.internaldate), content.size, origin, content.digest.hex()[:32])
