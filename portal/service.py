"""The process: the page on waitress, on a loopback port for the reverse proxy."""

from __future__ import annotations

from waitress.server import create_server

from bascule import program
from bascule.metrics import serve
from bascule.portal.page import create
from bascule.readiness import ready
from bascule.settings import Settings


def _run(configuration: Settings) -> None:
    application = create(configuration, program.read_secret(configuration.portal.session_key, "session key"))
    # The reverse proxy is on this host, and says whom it speaks for.
    server = create_server(
        application,
        listen=configuration.portal.listen,
        threads=configuration.portal.threads,
        ident=None,
        trusted_proxy="127.0.0.1",
        trusted_proxy_count=1,
        trusted_proxy_headers={"x-forwarded-for"},
        clear_untrusted_proxy_headers=True,
    )
    serve(configuration.portal.metrics)
    ready()
    server.run()


main = program.command("portal", "Serve the users' page.", _run)
