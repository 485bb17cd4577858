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


class LegacyUnavailable(BasculeError):
    """The legacy server cannot be used now: unreachable, slow, bad TLS, or it says to come back later.

    Always temporary: it is never taken for a wrong password.
    """


class LegacyBusy(LegacyUnavailable):
    """The legacy server says itself that it cannot now: a quota, a limit, a mailbox in use, or BYE.

    ``code`` is its response code (RFC 5530), or empty.
    """

    def __init__(self, message: str, *, code: str = "", hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.code = code


class LegacyRefusedLogin(BasculeError):
    """The legacy server answered, and says that this name and password are wrong."""


class CannotUnseal(BasculeError):
    """A sealed credential does not belong to this worker's private key."""
