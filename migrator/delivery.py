"""Putting late messages into the mailbox here, each exactly once, whoever dies when.

The file of a message is completed in a staging directory, then the database
records it (*staged*), then it goes into the mailbox, then the database records
that (*delivered*). Whoever dies in between has a successor that finishes it.

In a Maildir the file is renamed into the folder: if it is no longer in the
staging directory, it is in the mailbox, wherever its owner has put it since.
Keywords have no place in a file's name that we may choose, for Dovecot hands
them out; they are added through Dovecot afterwards, to the message with the
file's name, which may be done twice.

In dbox, Dovecot has to append it, with a keyword of ours beside its own. One
message at a time has that keyword: if there is one in the mailbox, the message
whose file is still there was appended already, whatever others like it there
are. The file goes first, then the keyword.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from contextlib import ExitStack
from email.parser import BytesParser
from email.policy import compat32
from functools import cached_property
from hashlib import sha256
from pathlib import Path

from bascule import log
from bascule.errors import LocalUnavailable, ServerUnavailable
from bascule.imap import names
from bascule.imap.pipeline import CommandRefused
from bascule.imap.reader import Batch, Layout, Message, Reader, Wanted, insisted
from bascule.imap.responses import is_legal_keyword
from bascule.imap.wire import PIECE
from bascule.imap.writer import Writer
from bascule.migrator import maildir, metrics
from bascule.migrator.acts import Straggler
from bascule.migrator.attempt import Attempt
from bascule.migrator.late import Content

STAGING = ".bascule-staged"
ARRIVING = "$BasculeArriving"
HEADER = 1 << 18  # bytes in which a Message-ID is looked for


class Digest:
    """Takes a message in pieces; what it holds, as Dovecot serves it: CRLF at every line end, 0x80 for NUL."""

    def __init__(self) -> None:
        self._hash = sha256()
        self._size = 0
        self._head = b""
        self._held_back = b""  # a CR at the end of a piece: its LF may come with the next

    def update(self, piece: bytes) -> None:
        piece = self._held_back + piece
        self._held_back = piece[-1:] if piece.endswith(b"\r") else b""
        self._add(piece[: len(piece) - len(self._held_back)])

    def content(self) -> Content:
        self._add(self._held_back)
        self._held_back = b""
        return Content(self._hash.digest(), self._size, _message_id(self._head.replace(b"\r\n", b"\n")))

    def _add(self, piece: bytes) -> None:
        text = piece.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n").replace(b"\0", b"\x80")
        self._hash.update(text)
        self._size += len(text)
        if len(self._head) < HEADER:
            self._head += text[: HEADER - len(self._head)]


def message_id_of(file: Path) -> str:
    """The Message-ID of the message in a file, or nothing."""
    with file.open("rb") as body:
        return _message_id(body.read(HEADER).replace(b"\r\n", b"\n"))


def _message_id(head: bytes) -> str:
    header, _, _ = head.partition(b"\n\n")
    found = BytesParser(policy=compat32).parsebytes(header, headersonly=True).get("Message-ID", "")
    return str(found).strip()


def content_at(reader: Reader, folder: str, message: Message) -> Content | None:
    """What a message at a server holds; None: it does not come."""
    digest = Digest()

    def receive(_size: int, pieces: Iterator[bytes]) -> object:
        for piece in pieces:
            digest.update(piece)
        return True

    came = []
    wanted = Wanted([Batch(folder, (message,))])
    reader.bodies(wanted, receive, lambda *_: came.append(True))
    return digest.content() if came and not wanted.not_given_at_all else None


class Delivery:
    """Puts the late messages of one attempt's mailbox into it; use it in a ``with`` statement."""

    def __init__(self, attempt: Attempt) -> None:
        self._attempt = attempt
        self._names_here = names_here(attempt)
        self._stack = ExitStack()
        self._session: Writer | None = None
        self.staging = attempt.home / STAGING

    def __enter__(self) -> Delivery:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def here(self) -> Writer:
        """A session with the Dovecot here, opened when it is first needed."""
        if self._session is None:
            self._session = self._stack.enter_context(self._attempt.local.open(self._attempt.account.address))
        return self._session

    @cached_property
    def layout(self) -> Layout:
        """The folders here, when they were first asked for."""
        return self.here.layout()

    def name_here(self, folder: str) -> str:
        """The name here, as on the wire, of a legacy folder, or the one that it would have if it were made here."""
        if (name := self._names_here.get(folder)) is not None:
            return name
        separator, prefix = self.layout.separator, self.layout.prefix
        return names.place_of(folder, {}, separator, separator, prefix).name(separator, prefix)

    def folders_here(self) -> set[str]:
        """The folders here that can be opened, now."""
        return {each.name for each in self.here.layout().folders if each.selectable}

    def begin(self) -> None:
        """Finish what another worker began, and clear away what it left.

        Raises:
            LocalUnavailable, OSError: nothing was lost.
        """
        self.staging.mkdir(mode=0o700, exist_ok=True)
        stragglers = self._attempt.acts.stragglers(self._attempt.account.id)
        staged = {file_name(each): each for each in stragglers if not each.delivered}
        for leftover in self.staging.iterdir():
            if leftover.name not in staged:
                leftover.unlink()
        for straggler in staged.values():
            self.put(straggler, again=True)

    def stage(self, straggler: Straggler, file: Path) -> None:
        """Take a message's file, and deliver it.

        Raises:
            LocalUnavailable, OSError: the next :meth:`begin` goes on with it.
        """
        os.utime(file, (maildir.storable_date(straggler.internaldate or 0),) * 2)
        staged = file.replace(self.staging / file_name(straggler))
        maildir.make_durable(staged)
        self._attempt.acts.stage_straggler(self._attempt.account.id, straggler)
        self.put(straggler, again=False)

    def put(self, straggler: Straggler, *, again: bool) -> None:
        """Put a staged message into its folder here, or into INBOX if there is none such.

        ``again``: a worker may have died while it did the same.
        """
        staged = self.staging / file_name(straggler)
        if self._attempt.storage.is_maildir:
            place, guid = self._rename(straggler, staged)
        else:
            place, guid = self._append(straggler, staged, again=again)
        self._attempt.acts.straggler_delivered(self._attempt.account.id, straggler.identity, place, guid)
        metrics.STRAGGLERS.inc()
        log.get().info(
            "straggler brought",
            address=str(self._attempt.account.address),
            folder=straggler.folder,
            uid=straggler.uid,
            place=place,
        )

    # Maildir ------------------------------------------------------------------------

    def _rename(self, straggler: Straggler, staged: Path) -> tuple[str, str]:
        """Put the file into the folder; the folder's name here, and the name that Dovecot gives the message."""
        place, guid = "", ""
        if staged.exists():
            place, target = self._directory(straggler.folder)
            letters = "".join(
                sorted(maildir.FLAG_LETTERS[flag] for flag in straggler.flags if flag in maildir.FLAG_LETTERS)
            )
            status = staged.stat()
            guid = f"{int(status.st_mtime)}.L{staged.name}.bascule,S={status.st_size}"
            staged.rename(target / "cur" / f"{guid}:2,{letters}" if letters else target / "new" / guid)
            maildir.flush_folder(target)
        if keywords := _keywords(straggler):
            mark = f".L{staged.name}.bascule"
            # If its owner has moved it elsewhere meanwhile, its keywords are not worth a search of everything.
            candidates = dict.fromkeys((place, self.name_here(straggler.folder), "INBOX"))
            for folder in [each for each in candidates if each in self.folders_here()]:
                if uids := [uid for uid, guid in self.here.guids(folder).items() if mark in guid]:
                    self._add_keywords(folder, uids, keywords)
                    break
        return place, guid

    def _directory(self, folder: str) -> tuple[str, Path]:
        root = self._attempt.storage.root(self._attempt.home)
        name = self.name_here(folder)
        if name == "INBOX":
            return name, root
        target = root.joinpath(*name.removeprefix(self.layout.prefix).split(self.layout.separator))
        return (name, target) if (target / "cur").is_dir() else ("INBOX", root)

    # dbox ---------------------------------------------------------------------------

    def _append(self, straggler: Straggler, staged: Path, *, again: bool) -> tuple[str, str]:
        """Append the file to the folder; the folder's name here, and the name that Dovecot gives the message."""
        found = _arriving(self.here) if again else None
        if found is None and staged.exists():
            found = self._append_now(straggler, staged)
        if found is not None:
            self._add_keywords(found[0], [found[1]], _keywords(straggler))
        staged.unlink(missing_ok=True)
        maildir.make_durable(self.staging)
        if found is None:
            return "", ""  # all was done but to record it
        folder, uid = found
        guid = self.here.guids(folder).get(uid, "")
        self.here.select(folder)
        self.here.change_flags([uid], {ARRIVING}, wanted=False)
        return folder, guid

    def _append_now(self, straggler: Straggler, staged: Path) -> tuple[str, int]:
        place = self.name_here(straggler.folder)
        folder = place if place in self.folders_here() else "INBOX"
        flags = frozenset(straggler.flags) - _keywords(straggler) | {ARRIVING}
        size, date = staged.stat().st_size, int(staged.stat().st_mtime)
        try:
            with staged.open("rb") as body:
                uid = self.here.append(folder, flags, date, size, iter(lambda: body.read(PIECE), b""))
        except ServerUnavailable as error:
            raise LocalUnavailable(
                f"Dovecot here does not take a late message of {self._attempt.account.address}: {error.message}",
                hint="Is the mailbox full? The message is kept beside it, and tried again.",
            ) from error
        found = (folder, uid) if uid is not None else _arriving(self.here)
        if found is None:
            raise LocalUnavailable(f"a late message that was appended to {folder!r} is not found here")
        return found

    def _add_keywords(self, folder: str, uids: list[int], keywords: frozenset[str]) -> None:
        """Add them one by one, for Dovecot refuses a command for the one that it cannot have."""
        if keywords:
            self.here.select(folder)
        for keyword in sorted(keywords):
            try:
                self.here.change_flags(uids, {keyword}, wanted=True)
            except CommandRefused as error:
                log.get().warning("a keyword is not kept", folder=folder, keyword=keyword, reason=error.message)


def names_here(attempt: Attempt) -> dict[str, str]:
    """The name here of each folder that was copied, by its legacy name."""
    folders = attempt.acts.verified_folders(attempt.account.id)
    return {each["name"]: each.get("here", each["name"]) for each in folders}


def _keywords(straggler: Straggler) -> frozenset[str]:
    return frozenset(flag for flag in straggler.flags if not flag.startswith("\\"))


def deliverable(flags: AbstractSet[str]) -> tuple[str, ...]:
    """Those flags that a message can have here: Dovecot takes no keyword that is none (RFC 3501 section 9)."""
    return tuple(sorted(flag for flag in flags if flag in maildir.FLAG_LETTERS or is_legal_keyword(flag)))


def _arriving(here: Writer) -> tuple[str, int] | None:
    """Folder and UID of the message that has the keyword of ours."""
    selectable = [each.name for each in here.layout().folders if each.selectable]
    found = None
    for changes in insisted(here.changes((name, None) for name in selectable)):
        for message in changes.new:
            if ARRIVING.lower() in {flag.lower() for flag in message.flags}:
                found = (changes.folder, message.uid)
    return found


def file_name(straggler: Straggler) -> str:
    """The name of a late message's file, and the part of its name in a Maildir."""
    return straggler.name or legacy_name(*straggler.identity)


def legacy_name(folder: str, uidvalidity: int, uid: int) -> str:
    """A name made of a message's place at the legacy server; former versions gave nothing but this."""
    return f"{uid}.{uidvalidity}.{sha256(folder.encode('utf-8', 'surrogateescape')).hexdigest()[:16]}"


def new_name(folder: str, uidvalidity: int, uid: int, digest: bytes, taken: AbstractSet[str]) -> str:
    """A name for the file of a late message that none of the others has, even if one had this UID before."""
    name = f"{legacy_name(folder, uidvalidity, uid)}.{digest.hex()[:16]}"
    while name in taken:
        name += "x"
    return name
