"""What is known of each legacy folder since the flip: which messages the copy brought, and under which UIDs.

A UID alone does not say which message it is: there are servers that give a
message a lasting UID only when somebody opens the folder with SELECT (Courier;
until then one that comes later may take its UID), and a folder may be made
anew. So each message is noted with its INTERNALDATE and its size, too.

The notes are files beside the mailbox: one for each folder, written at the
flip, and a small one of what the sweeps saw last. Where they are missing (a
mailbox that a former version moved, a home that was restored), they are made
anew from the mailbox here, and what its owner has removed since is presumed to
have been copied.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path

from bascule.imap.reader import Message, Status
from bascule.migrator import maildir

_FOLDER = ".bascule-known"
_LOOKED = "looked.json"

LAST = -1

#: UIDVALIDITY and UID of a message at the legacy server.
Key = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Print:
    """What tells a message from another one that has its UID. ``size`` is 0 where it is not known.

    ``origin`` is the UID under which it was copied, which is its UID here; 0:
    it is no copy, and need not come; :data:`LAST`: it is the last message.
    """

    internaldate: int
    size: int
    origin: int


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
    def of(
        cls, folder: str, uidvalidity: int, uidnext: int, messages: Iterable[Message], *, complete: bool = True
    ) -> Known:
        """What is known of a folder that had, or has here, these messages."""
        prints = {
            (uidvalidity, each.uid): Print(each.internaldate, each.size, each.uid)
            for each in messages
            if each.uid < uidnext
        }
        return cls(folder, uidvalidity, uidnext, complete, prints)

    def save(self, home: Path) -> None:
        by_uidvalidity: dict[int, list[list[int]]] = {}
        for (uidvalidity, uid), each in sorted(self.prints.items()):
            by_uidvalidity.setdefault(uidvalidity, []).append([uid, each.internaldate, each.size, each.origin])
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
        prints = {
            (int(of), uid): Print(internaldate, size, origin)
            for of, messages in found["messages"].items()
            for uid, internaldate, size, origin in messages
        }
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
    return home / _FOLDER / f"{sha256(folder.encode()).hexdigest()[:32]}.json"
