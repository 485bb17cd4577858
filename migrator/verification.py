"""Compare the copy with the legacy mailbox, folder by folder, before the flip.

Both sides are read afresh: the legacy server by IMAP, this side from the disk.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

from bascule.errors import BasculeError
from bascule.migrator import maildir
from bascule.migrator.copying import Pass
from bascule.migrator.source import Source


class NotEqual(BasculeError):
    """The copy differs from the legacy mailbox; the cutover is undone and copying goes on."""


@dataclass(slots=True)
class Verification:
    """Per folder what was compared; ``odd_sizes`` are messages whose RFC822.SIZE is not their length."""

    separator: str
    prefix: str
    folders: list[dict[str, object]] = field(default_factory=list)
    odd_sizes: list[str] = field(default_factory=list)

    def report(self) -> dict[str, object]:
        """As kept in ``mailbox.report``."""
        return asdict(self)


def verify(source: Source, root: Path, last_pass: Pass) -> Verification:
    """
    Raises:
        NotEqual: with the first folder and what differs in it.
    """
    layout = last_pass.layout
    result = Verification(layout.separator, layout.prefix)
    for state in last_pass.folders:
        selected = source.examine(state.name)
        if selected.uidvalidity != state.uidvalidity:
            raise NotEqual(f"{state.name!r} has a new UIDVALIDITY")
        here = maildir.Folder(maildir.folder_path(root, state.name, layout.separator, layout.prefix), state.uidvalidity)
        here.open()
        # What came after the last pass is a straggler: the sweep brings it.
        uids = [uid for uid in source.uids() if uid < state.uidnext]
        there = {message.uid: message for message in source.messages(uids)}
        if there.keys() != here.messages.keys():
            missing, extra = there.keys() - here.messages.keys(), here.messages.keys() - there.keys()
            raise NotEqual(
                f"{state.name!r} differs: {len(missing)} messages are missing here, {len(extra)} are gone there"
            )
        for uid, message in there.items():
            stored = here.messages[uid]
            if stored.flags != message.flags:
                raise NotEqual(f"{state.name!r}: the flags of UID {uid} differ")
            if stored.size != message.size:
                result.odd_sizes.append(f"{state.name}: UID {uid} says {message.size} bytes and has {stored.size}")
        result.folders.append(
            {
                "name": state.name,
                "uidvalidity": state.uidvalidity,
                "uidnext": state.uidnext,
                "messages": len(there),
                "bytes": sum(stored.size for stored in here.messages.values()),
            }
        )
    return result
