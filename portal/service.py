"""The process: the page on waitress, on a loopback port for the reverse proxy."""

from __future__ import annotations

from pathlib import Path

import click
from waitress.server import create_server

from bascule import log, settings
from bascule.errors import BadSettings, BasculeError
from bascule.portal.page import create
from bascule.readiness import ready


def _session_key(path: Path) -> bytes:
    try:
        key = path.read_bytes().strip()
    except OSError as error:
        raise BadSettings(f"the session key {path} cannot be read: {error.strerror}") from error
    if len(key) < 32:
        raise BadSettings(f"the session key {path} is too short: 32 random characters at least")
    return key


@click.command()
@click.option("--settings", "path", type=click.Path(path_type=Path), default=settings.DEFAULT_PATH, show_default=True)
def main(path: Path) -> None:
    """Serve the users' page."""
    log.configure("portal")
    try:
        configuration = settings.load(path)
        application = create(configuration, _session_key(configuration.portal.session_key))
    except BasculeError as error:
        raise click.ClickException(f"{error.message}\n{error.hint}") from error
    server = create_server(application, listen=configuration.portal.listen, threads=8, ident=None)
    ready()
    server.run()
