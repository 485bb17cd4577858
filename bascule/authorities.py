"""The few authorities that the legacy servers' certificates need, in a file for Dovecot 2.3.

Its proxying login processes trust ``ssl_ca`` only, whose text Dovecot puts into the
environment of every program that reads its configuration by itself (dovecot-lda,
doveadm, imap). The system's bundle is longer than the 128 KiB that one string may
have there (execve(2), MAX_ARG_STRLEN): as everybody but root they end with
"Argument list too long". So the file holds the one authority that each legacy
server's chain ends in.
"""

from __future__ import annotations

import os
import re
import ssl
from collections.abc import Mapping
from pathlib import Path

from bascule.errors import BasculeError

MAX_ARG_STRLEN = 131_072  # bytes of one string in an environment (execve(2), "Limits on size of arguments")
#: Bytes; with the rest of the environment it stays below what one string may have.
MOST = 100_000
_ENTRY = re.compile(r"# ([^\n]+)\n(-----BEGIN CERTIFICATE-----\n.*?-----END CERTIFICATE-----\n)", re.DOTALL)


class TooManyAuthorities(BasculeError):
    """The file would be too long for Dovecot 2.3."""


def too_long(size: int) -> str | None:
    """Why Dovecot 2.3 cannot have an ``ssl_ca`` of that many bytes, in words; None: it can."""
    if size <= MOST:
        return None
    return (
        f"with an ssl_ca of {size} bytes, dovecot-lda, doveadm and imap that are not started by root end with "
        f"'Argument list too long' (an environment's string has {MAX_ARG_STRLEN} bytes at most)"
    )


def verified_chain(connection: ssl.SSLSocket) -> list[bytes]:
    """The peer's certificates in DER, its own first, the authority that we trust last.

    The connection's handshake is over, and its certificate was verified.
    """
    if hasattr(connection, "get_verified_chain"):  # Python 3.13
        return [bytes(each) for each in connection.get_verified_chain()]
    chain = connection._sslobj.get_verified_chain()  # type: ignore[attr-defined]  # the same, before
    return [bytes(each.public_bytes(2)) for each in chain]  # 2: _ssl.ENCODING_DER


def read(path: Path) -> dict[str, str]:
    """The authorities in a file that :func:`write` made, as PEM by the host that needs them; none if there is no file.

    Raises:
        OSError: it cannot be read.
    """
    try:
        content = path.read_text()
    except FileNotFoundError:
        return {}
    found: dict[str, str] = {}
    for hosts, certificate in _ENTRY.findall(content):
        found |= dict.fromkeys(hosts.split(), certificate)
    return found


def write(path: Path, chains: Mapping[str, list[bytes]]) -> bool:
    """Keep the authorities of these hosts' chains (:func:`verified_chain`), and those that the file has of other hosts.

    Written whole or not at all, for everybody to read; True: it has changed, and
    Dovecot must reload.

    Raises:
        TooManyAuthorities: it was left as it is.
        OSError: it cannot be written.
    """
    hosts = read(path)
    hosts |= {host: ssl.DER_cert_to_PEM_cert(chain[-1]) for host, chain in chains.items()}
    by_certificate: dict[str, list[str]] = {}
    for host, certificate in sorted(hosts.items()):
        by_certificate.setdefault(certificate, []).append(host)
    content = "".join(f"# {' '.join(names)}\n{certificate}" for certificate, names in by_certificate.items())
    if why := too_long(len(content)):
        raise TooManyAuthorities(
            f"{path} is left as it was: {why}",
            hint="Are there domains whose migration is over? Or name one authority for all in [legacy] ca_file.",
        )
    if path.exists() and path.read_text() == content:
        return False
    replace(path, content)
    return True


def replace(path: Path, content: str) -> None:
    """Write a file whole or not at all, for everybody to read: whoever reads it sees the former one or this.

    Raises:
        OSError: it cannot be written.
    """
    new = path.with_name(f".{path.name}.new")
    new.unlink(missing_ok=True)
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    with os.fdopen(descriptor, "w") as file:
        file.write(content)
    new.chmod(0o644)  # whatever the umask is
    new.replace(path)
