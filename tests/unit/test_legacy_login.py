"""Logins at legacy servers: what is a wrong password, and what is anything else."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path

import pytest

from bascule.address import Address
from bascule.credential import Password
from bascule.errors import BasculeError, LegacyBusy, LegacyRefusedLogin, LegacyUnavailable
from bascule.imap.reader import Reader
from bascule.lab.scripted import Command, Folder, Server, Session
from bascule.legacy import (
    LegacySettings,
    MasterLogin,
    Service,
    TokenLogin,
    Trust,
    UserLogin,
    authenticate,
    connect_imap,
    imap_session,
    session,
)

USER = Address.parse("u@here.test")
TRUST = Trust(timeout=5)
SECRET = "secret"


def settings_for(server: Server) -> LegacySettings:
    return LegacySettings("here.test", "127.0.0.1", Service(server.port, "none"), "127.0.0.1", 25)


def outcome(server: Server, password: str = SECRET, trust: Trust = TRUST) -> BasculeError | None:
    try:
        authenticate(settings_for(server), trust, USER, Password(password))
    except BasculeError as error:
        return error
    return None


class Refusing(Server):
    """Says ``words`` to each login, but to LOGIN only where ``only`` says so."""

    words = b"NO"
    only: bytes | None = None

    def refuses_login(self, session: Session, user: bytes, password: bytes) -> bytes | None:
        if self.only is not None and self.log[-1] != self.only:
            return super().refuses_login(session, user, password)
        return self.words


@pytest.mark.parametrize(
    "words",
    [
        b"NO [AUTHENTICATIONFAILED] too many apples in a while",  # the code counts
        b"NO [AUTHORIZATIONFAILED] no",
        b"NO [EXPIRED] no",
        b"NO [x-own] wrong password",
        b"NO Login failed.",
        b"NO",
        b"NO Invalid user or password",
        b"NO incorrect password or account name",
    ],
)
def test_what_is_a_wrong_password(words: bytes) -> None:
    with Refusing() as server:
        server.words = words
        found = outcome(server)
    assert isinstance(found, LegacyRefusedLogin), found


@pytest.mark.parametrize(
    "words",
    [
        b"BAD what",
        b"BAD [AUTHENTICATIONFAILED] what",
        b"NO [UNAVAILABLE] x",
        b"NO [LIMIT] x",
        b"NO [INUSE] x",
        b"NO [THROTTLED] x",
        b"NO [CONTACTADMIN] x",
        b"NO [ALERT] x",
        b"NO [SERVERBUG] x",
        b"NO [NOPERM] x",
        b"NO [CANNOT] x",
        b"NO enough sessions of yours are open",
        b"NO come back in a while",
        b"NO too many connections",
        b"NO Maximum number of connections from user+IP exceeded",
        b"NO lost connection to the directory",
        b"NO LOGIN failure. Server error - please try again later",
        b"NO temporary failure",
        b"NO Request is throttled. Suggested Backoff Time: 3000 milliseconds",
        b"NO mailbox is locked",
        b"NO service unavailable",
        b"NO timed out",
        b"NO backend is down for maintenance",
    ],
)
def test_what_is_no_wrong_password(words: bytes) -> None:
    with Refusing() as server:
        server.words = words
        found = outcome(server)
    assert isinstance(found, LegacyUnavailable), found
    assert "u@here.test" in found.message
    assert found.hint


def test_how_long_exchange_wants_to_be_left_alone() -> None:
    with Refusing() as server:
        server.words = b"NO Request is throttled. Suggested Backoff Time: 299961 milliseconds"
        found = outcome(server)
    assert isinstance(found, LegacyBusy)
    assert (found.code, found.wait) == ("THROTTLED", 299.961)


@pytest.mark.parametrize("words", [b"BAD half a command", b"NO [CANNOT] not this way"])
def test_login_is_tried_where_sasl_plain_is_offered_and_does_not_work(words: bytes) -> None:
    with Refusing() as server:
        server.words, server.only = words, b"AUTHENTICATE"
        assert outcome(server) is None
        assert isinstance(outcome(server, "wrong"), LegacyRefusedLogin)
        server.capabilities += b" LOGINDISABLED"
        server.log.clear()
        assert isinstance(outcome(server), LegacyUnavailable)
        assert b"LOGIN" not in server.log


PASSWORDS = ["secret", "gr\u00fc\u00dfe", "\U0001f511", 'quo"te', "back\\slash\\", " two words ", "{5}", "x" * 900]


@pytest.mark.parametrize("capabilities", [b"IMAP4rev1", b"IMAP4rev1 AUTH=PLAIN", b"IMAP4rev1 AUTH=PLAIN SASL-IR"])
@pytest.mark.parametrize("password", PASSWORDS)
def test_passwords_as_people_have_them(password: str, capabilities: bytes) -> None:
    with Server(users={"u": password}) as server:
        server.capabilities = capabilities
        assert outcome(server, password) is None
        assert isinstance(outcome(server, password + "x"), LegacyRefusedLogin)
        assert (b"AUTHENTICATE" in server.log) == (b"PLAIN" in capabilities)
    assert server.logins[0][1].decode() == password


def test_8_bit_in_quotes_where_literals_are_not_taken() -> None:
    class NoLiterals(Server):
        def refuses_login(self, session: Session, user: bytes, password: bytes) -> bytes | None:
            if not session.notes:
                session.notes.add("literals were tried")
                return b"BAD no literals here"
            return super().refuses_login(session, user, password)

    with NoLiterals(users={"u": "gr\u00fc\u00dfe"}) as server:
        server.capabilities = b"IMAP4rev1"
        assert outcome(server, "gr\u00fc\u00dfe") is None


def test_a_connection_that_takes_no_password_is_named() -> None:
    with Server() as server:
        server.capabilities = b"IMAP4rev1 LOGINDISABLED"
        found = outcome(server)
    assert isinstance(found, LegacyUnavailable)
    assert "imap_tls" in found.hint
    assert not server.logins


class OpensNothing(Server):
    """Takes every login, and has no mailbox behind it."""

    opens: frozenset[bytes] = frozenset()

    def refuses_login(self, session: Session, user: bytes, password: bytes) -> bytes | None:  # noqa: ARG002
        return None

    def on_status(self, session: Session, command: Command) -> None:
        if b"STATUS" in self.opens:
            super().on_status(session, command)
        else:
            session.bad(command, b"User is authenticated but not connected.")

    def on_open(self, session: Session, command: Command) -> None:
        if b"EXAMINE" in self.opens:
            super().on_open(session, command)
        else:
            session.bad(command, b"User is authenticated but not connected.")

    def on_list(self, session: Session, command: Command) -> None:
        if b"LIST" in self.opens:
            super().on_list(session, command)
        else:
            session.bad(command, b"User is authenticated but not connected.")


@pytest.mark.parametrize("opens", [b"STATUS", b"EXAMINE", b"LIST", b""])
def test_a_login_is_believed_when_it_opens_something(opens: bytes) -> None:
    with OpensNothing() as server:
        server.opens = frozenset({opens})
        found = outcome(server)
    if opens:
        assert found is None
    else:
        assert isinstance(found, LegacyUnavailable)
        assert "authenticated but not connected" in found.message


def test_id_is_sent_before_anything_is_opened() -> None:
    class WantsId(Server):
        capabilities = b"IMAP4rev1 ID AUTH=PLAIN"

        def on_other(self, session: Session, command: Command) -> None:
            if command.verb == b"ID":
                session.notes.add("known")
                session.say(b'* ID ("name" "Coremail")')
                session.ok(command)

        def on_status(self, session: Session, command: Command) -> None:
            if "known" in session.notes:
                super().on_status(session, command)
            else:
                session.no(command, b"who are you")

    with WantsId() as server:
        assert outcome(server) is None
        with session(settings_for(server), TRUST, UserLogin(USER, Password("secret"))) as connection:
            assert "INBOX" in Reader.of(connection).statuses(["INBOX"])


# Servers that are no servers ----------------------------------------------------------


@pytest.mark.parametrize(
    "greeting",
    [
        b"* OK " + b"x" * (2 << 20),
        b"220 smtp ready\r\n",
        b"* BYE too many connections\r\n",
        b"* OK {99999999999}\r\n* LIST {99999999999}\r\n",
        b"* NO\r\n",
        b"\0\0\0\r\n",
    ],
)
def test_greetings_that_are_none(greeting: bytes) -> None:
    with Server() as server:
        server.greeting = greeting
        found = outcome(server, trust=Trust(timeout=0.3))
    assert isinstance(found, LegacyUnavailable), found
    assert found.hint


@pytest.mark.parametrize(
    "said",
    [
        b"* CAPABILITY \xff\xfe IMAP4rev1 {99999999999}\r\n",
        b"* LIST () NIL {99999999999}\r\n",
        b"* LIST () NIL {%s}\r\n" % (b"9" * 5000),
        b"* OK " + b"x" * (2 << 20) + b"\r\n",
        b"p1 MAYBE\r\n",
        b"p2 OK\r\n",
    ],
)
@pytest.mark.parametrize("how", ["session", "imapclient"])
def test_answers_within_the_login_have_bounds(said: bytes, how: str) -> None:
    class Odd(Server):
        def __init__(self) -> None:
            super().__init__()
            self.greeting = b"* OK ready\r\n" + said

    with Odd() as server:
        if how == "session":
            found: BaseException | None = outcome(server, trust=Trust(timeout=0.5))
            assert found is None or isinstance(found, LegacyUnavailable), found
            assert found is not None or said.startswith(b"* CAPABILITY")
        else:
            try:
                connect_imap(settings_for(server), Trust(timeout=0.5)).shutdown()
            except LegacyUnavailable as error:
                assert error.message.isprintable()


def test_capabilities_that_are_not_ascii_stop_nothing() -> None:
    with Server() as server:
        server.capabilities = b"IMAP4rev1 AUTH=PLAIN X-\xff\xe9"
        assert outcome(server) is None
        with pytest.raises(LegacyUnavailable, match="does not speak IMAP"):
            connect_imap(settings_for(server), TRUST)


def test_a_login_has_one_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte comes in time, and the whole does not."""

    class Dripping(Server):
        def refuses_login(self, session: Session, user: bytes, password: bytes) -> bytes | None:  # noqa: ARG002
            session.drip(b"* OK please wait\r\n" * 100_000, 0.01)
            return None

    monkeypatch.setattr("bascule.legacy.LOGIN", 0.05)
    with Dripping() as server:
        found = outcome(server, trust=Trust(timeout=10))
        assert isinstance(found, LegacyUnavailable)
        assert "does not answer in time" in found.message
        assert isinstance(found.__cause__, TimeoutError)


@pytest.mark.parametrize("when", ["login", "STATUS"])
def test_a_connection_that_is_lost_is_no_wrong_password(when: str) -> None:
    class Resets(Server):
        def refuses_login(self, session: Session, user: bytes, password: bytes) -> bytes | None:
            if when == "login":
                session.reset()
            return super().refuses_login(session, user, password)

        def on_status(self, session: Session, command: Command) -> None:  # noqa: ARG002
            session.reset()

    with Resets() as server:
        found = outcome(server)
    assert isinstance(found, LegacyUnavailable)
    assert isinstance(found.__cause__, OSError) or "closed" in found.message
    assert found.hint


def test_nobody_listens() -> None:
    with Server() as server:
        pass
    found = outcome(server)
    assert isinstance(found, LegacyUnavailable)
    assert isinstance(found.__cause__, ConnectionRefusedError)
    assert found.hint


# What happens in the block ------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[Server]:
    with Server([Folder(b"INBOX"), Folder(b"a")]) as running:
        yield running


LOGIN = UserLogin(USER, Password("secret"))


def test_errors_of_others_pass_through(server: Server) -> None:
    with pytest.raises(OSError, match="No space left") as found, session(settings_for(server), TRUST, LOGIN):
        raise OSError(28, "No space left on device")
    assert not isinstance(found.value, BasculeError)
    with pytest.raises(OSError, match="No space left"), imap_session(settings_for(server), TRUST, LOGIN):
        raise OSError(28, "No space left on device")
    assert b"LOGOUT " not in server.log


def test_the_farewell_is_said_when_nothing_is_under_way(server: Server) -> None:
    with session(settings_for(server), TRUST, LOGIN):
        pass
    assert server.log[-1] == b"LOGOUT "
    server.log.clear()
    with session(settings_for(server), TRUST, LOGIN) as connection:
        connection.pipeline.send(b"NOOP")
    assert b"LOGOUT " not in server.log


def test_imapclient_on_a_connection_of_ours(server: Server) -> None:
    with imap_session(settings_for(server), TRUST, LOGIN) as client:
        assert [name for _, _, name in client.list_folders()] == [b"INBOX", b"a"]
        assert client.select_folder("INBOX", readonly=True)[b"EXISTS"] == 0
        client.append("INBOX", b"Subject: x\r\n\r\n")
    with (
        pytest.raises(LegacyUnavailable, match="no such folder"),
        imap_session(settings_for(server), TRUST, LOGIN) as client,
    ):
        client.select_folder("nowhere")


def test_master_and_token_logins() -> None:
    class Any(Server):
        capabilities = b"IMAP4rev1 AUTH=PLAIN AUTH=XOAUTH2 SASL-IR"

        def on_other(self, session: Session, command: Command) -> None:
            session.bad(command, b"unknown")

    with Any(users={"boss": "secret"}) as server:
        with session(settings_for(server), TRUST, MasterLogin(USER, "boss", Password("secret"))):
            pass
        assert server.logins == [(b"boss", b"secret")]
        with pytest.raises(LegacyUnavailable), session(settings_for(server), TRUST, TokenLogin(USER, Password("t"))):
            pass


@pytest.mark.parametrize("mechanism", ["XOAUTH2", "OAUTHBEARER"])
@pytest.mark.parametrize("ir", [b"", b" SASL-IR"])
def test_tokens_are_sent_and_refused_as_the_mechanisms_want_it(mechanism: str, ir: bytes) -> None:
    said: list[bytes] = []

    class Bearer(Server):
        capabilities = b"IMAP4rev1 AUTH=" + mechanism.encode() + ir

    def answer(session: Session, command: Command) -> None:
        if len(command.words) < 2:
            session.raw(b"+ \r\n")
        blob = command.words[1] if len(command.words) > 1 else session.line()
        said.append(base64.b64decode(blob))
        if b"good" in said[-1]:
            session.ok(command)
            return
        session.raw(b"+ eyJzdGF0dXMiOiI0MDEifQ==\r\n")
        said.append(session.line())
        session.no(command, b"[AUTHENTICATIONFAILED] token")

    with Bearer() as server:
        server.on_authenticate = answer  # type: ignore[method-assign]
        with session(settings_for(server), TRUST, TokenLogin(USER, Password("good"))):
            pass
        with (
            pytest.raises(LegacyRefusedLogin),
            session(settings_for(server), TRUST, TokenLogin(USER, Password("bad"))),
        ):
            pass
    assert b"auth=Bearer good\x01\x01" in said[0]
    assert b"u@here.test" in said[0]
    assert said[2] == (b"" if mechanism == "XOAUTH2" else b"AQ==")


def test_a_certificate_that_is_not_trusted_is_named(tmp_path: Path) -> None:
    trustme = pytest.importorskip("trustme")
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    chain, key, trusted = tmp_path / "chain", tmp_path / "key", tmp_path / "ca"
    certificate.private_key_pem.write_to_path(key)
    certificate.cert_chain_pems[0].write_to_path(chain)
    authority.cert_pem.write_to_path(trusted)
    with Server() as server:
        server.certificate, server.implicit_tls = (chain, key), True
        secured = LegacySettings("here.test", "127.0.0.1", Service(server.port, "implicit"), "127.0.0.1", 25)
        authenticate(secured, Trust(trusted, 5), USER, Password("secret"))
        with pytest.raises(LegacyUnavailable, match="not trusted here") as found:
            authenticate(secured, TRUST, USER, Password("secret"))
        assert "ca_file" in found.value.hint
        server.implicit_tls = False
        server.greeting = b"* OK [CAPABILITY IMAP4rev1 LOGINDISABLED] ready\r\n"
        starting = LegacySettings("here.test", "127.0.0.1", Service(server.port, "starttls"), "127.0.0.1", 25)
        authenticate(starting, Trust(trusted, 5), USER, Password("secret"))
        # What was offered before TLS is asked for again within it.
        assert server.log[-5:-2] == [b"STARTTLS ", b"CAPABILITY ", b"AUTHENTICATE"]
