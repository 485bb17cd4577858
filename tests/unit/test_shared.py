"""Who asks while an action runs is served by the next run, together with all others."""

from __future__ import annotations

import asyncio

import pytest

from bascule.shared import Shared


class Action:
    """Runs until it is let go; counts its runs."""

    def __init__(self) -> None:
        self.runs = 0
        self.fails = False
        self.go = asyncio.Event()

    async def __call__(self) -> int:
        self.runs += 1
        number = self.runs
        await self.go.wait()
        if self.fails:
            raise ValueError(number)
        return number


async def started(action: Action, runs: int) -> None:
    async with asyncio.timeout(5):
        while action.runs < runs:  # noqa: ASYNC110 (an action has no event for its beginning)
            await asyncio.sleep(0)


def test_one_run_serves_all_who_asked_before_it() -> None:
    async def run() -> None:
        action = Action()
        shared = Shared(action)
        first = asyncio.create_task(shared())
        await started(action, 1)
        late = [asyncio.create_task(shared()) for _ in range(100)]
        await asyncio.sleep(0)
        action.go.set()
        assert await first == 1
        assert await asyncio.gather(*late) == [2] * 100
        assert await shared() == 3

    asyncio.run(run())


def test_a_failure_is_everybodys_and_the_next_run_is_a_new_one() -> None:
    async def run() -> None:
        action = Action()
        action.fails = True
        action.go.set()
        shared = Shared(action)
        outcomes = await asyncio.gather(*(shared() for _ in range(3)), return_exceptions=True)
        assert [type(each) for each in outcomes] == [ValueError] * 3
        action.fails = False
        assert await shared() == 2

    asyncio.run(run())


def test_one_who_gives_up_does_not_take_the_others_along() -> None:
    async def run() -> None:
        action = Action()
        shared = Shared(action)
        waiting = [asyncio.create_task(shared()) for _ in range(2)]
        await started(action, 1)
        waiting[0].cancel()
        action.go.set()
        with pytest.raises(asyncio.CancelledError):
            await waiting[0]
        assert await waiting[1] == 1

    asyncio.run(run())
