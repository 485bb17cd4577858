"""Postfix and Dovecot instances of the lab's own."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from bascule.config_templates import environment
from bascule.lab.process import LOCALHOST, VMAIL, Host, LabError, children, free_ports, is_alive, program, run, title

MOURNING = 15.0  # seconds that the processes of a Dovecot whose master was killed have to end by themselves
TEMPLATES = Path(__file__).resolve().parent / "templates"


def write(path: Path, template: str, **variables: object) -> Path:
    """Render one of the lab's templates, which may include the product's."""
    path.write_text(environment(TEMPLATES).get_template(template).render(**variables))
    path.chmod(0o644)
    return path


def listens(address: str, where: int | Path) -> bool:
    """Whether somebody accepts connections at a port of an address, or a Unix socket."""
    with socket.socket(socket.AF_INET if isinstance(where, int) else socket.AF_UNIX) as probe:
        return probe.connect_ex((address, where) if isinstance(where, int) else str(where)) == 0


@functools.cache
def dovecot_version() -> str:
    """2.3 or 2.4: whose configuration this machine's Dovecot reads."""
    return run(program("dovecot"), "--version")[:3]


def settings_once(main_cf: str) -> str:
    """A main.cf in which each parameter is set once: as its last assignment says, which is the one that counts.

    Postfix warns of each earlier one ("overriding earlier entry"). With maillog_file, master(8) writes these
    warnings to a datagram socket that holds ten of them (net.unix.max_dgram_qlen): while nobody reads it, which is
    so at a reload, it hangs at the eleventh.
    """
    last: dict[str, int] = {}
    entries: list[tuple[str | None, list[str]]] = []
    for line in main_cf.splitlines():
        if line[:1].isspace() and entries and entries[-1][0]:  # postconf(5): it continues the line before
            entries[-1][1].append(line)
            continue
        name = None if line.startswith("#") or "=" not in line else line.partition("=")[0].strip()
        if name:
            last[name] = len(entries)
        entries.append((name, [line]))
    kept = [lines for number, (name, lines) in enumerate(entries) if name is None or last[name] == number]
    return "".join(f"{line}\n" for lines in kept for line in lines)


class Postfix:
    """A Postfix with its own configuration, queue and port."""

    def __init__(self, folder: Path, port: int, kind: str, host: Host = LOCALHOST) -> None:
        self.folder = folder
        self.port = port
        self._host = host
        self._kind = kind  # legacy or new: which templates

    def create(self, **variables: object) -> None:
        self.folder.mkdir()
        self.folder.chmod(0o755)
        for part, owner in (("queue", "root"), ("data", "postfix"), ("log", "root")):
            (self.folder / part).mkdir()
            shutil.chown(self.folder / part, owner)
        main_cf = write(
            self.folder / "main.cf",
            f"{self._kind}-main.cf.j2",
            folder=self.folder,
            address=self._host.address,
            **variables,
        )
        main_cf.write_text(settings_once(main_cf.read_text()))
        write(
            self.folder / "master.cf",
            f"{self._kind}-master.cf.j2" if self._kind == "new" else "postfix-master.cf.j2",
            address=self._host.address,
            port=self.port,
            **variables,
        )

    def map(self, name: str, entries: dict[str, str]) -> None:
        """Write a hash: table."""
        path = self.folder / name
        path.write_text("".join(f"{key} {value}\n" for key, value in entries.items()))
        self._run("postmap", f"hash:{path}")

    def start(self) -> None:
        self._run("postfix", "start")

    def stop(self) -> None:
        pid = self.folder / "queue" / "pid" / "master.pid"
        if pid.exists():
            self._run("postfix", "stop")

    def reload(self) -> None:
        """Read the tables anew: the queue manager would go on with the old ones."""
        self._run("postfix", "reload")

    def queue(self) -> list[dict[str, object]]:
        """Every message in the queue, as postqueue -j gives it."""
        listing = self._run("postqueue", "-j")
        return [json.loads(line) for line in listing.splitlines()]

    def is_empty(self) -> bool:
        return not self.queue()

    def flush(self) -> None:
        self._run("postqueue", "-f")

    def log(self) -> str:
        path = self.folder / "log" / "mail.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def _run(self, name: str, *arguments: str) -> str:
        return run(*self._host.enter, program(name), "-c", str(self.folder), *arguments)


@dataclass(frozen=True, slots=True)
class Ports:
    """The ports of a mail store, on 127.0.0.1."""

    imap: int
    imaps: int
    pop3: int
    submission: int
    sieve: int

    @classmethod
    def free(cls) -> Ports:
        return cls(*free_ports(5))


@dataclass(frozen=True, slots=True)
class Certificate:
    """Paths of a server's certificate chain and key, and of the authority that signed it."""

    chain: Path
    key: Path
    ca: Path


@dataclass(frozen=True, slots=True)
class Tree:
    """Another release of Debian, in a directory. Its programs see the lab's directory where it is."""

    root: Path
    lab: Path

    def command(self, name: str) -> tuple[str, ...]:
        """What runs a program of the tree, in a mount namespace of its own; arguments follow."""
        script = """
            mount -t tmpfs tmpfs "$1/tmp"; mount -t proc proc "$1/proc"; mount --rbind /dev "$1/dev"
            mkdir -p "$1$2"; mount --bind "$2" "$1$2"
            tree=$1 program=$3; shift 3
            PATH=/usr/sbin:/usr/bin:/sbin:/bin exec chroot "$tree" "$program" "$@"
        """
        private = ("unshare", "--mount", "--propagation", "private")
        return (*private, "sh", "-ec", script, "sh", str(self.root), str(self.lab), name)


class Dovecot:
    """A Dovecot with its own configuration, sockets and ports."""

    def __init__(self, folder: Path, kind: str, tree: Tree | None = None, host: Host = LOCALHOST) -> None:
        self.folder = folder
        self.host = host
        # In a namespace of its own, a server is at the ports where it is looked for.
        self.ports = Ports(143, 993, 110, 587, 4190) if host.enter else Ports.free()
        self.config = folder / "dovecot.conf"
        self.lmtp_socket = folder / "lmtp"
        self._kind = kind
        self._tree = tree

    def create(
        self,
        certificate: Certificate,
        smtp_port: int,
        *,
        smtp_host: str | None = None,
        template: str | None = None,
        **variables: object,
    ) -> None:
        self.folder.mkdir()
        self.folder.chmod(0o755)
        (self.folder / "mail").mkdir()
        os.chown(self.folder / "mail", VMAIL, VMAIL)
        write(
            self.config,
            template or f"{self._kind}-dovecot{'-2.4' if dovecot_version() == '2.4' else ''}.conf.j2",
            name=f"bascule-lab-{self._kind}",
            folder=self.folder,
            address=self.host.address,
            hostname=f"{self._kind}.lab.test",
            vmail=VMAIL,
            certificate=certificate.chain,
            private_key=certificate.key,
            imap_port=self.ports.imap,
            imaps_port=self.ports.imaps,
            pop3_port=self.ports.pop3,
            submission_port=self.ports.submission,
            sieve_port=self.ports.sieve,
            smtp_host=smtp_host or self.host.address,
            smtp_port=smtp_port,
            lmtp_socket=self.lmtp_socket,
            **variables,
        )

    def start(self) -> None:
        self._run("dovecot")

    def stop(self) -> None:
        pid = self.folder / "run" / "master.pid"
        if pid.exists():
            self._run("doveadm", "stop")

    def processes(self) -> list[int]:
        """The master, and what it has started."""
        try:
            master = int((self.folder / "run" / "master.pid").read_text())
        except (FileNotFoundError, ValueError):
            return []
        return [master, *children(master)]

    def kill(self) -> None:
        """End the master as a power loss would; return when its children have noticed and another one can be started.

        A session may outlive it as long as its client likes, and holds the sockets that it was
        started with open: what is still there after a while is ended as the service manager does it.
        """
        master, *started = self.processes()
        os.kill(master, signal.SIGKILL)
        # The dead master stays a zombie for as long as init pleases.
        (self.folder / "run" / "master.pid").unlink()
        began = time.monotonic()
        while self._is_open() or any(is_alive(pid) and "dovecot/imap" not in title(pid) for pid in started):
            elapsed = time.monotonic() - began
            if elapsed > MOURNING:
                for pid in started:
                    if is_alive(pid):
                        os.kill(pid, signal.SIGKILL)
            if elapsed > 2 * MOURNING:
                raise LabError("Dovecot's processes outlive their master")
            time.sleep(0.05)
        for path in self._sockets():
            path.unlink(missing_ok=True)

    def _sockets(self) -> list[Path]:
        return [path for path in [*(self.folder / "run").rglob("*"), self.lmtp_socket] if path.is_socket()]

    def _is_open(self) -> bool:
        """Whether somebody listens, at a port or at one of the sockets that Dovecot's parts have for each other."""
        ports = self.ports
        doors: list[int | Path] = [ports.imap, ports.imaps, ports.pop3, ports.submission, ports.sieve]
        return any(listens(self.host.address, door) for door in doors + self._sockets())

    def doveadm(self, *arguments: str) -> str:
        return self._run("doveadm", *arguments)

    def _run(self, name: str, *arguments: str) -> str:
        options = ("-c", str(self.config), *arguments)
        command = (program(name),) if self._tree is None else self._tree.command(name)
        return run(*self.host.enter, *command, *options)

    def log(self) -> str:
        path = self.folder / "dovecot.log"
        return path.read_text(errors="replace") if path.exists() else ""
