"""What makes a move fail, or last: a node that does not answer, a budget that is short, a slow line."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from bascule.lab.sites import NewSite


@contextmanager
def ghost(new: NewSite) -> Iterator[None]:
    """A policy daemon that is alive and never acknowledges anything."""
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(1):
            new.sql("SELECT bascule.beat('ghost', 'policy_daemon')", role="bascule_policy_daemon")

    new.sql("SELECT bascule.beat('ghost', 'policy_daemon')", role="bascule_policy_daemon")
    thread = threading.Thread(target=beat)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        new.sql("SELECT bascule.sign_off('ghost', 'policy_daemon')", role="bascule_policy_daemon")


@contextmanager
def cutover_budget(new: NewSite, interval: str) -> Iterator[None]:
    new.sql("UPDATE bascule.domain SET cutover_budget = %s::interval", interval)
    try:
        yield
    finally:
        new.sql("UPDATE bascule.domain SET cutover_budget = '60 seconds'")


@contextmanager
def slow_line(new: NewSite, bytes_per_second: int) -> Iterator[None]:
    """A limit for all sessions together, of which each has its part."""
    new.sql("UPDATE bascule.domain SET bytes_per_second = %s", bytes_per_second)
    try:
        yield
    finally:
        new.sql("UPDATE bascule.domain SET bytes_per_second = NULL")
