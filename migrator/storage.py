"""Where mailboxes are kept on this host: Dovecot's Maildir, or its dbox formats.

A copy is always written as Maildir, for that is the format whose UIDs can be
chosen. Where mailboxes are kept in dbox, the Maildir is a staging area, and
Dovecot's own dsync (``doveadm backup``) carries it over, with UIDs, flags,
keywords, dates and UIDLs. Keywords for which a Maildir has no letter are added
afterwards: dsync takes away what the staging area has not.

What lies in a home, and what who comes next does about it (:meth:`Storage.recover`):

=========================  ==========================================  ==============================================
name                       means                                       in another state than that
=========================  ==========================================  ==============================================
``.bascule.lock``          the lock of the worker that is at it        nothing: the kernel ends it with the process
``.bascule-copying``       the mailbox is ours: it is being copied     moved already: the mark is taken away
``.bascule-staging``       the staging area, for dbox                  moved already: it is removed
``.bascule-gap``           next UIDs were raised for a flip            copying: the dbox is made anew
``.bascule-evidence.gz``   digests of what came in, at the flip        kept
``.bascule-sieve.json``    digests of the Sieve scripts we wrote       kept: what the user changed is told by them
``.bascule-staged``        late messages on their way                  the next sweep goes on with them
``.bascule-return``        the message that a return is appending      written anew
``NAME.returning``         a mailbox closed by a return                still moved: opened again; sent back: set aside
``NAME.before-N``          what was there before the copy              never touched
=========================  ==========================================  ==============================================
"""

from __future__ import annotations

import gzip
import re
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from imapclient import imap_utf7

from bascule import log
from bascule.address import Address
from bascule.directory import State
from bascule.imap.reader import sets
from bascule.migrator import maildir
from bascule.migrator.copying import UID_GAP, Pass
from bascule.migrator.local import Local

#: HIGHESTMODSEQ here is raised this far above the legacy server's, which moves on until the flip.
MODSEQ_GAP = 1_000_000
MAX_MODSEQ = 2**62  # above which none are left for what happens here (RFC 7162 section 7: 63 bits)
#: doveadm backup's exit status when folders were renamed or made anew, and it has to be run again (doveadm-sync(1)).
AGAIN = 2
DSYNCS = 4  # runs, at most
AT_ONCE = 4  # doveadms that are run together: each takes one folder

CLOSED = ".returning"  # after the name of a mailbox that is closed
GAP = ".bascule-gap"
EVIDENCE = ".bascule-evidence.gz"

_RECEIVED = re.compile(r"^(\d+)\.U(\d+)V\d+H([0-9a-f]{32})\.bascule,S=(\d+)")

#: Bytes, digest and INTERNALDATE of a message as it came in.
Evidence = tuple[int, str, int]


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

    def is_there(self, home: Path) -> bool:
        """Whether the mailbox is where it must be, once it has moved: its file system may not be mounted."""
        return (home / self._path).is_dir()

    # Who has the mailbox ----------------------------------------------------------

    def recover(self, address: Address, home: Path, state: State) -> None:
        """Bring what a dead worker left into line with the mailbox's state; first of all, in every task."""
        if state == "local":
            self.hand_over(home)
            self.reopen(home, address)
        elif state != "returning":
            self.leave(home)
            if (home / GAP).exists():
                if not self.is_maildir and (home / self._path).exists():
                    shutil.rmtree(home / self._path)  # a copy whose next UIDs are too high; the staging area has it all
                (home / GAP).unlink()

    def take_over(self, home: Path) -> None:
        """Make the mailbox ours; see :func:`bascule.migrator.maildir.take_over`."""
        root = self.root(home)
        if not self.is_maildir and not root.exists():
            maildir.set_aside(home / self._path)
        maildir.take_over(home, root)

    def hand_over(self, home: Path) -> None:
        """From here on the mailbox is Dovecot's."""
        maildir.hand_over(home)
        (home / GAP).unlink(missing_ok=True)
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

    def reopen(self, home: Path, address: Address | None = None) -> None:
        """Undo :meth:`close`, also a worker's that died.

        A mailbox that somebody made meanwhile under the name, for power was lost
        before :meth:`close` was done, is set aside, and its mail is brought into
        that of ``address``.
        """
        mailbox, closed = home / self._path, home / f"{self._path}{CLOSED}"
        if not closed.exists():
            return
        stray = None
        if mailbox.is_dir():
            stray = maildir.set_aside(mailbox)
        mailbox.unlink(missing_ok=True)
        closed.rename(mailbox)
        if stray is not None and address is not None:
            log.get().warning("a mailbox was made beside one that was closed", address=str(address), path=str(stray))
            driver, _, *options = self._location.split(":")
            location = ":".join([driver, str(stray), *options])
            self._local.doveadm("import", "-u", str(address), location, "", "ALL")

    def leave(self, home: Path) -> None:
        """Put a closed mailbox, whose owner is gone from here, out of everybody's way."""
        closed = home / f"{self._path}{CLOSED}"
        if closed.exists():
            maildir.set_aside(closed)

    # The copy ---------------------------------------------------------------------

    def settle(self, address: Address, home: Path, last_pass: Pass) -> None:
        """Bring what Dovecot has of the mailbox into line with the copy; soon done when little changed.

        HIGHESTMODSEQ is raised above the legacy server's, so that a client that
        asks for what changed since (RFC 7162) is told of it.
        """
        self.carry_over(address, home)
        self.raise_modseqs(address, last_pass, list(last_pass.modseqs))

    def raise_modseqs(self, address: Address, last_pass: Pass, folders: list[str]) -> None:
        """Raise HIGHESTMODSEQ of legacy folders' places here above what the legacy server has of any of them."""
        if not folders:
            return
        raised = {name: min(last_pass.modseqs[name] + MODSEQ_GAP, MAX_MODSEQ) for name in folders}
        self._update(address, last_pass, "--min-highest-modseq", raised)

    def carry_over(self, address: Address, home: Path) -> None:
        """Bring a mailbox in dbox into line with the copy."""
        if not self.is_maildir:
            # To dbox, whose layout needs not be said: a destination cannot say one to Dovecot 2.4.
            destination = self._location.replace("~", str(home), 1)
            staging = f"maildir:{self.root(home)}:LAYOUT=fs"
            for _ in range(DSYNCS):
                ended = self._local.doveadm(
                    "backup", "-u", str(address), destination, location=staging, good=(0, AGAIN)
                )
                if ended != AGAIN:
                    break
            else:
                # There are names for which it says so whenever it is run. Whether all is there the verification finds.
                log.get().info("doveadm backup wants to be run again", address=str(address), runs=DSYNCS)
            self._add_keywords(address, home)

    def _add_keywords(self, address: Address, home: Path) -> None:
        """Give the messages in dbox the keywords for which the staging area, a Maildir, has no letter."""
        for file in sorted(self.root(home).rglob(maildir.MORE_KEYWORDS)):
            uids: dict[frozenset[str], list[int]] = {}
            for uid, keywords in maildir.more_keywords(file.parent).items():
                uids.setdefault(keywords, []).append(uid)
            # By GUID, for a name may hold what doveadm takes for a wildcard.
            mailbox = ("mailbox-guid", maildir.guid_of(file.parent))
            for keywords, marked in uids.items():
                for part in sets(sorted(marked)):
                    words = " ".join(sorted(keywords))
                    self._local.doveadm("flags", "add", "-u", str(address), "--", words, *mailbox, "uid", part.decode())

    def leave_gap(self, address: Address, home: Path, last_pass: Pass) -> None:
        """Have UIDs given here begin above a gap: when both sides were found equal, and only the flip follows."""
        uidnexts = {state.name: state.next_here + UID_GAP for state in last_pass.folders}
        maildir.replace(home / GAP, "")
        if self.is_maildir:
            root = self.root(home)
            maildir.raise_uidnexts({last_pass.path(root, name): uidnext for name, uidnext in uidnexts.items()})
            return
        self._update(
            address,
            last_pass,
            "--min-next-uid",
            {name: min(uidnext, maildir.MAX_UID) for name, uidnext in uidnexts.items()},
        )

    def digests(self, home: Path, last_pass: Pass, folder: str) -> dict[int, str]:
        """The first 32 hexadecimal digits of the digest of each message of a legacy folder as it came in, by UID."""
        return {uid: digest for uid, (_, digest, _) in self._received(home, last_pass, folder)}

    def keep_evidence(self, home: Path, last_pass: Pass) -> None:
        """Write down what came in: a line for each message, with folder, UIDVALIDITY, UID, bytes, digest and date."""
        new = home / f"{EVIDENCE}.new"
        with gzip.open(new, "wt", encoding="utf-8", errors="surrogateescape", compresslevel=1) as file:
            for state in last_pass.folders:
                for uid, (size, digest, date) in self._received(home, last_pass, state.name):
                    file.write(f"{state.name}\t{state.uidvalidity}\t{uid}\t{size}\t{digest}\t{date}\n")
        new.replace(home / EVIDENCE)

    def _received(self, home: Path, last_pass: Pass, folder: str) -> Iterator[tuple[int, Evidence]]:
        for path in (last_pass.path(self.root(home), folder) / "cur").iterdir():
            if (match := _RECEIVED.match(path.name)) is not None:
                yield int(match[2]), (int(match[4]), match[3], int(match[1]))

    def _update(self, address: Address, last_pass: Pass, option: str, values: Mapping[str, int]) -> None:
        """Give an option of ``doveadm mailbox update`` a value for the place of each legacy folder."""
        layout = last_pass.layout

        def update(folder: str) -> None:
            name = last_pass.places[folder].name(layout.separator, layout.prefix)
            text = imap_utf7.decode(name.encode())  # as doveadm takes it
            self._local.doveadm("mailbox", "update", "-u", str(address), option, str(values[folder]), "--", text)

        with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="doveadm") as pool:
            list(pool.map(update, values))


def evidence(home: Path) -> Mapping[tuple[str, int, int], Evidence]:
    """What a move brought, by legacy folder, UIDVALIDITY and UID."""
    try:
        with gzip.open(home / EVIDENCE, "rt", encoding="utf-8", errors="surrogateescape") as file:
            rows = [line.rstrip("\n").rsplit("\t", 5) for line in file]
    except FileNotFoundError:
        return {}
    return {
        (name, int(validity), int(uid)): (int(size), digest, int(date))
        for name, validity, uid, size, digest, date in rows
    }
