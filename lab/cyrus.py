"""A Cyrus IMAP server of the lab's own, as a legacy server.

Debian's cyrus-imapd and dovecot-imapd cannot be installed together; lab/setup.sh
therefore installs what both have in common and only unpacks Cyrus's imapd and pop3d.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

from imapclient import IMAPClient

from bascule.lab.process import LabError, program
from bascule.lab.servers import Certificate, Ports, write

EXTRACTED = Path("/var/cache/bascule/cyrus/usr/lib/cyrus/bin")
USER = "cyrus"
ADMINISTRATOR_PASSWORD = "the administrator's"


class Cyrus:
    """A Cyrus with its own configuration, sockets and ports."""

    def __init__(self, folder: Path, domain: str) -> None:
        self.folder = folder
        self.ports = Ports.free()
        self.lmtp_socket = folder / "run" / "lmtp"
        self._domain = domain
        self._administrator = f"cyrus@{domain}"
        self._process: subprocess.Popen[bytes] | None = None

    def create(self, certificate: Certificate) -> None:
        if not (EXTRACTED / "imapd").exists():
            raise LabError(f"{EXTRACTED}/imapd is not there; run lab/setup first")
        for part in ("", "conf", "conf/db", "conf/socket", "spool", "sieve", "run"):
            (self.folder / part).mkdir()
            (self.folder / part).chmod(0o755)
        shutil.copy(certificate.key, self.folder / "key.pem")
        values = {
            "folder": self.folder,
            "lmtp_socket": self.lmtp_socket,
            "administrator": self._administrator,
            "certificate": certificate.chain,
            "extracted": EXTRACTED,
            "ports": self.ports,
        }
        write(self.folder / "imapd.conf", "cyrus-imapd.conf.j2", **values)
        write(self.folder / "cyrus.conf", "cyrus.conf.j2", **values)
        self._set_password("cyrus", ADMINISTRATOR_PASSWORD)
        owner = pwd.getpwnam(USER)
        for path in [self.folder, *self.folder.rglob("*")]:
            os.chown(path, owner.pw_uid, owner.pw_gid)

    def start(self) -> None:
        # It makes itself cyrus; without -d it stays in the foreground.
        self._process = subprocess.Popen(
            [
                "/usr/lib/cyrus/bin/master", "-D",
                "-C", str(self.folder / "imapd.conf"),
                "-M", str(self.folder / "cyrus.conf"),
                "-p", str(self.folder / "run" / "master.pid"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        deadline = time.monotonic() + 30
        while True:
            try:
                IMAPClient("127.0.0.1", self.ports.imap, ssl=False, timeout=5).shutdown()
            except OSError:
                if time.monotonic() > deadline or self._process.poll() is not None:
                    raise LabError("Cyrus does not start") from None
                time.sleep(0.1)
                continue
            return

    def stop(self) -> None:
        if self._process is None:
            return
        self._process.send_signal(signal.SIGQUIT)
        self._process.wait(30)
        # What the master leaves behind: its session is its own.
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process = None

    def add_user(self, name: str, password: str) -> None:
        """A user with an INBOX; the server must be running."""
        self._set_password(name, password)
        client = IMAPClient("127.0.0.1", self.ports.imap, ssl=False, timeout=30)
        client.plain_login(self._administrator, ADMINISTRATOR_PASSWORD)
        client.create_folder(f"user.{name}@{self._domain}")
        client.logout()

    def _set_password(self, name: str, password: str) -> None:
        database = self.folder / "sasldb2"
        subprocess.run(
            [program("saslpasswd2"), "-p", "-c", "-f", str(database), "-u", self._domain, name],
            input=password.encode(),
            check=True,
            capture_output=True,
        )
        os.chown(database, pwd.getpwnam(USER).pw_uid, pwd.getpwnam(USER).pw_gid)
