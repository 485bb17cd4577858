"""What is known of each legacy folder since the flip: which messages the copy brought, and under which UIDs.

A UID alone does not say which message it is: there are servers that give a
message a lasting UID only when somebody opens the folder with SELECT (Courier;
until then one that comes later may take its UID), and a folder may be made
anew. So each message is noted with its INTERNALDATE and its size, too.

The notes are files beside the mailbox: one for each folder, made of the
evidence of the flip when it is first needed, and a small one of what the sweeps
saw last. Where the evidence is missing (a mailbox that a former version moved,
a home that was restored), the mailbox here stands for it, and what its owner
has removed since is presumed to have been copied.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path

from bascule.imap.reader import Message, Status
from bascule.migrator import maildir
from bascule.migrator.storage import Evidence

_FOLDER = ".bascule-known"
_LOOKED = "looked.json"

LAST = -1

#: UIDVALIDITY and UID of a message at the legacy server.
Key = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Print:
    """What tells a message from another one that has its UID.

    ``internaldate`` is as it is kept here; ``digest``: the first 32 hexadecimal
    digits, as in the evidence; where it is empty, there is ``size``, or 0.
    ``origin`` is the UID under which it was copied, which is its UID here; 0:
    it is no copy, and need not come; :data:`LAST`: it is the last message.
    """

    internaldate: int
    size: int
    origin: int
    digest: str = ""

    def is_of(self, message: Message) -> bool:
        """Whether the date of a message at the legacy server allows that it is this one."""
        return not message.is_dated or self.internaldate == maildir.storable_date(message.internaldate)


@dataclass(slots=True)
class Known:
    """What is known of one folder. ``uidvalidity`` and ``uidnext`` are the flip's.

    ``complete``: ``prints`` has every message of the flip; otherwise a UID below
    ``uidnext`` that it does not have is presumed to have been copied.
    """

    folder: str
    uidvalidity: int
    uidnext: int
    complete: bool = True
    prints: dict[Key, Print] = field(default_factory=dict)

    @classmethod
    def of_flip(cls, folder: str, uidvalidity: int, uidnext: int, came: Mapping[int, Evidence], messages: int) -> Known:
        """What is known of a folder by the evidence of its flip, at which it had so many ``messages``."""
        prints = {
            (uidvalidity, uid): Print(date, 0, uid, digest) for uid, (_, digest, date) in came.items() if uid < uidnext
        }
        return cls(folder, uidvalidity, uidnext, len(prints) == messages, prints)

    def learn(self, messages: Iterable[Message]) -> None:
        """Have messages that the folder here has under their old UIDs stand for what there is no evidence of."""
        for each in messages:
            if each.uid < self.uidnext:
                key = (self.uidvalidity, each.uid)
                self.prints.setdefault(key, Print(each.internaldate, each.size, each.uid))

    def save(self, home: Path) -> None:
        by_uidvalidity: dict[int, list[list[int | str]]] = {}
        for (uidvalidity, uid), each in sorted(self.prints.items()):
            by_uidvalidity.setdefault(uidvalidity, []).append(
                [uid, each.internaldate, each.size, each.origin, each.digest]
            )
        text = json.dumps(
            {
                "folder": self.folder,
                "uidvalidity": self.uidvalidity,
                "uidnext": self.uidnext,
                "complete": self.complete,
                "messages": by_uidvalidity,
            },
            separators=(",", ":"),
        )
        (home / _FOLDER).mkdir(mode=0o700, exist_ok=True)
        maildir.replace(_path(home, self.folder), text)

    @classmethod
    def load(cls, home: Path, folder: str, uidvalidity: int, uidnext: int) -> Known | None:
        """What was noted of a folder at a flip with this UIDVALIDITY and UIDNEXT; None: nothing."""
        try:
            found = json.loads(_path(home, folder).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        if (found["folder"], found["uidvalidity"], found["uidnext"]) != (folder, uidvalidity, uidnext):
            return None
        prints = {(int(of), uid): Print(*seen) for of, messages in found["messages"].items() for uid, *seen in messages}
        return cls(folder, uidvalidity, uidnext, found["complete"], prints)


@dataclass(frozen=True, slots=True)
class Look:
    """What a sweep last saw of a folder: its STATUS, and how many messages it had below the flip's UIDNEXT."""

    status: Status
    below: int


class Looks:
    """What the sweeps of one mailbox saw last, by folder."""

    def __init__(self, home: Path, epoch: str) -> None:
        """``epoch`` names the move: what was seen after another one is forgotten."""
        self._path = home / _FOLDER / _LOOKED
        self._epoch = epoch
        self._looks: dict[str, Look] = {}
        try:
            found = json.loads(self._path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return
        if found["epoch"] == epoch:
            self._looks = {
                name: Look(Status(**each["status"]), each["below"]) for name, each in found["folders"].items()
            }

    def get(self, folder: str) -> Look | None:
        return self._looks.get(folder)

    def set(self, folder: str, look: Look) -> None:
        self._looks[folder] = look

    def save(self) -> None:
        self._path.parent.mkdir(mode=0o700, exist_ok=True)
        folders = {name: asdict(look) for name, look in self._looks.items()}
        maildir.replace(self._path, json.dumps({"epoch": self._epoch, "folders": folders}))


def forget(home: Path) -> None:
    """Forget everything: the mailbox is moved anew, or has left."""
    shutil.rmtree(home / _FOLDER, ignore_errors=True)


def _path(home: Path, folder: str) -> Path:
    return home / _FOLDER / f"{sha256(folder.encode('utf-8', 'surrogateescape')).hexdigest()[:32]}.json"
