"""The process: the page on waitress, on a loopback port for the reverse proxy."""

from __future__ import annotations

from waitress.server import create_server

from bascule import program
from bascule.portal.page import create
from bascule.readiness import ready
from bascule.settings import Settings


def _run(configuration: Settings) -> None:
    application = create(configuration, program.read_secret(configuration.portal.session_key, "session key"))
    server = create_server(application, listen=configuration.portal.listen, threads=8, ident=None)
    ready()
    server.run()


main = program.command("portal", "Serve the users' page.", _run)
