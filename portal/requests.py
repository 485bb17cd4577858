"""What the page does; everything it knows of domains and mailboxes comes through here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

from bascule import legacy, log
from bascule.address import Address
from bascule.attempts import Attempts
from bascule.credential import Password, PasswordNotUsable, Sealer
from bascule.database import Pool, value
from bascule.directory import State
from bascule.errors import BadAddress, BasculeError, LegacyRefusedLogin, LegacyUnavailable, Refused
from bascule.language import Language
from bascule.legacy import LegacySettings, Trust
from bascule.portal.logins import LegacyLogins
from bascule.portal.sharing import Sharing
from bascule.settings import Settings

ROLE = "portal"
MAX_FIELD = 320  # characters
#: The fields of the form that are shown again; never the password.
SHOWN_FIELDS = ("email", "last_name", "first_name")
_ALIAS = "BA005"  # see schema/functions/addresses.sql

#: Why a form cannot be used; the words are in templates/reasons.html.
Reason = Literal["empty", "address", "domain", "wrong", "too_many", "unavailable", "alias", "cannot"]

Stage = Literal["waiting", "paused", "copying", "finishing", "done", "password", "leaving", "stopped"]


class BadForm(BasculeError):
    """What the user filled in cannot be used; nothing was changed. ``field``: what to correct; ``status``: HTTP's."""

    def __init__(self, reason: Reason, field: str = "", *, status: int = 422) -> None:
        super().__init__(reason)
        self.reason = reason
        self.field = field
        self.status = status


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a mailbox is. ``ahead``: mailboxes that are served before it; ``remaining`` is None if nobody knows."""

    address: str
    stage: Stage
    copied: int
    total: int
    ahead: int
    remaining: timedelta | None


def stage(state: State, *, needs_password: bool, paused: bool) -> Stage:
    """What a state means to its user."""
    if state == "legacy":
        return "stopped"
    if state == "local":
        return "done"
    if state == "returning":
        return "leaving"
    if needs_password:
        return "password"
    if state == "cutover":
        return "finishing"
    if paused:
        return "paused"
    return "copying" if state == "copying" else "waiting"


class Requests:
    """Requests at the URLs of all domains."""

    def __init__(self, configuration: Settings) -> None:
        self._database = Pool(configuration.dsn(ROLE), configuration.portal.threads)
        self._logins = LegacyLogins(Trust(configuration.legacy.ca_file, configuration.legacy.timeout))
        self._sealer = Sealer(configuration.keys.public)
        self._attempts = Attempts(configuration.trusted_sources)
        self.sharing = Sharing(self._attempts, self._database, node=configuration.node)

    def domain_of(self, token: str) -> LegacySettings:
        """The domain of a URL.

        Raises:
            Refused: the link is not known, or has expired; its hint says which.
        """
        with self._database.connection() as connection:
            row = connection.execute(
                f"SELECT {legacy.COLUMNS} FROM bascule.portal_domain(%s)".encode(), (token,)
            ).fetchone()
        if row is None:
            raise Refused("this link is not known", code="BA003", hint="unknown")
        return legacy.from_row(*row)

    def make(self, token: str, domain: LegacySettings, form: Mapping[str, str], source: str, language: Language) -> int:
        """Check what the user at the IP address ``source`` filled in and make the request; the mailbox's id.

        ``domain`` is the token's. Who has asked before is let through to the progress.

        Raises:
            BadForm: with what to tell the user.
        """
        fields = {name: form.get(name, "").strip()[:MAX_FIELD] for name in SHOWN_FIELDS}
        password = Password(form.get("password", "")[:MAX_FIELD])
        for name, text in {**fields, "password": password.secret}.items():
            if not text:
                raise BadForm("empty", name)
        try:
            address = Address.parse(fields["email"])
        except BadAddress as error:
            raise BadForm("address", "email") from error
        if address.domain != domain.domain:
            raise BadForm("domain", "email")
        with self._database.connection() as connection:
            user_name = value(connection, "SELECT bascule.portal_login_name(%s, %s)", token, str(address))
        self._check(domain.known_as(user_name), address, password, source)
        try:
            with self._database.connection() as connection:
                return int(
                    value(
                        connection,
                        "SELECT bascule.portal_request(%s, %s, %s, %s, %s, %s)",
                        token,
                        str(address),
                        self._sealer.seal(password),
                        fields["first_name"],
                        fields["last_name"],
                        language,
                    )
                )
        except Refused as error:
            log.get().warning("request refused", address=str(address), reason=error.message)
            raise BadForm("alias" if error.code == _ALIAS else "cannot", "email") from error

    def _check(self, domain: LegacySettings, address: Address, password: Password, source: str) -> None:
        """Whether the legacy server takes the password; who guesses does not reach it for ever."""
        if self._attempts.answer(address, password) is False:
            raise BadForm("wrong", "password")
        try:
            password.insist_on_usable()
        except PasswordNotUsable as error:
            raise BadForm("cannot", "password") from error
        if reason := self._barred(address, source):
            log.get().warning("request not checked", address=str(address), source=source, reason=reason)
            raise BadForm("too_many", status=429)
        try:
            self._logins.check(domain, address, password)
        except LegacyRefusedLogin as error:
            self._attempts.failed(address, password, source)
            # One answer for an address that does not exist and for a wrong password.
            raise BadForm("wrong", "password") from error
        except LegacyUnavailable as error:
            log.get().warning("request cannot be checked now", domain=domain.domain, reason=error.message)
            raise BadForm("unavailable", status=503) from error
        self._attempts.succeeded(address, password, source)

    def _barred(self, address: Address, source: str) -> str | None:
        """Why a password is not to be looked at now; who guesses elsewhere does not keep an owner out of here."""
        site = self._attempts.site(source)
        reason = self._attempts.barred(address, source)
        if reason and site and self.sharing.comes_from_home(str(address), site):
            self._attempts.hear((), [(str(address), site)])
            reason = self._attempts.barred(address, source)
        return reason

    def progress(self, mailbox_id: int) -> Progress | None:
        """How far a mailbox is, or None if it is gone."""
        with self._database.connection() as connection:
            row = connection.execute(
                "SELECT address, state, needs_credential, paused, messages_copied, messages_total, ahead, remaining "
                "FROM bascule.portal_progress(%s)",
                (mailbox_id,),
            ).fetchone()
        if row is None:
            return None
        address, state, needs_password, paused, *numbers = row
        return Progress(address, stage(state, needs_password=needs_password, paused=paused), *numbers)
