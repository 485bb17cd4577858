"""An IMAP connection whose commands are sent ahead of the answers (RFC 3501 section 5.5).

It waits for no answer before the next command, so that a round trip is paid
once and not per command, and hands message bodies on in pieces, so that memory
stays small whatever their size.

A server may work at several commands at once unless one's result depends on
another (RFC 3501 section 5.5), and Dovecot does: the answers of two FETCHes of
one folder come mixed. So nothing here relies on the order of answers but in
one place: a SELECT or EXAMINE is begun when all before it is done, and ends
before anything after it begins.

A server that sends without end is stopped: responses, bytes and literals are
counted between one tagged response and the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count

from bascule.errors import BUSY_CODES, BasculeError, ServerUnavailable
from bascule.imap import responses
from bascule.imap.profiles import throttled
from bascule.imap.responses import Malformed, printable
from bascule.imap.wire import PIECE, Wire

SMALL_LITERAL = 1 << 16  # bytes; of anything but a body: a folder name, say
MAX_RESPONSE = 1 << 20  # bytes of one response, but for a body
MAX_BODY = 2**32 - 1  # bytes (RFC 3501 section 9, number)
MAX_MESSAGES = 2_000_000  # in one folder
#: What a server may send before the next tagged response, and for each message of the folder that is open.
RESPONSES, RESPONSES_PER_MESSAGE = 50_000, 4
BYTES, BYTES_PER_MESSAGE = 16 << 20, 512

#: Takes a body: its length, and its bytes in pieces, all of which must be read.
Receive = Callable[[int, Iterator[bytes]], object]

_CONDITIONS = {b"OK", b"NO", b"BAD", b"BYE", b"PREAUTH"}


class CommandRefused(BasculeError):
    """The server answered NO or BAD. ``code`` is its response code, upper case, or empty."""

    def __init__(self, text: str, *, is_bad: bool = False) -> None:
        super().__init__(printable(text))
        self.code = responses.code(text).name
        self.is_bad = is_bad


@dataclass(frozen=True, slots=True)
class Tagged:
    """The end of a command: its tag, None or why it was refused, the server's text and that text as it was said."""

    tag: bytes
    refused: CommandRefused | None
    text: str
    said: bytes


@dataclass(slots=True)
class Untagged:
    """An untagged response.

    ``text`` is without ``* `` and CRLF; each literal in it is left as ``{n}``,
    its bytes are in ``literals`` by the place of that. Of the literal of a
    ``BODY[]`` nothing is kept but what the receiver made of it: ``body``.
    """

    text: bytes
    literals: dict[int, bytes] = field(default_factory=dict)
    body: object = None


def quoted(text: str) -> bytes:
    """A folder name or the like as a quoted string (RFC 3501 section 4.3), byte for byte as it was listed.

    Raises:
        CommandRefused: it holds what no quoted string can, and is not sent.
    """
    if "\r" in text or "\n" in text or "\0" in text:
        raise CommandRefused(f"the name has a line break or NUL, which cannot be sent: {printable(text, 80)!r}")
    return b'"' + text.encode("utf-8", "surrogateescape").replace(b"\\", b"\\\\").replace(b'"', b'\\"') + b'"'


def uid_set(uids: list[int]) -> bytes:
    """Ascending UIDs as a sequence set, ranges joined (RFC 3501 section 9, sequence-set)."""
    parts: list[str] = []
    start = last = uids[0]
    for uid in [*uids[1:], 0]:
        if uid == last + 1:
            last = uid
            continue
        parts.append(str(start) if start == last else f"{start}:{last}")
        start = last = uid
    return ",".join(parts).encode()


class Pipeline:
    """The commands and answers of one connection, used by one thread at a time.

    ``spent`` is called with the bytes of each piece of a body, and may take its
    time: it is how a limit of bytes per second is kept.
    """

    def __init__(self, wire: Wire, spent: Callable[[int], None] = lambda _: None) -> None:
        self.wire = wire
        self.peer = wire.peer
        self.spent = spent
        #: Whether the peer's budget is renewed for each command; in a login it is not.
        self.renews = True
        self._numbers = count(1)
        self._waiting: set[bytes] = set()
        self._exists = self._count = self._bytes = 0

    def __len__(self) -> int:
        """How many commands are not yet answered."""
        return len(self._waiting)

    def send(self, *commands: bytes) -> list[bytes]:
        """Send commands without waiting for their answers; their tags."""
        if self.renews and not self._waiting:
            self.wire.allow()
        tags = [b"p%d" % next(self._numbers) for _ in commands]
        self._waiting.update(tags)
        self.wire.under_way = len(self._waiting)
        self.wire.send(b"".join(b"%s %s\r\n" % (tag, command) for tag, command in zip(tags, commands, strict=True)))
        return tags

    def read(self, receive: Receive | None = None) -> Untagged | Tagged:
        """The next response.

        Raises:
            ServerUnavailable: the server says that it cannot now, or BYE; the
                connection is lost; or this is not IMAP.
        """
        response = self._response(receive)
        if response is None:
            raise self.peer.violates("+")
        return response

    def _response(self, receive: Receive | None = None) -> Untagged | Tagged | None:
        """The next response, or None for a command continuation request."""
        line = self._line()
        if line[:2] == b"* ":
            untagged = self._rest(line[2:], receive)
            if untagged.text[:4].upper() in {b"BYE", b"BYE "}:
                said = printable(untagged.text[4:])
                raise self._told_to_wait(said) or self.peer.busy(
                    f"{self.peer.name} ended the session: {said}", code=responses.code(said).name, wait=0
                )
            return untagged
        return None if line[:1] == b"+" else self._tagged(line)

    def greeting(self) -> bytes:
        """What the server says first, without ``* ``.

        Raises:
            ServerUnavailable: as :meth:`read`, or it is no greeting.
        """
        first = self.read()
        if not isinstance(first, Untagged) or first.text.partition(b" ")[0].upper() not in {b"OK", b"PREAUTH"}:
            raise self.peer.violates(first.text)
        return first.text

    def _told_to_wait(self, text: str) -> ServerUnavailable | None:
        """The error that a refusal of whatever means that it is too much for the server, if it does."""
        code = responses.code(text).name
        slow = throttled(text)
        if code not in BUSY_CODES and slow is None:
            return None
        return self.peer.busy(
            f"{self.peer.name} says to come back later: {printable(text)}",
            code=code if code in BUSY_CODES else "THROTTLED",
            wait=slow.wait if slow else 0,
        )

    def _tagged(self, line: bytes) -> Tagged:
        tag, _, rest = line.partition(b" ")
        if tag not in self._waiting:
            raise self.peer.violates(line)
        condition, _, said = rest.partition(b" ")
        if condition.upper() not in {b"OK", b"NO", b"BAD"}:
            raise self.peer.violates(line)
        self._waiting.remove(tag)
        self.wire.under_way = len(self._waiting)
        self._count = self._bytes = 0
        if self.renews:
            self.wire.allow()
        text = printable(said)
        if condition.upper() == b"OK":
            return Tagged(tag, None, text, said)
        busy = self._told_to_wait(text)
        if busy is not None:
            raise busy
        return Tagged(tag, CommandRefused(text, is_bad=condition.upper() == b"BAD"), text, said)

    def answers(self, tags: list[bytes]) -> Iterator[Untagged]:
        """The untagged responses until all of these commands are answered; to be read to its end.

        Raises:
            CommandRefused: one is NO or BAD, the first such; the session goes on.
            ServerUnavailable: as :meth:`read`.
        """
        refused: dict[bytes, CommandRefused] = {}
        yield from self.tolerant(tags, refused)
        for error in refused.values():
            raise error

    def tolerant(self, tags: list[bytes], refused: dict[bytes, CommandRefused]) -> Iterator[Untagged]:
        """As :meth:`answers`, but NO and BAD are put into ``refused``, by tag."""
        waiting = set(tags)
        while waiting & self._waiting:
            response = self.read()
            if isinstance(response, Untagged):
                yield response
            elif response.refused is not None and response.tag in waiting:
                refused[response.tag] = response.refused

    def run(self, *commands: bytes) -> list[Untagged]:
        """Send commands, nothing being under way, and wait for all their answers.

        Raises:
            CommandRefused, ServerUnavailable: as :meth:`answers`.
        """
        return list(self.answers(self.send(*commands)))

    def dialogue(self, command: bytes, *answers: bytes) -> tuple[Tagged, list[Untagged]]:
        """Send a command that waits for lines or literals of ours (RFC 3501 section 7.5), nothing being under way.

        Raises:
            ServerUnavailable: as :meth:`read`.
        """
        untagged: list[Untagged] = []
        (tag,) = self.send(command)
        for answer in answers:
            ended = self._go_on(untagged)
            if ended is not None:
                return ended, untagged
            self.wire.send(answer)
        return self._end_of(tag, untagged), untagged

    def append(self, command: bytes, size: int, pieces: Iterator[bytes], *, at_once: bool) -> Tagged:
        """Send an APPEND with its message (RFC 3501 section 6.3.11), nothing being under way.

        ``command`` is all before the literal; ``at_once``: the server takes it
        without saying so first (LITERAL+, RFC 7888).

        Raises:
            ServerUnavailable: as :meth:`read`.
        """
        (tag,) = self.send(b"%s {%d%s}" % (command, size, b"+" if at_once else b""))
        ended = None if at_once else self._go_on([])
        if ended is not None:
            return ended
        for piece in pieces:
            self.wire.send(piece)
        self.wire.send(b"\r\n")
        return self._end_of(tag, [])

    def _go_on(self, untagged: list[Untagged]) -> Tagged | None:
        """Wait for a command continuation request; the end of the command, if that comes instead."""
        while (response := self._response()) is not None:
            if isinstance(response, Tagged):
                return response
            untagged.append(response)
        return None

    def _end_of(self, tag: bytes, untagged: list[Untagged]) -> Tagged:
        while isinstance(response := self.read(), Untagged) or response.tag != tag:
            if isinstance(response, Untagged):
                untagged.append(response)
        return response

    def _line(self) -> bytes:
        return self.wire.readline().rstrip(b"\r\n")

    def _rest(self, text: bytes, receive: Receive | None) -> Untagged:
        """The whole response that begins with ``text``: a line that ends in a literal goes on after it."""
        if text[-1:] == b" " and text[:1].isdigit():
            text = text.rstrip(b" ")  # "3 EXISTS " means nothing else
        untagged = Untagged(text)
        if text[-1:] == b"}" and text.partition(b" ")[0].upper() not in _CONDITIONS:
            self._literals(untagged, receive)  # behind OK and the like is text for people, whatever it ends in
        elif text[-7:].upper() == b" EXISTS":
            self._note_exists(text[:-7])
        self._count += 1
        self._bytes += len(untagged.text) + sum(map(len, untagged.literals.values()))
        if self._count > RESPONSES + RESPONSES_PER_MESSAGE * self._exists:
            raise self.peer.too_much(f"more than {self._count - 1} responses to one command")
        if self._bytes > BYTES + BYTES_PER_MESSAGE * self._exists:
            raise self.peer.too_much(f"more than {BYTES} bytes in answer to one command")
        return untagged

    def _note_exists(self, said: bytes) -> None:
        try:
            self._exists = responses.number(said)
        except Malformed as error:
            raise self.peer.violates(said + b" EXISTS") from error
        if self._exists > MAX_MESSAGES:
            raise self.peer.too_much(f"{self._exists} messages in one folder; at most {MAX_MESSAGES} are read")

    def _literals(self, untagged: Untagged, receive: Receive | None) -> None:
        last = 0  # where in the text the line begins that was read last
        while True:
            try:
                literal = responses.announced(untagged.text[last:])
            except Malformed as error:
                raise self.peer.violates(untagged.text[last:]) from error
            if literal is None:
                return
            if literal.is_body and receive is not None and untagged.body is None and literal.size <= MAX_BODY:
                untagged.body = receive(literal.size, self._pieces(literal.size))
                held = b""
            elif literal.size > SMALL_LITERAL:
                raise self.peer.too_much(f"{literal.size} bytes that were not asked for")
            else:
                held = b"".join(self._pieces(literal.size))
            untagged.literals[last + literal.place] = held
            last = len(untagged.text)
            untagged.text += self._line()
            if len(untagged.text) + SMALL_LITERAL * len(untagged.literals) > MAX_RESPONSE + SMALL_LITERAL:
                raise self.peer.too_much("a response without an end")

    def _pieces(self, size: int) -> Iterator[bytes]:
        while size > 0:
            piece = self.wire.read(size)
            size -= len(piece)
            self.spent(len(piece))
            yield piece


@dataclass(slots=True)
class Connection:
    """A connection on which somebody is logged in: what :class:`Reader` and :class:`Writer` stand on.

    ``greeting`` is what the server said first; ``capabilities`` are those after the login, upper case.
    """

    pipeline: Pipeline
    greeting: str
    capabilities: frozenset[str]


def capabilities(pipeline: Pipeline) -> frozenset[str]:
    """Ask for the capabilities (RFC 3501 section 6.1.1).

    Raises:
        CommandRefused, ServerUnavailable
    """
    found: frozenset[str] = frozenset()
    for untagged in pipeline.run(b"CAPABILITY"):
        if untagged.text[:11].upper() == b"CAPABILITY ":
            found |= {printable(each, 80).upper() for each in untagged.text.split()[1:]}
    return found


__all__ = ["PIECE", "CommandRefused", "Connection", "Pipeline", "Receive", "Tagged", "Untagged", "capabilities"]
