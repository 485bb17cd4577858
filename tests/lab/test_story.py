"""The main job itself: the whole story, as the README's first command runs it."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

pytestmark = pytest.mark.lab


def test_the_story_is_told_and_leaves_nothing_running() -> None:
    told = subprocess.run(
        [sys.executable, "-m", "bascule.lab.story"], cwd="/", capture_output=True, text=True, timeout=600, check=False
    )
    assert told.returncode == 0, told.stdout[-3000:] + told.stderr[-3000:]
    count = re.search(r"count: (\d+) messages sent, (\d+) found, 0 lost, 0 doubled, 0 came back", told.stdout)
    assert count is not None
    assert count[1] == count[2]
    assert int(count[1]) > 400
    running = subprocess.run(["pgrep", "-af", "bascule-lab-"], capture_output=True, text=True, check=False).stdout
    # Another lab may be running beside this one; this one's folder is gone with its servers.
    assert "story" not in running
