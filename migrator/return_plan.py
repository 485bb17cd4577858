"""What a return has to do at the legacy server: made of what is seen on both sides, without I/O.

The legacy mailbox is to become equal to the one here. A message here is at the
legacy server already if it was copied from there, came late there, or was
appended by a return; else it is appended. What is there and not here any more
is expunged, if it was here once: nothing else ever is.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from bascule.errors import BasculeError
from bascule.imap.reader import Message
from bascule.migrator.acts import Identity, Note, Straggler
from bascule.migrator.delivery import ARRIVING, file_name
from bascule.migrator.known import Known
from bascule.migrator.late import may_be

FEW = 20  # messages that a folder may lose without anybody being asked

#: Folder and UID of a message.
Place = tuple[str, int]


class Implausible(BasculeError):
    """A return would remove more at the legacy server than anybody is likely to want."""


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder of one side. ``guids`` are Dovecot's; ``kept`` are the flags that the server keeps, None: any.

    ``refused`` are those, in lower case, that it turned out not to keep.
    """

    uidvalidity: int
    messages: Mapping[int, Message] = field(default_factory=dict)
    guids: Mapping[int, str] = field(default_factory=dict)
    kept: AbstractSet[str] | None = None
    refused: AbstractSet[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Side:
    """A mailbox, here or there: its selectable folders and the subscribed names."""

    folders: Mapping[str, Folder]
    subscribed: AbstractSet[str] = frozenset()
    separator: str = "/"


@dataclass(frozen=True, slots=True)
class Records:
    """What was recorded of both: the flip by folder, late messages, what returns appended, and waivers."""

    known: Mapping[str, Known]
    stragglers: Iterable[Straggler] = ()
    notes: Iterable[Note] = ()
    waived: AbstractSet[Identity] = frozenset()


@dataclass(frozen=True, slots=True)
class Store:
    """Flags that messages of a folder there are to get, or to lose."""

    folder: str
    flags: frozenset[str]
    wanted: bool
    uids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """In this order: folders are made, subscriptions changed, messages appended; then, and only then, others expunged.

    ``appends`` are folder and UID of messages here, the others are of the legacy server.
    """

    creates: tuple[str, ...] = ()
    subscriptions: tuple[tuple[str, bool], ...] = ()
    appends: tuple[Place, ...] = ()
    expunges: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    stores: tuple[Store, ...] = ()
    deletes: tuple[str, ...] = ()
    #: Where each message here is at the legacy server.
    places: Mapping[Place, Place] = field(default_factory=dict)

    def __len__(self) -> int:
        """How much is to be done. Subscriptions and folders too many are no reason to go on."""
        return (
            len(self.creates)
            + len(self.appends)
            + sum(map(len, self.expunges.values()))
            + sum(len(store.uids) for store in self.stores)
        )

    def why(self) -> str:
        """The first thing that is to be done, in words."""
        for name in self.creates:
            return f"the folder {name!r} is not there"
        for name, uid in self.appends:
            return f"the message with UID {uid} here in {name!r} is not there"
        for name, uids in self.expunges.items():
            return f"the message with UID {uids[0]} there in {name!r} is not here"
        for store in self.stores:
            verb = "lacks" if store.wanted else "has"
            return (
                f"the message with UID {store.uids[0]} there in {store.folder!r} {verb} {' '.join(sorted(store.flags))}"
            )
        return ""


def plan(here: Side, there: Side, records: Records) -> Plan:
    """What makes the legacy mailbox equal to the one here."""
    places, appended = _places(here, there, records)
    missing = tuple(
        (name, uid)
        for name, folder in here.folders.items()
        for uid in sorted(folder.messages)
        if (name, uid) not in places and (name, uid) not in appended
    )
    taken = set(places.values())
    expunges = {}
    for name, folder in there.folders.items():
        gone = tuple(uid for uid in sorted(_ours(name, folder, records)) if (name, uid) not in taken)
        if gone:
            expunges[name] = gone
    names = here.folders.keys()
    return Plan(
        creates=tuple(sorted(names - there.folders.keys())),
        subscriptions=tuple(
            (name, name in here.subscribed) for name in sorted((here.subscribed ^ there.subscribed) & names)
        ),
        appends=missing,
        expunges=expunges,
        stores=tuple(_stores(here, there, places)),
        deletes=tuple(_deletes(here, there, expunges, records)),
        places=places,
    )


def insist_on_plausible(here: Side, there: Side, records: Records, at_flip: Mapping[str, int], address: object) -> None:
    """``at_flip`` is how many messages each folder had at the flip.

    Raises:
        Implausible: so much is gone here that something else is likely to be wrong.
    """
    hint = (
        f"If that is as it should be: bascule return {address} --force --reason ... "
        f"To call the return off: bascule cancel-return {address}"
    )
    for name, known in records.known.items():
        folder = there.folders.get(name)
        if folder is None or not folder.messages or folder.uidvalidity == known.uidvalidity:
            continue
        if not any(note.folder == name and note.legacy_uidvalidity == folder.uidvalidity for note in records.notes):
            raise Implausible(
                f"the folder {name!r} of {address} was made anew on the legacy server (UIDVALIDITY "
                f"{folder.uidvalidity}, not {known.uidvalidity}): what there is new cannot be told by UIDs",
                hint=hint,
            )
    total = sum(at_flip.values())
    if total and not any(folder.messages for folder in here.folders.values()):
        raise Implausible(
            f"the mailbox of {address} reads as empty here, and had {total} messages when it moved",
            hint=f"Is its file system mounted, and the mailbox where it was? {hint}",
        )
    elsewhere = _not_in_their_place(here, records)
    for name, before in at_flip.items():
        lost = before - _still_here(name, here, records, elsewhere)
        is_missing = name not in here.folders
        if lost * 2 > before and (is_missing or lost > FEW):
            gone = "is not here any more" if is_missing else "is almost empty here"
            raise Implausible(
                f"the folder {name!r} of {address} {gone}: {lost} of the {before} messages that it had when it moved "
                "are in no folder here, and would be expunged at the legacy server",
                hint=hint,
            )


# What is where ------------------------------------------------------------------------


def _places(here: Side, there: Side, records: Records) -> tuple[dict[Place, Place], set[Place]]:
    """Where messages here are at the legacy server; and which were appended there under a UID that is not known."""
    notes = {(note.folder, note.uid): note for note in records.notes}
    by_guid: dict[str, list[Straggler]] = defaultdict(list)
    for straggler in records.stragglers:
        by_guid[straggler.guid or file_name(straggler)].append(straggler)
    places: dict[Place, Place] = {}
    appended: set[Place] = set()
    taken: set[Place] = set()
    second: list[tuple[Place, Place]] = []

    def take(place: Place, found: Place | None) -> bool:
        if found is None or found in taken:
            return False
        taken.add(found)
        places[place] = found
        return True

    for name, folder in here.folders.items():
        copies = _copies(name, folder, there, records)
        for uid in sorted(folder.messages):
            place, guid = (name, uid), folder.guids.get(uid, "")
            note = notes.get(place)
            if note is not None and note.guid == guid:
                if take(place, _there(there, name, note.legacy_uidvalidity, note.legacy_uid)):
                    continue
                if note.appended and note.legacy_uid is None:
                    appended.add(place)
                    continue
            late = [
                (straggler.folder, found)
                for straggler in (*by_guid.get(guid, ()), *by_guid.get(_file_in(guid), ()))
                if (found := _straggler_there(there, straggler)) is not None
            ]
            if any(take(place, found) for folder_there, found in late if folder_there == name):
                continue
            # It is in INBOX for want of its folder: there it stays where it is.
            second += [
                (place, found)
                for folder_there, found in late
                if name.upper() == "INBOX" and folder_there not in here.folders
            ]
            if uid in copies:
                take(place, (name, copies[uid]))
    for place, found in second:
        if place not in places:
            take(place, found)
    return places, appended


def _copies(name: str, folder: Folder, there: Side, records: Records) -> dict[int, int]:
    """The UIDs there of what was copied from there, by UID here."""
    known, at_legacy = records.known.get(name), there.folders.get(name)
    if known is None or at_legacy is None or folder.uidvalidity != known.uidvalidity:
        return {}
    copies = {
        each.origin: uid
        for (uidvalidity, uid), each in known.prints.items()
        if uidvalidity == at_legacy.uidvalidity
        and each.origin > 0
        and uid in at_legacy.messages
        and each.is_of(at_legacy.messages[uid])
    }
    return {uid: found for uid, found in copies.items() if uid in folder.messages}


def _there(there: Side, name: str, uidvalidity: int | None, uid: int | None) -> Place | None:
    """A place at the legacy server, if there is something."""
    folder = there.folders.get(name)
    if folder is None or uid is None or uid not in folder.messages or uidvalidity not in {None, folder.uidvalidity}:
        return None
    return (name, uid)


def _straggler_there(there: Side, straggler: Straggler) -> Place | None:
    found = _there(there, *straggler.identity)
    if found is None or not may_be(straggler, there.folders[straggler.folder].messages[straggler.uid]):
        return None
    return found


def _file_in(guid: str) -> str:
    """The name of a late message's file, which is a part of what Dovecot calls it in a Maildir."""
    return guid.partition(".L")[2].partition(".bascule")[0]


def _ours(name: str, folder: Folder, records: Records) -> set[int]:
    """The messages there that were here once, or are of our own making."""
    ours = {
        uid
        for straggler in records.stragglers
        if straggler.folder == name
        and straggler.uidvalidity == folder.uidvalidity
        and (uid := straggler.uid) in folder.messages
        and may_be(straggler, folder.messages[uid])
    }
    ours |= {
        note.legacy_uid
        for note in records.notes
        if note.folder == name
        and note.legacy_uid is not None
        and note.legacy_uid in folder.messages
        and note.legacy_uidvalidity in {None, folder.uidvalidity}
    }
    known = records.known.get(name)
    ours |= {uid for uid, message in folder.messages.items() if _was_here(known, folder, message)}
    return {uid for uid in ours if (name, folder.uidvalidity, uid) not in records.waived}


def _was_here(known: Known | None, folder: Folder, message: Message) -> bool:
    """Whether a message there was copied at the flip, or is our last message."""
    if known is None:
        return False
    seen = known.prints.get((folder.uidvalidity, message.uid))
    if seen is not None:
        return seen.origin != 0 and seen.is_of(message)
    # Without evidence all that was there at the flip is taken to have been copied.
    return not known.complete and folder.uidvalidity == known.uidvalidity and message.uid < known.uidnext


# Flags and folders --------------------------------------------------------------------


def _stores(here: Side, there: Side, places: Mapping[Place, Place]) -> Iterator[Store]:
    """Differences of flags among those that the server keeps; without case (RFC 9051 section 2.3.2)."""
    found: dict[tuple[str, frozenset[str], bool], list[int]] = defaultdict(list)
    for (name, uid), (name_there, uid_there) in places.items():
        folder = there.folders[name_there]
        wanted = here.folders[name].messages[uid].flags - {ARRIVING}
        present = folder.messages[uid_there].flags
        if wanted == present:
            continue
        more = kept(wanted, folder.kept, but=present | folder.refused)
        less = kept(present, folder.kept, but=wanted | folder.refused)
        if more:
            found[name_there, more, True].append(uid_there)
        if less:
            found[name_there, less, False].append(uid_there)
    for (name, flags, wanted_there), uids in found.items():
        yield Store(name, flags, wanted_there, tuple(sorted(uids)))


def kept(
    flags: AbstractSet[str], keeps: AbstractSet[str] | None, but: AbstractSet[str] = frozenset()
) -> frozenset[str]:
    """Those of the flags that a server keeps, without ``but``; case does not matter."""
    without = {flag.lower() for flag in but}
    can = None if keeps is None else {flag.lower() for flag in keeps}
    return frozenset(flag for flag in flags if flag.lower() not in without and (can is None or flag.lower() in can))


def _deletes(here: Side, there: Side, expunges: Mapping[str, tuple[int, ...]], records: Records) -> Iterator[str]:
    """Folders that were here once, are no more, and will have nothing in them; the innermost first."""
    returned = {note.folder for note in records.notes}
    gone: set[str] = set()
    for name in sorted(there.folders, key=len, reverse=True):
        if name in here.folders or name.upper() == "INBOX" or name not in records.known.keys() | returned:
            continue
        has_children = any(
            other.startswith(name + there.separator) for other in there.folders.keys() - gone if there.separator
        )
        if not has_children and not there.folders[name].messages.keys() - set(expunges.get(name, ())):
            gone.add(name)
            yield name


# What is gone -------------------------------------------------------------------------


def _not_in_their_place(here: Side, records: Records) -> Counter[int]:
    """The dates of the messages here that are not where they were copied to."""
    dates: Counter[int] = Counter()
    for name, folder in here.folders.items():
        known = records.known.get(name)
        for uid, message in folder.messages.items():
            if known is None or known.uidvalidity != folder.uidvalidity or uid >= known.uidnext:
                dates[message.internaldate] += 1
    return dates


def _still_here(name: str, here: Side, records: Records, elsewhere: Counter[int]) -> int:
    """How many of the messages of a folder's flip are here still, in it or, as their dates say, in another folder."""
    known, folder = records.known.get(name), here.folders.get(name)
    if known is None:
        return 0 if folder is None else len(folder.messages)
    in_place = folder.messages if folder is not None and folder.uidvalidity == known.uidvalidity else {}
    count = 0
    for each in known.prints.values():
        if each.origin in in_place:
            count += 1
        elif each.origin > 0 and elsewhere[each.internaldate] > 0:
            elsewhere[each.internaldate] -= 1
            count += 1
    return count
