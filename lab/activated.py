"""A part as systemd runs it: with sockets that outlive it, and killed and started anew when it falls silent."""

from __future__ import annotations

import fcntl
import os
import socket
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bascule.lab.process import LabError

_FIRST = 3  # SD_LISTEN_FDS_START


class Activated:
    """``command`` with Unix sockets at ``paths``; ``watchdog`` is systemd.service(5)'s WatchdogSec, in seconds."""

    def __init__(
        self, command: Sequence[str], paths: Sequence[Path], folder: Path, *, uid: int, gid: int, watchdog: int
    ) -> None:
        self._command = command
        self._paths = paths
        self._user = (f"--reuid={uid}", f"--regid={gid}", "--clear-groups")
        self._log = folder / "activated.log"
        self._notify_path = folder / "activated.notify"
        self._watchdog = watchdog
        self._ending = threading.Event()
        #: How often it was killed for its silence.
        self.killed = 0

    @contextmanager
    def running(self) -> Iterator[Activated]:
        with ExitStack() as stack:
            notify = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
            self._notify_path.unlink(missing_ok=True)
            notify.bind(str(self._notify_path))
            self._notify_path.chmod(0o666)
            notify.settimeout(self._watchdog)
            listening = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in self._paths]
            for sock, path in zip(listening, self._paths, strict=True):
                path.unlink(missing_ok=True)
                sock.bind(str(path))
                path.chmod(0o666)
                sock.listen(socket.SOMAXCONN)
            ready = threading.Event()
            keeping = threading.Thread(target=self._keep, args=(notify, listening, ready))
            keeping.start()
            try:
                if not ready.wait(30):
                    raise LabError(f"not ready: {self._log.read_text()}")
                yield self
            finally:
                self._ending.set()
                self._process.kill()
                keeping.join()

    @property
    def pid(self) -> int:
        return self._process.pid

    def _start(self, listening: Sequence[socket.socket]) -> None:
        last = _FIRST + len(listening)
        # The sockets are moved to where they are looked for; the shell knows the process's id before it is the program.
        passed = [fcntl.fcntl(sock, fcntl.F_DUPFD, 100) for sock in listening]
        numbers = " ".join(f"{_FIRST + at}<&{descriptor}" for at, descriptor in enumerate(passed))
        script = f'exec {numbers}; LISTEN_PID=$$ LISTEN_FDS={last - _FIRST} exec setpriv {" ".join(self._user)} "$@"'
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                ["bash", "-c", script, "bash", *self._command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=passed,
                start_new_session=True,
                env=os.environ
                | {"NOTIFY_SOCKET": str(self._notify_path), "WATCHDOG_USEC": str(self._watchdog * 1_000_000)},
            )

        for descriptor in passed:
            os.close(descriptor)

    def _keep(self, notify: socket.socket, listening: Sequence[socket.socket], ready: threading.Event) -> None:
        while not self._ending.is_set():
            self._start(listening)
            try:
                while not self._ending.is_set():
                    if b"READY=1" in notify.recv(4096):
                        ready.set()
            except TimeoutError:
                self.killed += 1
            self._process.kill()
            self._process.wait()
