"""Sockets of the service manager's: who connects while a part is restarted waits, and is answered."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

ECHO = """
import socket, sys
from bascule.activation import listening
server = listening(sys.argv[1])
client, _ = server.accept()
with client:
    client.sendall(b"answered by the second")
"""


def _spawn(listening: socket.socket, endpoint: str) -> subprocess.Popen[bytes]:
    """A part that gets the socket as its descriptor 3, as systemd passes it (sd_listen_fds(3))."""

    def pass_it() -> None:
        os.dup2(listening.fileno(), 3)
        os.environ["LISTEN_PID"] = str(os.getpid())
        os.environ["LISTEN_FDS"] = "1"

    return subprocess.Popen([sys.executable, "-c", ECHO, endpoint], close_fds=False, preexec_fn=pass_it)  # noqa: PLW1509


def test_who_connects_before_the_part_runs_is_answered(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as listening, socket.socket(socket.AF_UNIX) as client:
        listening.bind(str(path))
        listening.listen()
        client.settimeout(20)
        client.connect(str(path))
        # execvp() takes the environment that the hook has changed only if Popen is given none.
        with _spawn(listening, f"unix:{path}"):
            assert client.recv(100) == b"answered by the second"
    assert path.exists()


def test_without_a_service_manager_a_part_listens_by_itself(tmp_path: Path) -> None:
    from bascule.activation import listening  # noqa: PLC0415 (the cache is this process's)

    path = tmp_path / "socket"
    path.write_text("of a former run")
    with listening(f"unix:{path}") as server, socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        server.accept()[0].close()
    assert path.stat().st_mode & 0o777 == 0o666
