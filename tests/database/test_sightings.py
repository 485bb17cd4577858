"""What a policy daemon counts reaches the database, and holds nothing up when it does not."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import psycopg
import pytest

from bascule.address import Address
from bascule.database import Connection, value
from bascule.errors import BasculeError
from bascule.lab.postgres import Postgres
from bascule.policy_daemon import metrics, sightings
from bascule.policy_daemon.sightings import Sightings


def address(number: int) -> Address:
    return Address.parse(f"user{number}@lab.test")


def run(work: Coroutine[Any, Any, None]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(60):
            await work

    asyncio.run(limited())


@pytest.fixture
def counted(postgres: Postgres, owner: Connection) -> Sightings:
    assert owner
    return Sightings(postgres.dsn("bascule_policy_daemon"))


def test_all_are_told_in_a_few_statements(
    counted: Sightings, owner: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sightings, "BATCH", 3)
    for number in (*range(10), 1, 1):
        counted.saw(address(number))
    run(counted.record())
    assert not counted.waiting
    assert value(owner, "SELECT count(*) FROM sighting") == 10
    assert value(owner, "SELECT messages FROM sighting WHERE local_part = 'user1'") == 3


def test_a_database_that_holds_it_up_loses_nothing(
    counted: Sightings, owner: Connection, postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sightings, "TIMEOUT", 0.5)
    counted.saw(address(1))
    with psycopg.connect(postgres.dsn("postgres")) as other:
        other.execute("LOCK TABLE bascule.sighting")
        with pytest.raises((TimeoutError, BasculeError)):
            run(counted.record())
    monkeypatch.setattr(sightings, "TIMEOUT", 30)
    assert counted.waiting == {address(1): 1}
    run(counted.record())
    assert value(owner, "SELECT messages FROM sighting") == 1


def test_memory_is_bounded_and_what_has_no_place_is_counted(
    counted: Sightings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sightings, "KEPT", 5)
    before = metrics.SIGHTINGS_DROPPED._value.get()
    for number in (*range(8), 0):
        counted.saw(address(number))
    assert counted.waiting == {address(number): 2 if number == 0 else 1 for number in range(5)}
    assert metrics.SIGHTINGS_DROPPED._value.get() == before + 3
