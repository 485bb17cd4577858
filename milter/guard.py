"""What is done with each message: a stamp, a trace, a guard against loops, and a seal if that is wanted.

A message for our domains gets a header, the stamp, in which we know again, and
nobody else does, for whom it was taken. When the legacy server forwards a message
back to us for a recipient that is in its stamp and that we would relay to it
again, it would circle for ever: it is refused with 5.4.6 (RFC 3463). One whose owner
has moved meanwhile ends here, and is taken.

A content filter gives each message back to this host by a port of its own: that
is the second pass of the same message, and no loop. A stamp therefore says where it
was made, host and port; who comes from inside with a stamp of this host's, made
at another port, is let through. A loop comes to a port a second time.

Nothing is changed in a message; header fields are only added.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from ipaddress import ip_address, ip_network

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
TAG_LENGTH = 16  # hexadecimal digits; 64 bits
#: A stamp has this many places, whatever the number of recipients: 32 of 17 characters are a line of 600 (RFC 5322
#: section 2.1.1 allows 998). A message for more of our recipients has more stamps.
PLACES = 32
#: Stamps of one message that are looked at, the last that it has: who has forged many would keep the guard busy for
#: seconds. Ours are added behind all others; one pass of a message for 1,000 recipients of ours adds 32.
LOOKED_AT = 128
_NONCE_LENGTH = 32  # hexadecimal digits
#: This host, and the networks that are nobody's on the Internet (RFC 1918, RFC 4193).
_INSIDE = tuple(
    ip_network(each) for each in ("127.0.0.0/8", "::1", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7")
)


@dataclass(frozen=True, slots=True)
class Door:
    """Where a message came in: the host by its node's name, and the port."""

    node: str
    port: str

    def __str__(self) -> str:
        return f"{self.node}/{self.port}"


@dataclass(frozen=True, slots=True)
class Stamp:
    """``by`` a door, a random ``nonce``, and what stands for each recipient, in no order."""

    by: Door
    nonce: str
    tags: frozenset[str]

    @classmethod
    def parse(cls, value: str) -> Stamp | None:
        """Read a header field; None: it is none of this form. A server on the way may have folded it anew."""
        door, _, rest = " ".join(value.split()).partition(" ")
        nonce, *tags = rest.split()[: PLACES + 1] or [""]
        node, slash, port = door.rpartition("/")
        if not slash or len(nonce) != _NONCE_LENGTH:
            return None
        return cls(Door(node, port), nonce, frozenset(tags))

    def is_for(self, key: bytes, recipient: str) -> bool:
        """Whether the message was taken for ``recipient`` when this stamp was made."""
        return _tag(key, self.by, self.nonce, recipient) in self.tags


def stamps(key: bytes, door: Door, recipients: Sequence[str]) -> Iterator[str]:
    """Header values for a message that is taken for ``recipients`` at ``door``.

    The nonce keeps the tags of one message from being known again in another:
    whoever has learnt somebody's tag would else see that person among the Bcc
    recipients of other messages. Free places are filled at random, so that the number of recipients does not show.
    """
    for start in range(0, len(recipients), PLACES):
        nonce = secrets.token_hex(_NONCE_LENGTH // 2)
        tags = {_tag(key, door, nonce, each) for each in recipients[start : start + PLACES]}
        while len(tags) < PLACES:
            tags.add(secrets.token_hex(TAG_LENGTH // 2))
        yield " ".join([str(door), nonce, *sorted(tags)])


def _tag(key: bytes, door: Door, nonce: str, recipient: str) -> str:
    try:
        recipient = str(Address.parse(recipient))
    except BadAddress:
        recipient = recipient.lower()
    text = f"{door} {nonce} {recipient}".encode(errors="surrogateescape")
    return hmac.new(key, text, hashlib.sha256).hexdigest()[:TAG_LENGTH]


def _is_inside(client: str) -> bool:
    """Whether a client is this host or of a private network, as a content filter is."""
    try:
        address = ip_address(client)
    except ValueError:
        return False
    return any(address in network for network in _INSIDE)


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
        self._client = ""
        self._port = ""
        self._reset()

    def _reset(self) -> None:
        self._recipients: list[str] = []
        self._seen: set[str] = set()
        self._routes: list[Route] = []
        self._stamps: deque[Stamp] = deque(maxlen=LOOKED_AT)
        self._second_pass = False
        self._message: list[bytes] = []
        self._size = 0

    def setsymlist(self, stage: int, *macros: str) -> None:
        """pymilter's own gives bytes to a function that takes text, and what it asked for does not come."""
        self._ctx.setsymlist(stage, " ".join(macros))

    @Milter.symlist("{daemon_port}")  # type: ignore[untyped-decorator]
    def connect(self, _hostname: str, _family: int, hostaddr: tuple[str, int] | str | None) -> int:
        self._client = hostaddr[0] if isinstance(hostaddr, tuple) else ""
        self._port = self.getsymval("{daemon_port}") or ""
        return int(Milter.CONTINUE)

    @Milter.noreply  # type: ignore[untyped-decorator]
    def envfrom(self, _sender: str, *_: str) -> int:
        self._reset()
        return int(Milter.CONTINUE)

    @Milter.noreply  # type: ignore[untyped-decorator]
    def envrcpt(self, recipient: str, *_: str) -> int:
        recipient = recipient.removeprefix("<").removesuffix(">")
        if recipient not in self._seen:  # a client may name one a thousand times
            self._seen.add(recipient)
            self._recipients.append(recipient)
        return int(Milter.CONTINUE)

    @Milter.noreply  # type: ignore[untyped-decorator]
    def header(self, name: str, value: str) -> int:
        if name.lower() == STAMP.lower() and (stamp := Stamp.parse(value)) is not None:
            self._stamps.append(stamp)
        line = f"{name}: {value}\n".replace("\r\n", "\n").replace("\n", "\r\n")
        self._keep(line.encode(errors="surrogateescape"))
        return int(Milter.CONTINUE)

    def eoh(self) -> int:
        self._routes = self.routes.of(self._recipients)
        came_back: set[Route] = set()
        for recipient, route in zip(self._recipients, self._routes, strict=True):
            made_for = [stamp.by for stamp in self._stamps if stamp.is_for(self.key, recipient)]
            if made_for and self._is_second_pass(made_for):
                self._second_pass = True
            elif made_for:
                came_back.add(route)
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

    def _is_second_pass(self, doors: Iterable[Door]) -> bool:
        """Whether a message that was taken at ``doors`` comes from a filter of this host's."""
        here = Door(self.node, self._port)
        return _is_inside(self._client) and all(door.node == here.node and door.port != here.port for door in doors)

    @Milter.noreply  # type: ignore[untyped-decorator]
    def body(self, chunk: bytes) -> int:
        self._keep(chunk)
        return int(Milter.CONTINUE)

    def eom(self) -> int:
        ours = [each for each, route in zip(self._recipients, self._routes, strict=True) if route is not None]
        for value in stamps(self.key, Door(self.node, self._port), ours):
            self.addheader(STAMP, value)
        found = {route for route in self._routes if route is not None}
        if not self._second_pass:
            for value in traces(self.node, self._recipients, self._routes):
                self.addheader(TRACE, value)
            metrics.MESSAGES.labels("+".join(sorted(found)) or "elsewhere").inc()
            self.routes.accepted(
                [each for each, route in zip(self._recipients, self._routes, strict=True) if route == "legacy"]
            )
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
