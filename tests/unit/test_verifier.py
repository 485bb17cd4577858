"""What is made of a legacy server's answer at RCPT TO, and how long it holds. The server says whatever it is told."""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trustme
import uvloop
from cachetools import TTLCache

from bascule.address import Address
from bascule.legacy import LegacySettings, Service, SmtpTls, Trust
from bascule.policy_daemon import verification
from bascule.policy_daemon.verification import Identity, Verdict, Verifier

ALICE = Address.parse("alice@lab.test")


class Legacy:
    """An SMTP server that gives one answer to each verb; None: it says nothing for ever."""

    def __init__(self, **answers: str | None) -> None:
        self.answers: dict[str, str | None] = {"greeting": "220 old.test", "ehlo": "250 old.test", **answers}
        self.heard: list[str] = []
        self.context: ssl.SSLContext | None = None
        self._serving: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Legacy:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._serving:
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        try:
            await self._talk(reader, writer)
        except (ConnectionError, ssl.SSLError):
            pass  # the client has heard enough
        finally:
            writer.close()

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        verb = "greeting"
        while True:
            answer = self.answers.get(verb, "250 ok")
            if answer is None:
                await asyncio.Event().wait()
            writer.write(f"{answer}\r\n".encode())
            if verb == "starttls" and self.context is not None:
                await writer.start_tls(self.context)
            if not (line := await reader.readline()) or verb == "quit":
                return
            self.heard.append(line.decode().strip())
            verb = line[:8].decode().strip().lower().partition(" ")[0]

    @property
    def recipients(self) -> int:
        return sum(line.startswith("RCPT") for line in self.heard)


def settings(port: int, smtp_tls: SmtpTls = "may", host: str = "127.0.0.1") -> LegacySettings:
    return LegacySettings("lab.test", "imap.old.test", Service(993, "implicit"), host, port, smtp_tls=smtp_tls)


def run(talk: Callable[[Verifier], Awaitable[None]], trust: Trust | None = None) -> None:
    async def limited() -> None:
        async with asyncio.timeout(30):
            await talk(Verifier(trust or Trust(), Identity("mx.test")))

    uvloop.run(limited())


def asked(answers: dict[str, str | None], smtp_tls: SmtpTls = "may") -> Verdict:
    found: list[Verdict] = []

    async def talk(verifier: Verifier) -> None:
        async with Legacy(**answers) as legacy:
            found.append(await verifier.verdict(settings(legacy.port, smtp_tls), ALICE))

    run(talk)
    return found[0]


@pytest.mark.parametrize(
    ("answers", "action"),
    [
        ({"rcpt": "250 2.1.5 ok"}, "DUNNO"),
        ({"rcpt": "251 will forward"}, "DUNNO"),
        ({"rcpt": "550 5.1.1 <alice> unknown"}, "550 5.1.1 no such user here"),
        ({"rcpt": "550 5.1.10 RESOLVER.ADR.RecipientNotFound"}, "550 5.1.1 no such user here"),
        ({"rcpt": "550 unrouteable address"}, "550 5.1.1 no such user here"),  # Exim
        ({"rcpt": "552 5.2.2 full"}, "552 5.2.2 the mail server of this address refuses: full"),
        ({"rcpt": "550 sorry, no mailbox here by that name (#5.1.1)"}, "550 5.1.1 no such user here"),  # qmail
        # Not the recipient, but we are refused.
        ({"rcpt": "553 sorry, that domain is not in my list of rcpthosts (#5.7.1)"}, "450 4.7.1 "),
        ({"rcpt": "550 relay not permitted"}, "450 4.2.0 "),  # Exim
        ({"rcpt": "550 Administrative prohibition"}, "450 4.2.0 "),
        ({"rcpt": "554 transaction failed"}, "450 4.2.0 "),
        ({"rcpt": "503 AUTH first"}, "450 4.2.0 "),
        ({"rcpt": "550 5.1.8 sender unknown"}, "450 4.1.8 "),
        ({"rcpt": "503 5.5.1 bad sequence"}, "450 4.5.1 "),
        ({"rcpt": "554 5.7.1 blocked"}, "450 4.7.1 the mail server of this address puts off: blocked"),
        ({"mail": "554 5.7.1 go away"}, "450 4.4.3 "),
        ({"ehlo": "550 no", "helo": "550 no"}, "450 4.4.3 "),
        ({"greeting": "554 no SMTP here"}, "450 4.4.3 "),
        ({"greeting": "nonsense"}, "450 4.4.3 "),
        # Greylisting, and words that would break the policy protocol.
        ({"rcpt": "451 4.7.1 greylisted"}, "450 4.7.1 the mail server of this address puts off: greylisted"),
        ({"rcpt": "450 later"}, "450 4.2.0 the mail server of this address puts off: later"),
        ({"rcpt": "451 4.7.1 a\x1b[31m\x07 \xfc"}, "450 4.7.1 the mail server of this address puts off: a?[31m? "),
    ],
)  # fmt: skip
def test_what_an_answer_means(answers: dict[str, str | None], action: str) -> None:
    assert asked(answers).action.startswith(action)
    assert "\n" not in asked(answers).action


def test_a_tarpit_is_waited_for_and_postfix_waits_longer() -> None:
    """Or nobody would ever be told that somebody is unknown there: what is refused is remembered for seconds only."""
    assert verification.PATIENCE > 5
    text = (Path(__file__).parents[2] / "config_templates" / "postfix" / "main.cf.j2").read_text()
    (limit,) = re.findall(r"check_policy_service .* timeout=(\d+)s", text)
    assert int(limit) > verification.PATIENCE


def test_who_says_nothing_is_waited_for_a_moment_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The question goes on, and the next attempt finds its answer; it is not asked twice at a time."""
    monkeypatch.setattr(verification, "PATIENCE", 0.2)

    async def talk(verifier: Verifier) -> None:
        async with Legacy() as legacy:
            legacy.answers["rcpt"] = None
            hold = asyncio.Event()

            async def slowly(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                await hold.wait()
                await legacy._serve(reader, writer)

            server = await asyncio.start_server(slowly, "127.0.0.1", 0)
            there = settings(server.sockets[0].getsockname()[1])
            legacy.answers["rcpt"] = "250 ok"
            first, second = await asyncio.gather(*(verifier.verdict(there, ALICE) for _ in range(2)))
            assert first.action == second.action
            assert first.action.startswith("450 4.4.3 ")
            assert verifier.known(there, ALICE) is None
            hold.set()
            while verifier.known(there, ALICE) is None:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            assert verifier.known(there, ALICE) == verification.TAKEN
            assert legacy.recipients == 1
            server.close()

    run(talk)


def test_a_server_is_not_flooded_and_one_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "PATIENCE", 0.1)
    monkeypatch.setattr(verification, "AT_A_TIME", 3)
    users = [Address.parse(f"user{number}@lab.test") for number in range(4)]

    async def talk(verifier: Verifier) -> None:
        async with Legacy(rcpt=None) as legacy:
            there = settings(legacy.port)
            verdicts = await asyncio.gather(*(verifier.verdict(there, user) for user in users))
            assert {each.action[:9] for each in verdicts} == {"450 4.4.3"}
            while legacy.recipients < 3:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            # The fourth was not asked about, and is not while they hang.
            assert (await verifier.verdict(there, users[3])).action.startswith("450 4.4.3")
            assert legacy.recipients == len(verifier._asking) == 3
            for question in verifier._asking.values():
                question.cancel()
            while verifier._asking:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            monkeypatch.setattr(verification, "DEADLINE", 0.2)
            assert (await verifier.verdict(there, users[3])).action.startswith("450 4.4.3")
            while verifier._asking:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            assert verifier._under_way["lab.test"] == 0

    run(talk)


def test_taken_holds_for_hours_and_refused_for_seconds() -> None:
    """An account that is gone is refused again within hours; a new one, and one put off, is asked about at once."""
    assert verification.TAKEN_FOR <= 24 * 3600
    assert verification.FRESH < verification.TAKEN_FOR
    assert verification.REFUSED_FOR <= 60
    now = 0.0

    async def talk(verifier: Verifier) -> None:
        nonlocal now
        clock = asyncio.get_running_loop().time
        begin = clock()
        verifier._taken = TTLCache(10, verification.TAKEN_FOR, lambda: now)
        verifier._others = TTLCache(10, verification.REFUSED_FOR, lambda: now)
        async with Legacy(rcpt="250 ok") as legacy:
            there = settings(legacy.port)
            assert (await verifier.verdict(there, ALICE)).action == "DUNNO"
            legacy.answers["rcpt"] = "550 5.1.1 gone"
            now = verification.FRESH / 2
            assert verifier.known(there, ALICE) == verification.TAKEN
            assert legacy.recipients == 1
            # Asked about anew beside a mail that is taken; then it is known.
            verifier._taken[ALICE] = begin - verification.FRESH - 1
            assert verifier.known(there, ALICE) == verification.TAKEN
            while legacy.recipients < 2 or verifier._asking:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            known = verifier.known(there, ALICE)
            assert known is not None
            assert known.action.startswith("550 5.1.1")
            now += verification.REFUSED_FOR + 1
            assert verifier.known(there, ALICE) is None
            legacy.answers["rcpt"] = "451 4.7.1 greylisted"
            await verifier.verdict(there, ALICE)
            now += verification.REFUSED_FOR + 1
            legacy.answers["rcpt"] = "250 ok"
            assert (await verifier.verdict(there, ALICE)).action == "DUNNO"
            # While the server is away, who is known is taken, but not without end.
            legacy.answers["greeting"] = "421 closing"
            now += verification.TAKEN_FOR / 2
            assert verifier.known(there, ALICE) == verification.TAKEN
            now += verification.TAKEN_FOR
            assert verifier.known(there, ALICE) is None

    run(talk)


@pytest.mark.parametrize(
    ("recipient", "path"),
    [
        ("alice@lab.test", "<alice@lab.test>"),
        ('"two words"@lab.test', '<"two words"@lab.test>'),
        ("a..b@lab.test", '<"a..b"@lab.test>'),
        ('a"b\\c@lab.test', '<"a\\"b\\\\c"@lab.test>'),
        ("b\u00fccher@lab.test", None),
    ],
)
def test_a_recipient_is_written_as_smtp_has_it(recipient: str, path: str | None) -> None:
    async def talk(verifier: Verifier) -> None:
        async with Legacy() as legacy:
            verdict = await verifier.verdict(settings(legacy.port), Address.parse(recipient))
            if path is None:
                assert verdict.action.startswith("550 5.6.7")
                assert legacy.recipients == 0
            else:
                assert f"RCPT TO:{path}" in legacy.heard
                assert "MAIL FROM:<>" in legacy.heard

    run(talk)


@pytest.mark.parametrize(
    ("smtp_tls", "host", "offered", "action"),
    [
        ("may", "127.0.0.1", True, "DUNNO"),
        ("may", "127.0.0.1", False, "DUNNO"),
        ("encrypt", "127.0.0.1", True, "DUNNO"),
        ("encrypt", "127.0.0.1", False, "450 4.4.3"),
        ("verify", "127.0.0.1", True, "450 4.4.3"),  # the certificate is localhost's
        ("verify", "localhost", True, "DUNNO"),
        ("verify", "localhost", False, "450 4.4.3"),
    ],
)
def test_tls_is_as_the_domain_wants_it(
    tmp_path: Path, smtp_tls: SmtpTls, host: str, offered: bool, action: str
) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(context)

    async def talk(verifier: Verifier) -> None:
        greeting = "250-old.test\r\n250 STARTTLS" if offered else "250 old.test"
        async with Legacy(ehlo=greeting, starttls="220 go" if offered else "502 no") as legacy:
            legacy.context = context
            verdict = await verifier.verdict(settings(legacy.port, smtp_tls, host), ALICE)
            assert verdict.action.startswith(action)
            assert action == "DUNNO" or legacy.recipients == 0

    run(talk, Trust(ca_file=tmp_path / "ca.pem"))
