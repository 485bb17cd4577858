"""What is done with each message: a stamp, a trace, a guard against loops, and a seal if that is wanted.

A message for our domains gets a header that names, unreadably for others, the
recipients that it was taken for. When the legacy server forwards a message back
to us for a recipient that is in its stamp and that we would relay to it again,
it would circle for ever: it is refused with 5.4.6 (RFC 3463). One whose owner
has moved meanwhile ends here, and is taken.

Nothing is changed in a message; header fields are only added.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

import dkim
import Milter

from bascule import log
from bascule.address import Address
from bascule.errors import BadAddress
from bascule.milter import metrics
from bascule.milter.routes import Route, Routes
from bascule.milter.seal import MAX_SIZE, Sealer

STAMP = "Bascule-Stamp"
TRACE = "Bascule-Trace"
_TAG_LENGTH = 24  # hexadecimal digits a recipient
_MAX_LINE = 900  # RFC 5322 section 2.1.1 allows 998


def tag(key: bytes, recipient: str) -> str:
    """What stands for a recipient in a stamp: a keyed hash, so that a stamp discloses nobody (not a Bcc either)."""
    try:
        recipient = str(Address.parse(recipient))
    except BadAddress:
        recipient = recipient.lower()
    return hmac.new(key, recipient.encode(errors="surrogateescape"), hashlib.sha256).hexdigest()[:_TAG_LENGTH]


def stamps(tags: Sequence[str]) -> list[str]:
    """Header values that hold ``tags``, each line short enough to be sent."""
    per_line = _MAX_LINE // (_TAG_LENGTH + 1)
    return [" ".join(tags[start : start + per_line]) for start in range(0, len(tags), per_line)]


def traces(node: str, recipients: Sequence[str], routes: Sequence[Route]) -> list[str]:
    """A header value for each of our domains: where its recipients' mail goes. No recipient is named."""
    by_domain: dict[str, set[str]] = {}
    for recipient, route in zip(recipients, routes, strict=True):
        if route is not None and route != "unknown":
            by_domain.setdefault(recipient.rpartition("@")[2].lower(), set()).add(route)
    return [f"by {node}; domain={domain}; route={','.join(sorted(found))}" for domain, found in by_domain.items()]


class Guard(Milter.Base):  # type: ignore[misc]  # pymilter has no types
    """One SMTP connection. pymilter makes the instances; what they share is set before the first."""

    node = ""
    key = b""
    routes: Routes
    sealer: Sealer | None = None

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._recipients: list[str] = []
        self._routes: list[Route] = []
        self._stamped: set[str] = set()
        self._message: list[bytes] = []
        self._size = 0

    @Milter.noreply  # type: ignore[untyped-decorator]
    def envfrom(self, _sender: str, *_: str) -> int:
        self._reset()
        return int(Milter.CONTINUE)

    @Milter.noreply  # type: ignore[untyped-decorator]
    def envrcpt(self, recipient: str, *_: str) -> int:
        self._recipients.append(recipient.removeprefix("<").removesuffix(">"))
        return int(Milter.CONTINUE)

    @Milter.noreply  # type: ignore[untyped-decorator]
    def header(self, name: str, value: str) -> int:
        if name.lower() == STAMP.lower():
            self._stamped.update(value.split())
        line = f"{name}: {value}\n".replace("\r\n", "\n").replace("\n", "\r\n")
        self._keep(line.encode(errors="surrogateescape"))
        return int(Milter.CONTINUE)

    def eoh(self) -> int:
        self._routes = self.routes.of(self._recipients)
        came_back = {
            route
            for recipient, route in zip(self._recipients, self._routes, strict=True)
            if self._stamped and tag(self.key, recipient) in self._stamped
        }
        if "legacy" in came_back:
            metrics.LOOPS.inc()
            log.get().warning("loop refused", queue_id=self.getsymval("i"))
            self.setreply(
                "554", "5.4.6", "bascule: the legacy server sent this message back to the server it came from"
            )
            return int(Milter.REJECT)
        if came_back & {"held", "unknown"}:
            self.setreply("451", "4.4.6", "bascule: cannot say now whether this message would circle; try again later")
            return int(Milter.TEMPFAIL)
        self._keep(b"\r\n")
        return int(Milter.CONTINUE)

    @Milter.noreply  # type: ignore[untyped-decorator]
    def body(self, chunk: bytes) -> int:
        self._keep(chunk)
        return int(Milter.CONTINUE)

    def eom(self) -> int:
        ours = [each for each, route in zip(self._recipients, self._routes, strict=True) if route is not None]
        for value in stamps([tag(self.key, recipient) for recipient in ours]):
            self.addheader(STAMP, value)
        for value in traces(self.node, self._recipients, self._routes):
            self.addheader(TRACE, value)
        found = {route for route in self._routes if route is not None}
        metrics.MESSAGES.labels("+".join(sorted(found)) or "elsewhere").inc()
        if self.sealer is not None and "legacy" in found:
            self._seal(self.sealer)
        return int(Milter.CONTINUE)

    def _keep(self, piece: bytes) -> None:
        """Only a message that may be sealed is held."""
        if self.sealer is not None:
            self._size += len(piece)
            if self._size <= MAX_SIZE:
                self._message.append(piece)

    def _seal(self, sealer: Sealer) -> None:
        if self._size > MAX_SIZE:
            metrics.SEALS.labels("too large").inc()
            return
        try:
            fields = sealer.seal(b"".join(self._message))
        except (dkim.DKIMException, ValueError) as error:
            # Mail is worth more than its seal.
            metrics.SEALS.labels("failed").inc()
            log.get().error("not sealed", queue_id=self.getsymval("i"), reason=f"{type(error).__name__}: {error}")
            return
        metrics.SEALS.labels("sealed" if fields else "nothing to vouch for").inc()
        for name, value in reversed(fields):
            self.addheader(name, value, 0)
