"""What the hooks go by while the authenticator does not answer: files, which stand in for it.

One file a mailbox that the legacy server has no say in, the same again for each of its aliases, and one a domain for
everybody else in it, all in one folder. A
hook reads one of them and decides nothing: a file has the replies that the authenticator would give, made by the
same code. It is a row of netstrings (:mod:`bascule.netstring`) of fields between NULs:

``password NUL HASH``
    What the password of a login must match, in Dovecot's notation; in the file of a mailbox that is here.
``REQUEST NUL SERVICE NUL reply``
    The reply to ``login``, ``passdb`` or ``userdb`` for one of Dovecot's services, ``*`` for all that are not named,
    as in :mod:`bascule.hooks.protocol`. What is not there is a temporary failure.

Who logs in is known by a password that matches, or by the legacy server to which Dovecot proxies the session. So in the
file of a domain there are replies to logins at the services that Dovecot proxies, and never one for another service:
to that it would be the proof. In the values of that file ``*`` stands for the local part.

A file is named after the address, local part and domain percent-encoded (:func:`file_name`); that of a domain is
``@domain``. It is replaced by a rename. A mailbox whose name is too long for a file is not kept, and hooks take no
other file for it.

**How old it may be.** A change that others wait for (a hold) is in its file before this node acknowledges it, so the
files are never behind what was acknowledged, and nothing flips without this node as long as it is registered. For a
node that was forgotten all the same there is a limit: the files are good until the moment in the file ``until``, GOOD
seconds after the last heartbeat that was accepted. A new start of the host removes that file, so that no file is used
which a loss of power may have left old or half written.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal
from urllib.parse import quote, unquote

from bascule import log, netstring
from bascule.address import Address
from bascule.directory import Directory, Domain, Mailbox
from bascule.errors import BasculeError
from bascule.hooks.protocol import Reply

GOOD = 24 * 3600.0  # seconds after a heartbeat; schema/functions/nodes.sql, forget_node(), knows it
REFRESH = 60.0  # seconds before that moment is put off again
RETRY = 5.0  # seconds before what could not be written is tried again
PATIENCE = 30.0  # seconds that a change may take to be on the disk
BATCH = 200  # files that are looked at before other work has its turn
PAUSE = 0.01  # seconds of that turn, when all files are looked at
LONGEST = 255  # bytes of a file's name (NAME_MAX of Linux's file systems)
ANY = "*"
EVERYBODY = "*"
#: Its folder has Dovecot's group.
MODE = 0o640


@dataclass(frozen=True, slots=True)
class Answer:
    """The reply to one kind of request, for a service of Dovecot's or for ANY that is not named."""

    kind: Literal["login", "passdb", "userdb"]
    service: str
    reply: Reply


@dataclass(frozen=True, slots=True)
class Left:
    """What is left for the hooks, of a mailbox or of all others in a domain."""

    answers: tuple[Answer, ...]
    password_hash: str | None = None

    def encode(self) -> bytes:
        words = [] if self.password_hash is None else [f"password\0{self.password_hash}"]
        words += [f"{each.kind}\0{each.service}\0{each.reply.text}" for each in self.answers]
        return b"".join(netstring.encode(word.encode()) for word in words)


def _encoded(part: str) -> str:
    """Only a-z, 0-9 and ``_.-~`` stay as they are, a dot not at the beginning."""
    text = quote(part, safe="")
    return f"%2E{text[1:]}" if text.startswith(".") else text


def file_name(address: Address) -> str | None:
    """The name of a mailbox's file; None: it would be too long."""
    name = f"{_encoded(address.local_part)}@{_encoded(address.domain)}"
    return name if len(name) <= LONGEST else None


def domain_file_name(domain: str) -> str:
    return f"@{_encoded(domain)}"


class Deputy:
    """Keeps the files equal to the directory, in a thread, soon after it is told of a change.

    ``mailbox`` and ``domain`` say what is to be left; of a mailbox None: as of everybody else in its domain.
    """

    def __init__(
        self,
        folder: Path,
        until: Path,
        directory: Directory,
        *,
        mailbox: Callable[[Mailbox, Domain], Left | None],
        domain: Callable[[Domain], Left],
    ) -> None:
        self._folder = folder
        self._until = until
        self._directory = directory
        self._left_for_mailbox, self._left_for_domain = mailbox, domain
        self._mailboxes: set[Address] = set()
        self._domains = False
        #: As they were written last, and the other way round.
        self._aliases: dict[Address, Address] = {}
        self._names: dict[Address, list[Address]] = {}
        self._under_way: frozenset[Address] = frozenset()
        #: Whose files are to be compared with the directory still, once in the life of a process; None: not begun.
        self._unseen: list[Address] | None = None
        self._begun = False
        self._sure: float | None = None  # the last time that :meth:`sure` was called
        self._refreshed = 0.0
        self._told = asyncio.Event()
        #: Set when all that was told is on the disk.
        self.settled = asyncio.Event()
        self._progress = asyncio.Condition()

    def mailbox_changed(self, address: Address) -> None:
        self._mailboxes.add(address)
        self._tell()

    def domains_changed(self) -> None:
        self._domains = True
        self._tell()

    def sure(self) -> None:
        """The directory has all changes until this node's last heartbeat: what is left is good for a time from now on.

        The first time, all files are compared with the directory.
        """
        if not self._begun:
            self._begun = self._domains = True
        self._sure = time.time()
        self._tell()

    def _tell(self) -> None:
        self.settled.clear()
        self._told.set()

    async def written(self, address: Address) -> None:
        """Return when the present state of a mailbox is in its file.

        Raises:
            BasculeError: the disk does not take it in time.
        """
        try:
            async with asyncio.timeout(PATIENCE), self._progress:
                await self._progress.wait_for(lambda: address not in self._mailboxes | self._under_way)
        except TimeoutError as error:
            raise BasculeError(
                f"the state of {address} is not on the disk after {PATIENCE:g} s",
                hint=f"Is the disk of {self._folder} full, or does it hang?",
            ) from error

    async def keep(self) -> None:
        """Write what changes until cancelled. What cannot be written is tried again."""
        while True:
            await self._told.wait()
            self._told.clear()
            while await self._step():
                pass
            self.settled.set()

    async def _step(self) -> bool:
        """Do one piece of work, the most urgent; False: there is none."""
        self._under_way = frozenset(islice(self._mailboxes, BATCH))
        self._mailboxes -= self._under_way
        with_domains, self._domains = self._domains, False
        try:
            if self._under_way:
                await asyncio.to_thread(self._write_mailboxes, self._under_way)
                self._domains = self._domains or with_domains
            elif with_domains:
                await asyncio.to_thread(self._write_domains)
            elif self._begun and self._unseen is None:
                self._unseen = await asyncio.to_thread(self._everybody)
            elif self._unseen:
                await asyncio.to_thread(self._write_mailboxes, self._unseen[-BATCH:])
                del self._unseen[-BATCH:]
                await asyncio.sleep(PAUSE)
            elif self._sure is not None:
                sure, self._sure = self._sure, None
                if sure >= self._refreshed + REFRESH:
                    await asyncio.to_thread(self._replace, self._until, f"{sure + GOOD:.0f}\n".encode(), 0o644)
                    self._refreshed = sure
            else:
                return False
        except OSError as error:
            self._mailboxes |= self._under_way
            self._domains = self._domains or with_domains
            log.get().warning(
                "what Dovecot goes by while no authenticator answers could not be written",
                path=str(error.filename or self._folder),
                reason=error.strerror,
            )
            await asyncio.sleep(RETRY)
        self._under_way = frozenset()
        async with self._progress:
            self._progress.notify_all()
        return True

    # In a thread, one at a time ----------------------------------------------------

    def _everybody(self) -> list[Address]:
        """Who has a file, or must have one."""
        found = set(self._directory.mailboxes.copy())
        for path in self._folder.iterdir():
            local_part, at, domain = path.name.partition("@")
            if local_part and at and path.name.isascii():  # others are not ours
                found.add(Address(unquote(local_part), unquote(domain)))
        return list(found)

    def _write_mailboxes(self, addresses: Iterable[Address]) -> None:
        for address in addresses:
            self._write_name(address)
            for alias in self._names.get(address, ()):
                self._write_name(alias)

    def _write_name(self, address: Address) -> None:
        """What is left of a mailbox, under its own name or an alias."""
        name = file_name(address)
        if name is None:
            return
        # Not by a detail: of such names there is no end, and nobody would say that one has to be written anew.
        is_known = address in self._directory.mailboxes or address in self._aliases
        mailbox = self._directory.of_login(address) if is_known else None
        domain = None if mailbox is None else self._directory.domains.get(mailbox.address.domain)
        left = None if mailbox is None or domain is None else self._left_for_mailbox(mailbox, domain)
        self._put(name, None if left is None else left.encode())

    def _write_domains(self) -> None:
        domains = dict(self._directory.domains)
        for name, domain in domains.items():
            self._put(domain_file_name(name), self._left_for_domain(domain).encode())
        for path in self._folder.iterdir():
            if path.name.startswith("@") and unquote(path.name[1:]) not in domains:
                path.unlink(missing_ok=True)
        # What is left of who has a name of their own at the legacy server depends on the domain, too.
        mailboxes = self._directory.mailboxes.copy()
        changed = {address for address, each in mailboxes.items() if each.account and each.account.legacy_login}
        former, self._aliases = self._aliases, self._directory.aliases.copy()
        changed |= {alias for alias, _ in former.items() ^ self._aliases.items()}
        self._names = {}
        for alias, target in self._aliases.items():
            self._names.setdefault(target, []).append(alias)
        self._write_mailboxes(changed)

    def _put(self, name: str, content: bytes | None) -> None:
        path = self._folder / name
        if content is None:
            path.unlink(missing_ok=True)
            return
        with suppress(FileNotFoundError):
            if path.read_bytes() == content:
                return
        self._replace(path, content, MODE)

    @staticmethod
    def _replace(path: Path, content: bytes, mode: int) -> None:
        """Whole or not at all. The name of what is not whole yet is that of no mailbox's file."""
        new = path.with_name(".new")
        new.unlink(missing_ok=True)
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, mode)  # whatever the umask
            file.write(content)
        new.replace(path)
