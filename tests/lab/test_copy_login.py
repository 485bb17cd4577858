"""As whom the workers log in to copy, and what they may ask of the legacy server."""

from __future__ import annotations

import json
import ssl
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from random import Random

import psycopg
import pytest

from bascule.lab.mail import Ledger, fill_mailbox, identities, read_mailbox
from bascule.lab.sites import DOMAIN, MASTER, Lab, eventually

pytestmark = pytest.mark.lab

Request = Callable[[str], None]
Await = Callable[..., None]


@contextmanager
def copied_as(lab: Lab, *arguments: str, secret: str) -> Iterator[None]:
    done = lab.new.cli("copy-login", *arguments, "--password-file", "-", stdin=secret + "\n")
    assert done.returncode == 0, done.stdout
    try:
        yield
    finally:
        assert lab.new.cli("copy-login", "user", DOMAIN).returncode == 0


def logins(lab: Lab, name: str) -> list[str]:
    """What the legacy server's log says of sessions of a user."""
    return [line for line in lab.legacy.dovecot.log().splitlines() if f"Login: user=<{name}@{DOMAIN}>" in line]


def insist_on_all(lab: Lab, name: str, ledger: Ledger) -> None:
    with lab.new.client(name, lab.legacy.users[name]) as client:
        ledger.compare({name: identities(read_mailbox(client))}).insist()


def test_a_mailbox_is_copied_by_a_master_user(
    lab: Lab, ledger: Ledger, random: Random, request_move: Request, await_state: Await
) -> None:
    fill_mailbox(lab.legacy, "mastered", ledger, random, messages=20)
    with copied_as(lab, "master", DOMAIN, MASTER, secret="not the master's"):
        request_move("mastered")
        query = "SELECT problem FROM bascule.mailboxes WHERE address = %s AND problem LIKE '%%refuses the login%%'"
        eventually("the refusal is told", lambda: lab.new.sql(query, f"mastered@{DOMAIN}"))
    with copied_as(lab, "master", DOMAIN, MASTER, secret=lab.legacy.master_password):
        assert lab.new.cli("retry", f"mastered@{DOMAIN}").returncode == 0
        await_state("mastered")
        insist_on_all(lab, "mastered", ledger)
        eventually("by the master user", lambda: any("master" in line for line in logins(lab, "mastered")) or None)
    sealed = lab.new.sql("SELECT sealed_copy_login FROM bascule.domain WHERE name = %s", DOMAIN, role="postgres")
    assert sealed == [(None,)]


class TokenEndpoint:
    """What no real server in the lab is: a provider that gives access tokens (RFC 6749 section 6), by HTTPS."""

    def __init__(self, lab: Lab, name: str) -> None:
        self.forms: list[dict[str, str]] = []
        self.refuse = False
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"])).decode()
                endpoint.forms.append(dict(urllib.parse.parse_qsl(body)))
                answer = {"access_token": lab.legacy.access_token(name), "expires_in": 3600}
                self.send_response(400 if endpoint.refuse else 200)
                self.end_headers()
                self.wfile.write(json.dumps(answer).encode())

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(lab.folder / "chain.pem", lab.folder / "key.pem")
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.url = f"https://localhost:{self._server.server_port}/token"

    def __enter__(self) -> TokenEndpoint:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def test_a_mailbox_is_copied_with_access_tokens(
    lab: Lab, tmp_path: Path, ledger: Ledger, random: Random, request_move: Request, await_state: Await
) -> None:
    fill_mailbox(lab.legacy, "tokened", ledger, random, messages=20)
    refresh = tmp_path / "refresh"
    refresh.write_text("the refresh token\n")
    refused = lab.new.cli("copy-login", "xoauth2", DOMAIN, "--token-url", "http://x.test", "--client-id", "c")
    assert refused.returncode == 1
    assert "must be https" in refused.stdout
    with TokenEndpoint(lab, "tokened") as endpoint:
        options = ["--token-url", endpoint.url, "--client-id", "bascule", "--refresh-token-file", str(refresh)]
        with copied_as(lab, "xoauth2", DOMAIN, *options, secret="the client secret"):
            endpoint.refuse = True
            request_move("tokened")
            query = "SELECT problem FROM bascule.mailboxes WHERE address = %s AND problem LIKE '%%refuses the client%%'"
            eventually("the refusal is told", lambda: lab.new.sql(query, f"tokened@{DOMAIN}"))
            endpoint.refuse = False
            lab.new.cli("retry", f"tokened@{DOMAIN}")
            await_state("tokened")
        assert endpoint.forms[-1] == {
            "grant_type": "refresh_token",
            "refresh_token": "the refresh token",
            "client_id": "bascule",
            "client_secret": "the client secret",
        }
    insist_on_all(lab, "tokened", ledger)
    assert any("method=XOAUTH2" in line for line in logins(lab, "tokened"))
    said = lab.new.worker.log.read_text() + json.dumps(lab.new.sql("SELECT reason FROM bascule.events"))
    assert "the client secret" not in said
    assert "the refresh token" not in said


def test_workers_keep_below_the_sessions_that_they_may_have(
    lab: Lab, ledger: Ledger, random: Random, request_move: Request, await_state: Await
) -> None:
    fill_mailbox(lab.legacy, "limited", ledger, random, messages=10)
    domain = lab.new.sql("SELECT id FROM bascule.domain WHERE name = %s", DOMAIN, role="postgres")[0][0]
    with psycopg.connect(lab.new.postgres.dsn("bascule_worker"), autocommit=True) as other:
        # Another worker has them all; the limit is 20.
        assert other.execute("SELECT bascule.take_connections(%s, 99)", (domain,)).fetchone() == (20,)
        request_move("limited")
        query = "SELECT problem FROM bascule.mailboxes WHERE address = %s AND problem LIKE '%%are in use%%'"
        ((problem,),) = eventually("it waits", lambda: lab.new.sql(query, f"limited@{DOMAIN}"))
        assert "next try in" in problem
        assert lab.new.state("limited") == "copying"
    lab.new.cli("retry", f"limited@{DOMAIN}")
    await_state("limited")
    insist_on_all(lab, "limited", ledger)
