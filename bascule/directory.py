"""What Postfix and Dovecot must know of domains and mailboxes, in memory.

A :class:`Directory` holds every domain, every alias, and the mailboxes whose
mail does not go to the legacy server. It answers without the database and is
kept up to date by LISTEN/NOTIFY; after a lost connection everything is loaded
anew. Until the first load, or the last known state from a snapshot, it knows
nothing and says so (:attr:`Directory.loaded`).
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import psycopg

from bascule import legacy, log
from bascule.address import Address
from bascule.database import AsyncConnection, connect_async
from bascule.errors import BasculeError
from bascule.legacy import LegacySettings, Service

Mode = Literal["prepared", "active", "closed"]
State = Literal["legacy", "requested", "copying", "cutover", "local", "returning"]

HEARTBEAT = 5.0  # seconds; schema/functions.sql, unacknowledged(), waits for three of them
RECONNECT = 1.0  # seconds between attempts to reach the database


@dataclass(frozen=True, slots=True)
class Domain:
    id: int
    mode: Mode
    legacy: LegacySettings


@dataclass(frozen=True, slots=True)
class Mailbox:
    """A mailbox in state cutover, local or returning."""

    id: int
    address: Address
    state: State
    epoch: int
    #: After ``lmtp:``, as in transport(5).
    lmtp_next_hop: str


@dataclass(slots=True)
class Directory:
    """See the module. ``delimiter`` is Postfix's recipient_delimiter."""

    delimiter: str = "+"
    loaded: bool = False
    domains: dict[str, Domain] = field(default_factory=dict)
    mailboxes: dict[Address, Mailbox] = field(default_factory=dict)
    aliases: dict[Address, Address] = field(default_factory=dict)

    def mailbox(self, address: Address) -> Mailbox | None:
        """The mailbox of ``address``, or of it without its detail; None: not one of the exceptions."""
        exact = self.mailboxes.get(address)
        return exact or self.mailboxes.get(address.without_detail(self.delimiter))

    def alias(self, address: Address) -> Address | None:
        """The mailbox that ``address`` is another name of; its detail is kept."""
        exact = self.aliases.get(address)
        if exact is not None:
            return exact
        base = address.without_detail(self.delimiter)
        target = self.aliases.get(base)
        if target is None or base == address:
            return target
        return Address(target.local_part + address.local_part[len(base.local_part) :], target.domain)

    # The snapshot -----------------------------------------------------------

    def save(self, path: Path) -> None:
        """Write the last known state, atomically."""
        # Copies first, each made at one go: this runs in a thread beside the event loop.
        domains, mailboxes, aliases = (
            list(self.domains.values()),
            list(self.mailboxes.values()),
            list(self.aliases.items()),
        )
        content = {
            "domains": [asdict(domain) for domain in domains],
            "mailboxes": [asdict(mailbox) for mailbox in mailboxes],
            "aliases": [[str(alias), str(target)] for alias, target in aliases],
        }
        new = path.with_suffix(".new")
        with new.open("w") as file:
            json.dump(content, file)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)

    def restore(self, path: Path) -> bool:
        """Take up the last known state; False if there is none that can be read."""
        try:
            content = json.loads(path.read_text())
            domains = {}
            for each in content["domains"]:
                settings = each["legacy"]
                for port in ("imap", "pop3", "submission", "sieve"):
                    settings[port] = Service(**settings[port]) if settings.get(port) else None
                domains[settings["domain"]] = Domain(each["id"], each["mode"], LegacySettings(**settings))
            mailboxes = [Mailbox(**(each | {"address": Address(**each["address"])})) for each in content["mailboxes"]]
            aliases = {Address.parse(alias): Address.parse(target) for alias, target in content["aliases"]}
        except FileNotFoundError:
            return False
        except (OSError, ValueError, KeyError, TypeError, BasculeError) as error:
            log.get().warning("snapshot cannot be used", path=str(path), reason=str(error))
            return False
        self.domains, self.aliases = domains, aliases
        self.mailboxes = {mailbox.address: mailbox for mailbox in mailboxes}
        self.loaded = True
        return True


OnChange = Callable[[Mailbox | None, Mailbox | None], None]


class Follower:
    """Keeps a :class:`Directory` equal to the database, and signs this node's heartbeat.

    ``on_change(before, after)`` is called for each mailbox whose place in the
    directory changed, after the directory holds the change; None stands for
    "mail goes to the legacy server". A load of everything after a time without
    the database is such a change for each mailbox that differs; the very first
    load only for those that are being moved at the time. ``on_update`` is
    called after any change of the directory, those of domains and aliases too.
    """

    def __init__(
        self,
        directory: Directory,
        dsn: str,
        *,
        node: str,
        part: str,
        on_change: OnChange,
        on_update: Callable[[], None],
        on_beat: Callable[[AsyncConnection], Awaitable[None]] | None = None,
    ) -> None:
        self._directory = directory
        self._dsn = dsn
        self._node, self._part = node, part
        self._on_change = on_change
        self._on_update = on_update
        self._on_beat = on_beat
        self._by_id: dict[int, Mailbox] = {}
        self._log = log.get()

    async def run(self) -> None:
        """Follow until cancelled; reconnect for ever."""
        while True:
            try:
                async with connect_async(self._dsn) as connection:
                    await self._follow(connection)
            except BasculeError as error:
                self._log.warning("database lost, going on with the last known state", reason=error.message)
            await asyncio.sleep(RECONNECT)

    async def acknowledge(self, mailbox: Mailbox) -> None:
        """Say that this node has put the mailbox's present state into force.

        Raises:
            DatabaseUnavailable, BasculeError: it is not said.
        """
        async with connect_async(self._dsn) as connection:
            await connection.execute(
                "SELECT bascule.acknowledge(%s, %s, %s, %s)",
                (mailbox.id, self._node, self._part, mailbox.epoch),
            )

    async def sign_off(self, connection: AsyncConnection) -> None:
        """Say that this node stops in good order, so that no cutover waits for it."""
        await connection.execute("SELECT bascule.sign_off(%s, %s)", (self._node, self._part))

    async def _follow(self, connection: AsyncConnection) -> None:
        # Listen first, then load: a change in between is seen twice, never missed.
        await connection.execute("LISTEN bascule_mailbox; LISTEN bascule_domain")
        await self._load(connection)
        self._log.info(
            "directory loaded", domains=len(self._directory.domains), mailboxes=len(self._directory.mailboxes)
        )
        loop = asyncio.get_running_loop()
        next_beat = loop.time()
        while True:
            if loop.time() >= next_beat:
                await connection.execute("SELECT bascule.beat(%s, %s)", (self._node, self._part))
                if self._on_beat is not None:
                    await self._on_beat(connection)
                next_beat = loop.time() + HEARTBEAT
            # The connection is free for queries only after the generator has ended.
            timeout = max(0.0, next_beat - loop.time())
            for notify in [each async for each in connection.notifies(timeout=timeout, stop_after=1)]:
                await self._take(connection, notify)

    async def _take(self, connection: AsyncConnection, notify: psycopg.Notify) -> None:
        if notify.channel == "bascule_domain":
            self._directory.domains, self._directory.aliases = await self._domains(connection)
            self._on_update()
            return
        mailbox_id = int(notify.payload)
        after = next(iter(await self._mailboxes(connection, self._directory.domains, mailbox_id)), None)
        before = self._by_id.pop(mailbox_id, None)
        if before is not None:
            del self._directory.mailboxes[before.address]
        if after is not None:
            self._directory.mailboxes[after.address] = self._by_id[mailbox_id] = after
        self._on_update()
        self._on_change(before, after)

    async def _load(self, connection: AsyncConnection) -> None:
        domains, aliases = await self._domains(connection)
        mailboxes = await self._mailboxes(connection, domains, None)
        known = self._directory.mailboxes
        first = not self._directory.loaded
        # Put into force together: no lookup sees a domain without its migrated users.
        self._directory.domains, self._directory.aliases = domains, aliases
        self._directory.mailboxes = {box.address: box for box in mailboxes}
        self._by_id = {box.id: box for box in mailboxes}
        self._directory.loaded = True
        self._on_update()
        for address in known.keys() | self._directory.mailboxes.keys():
            before, after = known.get(address), self._directory.mailboxes.get(address)
            if before != after and not (first and after is not None and after.state == "local"):
                self._on_change(before, after)

    @staticmethod
    async def _domains(connection: AsyncConnection) -> tuple[dict[str, Domain], dict[Address, Address]]:
        cursor = await connection.execute(f"SELECT id, mode, {legacy.COLUMNS} FROM bascule.routing_domain".encode())
        domains = {row[2]: Domain(row[0], row[1], legacy.from_row(*row[2:])) for row in await cursor.fetchall()}
        names = {domain.id: name for name, domain in domains.items()}
        cursor = await connection.execute("SELECT domain_id, local_part, target FROM bascule.routing_alias")
        aliases = {
            Address(local_part, names[domain_id]): Address.parse(target)
            for domain_id, local_part, target in await cursor.fetchall()
            if domain_id in names
        }
        return domains, aliases

    @staticmethod
    async def _mailboxes(
        connection: AsyncConnection, domains: dict[str, Domain], mailbox_id: int | None
    ) -> list[Mailbox]:
        """All that are exceptions, or the one with ``mailbox_id`` if it is one."""
        names = {domain.id: name for name, domain in domains.items()}
        cursor = await connection.execute(
            "SELECT id, domain_id, local_part, state, epoch, lmtp_next_hop FROM bascule.routing_mailbox "
            "WHERE %s::bigint IS NULL OR id = %s::bigint",
            (mailbox_id, mailbox_id),
        )
        return [
            Mailbox(id_, Address(local_part, names[domain_id]), state, epoch, next_hop)
            for id_, domain_id, local_part, state, epoch, next_hop in await cursor.fetchall()
            if domain_id in names
        ]
