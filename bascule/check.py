"""Check the settings of a legacy server against the server itself, in plain words.

Nothing is changed there: the IMAP side is only logged in to, the SMTP side is
asked about recipients (RCPT TO) and no message is ever sent.
"""

from __future__ import annotations

import secrets
import smtplib
from dataclasses import dataclass

from imapclient.exceptions import IMAPClientError

from bascule.address import Address
from bascule.credential import Password
from bascule.errors import LegacyRefusedLogin, LegacyUnavailable
from bascule.legacy import LegacySettings, Trust, UserLogin, connect_imap, imap_session, plainly


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was tried. ``remedy`` is empty when it is right."""

    good: bool
    text: str
    remedy: str = ""


def check_imap(
    legacy: LegacySettings, trust: Trust, address: Address | None, password: Password | None
) -> list[Finding]:
    """Reach the IMAP server, check its certificate and, if an account is given, log in and list the folders."""
    where = f"{legacy.imap_host}:{legacy.imap.port}"
    try:
        client = connect_imap(legacy, trust)
    except LegacyUnavailable as error:
        return [Finding(False, f"IMAP: {error.message}", "Correct --imap-host, --imap-port or --imap-tls.")]
    try:
        capabilities = {c.decode() for c in client.capabilities()}
    except (OSError, IMAPClientError) as error:
        return [Finding(False, f"IMAP: {plainly(error, legacy.imap_host, legacy.imap.port)}", "Is this an IMAP port?")]
    finally:
        client.shutdown()
    secured = "without TLS" if legacy.imap.tls == "none" else "with a good certificate"
    findings = [Finding(True, f"IMAP: {where} answers, {secured}")]
    quick = sorted(capabilities & {"CONDSTORE", "QRESYNC", "UIDPLUS", "LITERAL+", "BINARY"})
    findings.append(Finding(True, f"IMAP: offers {', '.join(quick) if quick else 'plain IMAP4rev1'} before login"))
    if address is None or password is None:
        return findings
    try:
        with imap_session(legacy, trust, UserLogin(address, password)) as session:
            folders = session.list_folders()
    except LegacyRefusedLogin as error:
        return [
            *findings,
            Finding(
                False,
                f"IMAP: {error.message}",
                "Check the password, and --login-form (address or local_part).",
            ),
        ]
    except LegacyUnavailable as error:
        return [
            *findings,
            Finding(False, f"IMAP: {error.message}", "The server has trouble of its own; try again later."),
        ]
    return [*findings, Finding(True, f"IMAP: {address} logs in and has {len(folders)} folders")]


def check_smtp(legacy: LegacySettings, timeout: float, known: Address | None) -> list[Finding]:
    """Reach the SMTP next hop and see whether it tells known recipients from unknown ones."""
    where = f"{legacy.smtp_host}:{legacy.smtp_port}"
    unknown = Address(f"bascule-check-{secrets.token_hex(6)}", legacy.domain)
    findings: list[Finding] = []
    try:
        with smtplib.SMTP(legacy.smtp_host, legacy.smtp_port, timeout=timeout) as smtp:
            smtp.ehlo()
            findings.append(Finding(True, f"SMTP: {where} answers"))
            smtp.mail("")
            if known is not None:
                code, text = smtp.rcpt(str(known))
                findings.append(_known_recipient(code, text.decode(errors="replace"), known, where))
            code, text = smtp.rcpt(str(unknown))
            findings.append(_unknown_recipient(code, text.decode(errors="replace"), where))
    except (OSError, smtplib.SMTPException) as error:
        reason = plainly(error, legacy.smtp_host, legacy.smtp_port)
        findings.append(Finding(False, f"SMTP: {reason}", "Correct --smtp-host or --smtp-port."))
    return findings


def _known_recipient(code: int, text: str, known: Address, where: str) -> Finding:
    if code < 400:
        return Finding(True, f"SMTP: {where} takes mail for {known}")
    if code < 500:
        return Finding(
            False,
            f"SMTP: {where} does not take mail for {known} now: {code} {text}",
            "Allow this host on the legacy server (greylisting, rate limits), then check again.",
        )
    return Finding(
        False,
        f"SMTP: {where} refuses mail for {known}: {code} {text}",
        "Is the address right? Is this host allowed to send to the legacy server?",
    )


def _unknown_recipient(code: int, text: str, where: str) -> Finding:
    if code >= 500:
        return Finding(True, f"SMTP: {where} refuses an address that does not exist")
    if code >= 400:
        return Finding(
            False,
            f"SMTP: {where} neither takes nor refuses an address that does not exist: {code} {text}",
            "Senders to wrong addresses will be told only after days; see the legacy server's recipient checks.",
        )
    return Finding(
        False,
        f"SMTP: {where} takes mail for an address that does not exist",
        "A catch-all, or recipients are checked after the fact: wrong addresses will bounce from there. "
        "Migration works all the same.",
    )


def check_legacy(
    legacy: LegacySettings, trust: Trust, address: Address | None = None, password: Password | None = None
) -> list[Finding]:
    """Everything that can be checked from here, in the order in which an operator would correct it."""
    return [*check_imap(legacy, trust, address, password), *check_smtp(legacy, trust.timeout, address)]


def recipient_refusal(legacy: LegacySettings, timeout: float, address: Address) -> str | None:
    """The legacy server's permanent refusal of a recipient, or None if it takes mail for it.

    Raises:
        LegacyUnavailable: it cannot say now.
    """
    try:
        with smtplib.SMTP(legacy.smtp_host, legacy.smtp_port, timeout=timeout) as smtp:
            smtp.ehlo()
            smtp.mail("")
            code, text = smtp.rcpt(str(address))
    except (OSError, smtplib.SMTPException) as error:
        raise LegacyUnavailable(plainly(error, legacy.smtp_host, legacy.smtp_port)) from error
    if 400 <= code < 500:
        raise LegacyUnavailable(
            f"the legacy server cannot say whether {address} exists: {code} {text.decode(errors='replace')}"
        )
    return f"{code} {text.decode(errors='replace')}" if code >= 500 else None
