"""Tests in three floors: ``unit`` (no server), ``database`` (a PostgreSQL of its own), ``lab`` (all real servers)."""

from __future__ import annotations

import os
import signal

import pytest
from hypothesis import settings

from bascule.lab.process import may_mount

#: No example has a deadline: the machine may be busy. A run of the mutants tries fewer.
settings.register_profile("bascule", deadline=None, max_examples=int(os.environ.get("HYPOTHESIS_MAX_EXAMPLES", "100")))
settings.load_profile("bascule")

_NOT_HERE = "nothing may be mounted here"
_not_played: list[str] = []


def pytest_configure() -> None:
    """Ended from outside, the servers are stopped all the same."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """In a container that may make no namespaces the tests that need them are skipped; nowhere else is any."""
    in_need = [item for item in items if item.get_closest_marker("namespaces")]
    if in_need and not may_mount():
        for item in in_need:
            item.add_marker(pytest.mark.skip(reason=_NOT_HERE))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and isinstance(report.longrepr, tuple) and _NOT_HERE in report.longrepr[2]:
        _not_played.append(report.nodeid)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What was not played is named at the end, each."""
    if _not_played:
        terminalreporter.section("not played: this machine may not mount in a namespace of its own")
        for name in sorted(set(_not_played)):
            terminalreporter.line(name)
