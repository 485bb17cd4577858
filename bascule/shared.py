"""One run of an action for all who need it at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

T = TypeVar("T")

#: Seconds after which a run is given up, unless the action has limits of its own that are shorter.
TIMEOUT = 60.0


class Shared(Generic[T]):
    """An action whose one run serves all who asked before it began.

    A thousand mailboxes may flip together; one barrier, one look at the queue,
    one list of sessions is enough for all of them. A run that hangs is given
    up after ``timeout`` seconds with TimeoutError, so that the next one begins.
    """

    def __init__(self, action: Callable[[], Awaitable[T]], timeout: float = TIMEOUT) -> None:
        self._action = action
        self._timeout = timeout
        self._running: asyncio.Task[T] | None = None
        self._next: asyncio.Task[T] | None = None

    async def __call__(self) -> T:
        """The outcome of a run that began after the call, errors included."""
        if self._next is None:
            self._next = asyncio.create_task(self._after(self._running))
        return await asyncio.shield(self._next)

    async def _after(self, before: asyncio.Task[T] | None) -> T:
        if before is not None:
            # Its own limit ends it; should it outlive that (a cancellation that is not heeded), it is left alone.
            await asyncio.wait([before], timeout=self._timeout)
        self._running, self._next = self._next, None
        async with asyncio.timeout(self._timeout):
            return await self._action()
