"""What the service manager is told (sd_notify(3), datagrams to ``NOTIFY_SOCKET``)."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress

_POLL = 0.05  # seconds between attempts of a process to find itself answering


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


def attend(answers: Callable[[], bool]) -> None:
    """In a thread, say that the process is ready once it ``answers``, then that it is alive as long as it does."""
    threading.Thread(target=_attend, args=(answers,), daemon=True).start()


def _attend(answers: Callable[[], bool]) -> None:
    while not answers():
        time.sleep(_POLL)
    ready()
    interval = watchdog_interval()
    while interval is not None:
        if answers():
            alive()
        time.sleep(interval)


async def stay_alive() -> None:
    """Say so as long as the event loop turns."""
    interval = watchdog_interval()
    while interval is not None:
        alive()
        await asyncio.sleep(interval)
