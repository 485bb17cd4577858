"""The web application (WSGI), behind the operator's reverse proxy.

It sees a domain only by its token, checks the password at the legacy server,
seals it at once, and reads nothing back but the progress of the mailbox that
this browser asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from flask import Flask, Response, redirect, render_template, request, session, url_for
from flask.typing import ResponseReturnValue
from flask_wtf.csrf import CSRFError, CSRFProtect

from bascule import legacy, log
from bascule.address import Address
from bascule.attempts import Attempts
from bascule.credential import Password, Sealer
from bascule.database import connect, value
from bascule.errors import BadAddress, BasculeError, LegacyRefusedLogin, LegacyUnavailable, Refused
from bascule.legacy import LegacySettings, Trust, authenticate
from bascule.settings import Settings

FOLDER = Path(__file__).resolve().parent
ROLE = "portal"
MAX_FORM = 16 * 1024  # bytes
MAX_FIELD = 320  # characters
SHOWN_FIELDS = ("email", "first_name", "last_name")

TOO_MANY = "There were too many wrong passwords. Nothing was changed; please try again in ten minutes."

#: One answer for an address that does not exist and for a wrong password.
WRONG = "The old mail server does not know this e-mail address with this password. Nothing was changed."


class BadForm(BasculeError):
    """What the user filled in cannot be used; nothing was changed. ``status`` is HTTP's."""

    def __init__(self, message: str, *, status: int = 422) -> None:
        super().__init__(message)
        self.status = status


class Requests:
    """What the page does; everything it knows of domains and mailboxes comes through here."""

    def __init__(self, configuration: Settings) -> None:
        self._dsn = configuration.dsn(ROLE)
        self._trust = Trust(configuration.legacy.ca_file, configuration.legacy.timeout)
        self._sealer = Sealer(configuration.keys.public)
        self._attempts = Attempts(configuration.trusted_sources)

    def domain_of(self, token: str) -> LegacySettings:
        """The domain of a URL.

        Raises:
            Refused: the link is not known, or has expired; its hint says which.
        """
        with connect(self._dsn) as connection:
            row = connection.execute(
                f"SELECT {legacy.COLUMNS} FROM bascule.portal_domain(%s)".encode(), (token,)
            ).fetchone()
        if row is None:
            raise Refused("this link is not known", code="BA003", hint="unknown")
        return legacy.from_row(*row)

    def make(self, domain: LegacySettings, form: Mapping[str, str], source: str) -> int:
        """Check what the user at the IP address ``source`` filled in and make the request; the mailbox's id.

        Raises:
            BadForm: with what to tell the user.
        """
        fields = {name: form.get(name, "").strip()[:MAX_FIELD] for name in SHOWN_FIELDS}
        password = Password(form.get("password", "")[:MAX_FIELD])
        if not all(fields.values()) or not password.secret:
            raise BadForm("Please fill in all four fields.")
        try:
            address = Address.parse(fields["email"])
        except BadAddress as error:
            raise BadForm(f"Please write your whole e-mail address, like name@{domain.domain}.") from error
        if address.domain != domain.domain:
            raise BadForm(f"This page is for addresses that end in @{domain.domain}.")
        self._check(domain, address, password, source)
        try:
            with connect(self._dsn) as connection:
                return int(
                    value(
                        connection,
                        "SELECT bascule.request_migration(%s, 'portal', %s, %s, %s)",
                        str(address),
                        self._sealer.seal(password),
                        fields["first_name"],
                        fields["last_name"],
                    )
                )
        except Refused as error:
            raise BadForm(f"Nothing was changed: {error.message}.") from error

    def _check(self, domain: LegacySettings, address: Address, password: Password, source: str) -> None:
        """Whether the legacy server takes the password; who guesses does not reach it for ever."""
        if self._attempts.answer(address, password) is False:
            raise BadForm(WRONG)
        if reason := self._attempts.barred(address, source):
            log.get().warning("request not checked", address=str(address), source=source, reason=reason)
            raise BadForm(TOO_MANY, status=429)
        try:
            authenticate(domain, self._trust, address, password)
        except LegacyRefusedLogin as error:
            self._attempts.failed(address, password, source)
            raise BadForm(WRONG) from error
        except LegacyUnavailable as error:
            log.get().warning("request cannot be checked now", domain=domain.domain, reason=error.message)
            raise BadForm(
                "The old mail server does not answer now. Nothing was changed; please try again later."
            ) from error
        self._attempts.succeeded(address, password, source)

    def progress(self, mailbox_id: int) -> Mapping[str, object] | None:
        """What the progress page shows, or None if the mailbox is gone."""
        with connect(self._dsn) as connection:
            row = connection.execute(
                "SELECT address, state, messages_copied, messages_total, needs_credential "
                "FROM bascule.portal_progress(%s)",
                (mailbox_id,),
            ).fetchone()
        names = ("address", "state", "copied", "total", "needs_password")
        return None if row is None else dict(zip(names, row, strict=True))


def create(configuration: Settings, session_key: bytes) -> Flask:
    """The application."""
    application = Flask("bascule.portal", root_path=str(FOLDER))
    application.config.update(
        SECRET_KEY=session_key,
        MAX_CONTENT_LENGTH=MAX_FORM,
        SESSION_COOKIE_SAMESITE="Lax",
        SESSION_COOKIE_SECURE=configuration.portal.public_url.startswith("https:"),
        SESSION_COOKIE_HTTPONLY=True,
        # The page sends no Referer on purpose (the URL is a secret), so none can be asked for.
        WTF_CSRF_SSL_STRICT=False,
    )
    CSRFProtect(application)
    _add_pages(application, Requests(configuration))
    _add_errors(application)
    application.after_request(_guard)
    return application


def _add_pages(application: Flask, requests: Requests) -> None:
    @application.get("/m/<token>")
    def form(token: str) -> ResponseReturnValue:
        return render_template("request.html", domain=requests.domain_of(token).domain, message="", filled={})

    @application.post("/m/<token>")
    def submit(token: str) -> ResponseReturnValue:
        domain = requests.domain_of(token)
        try:
            session["mailbox"] = requests.make(domain, request.form, request.remote_addr or "")
        except BadForm as error:
            filled = {name: request.form.get(name, "") for name in SHOWN_FIELDS}
            page = render_template("request.html", domain=domain.domain, message=error.message, filled=filled)
            return page, error.status
        return redirect(url_for("progress", token=token), 303)

    @application.get("/m/<token>/progress")
    def progress(token: str) -> ResponseReturnValue:
        domain = requests.domain_of(token)
        mailbox = session.get("mailbox")
        shown = requests.progress(mailbox) if isinstance(mailbox, int) else None
        if shown is None:
            return redirect(url_for("form", token=token), 303)
        return render_template("progress.html", domain=domain.domain, token=token, **shown)


def _add_errors(application: Flask) -> None:
    @application.errorhandler(Refused)
    def refused(error: Refused) -> ResponseReturnValue:
        expired = error.hint == "expired"
        return render_template("unknown_link.html", expired=expired), 410 if expired else 404

    @application.errorhandler(CSRFError)
    def stale_form(_: CSRFError) -> ResponseReturnValue:
        return render_template("error.html", message="This form is too old. Please open your link again."), 400

    @application.errorhandler(BasculeError)
    def failed(error: BasculeError) -> ResponseReturnValue:
        log.get().error("page failed", reason=error.message)
        message = "This does not work now. Nothing was changed; please try again later."
        return render_template("error.html", message=message), 503


def _guard(response: Response) -> Response:
    response.headers["Content-Security-Policy"] = (
        "default-src 'none'; style-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
    )
    response.headers["Referrer-Policy"] = "no-referrer"
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers["Cache-Control"] = "no-store"
    return response
