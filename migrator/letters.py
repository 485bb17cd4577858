"""How messages reach users: appended to the legacy mailbox, put into the mailbox here, sent."""

from __future__ import annotations

import smtplib
import time
from hashlib import sha256

from bascule.endpoint import host_and_port
from bascule.errors import BasculeError, LegacyUnavailable, LocalUnavailable
from bascule.letters import Kind, compose
from bascule.migrator.account import Account
from bascule.migrator.local import Local
from bascule.settings import Settings

TIMEOUT = 60.0  # seconds; the MX may ask the legacy server about the recipient


class NotSent(BasculeError):
    """The MX does not take a message to a user. Temporary."""


def message_id(kind: Kind, account: Account) -> str:
    """The Message-ID of a message: the same in every attempt, so that it is written once."""
    moved = account.migrated_at.isoformat() if account.migrated_at else ""
    digest = sha256(f"{account.address} {moved}".encode()).hexdigest()[:24]
    return f"<bascule-{kind}-{digest}@{account.address.domain}>"


class Letters:
    """The messages of one worker's users."""

    def __init__(self, configuration: Settings, local: Local) -> None:
        self._users = configuration.users
        self._portal = configuration.portal
        self._smtp = host_and_port(configuration.postfix.smtp)
        self._local = local

    def last(self, account: Account) -> bytes:
        """The last message in the legacy mailbox."""
        return self._compose("last", account, message_id("last", account))

    def welcome(self, account: Account) -> None:
        """Put the welcome into INBOX here, unless it is there.

        Raises:
            BasculeError: it is not there.
        """
        identity = message_id("welcome", account)
        with self._local.open(account.address) as mailbox:
            mailbox.select("INBOX")
            if not mailbox.with_message_id(identity, 1):
                text = self._compose("welcome", account, identity)
                try:
                    mailbox.append("INBOX", frozenset(), int(time.time()), len(text), iter([text]))
                except LegacyUnavailable as error:  # so does a session call every server
                    raise LocalUnavailable(
                        f"Dovecot here does not take the welcome for {account.address}", hint="Is the mailbox full?"
                    ) from error

    def trouble(self, account: Account) -> None:
        """Send word that the move waits for the password, by the ordinary way of mail: wherever the user reads it now.

        Raises:
            NotSent
        """
        self._send("trouble", account, f"<bascule-{time.time_ns()}@{account.address.domain}>")  # a later one is another

    def first_login(self, account: Account) -> None:
        """Send word that a login set the move off, and how to object: to the legacy INBOX, for nothing has moved yet.

        Raises:
            NotSent
        """
        self._send("first-login", account, message_id("first-login", account))

    def _send(self, kind: Kind, account: Account, identity: str) -> None:
        host, port = self._smtp
        try:
            with smtplib.SMTP(host, port, timeout=TIMEOUT) as smtp:
                # Nobody is to be told if it cannot be delivered (RFC 3834 section 3.3).
                smtp.sendmail("", [str(account.address)], self._compose(kind, account, identity))
        except (OSError, smtplib.SMTPException, ValueError) as error:  # ValueError: an address that is not ASCII
            raise NotSent(
                f"{host}:{port} does not take the message to {account.address}: {type(error).__name__}",
                hint="See Postfix's log there, and [postfix] smtp.",
            ) from error

    def _compose(self, kind: Kind, account: Account, identity: str) -> bytes:
        url = None if account.url_token is None else self._portal.url(account.url_token)
        return compose(kind, account.language, self._users, address=account.address, message_id=identity, url=url)
