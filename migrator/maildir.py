"""Mailboxes as Dovecot's Maildir with chosen UIDs.

Dovecot takes UIDVALIDITY and UIDs from ``dovecot-uidlist``, keywords from
``dovecot-keywords``, INTERNALDATE from a file's modification time (Dovecot 2.3
manual, "Maildir Mailbox Format"). Folders are laid out as ``LAYOUT=fs``, so
that names may have dots.

A message's file name is made of its UIDVALIDITY and UID and of the digest of
what was received: repeating a step finds its own work, and nothing but the
files themselves says how far a copy has come. All this is done only while
nobody else delivers to the mailbox; from the flip on it is Dovecot's.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from errno import ENOSPC
from hashlib import sha256
from itertools import count
from pathlib import Path
from threading import Lock

#: System flags (RFC 3501 section 2.3.2) and their letters in a Maildir file name.
FLAG_LETTERS = {"\\Draft": "D", "\\Flagged": "F", "\\Answered": "R", "\\Seen": "S", "\\Deleted": "T"}
_LETTER_FLAGS = {letter: flag for flag, letter in FLAG_LETTERS.items()}
MAX_KEYWORDS = 26  # a to z
MAX_KEYWORD = 50  # bytes of a keyword that Dovecot hands from one storage to another (its mail_max_keyword_length)
#: Keywords for which there is no letter, by UID, in the staging area of another storage: JSON.
MORE_KEYWORDS = ".bascule-keywords"
#: What a file's modification time can hold everywhere, in seconds since 1970.
DATES = range(2**32)
MAX_UID = 2**32 - 1
FEW = 64  # files that are flushed one by one

_NAME = re.compile(
    r"^\d+\.U(?P<uid>\d+)V(?P<uidvalidity>\d+)H(?P<digest>[0-9a-f]{32})\.bascule,"
    r"S=(?P<size>\d+),W=\d+:2,(?P<letters>[A-Za-z]*)$"
)
#: RFC 3501 section 9, flag-keyword: an atom.
_KEYWORD = re.compile(r"[!#$&'+,\-./0-9:;<=>?@A-Z\[^_`a-z|}~]+")
_BARE = re.compile(rb"(?<!\r)\n")
_libc = ctypes.CDLL(None, use_errno=True)
_MARK = ".bascule-copying"


@dataclass(frozen=True, slots=True)
class Stored:
    """A message that is in the folder. ``digest``: the first 32 hexadecimal digits of :attr:`Received.digest`."""

    file_name: str
    size: int
    flags: frozenset[str]
    digest: str

    @property
    def internaldate(self) -> int:
        """Seconds since 1970."""
        return int(self.file_name.partition(".")[0])


@dataclass(frozen=True, slots=True)
class Received:
    """A body that is in ``tmp``: its size as it is and with CRLF at every line end.

    ``digest`` is the SHA-256, in hexadecimal, of what an IMAP server serves of
    it: every line ends in CRLF, and NUL, which no literal can hold, is 0x80.
    """

    path: str
    size: int
    virtual_size: int
    digest: str


class Folder:
    """One folder of a mailbox that is not yet in use here; several threads may add to it.

    ``name`` is the legacy folder's: a directory that was another folder's is
    emptied first, whatever UIDs are in it. ``messages`` maps UIDs to what is
    stored. What was added is in the folder at once, and on the disk after
    :meth:`write_index`: ``dovecot-uidlist`` names only what survives a loss of power.

    ``is_staging``: the mailbox will not be a Maildir. Keywords for which a
    Maildir has no letter are kept in a file beside it then (:func:`more_keywords`).

    ``dropped`` are keywords that cannot be kept, each with the reason: no atom, too
    long for dsync, or more than a Maildir has letters for. Dovecot compares keywords without
    case: of several spellings the first is kept.
    """

    def __init__(self, path: Path, name: str, uidvalidity: int, *, is_staging: bool = False) -> None:
        self.path = path
        self._is_staging = is_staging
        self._more: set[str] = set()
        self._guid = sha256(f"{path}\0{name}\0{uidvalidity}".encode("utf-8", "surrogateescape")).hexdigest()[:32]
        self.dropped: dict[str, str] = {}
        self._cur, self._tmp = str(path / "cur"), str(path / "tmp")
        self.uidvalidity = uidvalidity
        self.messages: dict[int, Stored] = {}
        self._keywords: list[str] = []
        self._spelled: dict[str, str] = {}
        self._unsynced: set[str] = set()
        self._changed = False
        self._added: list[int] = []
        #: Whether Dovecot has to read the folder anew, and knows no HIGHESTMODSEQ of it any more.
        self.indexes_forgotten = False
        self._numbers = count(1)
        self._lock = Lock()

    def open(self) -> None:
        """Make the directories, take stock of what is there, and clear away what an interrupted run left."""
        for part in ("cur", "new", "tmp"):
            (self.path / part).mkdir(mode=0o700, parents=True, exist_ok=True)
        for leftover in (self.path / "tmp").iterdir():
            leftover.unlink()
        if not self._is_this_folder():
            for message in (self.path / "cur").iterdir():
                message.unlink()
            forget_indexes(self.path)
            self.indexes_forgotten = True
            (self.path / "dovecot-keywords").unlink(missing_ok=True)
            (self.path / MORE_KEYWORDS).unlink(missing_ok=True)
            (self.path / "dovecot-uidlist").write_text(self._header(1))
        keywords = self.path / "dovecot-keywords"
        if keywords.exists():
            self._keywords = [line.partition(" ")[2] for line in keywords.read_text().splitlines()]
            self._spelled = {keyword.lower(): keyword for keyword in self._keywords}
        more = more_keywords(self.path)
        self._more = {keyword for keywords in more.values() for keyword in keywords}
        self._spelled |= {keyword.lower(): keyword for keyword in self._more}
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
                flags = known[letters] | more.get(uid, frozenset())
                self.messages[uid] = Stored(entry.name, int(match["size"]), flags, match["digest"])
                if (self.uidvalidity, uid) not in on_disk:
                    self._unsynced.add(entry.name)

    def receive(self, size: int, pieces: Iterable[bytes]) -> Received:
        """Take a body into ``tmp``."""
        return receive(f"{self._tmp}/{next(self._numbers)}.bascule", size, pieces)

    def keep(self, uid: int, internaldate: int, flags: frozenset[str], received: Received) -> None:
        """Put a received body into the folder as this message."""
        stamp = storable_date(internaldate)
        os.utime(received.path, (stamp, stamp))
        with self._lock:
            flags = self.storable(flags)
            letters, digest = self._letters(flags), received.digest[:32]
            name = (
                f"{stamp}.U{uid}V{self.uidvalidity}H{digest}.bascule,"
                f"S={received.size},W={received.virtual_size}:2,{letters}"
            )
            os.rename(received.path, f"{self._cur}/{name}")  # noqa: PTH104 (some ten thousand times)
            self.messages[uid] = Stored(name, received.size, flags, digest)
            self._unsynced.add(name)
            self._added.append(uid)
            self._changed = True

    def storable(self, flags: frozenset[str]) -> frozenset[str]:
        """Those flags as they can be kept here; what cannot is noted in ``dropped``."""
        if flags <= FLAG_LETTERS.keys():
            return flags
        kept = flags & FLAG_LETTERS.keys()
        return kept | {known for flag in sorted(flags - kept) if (known := self._keyword(flag)) is not None}

    def _keyword(self, flag: str) -> str | None:
        """The keyword under which a flag is kept; None: it cannot be."""
        if (known := self._spelled.get(flag.lower())) is not None:
            return known
        if _KEYWORD.fullmatch(flag) is None:
            self.dropped[flag] = "is no keyword (RFC 3501 section 9)"
            return None
        if self._is_staging and len(flag) > MAX_KEYWORD:
            self.dropped[flag] = f"is longer than the {MAX_KEYWORD} characters that Dovecot takes"
            return None
        if len(self._keywords) == MAX_KEYWORDS and self._is_staging:
            self._more.add(flag)
            self._spelled[flag.lower()] = flag
            return flag
        if len(self._keywords) == MAX_KEYWORDS:
            self.dropped[flag] = f"is more than the {MAX_KEYWORDS} that a folder can have here"
            return None
        self._keywords.append(flag)
        self._spelled[flag.lower()] = flag
        # Known on the disk before a file name relies on it.
        replace(self.path / "dovecot-keywords", "".join(f"{n} {k}\n" for n, k in enumerate(self._keywords)))
        return flag

    def set_flags(self, uid: int, flags: frozenset[str]) -> None:
        """Have a message these flags, as :meth:`storable` gives them."""
        stored = self.messages[uid]
        name = stored.file_name.partition(":")[0] + ":2," + self._letters(flags)
        if name != stored.file_name:
            (self.path / "cur" / stored.file_name).rename(self.path / "cur" / name)
        self._changed = True
        if stored.file_name in self._unsynced:
            self._unsynced.remove(stored.file_name)
            self._unsynced.add(name)
        self.messages[uid] = Stored(name, stored.size, flags, stored.digest)

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
        # Dovecot takes a message that is put below the next UID that it has seen for one that is gone.
        if self._added and min(self._added) < _uidnext(self.path):
            forget_indexes(self.path)
            self.indexes_forgotten = True
        self._added = []
        lines = [self._header(uidnext)]
        for uid in sorted(self.messages):
            uidl = f"P{uidls[uid]} " if uidls and uid in uidls else ""
            lines.append(f"{uid} {uidl}:{self.messages[uid].file_name.partition(':')[0]}\n")
        replace(self.path / "dovecot-uidlist", "".join(lines))
        if self._more:
            more = {uid: sorted(stored.flags & self._more) for uid, stored in sorted(self.messages.items())}
            replace(
                self.path / MORE_KEYWORDS, json.dumps({uid: keywords for uid, keywords in more.items() if keywords})
            )

    def _header(self, uidnext: int) -> str:
        return f"3 V{self.uidvalidity} N{min(uidnext, MAX_UID)} G{self._guid}\n"

    def _is_this_folder(self) -> bool:
        """Whether the directory is this folder's already."""
        try:
            with (self.path / "dovecot-uidlist").open() as file:
                return f" G{self._guid}" in file.readline()
        except FileNotFoundError:
            return False

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
        return "".join(
            sorted(FLAG_LETTERS.get(flag) or chr(ord("a") + self._keywords.index(flag)) for flag in flags - self._more)
        )


def more_keywords(folder: Path) -> dict[int, frozenset[str]]:
    """Keywords for which a Maildir has no letter, by UID, of a folder of a staging area."""
    try:
        found = json.loads((folder / MORE_KEYWORDS).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return {int(uid): frozenset(keywords) for uid, keywords in found.items()}


def guid_of(folder: Path) -> str:
    """What Dovecot knows the folder by, in any storage; ``dovecot-uidlist`` is written."""
    with (folder / "dovecot-uidlist").open() as file:
        return file.readline().rpartition(" G")[2].strip()


def storable_date(internaldate: int) -> int:
    """The nearest date that a file can have, in seconds since 1970."""
    return min(max(internaldate, DATES.start), DATES.stop - 1)


def forget_indexes(folder: Path) -> None:
    """Have Dovecot take a folder as it finds it: what it noted of UIDs and flags is removed, not the messages."""
    for path in folder.glob("dovecot.index*"):
        path.unlink()


def raise_uidnexts(uidnexts: Mapping[Path, int]) -> None:
    """Have new messages get UIDs from there on, in folders whose ``dovecot-uidlist`` is written.

    Not before both sides were found equal: a message that comes later belongs below it.
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
    digest = sha256()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        for piece in pieces:
            written += os.write(descriptor, piece)
            alone = piece.count(b"\n") - piece.count(b"\r\n") - (last == b"\r" and piece[:1] == b"\n")
            bare += alone
            digest.update(_as_served(piece, last) if alone or b"\0" in piece else piece)
            last = piece[-1:]
    finally:
        os.close(descriptor)
    if written != size:
        raise OSError(ENOSPC, os.strerror(ENOSPC), path)  # what was not written of a piece was told by no error
    return Received(path, size, size + bare, digest.hexdigest())


def files_of(folder: Path) -> dict[int, Path]:
    """The messages of a folder that is not yet in use here, by UID."""
    found = {}
    for path in (folder / "cur").glob("*"):
        if (match := _NAME.match(path.name)) is not None:
            found[int(match["uid"])] = path
    return found


def _as_served(piece: bytes, before: bytes) -> bytes:
    """A piece of a body with CRLF at each line end and 0x80 for NUL; ``before``: the byte before it."""
    before = before if before == b"\r" else b""
    served = _BARE.sub(b"\r\n", before + piece).replace(b"\0", b"\x80")
    return served[len(before) :]


def write_subscriptions(root: Path, names: Iterable[Sequence[str]]) -> None:
    """Write the ``subscriptions`` file; each name as the parts of its path, none: INBOX."""
    lines = {"/".join(parts) or "INBOX" for parts in names}
    replace(root / "subscriptions", "".join(f"{line}\n" for line in sorted(lines)))


def remove_other_folders(root: Path, kept: AbstractSet[Path]) -> None:
    """Remove folders that the legacy server no longer has; ``kept`` are the directories of those it has."""
    for path in sorted(root.rglob("cur"), key=lambda each: len(each.parts), reverse=True):
        folder = path.parent
        if folder == root or folder in kept:
            continue
        for part in ("cur", "new", "tmp"):  # a worker may have been killed while it made them
            if (folder / part).is_dir():
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


def uidvalidity_of(folder: Path) -> int:
    """The UIDVALIDITY of the legacy folder whose messages are in a directory; 0: it has none."""
    try:
        with (folder / "dovecot-uidlist").open() as file:
            found = re.search(r" V(\d+)", file.readline())
    except FileNotFoundError:
        return 0
    return int(found[1]) if found else 0


def _uidnext(folder: Path) -> int:
    """The next UID that ``dovecot-uidlist`` names."""
    with (folder / "dovecot-uidlist").open() as file:
        found = re.search(r" N(\d+)", file.readline())
    return int(found[1]) if found else 1


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


def set_aside(path: Path) -> Path | None:
    """Give a directory, if there is one, a name under which nobody looks for it; that name."""
    return path.rename(path.with_name(f"{path.name}.before-{time.time_ns()}")) if path.exists() else None


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
