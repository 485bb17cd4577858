"""What the service manager is told (sd_notify(3), datagrams to ``NOTIFY_SOCKET``)."""

from __future__ import annotations

import asyncio
import os
import socket
from contextlib import suppress


def _tell(state: bytes) -> None:
    path = os.environ.get("NOTIFY_SOCKET")
    if not path:
        return
    # A manager that does not listen is no reason to fail (sd_notify(3), "Notes").
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.sendto(state, "\0" + path[1:] if path.startswith("@") else path)


def ready() -> None:
    """Say READY=1; without a service manager, say nothing."""
    _tell(b"READY=1")


def stopping() -> None:
    """Say STOPPING=1: the end may take a moment."""
    _tell(b"STOPPING=1")


def alive() -> None:
    """Say WATCHDOG=1: the process does its work (systemd.service(5), ``WatchdogSec``)."""
    _tell(b"WATCHDOG=1")


def watchdog_interval() -> float | None:
    """Seconds between two signs of life, half of what the service manager allows; None: it wants none."""
    microseconds = os.environ.get("WATCHDOG_USEC")
    return int(microseconds) / 2_000_000 if microseconds else None


async def stay_alive() -> None:
    """Say so as long as the event loop turns."""
    interval = watchdog_interval()
    while interval is not None:
        alive()
        await asyncio.sleep(interval)
