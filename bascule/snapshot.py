"""The last known state of a directory, on disk, for a start while the database is away.

An SQLite file, in which a change writes only what it changes, whole or not at
all: a million mailboxes are not written anew because one of them moves.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
import sys
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bascule import log
from bascule.address import Address
from bascule.directory import Account, Directory, Domain, Mailbox, Served
from bascule.errors import BasculeError
from bascule.legacy import LegacySettings, Service

INTERVAL = 1.0  # seconds between two writes, at least
RETRY = 30.0  # seconds before what could not be written is tried again
_VERSION = 1  # of the layout below
_LAYOUT = f"""
    PRAGMA user_version = {_VERSION};
    CREATE TABLE domain (content TEXT NOT NULL);
    CREATE TABLE alias (alias TEXT PRIMARY KEY, target TEXT NOT NULL) WITHOUT ROWID;
    CREATE TABLE mailbox (
        local_part TEXT, domain TEXT, id INTEGER NOT NULL, state TEXT NOT NULL, epoch INTEGER NOT NULL,
        lmtp_next_hop TEXT NOT NULL, PRIMARY KEY (domain, local_part)
    ) WITHOUT ROWID;
"""
#: Only an authenticator writes it. It was not there in 0.1, whose files are read all the same.
_ACCOUNTS = """
    CREATE TABLE IF NOT EXISTS account (
        local_part TEXT, domain TEXT, password_hash TEXT, needs_credential INTEGER NOT NULL, home TEXT NOT NULL,
        served TEXT NOT NULL, legacy_login TEXT, declined INTEGER NOT NULL, imported INTEGER NOT NULL,
        PRIMARY KEY (domain, local_part)
    ) WITHOUT ROWID;
"""


_Others = tuple[list[Domain], list[tuple[Address, Address]], list[Address]]


def _others(directory: Directory) -> _Others:
    """All but the mailboxes; they are few, and written together."""
    return list(directory.domains.values()), list(directory.aliases.items()), list(directory.unmoved)


class Snapshot:
    """Writes what was told to have changed, soon after, in a thread."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._mailboxes: set[Address] = set()
        self._domains = False
        self._changed = asyncio.Event()
        #: Set when all that was told is on the disk.
        self.saved = asyncio.Event()

    def mailbox_changed(self, address: Address) -> None:
        self._mailboxes.add(address)
        self._tell()

    def domains_changed(self) -> None:
        """Domains, aliases, or names with a delimiter in them."""
        self._domains = True
        self._tell()

    def _tell(self) -> None:
        self.saved.clear()
        self._changed.set()

    async def keep(self, directory: Directory) -> None:
        """Write changes until cancelled. What cannot be written is tried again."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            addresses, self._mailboxes = self._mailboxes, set()
            with_domains, self._domains = self._domains, False
            try:
                await asyncio.to_thread(
                    self._write,
                    ((address, directory.mailboxes.get(address)) for address in addresses),
                    _others(directory) if with_domains else None,
                )
            except (OSError, sqlite3.Error) as error:
                self._mailboxes |= addresses
                self._domains = self._domains or with_domains
                self._changed.set()
                log.get().warning(
                    "the routes could not be saved for a start without the database",
                    path=str(self._path),
                    reason=str(error),
                )
                await asyncio.sleep(RETRY)
            if not self._changed.is_set():
                self.saved.set()
            await asyncio.sleep(INTERVAL)

    def _write(
        self,
        mailboxes: Iterable[tuple[Address, Mailbox | None]],
        others: _Others | None,
    ) -> None:
        self._path.touch(mode=0o600)  # who has which address is nobody else's business
        with self._open() as database, database:
            if others is not None:
                domains, aliases, unmoved = others
                for table in ("domain", "alias", "unmoved"):
                    database.execute(f"DELETE FROM {table}")
                database.execute("INSERT OR IGNORE INTO written VALUES (1)")
                database.executemany("INSERT INTO unmoved VALUES (?)", ((str(address),) for address in unmoved))
                database.executemany(
                    "INSERT INTO domain VALUES (?)", ((json.dumps(asdict(domain)),) for domain in domains)
                )
                database.executemany(
                    "INSERT INTO alias VALUES (?, ?)", ((str(alias), str(target)) for alias, target in aliases)
                )
            for address, box in mailboxes:
                key = (address.local_part, address.domain)
                if box is None:
                    database.execute("DELETE FROM mailbox WHERE local_part = ? AND domain = ?", key)
                    database.execute("DELETE FROM account WHERE local_part = ? AND domain = ?", key)
                    continue
                database.execute(
                    "INSERT OR REPLACE INTO mailbox VALUES (?, ?, ?, ?, ?, ?)",
                    (*key, box.id, box.state, box.epoch, box.lmtp_next_hop),
                )
                if (account := box.account) is not None:
                    served = json.dumps(asdict(account.served))
                    database.execute(
                        "INSERT OR REPLACE INTO account VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                        (
                            *key,
                            account.password_hash,
                            account.needs_credential,
                            account.home,
                            served,
                            account.legacy_login,
                            account.declined,
                            account.imported,
                        ),
                    )

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        with closing(sqlite3.connect(self._path)) as database:
            version = database.execute("PRAGMA user_version").fetchone()[0]
            if version == 0:
                database.executescript(_LAYOUT)
            elif version != _VERSION:
                raise sqlite3.DatabaseError(f"layout {version}, not {_VERSION}; remove the file")
            # It came later, and a version that does not know it may go on with the file.
            database.execute("CREATE TABLE IF NOT EXISTS unmoved (address TEXT PRIMARY KEY) WITHOUT ROWID")
            # Has a row once the domains were written: that there are none is known only then.
            database.execute("CREATE TABLE IF NOT EXISTS written (domains INTEGER PRIMARY KEY)")
            database.executescript(_ACCOUNTS)
            yield database

    def restore(self, directory: Directory) -> bool:
        """Fill ``directory`` with the last known state; False, and nothing done, if there is none that can be read."""
        if not self._path.exists():
            return False
        try:
            with self._open() as database:
                domains = dict(_domain(*row) for row in database.execute("SELECT content FROM domain"))
                aliases = {
                    Address.parse(alias): Address.parse(target)
                    for alias, target in database.execute("SELECT alias, target FROM alias")
                }
                rows = database.execute(
                    "SELECT local_part, domain, id, state, epoch, lmtp_next_hop, password_hash, needs_credential, "
                    "home, served, legacy_login, declined, imported "
                    "FROM mailbox LEFT JOIN account USING (domain, local_part)"
                )
                mailboxes = {box.address: box for box in _mailboxes(rows)}
                unmoved = {Address.parse(address) for (address,) in database.execute("SELECT address FROM unmoved")}
                written = database.execute("SELECT count(*) FROM written").fetchone()[0]
        except (OSError, ValueError, KeyError, TypeError, sqlite3.Error, BasculeError) as error:
            log.get().warning("snapshot cannot be used, set aside", path=str(self._path), reason=str(error))
            with suppress(OSError):
                self._path.replace(self._path.with_suffix(".unusable"))
            return False
        if not domains and not written:
            return False
        directory.domains, directory.aliases, directory.mailboxes = domains, aliases, mailboxes
        directory.unmoved = unmoved
        directory.loaded = True
        return True


def _domain(content: str) -> tuple[str, Domain]:
    values = json.loads(content)
    settings = values["legacy"]
    for port in ("imap", "pop3", "submission", "sieve"):
        settings[port] = Service(**settings[port]) if settings.get(port) else None
    first_login_migrates = values.get("first_login_migrates", True)
    return settings["domain"], Domain(values["id"], values["mode"], LegacySettings(**settings), first_login_migrates)


def _mailboxes(rows: Iterable[tuple[Any, ...]]) -> Iterator[Mailbox]:
    shared: dict[str, Served] = {}

    def served(content: str) -> Served:
        if content not in shared:
            values = json.loads(content)
            uses = tuple((use, folder) for use, folder in values.pop("special_uses"))
            shared[content] = Served(**values, special_uses=uses)
        return shared[content]

    for local_part, domain, id_, state, epoch, next_hop, password_hash, needs_credential, home, content, *more in rows:
        address = Address(local_part, sys.intern(domain))
        account = None
        if content is not None:
            legacy_login, declined, imported = more
            account = Account(
                password_hash,
                bool(needs_credential),
                home,
                served(content),
                legacy_login,
                bool(declined),
                bool(imported),
            )
        yield Mailbox(id_, address, sys.intern(state), epoch, sys.intern(next_hop), account)  # type: ignore[arg-type]
