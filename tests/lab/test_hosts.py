"""The Ansible roles on a host that boots, from nothing to the end of the story."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.lab, pytest.mark.namespaces]

CHECKOUT = Path(__file__).parents[2]


def test_the_roles_build_a_host_on_which_a_domain_moves() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bascule.lab.roles", "--checkout", str(CHECKOUT), "fresh-trixie"],
        cwd=CHECKOUT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert " 0 lost, 0 doubled" in done.stdout
