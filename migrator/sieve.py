"""Sieve scripts: read from the legacy server by ManageSieve (RFC 5804), written where Pigeonhole looks for them."""

from __future__ import annotations

import re
import socket
from base64 import b64encode
from contextlib import closing
from pathlib import Path

from bascule.address import Address
from bascule.credential import Password
from bascule.errors import BasculeError, LegacyUnavailable
from bascule.legacy import LegacySettings, Service, Trust, plainly
from bascule.migrator.maildir import replace

MAX_SCRIPT = 1 << 20  # bytes

_LISTED = re.compile(rb'^("(?:[^"\\]|\\.)*"|\{\d+\+?\})(\s+ACTIVE)?\s*$', re.IGNORECASE)
_LITERAL = re.compile(rb"\{(\d+)\+?\}$")


class ScriptsNotRead(BasculeError):
    """The legacy server does not give the Sieve scripts."""


class _Session:
    """Lines and literals on a ManageSieve connection."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._file = connection.makefile("rb")

    def command(self, line: bytes) -> list[bytes]:
        self.connection.sendall(line + b"\r\n")
        return self.answer()

    def answer(self) -> list[bytes]:
        """The lines up to OK, each literal as a line of its own after its count.

        Raises:
            ScriptsNotRead: NO or BYE.
        """
        lines: list[bytes] = []
        while True:
            line = self._file.readline(MAX_SCRIPT)
            if not line:
                raise ScriptsNotRead("the ManageSieve server closed the connection")
            line = line.rstrip(b"\r\n")
            word = line.partition(b" ")[0].upper()
            if word == b"OK":
                return lines
            if word in {b"NO", b"BYE"}:
                raise ScriptsNotRead(f"the ManageSieve server says {line.decode(errors='replace')[:200]}")
            lines.append(line)
            if (literal := _LITERAL.search(line)) is not None:
                if int(literal[1]) > MAX_SCRIPT:
                    raise ScriptsNotRead("a Sieve script is larger than 1 MiB")
                lines.append(self._file.read(int(literal[1])))


def read_scripts(
    legacy: LegacySettings, service: Service, trust: Trust, address: Address, password: Password
) -> tuple[dict[str, bytes], str]:
    """The user's scripts by name, and the name of the active one or nothing.

    Raises:
        ScriptsNotRead, LegacyUnavailable
    """
    host, port = legacy.imap_host, service.port
    try:
        plain = socket.create_connection((host, port), timeout=trust.timeout)
        with closing(plain):
            if service.tls == "implicit":
                plain = trust.context().wrap_socket(plain, server_hostname=host)
            session = _Session(plain)
            session.answer()
            if service.tls == "starttls":
                session.command(b"STARTTLS")
                session = _Session(trust.context().wrap_socket(plain, server_hostname=host))
                session.answer()
            with closing(session.connection):
                secret = b64encode(f"\0{legacy.login_name(address)}\0{password.secret}".encode())
                session.command(b'AUTHENTICATE "PLAIN" "%s"' % secret)
                scripts, active = {}, ""
                for line, literal in _with_literals(session.command(b"LISTSCRIPTS")):
                    if (match := _LISTED.match(line)) is None:
                        continue
                    name = literal if literal is not None else re.sub(rb"\\(.)", rb"\1", match[1][1:-1])
                    body = session.command(b"GETSCRIPT {%d+}\r\n%s" % (len(name), name))
                    scripts[name.decode()] = next((text for _, text in _with_literals(body) if text is not None), b"")
                    if match[2]:
                        active = name.decode()
                session.command(b"LOGOUT")
                return scripts, active
    except (OSError, UnicodeDecodeError) as error:
        raise LegacyUnavailable(f"Sieve: {plainly(error, host, port)}") from error


def _with_literals(lines: list[bytes]) -> list[tuple[bytes, bytes | None]]:
    """Lines with the literal that follows each, if any."""
    found: list[tuple[bytes, bytes | None]] = []
    upcoming = iter(lines)
    for line in upcoming:
        found.append((line, next(upcoming, b"") if _LITERAL.search(line) else None))
    return found


def write_scripts(home: Path, scripts: dict[str, bytes], active: str) -> None:
    """Write them as Pigeonhole's ``sieve = file:~/sieve;active=~/.dovecot.sieve`` has them (its default).

    A user who has scripts here keeps them.

    Raises:
        ScriptsNotRead: a name that cannot be a file's.
    """
    folder, link = home / "sieve", home / ".dovecot.sieve"
    for name in scripts:
        if "/" in name or "\0" in name or name.startswith("."):
            raise ScriptsNotRead(f"the Sieve script {name!r} cannot be stored under its name")
    if not scripts or link.is_symlink() or link.exists():
        return
    folder.mkdir(mode=0o700, exist_ok=True)
    for name, body in scripts.items():
        # On the wire lines end in CRLF; in files of this host in LF.
        replace(folder / f"{name}.sieve", body.replace(b"\r\n", b"\n").decode(errors="surrogateescape"))
    if active:
        link.symlink_to(Path("sieve") / f"{active}.sieve")
