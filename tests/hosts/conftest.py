"""Run by ``lab/hosts.py`` on each of its hosts; without ``--hosts`` there is nothing to look at."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(scope="session")
def groups() -> set[str]:
    """What the host is for: database, store, mx, portal."""
    return set(os.environ["BASCULE_GROUPS"].split(","))
