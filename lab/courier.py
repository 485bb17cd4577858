"""A Courier IMAP and POP3 server of the lab's own, as a legacy server.

Debian's courier-imap conflicts with every other IMAP server, and its paths are
compiled in. lab/setup.sh therefore only unpacks it; here it is laid over /usr,
with the lab's own /etc/courier, in a mount namespace that goes with it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

from bascule.lab.process import VMAIL, LabError, children, program, title
from bascule.lab.servers import Certificate, Ports, listens, write

UNPACKED = Path("/var/cache/bascule/courier")
USER = 5002  # who terminates TLS
AUTHDAEMONRC = """\
authmodulelist="authuserdb"
authmodulelistorig="authuserdb"
daemons=5
authdaemonvar=/run/courier/authdaemon
DEBUG_LOGIN=0
DEFAULTOPTIONS=""
"""


class Courier:
    """A Courier with its own configuration, users and ports; mail of a user is in ``mail/NAME/Maildir``."""

    def __init__(self, folder: Path, domain: str) -> None:
        self.folder = folder
        self.ports = Ports.free()
        self._domain = domain
        self._process: subprocess.Popen[bytes] | None = None

    def create(self, certificate: Certificate) -> None:
        if not (UNPACKED / "usr/bin/imapd").exists():
            raise LabError(f"{UNPACKED}/usr/bin/imapd is not there; run lab/setup first")
        for part in ("", "etc", "root", "root/etc", "root/etc/courier", "mail"):
            (self.folder / part).mkdir()
            (self.folder / part).chmod(0o755)
        os.chown(self.folder / "mail", VMAIL, VMAIL)
        pem = self.folder / "etc" / "server.pem"
        pem.write_bytes(certificate.key.read_bytes() + certificate.chain.read_bytes())
        (self.folder / "etc" / "authdaemonrc").write_text(AUTHDAEMONRC)
        # The package makes the one, and gamin asks for the name of the other.
        users = {"courier": USER, "vmail": VMAIL}
        lines = [f"{name}:x:{uid}:{uid}::/nonexistent:/usr/sbin/nologin\n" for name, uid in users.items()]
        (self.folder / "root/etc/passwd").write_text(Path("/etc/passwd").read_text() + "".join(lines))
        write(self.folder / "run.sh", "courier.sh.j2", folder=self.folder, unpacked=UNPACKED, ports=self.ports)
        self.set_users({})

    def set_users(self, users: dict[str, str]) -> None:
        """Have these users and no others, by local part, with their passwords; authdaemond notices (userdb(8))."""
        hashes = self._hashes(list(users.values()))
        homes = {
            f"{name}@{self._domain}": f"uid={VMAIL}|gid={VMAIL}|home={self.folder}/mail/{name}|mail=Maildir"
            for name in users
        }
        self._make_database("userdbshadow", dict(zip(homes, (f"systempw={each}" for each in hashes), strict=True)))
        self._make_database("userdb", homes)

    def _hashes(self, passwords: list[str]) -> list[str]:
        """One hash of crypt(3) for each."""
        done = subprocess.run(
            [program("openssl"), "passwd", "-5", "-stdin"],
            input="".join(f"{each}\n" for each in passwords).encode(),
            check=True,
            capture_output=True,
        )
        return done.stdout.decode().split()

    def _make_database(self, name: str, entries: dict[str, str]) -> None:
        """Replace a GDBM file as makeuserdb(8) does, which is a Perl script around this program."""
        subprocess.run(
            [
                str(UNPACKED / "usr/lib/courier/courier-authlib/makedatprog"),
                "-",
                str(self.folder / "etc" / f"{name}.tmp"),
                str(self.folder / "etc" / f"{name}.dat"),
            ],
            input="".join(f"{key}\t{value}\n" for key, value in entries.items()).encode() + b".\n",
            check=True,
            capture_output=True,
        )

    def start(self) -> None:
        with (self.folder / "courier.log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    program("unshare"),
                    *("--mount", "--propagation", "private", "--pid", "--fork", "--mount-proc", "--kill-child"),
                    *("sh", "-e", str(self.folder / "run.sh")),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + 30
        while not all(listens("127.0.0.1", port) for port in (self.ports.imap, self.ports.imaps, self.ports.pop3)):
            if time.monotonic() > deadline or self._process.poll() is not None:
                self.stop()
                raise LabError(f"Courier does not start:\n{self.log()}")
            time.sleep(0.05)

    def stop(self) -> None:
        """End it with every session; the kernel does it, with the first process of their namespace."""
        if self._process is None:
            return
        for first in children(self._process.pid):
            os.kill(first, signal.SIGKILL)
        self._process.wait(30)
        self._process = None

    def sessions(self) -> list[int]:
        """The processes that serve a client each."""
        if self._process is None:
            return []
        daemons = [each for first in children(self._process.pid) for each in children(first)]
        return [session for each in daemons if "couriertcpd" in title(each) for session in children(each)]

    def processes(self) -> list[int]:
        """All of them but the first of their namespace."""
        if self._process is None:
            return []
        found = children(self._process.pid)
        for each in found:  # which grows
            found += children(each)
        return found[1:]

    def log(self) -> str:
        path = self.folder / "courier.log"
        return path.read_text(errors="replace") if path.exists() else ""
