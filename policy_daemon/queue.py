"""Putting a change of route into force in Postfix's queue.

The queue manager keeps the last recipient that it resolved for 30 seconds, so
after a change a quiet server would go on using the old route. The *barrier* is
a tiny message to a recipient of our own, which the queue manager hands to a
socket of ours: when it has arrived there, the kept answer is gone and every later
resolution asks anew. Messages that were active before it still follow the old
route: *draining* waits until they have left the active queue.

The barrier enters by an SMTP listener of our own in master.cf, where no content
filter, no milter, no archive and no list of those who may submit stands.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

import aiosmtplib

from bascule import log
from bascule.address import Address
from bascule.child import ChildFailed, output_of
from bascule.endpoint import address_of
from bascule.errors import BadAddress, BasculeError
from bascule.policy_daemon import metrics
from bascule.policy_daemon.routes import BARRIER_DOMAIN
from bascule.policy_daemon.smtp import session
from bascule.shared import Shared

BARRIER_TIMEOUT = 10.0  # seconds from its submission to its arrival
COMMAND_TIMEOUT = 30.0  # seconds for one of Postfix's commands; a queue of 100,000 messages is listed in 5
POLL = 0.05  # seconds between looks at the active queue; Postfix offers no event for it


class QueueError(BasculeError):
    """Postfix did not do its work in time, or one of its commands failed."""


@dataclass(frozen=True, slots=True)
class Queued:
    """A message in the queue for one recipient."""

    queue_name: str
    queue_id: str
    recipient: Address


class PostfixQueue:
    """The queue of the Postfix instance with this configuration directory, and the listener by which barriers enter."""

    def __init__(self, config_directory: Path, listener: str, delimiter: str) -> None:
        self._delimiter = delimiter
        self._listener = listener
        # postqueue's -c is not honoured for an unprivileged caller; MAIL_CONFIG is (postfix(1)).
        self._environment = os.environ | {"MAIL_CONFIG": str(config_directory)}
        self._barriers: dict[str, asyncio.Event] = {}
        #: Returns when every later resolution of a recipient asks us anew; raises QueueError.
        self.barrier = Shared(self._barrier, 2 * BARRIER_TIMEOUT)
        self._listing = Shared(self._list, 2 * COMMAND_TIMEOUT)

    def barrier_arrived(self, recipient: str) -> None:
        """The queue manager has handed a barrier on; it may be one of before a restart."""
        nonce = recipient.rpartition("@")[0]
        if nonce in self._barriers:
            self._barriers[nonce].set()

    async def _barrier(self) -> None:
        nonce = f"barrier-{secrets.token_hex(8)}"
        arrived = self._barriers[nonce] = asyncio.Event()
        try:
            async with asyncio.timeout(BARRIER_TIMEOUT):
                with metrics.BARRIER.time():
                    await self._submit(f"{nonce}@{BARRIER_DOMAIN}")
                    await arrived.wait()
        except TimeoutError as error:
            raise QueueError(
                "Postfix did not deliver the barrier in time", hint="Is the queue manager running? See Postfix's log."
            ) from error
        except (OSError, aiosmtplib.SMTPException) as error:
            raise QueueError(
                f"Postfix does not take the barrier at {self._listener}: {error}",
                hint="Is the service bascule in master.cf, and Postfix reloaded since?",
            ) from error
        finally:
            del self._barriers[nonce]

    async def _submit(self, recipient: str) -> None:
        where = address_of(self._listener)
        options = {"hostname": None, "socket_path": str(where)} if isinstance(where, Path) else _inet(*where)
        client = aiosmtplib.SMTP(**options, local_hostname="localhost", start_tls=False, timeout=BARRIER_TIMEOUT)
        async with session(client):
            await client.sendmail("", recipient, b"Subject: barrier\r\n\r\n")

    async def drain(self, about: Address) -> None:
        """Wait until the messages for ``about`` that are active now have left the active queue."""
        waiting = {each.queue_id for each in await self._messages(about) if each.queue_name == "active"}
        while waiting:
            await asyncio.sleep(POLL)
            waiting &= {each.queue_id for each in await self._messages(about) if each.queue_name == "active"}

    async def flush(self, about: Address) -> int:
        """Have the deferred messages for ``about`` delivered now; how many there were."""
        deferred = {each.queue_id for each in await self._messages(about) if each.queue_name == "deferred"}
        for queue_id in deferred:
            await self._run("postqueue", "-i", queue_id)
        if deferred:
            log.get().info("held mail released", address=str(about), messages=len(deferred))
        return len(deferred)

    async def _messages(self, about: Address) -> list[Queued]:
        """What is in the queue for an address, with any detail."""
        base = about.without_detail(self._delimiter)
        try:
            listing = await self._listing()
        except TimeoutError as error:
            raise QueueError("the list of Postfix's queue did not come in time") from error
        return [each for each in listing.get(base, []) if about in {base, each.recipient}]

    async def _list(self) -> dict[Address, list[Queued]]:
        """The queue, by recipient without detail."""
        listing = await self._run("postqueue", "-j")
        return await asyncio.to_thread(_parse, listing, self._delimiter)  # it may be long

    async def _run(self, *command: str) -> bytes:
        try:
            return await output_of(*command, timeout=COMMAND_TIMEOUT, environment=self._environment)
        except ChildFailed as error:
            raise QueueError(error.message, hint=error.hint) from error


def _inet(host: str, port: int) -> dict[str, object]:
    return {"hostname": host, "port": port}


def _parse(listing: bytes, delimiter: str) -> dict[Address, list[Queued]]:
    """postqueue(1) -j: one JSON object a line, one for each message."""
    found: dict[Address, list[Queued]] = {}
    for line in listing.decode(errors="replace").splitlines():
        message = json.loads(line)
        for recipient in message["recipients"]:
            try:
                address = Address.parse(recipient["address"])
            except BadAddress:
                continue  # a recipient without a domain is never one of ours
            queued = Queued(message["queue_name"], message["queue_id"], address)
            found.setdefault(address.without_detail(delimiter), []).append(queued)
    return found
