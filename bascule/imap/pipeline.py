"""An IMAP session whose commands are sent ahead of the answers (RFC 3501 section 5.5).

imapclient connects, secures and logs in; from then on this module speaks on
the same connection. It waits for no answer before the next command, so that a
round trip is paid once and not per command, and it hands message bodies on in
pieces, so that memory stays small whatever their size. Both are what
imapclient cannot do.

A server may work at several commands at once unless one's result depends on
another (RFC 3501 section 5.5), and Dovecot does: the answers of two FETCHes of
one folder come mixed. So nothing here relies on the order of answers but in
one place: an EXAMINE is begun when all before it is done, and ends before
anything after it begins.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Protocol

from bascule.errors import BasculeError, LegacyBusy, LegacyUnavailable
from bascule.legacy import BUSY_CODES

PIECE = 1 << 18  # bytes of a body that are in memory at a time
SMALL_LITERAL = 1 << 16  # bytes; of anything but a body: a folder name, say

_LITERAL = re.compile(rb"~?\{(\d+)\+?\}$")
_BODY = re.compile(rb"\bBODY\[\](?:<\d+>)? ~?\{\d+\}$", re.IGNORECASE)
_CODE = re.compile(r"^\[([^\] ]+)")
_TOKEN = re.compile(rb'\(|\)|"(?:[^"\\]|\\.)*"|~?\{\d+\+?\}|[^\s()"]+')
_ESCAPED = re.compile(rb"\\(.)")

Token = bytes | None | list["Token"]
#: Takes a body: its length, and its bytes in pieces, all of which must be read.
Receive = Callable[[int, Iterator[bytes]], object]


class CommandRefused(BasculeError):
    """The server answered NO or BAD. ``code`` is its response code, upper case, or empty."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.code = _code(text)


@dataclass(frozen=True, slots=True)
class Tagged:
    """The end of a command: its tag, None or why it was refused, and the server's text."""

    tag: bytes
    refused: CommandRefused | None
    text: str


@dataclass(slots=True)
class Untagged:
    """An untagged response.

    ``text`` is without ``* `` and CRLF; each literal in it is left as ``{n}``,
    its bytes are in ``literals``, but for the literal of a ``BODY[]``: ``body``
    is what the receiver made of it.
    """

    text: bytes
    literals: list[bytes] = field(default_factory=list)
    body: object = None

    def tokens(self) -> list[Token]:
        """The response as nested lists of strings; NIL is None.

        Raises:
            LegacyUnavailable: parentheses do not match: this is not IMAP.
        """
        literals = iter(self.literals)
        stack: list[list[Token]] = [[]]
        for match in _TOKEN.finditer(self.text):
            token = match[0]
            if token == b"(":
                stack.append([])
            elif token == b")":
                if len(stack) == 1:
                    raise LegacyUnavailable(f"the legacy server does not speak IMAP: {self.text[:80]!r}")
                closed = stack.pop()
                stack[-1].append(closed)
            elif token[:1] == b'"':
                stack[-1].append(unquoted(token))
            elif _LITERAL.fullmatch(token):
                stack[-1].append(next(literals, b""))
            else:
                stack[-1].append(None if token.upper() == b"NIL" else token)
        if len(stack) != 1:
            raise LegacyUnavailable(f"the legacy server does not speak IMAP: {self.text[:80]!r}")
        return stack[0]


def _code(text: str) -> str:
    """The response code at the start of a server's text, upper case, or nothing."""
    found = _CODE.match(text)
    return found[1].upper() if found else ""


def quoted(text: str) -> bytes:
    """A folder name as a quoted string (RFC 3501 section 4.3).

    Raises:
        LegacyUnavailable: it holds a line break, which no quoted string can.
    """
    if "\r" in text or "\n" in text or "\0" in text:
        raise LegacyUnavailable(f"the legacy server has a folder whose name has a line break: {text!r}")
    return b'"' + text.encode().replace(b"\\", b"\\\\").replace(b'"', b'\\"') + b'"'


def unquoted(token: bytes) -> bytes:
    """What a quoted string stands for."""
    return _ESCAPED.sub(rb"\1", token[1:-1])


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


class Wire(Protocol):
    """A connection after the login; imaplib's, or the pipes of a child."""

    def send(self, data: bytes) -> None: ...
    def readline(self) -> bytes: ...
    def read(self, size: int) -> bytes: ...


class Pipeline:
    """A logged-in session, used by one thread at a time.

    ``spent`` is told of the bytes of each piece of a body, and may take its
    time: it is how a limit of bytes per second is kept.
    """

    def __init__(self, wire: Wire, spent: Callable[[int], None] = lambda _: None) -> None:
        self._wire = wire
        self._spent = spent
        self._numbers = count(1)
        self._waiting: set[bytes] = set()

    def __len__(self) -> int:
        """How many commands are not yet answered."""
        return len(self._waiting)

    def send(self, *commands: bytes) -> list[bytes]:
        """Send commands without waiting for their answers; their tags."""
        tags = [b"p%d" % next(self._numbers) for _ in commands]
        self._wire.send(b"".join(b"%s %s\r\n" % (tag, command) for tag, command in zip(tags, commands, strict=True)))
        self._waiting.update(tags)
        return tags

    def read(self, receive: Receive | None = None) -> Untagged | Tagged:
        """The next response.

        Raises:
            LegacyBusy: the server says that it cannot now, or BYE.
            LegacyUnavailable: the connection is lost, or this is not IMAP.
        """
        line = self._line()
        if line[:2] == b"* ":
            untagged = self._rest(line[2:], receive)
            if untagged.text[:4].upper() == b"BYE ":
                said = untagged.text[4:].decode(errors="replace")
                raise LegacyBusy(f"the legacy server ended the session: {said}", code=_code(said))
            return untagged
        return self._tagged(line)

    def _tagged(self, line: bytes) -> Tagged:
        tag, _, rest = line.partition(b" ")
        if tag not in self._waiting:
            raise LegacyUnavailable(f"the legacy server does not speak IMAP: {line[:80]!r}")
        self._waiting.remove(tag)
        condition, _, rest = rest.partition(b" ")
        text = rest.decode(errors="replace")
        if condition.upper() == b"OK":
            return Tagged(tag, None, text)
        refused = CommandRefused(text)
        if refused.code in BUSY_CODES:
            raise LegacyBusy(f"the legacy server says to come back later: {text}", code=refused.code)
        return Tagged(tag, refused, text)

    def answers(self, tags: list[bytes]) -> Iterator[Untagged]:
        """The untagged responses until all of these commands are answered; to be read to its end.

        Raises:
            CommandRefused: one is NO or BAD, the first such; the session goes on.
            LegacyBusy, LegacyUnavailable: as :meth:`read`.
        """
        waiting = set(tags)
        refused: CommandRefused | None = None
        while waiting & self._waiting:
            response = self.read()
            if isinstance(response, Untagged):
                yield response
            elif refused is None and response.tag in waiting:
                refused = response.refused
        if refused is not None:
            raise refused

    def append(self, command: bytes, size: int, pieces: Iterator[bytes], *, at_once: bool) -> Tagged:
        """Send an APPEND with its message (RFC 3501 section 6.3.11), nothing being under way.

        ``command`` is all before the literal; ``at_once``: the server takes it
        without saying so first (LITERAL+, RFC 7888).

        Raises:
            LegacyBusy, LegacyUnavailable: as :meth:`read`.
        """
        (tag,) = self.send(b"%s {%d%s}" % (command, size, b"+" if at_once else b""))
        while not at_once and not (line := self._line()).startswith(b"+"):
            if not line.startswith(b"* "):
                return self._tagged(line)
        for piece in pieces:
            self._wire.send(piece)
        self._wire.send(b"\r\n")
        while isinstance(response := self.read(), Untagged) or response.tag != tag:
            continue
        return response

    def run(self, *commands: bytes) -> list[Untagged]:
        """Send commands, nothing being under way, and wait for all their answers."""
        return list(self.answers(self.send(*commands)))

    def _line(self) -> bytes:
        line = self._wire.readline()
        if not line.endswith(b"\n"):
            raise LegacyUnavailable("the legacy server closed the connection")
        return line.rstrip(b"\r\n")

    def _rest(self, text: bytes, receive: Receive | None) -> Untagged:
        """The whole response that begins with ``text``: a line that ends in a literal goes on after it."""
        untagged = Untagged(text)
        if text.partition(b" ")[0].upper() in {b"OK", b"NO", b"BAD", b"BYE", b"PREAUTH"}:
            return untagged  # what follows is for people, whatever it ends in
        while (match := _LITERAL.search(text)) is not None:
            size = int(match[1])
            if receive is not None and _BODY.search(text):
                pieces = self._pieces(size)
                untagged.body = receive(size, pieces)
            elif size > SMALL_LITERAL:
                raise LegacyUnavailable(f"the legacy server sends {size} bytes that were not asked for")
            else:
                untagged.literals.append(b"".join(self._pieces(size)))
            text = self._line()
            untagged.text += text
        return untagged

    def _pieces(self, size: int) -> Iterator[bytes]:
        while size > 0:
            piece = self._wire.read(min(size, PIECE))
            if not piece:
                raise LegacyUnavailable("the legacy server closed the connection within a message")
            size -= len(piece)
            self._spent(len(piece))
            yield piece
