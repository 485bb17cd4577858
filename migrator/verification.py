"""Compare the copy with the legacy mailbox, folder by folder, before the flip.

Both sides are read afresh: the legacy server by IMAP, this side from the disk.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass, field

from imapclient import imap_utf7

from bascule.errors import BasculeError
from bascule.imap.reader import Reader, insist, insisted
from bascule.migrator.copying import FolderState, Pass
from bascule.migrator.storage import Read


class NotEqual(BasculeError):
    """The copy differs from the legacy mailbox."""


@dataclass(slots=True)
class Verification:
    """Per folder what was compared.

    ``special_uses`` are names of folders by use; ``odd_sizes`` are messages whose
    RFC822.SIZE is not their length; ``notes`` is what could not be taken along, in words.
    """

    separator: str
    prefix: str
    special_uses: dict[str, str]
    folders: list[dict[str, object]] = field(default_factory=list)
    odd_sizes: list[str] = field(default_factory=list)
    waived: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def report(self) -> dict[str, object]:
        """As kept in ``verification.report``."""
        return asdict(self)


def verify(
    source: Reader,
    read: Read,
    last_pass: Pass,
    *,
    waived: AbstractSet[tuple[str, int, int]] = frozenset(),
    sizes: bool = True,
) -> Verification:
    """``waived``: folder, UIDVALIDITY and UID of messages that need not be here; ``sizes``: whether to ask for them.

    Raises:
        NotEqual: with the first folder and what differs in it.
    """
    layout = last_pass.layout
    uses = {
        folder.special_use.removeprefix("\\").lower(): imap_utf7.decode(
            folder.name.removeprefix(layout.prefix).encode()
        )
        for folder in layout.folders
        if folder.special_use
    }
    result = Verification(layout.separator, layout.prefix, uses)
    states = {state.name: state for state in last_pass.folders}
    # A folder that is made after the last pass is swept in whole.
    now = insist(source.statuses(list(states)))
    asked = [name for name, state in states.items() if state.messages or now[name].messages]
    for name in states.keys() - set(asked):
        if now[name].uidvalidity != states[name].uidvalidity:
            raise NotEqual(f"{name!r} has a new UIDVALIDITY")
        _add(result, states[name], [])
    for changes in insisted(source.changes(((name, None) for name in asked), sizes=sizes)):
        state = states[changes.folder]
        if changes.uidvalidity != state.uidvalidity:
            raise NotEqual(f"{state.name!r} has a new UIDVALIDITY")
        uidvalidity, here = read(state.name)
        if uidvalidity != state.uidvalidity:
            raise NotEqual(f"{state.name!r} has another UIDVALIDITY here")
        # What came after the last pass is a straggler: the sweep brings it.
        there = {
            message.uid: message
            for message in changes.new
            if message.uid < state.uidnext and (state.name, state.uidvalidity, message.uid) not in waived
        }
        if there.keys() != here.keys():
            missing, extra = there.keys() - here.keys(), here.keys() - there.keys()
            raise NotEqual(
                f"{state.name!r} differs: {len(missing)} messages are missing here, {len(extra)} are gone there"
            )
        for uid, message in there.items():
            stored = here[uid]
            if stored.flags != message.flags:
                raise NotEqual(f"{state.name!r}: the flags of UID {uid} differ")
            if message.is_dated and stored.internaldate != max(message.internaldate, 0):
                raise NotEqual(f"{state.name!r}: the INTERNALDATE of UID {uid} differs")
            if message.size not in {0, stored.size}:
                result.odd_sizes.append(f"{state.name}: UID {uid} says {message.size} bytes and has {stored.size}")
        _add(result, state, [stored.size for stored in here.values()])
    result.waived = [f"{name}: UID {uid}" for name, _, uid in sorted(waived)]
    return result


def _add(result: Verification, state: FolderState, sizes: list[int]) -> None:
    result.folders.append(
        {
            "name": state.name,
            "uidvalidity": state.uidvalidity,
            "uidnext": state.uidnext,
            "messages": len(sizes),
            "bytes": sum(sizes),
        }
    )
