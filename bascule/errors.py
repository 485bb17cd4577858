"""Errors that speak to an operator.

Every error of ours is a :class:`BasculeError` with a message for a person: what
happened, to whom, what was kept. ``hint`` says what to do next. The cause is
always chained, never quoted into the message, for it may quote its input.
"""

from __future__ import annotations


class BasculeError(Exception):
    """Something that bascule could not do."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class BadSettings(BasculeError):
    """The settings file cannot be used."""


class BadAddress(BasculeError):
    """Text that is not an e-mail address."""


class Refused(BasculeError):
    """The database refuses an act in the present state (SQLSTATE class BA). Nothing was changed.

    ``code`` is the SQLSTATE: see the head of ``schema/functions/addresses.sql``.
    """

    def __init__(self, message: str, *, code: str, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.code = code


class DatabaseUnavailable(BasculeError):
    """PostgreSQL does not answer. Temporary."""


#: Response codes with which a server says "not now, or not so much" (RFC 5530 section 3, RFC 9051 section 7.1).
BUSY_CODES = ("OVERQUOTA", "LIMIT", "INUSE", "UNAVAILABLE", "THROTTLED")


class ServerUnavailable(BasculeError):
    """An IMAP server cannot be used now, whoever's it is. Always temporary.

    What ended the connection, if that was the network, is its ``__cause__``, an
    OSError. No other error of the network leaves what reads and writes there.
    """


class LocalUnavailable(ServerUnavailable):
    """This host's Dovecot does not open a mailbox, or does not answer."""


class LegacyUnavailable(ServerUnavailable):
    """The legacy server cannot be used now: unreachable, slow, bad TLS, or it says to come back later.

    It is never taken for a wrong password.
    """


class LegacyBusy(LegacyUnavailable):
    """The legacy server says itself that it cannot now: a quota, a limit, a mailbox in use, or BYE.

    ``code`` is its response code (RFC 5530), THROTTLED where it says so in words
    only, or empty. ``wait``: for how many seconds it wants to be left alone, or
    0 where it does not say.
    """

    def __init__(self, message: str, *, code: str = "", wait: float = 0, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.code = code
        self.wait = wait


class LegacyRefusedLogin(BasculeError):
    """The legacy server answered, and says that this name and password are wrong."""


class CannotUnseal(BasculeError):
    """A sealed credential does not belong to this worker's private key."""
