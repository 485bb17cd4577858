"""The legacy server of a domain: its settings, and a session on its IMAP side.

What it answers is sorted into two: it refuses the login (:class:`LegacyRefusedLogin`),
or anything else went wrong, which is always temporary (:class:`LegacyUnavailable`).
Only what says that name and password are wrong is a refusal: not that a command
is not understood, nor a limit, nor a backend of the server that is away.
"""

from __future__ import annotations

import base64
import functools
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from imapclient import IMAPClient
from imapclient.exceptions import IMAPClientError

from bascule.address import Address
from bascule.credential import Password
from bascule.errors import BUSY_CODES, LegacyBusy, LegacyRefusedLogin, LegacyUnavailable, ServerUnavailable
from bascule.imap import client, profiles, responses
from bascule.imap.pipeline import CommandRefused, Connection, Pipeline, Tagged, Untagged, capabilities, quoted
from bascule.imap.reader import IDENTITY
from bascule.imap.responses import printable
from bascule.imap.wire import Peer, Wire

TlsMode = Literal["implicit", "starttls", "none"]
LoginForm = Literal["address", "local_part"]
#: TLS of mail to the legacy server, as Postfix's smtp_tls_security_level.
SmtpTls = Literal["may", "encrypt", "verify"]
CopyLogin = Literal["user", "master", "xoauth2"]

#: Response codes of a refused login that say that name and password are wrong (RFC 5530 section 3) ...
_WRONG_CODES = {"AUTHENTICATIONFAILED", "AUTHORIZATIONFAILED", "EXPIRED"}
#: ... and those that say anything else.
_OTHER_CODES = {"SERVERBUG", "CONTACTADMIN", "PRIVACYREQUIRED", "ALERT", "CANNOT", "NOPERM", "CLIENTBUG", *BUSY_CODES}
CONNECT = 10  # seconds for a connection, at most
LOGIN = 2  # times Trust.timeout: what everything from the connection to the end of the login may take
FAREWELL = 5  # seconds


@dataclass(frozen=True, slots=True)
class Service:
    """A port of the legacy host and how a connection to it is secured."""

    port: int
    tls: TlsMode


@dataclass(frozen=True, slots=True)
class LegacySettings:
    """How the legacy server of one domain is reached."""

    domain: str
    imap_host: str
    imap: Service
    smtp_host: str
    smtp_port: int
    pop3: Service | None = None
    submission: Service | None = None
    sieve: Service | None = None
    login_form: LoginForm = "address"
    smtp_tls: SmtpTls = "may"
    #: The name of the one user that these settings are for, if ``login_form`` does not tell it; see :meth:`known_as`.
    user_name: str | None = None

    def login_name(self, address: Address) -> str:
        """The name under which the legacy server knows a user."""
        if self.user_name is not None:
            return self.user_name
        return str(address) if self.login_form == "address" else address.local_part

    def known_as(self, user_name: str | None) -> LegacySettings:
        """The same for one user, whom the server knows by this name; None: by what ``login_form`` says."""
        return self if user_name is None else replace(self, user_name=user_name)


@dataclass(frozen=True, slots=True)
class Trust:
    """Whom we trust to name legacy servers, and how long we wait for them (seconds)."""

    ca_file: Path | None = None
    timeout: float = 20

    def context(self) -> ssl.SSLContext:
        return _context(self.ca_file)


@functools.cache
def _context(ca_file: Path | None) -> ssl.SSLContext:
    """Made once: to read all of a system's trust anchors takes longer than a login."""
    return ssl.create_default_context(cafile=None if ca_file is None else str(ca_file))


#: The columns of ``routing_domain`` (or ``domain``) that :func:`from_row` takes, in its order.
COLUMNS = (
    "name, imap_host, imap_port, imap_tls, smtp_host, smtp_port, pop3_port, pop3_tls, submission_port, "
    "submission_tls, sieve_port, sieve_tls, login_form"
)


def from_row(
    name: str,
    imap_host: str,
    imap_port: int,
    imap_tls: TlsMode,
    smtp_host: str,
    smtp_port: int,
    pop3_port: int | None,
    pop3_tls: TlsMode | None,
    submission_port: int | None,
    submission_tls: TlsMode | None,
    sieve_port: int | None,
    sieve_tls: TlsMode | None,
    login_form: LoginForm,
    smtp_tls: SmtpTls = "may",
) -> LegacySettings:
    """The settings in a row of ``SELECT {COLUMNS}``, or ``SELECT {COLUMNS}, smtp_tls``."""
    return LegacySettings(
        domain=name,
        imap_host=imap_host,
        imap=Service(imap_port, imap_tls),
        smtp_host=smtp_host,
        smtp_port=smtp_port,
        pop3=Service(pop3_port, pop3_tls) if pop3_port and pop3_tls else None,
        submission=Service(submission_port, submission_tls) if submission_port and submission_tls else None,
        sieve=Service(sieve_port, sieve_tls) if sieve_port and sieve_tls else None,
        login_form=login_form,
        smtp_tls=smtp_tls,
    )


def plainly(error: Exception, host: str, port: int) -> str:
    """What a failure to talk to ``host`` means, in plain words."""
    if isinstance(error, ssl.SSLCertVerificationError):
        if error.verify_code in {62, 64}:  # X509_V_ERR_HOSTNAME_MISMATCH, X509_V_ERR_IP_ADDRESS_MISMATCH
            return f"the certificate of {host}:{port} is not made for the name {host}"
        return f"the certificate of {host}:{port} is not trusted here: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return f"{host}:{port} does not speak TLS the way the settings say ({error.reason or 'handshake failed'})"
    if isinstance(error, socket.gaierror):
        return f"the name {host} is not known to the DNS"
    if isinstance(error, ConnectionRefusedError):
        return f"nothing listens at {host}:{port}"
    if isinstance(error, TimeoutError):
        return f"{host}:{port} does not answer in time"
    if isinstance(error, BrokenPipeError | ConnectionResetError):
        return f"{host}:{port} ended the connection"
    if isinstance(error, OSError) and error.strerror:
        return f"{host}:{port} cannot be reached: {error.strerror}"
    return f"{host}:{port} ended the conversation: {error}"


class LegacyPeer(Peer):
    """The legacy server at the other end of a connection."""

    name = "the legacy server"

    def __init__(self, host: str, port: int, timeout: float) -> None:
        self._host, self._port, self._timeout = host, port, timeout

    def unavailable(self, message: str, *, hint: str = "") -> LegacyUnavailable:
        return LegacyUnavailable(message, hint=hint or f"See the log of {self._host} at this time.")

    def busy(self, message: str, *, code: str, wait: float) -> LegacyBusy:
        hint = f"{self._host} allows so much and no more: allow fewer sessions, or ask there for more."
        if code == "OVERQUOTA":
            hint = f"Is the mailbox full there? Make room, or have its quota raised; if it is not: {hint}"
        elif code in {"", "UNAVAILABLE"}:
            hint = f"Something is wrong there, or it is being shut down: see the log of {self._host} at this time."
        return LegacyBusy(message, code=code, wait=wait, hint=hint)

    def lost(self, error: OSError) -> LegacyUnavailable:
        return LegacyUnavailable(plainly(error, self._host, self._port), hint=self._advice(error))

    def closed(self) -> LegacyUnavailable:
        return self.unavailable(f"{self._host}:{self._port} closed the connection")

    def _advice(self, error: OSError) -> str:
        if isinstance(error, ssl.SSLCertVerificationError):
            return "Have the certificate renewed there, or name its authority here: [legacy] ca_file."
        if isinstance(error, ssl.SSLError):
            return "Correct --imap-tls or --imap-port."
        if isinstance(error, socket.gaierror):
            return "Correct --imap-host, or the DNS."
        if isinstance(error, TimeoutError):
            return (
                f"Is it overloaded, or the way there slow? One answer may take {self._timeout:g} s: "
                "[legacy] timeout in the settings file."
            )
        return "Does it run, and may this host connect to it? See its log at this time."


def _connect(legacy: LegacySettings, trust: Trust) -> tuple[Pipeline, bytes, frozenset[str]]:
    """A connection that is secured and not logged in, its greeting, and the capabilities if that names them.

    Raises:
        LegacyUnavailable: with the reason in plain words.
    """
    host, port = legacy.imap_host, legacy.imap.port
    peer = LegacyPeer(host, port, trust.timeout)
    deadline = time.monotonic() + LOGIN * trust.timeout
    wire = Wire(_socket(peer, host, port, deadline, trust.timeout), peer, silence=trust.timeout)
    try:
        wire.allow(max(0.0, deadline - time.monotonic()))
        pipeline = Pipeline(wire)
        pipeline.renews = False
        if legacy.imap.tls == "implicit":
            wire.start_tls(trust.context(), host)
        greeting = pipeline.greeting()
        offered = _announced(greeting.partition(b" ")[2])
        if legacy.imap.tls == "starttls":
            try:
                pipeline.run(b"STARTTLS")
            except CommandRefused as error:
                raise LegacyUnavailable(
                    f"{host}:{port} refuses STARTTLS: {error.message}", hint="Correct --imap-tls or --imap-port."
                ) from error
            wire.start_tls(trust.context(), host)
            offered = frozenset()  # what it offered before is not believed (RFC 3501 section 6.2.1)
    except BaseException:
        wire.close()
        raise
    return pipeline, greeting, offered


def _socket(peer: LegacyPeer, host: str, port: int, deadline: float, timeout: float) -> socket.socket:
    """A connection to the first of the host's addresses that takes one."""
    failure = OSError("no address")
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            left = min(timeout, CONNECT, deadline - time.monotonic())
            if left <= 0:
                break
            connection = socket.socket(family, kind, protocol)
            try:
                connection.settimeout(left)
                connection.connect(address)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return connection  # noqa: TRY300
            except OSError as error:
                connection.close()
                failure = error
    except (OSError, UnicodeError) as error:  # the second: a name that no DNS could have
        failure = error if isinstance(error, OSError) else socket.gaierror(str(error))
    raise peer.lost(failure) from failure


def connect_imap(legacy: LegacySettings, trust: Trust) -> IMAPClient:
    """A connection to the legacy IMAP server, secured, not logged in.

    Raises:
        LegacyUnavailable: with the reason in plain words.
    """
    pipeline, greeting, _ = _connect(legacy, trust)
    return _client(Connection(pipeline, printable(greeting), frozenset()), legacy, logged_in=False)


def _client(connection: Connection, legacy: LegacySettings, *, logged_in: bool) -> IMAPClient:
    try:
        return client.on(connection, legacy.imap_host, logged_in=logged_in)
    except (IMAPClientError, UnicodeError) as error:
        connection.pipeline.wire.close()
        raise connection.pipeline.peer.violates(str(error)) from error
    except BaseException:
        connection.pipeline.wire.close()
        raise


@dataclass(frozen=True, slots=True)
class UserLogin:
    """With the user's own password: SASL PLAIN (RFC 4616), or LOGIN where that is not offered."""

    address: Address
    password: Password


@dataclass(frozen=True, slots=True)
class MasterLogin:
    """As the user, with a master user's name and password: SASL PLAIN with an authorization identity."""

    address: Address
    name: str
    password: Password


def plain(user: str, password: Password | MasterLogin) -> bytes:
    """The message of SASL PLAIN (RFC 4616) by which ``user`` logs in, or a master user as ``user``."""
    if isinstance(password, MasterLogin):
        return f"{user}\0{password.name}\0{password.password.secret}".encode()
    return f"\0{user}\0{password.secret}".encode()


@dataclass(frozen=True, slots=True)
class TokenLogin:
    """With an OAuth 2.0 access token: XOAUTH2, or OAUTHBEARER (RFC 7628) where only that is offered."""

    address: Address
    token: Password


Login = UserLogin | MasterLogin | TokenLogin


def _log_in(pipeline: Pipeline, offered: frozenset[str], legacy: LegacySettings, login: Login) -> frozenset[str]:
    """Log in; the capabilities after it. ``offered``: those before, if they are known.

    Raises:
        LegacyRefusedLogin, LegacyUnavailable
    """
    where = f"{legacy.imap_host}:{legacy.imap.port}"
    try:
        offered = offered or capabilities(pipeline)
        ended, untagged = _proof(pipeline, legacy, login, offered)
    except LegacyBusy as error:
        text = f"{where} cannot check the login of {login.address} now: {error.message}"
        raise LegacyBusy(text, code=error.code, wait=error.wait, hint=error.hint) from error.__cause__
    except CommandRefused as error:
        raise LegacyUnavailable(
            f"{where} refuses CAPABILITY: {error.message}", hint="Is this an IMAP port? Correct --imap-port."
        ) from error
    if ended.refused is not None:
        raise _refusal(ended.refused, where, login.address)
    pipeline.renews = True
    pipeline.wire.allow()
    told = [each.text.partition(b" ")[2] for each in untagged if each.text[:11].upper() == b"CAPABILITY "]
    now = frozenset(printable(each, 80).upper() for each in told[-1].split()) if told else _announced(ended.said)
    try:
        return now or capabilities(pipeline)
    except CommandRefused:
        return offered


def _proof(
    pipeline: Pipeline, legacy: LegacySettings, login: Login, offered: frozenset[str]
) -> tuple[Tagged, list[Untagged]]:
    """Prove who we are, in the way that the server offers."""
    user = legacy.login_name(login.address)
    if isinstance(login, TokenLogin):
        if "AUTH=XOAUTH2" in offered or "AUTH=OAUTHBEARER" not in offered:
            token = f"user={user}\1auth=Bearer {login.token.secret}\1\1"
            return _authenticate(pipeline, offered, b"XOAUTH2", token, b"")
        name = user.replace("=", "=3D").replace(",", "=2C")  # RFC 5801 section 4, saslname
        token = f"n,a={name},\1auth=Bearer {login.token.secret}\1\1"
        return _authenticate(pipeline, offered, b"OAUTHBEARER", token, b"AQ==")
    if isinstance(login, MasterLogin):
        return _authenticate(pipeline, offered, b"PLAIN", plain(user, login).decode())
    secret = login.password.secret
    refused: tuple[Tagged, list[Untagged]] | None = None
    if "AUTH=PLAIN" in offered:
        refused = _authenticate(pipeline, offered, b"PLAIN", plain(user, login.password).decode())
        error = refused[0].refused
        if error is None or not (error.is_bad or error.code == "CANNOT") or "LOGINDISABLED" in offered:
            return refused
    elif "LOGINDISABLED" in offered:
        raise LegacyUnavailable(
            "the legacy server offers neither SASL PLAIN nor LOGIN on this connection",
            hint="It may want TLS: see imap_tls.",
        )
    return _plain_login(pipeline, user, secret)


def _authenticate(
    pipeline: Pipeline, offered: frozenset[str], mechanism: bytes, response: str, *more: bytes
) -> tuple[Tagged, list[Untagged]]:
    """AUTHENTICATE (RFC 3501 section 6.2.2, RFC 4959); ``more``: what is answered to further challenges."""
    encoded = base64.b64encode(response.encode())
    command = b"AUTHENTICATE " + mechanism
    if "SASL-IR" in offered:
        return pipeline.dialogue(b"%s %s" % (command, encoded), *(each + b"\r\n" for each in more))
    return pipeline.dialogue(command, *(each + b"\r\n" for each in (encoded, *more)))


def _plain_login(pipeline: Pipeline, user: str, secret: str) -> tuple[Tagged, list[Untagged]]:
    """LOGIN (RFC 3501 section 6.2.3). It leaves other than ASCII open: servers take UTF-8, in literals or in quotes."""
    if (user + secret).isascii() and not {"\r", "\n", "\0"} & {*user, *secret}:
        return pipeline.dialogue(b"LOGIN %s %s" % (quoted(user), quoted(secret)))
    name, word = user.encode(), secret.encode()
    ended = pipeline.dialogue(b"LOGIN {%d}" % len(name), b"%s {%d}\r\n" % (name, len(word)), b"%s\r\n" % word)
    if ended[0].refused is None or not ended[0].refused.is_bad or {"\r", "\n", "\0"} & {*user, *secret}:
        return ended
    return pipeline.dialogue(b"LOGIN %s %s" % (quoted(user), quoted(secret)))


def _announced(said: bytes) -> frozenset[str]:
    """The capabilities in a response code, if they are there (RFC 3501 section 7.1)."""
    code = responses.code(said)
    return frozenset(code.argument.upper().split()) if code.name == "CAPABILITY" else frozenset()


def _refusal(refused: CommandRefused, where: str, address: Address) -> LegacyRefusedLogin | LegacyUnavailable:
    """What a refused login means."""
    if refused.code in _WRONG_CODES and not refused.is_bad:
        return LegacyRefusedLogin(f"{where} refuses the login of {address}: {refused.message}")
    text = f"{where} cannot check the login of {address} now: {refused.message}"
    if refused.is_bad:
        return LegacyUnavailable(text, hint="It does not understand the login: see imap_tls, and the server's log.")
    if refused.code in _OTHER_CODES:
        return LegacyBusy(text, code=refused.code, hint=f"See the log of {where} for this user.")
    if profiles.is_limit(refused.message):
        return LegacyBusy(
            text, code="LIMIT", hint="If it is a limit of sessions: allow fewer with --connections, or more there."
        )
    return LegacyRefusedLogin(f"{where} refuses the login of {address}: {refused.message}")


@contextmanager
def session(legacy: LegacySettings, trust: Trust, login: Login) -> Iterator[Connection]:
    """A connection to the legacy IMAP server on which the user is logged in, for the ``with`` block.

    Raises:
        LegacyRefusedLogin: the server says that name and password are wrong.
        LegacyBusy: it says that it cannot now.
        LegacyUnavailable: anything else that goes wrong until the block begins.
    """
    pipeline, greeting, offered = _connect(legacy, trust)
    wire = pipeline.wire
    try:
        found = _log_in(pipeline, offered, legacy, login)
        yield Connection(pipeline, printable(greeting), found)
        if not wire.under_way:
            _farewell(pipeline)
    finally:
        wire.close()  # and no farewell after a failure: answers may be under way


def _farewell(pipeline: Pipeline) -> None:
    """LOGOUT, so that the server counts the session no more; all that mattered is done."""
    pipeline.renews = False
    pipeline.wire.allow(FAREWELL)
    try:
        pipeline.run(b"LOGOUT")
    except (CommandRefused, ServerUnavailable):
        return  # BYE is one of these


@contextmanager
def imap_session(legacy: LegacySettings, trust: Trust, login: Login) -> Iterator[IMAPClient]:
    """The same in imapclient's hands.

    Raises:
        LegacyRefusedLogin, LegacyBusy, LegacyUnavailable: as :func:`session`;
            the last also when the server refuses what imapclient asks in the block.
    """
    with session(legacy, trust, login) as connection:
        try:
            yield _client(connection, legacy, logged_in=True)
        except IMAPClientError as error:
            # imapclient's own error, which nothing else raises; it says what was refused.
            raise LegacyUnavailable(
                f"{legacy.imap_host}:{legacy.imap.port} refuses what it is asked: {printable(str(error))}",
                hint=f"See the log of {legacy.imap_host} at this time.",
            ) from error


def authenticate(legacy: LegacySettings, trust: Trust, address: Address, password: Password) -> None:
    """Ask the legacy server whether this is the user's password.

    A login is believed when it opens a mailbox: servers were seen that accept
    whatever is said, and then refuse everything.

    Raises:
        LegacyRefusedLogin, LegacyBusy, LegacyUnavailable: as :func:`session`; the
            last also when the login is taken and opens nothing.
    """
    with session(legacy, trust, UserLogin(address, password)) as connection:
        refused = _opens_nothing(connection)
        if refused is not None:
            raise LegacyUnavailable(
                f"{legacy.imap_host}:{legacy.imap.port} takes the login of {address} and opens no mailbox: {refused}",
                hint="Has the user a mailbox there, and may use IMAP? The password is not believed until it opens one.",
            )


def _opens_nothing(connection: Connection) -> str | None:
    """Why a session opens no mailbox, in the server's words; None if it does."""
    pipeline = connection.pipeline
    # Some want to know who asks before they open anything (RFC 2971).
    identity = [IDENTITY] if "ID" in connection.capabilities else []
    words = ""
    for commands in ([*identity, b'STATUS "INBOX" (UIDVALIDITY)'], [b'EXAMINE "INBOX"', b'LIST "" "INBOX"']):
        refused: dict[bytes, CommandRefused] = {}
        tags = pipeline.send(*commands)
        for _ in pipeline.tolerant(tags, refused):
            continue
        asked = tags[len(identity) :] if commands[: len(identity)] == identity else tags
        if any(tag not in refused for tag in asked):
            return None
        words = words or refused[asked[0]].message
    return words
