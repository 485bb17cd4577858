"""Mailboxes as Dovecot's Maildir with chosen UIDs.

Dovecot takes UIDVALIDITY and UIDs from ``dovecot-uidlist``, keywords from
``dovecot-keywords``, INTERNALDATE from a file's modification time (Dovecot 2.3
manual, "Maildir Mailbox Format"). Folders are laid out as ``LAYOUT=fs``, so
that names may have dots.

A message's file name is made of its UIDVALIDITY and UID: repeating a step
finds its own work, and nothing but the files themselves says how far a copy
has come. All this is done only while nobody else opens the mailbox; from the
flip on it is Dovecot's.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from errno import ENOSPC
from itertools import count
from pathlib import Path
from threading import Lock

from bascule.errors import BasculeError

#: System flags (RFC 3501 section 2.3.2) and their letters in a Maildir file name.
FLAG_LETTERS = {"\\Draft": "D", "\\Flagged": "F", "\\Answered": "R", "\\Seen": "S", "\\Deleted": "T"}
_LETTER_FLAGS = {letter: flag for flag, letter in FLAG_LETTERS.items()}
MAX_KEYWORDS = 26  # a to z
MAX_UID = 2**32 - 1
FEW = 64  # files that are flushed one by one

_NAME = re.compile(r"^\d+\.U(?P<uid>\d+)V(?P<uidvalidity>\d+)\.bascule,S=(?P<size>\d+),W=\d+:2,(?P<letters>[A-Za-z]*)$")
_libc = ctypes.CDLL(None, use_errno=True)
_MARK = ".bascule-copying"
_RESERVED = {"", ".", "..", "cur", "new", "tmp"}


class FolderNameNotStorable(BasculeError):
    """A folder of the legacy server has a name that cannot be a directory here."""


class TooManyKeywords(BasculeError):
    """A folder uses more keywords than Maildir has letters for."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A message that is in the folder."""

    file_name: str
    size: int
    flags: frozenset[str]

    @property
    def internaldate(self) -> int:
        """Seconds since 1970."""
        return int(self.file_name.partition(".")[0])


def folder_path(root: Path, name: str, separator: str, prefix: str) -> Path:
    """The directory of the folder ``name`` (as on the wire) under ``root``; INBOX is ``root`` itself.

    Raises:
        FolderNameNotStorable
    """
    if name.upper() == "INBOX":
        return root
    within = name.removeprefix(prefix)
    parts = within.split(separator) if separator else [within]
    if any(part in _RESERVED or "/" in part or part.startswith("~") for part in parts):
        raise FolderNameNotStorable(
            f"the folder {name!r} cannot be stored under its name",
            hint="Rename it on the legacy server; nothing was changed.",
        )
    return root.joinpath(*parts)


@dataclass(frozen=True, slots=True)
class Received:
    """A body that is in ``tmp``: its size as it is and with CRLF at every line end."""

    path: str
    size: int
    virtual_size: int


class Folder:
    """One folder of a mailbox that is not yet in use here; several threads may add to it.

    ``messages`` maps UIDs to what is stored. What was added is in the folder at
    once, and on the disk after :meth:`write_index`: ``dovecot-uidlist`` names
    only what survives a loss of power.
    """

    def __init__(self, path: Path, uidvalidity: int) -> None:
        self.path = path
        self._cur, self._tmp = str(path / "cur"), str(path / "tmp")
        self.uidvalidity = uidvalidity
        self.messages: dict[int, Stored] = {}
        self._keywords: list[str] = []
        self._unsynced: set[str] = set()
        self._changed = False
        self._numbers = count(1)
        self._lock = Lock()

    def open(self) -> None:
        """Make the directories, take stock of what is there, and clear away what an interrupted run left."""
        for part in ("cur", "new", "tmp"):
            (self.path / part).mkdir(mode=0o700, parents=True, exist_ok=True)
        for leftover in (self.path / "tmp").iterdir():
            leftover.unlink()
        keywords = self.path / "dovecot-keywords"
        if keywords.exists():
            self._keywords = [line.partition(" ")[2] for line in keywords.read_text().splitlines()]
        on_disk = _indexed(self.path)
        known: dict[str, frozenset[str]] = {}
        with os.scandir(self.path / "cur") as entries:
            for entry in entries:
                match = _NAME.match(entry.name)
                # A file of another UIDVALIDITY is of a folder that is no more;
                # one of another length was not yet on the disk when power was lost.
                if (
                    match is None
                    or int(match["uidvalidity"]) != self.uidvalidity
                    or int(match["size"]) != entry.stat().st_size
                    or int(match["uid"]) in self.messages
                ):
                    Path(entry.path).unlink()
                    continue
                letters, uid = match["letters"], int(match["uid"])
                if letters not in known:
                    known[letters] = frozenset(self._flag(letter) for letter in letters)
                self.messages[uid] = Stored(entry.name, int(match["size"]), known[letters])
                if (self.uidvalidity, uid) not in on_disk:
                    self._unsynced.add(entry.name)

    def receive(self, size: int, pieces: Iterable[bytes]) -> Received:
        """Take a body into ``tmp``."""
        return receive(f"{self._tmp}/{next(self._numbers)}.bascule", size, pieces)

    def keep(self, uid: int, internaldate: int, flags: frozenset[str], received: Received) -> None:
        """Put a received body into the folder as this message."""
        stamp = max(internaldate, 0)
        os.utime(received.path, (stamp, stamp))
        with self._lock:
            letters = self._letters(flags)
            name = f"{stamp}.U{uid}V{self.uidvalidity}.bascule,S={received.size},W={received.virtual_size}:2,{letters}"
            os.rename(received.path, f"{self._cur}/{name}")  # noqa: PTH104 (some ten thousand times)
            self.messages[uid] = Stored(name, received.size, flags)
            self._unsynced.add(name)
            self._changed = True

    def set_flags(self, uid: int, flags: frozenset[str]) -> None:
        stored = self.messages[uid]
        name = stored.file_name.partition(":")[0] + ":2," + self._letters(flags)
        if name != stored.file_name:
            (self.path / "cur" / stored.file_name).rename(self.path / "cur" / name)
        self._changed = True
        if stored.file_name in self._unsynced:
            self._unsynced.remove(stored.file_name)
            self._unsynced.add(name)
        self.messages[uid] = Stored(name, stored.size, flags)

    def expunge(self, uid: int) -> None:
        name = self.messages.pop(uid).file_name
        (self.path / "cur" / name).unlink()
        self._unsynced.discard(name)
        self._changed = True

    def write_index(self, uidnext: int, uidls: Mapping[int, str] | None = None) -> None:
        """Put everything on the disk and write ``dovecot-uidlist``; new messages will get UIDs from ``uidnext`` on.

        ``uidls``: the POP3 UIDL of messages by UID, where it is not what Dovecot would make up.
        """
        self._put_on_disk()
        guid = hashlib.sha256(f"{self.path}\0{self.uidvalidity}".encode()).hexdigest()[:32]
        lines = [f"3 V{self.uidvalidity} N{min(uidnext, MAX_UID)} G{guid}\n"]
        for uid in sorted(self.messages):
            uidl = f"P{uidls[uid]} " if uidls and uid in uidls else ""
            lines.append(f"{uid} {uidl}:{self.messages[uid].file_name.partition(':')[0]}\n")
        replace(self.path / "dovecot-uidlist", "".join(lines))

    def _put_on_disk(self) -> None:
        # One flush of the whole file system costs far less than one a file, but takes what others write along.
        if len(self._unsynced) > FEW:
            flush_file_system(self.path)
        else:
            for name in self._unsynced:
                _flush(self.path / "cur" / name)
            if self._changed:
                _flush(self.path / "cur")
        self._unsynced, self._changed = set(), False

    def _flag(self, letter: str) -> str:
        if letter in _LETTER_FLAGS:
            return _LETTER_FLAGS[letter]
        number = ord(letter) - ord("a")
        return self._keywords[number] if 0 <= number < len(self._keywords) else f"unknown-{letter}"

    def _letters(self, flags: frozenset[str]) -> str:
        letters = []
        for flag in sorted(flags):
            if flag in FLAG_LETTERS:
                letters.append(FLAG_LETTERS[flag])
                continue
            if flag not in self._keywords:
                if len(self._keywords) == MAX_KEYWORDS:
                    raise TooManyKeywords(
                        f"{self.path.name} uses more than {MAX_KEYWORDS} keywords; {flag} has no place"
                    )
                self._keywords.append(flag)
                # Known on the disk before a file name relies on it.
                replace(
                    self.path / "dovecot-keywords",
                    "".join(f"{n} {k}\n" for n, k in enumerate(self._keywords)),
                )
            letters.append(chr(ord("a") + self._keywords.index(flag)))
        return "".join(sorted(letters))


def raise_uidnexts(uidnexts: Mapping[Path, int]) -> None:
    """Have new messages get UIDs from there on, in folders whose ``dovecot-uidlist`` is written.

    Not before the last pass: Dovecot takes a message that is put below the next
    UID that it has seen for one that is gone.
    """
    for folder, uidnext in uidnexts.items():
        text = (folder / "dovecot-uidlist").read_text()
        header, _, rest = text.partition("\n")
        raised = re.sub(r" N\d+", f" N{min(uidnext, MAX_UID)}", header, count=1)
        (folder / "dovecot-uidlist.new").write_text(f"{raised}\n{rest}")
    if uidnexts:
        flush_file_system(next(iter(uidnexts)))  # all are on one
    for folder in uidnexts:
        (folder / "dovecot-uidlist.new").replace(folder / "dovecot-uidlist")


def receive(path: str, size: int, pieces: Iterable[bytes]) -> Received:
    """Write a body into a new file.

    Raises:
        OSError: the disk is full, say.
    """
    bare = written = 0
    last = b""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        for piece in pieces:
            written += os.write(descriptor, piece)
            bare += piece.count(b"\n") - piece.count(b"\r\n") - (last == b"\r" and piece[:1] == b"\n")
            last = piece[-1:]
    finally:
        os.close(descriptor)
    if written != size:
        raise OSError(ENOSPC, os.strerror(ENOSPC), path)  # what was not written of a piece was told by no error
    return Received(path, size, size + bare)


def files_of(folder: Path) -> dict[int, Path]:
    """The messages of a folder that is not yet in use here, by UID."""
    found = {}
    for path in (folder / "cur").iterdir():
        if (match := _NAME.match(path.name)) is not None:
            found[int(match["uid"])] = path
    return found


def write_subscriptions(root: Path, names: Iterable[str], separator: str, prefix: str) -> None:
    """Write the ``subscriptions`` file; names are as on the wire."""
    lines = [name.removeprefix(prefix).replace(separator, "/") for name in names]
    replace(root / "subscriptions", "".join(f"{line}\n" for line in sorted(set(lines))))


def remove_other_folders(root: Path, keep: Mapping[str, Path]) -> None:
    """Remove folders that the legacy server no longer has; ``keep`` are the directories of those it has."""
    kept = set(keep.values())
    for path in sorted(root.rglob("cur"), key=lambda each: len(each.parts), reverse=True):
        folder = path.parent
        if folder == root or folder in kept:
            continue
        for part in ("cur", "new", "tmp"):
            for file in (folder / part).iterdir():
                file.unlink()
            (folder / part).rmdir()
        for file in [each for each in folder.iterdir() if each.is_file()]:
            file.unlink()
        if not any(folder.iterdir()):
            folder.rmdir()


def replace(path: Path, text: str) -> None:
    """Write a small file atomically and durably, unless it is so already."""
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return
    new = path.with_name(path.name + ".new")
    new.write_text(text, encoding="utf-8")
    _flush(new)
    new.replace(path)
    _flush(path.parent)


def _indexed(folder: Path) -> set[tuple[int, int]]:
    """UIDVALIDITY and UID of the messages that ``dovecot-uidlist`` names."""
    try:
        header, *lines = (folder / "dovecot-uidlist").read_text().splitlines()
    except (FileNotFoundError, ValueError):
        return set()
    found = re.search(r" V(\d+)", header)
    return {(int(found[1]), int(line.partition(" ")[0])) for line in lines} if found else set()


def take_over(home: Path, root: Path) -> None:
    """Make ``root`` ours until :func:`hand_over`; ``home`` keeps the mark.

    A mailbox that is there and not ours, Dovecot's after an earlier stay, say,
    is set aside under another name: it is never mixed with the copy. One that
    is ours loses what may not be whole since the host was started anew: the
    messages of no ``dovecot-uidlist``. A worker that was merely killed leaves
    nothing doubtful.
    """
    mark = home / _MARK
    now = Path("/proc/sys/kernel/random/boot_id").read_text()
    if not mark.exists():
        set_aside(root)
        replace(mark, now)
    elif mark.read_text() != now:
        for cur in root.rglob("cur") if root.exists() else ():
            on_disk = _indexed(cur.parent)
            for path in cur.iterdir():
                match = _NAME.match(path.name)
                if match is not None and (int(match["uidvalidity"]), int(match["uid"])) not in on_disk:
                    path.unlink()
        replace(mark, now)


def set_aside(path: Path) -> None:
    """Give a directory, if there is one, a name under which nobody looks for it."""
    if path.exists():
        path.rename(path.with_name(f"{path.name}.before-{time.time_ns()}"))


def hand_over(home: Path) -> None:
    """From here on the mailbox is Dovecot's."""
    (home / _MARK).unlink(missing_ok=True)


def make_durable(path: Path) -> None:
    """Put a file and its name on the disk."""
    _flush(path)
    _flush(path.parent)


def flush_folder(folder: Path) -> None:
    """Put the names of a Maildir's messages on the disk."""
    _flush(folder / "cur")
    _flush(folder / "new")


def flush_file_system(path: Path) -> None:
    """Have the kernel put everything of the file system that holds ``path`` on the disk (syncfs(2))."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if _libc.syncfs(descriptor) != 0:
            raise OSError(ctypes.get_errno(), f"syncfs: {os.strerror(ctypes.get_errno())}", str(path))
    finally:
        os.close(descriptor)


def _flush(path: Path) -> None:
    """Have the kernel put a file or a directory on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
