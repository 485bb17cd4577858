"""Where mailboxes are kept on this host: Dovecot's Maildir, or its dbox formats.

A copy is always written as Maildir, for that is the format whose UIDs can be
chosen. Where mailboxes are kept in dbox, the Maildir is a staging area, and
Dovecot's own dsync (``doveadm backup``) carries it over, with UIDs, flags,
keywords, dates and UIDLs.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import file_digest, sha256
from pathlib import Path

from imapclient import imap_utf7

from bascule.address import Address
from bascule.imap.reader import Batch, Layout, Message, Reader, Wanted, insisted
from bascule.imap.wire import PIECE
from bascule.migrator import maildir
from bascule.migrator.copying import Pass
from bascule.migrator.local import Local

#: HIGHESTMODSEQ here is raised this far above the legacy server's, which moves on until the flip.
MODSEQ_GAP = 1_000_000

CLOSED = ".returning"  # after the name of a mailbox that is closed

Messages = dict[int, Message]
#: UIDVALIDITY and messages of a folder by its name.
Read = Callable[[str], tuple[int, Messages]]


def straggler_name(folder: str, uidvalidity: int, uid: int) -> str:
    """The name of a late message's file, and the part of its name in a Maildir, that is made of its legacy identity."""
    return f"{uid}.{uidvalidity}.{sha256(folder.encode()).hexdigest()[:16]}"


def digest_of(source: Reader, folder: str, message: Message) -> bytes:
    """The SHA-256 of a message's bytes."""
    digest = sha256()

    def receive(_size: int, pieces: Iterator[bytes]) -> object:
        for piece in pieces:
            digest.update(piece)
        return True

    source.bodies(Wanted([Batch(folder, (message,))]), receive, lambda *_: None)
    return digest.digest()


def _holds(here: Reader, file: Path) -> bool:
    """Whether any folder holds the message that is in a file."""
    size = file.stat().st_size
    with file.open("rb") as body:
        wanted = file_digest(body, "sha256").digest()
    names = [each.name for each in here.layout().folders if each.selectable]
    for changes in list(insisted(here.changes((name, None) for name in names))):
        for message in changes.new:
            if message.size == size and digest_of(here, changes.folder, message) == wanted:
                return True
    return False


class Storage:
    """The mailboxes of this host, as Dovecot's ``mail_location`` says: ``maildir:~/Maildir:LAYOUT=fs`` or dbox."""

    def __init__(self, mail_location: str, local: Local) -> None:
        self._location = mail_location
        driver, path, *_ = mail_location.split(":")
        self._path = path.removeprefix("~/")
        self.is_maildir = driver == "maildir"
        self._local = local

    def root(self, home: Path) -> Path:
        """Where the copy is written."""
        return home / (self._path if self.is_maildir else ".bascule-staging")

    def take_over(self, home: Path) -> None:
        """Make the mailbox ours; see :func:`bascule.migrator.maildir.take_over`."""
        root = self.root(home)
        self.leave(home)
        if not self.is_maildir and not root.exists():
            maildir.set_aside(home / self._path)
        maildir.take_over(home, root)

    def hand_over(self, home: Path) -> None:
        """From here on the mailbox is Dovecot's."""
        maildir.hand_over(home)
        if not self.is_maildir and self.root(home).exists():
            shutil.rmtree(self.root(home))

    def close(self, home: Path) -> None:
        """Have nobody but us open the mailbox, whatever session is still there.

        A process that outlived a killed Dovecot knows of no kick. Under the
        mailbox's name it finds a file from here on, and fails, whatever it does.
        """
        mailbox, closed = home / self._path, home / f"{self._path}{CLOSED}"
        if not closed.exists():
            mailbox.rename(closed)
        mailbox.touch(mode=0o400)

    def closed_location(self, home: Path) -> str:
        """The ``mail_location`` of a mailbox that is closed."""
        driver, _, *options = self._location.split(":")
        return ":".join([driver, f"{home / self._path}{CLOSED}", *options])

    def reopen(self, home: Path) -> None:
        """Undo :meth:`close`, also a worker's that died."""
        mailbox, closed = home / self._path, home / f"{self._path}{CLOSED}"
        if closed.exists():
            mailbox.unlink(missing_ok=True)
            closed.rename(mailbox)

    def leave(self, home: Path) -> None:
        """Put a closed mailbox, whose owner is gone from here, out of everybody's way."""
        maildir.set_aside(home / f"{self._path}{CLOSED}")

    def settle(self, address: Address, home: Path, last_pass: Pass) -> None:
        """Bring what Dovecot has of the mailbox into line with the copy; soon done when little changed.

        HIGHESTMODSEQ is raised above the legacy server's, so that a client that
        asks for what changed since (RFC 7162) is told of it.
        """
        location = None if self.is_maildir else self._staging(home)
        for name, modseq in last_pass.modseqs.items():
            self._local.doveadm(
                "mailbox", "update", "-u", str(address), "--min-highest-modseq", str(modseq + MODSEQ_GAP),
                imap_utf7.decode(name.encode()), location=location,
            )  # fmt: skip
        self.carry_over(address, home)

    def carry_over(self, address: Address, home: Path) -> None:
        """Bring a mailbox in dbox into line with the copy."""
        if not self.is_maildir:
            # To dbox, whose layout needs not be said: a destination cannot say one to Dovecot 2.4.
            destination = self._location.replace("~", str(home), 1)
            self._local.doveadm("backup", "-u", str(address), destination, location=self._staging(home))

    @contextmanager
    def reading(self, address: Address, home: Path, last_pass: Pass) -> Iterator[Read]:
        """For the ``with`` block, what reads a folder of the mailbox here, afresh."""
        layout = last_pass.layout
        if not self.is_maildir:
            with self._local.open(address) as here:

                def read_session(name: str) -> tuple[int, Messages]:
                    changes = next(insisted(here.changes([(name, None)])))
                    return changes.uidvalidity, {message.uid: message for message in changes.new}

                yield read_session
            return
        uidvalidities: Mapping[str, int] = {state.name: state.uidvalidity for state in last_pass.folders}

        def read_files(name: str) -> tuple[int, Messages]:
            path = maildir.folder_path(self.root(home), name, layout.separator, layout.prefix)
            folder = maildir.Folder(path, uidvalidities[name])
            folder.open()
            return folder.uidvalidity, {
                uid: Message(uid, stored.size, stored.internaldate, stored.flags)
                for uid, stored in folder.messages.items()
            }

        yield read_files

    def deliver(
        self, address: Address, home: Path, layout: Layout, folder: str, message: Message, staged: Path, *, again: bool
    ) -> None:
        """Put a message from a complete file into a folder that Dovecot has, or into INBOX if there is none such.

        The file is gone afterwards. ``again``: a worker may have died while it
        did the same.
        """
        if self.is_maildir:
            self._rename(home, layout, folder, message, staged)
            return
        with self._local.open(address) as here:
            if not (again and _holds(here, staged)):
                names = {each.name for each in here.layout().folders if each.selectable}
                with staged.open("rb") as body:
                    pieces = iter(lambda: body.read(PIECE), b"")
                    here.append(
                        folder if folder in names else "INBOX",
                        message.flags,
                        message.internaldate,
                        staged.stat().st_size,
                        pieces,
                    )
        staged.unlink()

    def _rename(self, home: Path, layout: Layout, folder: str, message: Message, staged: Path) -> None:
        root = self.root(home)
        target = maildir.folder_path(root, folder, layout.separator, layout.prefix)
        if not (target / "cur").is_dir():
            target = root
        letters = "".join(sorted(maildir.FLAG_LETTERS[flag] for flag in message.flags if flag in maildir.FLAG_LETTERS))
        stamp = max(message.internaldate, 0)
        name = f"{stamp}.L{staged.name}.bascule,S={staged.stat().st_size}"
        staged.rename(target / "cur" / f"{name}:2,{letters}" if letters else target / "new" / name)
        maildir.flush_folder(target)

    def _staging(self, home: Path) -> str:
        return f"maildir:{self.root(home)}:LAYOUT=fs"
