"""The web application (WSGI), behind the operator's reverse proxy.

It sees a domain only by its token, checks the password at the legacy server,
seals it at once, and reads nothing back but the progress of the mailbox that
this browser asked for. No page needs JavaScript; with it, progress is shown
without loading the page anew.
"""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path

from flask import Flask, Response, g, redirect, render_template, request, send_file, session, url_for
from flask.typing import ResponseReturnValue
from flask_wtf.csrf import CSRFError, CSRFProtect
from werkzeug.exceptions import HTTPException

from bascule import log
from bascule.errors import BasculeError, Refused
from bascule.letters import client_servers
from bascule.portal import languages, metrics
from bascule.portal.requests import SHOWN_FIELDS, BadForm, Progress, Requests
from bascule.settings import Settings

FOLDER = Path(__file__).resolve().parent
MAX_FORM = 16 * 1024  # bytes
REMEMBERED = timedelta(days=30)  # how long a browser knows whose progress it may show

#: Nothing from elsewhere, nothing inline, nobody's frame.
POLICY = (
    "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src 'self'; "
    "form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)


def create(configuration: Settings, session_key: bytes, requests: Requests | None = None) -> Flask:
    """The application; ``requests``: what it does, if not made here."""
    application = Flask("bascule.portal", root_path=str(FOLDER))
    secure = configuration.portal.public_url.startswith("https:")
    application.config.update(
        SECRET_KEY=session_key,
        MAX_CONTENT_LENGTH=MAX_FORM,
        PERMANENT_SESSION_LIFETIME=REMEMBERED,
        # With the prefix no other name of the domain can set it (RFC 6265bis, 4.1.3).
        SESSION_COOKIE_NAME="__Host-bascule" if secure else "bascule",
        SESSION_COOKIE_SAMESITE="Lax",
        SESSION_COOKIE_SECURE=secure,
        SESSION_COOKIE_HTTPONLY=True,
        # The page sends no Referer on purpose (the URL is a secret), so none can be asked for.
        WTF_CSRF_SSL_STRICT=False,
        # A form may lie open for as long as the session lasts.
        WTF_CSRF_TIME_LIMIT=None,
    )
    _add_measures(application)
    languages.install(application)
    CSRFProtect(application)
    _add_pages(application, requests or Requests(configuration))
    _add_errors(application)
    _add_logo(application, configuration.portal.logo)

    @application.context_processor
    def told() -> dict[str, object]:
        users = configuration.users
        return {
            "organisation": users.organisation,
            "contact": users.contact,
            "servers": client_servers(users),
            "logo": configuration.portal.logo is not None,
        }

    return application


def _add_pages(application: Flask, requests: Requests) -> None:
    def asked_before() -> Progress | None:
        """The progress of what this browser asked for."""
        mailbox = session.get("mailbox")
        return requests.progress(mailbox) if isinstance(mailbox, int) else None

    def show_form(domain: str, token: str, error: BadForm | None = None) -> str:
        filled = {name: request.form.get(name, "") for name in SHOWN_FIELDS}
        return render_template(
            "request.html", domain=domain, token=token, error=error, filled=filled, before=asked_before()
        )

    @application.get("/m/<token>")
    def form(token: str) -> ResponseReturnValue:
        return show_form(requests.domain_of(token).domain, token)

    @application.post("/m/<token>")
    def submit(token: str) -> ResponseReturnValue:
        domain = requests.domain_of(token)
        source, language = request.remote_addr or "", languages.current()
        try:
            session["mailbox"] = requests.make(token, domain, request.form, source, language)
        except BadForm as error:
            metrics.REQUESTS.labels(error.reason).inc()
            return show_form(domain.domain, token, error), error.status
        metrics.REQUESTS.labels("accepted").inc()
        session.permanent = True
        return redirect(url_for("progress", token=token), 303)

    @application.get("/m/<token>/progress")
    def progress(token: str) -> ResponseReturnValue:
        domain = requests.domain_of(token).domain
        shown = asked_before()
        if shown is None or not shown.address.endswith(f"@{domain}"):
            return redirect(url_for("form", token=token), 303)
        return render_template("progress.html", domain=domain, token=token, progress=shown)


def _add_logo(application: Flask, path: Path | None) -> None:
    @application.get("/logo")
    def logo() -> ResponseReturnValue:
        return send_file(path) if path is not None else ("", 404)


def _add_errors(application: Flask) -> None:
    def say(what: str, status: int) -> ResponseReturnValue:
        return render_template("error.html", what=what), status

    @application.get("/busy")
    def busy() -> ResponseReturnValue:
        """For the proxy, which limits how many forms come from one address."""
        return say("busy", 429)

    @application.errorhandler(Refused)
    def refused(error: Refused) -> ResponseReturnValue:
        return say("expired", 410) if error.hint == "expired" else say("unknown", 404)

    @application.errorhandler(CSRFError)
    def stale_form(_: CSRFError) -> ResponseReturnValue:
        return say("stale", 400)

    @application.errorhandler(HTTPException)
    def elsewhere(error: HTTPException) -> ResponseReturnValue:
        return say("unknown" if error.code == 404 else "impossible", error.code or 500)

    @application.errorhandler(BasculeError)
    def failed(error: BasculeError) -> ResponseReturnValue:
        log.get().error("page failed", reason=error.message)
        return say("unavailable", 503)


def _add_measures(application: Flask) -> None:
    @application.before_request
    def begin() -> None:
        g.began = time.monotonic()

    @application.after_request
    def end(response: Response) -> Response:
        page = request.endpoint or "none"
        metrics.ANSWERS.labels(page, response.status_code).inc()
        metrics.SECONDS.labels(page).observe(time.monotonic() - g.began)
        response.headers["Content-Security-Policy"] = POLICY
        response.headers["Referrer-Policy"] = "no-referrer"
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Cross-Origin-Opener-Policy"] = "same-origin"
        response.headers["X-Robots-Tag"] = "noindex"
        if page not in {"static", "logo"}:
            response.headers["Cache-Control"] = "no-store"
            response.headers["Content-Language"] = languages.current()
            response.vary.add("Accept-Language")
        return response
