"""Tell the service manager that we are ready (sd_notify(3), a datagram to ``NOTIFY_SOCKET``)."""

from __future__ import annotations

import os
import socket


def ready() -> None:
    """Say READY=1; without a service manager, say nothing."""
    path = os.environ.get("NOTIFY_SOCKET")
    if not path:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.sendto(b"READY=1", "\0" + path[1:] if path.startswith("@") else path)
