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

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from bascule.errors import BasculeError

#: System flags (RFC 3501 section 2.3.2) and their letters in a Maildir file name.
FLAG_LETTERS = {"\\Draft": "D", "\\Flagged": "F", "\\Answered": "R", "\\Seen": "S", "\\Deleted": "T"}
_LETTER_FLAGS = {letter: flag for flag, letter in FLAG_LETTERS.items()}
MAX_KEYWORDS = 26  # a to z
BATCH_MESSAGES, BATCH_BYTES = 100, 4 << 20  # that are put on the disk together, at most

_NAME = re.compile(r"^\d+\.U(?P<uid>\d+)V(?P<uidvalidity>\d+)\.bascule,S=(?P<size>\d+),W=\d+:2,(?P<letters>[A-Za-z]*)$")
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


class Folder:
    """One folder of a mailbox that is not yet in use here.

    ``messages`` maps UIDs to what is stored.
    """

    def __init__(self, path: Path, uidvalidity: int) -> None:
        self.path = path
        self.uidvalidity = uidvalidity
        self.messages: dict[int, Stored] = {}
        self._keywords: list[str] = []
        self._pending: list[tuple[Path, Path]] = []
        self._pending_bytes = 0
        self._changed = False

    def open(self) -> None:
        """Make the directories, take stock of what is there, and clear away what an interrupted run left."""
        for part in ("cur", "new", "tmp"):
            (self.path / part).mkdir(mode=0o700, parents=True, exist_ok=True)
        self._clear_dovecot_indexes()
        for leftover in (self.path / "tmp").iterdir():
            leftover.unlink()
        keywords = self.path / "dovecot-keywords"
        if keywords.exists():
            self._keywords = [line.partition(" ")[2] for line in keywords.read_text().splitlines()]
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
                flags = frozenset(self._flag(letter) for letter in match["letters"])
                self.messages[int(match["uid"])] = Stored(entry.name, int(match["size"]), flags)

    def add(self, uid: int, internaldate: datetime, flags: frozenset[str], chunks: Iterable[bytes]) -> int:
        """Store a message; its size in bytes. It is durable, and in the folder, after the next :meth:`commit`."""
        stamp = max(int(internaldate.timestamp()), 0)
        base = f"{stamp}.U{uid}V{self.uidvalidity}.bascule"
        letters = self._letters(flags)
        temporary = self.path / "tmp" / base
        size = _write(temporary, chunks, stamp)
        name = f"{base},S={size},W={size}:2,{letters}"
        self._pending.append((temporary, self.path / "cur" / name))
        self._pending_bytes += size
        self.messages[uid] = Stored(name, size, flags)
        if len(self._pending) >= BATCH_MESSAGES or self._pending_bytes >= BATCH_BYTES:
            self.commit()
        return size

    def commit(self) -> None:
        """Put what was added on the disk, then into the folder.

        Several at a time: the disk's first flush takes the others' data along.
        """
        for temporary, _ in self._pending:
            _flush(temporary)
        for temporary, name in self._pending:
            temporary.rename(name)
            self._changed = True
        self._pending, self._pending_bytes = [], 0

    def set_flags(self, uid: int, flags: frozenset[str]) -> None:
        stored = self.messages[uid]
        name = stored.file_name.partition(":")[0] + ":2," + self._letters(flags)
        (self.path / "cur" / stored.file_name).rename(self.path / "cur" / name)
        self._changed = True
        self.messages[uid] = Stored(name, stored.size, flags)

    def expunge(self, uid: int) -> None:
        (self.path / "cur" / self.messages.pop(uid).file_name).unlink()
        self._changed = True

    def write_index(self, uidnext: int) -> None:
        """Write ``dovecot-uidlist``; new messages will get UIDs from ``uidnext`` on."""
        self.commit()
        guid = hashlib.sha256(f"{self.path}\0{self.uidvalidity}".encode()).hexdigest()[:32]
        lines = f"3 V{self.uidvalidity} N{uidnext} G{guid}\n" + "".join(
            f"{uid} :{self.messages[uid].file_name.partition(':')[0]}\n" for uid in sorted(self.messages)
        )
        _replace(self.path / "dovecot-uidlist", lines)
        if self._changed:
            _flush(self.path / "cur")
            self._changed = False

    def _clear_dovecot_indexes(self) -> None:
        # Dovecot rebuilds them from the files; after an earlier stay they would be wrong.
        for pattern in ("dovecot.index*", "dovecot-uidlist.*"):
            for path in self.path.glob(pattern):
                path.unlink()

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
                _replace(
                    self.path / "dovecot-keywords",
                    "".join(f"{n} {k}\n" for n, k in enumerate(self._keywords)),
                )
            letters.append(chr(ord("a") + self._keywords.index(flag)))
        return "".join(sorted(letters))


def write_durably(path: Path, chunks: Iterable[bytes], modified: int) -> int:
    """Write a file that survives a power loss, with its modification time (seconds); its size in bytes."""
    size = _write(path, chunks, modified)
    _flush(path)
    _flush(path.parent)
    return size


def _write(path: Path, chunks: Iterable[bytes], modified: int) -> int:
    size = 0
    with path.open("wb") as file:
        for chunk in chunks:
            size += file.write(chunk)
        file.flush()
        os.utime(file.fileno(), (modified, modified))
    return size


def write_subscriptions(root: Path, names: Iterable[str], separator: str, prefix: str) -> None:
    """Write the ``subscriptions`` file; names are as on the wire."""
    lines = [name.removeprefix(prefix).replace(separator, "/") for name in names]
    _replace(root / "subscriptions", "".join(f"{line}\n" for line in sorted(set(lines))))


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


def _replace(path: Path, text: str) -> None:
    """Write a small file atomically and durably, unless it is so already."""
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return
    new = path.with_name(path.name + ".new")
    new.write_text(text, encoding="utf-8")
    _flush(new)
    new.replace(path)
    _flush(path.parent)


def _flush(path: Path) -> None:
    """Have the kernel put a file or a directory on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
