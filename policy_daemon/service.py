"""The process: listen, follow the database, put changes into force, count sightings."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable

import uvloop

from bascule import log, program, settings
from bascule.address import Address
from bascule.database import AsyncConnection, connect_async
from bascule.directory import Directory, Mailbox
from bascule.errors import BasculeError
from bascule.follower import Follower
from bascule.metrics import serve, watch
from bascule.policy_daemon import metrics, servers
from bascule.policy_daemon.queue import PostfixQueue
from bascule.policy_daemon.routes import Routes
from bascule.serving import Server, until_told
from bascule.snapshot import Snapshot
from bascule.watch import Watch

PART = "policy_daemon"
RETRY = 1.0  # seconds before a change is tried again that Postfix did not take


class Service:
    """One policy daemon."""

    def __init__(self, configuration: settings.Settings) -> None:
        self._settings = configuration
        self._log = log.get()
        self.directory = Directory(delimiter=configuration.dovecot.recipient_delimiter)
        self.queue = PostfixQueue(configuration.postfix.config_directory, self.directory.delimiter)
        self.routes = Routes(self.directory, configuration.policy_daemon.hold, self.queue.barrier_seen)
        self._dsn = configuration.dsn(PART)
        self._changes: dict[Address, asyncio.Task[None]] = {}
        self._sightings: Counter[Address] = Counter()
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
        listening: list[Server | servers.PromptServer] = [
            servers.PromptServer(mine.socketmap, lambda: servers.Socketmap(self.routes)),
            servers.PromptServer(mine.policy, lambda: servers.Policy(self.answer)),
            Server(mine.hold, servers.hold),
        ]
        for server in listening:
            await server.start()
        self._log.info("serving", socketmap=mine.socketmap, policy=mine.policy)
        await until_told(Watch(self._settings, PART).beside(self.follower.run()))
        for server in listening:
            await server.stop()
        for task in list(self._changes.values()):
            task.cancel()
        await self._sign_off()

    async def _sign_off(self) -> None:
        try:
            async with connect_async(self._dsn) as connection:
                await self._record_sightings(connection)
                await self.follower.sign_off(connection)
        except BasculeError as error:
            self._log.warning(
                "stopped without signing off", lost_sightings=self._sightings.total(), reason=error.message
            )

    def answer(self, attributes: dict[str, str]) -> str:
        """The policy service: ``policy_context`` says which of its two questions is asked."""
        recipient = attributes.get("recipient", "")
        if attributes.get("policy_context") != "accepted":
            action = self.routes.verification(recipient)
            metrics.VERIFICATIONS.labels(action.partition(" ")[0]).inc()
            return action
        seen = self.routes.sighting(recipient)
        if seen is not None:
            self._sightings[seen] += 1
            metrics.SIGHTINGS.inc()
        return "DUNNO"

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
            await self._until_done(address, lambda: self.follower.acknowledge(mailbox))
        self._log.info("route in force", address=str(address), state=mailbox.state if mailbox else "legacy")

    async def _until_done(self, address: Address, step: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await step()
            except BasculeError as error:
                self._log.warning("a change of route waits", address=str(address), reason=error.message)
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
        await self._record_sightings(connection)

    async def _record_sightings(self, connection: AsyncConnection) -> None:
        while self._sightings:
            address, count = self._sightings.popitem()
            try:
                await connection.execute("SELECT bascule.record_sighting(%s, %s)", (str(address), count))
            except BaseException:
                self._sightings[address] += count
                raise


def _run(configuration: settings.Settings) -> None:
    uvloop.run(Service(configuration).run())


main = program.command(PART, "Answer Postfix's socketmaps and policy requests from memory.", _run)
