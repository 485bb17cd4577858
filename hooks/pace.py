"""Logins at a slow pace, where too many passwords were wrong.

Nobody is refused for what others guess: beyond a limit, passwords are looked at
one after the other. Who guessed least from where they are comes first, so an
owner at a new place waits a moment, not for the end of an attack.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from bascule.attempts import Kind, Limit

#: Seconds between two passwords that are looked at.
PACE: dict[Kind, float] = {"account": 5.0, "source": 2.0, "domain": 0.1}
PATIENCE = 12.0  # seconds that a login waits for its turn, of all limits together
MOST_WAITING = 64  # logins in one line


@dataclass(eq=False, slots=True)
class _Waiting:
    rank: int
    turn: asyncio.Future[bool] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    def decide(self, its_turn: bool) -> None:
        if not self.turn.done():
            self.turn.set_result(its_turn)


class _Line:
    """Those who wait for the same limit."""

    def __init__(self, pace: float, on_end: Callable[[], None]) -> None:
        self._pace = pace
        self._on_end = on_end
        self._waiting: list[_Waiting] = []
        self._serving = asyncio.create_task(self._serve())

    async def turn(self, rank: int, deadline: float) -> bool:
        mine = _Waiting(rank)
        self._waiting.append(mine)
        if len(self._waiting) > MOST_WAITING:
            self._leave(max(self._waiting, key=lambda each: (each.rank, random.random())))  # noqa: S311 (fairness)
        try:
            async with asyncio.timeout_at(deadline):
                return await mine.turn
        except TimeoutError:
            return False
        finally:
            if mine in self._waiting:
                self._waiting.remove(mine)

    def _leave(self, one: _Waiting) -> None:
        self._waiting.remove(one)
        one.decide(False)

    async def _serve(self) -> None:
        await asyncio.sleep(0)  # the first comes
        while self._waiting:
            first = min(self._waiting, key=lambda each: (each.rank, random.random()))  # noqa: S311 (fairness)
            self._waiting.remove(first)
            first.decide(True)
            await asyncio.sleep(self._pace)
        self._on_end()  # before anybody else can come


class Turns:
    """The lines of all limits that are reached."""

    def __init__(self) -> None:
        self._lines: dict[Limit, _Line] = {}

    async def wait(self, limits: list[Limit], rank: int) -> bool:
        """Return when a login may be tried; False: not soon. ``rank``: who has less comes first."""
        deadline = asyncio.get_running_loop().time() + PATIENCE
        for limit in limits:
            if not await self._line(limit).turn(rank, deadline):
                return False
        return True

    def _line(self, limit: Limit) -> _Line:
        if limit not in self._lines:
            self._lines[limit] = _Line(PACE[limit.kind], lambda: self._ended(limit))
        return self._lines[limit]

    def _ended(self, limit: Limit) -> None:
        self._lines.pop(limit, None)
