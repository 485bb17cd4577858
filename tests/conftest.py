"""Tests in three floors: ``unit`` (no server), ``database`` (a PostgreSQL of its own), ``lab`` (all real servers)."""

from __future__ import annotations

import signal


def pytest_configure() -> None:
    """Ended from outside, the servers are stopped all the same."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
