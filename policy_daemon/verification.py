"""Whether the legacy server takes mail for a recipient: it is asked before Postfix says yes to the sender.

What it would refuse is refused here in SMTP, so that no bounce goes to a sender
who may be forged. Postfix's own address verification is not used: its settings
are one for all domains, and those of the operator's own are the operator's.

The question is MAIL FROM:<> and RCPT TO:<recipient>, without a message. Its answer is

- *taken*, kept for hours, so that a known user's mail is taken while the legacy server is away;
- *refused*, kept for seconds only: an account may be made at any time;
- *doubtful*: the server is away or slow, puts off for now (greylisting), or refuses
  this host rather than the recipient. Never remembered beyond seconds, and never called "no such user".
"""

from __future__ import annotations

import asyncio
import re
import ssl
from dataclasses import dataclass

import aiosmtplib
from cachetools import TTLCache

from bascule import log
from bascule.address import Address, quoted
from bascule.legacy import LegacySettings, Trust
from bascule.policy_daemon import metrics
from bascule.policy_daemon.smtp import session

#: Seconds that a sender waits; less than Postfix waits for us (main.cf.j2). Exchange lets who asks for somebody unknown
#: wait for five ("TarpitInterval"). The question goes on, and that somebody is known is there at the next attempt.
PATIENCE = 8.0
DEADLINE = 60.0  # seconds for one question; servers let strangers wait for their greeting
FRESH = 3600.0  # seconds after which a taken recipient is asked about anew, while mail for it is taken
TAKEN_FOR = 6 * 3600.0  # seconds that "taken" holds without a new answer
REFUSED_FOR = 30.0  # seconds that "refused" and "doubtful" hold
KEPT = 100_000  # answers of each kind
AT_A_TIME = 20  # questions to one legacy server

#: Replies to RCPT TO that are about the mailbox: not there, not local, full, no name for one.
_ABOUT_A_MAILBOX = {550, 551, 552, 553}
_WORDS_ABOUT_US = re.compile(
    r"\b(relay|block|black ?list|dnsbl|rbl|prohibit|denied|not (permitted|allowed)|polic|spam|authenticat|reputation)",
    re.IGNORECASE,
)
_ENHANCED = re.compile(r"([245])\.(\d{1,3})\.(\d{1,3})\b\s*")
#: As qmail writes it.
_ENHANCED_LAST = re.compile(r"\(#([245])\.(\d{1,3})\.(\d{1,3})\)$")


@dataclass(frozen=True, slots=True)
class Verdict:
    """``action`` is of access(5)."""

    kind: str
    action: str


TAKEN = Verdict("taken", "DUNNO")
_LATER = Verdict(
    "doubtful", "450 4.4.3 bascule: the mail server of this address has not yet been heard; try again later"
)


@dataclass(frozen=True, slots=True)
class Identity:
    """As whom the legacy server is asked: as Postfix's smtp(8) would."""

    helo: str
    source: str | None = None


class Verifier:
    """Asks legacy servers; keeps what they said, in bounds."""

    def __init__(self, trust: Trust, identity: Identity) -> None:
        self._trust = trust
        self._identity = identity
        self._taken: TTLCache[Address, float] = TTLCache(KEPT, TAKEN_FOR)
        self._others: TTLCache[Address, Verdict] = TTLCache(KEPT, REFUSED_FOR)
        self._asking: dict[Address, asyncio.Task[Verdict]] = {}
        self._under_way: dict[str, int] = {}

    def known(self, legacy: LegacySettings, recipient: Address) -> Verdict | None:
        """What is known without a question; one that is due is begun."""
        asked_at = self._taken.get(recipient)
        if asked_at is None:
            return self._others.get(recipient)
        if asyncio.get_running_loop().time() - asked_at > FRESH and recipient not in self._others:
            self._ask(legacy, recipient)
        return TAKEN

    async def verdict(self, legacy: LegacySettings, recipient: Address) -> Verdict:
        """What the legacy server says, or that it has not said it within PATIENCE."""
        question = self._ask(legacy, recipient)
        if question is None:
            return _LATER
        try:
            async with asyncio.timeout(PATIENCE):
                return await asyncio.shield(question)
        except TimeoutError:
            return _LATER

    def _ask(self, legacy: LegacySettings, recipient: Address) -> asyncio.Task[Verdict] | None:
        """The question that is under way, or a new one; None: that server has enough of them."""
        question = self._asking.get(recipient)
        if question is not None:
            return question
        if self._under_way.get(legacy.domain, 0) >= AT_A_TIME:
            return None
        self._under_way[legacy.domain] = self._under_way.get(legacy.domain, 0) + 1
        question = self._asking[recipient] = asyncio.create_task(self._question(legacy, recipient))
        question.add_done_callback(lambda _: self._answered(legacy, recipient))
        return question

    def _answered(self, legacy: LegacySettings, recipient: Address) -> None:
        del self._asking[recipient]
        self._under_way[legacy.domain] -= 1

    async def _question(self, legacy: LegacySettings, recipient: Address) -> Verdict:
        try:
            async with asyncio.timeout(DEADLINE):
                verdict = await self._probe(legacy, recipient)
        except (OSError, TimeoutError, aiosmtplib.SMTPException) as error:
            said = str(error) or type(error).__name__
            log.get().warning("legacy server cannot be asked", domain=legacy.domain, reason=said)
            verdict = _LATER
        metrics.PROBES.labels(verdict.kind).inc()
        now = asyncio.get_running_loop().time()
        if verdict.kind == "taken":
            self._taken[recipient] = now
            self._others.pop(recipient, None)
        else:
            if verdict.kind == "refused":
                self._taken.pop(recipient, None)
            self._others[recipient] = verdict
        return verdict

    async def _probe(self, legacy: LegacySettings, recipient: Address) -> Verdict:
        if not recipient.local_part.isascii():
            # It would need SMTPUTF8 (RFC 6531), which this Postfix does not offer.
            return Verdict("refused", "550 5.6.7 a local part with other than ASCII is not taken here")
        try:
            return await self._converse(legacy, recipient, None if legacy.smtp_tls == "may" else True)
        except ssl.SSLError:
            if legacy.smtp_tls != "may":
                raise
            return await self._converse(legacy, recipient, False)  # as Postfix does

    async def _converse(self, legacy: LegacySettings, recipient: Address, start_tls: bool | None) -> Verdict:
        client = aiosmtplib.SMTP(
            hostname=legacy.smtp_host.strip("[]"),
            port=legacy.smtp_port,
            local_hostname=self._identity.helo,
            source_address=None if self._identity.source is None else (self._identity.source, 0),
            tls_context=self._trust.context() if legacy.smtp_tls == "verify" else _unverified(),
            start_tls=start_tls,
            timeout=DEADLINE,
        )
        async with session(client):
            sender = await client.execute_command(b"MAIL", b"FROM:<>")
            if sender.code >= 400:
                # About us, or about the null sender, which every server must take (RFC 5321 section 4.5.5).
                raise aiosmtplib.SMTPResponseException(sender.code, sender.message)
            answer = await client.execute_command(b"RCPT", b"TO:<" + _path(recipient).encode() + b">")
            return TAKEN if answer.code < 300 else _refusal(answer.code, answer.message)


def _unverified() -> ssl.SSLContext:
    """TLS as Postfix's ``may``: against listeners, not against impostors."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def _refusal(code: int, message: str) -> Verdict:
    """What a refusal of RCPT TO means: whether it is about the recipient.

    About who asks, about us: 5.7.x (RFC 3463 section 3.8), 5.1.7 and 5.1.8 (the sender), 5.5.x (the command), and
    without such a code every reply but those for a mailbox (RFC 5321 section 4.2.2), and words as of a filter.
    """
    text = " ".join(message.split())
    first = _ENHANCED.match(text)
    said = text[first.end() :] if first else text
    enhanced = first or _ENHANCED_LAST.search(text)
    said = "".join(each if each.isascii() and each.isprintable() else "?" for each in said)[:200]
    if code >= 500 and not _is_about_us(code, enhanced, said):
        if enhanced is None or enhanced[2] in {"0", "1"}:
            return Verdict("refused", "550 5.1.1 no such user here")
        return Verdict(
            "refused", f"{code} 5.{enhanced[2]}.{enhanced[3]} the mail server of this address refuses: {said}"
        )
    detail = f"4.{enhanced[2]}.{enhanced[3]}" if enhanced else "4.2.0"
    return Verdict("doubtful", f"450 {detail} the mail server of this address puts off: {said}")


def _is_about_us(code: int, enhanced: re.Match[str] | None, said: str) -> bool:
    if enhanced is None:
        return code not in _ABOUT_A_MAILBOX or bool(_WORDS_ABOUT_US.search(said))
    subject, detail = enhanced[2], enhanced[3]
    return subject in {"5", "7"} or (subject == "1" and detail in {"7", "8"})


def _path(recipient: Address) -> str:
    """As in RCPT TO (RFC 5321 section 4.1.2): a local part with other than atoms is quoted."""
    local_part = recipient.local_part
    if local_part.startswith('"') or recipient.is_dot_atom:
        return str(recipient)
    return f"{quoted(local_part)}@{recipient.domain}"
