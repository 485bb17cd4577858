"""Two MX, two stores and a database, each in a network namespace; every one of them loses its power once."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = [pytest.mark.lab, pytest.mark.namespaces]

PRIVATE = ("unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--propagation", "private")


def test_whatever_node_is_lost_mail_and_logins_find_their_store() -> None:
    command = [*PRIVATE, sys.executable, "-m", "bascule.lab.nodes"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 lost, 0 doubled" in done.stdout
