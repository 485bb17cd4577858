"""The process: the page on waitress, on a loopback port for the reverse proxy."""

from __future__ import annotations

import signal
import sys
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException

from waitress.server import create_server

from bascule import program
from bascule.activation import listening
from bascule.endpoint import host_and_port
from bascule.metrics import serve
from bascule.portal.logins import IN_ALL
from bascule.portal.page import create
from bascule.portal.requests import Requests
from bascule.readiness import attend
from bascule.settings import Settings

PATIENCE = 60.0  # seconds for one page, on a busy machine
CONNECTIONS = 1000  # that the proxy may have open; each is a file


def _run(configuration: Settings) -> None:
    requests = Requests(configuration)
    requests.sharing.once()
    requests.sharing.start()
    session_key = program.read_secret(configuration.portal.session_key, "session key")
    application = create(configuration, session_key, requests)
    # The reverse proxy is on this host, and says whom it speaks for.
    server = create_server(
        application,
        sockets=[listening(f"inet:{configuration.portal.listen}")],
        # Forms that wait for a legacy server leave the others to show pages.
        threads=configuration.portal.threads + IN_ALL,
        connection_limit=CONNECTIONS,
        ident=None,
        trusted_proxy="127.0.0.1",
        trusted_proxy_count=1,
        trusted_proxy_headers={"x-forwarded-for"},
        clear_untrusted_proxy_headers=True,
    )
    serve(configuration.portal.metrics)
    # Ends like an interruption: pages that are being made are finished first.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    attend(lambda: _answers(configuration.portal.listen))
    server.run()
    requests.sharing.once()


def _answers(listen: str) -> bool:
    """Whether a page is made, not only a connection taken."""
    connection = HTTPConnection(*host_and_port(listen), timeout=PATIENCE)
    try:
        connection.request("GET", "/static/icon.svg")
        return connection.getresponse().status == HTTPStatus.OK
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()


main = program.command("portal", "Serve the users' page.", _run)
