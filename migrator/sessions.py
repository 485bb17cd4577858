"""The IMAP sessions that one attempt may have at the legacy server: how many, as whom, how fast."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from imapclient import IMAPClient

from bascule.credential import Password, Unsealer
from bascule.errors import BasculeError, LegacyBusy, LegacyRefusedLogin, LegacyUnavailable
from bascule.imap.pipeline import Connection
from bascule.imap.reader import Reader
from bascule.imap.writer import Writer
from bascule.legacy import Login, MasterLogin, TokenLogin, Trust, UserLogin, imap_session, session
from bascule.migrator.account import Account
from bascule.migrator.acts import Acts

EARLY = 60  # seconds before its end that an access token is no longer used


class NoneFree(LegacyBusy):
    """Other mailboxes of the domain use all the sessions that the legacy server is to bear."""


class CopyLoginRefused(BasculeError):
    """The master user or the OAuth 2.0 client of a domain cannot be used."""


class Throttle:
    """Keeps one session below so many bytes a second."""

    def __init__(self, bytes_per_second: float) -> None:
        self._rate = bytes_per_second
        self._due = time.monotonic()

    def spent(self, size: int) -> None:
        """Wait until ``size`` more bytes are within the rate."""
        now = time.monotonic()
        self._due = max(self._due, now) + size / self._rate
        time.sleep(max(0.0, self._due - now))


@dataclass(slots=True)
class Token:
    access: Password
    ends: float


@dataclass(frozen=True, slots=True)
class OAuthClient:
    """A client that gets access tokens from a token endpoint (RFC 6749 sections 4.4 and 6).

    With a refresh token, by that; without, by client credentials.
    """

    token_url: str
    client_id: str
    client_secret: Password = field(repr=False)
    refresh_token: Password | None = field(default=None, repr=False)
    scope: str = ""

    def token(self, trust: Trust) -> Token:
        """
        Raises:
            CopyLoginRefused: the endpoint refuses the client or its refresh token.
            LegacyUnavailable: the endpoint cannot be used now.
        """
        form = {"client_id": self.client_id, "client_secret": self.client_secret.secret}
        if self.refresh_token is not None:
            form |= {"grant_type": "refresh_token", "refresh_token": self.refresh_token.secret}
        else:
            form["grant_type"] = "client_credentials"
        if self.scope:
            form["scope"] = self.scope
        request = urllib.request.Request(self.token_url, urllib.parse.urlencode(form).encode())  # noqa: S310 (https, as checked when it was told)
        try:
            with urllib.request.urlopen(request, timeout=trust.timeout, context=trust.context()) as answer:  # noqa: S310
                got: dict[str, Any] = json.loads(answer.read(1 << 20))
            access = Password(str(got["access_token"]))
            return Token(access, time.monotonic() + float(got.get("expires_in", 300)))
        except urllib.error.HTTPError as error:
            error.close()  # it is the answer, too, and holds a connection
            if 400 <= error.code < 500 and error.code != 429:
                raise CopyLoginRefused(
                    f"{self.token_url} refuses the client {self.client_id} (HTTP {error.code})",
                    hint="Tell it anew: bascule copy-login.",
                ) from None
            raise LegacyUnavailable(f"{self.token_url} gives no access token now (HTTP {error.code})") from None
        except (OSError, ValueError, KeyError) as error:
            raise LegacyUnavailable(f"{self.token_url} gives no access token now: {type(error).__name__}") from None


@contextmanager
def _own_errors(login: Login) -> Iterator[None]:
    try:
        yield
    except LegacyRefusedLogin as error:
        if isinstance(login, UserLogin):
            raise
        # It says nothing about the user's own password.
        raise CopyLoginRefused(
            error.message, hint="Has it such a mailbox? If so, tell the login of the workers anew: bascule copy-login."
        ) from error


class Sessions:
    """Opens sessions for one attempt. They are reserved until the attempt's database connection ends."""

    def __init__(self, acts: Acts, account: Account, trust: Trust, unsealer: Unsealer) -> None:
        self._acts = acts
        self._account = account
        self._trust = trust
        self._unsealer = unsealer
        self._token: Token | None = None

    def reserve(self, wanted: int) -> int:
        """How many sessions may be opened at the same time, at least one and at most ``wanted``.

        Raises:
            NoneFree
        """
        account = self._account
        free = self._acts.take_connections(account.domain_id, wanted)
        if not free:
            raise NoneFree(
                f"all {account.limits.connections} sessions that workers may have at {account.legacy.imap_host} "
                "are in use",
                code="LIMIT",
            )
        return free

    @contextmanager
    def open(self) -> Iterator[Reader]:
        """One session, for the ``with`` block.

        Raises:
            LegacyRefusedLogin, LegacyUnavailable, CopyLoginRefused: as :func:`bascule.legacy.imap_session`.
        """
        limits = self._account.limits
        with self._open() as connection:
            if limits.bytes_per_second is None:
                yield Reader.of(connection)
            else:
                yield Reader.of(connection, Throttle(limits.bytes_per_second / limits.connections).spent)

    @contextmanager
    def open_target(self) -> Iterator[Writer]:
        """One session that may write, for the ``with`` block.

        Raises:
            LegacyRefusedLogin, LegacyUnavailable, CopyLoginRefused: as :func:`bascule.legacy.imap_session`.
        """
        with self._open() as connection:
            yield Writer.of(connection)

    @contextmanager
    def open_client(self) -> Iterator[IMAPClient]:
        """One session in imapclient's hands, for what is written there."""
        login = self._login()
        with _own_errors(login), imap_session(self._account.legacy, self._trust, login) as client:
            yield client

    def master(self) -> MasterLogin | None:
        """The domain's master user as this mailbox's user; None: it has none."""
        account = self._account
        if account.copy_login != "master" or account.sealed_copy_login is None:
            return None
        told = json.loads(self._unsealer.unseal(account.sealed_copy_login).secret)
        return MasterLogin(account.address, told["name"], Password(told["password"]))

    @contextmanager
    def _open(self) -> Iterator[Connection]:
        login = self._login()
        with _own_errors(login), session(self._account.legacy, self._trust, login) as connection:
            yield connection

    def _login(self) -> Login:
        account = self._account
        if account.copy_login == "user" or account.sealed_copy_login is None:
            return UserLogin(account.address, account.password(self._unsealer))
        if (master := self.master()) is not None:
            return master
        told = json.loads(self._unsealer.unseal(account.sealed_copy_login).secret)
        if self._token is None or self._token.ends - EARLY < time.monotonic():
            refresh = told.get("refresh_token")
            client = OAuthClient(
                told["token_url"],
                told["client_id"],
                Password(told["client_secret"]),
                Password(refresh) if refresh else None,
                told.get("scope", ""),
            )
            self._token = client.token(self._trust)
        return TokenLogin(account.address, self._token.access)
