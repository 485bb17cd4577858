"""A short, seeded part of the fault campaign; the long one is ``sh lab/campaign.sh``."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.lab, pytest.mark.namespaces]


def test_nothing_is_lost_whatever_goes_wrong() -> None:
    """``BASCULE_SEED`` sets other schedules."""
    seed = os.environ.get("BASCULE_SEED", "1")
    done = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", sys.executable, "-m", "bascule.lab.campaign",
         "--rounds", "2", "--seed", seed],
        capture_output=True, text=True, timeout=600, check=False, cwd="/",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 rounds, 6 users" in done.stdout
