"""Mail through the Postfix of this host: recipients, and a probe message.

The probe is sent as mail from outside is, through Postfix here, to an account
whose password is known; it is looked for at the legacy server, and removed
there. Nothing else is sent, and nobody is moved.
"""

from __future__ import annotations

import json
import re
import secrets
import smtplib
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from email.message import EmailMessage
from email.parser import BytesHeaderParser
from email.utils import format_datetime, localtime

from imapclient import IMAPClient

from bascule.address import Address
from bascule.check.facts import NotReadable
from bascule.check.finding import Said, good, note, wrong
from bascule.check.registry import check
from bascule.check.smtp import known_recipient
from bascule.check.subject import Subject, invented
from bascule.endpoint import host_and_port
from bascule.errors import BasculeError
from bascule.settings import Settings

PATIENCE = 60.0  # seconds for the probe to arrive
LOOK = 0.5  # seconds between looks into the legacy mailbox
VERIFICATION = 20.0  # seconds that Postfix may take to verify a recipient at the legacy server
UNKNOWN = "no such user here"  # the policy daemon's words for a recipient that the legacy server does not know
AGAIN = 2.5  # seconds before a recipient is named again: Postfix ends a session with 20 errors (smtpd_hard_error_limit)
TRACE = "Bascule-Trace"  # written by the milter
#: As Postfix's smtpd(8) says that it is a client of this host, or what that says of itself, which it does not like.
_ABOUT_THE_CLIENT = re.compile(r"(Client host|Helo command|Sender address) rejected")


@contextmanager
def _smtp(subject: Subject) -> Iterator[smtplib.SMTP]:
    host, port = host_and_port(subject.settings.postfix.smtp)
    try:
        with smtplib.SMTP(host, port, timeout=VERIFICATION + 10) as smtp:
            smtp.ehlo()
            yield smtp
    except (OSError, smtplib.SMTPException) as error:
        raise BasculeError(
            f"{host}:{port} does not take mail: {type(error).__name__}", hint="Is Postfix running? See [postfix] smtp."
        ) from error


def _rcpt(smtp: smtplib.SMTP, address: Address) -> tuple[int, str]:
    """The reply to RCPT TO; Postfix says "come back" while it verifies at the legacy server.

    With soft_bounce a refusal of the policy daemon's is a deferral, told by its words: it is given as what it is.
    """
    deadline = time.monotonic() + VERIFICATION
    while True:
        code, reply = smtp.rcpt(str(address))
        text = reply.decode(errors="replace")
        if 400 <= code < 500 and UNKNOWN in text:
            return 550, text
        if code != 450 or time.monotonic() > deadline:
            return code, text
        time.sleep(AGAIN)


def _is_about_the_client(code: int, text: str) -> bool:
    return code >= 400 and bool(_ABOUT_THE_CLIENT.search(text))


@check("postfix.recipient", "Postfix", needs=("domain", "user"), after=("legacy.smtp.recipient",))
def recipient(subject: Subject) -> Iterator[Said]:
    """Whether Postfix here takes mail for the user."""
    with _smtp(subject) as smtp:
        smtp.mail("")
        code, text = _rcpt(smtp, subject.account.address)
    where = subject.settings.postfix.smtp
    if _is_about_the_client(code, text):
        yield note(
            f"{where} takes no mail from this host itself, so that none can be tried: {code} {text}",
            "If others may send here, all is well. To have it tried, let this host pass in Postfix's restrictions.",
        )
    elif code >= 500 and "bascule" not in text and UNKNOWN not in text:
        yield wrong(
            f"{where} refuses mail for {subject.account.address}: {code} {text}",
            "The legacy server takes it (above): see Postfix's log, and which of its restrictions says so.",
        )
    else:
        yield known_recipient(code, text, subject.account.address, where)


@check("postfix.unknown-recipient", "Postfix", needs=("domain",), after=("legacy.smtp.reach",))
def unknown_recipient(subject: Subject) -> Iterator[Said]:
    """Whether Postfix here refuses an address that the legacy server refuses."""
    where = subject.settings.postfix.smtp
    with _smtp(subject) as smtp:
        smtp.mail("")
        code, text = _rcpt(smtp, invented(subject.domain))
    if _is_about_the_client(code, text):
        yield note(
            f"whether {where} refuses an address that does not exist cannot be tried from this host: {code} {text}",
            "To have it tried, let this host pass in Postfix's restrictions.",
        )
    elif code >= 500:
        yield good(f"{where} refuses an address that the legacy server refuses: {code} {text}")
    elif code >= 400:
        yield wrong(
            f"{where} cannot say whether an address exists: {code} {text}",
            "Does the policy daemon run, and does the legacy server answer this host? See Postfix's log.",
        )
    else:
        yield note(
            f"{where} takes mail for an address that does not exist",
            "So it is if the legacy server takes it, too (above). If that one refuses it, the policy daemon is not "
            "asked: see smtpd_recipient_restrictions.",
        )


@check(
    "postfix.probe",
    "Postfix",
    needs=("domain", "user", "database"),
    after=("postfix.recipient", "postfix.rewritten", "legacy.imap.login"),
)
def probe(subject: Subject) -> Iterator[Said]:
    """Whether a message that is sent here comes to the user's legacy INBOX, once."""
    if subject.has_moved:
        return
    settings, address = subject.settings, subject.account.address
    identity = f"<bascule-check-{secrets.token_hex(8)}@{settings.node}>"
    loops_before = _loops(settings)
    host, port = host_and_port(settings.postfix.smtp)
    began = time.monotonic()
    try:
        with smtplib.SMTP(host, port, timeout=VERIFICATION + 10) as smtp:
            smtp.sendmail("", [str(address)], _message(settings, address, identity))
    except smtplib.SMTPRecipientsRefused as refused:
        code, reply = refused.recipients[str(address)]
        if not _is_about_the_client(code, reply.decode(errors="replace")):  # said by postfix.recipient
            yield wrong(
                f"the probe message is not taken: {code} {reply.decode(errors='replace')}", "See Postfix's log."
            )
        return
    except (OSError, smtplib.SMTPException) as error:
        yield wrong(f"the probe message is not taken: {type(error).__name__}", "See the findings above.")
        return
    try:
        with subject.fresh_session() as session:
            while time.monotonic() - began < PATIENCE:
                found = _find(session, identity)
                if found is not None:
                    yield from _arrived(*found, time.monotonic() - began)
                    return
                if _loops(settings) > loops_before:
                    break
                if time.monotonic() - began > PATIENCE / 12 and _reason(subject):
                    break
                time.sleep(LOOK)
    except BasculeError as error:
        yield wrong(f"the probe cannot be looked for: {error.message}", error.hint)
        return
    yield _lost(subject, looped=_loops(settings) > loops_before)


def _message(settings: Settings, address: Address, identity: str) -> bytes:
    message = EmailMessage()
    message["From"] = f"postmaster@{address.domain}"
    message["To"] = str(address)
    message["Subject"] = "bascule check: a probe, removed in a moment"
    message["Date"] = format_datetime(localtime())
    message["Message-ID"] = identity
    message["Auto-Submitted"] = "auto-generated"
    message.set_content(f"Sent by bascule check on {settings.node} to see that mail comes through.\n")
    return message.as_bytes()


def _find(session: IMAPClient, identity: str) -> tuple[str, bytes] | None:
    """The folder and the header of the probe, which is removed."""
    folders = session.list_folders()
    first = [name for _, _, name in folders if name.upper() == b"INBOX"]
    junk = [name for flags, _, name in folders if b"\\Junk" in flags or re.search(b"junk|spam", name, re.IGNORECASE)]
    for name in dict.fromkeys([*first, *junk]):
        session.select_folder(name)
        uids = session.search(["HEADER", "Message-ID", identity])
        if uids:
            header = session.fetch(uids, ["BODY.PEEK[HEADER]"])[uids[0]][b"BODY[HEADER]"]
            session.add_flags(uids, [b"\\Deleted"])
            if session.has_capability("UIDPLUS"):
                session.uid_expunge(uids)
            return name.decode(errors="replace"), header
    return None


def _arrived(folder: str, raw: bytes, seconds: float) -> Iterator[Said]:
    header = BytesHeaderParser().parsebytes(raw)
    if folder.upper() == "INBOX":
        yield good(f"a probe message came through to the legacy INBOX in {seconds:.1f} s, and is removed")
    else:
        verdict = header.get("Authentication-Results") or header.get("X-Spam-Status") or "it does not say why"
        yield wrong(
            f"the legacy server files mail from here into {folder!r}: {' '.join(str(verdict).split())}",
            "It judges relayed mail by this host's address: have it allowed there, or seal it (ARC).",
        )
    traces = header.get_all(TRACE, [])
    if len(traces) == 1:
        yield good("it passed this host once, and the milter traced it: no loop")
    elif not traces:
        yield wrong(
            "the milter did not see it: loops would go unnoticed", "Does bascule-milter run? See smtpd_milters."
        )
    else:
        yield wrong(
            f"it passed this host {len(traces)} times: the legacy server sends mail of the domain back to the MX",
            "Have the legacy server deliver the domain itself.",
        )


def _lost(subject: Subject, *, looped: bool) -> Said:
    domain = subject.domain
    reason = _reason(subject)
    # Without metrics the loop guard's words, in the queue or in the bounce's log, are the only sign.
    if looped or "sent this message back" in reason:
        return wrong(
            "the legacy server sent the probe back here, and the loop guard refused it",
            f"Have the legacy server deliver mail for {domain} itself; it looks the MX up, or forwards.",
        )
    if reason:
        return wrong(
            f"mail for {subject.account.address} waits in the queue here: {reason}",
            "It is kept and tried again; correct the reason.",
        )
    return wrong(
        f"the legacy server took the probe message, and it is in neither INBOX nor Junk after {PATIENCE:.0f} s",
        "Look at the legacy server's log: a quarantine, a forward, or a slow filter"
        + (
            "."
            if subject.settings.milter.metrics
            else "; or it sends mail back here (with [milter] metrics a loop is seen)."
        ),
    )


def _reason(subject: Subject) -> str:
    """Why mail for the user waits here; empty if none does, or nobody says."""
    try:
        listing = subject.postfix.queue()
    except NotReadable:
        return ""
    for line in listing.splitlines():
        for each in json.loads(line)["recipients"]:
            if each["address"] == str(subject.account.address) and each.get("delay_reason"):
                return str(each["delay_reason"])
    return ""


def _loops(settings: Settings) -> float:
    """How many loops the milter has refused; 0 if it does not say."""
    if settings.milter.metrics is None:
        return 0
    try:
        with urllib.request.urlopen(f"http://{settings.milter.metrics}/metrics", timeout=5) as answer:
            text = answer.read().decode()
    except OSError:
        return 0
    found = re.search(r"^bascule_loops_refused_total (\S+)", text, re.MULTILINE)
    return float(found[1]) if found else 0
