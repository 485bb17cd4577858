"""Every benchmark is played small, so that none rots: it runs to its end and prints its table, whatever the figures."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.lab

BENCH = Path(__file__).parents[2] / "bench"
#: The smallest numbers that say anything.
SMALL = {
    "import_users": "--users 4 --at-once 2",
    "logins": "--users 3 --rounds 1",
    "lookups": "--mailboxes 200 --rate 100 --seconds 1",
    "mailbox_copy": "--messages 40 --round-trip 0",
    "move": "--messages 40 --largest 100000 --round-trip 0",
    "portal": "--seconds 0.5 --users 4",
    "routing": "--messages 20 --rounds 1",
    "views": "--mailboxes 200",
}
#: Those that print their table as Markdown.
MARKDOWN = set(SMALL) - {"logins", "routing"}
PATIENCE = 600  # seconds


def test_none_is_left_out() -> None:
    assert {path.stem for path in BENCH.glob("*.py")} == set(SMALL)


@pytest.mark.parametrize("name", sorted(SMALL))
def test_it_runs(name: str, tmp_path: Path) -> None:
    options = [*SMALL[name].split(), *(["--markdown"] if name in MARKDOWN else [])]
    done = subprocess.run(
        [sys.executable, str(BENCH / f"{name}.py"), *options],
        cwd=tmp_path,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    if name in MARKDOWN:
        assert "|---|" in done.stdout
        assert "processors" in done.stdout
