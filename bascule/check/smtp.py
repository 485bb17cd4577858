"""The legacy SMTP server, as next hop of mail for users who have not moved.

It is asked about recipients (RCPT TO); no message is sent by this module.
"""

from __future__ import annotations

import secrets
import smtplib
from collections.abc import Iterator

from bascule.address import Address
from bascule.check.finding import Area, Finding
from bascule.errors import LegacyUnavailable
from bascule.legacy import LegacySettings, plainly


def unknown_recipient(domain: str) -> Address:
    """An address that exists nowhere."""
    return Address(f"bascule-check-{secrets.token_hex(6)}", domain)


def check_smtp(legacy: LegacySettings, timeout: float, known: Address | None) -> Iterator[Finding]:
    """Reach the next hop and see whether it tells known recipients from unknown ones."""
    where = f"{legacy.smtp_host}:{legacy.smtp_port}"
    try:
        with smtplib.SMTP(legacy.smtp_host, legacy.smtp_port, timeout=timeout) as smtp:
            code, _ = smtp.ehlo()
            if code != 250:
                yield Finding("wrong", "SMTP", f"{where} answers EHLO with {code}", "Is this an SMTP port?")
                return
            tls = (
                "offers STARTTLS" if smtp.has_extn("starttls") else "offers no STARTTLS: mail goes there in clear text"
            )
            yield Finding("good", "SMTP", f"{where} answers, {tls}")
            code, reply = smtp.mail("")
            if code >= 400:
                yield Finding(
                    "wrong",
                    "SMTP",
                    f"{where} takes no mail from the null sender: {code} {_text(reply)}",
                    "Recipients are verified with it (RFC 5321 section 4.5.5): have it allowed for this host.",
                )
                return
            if known is not None:
                code, reply = smtp.rcpt(str(known))
                yield known_recipient("SMTP", code, _text(reply), known, where)
            unknown = unknown_recipient(legacy.domain)
            code, reply = smtp.rcpt(str(unknown))
            yield _unknown_recipient(code, _text(reply), where)
    except (OSError, smtplib.SMTPException) as error:
        reason = plainly(error, legacy.smtp_host, legacy.smtp_port)
        yield Finding("wrong", "SMTP", reason, "Correct --smtp-host or --smtp-port.")


def _text(reply: bytes) -> str:
    return reply.decode(errors="replace")


def known_recipient(area: Area, code: int, text: str, known: Address, where: str) -> Finding:
    """What the reply to RCPT TO for an address that exists means."""
    if code < 400:
        return Finding("good", area, f"{where} takes mail for {known}")
    if code < 500:
        return Finding(
            "wrong",
            area,
            f"{where} does not take mail for {known} now: {code} {text}",
            "Allow this host on the legacy server (greylisting, rate limits), then check again.",
        )
    return Finding(
        "wrong",
        area,
        f"{where} refuses mail for {known}: {code} {text}",
        "Is the address right? Is this host allowed to send to the legacy server?",
    )


def _unknown_recipient(code: int, text: str, where: str) -> Finding:
    if code >= 500:
        return Finding("good", "SMTP", f"{where} refuses an address that does not exist")
    if code >= 400:
        return Finding(
            "note",
            "SMTP",
            f"{where} neither takes nor refuses an address that does not exist: {code} {text}",
            "Senders to wrong addresses will be told only after days; see the legacy server's recipient checks.",
        )
    return Finding(
        "note",
        "SMTP",
        f"{where} takes mail for an address that does not exist",
        "A catch-all, or recipients are checked after the fact: wrong addresses will bounce from there, and every "
        "address that is ever written to counts as forgotten. Migration works all the same.",
    )


def recipient_refusal(legacy: LegacySettings, timeout: float, address: Address) -> str | None:
    """The legacy server's permanent refusal of a recipient, or None if it takes mail for it.

    Raises:
        LegacyUnavailable: it cannot say now.
    """
    try:
        with smtplib.SMTP(legacy.smtp_host, legacy.smtp_port, timeout=timeout) as smtp:
            smtp.ehlo()
            smtp.mail("")
            code, reply = smtp.rcpt(str(address))
    except (OSError, smtplib.SMTPException) as error:
        raise LegacyUnavailable(plainly(error, legacy.smtp_host, legacy.smtp_port)) from error
    if 400 <= code < 500:
        raise LegacyUnavailable(f"the legacy server cannot say whether {address} exists: {code} {_text(reply)}")
    return f"{code} {_text(reply)}" if code >= 500 else None
