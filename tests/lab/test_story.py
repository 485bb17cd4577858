"""The main job itself: the whole story, as the README's first command runs it."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
from pathlib import Path

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
    folder = re.search(r"everything of it is in (\S+),", told.stdout)
    assert folder is not None
    assert not Path(folder[1]).exists()
    assert not [process for process in _command_lines() if folder[1] in process]


def _command_lines() -> list[str]:
    """Of every process on this machine."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            found.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return found
