"""Keeps a :class:`Directory` equal to the database by LISTEN/NOTIFY, and signs this node's heartbeat."""

from __future__ import annotations

import asyncio
import gc
import secrets
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

import psycopg

from bascule import legacy, log
from bascule.address import Address
from bascule.database import AsyncConnection, connect_async
from bascule.directory import Account, Directory, Domain, Mailbox, Served
from bascule.errors import BasculeError
from bascule.snapshot import Snapshot

HEARTBEAT = 5.0  # seconds; schema/functions/nodes.sql, is_silent(), waits for three of them
RECONNECT = 1.0  # seconds between attempts to reach the database
RELOAD = 3600.0  # seconds after which everything is read again, in case a notification was lost
RELOAD_UNTOLD = 60.0  # the same, where notifications do not come at all
ARRIVAL = 5.0  # seconds within which a notification must come that proves that they come
BATCH = 2000  # mailboxes that are read before other work has its turn

OnChange = Callable[[Mailbox | None, Mailbox | None], None]

#: What is followed of mailboxes: where mail goes, or also what Dovecot must know.
View = Literal["routing_mailbox", "login_mailbox"]
_COLUMNS: dict[View, str] = {
    "routing_mailbox": "id, state::text, epoch, lmtp_next_hop",
    "login_mailbox": (
        "id, state::text, epoch, lmtp_next_hop, password_hash, needs_credential, home, store, login_host, "
        "hierarchy_separator, namespace_prefix, special_uses, legacy_login, declined, imported"
    ),
}


class Keeper(Protocol):
    """Who keeps what is in a directory, and is told what has changed in it."""

    def mailbox_changed(self, address: Address) -> None: ...

    def domains_changed(self) -> None:
        """Domains, aliases, or names with a delimiter in them."""


class NotNotified(BasculeError):
    """Changes are not notified on a connection: it cannot be followed."""


class Follower:
    """
    ``on_change(before, after)`` is called for each mailbox whose place in the
    directory changed, after the directory holds the change; None stands for
    "mail goes to the legacy server". A load of everything after a time without
    the database is such a change for each mailbox that differs; the very first
    load only for those that are being moved at the time. ``on_update`` is
    called after any change of the directory, those of domains and aliases too.
    ``keepers`` are told of the same changes as the snapshot. ``on_sure`` is called
    soon after each heartbeat that was accepted, when the directory has all
    changes that were made before it.
    """

    def __init__(
        self,
        directory: Directory,
        snapshot: Snapshot,
        dsn: str,
        *,
        node: str,
        part: str,
        on_change: OnChange,
        view: View = "routing_mailbox",
        on_update: Callable[[], None] = lambda: None,
        on_beat: Callable[[AsyncConnection], Awaitable[None]] | None = None,
        keepers: Sequence[Keeper] = (),
        on_sure: Callable[[], None] | None = None,
    ) -> None:
        self._directory = directory
        self._snapshot = snapshot
        self._keepers = (snapshot, *keepers)
        self._on_sure = on_sure
        self._dsn = dsn
        self._node, self._part = node, part
        self._on_change = on_change
        self._view = view
        self._served: dict[Served, Served] = {}
        self._on_update = on_update
        self._on_beat = on_beat
        #: Whether the directory is known to be what the database says.
        self.connected = False
        self._log = log.get()

    def restore(self) -> None:
        """Take up the last known state, if there is one; before anybody is served."""
        if self._snapshot.restore(self._directory):
            gc.freeze()  # see _load
            self._log.info("last known state taken up", mailboxes=len(self._directory.mailboxes))

    async def run(self) -> None:
        """Follow until cancelled; reconnect for ever."""
        saving = asyncio.create_task(self._snapshot.keep(self._directory))
        try:
            while True:
                try:
                    async with connect_async(self._dsn) as connection:
                        await self._follow(connection)
                except NotNotified as error:
                    # What was loaded holds; without a heartbeat no mailbox flips by it.
                    self._log.error("changes are not notified", reason=error.message, advice=error.hint)
                    self.connected = False
                    await asyncio.sleep(RELOAD_UNTOLD)
                    continue
                except BasculeError as error:
                    self._log.warning("database lost, going on with the last known state", reason=error.message)
                self.connected = False
                await asyncio.sleep(RECONNECT)
        finally:
            saving.cancel()

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
        mark = f"bascule_sure_{secrets.token_hex(8)}"
        if self._on_sure is not None:
            await connection.execute(f"LISTEN {mark}".encode())
        notified = await self._is_notified(connection)
        await self._load(connection)
        if not notified:
            raise NotNotified(
                "the pooler before the database does not pass notifications on; everything is read again each minute",
                hint="Let bascule's roles reach PostgreSQL itself, or a pool in session mode (PgBouncer: pool_mode).",
            )
        self.connected = True
        self._log.info(
            "directory loaded", domains=len(self._directory.domains), mailboxes=len(self._directory.mailboxes)
        )
        loop = asyncio.get_running_loop()
        next_beat = loop.time()
        next_load = loop.time() + RELOAD
        while True:
            if loop.time() >= next_load:
                await self._load(connection)
                next_load = loop.time() + RELOAD
            if loop.time() >= next_beat:
                if await self._beat(connection) and self._on_sure is not None:
                    # Notifications come in the order of the commits: with this one, all that was before has come.
                    await connection.execute("SELECT pg_notify(%s, '')", (mark,))
                if self._on_beat is not None:
                    await self._on_beat(connection)
                next_beat = loop.time() + HEARTBEAT
            # The connection is free for queries only after the generator has ended.
            timeout = max(0.0, min(next_beat, next_load) - loop.time())
            told = [each async for each in connection.notifies(timeout=timeout, stop_after=1)]
            if any(each.channel == "bascule_domain" for each in told):
                await self._take_domains(connection)
            for each in told:
                if each.channel == "bascule_mailbox":
                    await self._take(connection, each.payload)
                elif each.channel == mark and self._on_sure is not None:
                    self._on_sure()

    async def _beat(self, connection: AsyncConnection) -> bool:
        """Sign the heartbeat; False: refused. That this name is another host's stops the flips, which wait, not the
        routes here."""
        try:
            await connection.execute("SELECT bascule.beat(%s, %s)", (self._node, self._part))
        except psycopg.errors.InsufficientPrivilege as error:
            self._log.error(
                "heartbeat refused", reason=error.diag.message_primary, advice=error.diag.message_hint or ""
            )
            return False
        return True

    async def _is_notified(self, connection: AsyncConnection) -> bool:
        """Whether notifications come by this connection.

        A pooler that gives each transaction another session of the server takes LISTEN and loses what it is for
        (PgBouncer's manual, "SQL feature map for pooling modes"). Whoever stands between shows another process
        number than the server does.
        """
        cursor = await connection.execute("SELECT pg_backend_pid()")
        row = await cursor.fetchone()
        if row is not None and row[0] == connection.info.backend_pid:
            return True
        channel = f"bascule_arrival_{secrets.token_hex(8)}"
        await connection.execute(f"LISTEN {channel}".encode())
        async with connect_async(self._dsn) as other:
            await other.execute("SELECT pg_notify(%s, '')", (channel,))
            async for each in connection.notifies(timeout=ARRIVAL):
                if each.channel == channel:
                    return True
        return False

    async def _take_domains(self, connection: AsyncConnection) -> None:
        domains, self._directory.aliases = await self._domains(connection)
        self._directory.domains, self._directory.unmoved = domains, await self._unmoved(connection, domains)
        self._domains_changed()
        self._on_update()

    async def _take(self, connection: AsyncConnection, text: str) -> None:
        local_part, _, name = text.rpartition("@")  # as it is in the database
        domain = self._directory.domains.get(name)
        if domain is None:
            return  # its own notification is under way
        cursor = await connection.execute(
            f"SELECT {_COLUMNS[self._view]} FROM bascule.{self._view} "
            "WHERE domain_id = %s AND local_part = %s".encode(),
            (domain.id, local_part),
        )
        row = await cursor.fetchone()
        address = Address(local_part, domain.legacy.domain)
        await self._take_name(connection, domain, address)
        # Nothing is waited for from here on: no lookup sees half of a change.
        before = self._directory.mailboxes.pop(address, None)
        after = None
        if row is not None:
            after = self._directory.mailboxes[address] = self._mailbox(address, *row)
        self._mailbox_changed(address)
        self._on_update()
        if before is not None or after is not None:  # a request changes no route
            self._on_change(before, after)

    async def _load(self, connection: AsyncConnection) -> None:
        domains, aliases = await self._domains(connection)
        unmoved = await self._unmoved(connection, domains)
        known = self._directory.mailboxes
        mailboxes: dict[Address, Mailbox] = {}
        changed: list[Address] = []
        async for batch in self._mailboxes(connection, domains):
            for mailbox in batch:
                before = known.get(mailbox.address)
                if before is not None and before == mailbox:
                    mailboxes[before.address] = before  # the same object: two loads take no more memory than one
                else:
                    mailboxes[mailbox.address] = mailbox
                    changed.append(mailbox.address)
        changed += [address for address in known if address not in mailboxes]
        first = not self._directory.loaded
        # Put into force together: no lookup sees a domain without its migrated users.
        self._directory.domains, self._directory.aliases = domains, aliases
        self._directory.mailboxes, self._directory.unmoved = mailboxes, unmoved
        self._directory.loaded = True
        # All this stays: the collector need not look through it again and again, and hold up lookups meanwhile.
        gc.freeze()
        self._domains_changed()
        for address in changed:
            self._mailbox_changed(address)
        self._on_update()
        for address in changed:
            after = mailboxes.get(address)
            if not (first and after is not None and after.state == "local"):
                self._on_change(known.get(address), after)

    @staticmethod
    async def _domains(connection: AsyncConnection) -> tuple[dict[str, Domain], dict[Address, Address]]:
        cursor = await connection.execute(
            f"SELECT id, mode, first_login_migrates, {legacy.COLUMNS}, smtp_tls FROM bascule.routing_domain".encode()
        )
        domains = {row[3]: Domain(row[0], row[1], legacy.from_row(*row[3:]), row[2]) for row in await cursor.fetchall()}
        names = {domain.id: name for name, domain in domains.items()}
        cursor = await connection.execute("SELECT domain_id, local_part, target FROM bascule.routing_alias")
        aliases = {
            Address(local_part, names[domain_id]): Address.parse(target)
            for domain_id, local_part, target in await cursor.fetchall()
            if domain_id in names
        }
        return domains, aliases

    async def _unmoved(self, connection: AsyncConnection, domains: dict[str, Domain]) -> set[Address]:
        """Mailboxes that have not moved, if their name has a delimiter in it."""
        names = {domain.id: name for name, domain in domains.items()}
        cursor = await connection.execute(
            "SELECT domain_id, local_part FROM bascule.routing_unmoved "
            "WHERE translate(local_part, %s, '') <> local_part",
            (self._directory.delimiter,),
        )
        return {
            Address(local_part, names[domain_id])
            for domain_id, local_part in await cursor.fetchall()
            if domain_id in names
        }

    async def _take_name(self, connection: AsyncConnection, domain: Domain, address: Address) -> None:
        """Whether a name with a delimiter in it is a mailbox of its own, and has not moved."""
        if address.without_detail(self._directory.delimiter) == address:
            return
        cursor = await connection.execute(
            "SELECT FROM bascule.routing_unmoved WHERE domain_id = %s AND local_part = %s",
            (domain.id, address.local_part),
        )
        if await cursor.fetchone() is None:
            self._directory.unmoved.discard(address)
        else:
            self._directory.unmoved.add(address)
        self._domains_changed()

    async def _mailboxes(self, connection: AsyncConnection, domains: dict[str, Domain]) -> AsyncIterator[list[Mailbox]]:
        """All that are exceptions, a batch at a time, so that lookups go on meanwhile."""
        names = {domain.id: name for name, domain in domains.items()}
        async with connection.transaction(), connection.cursor("routing_mailbox", binary=True) as cursor:
            await cursor.execute(
                f"SELECT domain_id, local_part, {_COLUMNS[self._view]} FROM bascule.{self._view}".encode()
            )
            while rows := await cursor.fetchmany(BATCH):
                yield [
                    self._mailbox(Address(local_part, names[domain_id]), *row)
                    for domain_id, local_part, *row in rows
                    if domain_id in names
                ]

    def _mailbox_changed(self, address: Address) -> None:
        for keeper in self._keepers:
            keeper.mailbox_changed(address)

    def _domains_changed(self) -> None:
        for keeper in self._keepers:
            keeper.domains_changed()

    def _mailbox(
        self, address: Address, id_: int, state: str, epoch: int, lmtp_next_hop: str, *account: Any
    ) -> Mailbox:
        return Mailbox(
            id_,
            address,
            sys.intern(state),  # type: ignore[arg-type]
            epoch,
            sys.intern(lmtp_next_hop),
            account_of(*account, shared=self._served) if account else None,
        )


def account_of(
    password_hash: str | None,
    needs_credential: bool,
    home: str,
    store: str,
    login_host: str | None,
    separator: str,
    prefix: str,
    special_uses: Mapping[str, str],
    legacy_login: str | None = None,
    declined: bool = False,
    imported: bool = False,
    *,
    shared: dict[Served, Served] | None = None,
) -> Account:
    """What a row of ``login_mailbox`` says; ``shared`` has what mailboxes have in common."""
    served = Served(store, login_host, separator, prefix, tuple(sorted(special_uses.items())))
    if shared is not None:
        served = shared.setdefault(served, served)
    return Account(password_hash, needs_credential, home, served, legacy_login, declined, imported)
