"""Who still receives mail at the legacy server: counted in memory, told to the database now and then.

By a connection and a task of its own: whatever the database does with it, heartbeats and changes of state go on.
"""

from __future__ import annotations

import asyncio
from collections import Counter

from bascule import log
from bascule.address import Address
from bascule.database import connect_async
from bascule.errors import BasculeError
from bascule.policy_daemon import metrics

INTERVAL = 5.0  # seconds between two recordings
BATCH = 1000  # addresses in one statement
TIMEOUT = 30.0  # seconds for one recording
KEPT = 50_000  # addresses in memory while the database is away


class Sightings:
    """Addresses and how many messages for each were accepted, not yet told to the database."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self.waiting: Counter[Address] = Counter()

    def saw(self, address: Address) -> None:
        metrics.SIGHTINGS.inc()
        if len(self.waiting) >= KEPT and address not in self.waiting:
            metrics.SIGHTINGS_DROPPED.inc()
            return
        self.waiting[address] += 1

    async def keep_recording(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(INTERVAL)
            try:
                await self.record()
            except (BasculeError, TimeoutError) as error:
                log.get().info("sightings wait for the database", addresses=len(self.waiting), reason=str(error))

    async def record(self) -> None:
        """Tell the database of all.

        Raises:
            BasculeError, TimeoutError: the rest is kept. What was under way may be counted twice.
        """
        if not self.waiting:
            return
        async with asyncio.timeout(TIMEOUT), connect_async(self._dsn) as connection:
            while batch := self.waiting.most_common(BATCH):
                cursor = await connection.execute(
                    "SELECT bascule.record_sightings(%s, %s)",
                    ([str(address) for address, _ in batch], [count for _, count in batch]),
                )
                row = await cursor.fetchone()
                if row is not None and row[0]:
                    metrics.SIGHTINGS_DROPPED.inc(row[0])
                    log.get().warning("more addresses receive mail than are counted", addresses=row[0])
                self.waiting.subtract(dict(batch))
                for address, _ in batch:
                    if self.waiting[address] <= 0:
                        del self.waiting[address]
