"""Putting a change of route into force in Postfix's queue.

The queue manager keeps the last recipient that it resolved for 30 seconds, so
after a change a quiet server would go on using the old route. The *barrier* is
a tiny message to a recipient of our own: when its lookup is seen, the kept
answer is gone and every later resolution asks anew. Messages that were active
before it still follow the old route: *draining* waits until they have left the
active queue.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from bascule import log
from bascule.address import Address
from bascule.errors import BadAddress, BasculeError
from bascule.policy_daemon import metrics
from bascule.policy_daemon.routes import BARRIER_DOMAIN
from bascule.shared import Shared

BARRIER_TIMEOUT = 10.0  # seconds
POLL = 0.05  # seconds between looks at the active queue; Postfix offers no event for it


class QueueError(BasculeError):
    """One of Postfix's own commands failed, or did not do its work in time."""


@dataclass(frozen=True, slots=True)
class Queued:
    """A message in the queue for one recipient."""

    queue_name: str
    queue_id: str
    recipient: Address


class PostfixQueue:
    """The queue of the Postfix instance with this configuration directory."""

    def __init__(self, config_directory: Path, delimiter: str) -> None:
        self._delimiter = delimiter
        # sendmail's -C is not honoured for an unprivileged caller; MAIL_CONFIG is (postfix(1)).
        self._environment = os.environ | {"MAIL_CONFIG": str(config_directory)}
        self._barriers: dict[str, asyncio.Event] = {}
        #: Returns when every later resolution of a recipient asks us anew; raises QueueError.
        self.barrier = Shared(self._barrier)
        self._listing = Shared(self._list)

    def barrier_seen(self, nonce: str) -> None:
        """The transport lookup of a barrier's recipient has arrived."""
        if nonce in self._barriers:
            self._barriers[nonce].set()

    async def _barrier(self) -> None:
        nonce = f"barrier-{secrets.token_hex(8)}"
        seen = self._barriers[nonce] = asyncio.Event()
        try:
            await self._run("sendmail", "-i", "-f", "<>", f"{nonce}@{BARRIER_DOMAIN}", stdin=b"Subject: barrier\n\n")
            with metrics.BARRIER.time():
                async with asyncio.timeout(BARRIER_TIMEOUT):
                    await seen.wait()
        except TimeoutError as error:
            raise QueueError(
                "Postfix did not resolve the barrier in time", hint="Is the queue manager running?"
            ) from error
        finally:
            del self._barriers[nonce]

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
        return [each for each in (await self._listing()).get(base, []) if about in {base, each.recipient}]

    async def _list(self) -> dict[Address, list[Queued]]:
        """The queue, by recipient without detail."""
        listing = await self._run("postqueue", "-j")
        return await asyncio.to_thread(_parse, listing, self._delimiter)  # it may be long

    async def _run(self, *command: str, stdin: bytes = b"") -> bytes:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=self._environment,
        )
        try:
            output, errors = await process.communicate(stdin)
        except asyncio.CancelledError:
            process.kill()
            await process.wait()
            raise
        if process.returncode != 0:
            raise QueueError(f"{command[0]} ended with {process.returncode}: {errors.decode(errors='replace').strip()}")
        return output


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
