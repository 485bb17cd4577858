"""Metrics for Prometheus, in its text format over HTTP, where the settings say so."""

from __future__ import annotations

from prometheus_client import Gauge, start_http_server

from bascule.directory import Directory
from bascule.endpoint import host_and_port
from bascule.errors import BadSettings
from bascule.follower import Follower

_CONNECTED = Gauge("bascule_database_connected", "Whether the directory is known to be what the database says")
_MAILBOXES = Gauge("bascule_directory_mailboxes", "Mailboxes that are not at the legacy server, in memory here")


def serve(listen: str | None) -> None:
    """Answer at ``host:port``; None: nobody asks.

    Raises:
        BadSettings: nobody can listen there.
    """
    if listen is not None:
        host, port = host_and_port(listen)
        try:
            start_http_server(port, host)
        except OSError as error:
            raise BadSettings(
                f"the metrics cannot be served at {listen}: {error.strerror}", hint="Is the port taken?"
            ) from error


def watch(directory: Directory, follower: Follower) -> None:
    """Report on a directory and on what keeps it up to date."""
    _CONNECTED.set_function(lambda: follower.connected)
    _MAILBOXES.set_function(lambda: len(directory.mailboxes))
