"""Whether the new server, asked as a client asks, gives what the legacy server says it has.

Nothing here knows how the copy is stored. This side is seen through Dovecot, by
its own names; the legacy side is counted by SEARCH and EXISTS beside what FETCH
lists; and bodies are compared by the digest that was taken when they came in.
What is allowed to differ is only what the copy has announced, and it is in the
report. What the copy left out is judged here once more, by the domain's rules
and by what the legacy server lists: whatever is neither here nor meant to be
left out is missing.
"""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass, field
from typing import Literal

from imapclient import imap_utf7

from bascule.errors import BasculeError
from bascule.imap import folder_names
from bascule.imap.folder_rules import FolderRule
from bascule.imap.reader import Changes, FolderRefused, Message, Reader
from bascule.migrator.copying import FolderState, Pass
from bascule.migrator.witness import Opened, Seen, Witness

#: Dates that a file can have; others are kept as the nearest, and noted.
DATES = range(2**32)
SAMPLE = 3  # bodies of each folder that are compared whatever they look like
GROUP = 20_000  # messages that are compared at a time
AT_ONCE = 50  # bodies that are asked for at a time

Bodies = Literal["sample", "all"]
#: The digests (at least 32 hexadecimal digits) of a legacy folder's messages as they came in, by UID.
Digests = Callable[[str], Mapping[int, str]]


class NotEqual(BasculeError):
    """The new server does not give what the legacy server has. ``folder`` is a legacy folder, or empty."""

    def __init__(self, message: str, *, folder: str = "", uids: Sequence[int] = (), hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.folder = folder
        self.uids = tuple(uids)


class NotServed(NotEqual):
    """Dovecot does not give messages byte for byte as they came in."""

    def __init__(self, folder: str, uidvalidity: int, uids: Sequence[int]) -> None:
        super().__init__(f"{folder!r}: UID {uids[0]} is not served here as it came in", folder=folder, uids=uids)
        self.uidvalidity = uidvalidity


@dataclass(slots=True)
class Verification:
    """Per folder what was compared.

    ``special_uses`` are names of folders by use; ``odd_sizes`` are messages whose
    RFC822.SIZE is not their length; ``notes`` is what could not be taken along, in words.

    ``left_out`` are the folders that a rule left out: ``name``, ``reason``, and ``messages``, which is None where
    the legacy server does not say. ``once`` is the folder whose messages came only where they are in no other.
    ``folder_rules`` are the rules that were in force.
    """

    separator: str
    prefix: str
    special_uses: dict[str, str]
    folders: list[dict[str, object]] = field(default_factory=list)
    odd_sizes: list[str] = field(default_factory=list)
    waived: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    left_out: list[dict[str, object]] = field(default_factory=list)
    once: str = ""
    folder_rules: list[dict[str, str]] = field(default_factory=list)
    #: How many bodies were compared byte for byte, by their digests.
    bodies_compared: int = 0

    def report(self) -> dict[str, object]:
        """As kept in ``verification.report``."""
        return asdict(self)


def special_uses(last_pass: Pass) -> dict[str, str]:
    """The name here, in UTF-8 and without the prefix, of the folder of each special use: ``{"sent": "Sent"}``."""
    separator = last_pass.layout.separator
    found = {}
    for folder in last_pass.layout.folders:
        if folder.special_use and folder.name in last_pass.places:
            parts = last_pass.places[folder.name].parts
            found[folder.special_use.removeprefix("\\").lower()] = imap_utf7.decode(separator.join(parts).encode())
    return found


def verify(
    there: Reader,
    legacy: Witness,
    here: Witness,
    last_pass: Pass,
    *,
    digests: Digests,
    sizes: bool = True,
    bodies: Bodies = "sample",
    compared: Mapping[str, int] | None = None,
    rules: Sequence[FolderRule] = (),
) -> Verification:
    """Compare the mailbox here with the legacy one, as the last pass found that.

    ``there`` and ``legacy`` look at the legacy server over one connection, by
    turns. ``sizes``: whether it can be asked for sizes. ``compared``: by legacy
    folder, the UID below which bodies were compared already. ``rules`` are the
    domain's, by which the last pass left folders out.

    Raises:
        NotEqual: with the first folder and what differs in it.
        NotVerifiable: one of the servers does not answer as it must.
        LegacyUnavailable
    """
    layout = last_pass.layout
    result = Verification(
        layout.separator,
        layout.prefix,
        special_uses(last_pass),
        notes=[*last_pass.notes, *last_pass.by_rule],
        once=last_pass.once,
        folder_rules=[rule.as_json() for rule in rules],
    )
    names = {name: place.name(layout.separator, layout.prefix) for name, place in last_pass.places.items()}
    _compare_folders(here, last_pass, names, result)
    _insist_on_all_folders(there, legacy, last_pass, rules)
    twice = _in_other_folders(legacy, last_pass)
    rest = compared or {}
    for group in _groups(last_pass.folders):
        states = {state.name: state for state in group}
        listed = _listed(there, states, sizes=sizes)
        counted = {
            name: (opened, found)
            for name, opened, found in legacy.uids({name: sorted(m.uid for m in c.new) for name, c in listed.items()})
        }
        by_name_here = {names[name]: name for name in states}
        for name_here, opened, seen in here.messages(list(by_name_here)):
            name = by_name_here[name_here]
            state = states[name]
            waived = {uid for folder, of, uid in last_pass.waived if (folder, of) == (name, state.uidvalidity)}
            whole = name not in last_pass.waived_folders
            _compare_counts(state, listed[name], *counted[name], waived=waived, whole=whole)
            expected = {
                message.uid: message
                for message in listed[name].new
                # What came after the last pass is a late message: the sweep brings it.
                if message.uid < state.uidnext
                and message.uid not in waived
                and not (name == last_pass.once and message.uid in twice)
            }
            odd = _compare_messages(state, opened, expected, seen, last_pass.dropped.get(name, {}), result)
            result.folders.append(
                {
                    "name": name,
                    "here": name_here,
                    "uidvalidity": state.uidvalidity,
                    "uidnext": state.uidnext,
                    "messages": len(seen),
                    "bytes": sum(each.size for each in seen.values()),
                }
            )
            first = rest.get(name, 0)
            candidates = [uid for uid in expected if uid >= first]
            chosen = candidates if bodies == "all" else [uid for uid in odd if uid >= first]
            if bodies == "sample":
                chosen += random.sample(candidates, min(SAMPLE, len(candidates)))
            _compare_bodies(here, state, name_here, sorted(set(chosen)), digests, result)
    result.waived = [f"{name}: UID {uid}" for name, _, uid in sorted(last_pass.waived)]
    return result


def _listed(there: Reader, states: Mapping[str, FolderState], *, sizes: bool) -> dict[str, Changes]:
    """Everything that the legacy server lists of these folders."""
    found = {}
    for changes in there.changes(((name, None) for name in states), sizes=sizes):
        if isinstance(changes, FolderRefused):
            raise NotEqual(
                f"the legacy server does not open {changes.folder!r} any more: {changes.reason}", folder=changes.folder
            )
        found[changes.folder] = changes
    return found


def _groups(folders: Sequence[FolderState]) -> Iterator[list[FolderState]]:
    """Folders that are compared together."""
    group: list[FolderState] = []
    messages = 0
    for state in folders:
        if group and messages + state.messages > GROUP:
            yield group
            group, messages = [], 0
        group.append(state)
        messages += state.messages
    if group:
        yield group


def _compare_folders(here: Witness, last_pass: Pass, names: Mapping[str, str], result: Verification) -> None:
    """The tree: what a client lists, whether it can be opened, subscriptions, special uses."""
    layout = last_pass.layout
    shown = here.folders()
    opened = {state.name for state in last_pass.folders}
    for name in opened:
        attributes = shown.get(names[name])
        if attributes is None and names[name] != "INBOX":
            raise NotEqual(f"the folder {name!r} is not listed here as {names[name]!r}", folder=name)
        if attributes is not None and attributes & {"\\noselect", "\\nonexistent"}:
            raise NotEqual(f"the folder {name!r} cannot be opened here as {names[name]!r}", folder=name)
    others = here.other_namespaces(layout.prefix)
    more = [
        name
        for name, attributes in shown.items()
        if name not in set(names.values())
        and not attributes & {"\\noselect", "\\nonexistent"}
        and not (others and name.startswith(others))
    ]
    for name, _, found in here.messages(more):
        if found:
            raise NotEqual(
                f"there are {len(found)} messages here in {name!r}, a folder that the legacy server does not have",
                hint="They were not copied: move them out of the mailbox, or have the folder removed.",
            )
    missing = {names[name] for name in layout.subscribed if name in names} - here.subscribed()
    if missing:
        raise NotEqual(f"the subscription of {sorted(missing)[0]!r} is missing here")
    uses = here.special_uses() if result.special_uses else {}
    for folder in layout.folders:
        if (
            folder.special_use
            and folder.name in names
            and folder.special_use.lower() not in uses.get(names[folder.name], frozenset())
        ):
            result.notes.append(f"{names[folder.name]} is not shown as {folder.special_use} here")


# What is left out -----------------------------------------------------------------


def _insist_on_all_folders(there: Reader, legacy: Witness, last_pass: Pass, rules: Sequence[FolderRule]) -> None:
    """Whether every folder that the legacy server lists is here, but for what the rules mean to leave out.

    Raises:
        NotEqual
    """
    here = {state.name for state in last_pass.folders}
    shown = {
        "INBOX" if name.upper() == "INBOX" else name: attributes
        for name, attributes in legacy.folders().items()
        if not attributes & {"\\noselect", "\\nonexistent"}
    }
    wrongly_here = sorted(here & last_pass.left_out.keys())
    if wrongly_here:
        raise NotEqual(f"the folder {wrongly_here[0]!r} is here, though a rule leaves it out", folder=wrongly_here[0])
    missing = sorted(shown.keys() - here - last_pass.waived_folders)
    if not missing:
        return
    others = legacy.other_namespaces(last_pass.layout.prefix, may_refuse=True)
    missing = [name for name in missing if not (others and name.startswith(others))]
    by_use = any(rule.kind == "special-use" for rule in rules)
    uses = legacy.special_uses(may_refuse=True) if missing and by_use else {}
    attributes = {name: shown[name] | uses.get(name, frozenset()) for name in shown}
    for name in missing:
        if name not in last_pass.left_out or not _is_meant(name, attributes, last_pass, rules, there):
            raise NotEqual(
                f"the folder {name!r} of the legacy server is not here, and no rule leaves it out", folder=name
            )


def _is_meant(
    name: str,
    attributes: Mapping[str, AbstractSet[str]],
    last_pass: Pass,
    rules: Sequence[FolderRule],
    there: Reader,
) -> bool:
    """Whether the rules mean to leave a folder out, as they are read here."""
    if name == "INBOX":
        return False
    text = _letters(_decoded(name))
    uses = attributes[name]
    patterns = [rule for rule in rules if rule.kind == "pattern" and _fits(text, _letters(rule.folder))]
    longest = max((len(rule.folder) for rule in patterns), default=0)
    deciding = (
        [rule for rule in rules if rule.kind == "name" and _letters(rule.folder) == text]
        or [rule for rule in patterns if len(rule.folder) == longest]
        or [rule for rule in rules if rule.kind == "special-use" and rule.folder.lower() in uses]
    )
    if deciding:
        return any(rule.action == "leave-out" for rule in deciding)
    if any(rule.kind == "exchange-items" for rule in rules) and there.profile.name == "Exchange":
        head = text.removeprefix(last_pass.layout.prefix).split(last_pass.layout.separator)[0].lower()
        if any(head in names for names in folder_names.EXCHANGE_ITEMS.values()):
            return True
    # Built in for Gmail: a view of messages that are in the folder with all of them, which is here.
    all_of_them = {each for each, having in attributes.items() if "\\all" in having}
    here = {state.name for state in last_pass.folders}
    return there.announces("X-GM-EXT-1") and bool(uses & {"\\flagged", "\\important"}) and bool(all_of_them & here)


def _fits(text: str, pattern: str) -> bool:
    """Whether a text fits a pattern in which ``*`` stands for anything."""
    first, *others = pattern.split("*")
    if not others:
        return text == pattern
    if not text.startswith(first) or not text.endswith(others[-1]):
        return False
    start, end = len(first), len(text) - len(others[-1])
    for part in others[:-1]:
        found = text.find(part, start, max(end, 0))
        if found < 0:
            return False
        start = found + len(part)
    return start <= end


def _decoded(name: str) -> str:
    """A name on the wire in letters: in modified UTF-7, in UTF-8, or, where it is neither, a letter for each byte."""
    raw = name.encode("utf-8", "surrogateescape")
    if raw.isascii():
        try:
            return str(imap_utf7.decode(raw))
        except (UnicodeError, ValueError):
            return name
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def _letters(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _in_other_folders(legacy: Witness, last_pass: Pass) -> frozenset[int]:
    """The UIDs of those messages of the folder that came only in part which are in another folder, too."""
    if last_pass.once not in {state.name for state in last_pass.folders}:
        return frozenset()
    found = dict(legacy.message_ids([state.name for state in last_pass.folders if state.name != last_pass.once]))
    others = {number for ids in found.values() for number in ids.values()}
    ((_, ids),) = legacy.message_ids([last_pass.once])
    return frozenset(uid for uid, number in ids.items() if number in others)


# What came ------------------------------------------------------------------------


def _compare_counts(
    state: FolderState, changes: Changes, opened: Opened, found: set[int], *, waived: AbstractSet[int], whole: bool
) -> None:
    """Whether the legacy server agrees with itself, and with what the last pass saw.

    ``waived`` are UIDs that need not be shown. ``whole``: and gives every message that it
    announces; else an administrator has waived what it does not.
    """
    if not state.uidvalidity == changes.uidvalidity == opened.uidvalidity:
        raise NotEqual(f"{state.name!r} has a new UIDVALIDITY on the legacy server", folder=state.name)
    if not whole:
        return
    listed = {message.uid for message in changes.new} | changes.incomplete.keys()
    # Between the two questions messages may have come, which the next pass or the sweep brings.
    missing = {uid for uid in found - listed - waived if uid < state.uidnext}
    if missing:
        raise NotEqual(
            f"the legacy server finds {len(missing)} messages in {state.name!r} that it does not list, "
            f"UID {min(missing)} first",
            folder=state.name,
            uids=sorted(missing),
        )
    if opened.exists > max(len(found), len(listed)):
        raise NotEqual(
            f"the legacy server says that {state.name!r} has {opened.exists} messages, and shows {len(listed)}",
            folder=state.name,
        )


def _compare_messages(
    state: FolderState,
    opened: Opened,
    expected: Mapping[int, Message],
    seen: Mapping[int, Seen],
    dropped: Mapping[str, str],
    result: Verification,
) -> list[int]:
    """UIDs, flags, dates and sizes of one folder; the UIDs of messages that look odd."""
    name = state.name
    if opened.uidvalidity != state.uidvalidity:
        raise NotEqual(f"{name!r} has another UIDVALIDITY here: {opened.uidvalidity}", folder=name)
    if expected.keys() != seen.keys():
        missing, extra = sorted(expected.keys() - seen.keys()), sorted(seen.keys() - expected.keys())
        first = f"UID {(missing or extra)[0]} first"
        raise NotEqual(
            f"{name!r} differs: {len(missing)} messages are missing here, {len(extra)} are gone there, {first}",
            folder=name,
            uids=missing,
        )
    if opened.exists != len(seen):
        raise NotEqual(f"{name!r} has {opened.exists} messages here, and shows {len(seen)}", folder=name)
    allowed = {keyword.lower() for keyword in dropped}
    odd = []
    for uid, message in expected.items():
        found = seen[uid]
        if _comparable(message.flags) - allowed != _comparable(found.flags):
            raise NotEqual(
                f"{name!r}: the flags of UID {uid} differ: {sorted(message.flags)} there, {sorted(found.flags)} here",
                folder=name,
                uids=[uid],
            )
        result.notes += [f"{name}: UID {uid}: {remark}" for remark in message.remarks]
        if message.internaldate not in DATES:
            result.notes.append(f"{name}: the date of UID {uid} cannot be kept")
            odd.append(uid)
        elif message.is_dated and message.internaldate != found.internaldate:
            raise NotEqual(f"{name!r}: the INTERNALDATE of UID {uid} differs", folder=name, uids=[uid])
        if message.size not in {0, found.size}:
            result.odd_sizes.append(f"{name}: UID {uid} says {message.size} bytes and has {found.size}")
            odd.append(uid)
    return odd


def _comparable(flags: frozenset[str]) -> frozenset[str]:
    """System flags and keywords are compared without case (RFC 9051 section 2.3.2)."""
    return frozenset(flag.lower() for flag in flags)


def _compare_bodies(
    here: Witness, state: FolderState, name_here: str, uids: Sequence[int], digests: Digests, result: Verification
) -> None:
    """Whether Dovecot serves, byte for byte, what came in."""
    if not uids:
        return
    received = digests(state.name)
    different = []
    for start in range(0, len(uids), AT_ONCE):
        some = uids[start : start + AT_ONCE]
        served = here.digests(name_here, some)
        for uid in some:
            if uid not in served:
                raise NotEqual(f"{state.name!r}: UID {uid} cannot be read here", folder=state.name, uids=[uid])
            if uid not in received or not served[uid].startswith(received[uid][:32]):
                different.append(uid)
        result.bodies_compared += len(some)
    if different:
        raise NotServed(state.name, state.uidvalidity, different)
