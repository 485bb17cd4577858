"""Start programs, wait until they say that they are ready, stop them by id."""

from __future__ import annotations

import functools
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

#: The owner of all mailboxes in the lab; it has no entry in /etc/passwd, on purpose.
VMAIL = 5000
FIRST_PORT = 10_000


@dataclass(frozen=True, slots=True)
class Host:
    """Where servers run: this machine's loopback, or a network namespace."""

    name: str = "localhost"
    address: str = "127.0.0.1"
    #: What comes before a command so that it runs there.
    enter: tuple[str, ...] = ()

    def command(self, *command: str, user: str | int | None = None, group: str | int | None = None) -> tuple[str, ...]:
        """``command``, there, as ``user``; to be run by root. What is executed on the way keeps the process's id."""
        become = () if user is None else ("setpriv", f"--reuid={user}", f"--regid={group or user}", "--clear-groups")
        return (*self.enter, *become, *command)


LOCALHOST = Host()


class LabError(Exception):
    """A server of the lab did not do what it must."""


def free_ports(count: int) -> list[int]:
    """``count`` different TCP ports of 127.0.0.1 that nobody listens at, for this process and what it starts.

    They are below those that the kernel gives to clients: no connection takes
    one before its server does; and no other run of the lab's is given them.
    """
    first_of_clients = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    found: list[int] = []
    while len(found) < count:
        port = secrets.randbelow(first_of_clients - FIRST_PORT) + FIRST_PORT
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        if _reserve(port):
            found.append(port)
    return found


def _reserve(port: int) -> bool:
    """Whether nobody has reserved a port yet; then it is this process's as long as that lives."""
    claim = socket.socket(socket.AF_UNIX)
    try:
        claim.bind(f"\0bascule-lab-port-{port}")  # unix(7), "Abstract sockets"
    except OSError:
        claim.close()
        return False
    claim.detach()  # it stays open
    return True


def program(name: str, *places: str) -> str:
    """The path of a program that Debian installs outside an ordinary user's PATH."""
    found = shutil.which(name, path=":".join([*places, "/usr/sbin", "/usr/bin", os.environ["PATH"]]))
    if found is None:
        raise LabError(f"{name} is not installed; run lab/setup first")
    return found


def run(*command: str, cwd: Path | None = None, timeout: float = 60) -> str:
    """Run a command to its end and give its standard output.

    Raises:
        LabError: it failed; with what it printed.
    """
    # Files, not pipes: a server that goes to the background keeps its output open.
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        done = subprocess.run(
            command,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            timeout=timeout,
            check=False,
        )
        output.seek(0)
        errors.seek(0)
        text = output.read().decode(errors="replace")
        if done.returncode != 0:
            raise LabError(f"{command} ended with {done.returncode}:\n{text}{errors.read().decode(errors='replace')}")
    return text


@functools.cache
def may_mount() -> bool:
    """Whether this machine lets us mount in a namespace of our own: a plain container does not."""
    tried = ("unshare", "--mount", "--propagation", "private", "mount", "-t", "tmpfs", "tmpfs", "/tmp")  # noqa: S108
    return subprocess.run(tried, stdin=subprocess.DEVNULL, capture_output=True, check=False).returncode == 0


def children(pid: int) -> list[int]:
    """The processes that a process has started and that are its own still."""
    try:
        return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:  # it has ended
        return []


def title(pid: int) -> str:
    """The command line of a process, which may be what it says of itself; nothing when it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in {"Z", "X"}
    except OSError:
        return False


class Daemon:
    """A long-running program that tells ``NOTIFY_SOCKET`` when it is ready (sd_notify(3)).

    Its standard output and error go to ``log``. ``start`` returns once it is
    ready and raises LabError, with the end of its log, if it ends before that.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        folder: Path,
        name: str,
        uid: int | None = None,
        gid: int | None = None,
        environment: Mapping[str, str] | None = None,
        host: Host = LOCALHOST,
    ) -> None:
        self.command = list(command)
        self._host = host
        self._environment = dict(environment or {})
        self.name = name
        self.log = folder / f"{name}.log"
        self._notify_path = folder / f"{name}.notify"
        self._uid, self._gid = uid, gid
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        if self._process is None:
            raise LabError(f"{self.name} is not running")
        return self._process.pid

    def start(self, timeout: float = 30) -> None:
        self._notify_path.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify, self.log.open("ab") as log:
            notify.bind(str(self._notify_path))
            self._notify_path.chmod(0o666)
            notify.settimeout(0.1)
            self._process = subprocess.Popen(
                self._host.command(*self.command, user=self._uid, group=self._gid),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=os.environ | self._environment | {"NOTIFY_SOCKET": str(self._notify_path)},
            )
            deadline = time.monotonic() + timeout
            while time.monotonic() < deadline:
                try:
                    if b"READY=1" in notify.recv(4096):
                        return
                except TimeoutError:
                    pass
                if self._process.poll() is not None:
                    raise LabError(f"{self.name} ended with {self._process.returncode}:\n{self.tail()}")
        self.kill()
        raise LabError(f"{self.name} was not ready after {timeout} s:\n{self.tail()}")

    def tail(self, lines: int = 30) -> str:
        """The end of its log; empty before its first start."""
        if not self.log.exists():
            return ""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def _end(self, how: signal.Signals, timeout: float) -> None:
        if self._process is None:
            return
        self._process.send_signal(how)
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def stop(self, timeout: float = 20) -> None:
        """Ask it to end, and insist after ``timeout`` seconds."""
        self._end(signal.SIGTERM, timeout)

    def kill(self) -> None:
        """End it as a power loss would."""
        self._end(signal.SIGKILL, 10)
