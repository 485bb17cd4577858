"""A running node looks again, now and then, at what the Postfix or Dovecot beside it is told.

Operators and their panels go on working on a server while its users move. The
look is a process of its own (:mod:`bascule.check.look`) with a deadline: it
holds up nothing here, and neither its libraries nor its troubles are ours.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Coroutine
from random import SystemRandom
from typing import Any

from prometheus_client import Gauge

from bascule import log
from bascule.settings import Settings

FIRST = 5.0  # seconds after the start of a part
INTERVAL = 900.0  # seconds between looks; nodes do not look all at once
DEADLINE = 120.0  # seconds for one look

_FOUND = Gauge("bascule_findings", "What this node finds in its Postfix or Dovecot", ["name", "domain", "level"])
_random = SystemRandom()


class Watch:
    """For one part of a node; what it finds is in ``bascule.findings`` and in the metrics."""

    def __init__(self, configuration: Settings, part: str) -> None:
        self._settings = configuration.model_dump_json()
        self._part = part
        self._log = log.get()

    async def beside(self, work: Coroutine[Any, Any, None]) -> None:
        """Do ``work``, and look as long as it goes on."""
        looking = asyncio.create_task(self.run())
        try:
            await work
        finally:
            looking.cancel()

    async def run(self) -> None:
        """Look for ever; a look that fails is logged."""
        await asyncio.sleep(FIRST * _random.uniform(1, 2))
        while True:
            await self.look()
            await asyncio.sleep(INTERVAL * _random.uniform(0.8, 1.2))

    async def look(self) -> None:
        """Look once."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "bascule.check.look",
            self._part,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            async with asyncio.timeout(DEADLINE):
                said, errors = await process.communicate(self._settings.encode())
        except TimeoutError:
            self._log.warning("a look at this host took too long", seconds=DEADLINE)
            return
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode != 0:
            last = (errors.decode(errors="replace").strip().splitlines() or [f"exit status {process.returncode}"])[-1]
            self._log.warning("this host cannot be looked at", reason=last)
            return
        _FOUND.clear()
        for found in json.loads(said):
            _FOUND.labels(found["name"], found["domain"] or "", found["level"]).inc()
            if found["level"] == "wrong":
                self._log.error("found wrong", name=found["name"], domain=found["domain"], text=found["text"])
