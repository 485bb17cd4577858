"""The authorities that the legacy server's certificates need, and no other, in a small file.

Dovecot 2.3 hands the content of ``ssl_ca`` to its programs in their environment,
for which the system's bundle is too long.
"""

from __future__ import annotations

import smtplib
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

from bascule import authorities
from bascule.errors import BasculeError, LegacyUnavailable
from bascule.legacy import LegacySettings, Trust, connect_imap, plainly


def write_authority(legacy: LegacySettings, trust: Trust, path: Path) -> str:
    """Write the file by which IMAP and SMTP of the legacy server are trusted; what was written, in words.

    Raises:
        LegacyUnavailable: the IMAP server is not reached, or not trusted by what is trusted now.
        BasculeError: no certificate is asked for.
    """
    anchors = list(dict.fromkeys(_anchors(legacy, trust)))
    if not anchors:
        raise BasculeError(f"no certificate of {legacy.imap_host} is looked at: it is asked without TLS")
    text = "".join(anchors)
    authorities.replace(path, text)
    return f"{path}: {len(anchors)} authorities, {len(text)} bytes; name it in [legacy] ca_file of bascule.toml"


def _anchors(legacy: LegacySettings, trust: Trust) -> Iterator[str]:
    """The trust anchor of each service, in PEM."""
    client = connect_imap(legacy, trust)
    try:
        yield from _anchor(client.socket())
    finally:
        client.shutdown()
    try:
        with smtplib.SMTP(legacy.smtp_host, legacy.smtp_port, timeout=trust.timeout) as smtp:
            smtp.ehlo()
            if smtp.has_extn("starttls"):
                smtp.starttls(context=trust.context())
                yield from _anchor(smtp.sock)
    except ssl.SSLCertVerificationError:
        return  # mail goes there unverified: see the check legacy.smtp.reach
    except (OSError, smtplib.SMTPException) as error:
        raise LegacyUnavailable(plainly(error, legacy.smtp_host, legacy.smtp_port)) from error


def _anchor(connection: socket.socket | None) -> Iterator[str]:
    """The last certificate of the chain that was verified: the one that is trusted by itself."""
    if isinstance(connection, ssl.SSLSocket):
        yield ssl.DER_cert_to_PEM_cert(authorities.verified_chain(connection)[-1])
