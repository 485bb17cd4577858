"""The legacy SMTP server, as next hop of mail for users who have not moved.

It is asked about recipients (RCPT TO); no message is sent by this module.
"""

from __future__ import annotations

import re
import secrets
import smtplib
from collections.abc import Iterator
from contextlib import contextmanager

from bascule.address import Address
from bascule.check.finding import Said, good, note, wrong
from bascule.check.registry import check
from bascule.check.subject import Subject, invented
from bascule.endpoint import host_and_port
from bascule.errors import LegacyUnavailable
from bascule.legacy import LegacySettings, plainly

_GREYLISTED = re.compile(r"gr[ae]y-?list|try (again|later)|come back", re.IGNORECASE)


def _text(reply: bytes) -> str:
    return reply.decode(errors="replace")


@contextmanager
def conversation(legacy: LegacySettings, timeout: float) -> Iterator[smtplib.SMTP]:
    """A conversation with the next hop, greeted.

    Raises:
        LegacyUnavailable: from any command in the block.
    """
    try:
        with smtplib.SMTP(legacy.smtp_host, legacy.smtp_port, timeout=timeout) as smtp:
            code, _ = smtp.ehlo()
            if code != 250:
                raise LegacyUnavailable(
                    f"{legacy.smtp_host}:{legacy.smtp_port} answers EHLO with {code}", hint="Is this an SMTP port?"
                )
            yield smtp
    except (OSError, smtplib.SMTPException) as error:
        reason = plainly(error, legacy.smtp_host, legacy.smtp_port)
        raise LegacyUnavailable(reason, hint="Correct --smtp-host or --smtp-port.") from error


def _where(subject: Subject) -> str:
    return f"{subject.legacy.smtp_host}:{subject.legacy.smtp_port}"


@check("legacy.smtp.reach", "SMTP", needs=("domain",))
def reach(subject: Subject) -> Iterator[Said]:
    """Whether the next hop is reached, and how mail goes there."""
    with conversation(subject.legacy, subject.trust.timeout) as smtp:
        if not smtp.has_extn("starttls"):
            yield note(f"{_where(subject)} answers, offers no STARTTLS: mail goes there in clear text")
            return
        try:
            smtp.starttls(context=subject.trust.context())
        except OSError as error:
            reason = plainly(error, subject.legacy.smtp_host, subject.legacy.smtp_port)
            yield note(
                f"{_where(subject)} answers, offers STARTTLS: {reason}",
                "Mail goes there encrypted, to whoever answers: its certificate proves nothing.",
            )
            return
        yield good(f"{_where(subject)} answers, offers STARTTLS with a good certificate")


def largest_message(subject: Subject) -> int | None:
    """Bytes that the next hop takes in one message, 0 for any; None: it does not say (RFC 1870)."""
    with conversation(subject.legacy, subject.trust.timeout) as smtp:
        said = smtp.esmtp_features.get("size")
        return None if said is None else int(said or 0)


@check("legacy.smtp.null-sender", "SMTP", needs=("domain",), after=("legacy.smtp.reach",))
def null_sender(subject: Subject) -> Iterator[Said]:
    """Whether the next hop takes mail from the null sender, with which recipients are verified."""
    with conversation(subject.legacy, subject.trust.timeout) as smtp:
        code, reply = smtp.mail("")
        if code < 400 and subject.user is not None:
            code, reply = smtp.rcpt(str(subject.user.address))
            if code >= 400 and _takes_from_another(subject, subject.user.address):
                yield wrong(
                    f"{_where(subject)} takes no mail from the null sender: {code} {_text(reply)}",
                    "Recipients are verified with it (RFC 5321 section 4.5.5): have it allowed for this host.",
                )
            return
        if code >= 400:
            yield wrong(
                f"{_where(subject)} takes no mail from the null sender: {code} {_text(reply)}",
                "Recipients are verified with it (RFC 5321 section 4.5.5): have it allowed for this host.",
            )


def _takes_from_another(subject: Subject, recipient: Address) -> bool:
    with conversation(subject.legacy, subject.trust.timeout) as smtp:
        smtp.mail(f"postmaster@{subject.domain}")
        return smtp.rcpt(str(recipient))[0] < 400


@check("legacy.smtp.recipient", "SMTP", needs=("domain", "user"), after=("legacy.smtp.null-sender",))
def recipient(subject: Subject) -> Iterator[Said]:
    """Whether the next hop takes mail for the user."""
    with conversation(subject.legacy, subject.trust.timeout) as smtp:
        smtp.mail("")
        code, reply = smtp.rcpt(str(subject.account.address))
    yield known_recipient(code, _text(reply), subject.account.address, _where(subject))


def known_recipient(code: int, text: str, known: Address, where: str) -> Said:
    """What the reply to RCPT TO for an address that exists means."""
    if code < 400:
        return good(f"{where} takes mail for {known}")
    if code < 500:
        return wrong(
            f"{where} does not take mail for {known} now: {code} {text}",
            "Allow this host on the legacy server (greylisting, rate limits), then check again.",
        )
    return wrong(
        f"{where} refuses mail for {known}: {code} {text}",
        "Is the address right? Is this host allowed to send to the legacy server?",
    )


@check("legacy.smtp.unknown-recipient", "SMTP", needs=("domain",), after=("legacy.smtp.null-sender",))
def unknown_recipient(subject: Subject) -> Iterator[Said]:
    """Whether the next hop refuses an address that does not exist."""
    where = _where(subject)
    with conversation(subject.legacy, subject.trust.timeout) as smtp:
        smtp.mail("")
        code, reply = smtp.rcpt(str(invented(subject.domain)))
    if code >= 500:
        yield good(f"{where} refuses an address that does not exist")
    elif code >= 400:
        yield note(
            f"{where} neither takes nor refuses an address that does not exist: {code} {_text(reply)}",
            "Senders to wrong addresses will be told only after days; see the legacy server's recipient checks.",
        )
    else:
        yield note(
            f"{where} takes mail for an address that does not exist",
            "A catch-all, or recipients are checked after the fact: wrong addresses will bounce from there, and every "
            "address that is ever written to counts as forgotten. Migration works all the same.",
        )


@check("legacy.smtp.greylisting", "SMTP", needs=("domain", "user"), after=("legacy.smtp.recipient",))
def greylisting(subject: Subject) -> Iterator[Said]:
    """Whether the next hop puts senders off whom it does not know."""
    sender = f"bascule-{secrets.token_hex(4)}@{subject.settings.node}"
    with conversation(subject.legacy, subject.trust.timeout) as smtp:
        smtp.mail(sender)
        code, reply = smtp.rcpt(str(subject.account.address))
    if not 400 <= code < 500:
        return
    # Not every 4xx is greylisting: the same from a sender at a name that is not in the DNS is another check's.
    text = _text(reply)
    yield wrong(
        f"{_where(subject)} puts mail from a new sender off: {code} {text}",
        ("It greylists this host: " if _GREYLISTED.search(text) else "")
        + "Have this host allowed there: each new sender's mail would be late, and recipients seem unknown meanwhile.",
    )


@check("legacy.smtp.sender-verification", "SMTP", needs=("domain", "user"), after=("legacy.smtp.recipient",))
def sender_verification(subject: Subject) -> Iterator[Said]:
    """Whether the next hop refuses senders that are taken here: their mail would be returned."""
    sender = f"bascule@{secrets.token_hex(6)}.invalid"  # in no DNS (RFC 6761)
    to = str(subject.account.address)
    with conversation(subject.legacy, subject.trust.timeout) as smtp:
        code, reply = smtp.mail(sender)
        if code < 400:
            code, reply = smtp.rcpt(to)
    if code < 400:
        yield good(f"{_where(subject)} takes senders as they come")
        return
    text = f"{_where(subject)} refuses a sender whose domain does not exist: {code} {_text(reply)}"
    if subject.legacy_only:
        yield note(text, "This host must refuse such senders, too, or their mail is returned to them from here.")
        return
    host, port = host_and_port(subject.settings.postfix.smtp)
    try:
        with smtplib.SMTP(host, port, timeout=subject.trust.timeout) as smtp:
            smtp.ehlo()
            here, _ = smtp.mail(sender)
            if here < 400:
                here, _ = smtp.rcpt(to)
    except (OSError, smtplib.SMTPException):
        yield note(text, "Postfix here could not be asked whether it does so as well.")
        return
    if here >= 400 and not (code >= 500 > here):
        yield good("senders whose domain does not exist are refused here as they are at the legacy server")
    elif here >= 400:
        yield good("senders whose domain does not exist are put off here, and refused at the legacy server")
    elif code >= 500:
        yield wrong(
            f"{text}; this host takes it, and would return it to a sender that may be forged",
            "Put reject_unknown_sender_domain into smtpd_sender_restrictions here, or have this host exempted from "
            "sender checks there.",
        )
    else:
        yield note(f"{text}; this host takes it", "Such mail waits in the queue here for days.")


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
