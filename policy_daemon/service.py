"""The process: listen, follow the database, put changes into force, look after Postfix's configuration."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from ipaddress import ip_address, ip_network

import uvloop

from bascule import log, plugged, program, settings
from bascule.address import Address
from bascule.child import ChildFailed
from bascule.database import AsyncConnection, connect_async
from bascule.directory import Directory, Mailbox
from bascule.errors import BasculeError
from bascule.follower import Follower
from bascule.legacy import LegacySettings, Trust
from bascule.metrics import serve, watch
from bascule.policy_daemon import metrics, servers
from bascule.policy_daemon.queue import PostfixQueue
from bascule.policy_daemon.routes import BARRIER_DOMAIN, Routes
from bascule.policy_daemon.sightings import Sightings
from bascule.policy_daemon.verification import Identity, Verifier
from bascule.serving import Server, until_told
from bascule.snapshot import Snapshot
from bascule.watch import Watch

PART = "policy_daemon"
RETRY = 1.0  # seconds before a change is tried again that Postfix did not take
DATABASE = 10.0  # seconds for a word to the database
LOOK = 300.0  # seconds between two looks at Postfix's configuration


class Service:
    """One policy daemon."""

    def __init__(self, configuration: settings.Settings, delimiter: str, identity: Identity) -> None:
        self._settings = configuration
        self._log = log.get()
        self.directory = Directory(delimiter=delimiter)
        self.queue = PostfixQueue(configuration.postfix.config_directory, configuration.postfix.listener, delimiter)
        self._dsn = configuration.dsn(PART)
        self.sightings = Sightings(self._dsn)
        self.routes = Routes(self.directory, configuration.policy_daemon.hold, self.sightings.saw)
        self.verifier = Verifier(Trust(configuration.legacy.ca_file, configuration.legacy.timeout), identity)
        self._changes: dict[Address, asyncio.Task[None]] = {}
        self.follower = Follower(
            self.directory,
            Snapshot(configuration.policy_daemon.snapshot),
            self._dsn,
            node=configuration.node,
            part=PART,
            on_change=self._changed,
            on_beat=self._beat,
        )

    async def run(self) -> None:
        """Serve until SIGTERM or SIGINT; a second signal ends the process at once."""
        mine = self._settings.policy_daemon
        self.follower.restore()
        watch(self.directory, self.follower)
        metrics.CHANGES_PENDING.set_function(lambda: len(self._changes))
        serve(mine.metrics)
        lmtp = servers.Lmtp(_is_barrier, self.queue.barrier_arrived)
        listening: list[Server | servers.PromptServer] = [
            servers.PromptServer(mine.socketmap, lambda: servers.Socketmap(self.routes)),
            servers.PromptServer(mine.policy, lambda: servers.Policy(self.answer)),
            Server(mine.hold, lmtp.serve),
        ]
        for server in listening:
            await server.start()
        self._log.info("serving", socketmap=mine.socketmap, policy=mine.policy)
        await until_told(Watch(self._settings, PART).beside(self._work()))
        for server in listening:
            await server.stop()
        for task in list(self._changes.values()):
            task.cancel()
        await self._sign_off()

    async def _work(self) -> None:
        """What goes on beside the answers; none of it may end."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self.follower.run())
            group.create_task(self.sightings.keep_recording())
            group.create_task(self._look_after_postfix())

    async def _sign_off(self) -> None:
        try:
            await self.sightings.record()
            async with asyncio.timeout(DATABASE), connect_async(self._dsn) as connection:
                await self.follower.sign_off(connection)
        except (BasculeError, TimeoutError) as error:
            lost = self.sightings.waiting.total()
            self._log.warning("stopped without signing off", lost_sightings=lost, reason=str(error))

    async def _look_after_postfix(self) -> None:
        """Say when main.cf or master.cf have lost ours: whoever writes a line anew may not know of it."""
        told: list[str] = []
        while True:
            try:
                lost = await plugged.missing(self._settings.postfix.config_directory)
            except ChildFailed as error:
                self._log.warning("Postfix's configuration cannot be looked at", reason=error.message)
            else:
                metrics.UNPLUGGED.set(len(lost))
                if lost and lost != told:
                    self._log.error("Postfix does not ask bascule any more", settings=", ".join(lost))
                told = lost
            await asyncio.sleep(LOOK)

    def answer(self, attributes: dict[str, str]) -> str | Awaitable[str]:
        """The policy service; ``policy_context`` says from where in main.cf it is asked."""
        context, _, networks = attributes.get("policy_context", "").partition(" ")
        if context == "accepted":
            return "DUNNO"  # of a main.cf of the first release: the milter counts now
        if context == "trusted" and not _is_trusted(attributes, networks):
            return "DUNNO"  # asked again behind the operator's restrictions
        recipient = attributes.get("recipient", "")
        found = self.routes.verification(recipient)
        if isinstance(found, str):
            return self._acted(found)
        if context == "verification":
            return self._acted("reject_unverified_recipient")  # likewise; it is followed by the settings for that
        known = self.verifier.known(*found)
        return self._verified(*found) if known is None else self._acted(known.action)

    async def _verified(self, legacy: LegacySettings, recipient: Address) -> str:
        return self._acted((await self.verifier.verdict(legacy, recipient)).action)

    @staticmethod
    def _acted(action: str) -> str:
        metrics.VERIFICATIONS.labels(action.partition(" ")[0]).inc()
        return action

    # Changes of state --------------------------------------------------------

    def _changed(self, before: Mailbox | None, after: Mailbox | None) -> None:
        for mailbox in {box.address: box for box in (before, after) if box is not None}.values():
            self._enforce(mailbox.address)

    def _enforce(self, address: Address) -> None:
        running = self._changes.get(address)
        if running is not None:
            running.cancel()  # it was about an older state
        task = self._changes[address] = asyncio.create_task(self._put_into_force(address))
        task.add_done_callback(lambda done: self._forget(address, done))

    def _forget(self, address: Address, done: asyncio.Task[None]) -> None:
        if self._changes.get(address) is done:
            del self._changes[address]
        if not done.cancelled() and (error := done.exception()) is not None:
            self._log.error("a change of route is not in force", address=str(address), exc_info=error)

    async def _put_into_force(self, address: Address) -> None:
        """Bring Postfix's queue into line with the present state of ``address``, and say so."""
        mailbox = self.directory.mailboxes.get(address)
        await self._until_done(address, lambda: self._align_queue(address, mailbox))
        if mailbox is not None:
            await self._until_done(address, lambda: self._acknowledge(mailbox))
        self._log.info("route in force", address=str(address), state=mailbox.state if mailbox else "legacy")

    async def _acknowledge(self, mailbox: Mailbox) -> None:
        async with asyncio.timeout(DATABASE):
            await self.follower.acknowledge(mailbox)

    async def _until_done(self, address: Address, step: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await step()
            except (BasculeError, TimeoutError) as error:
                reason = str(error) or "it takes too long"
                self._log.warning("a change of route waits", address=str(address), reason=reason)
                await asyncio.sleep(RETRY)
                continue
            return

    async def _align_queue(self, address: Address, mailbox: Mailbox | None) -> None:
        await self.queue.barrier()
        await self.queue.drain(address)
        if mailbox is None or mailbox.state == "local":
            await self.queue.flush(address)

    # Heartbeat -----------------------------------------------------------------

    async def _beat(self, connection: AsyncConnection) -> None:
        await connection.execute("SELECT bascule.undo_overdue_cutovers()")


def _is_barrier(recipient: str) -> bool:
    return recipient.rpartition("@")[2].lower() == BARRIER_DOMAIN


def _is_trusted(attributes: dict[str, str], networks: str) -> bool:
    """Whether a client is one that the operator's restrictions permit before they reject anything: it has logged in,
    or is of ``networks``, as mynetworks is written (postconf(5)); of tables, which we do not read, it is not."""
    if attributes.get("sasl_username"):
        return True
    try:
        client = ip_address(attributes.get("client_address", ""))
    except ValueError:
        return False
    for pattern in networks.replace(",", " ").split():
        try:
            if client in ip_network(pattern.lstrip("!").replace("[", "").replace("]", ""), strict=False):
                return not pattern.startswith("!")
        except ValueError:
            continue
    return False


async def _identity(configuration: settings.Settings) -> tuple[str, Identity]:
    """Postfix's recipient_delimiter, or Dovecot's where it has none; and as whom its smtp(8) speaks."""
    delimiter, helo, source = configuration.dovecot.recipient_delimiter, configuration.node, ""
    try:
        folder = configuration.postfix.config_directory
        delimiter = await plugged.value_of(folder, "recipient_delimiter") or delimiter
        helo = await plugged.value_of(folder, "smtp_helo_name") or helo
        source = await plugged.value_of(folder, "smtp_bind_address")
    except ChildFailed as error:
        log.get().warning("Postfix's configuration cannot be read", reason=error.message)
    return delimiter, Identity(helo, source or None)


async def _serve(configuration: settings.Settings) -> None:
    await Service(configuration, *await _identity(configuration)).run()


def _run(configuration: settings.Settings) -> None:
    uvloop.run(_serve(configuration))


main = program.command(PART, "Answer Postfix's socketmaps and policy requests from memory.", _run)
