"""Guesses and known sources, from one instance to the others, through PostgreSQL and never in a login's way."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime

from bascule import log
from bascule.attempts import Attempts
from bascule.errors import DatabaseUnavailable
from bascule.guesses import INTERVAL, QUERY, Exchange
from bascule.hooks.database import Database

LONG_AGO = datetime(1970, 1, 1, tzinfo=UTC)


class Sharing:
    """Without the database, an instance counts by itself; what it counted is told once the database is back."""

    def __init__(self, attempts: Attempts, database: Database, *, node: str) -> None:
        self._attempts = attempts
        self._database = database
        self._exchange = Exchange(attempts, node)
        self._seen = LONG_AGO
        self._works = True

    async def run(self) -> None:
        """Share until cancelled. The first time, sources of the last day are heard."""
        while True:
            await self.once()
            await asyncio.sleep(INTERVAL)

    async def once(self) -> None:
        guesses, sources = self._attempts.untold()
        try:
            others = await self._database.ask(QUERY, *self._exchange.parameters(guesses), patience=5)
            guesses = []
            self._exchange.hear(others)
            known = await self._database.ask(
                "SELECT address, site, last_seen FROM bascule.share_sources(%s, %s)",
                self._seen,
                json.dumps([{"address": address, "site": site} for address, site in sources]),
                patience=5,
            )
        except DatabaseUnavailable as error:
            self._attempts.told_not(guesses, sources)
            if self._works:
                log.get().warning("guesses are not shared now", reason=error.message)
            self._works = False
            return
        self._works = True
        self._seen = max([self._seen, *(row[2] for row in known)])
        self._attempts.hear((), ((row[0], row[1]) for row in known))
