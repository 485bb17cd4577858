"""The milter on every MX: a stamp on each message, and a guard against loops.

A message for our domains gets a header that names, unreadably for others, the
recipients that it was taken for. When the legacy server forwards a message
back to us for a recipient that is in its stamp, it would circle for ever: it is
refused with 5.4.6 (RFC 3463). Nothing else of a message is touched, and
Postfix takes mail without us (``milter_default_action = accept``).

This folder has no ``__init__.py``, on purpose: pymilter's C extension is called
``milter``, and a regular package of that name would hide it.
"""

from __future__ import annotations

import hashlib
import hmac
import socket
import threading
import time
from pathlib import Path

import Milter

from bascule import log, program
from bascule.address import Address
from bascule.errors import BadAddress
from bascule.readiness import ready
from bascule.settings import Settings

STAMP = "Bascule-Stamp"
_TAG_LENGTH = 24  # hexadecimal digits a recipient
_MAX_LINE = 900  # RFC 5322 section 2.1.1 allows 998


def tag(key: bytes, recipient: str) -> str:
    """What stands for a recipient in a stamp: a keyed hash, so that a stamp discloses nobody (not a Bcc either)."""
    try:
        recipient = str(Address.parse(recipient.strip("<>")))
    except BadAddress:
        recipient = recipient.lower()
    return hmac.new(key, recipient.encode(errors="surrogateescape"), hashlib.sha256).hexdigest()[:_TAG_LENGTH]


def stamps(tags: list[str]) -> list[str]:
    """Header values that hold ``tags``, each line short enough to be sent."""
    per_line = _MAX_LINE // (_TAG_LENGTH + 1)
    return [" ".join(tags[start : start + per_line]) for start in range(0, len(tags), per_line)]


class Guard(Milter.Base):  # type: ignore[misc]  # pymilter has no types
    """One SMTP connection. pymilter makes the instances; ``key`` is set before the first."""

    key = b""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._tags: list[str] = []
        self._stamped: set[str] = set()

    @Milter.noreply  # type: ignore[untyped-decorator]
    def envfrom(self, _sender: str, *_: str) -> int:
        self._reset()
        return int(Milter.CONTINUE)

    @Milter.noreply  # type: ignore[untyped-decorator]
    def envrcpt(self, recipient: str, *_: str) -> int:
        self._tags.append(tag(self.key, recipient))
        return int(Milter.CONTINUE)

    @Milter.noreply  # type: ignore[untyped-decorator]
    def header(self, name: str, value: str) -> int:
        if name.lower() == STAMP.lower():
            self._stamped.update(value.split())
        return int(Milter.CONTINUE)

    def eoh(self) -> int:
        if self._stamped.intersection(self._tags):
            log.get().warning("loop refused", queue_id=self.getsymval("i"))
            self.setreply(
                "554", "5.4.6", "bascule: the legacy server sent this message back to the server it came from"
            )
            return int(Milter.REJECT)
        return int(Milter.CONTINUE)

    def eom(self) -> int:
        for value in stamps(self._tags):
            self.addheader(STAMP, value)
        return int(Milter.CONTINUE)


def _run(configuration: Settings) -> None:
    Guard.key = program.read_secret(configuration.milter.stamp_key, "stamp key")
    endpoint = configuration.milter.socket
    kind, _, rest = endpoint.partition(":")
    if kind == "unix":
        Path(rest).unlink(missing_ok=True)
        address = rest
    else:
        host, _, port = rest.rpartition(":")
        address = f"inet:{port}@{host}"
    Milter.factory = Guard
    Milter.set_flags(Milter.ADDHDRS)
    # An error of ours stops no mail, like our absence.
    Milter.set_exception_policy(Milter.CONTINUE)
    threading.Thread(target=_tell_when_listening, args=(endpoint,), daemon=True).start()
    Milter.runmilter("bascule", address, timeout=300)


def _tell_when_listening(endpoint: str) -> None:
    """libmilter opens the socket inside of runmilter and tells nobody; try it until it answers."""
    kind, _, rest = endpoint.partition(":")
    host, _, port = rest.rpartition(":")
    while True:
        with socket.socket(socket.AF_UNIX if kind == "unix" else socket.AF_INET) as probe:
            try:
                probe.connect(rest if kind == "unix" else (host, int(port)))
                break
            except OSError:
                time.sleep(0.05)
    if kind == "unix":
        Path(rest).chmod(0o666)  # who may reach it is decided by its directory
    ready()


main = program.command("milter", "Stamp mail and guard against loops.", _run)
