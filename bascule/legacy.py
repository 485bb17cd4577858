"""The legacy server of a domain: its settings, and a session on its IMAP side.

What it answers is sorted into two: it refuses the login (:class:`LegacyRefusedLogin`),
or anything else went wrong, which is always temporary (:class:`LegacyUnavailable`).
"""

from __future__ import annotations

import functools
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from imapclient import IMAPClient, SocketTimeout
from imapclient.exceptions import IMAPClientAbortError, IMAPClientError, LoginError

from bascule.address import Address
from bascule.credential import Password
from bascule.errors import LegacyBusy, LegacyRefusedLogin, LegacyUnavailable

TlsMode = Literal["implicit", "starttls", "none"]
LoginForm = Literal["address", "local_part"]
#: TLS of mail to the legacy server, as Postfix's smtp_tls_security_level.
SmtpTls = Literal["may", "encrypt", "verify"]
CopyLogin = Literal["user", "master", "xoauth2"]

#: Response codes with which a server says "not now, or not so much" (RFC 5530 section 3, RFC 9051 section 7.1).
BUSY_CODES = ("OVERQUOTA", "LIMIT", "INUSE", "UNAVAILABLE", "THROTTLED")
#: Those that it gives with NO to LOGIN or AUTHENTICATE though the password may be right.
_TEMPORARY_CODES = (*BUSY_CODES, "SERVERBUG", "CONTACTADMIN", "PRIVACYREQUIRED", "ALERT")


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

    def login_name(self, address: Address) -> str:
        """The name under which the legacy server knows a user."""
        return str(address) if self.login_form == "address" else address.local_part


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
    "name, imap_host, imap_port, imap_tls, smtp_host, smtp_port, "
    "pop3_port, pop3_tls, submission_port, submission_tls, sieve_port, sieve_tls, login_form"
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
    if isinstance(error, OSError) and error.strerror:
        return f"{host}:{port} cannot be reached: {error.strerror}"
    return f"{host}:{port} ended the conversation: {error}"


def connect_imap(legacy: LegacySettings, trust: Trust) -> IMAPClient:
    """A connection to the legacy IMAP server, secured, not logged in.

    Raises:
        LegacyUnavailable: with the reason in plain words.
    """
    timeout = SocketTimeout(connect=min(trust.timeout, 10), read=trust.timeout)
    host, port = legacy.imap_host, legacy.imap.port
    try:
        client = IMAPClient(host, port, ssl=legacy.imap.tls == "implicit", ssl_context=trust.context(), timeout=timeout)
        if legacy.imap.tls == "starttls":
            try:
                client.starttls(trust.context())
            except BaseException:
                client.shutdown()
                raise
    except (OSError, IMAPClientError) as error:
        raise LegacyUnavailable(plainly(error, host, port)) from error
    client.normalise_times = False
    client.folder_encode = False
    return client


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


@dataclass(frozen=True, slots=True)
class TokenLogin:
    """With an OAuth 2.0 access token: XOAUTH2, or OAUTHBEARER (RFC 7628) where only that is offered."""

    address: Address
    token: Password


Login = UserLogin | MasterLogin | TokenLogin


def _log_in(client: IMAPClient, legacy: LegacySettings, login: Login) -> None:
    user = legacy.login_name(login.address)
    if isinstance(login, TokenLogin):
        if client.has_capability("AUTH=XOAUTH2") or not client.has_capability("AUTH=OAUTHBEARER"):
            client.oauth2_login(user, login.token.secret)
        else:
            client.oauthbearer_login(user, login.token.secret)
    elif isinstance(login, MasterLogin):
        client.plain_login(login.name, login.password.secret, user)
    elif client.has_capability("AUTH=PLAIN"):
        client.plain_login(user, login.password.secret)
    elif client.has_capability("LOGINDISABLED"):
        raise LegacyUnavailable(
            "the legacy server offers neither SASL PLAIN nor LOGIN on this connection",
            hint="It may want TLS: see imap_tls.",
        )
    # SASL PLAIN is UTF-8 by definition; LOGIN leaves other than ASCII open.
    elif not (user + login.password.secret).isascii():
        raise LegacyUnavailable(f"the legacy server offers LOGIN only, which cannot carry the password of {user}")
    else:
        client.login(user, login.password.secret)


@contextmanager
def imap_session(legacy: LegacySettings, trust: Trust, login: Login) -> Iterator[IMAPClient]:
    """A session on the legacy IMAP server, for the ``with`` block.

    Raises:
        LegacyRefusedLogin: the server says that name and password are wrong.
        LegacyBusy: it says with a response code that it cannot now.
        LegacyUnavailable: anything else; also when the connection fails later
            in the block.
    """
    host, port = legacy.imap_host, legacy.imap.port
    client = connect_imap(legacy, trust)
    try:
        try:
            _log_in(client, legacy, login)
        except LoginError as error:
            reason = str(error)
            codes = [code for code in _TEMPORARY_CODES if f"[{code}" in reason.upper()]
            if codes or isinstance(error.__context__, IMAPClientAbortError):
                text = f"{host}:{port} cannot check the login of {login.address} now: {reason}"
                raise LegacyBusy(text, code=codes[0] if codes else "") from None
            raise LegacyRefusedLogin(f"{host}:{port} refuses the login of {login.address}: {reason}") from None
        yield client
    except (OSError, IMAPClientError) as error:
        client.shutdown()  # no farewell after a failure: answers may be under way
        raise LegacyUnavailable(plainly(error, host, port)) from error
    except BaseException:
        client.shutdown()
        raise
    with suppress(OSError, IMAPClientError):  # all that mattered is done
        client.logout()


def authenticate(legacy: LegacySettings, trust: Trust, address: Address, password: Password) -> None:
    """Ask the legacy server whether this is the user's password.

    Raises:
        LegacyRefusedLogin, LegacyUnavailable: as :func:`imap_session`.
    """
    with imap_session(legacy, trust, UserLogin(address, password)):
        pass
