"""What the service manager is told."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest

from bascule import readiness


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> socket.socket:
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    listening.bind(str(tmp_path / "notify"))
    listening.settimeout(10)
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    return listening


def test_signs_of_life_come_twice_in_the_time_that_is_given(
    manager: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "20000")
    assert readiness.watchdog_interval() == 0.01

    async def run() -> None:
        living = asyncio.create_task(readiness.stay_alive())
        for _ in range(3):
            assert await asyncio.to_thread(manager.recv, 100) == b"WATCHDOG=1"
        living.cancel()

    with manager:
        asyncio.run(run())


def test_without_a_watchdog_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WATCHDOG_USEC", raising=False)
    asyncio.run(asyncio.wait_for(readiness.stay_alive(), 5))


def test_the_beginning_and_the_end_are_told(manager: socket.socket) -> None:
    with manager:
        readiness.ready()
        readiness.stopping()
        assert [manager.recv(100), manager.recv(100)] == [b"READY=1", b"STOPPING=1"]


def test_a_manager_that_does_not_listen_is_no_reason_to_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "/nonexistent/notify")
    readiness.ready()
