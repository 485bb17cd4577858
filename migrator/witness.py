"""A client that only looks: what a server says it has, for the verification.

It shares no code with what copies. It sends plain commands of RFC 3501, several
ahead, and takes nothing for an answer but what it expects: whatever else comes
ends the verification, not silently a comparison.
"""

from __future__ import annotations

import os
import re
import select
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from hashlib import sha256
from typing import NamedTuple, Protocol

from bascule.errors import BasculeError

PATIENCE = 60.0  # seconds without a byte
AHEAD = 24  # commands before their turn
AT_ONCE = 20_000  # messages that one SEARCH asks for: its answer is one line
MAX_LINE = 1 << 20

_LITERAL = re.compile(rb"\{(\d+)\}$")
_FETCH = re.compile(
    rb'\* \d+ FETCH \(UID (\d+) FLAGS \(([^()]*)\) INTERNALDATE "([^"]+)" RFC822\.SIZE (\d+)(?: MODSEQ \(\d+\))?\)'
)
_EXISTS = re.compile(rb"\* (\d+) EXISTS *", re.IGNORECASE)
_UIDVALIDITY = re.compile(rb"\* OK \[UIDVALIDITY (\d+)\]", re.IGNORECASE)
#: Behind these is text for people, whatever it ends in.
_WORDS = re.compile(rb"\S+ (?:OK|NO|BAD|BYE|PREAUTH)\b", re.IGNORECASE)
_BODY = re.compile(rb'BODY\[\] (?:sha256:([0-9a-f]{64})|("(?:[^"\\]|\\.)*"))', re.DOTALL)
_LIST = re.compile(rb'\* LIST \(([^()]*)\) (?:NIL|"(?:[^"\\]|\\.)+") (.+)', re.DOTALL)
_LSUB = re.compile(rb'\* LSUB \(([^()]*)\) (?:NIL|"(?:[^"\\]|\\.)+") (.+)', re.DOTALL)


class NotVerifiable(BasculeError):
    """A server does not answer the verification as IMAP says it must."""


class Wire(Protocol):
    def send(self, data: bytes) -> None: ...
    def readline(self) -> bytes: ...
    def read(self, size: int) -> bytes: ...


class Seen(NamedTuple):
    """A message as a client sees it; ``internaldate`` in seconds since 1970, flags without \\Recent."""

    flags: frozenset[str]
    internaldate: int
    size: int


class Opened(NamedTuple):
    """A folder as EXAMINE shows it."""

    exists: int
    uidvalidity: int


class Witness:
    """Looks at one mailbox over one connection, while nobody else uses that connection.

    ``who`` names the server in errors.
    """

    def __init__(self, wire: Wire, who: str) -> None:
        self._wire, self._who = wire, who
        self._number = 0

    def folders(self) -> dict[str, frozenset[str]]:
        """The attributes (lower case) of each folder that LIST shows, by its name as on the wire."""
        return self._listed(b'LIST "" "*"')

    def special_uses(self, *, may_refuse: bool = False) -> dict[str, frozenset[str]]:
        """The attributes (lower case) of the folders with a special use (RFC 6154); none where that may be refused."""
        return self._listed(b'LIST (SPECIAL-USE) "" "*"', may_refuse=b"LIST (" if may_refuse else b"\0")

    def other_namespaces(self, prefix: str, *, may_refuse: bool = False) -> tuple[str, ...]:
        """The prefixes of all namespaces but the one with ``prefix`` (RFC 2342); none where that may be refused."""
        (answer,) = self._ask([b"NAMESPACE"], may_refuse=b"NAMESPACE" if may_refuse else b"\0")
        quoted = re.findall(rb'\(("(?:[^"\\]|\\.)*") (?:NIL|")', b" ".join(answer))
        return tuple(name for name in map(_name, quoted) if name not in {"", prefix})

    def subscribed(self) -> frozenset[str]:
        """The names that LSUB shows."""
        (answer,) = self._ask([b'LSUB "" "*"'])
        return frozenset(
            _name(match[2])
            for line in answer
            if (match := _LSUB.fullmatch(line)) and b"\\noselect" not in match[1].lower()
        )

    def uids(self, folders: dict[str, Sequence[int]]) -> Iterator[tuple[str, Opened, set[int]]]:
        """For each folder: how it opens, and the UIDs that SEARCH finds in it, none if it is refused.

        ``folders``: the UIDs that are expected in each, ascending; they only
        decide what is asked at a time.
        """
        commands = {name: [b"EXAMINE %s" % _quoted(name), *_searches(expected)] for name, expected in folders.items()}
        for name, answers in self._by_folder(commands, may_refuse=b"UID SEARCH"):
            found: set[int] = set()
            for line in (line for answer in answers[1:] for line in answer):
                if line.upper().startswith(b"* SEARCH"):
                    found.update(int(word) for word in line[8:].split() if word.isdigit())
            yield name, self._opened(name, answers), found

    def messages(self, folders: Sequence[str]) -> Iterator[tuple[str, Opened, dict[int, Seen]]]:
        """For each folder: how it opens, and every message in it, by UID.

        Raises:
            NotVerifiable: a message is not shown whole.
        """
        fetch = b"UID FETCH 1:* (FLAGS INTERNALDATE RFC822.SIZE)"
        commands = {name: [b"EXAMINE %s" % _quoted(name), fetch] for name in folders}
        interned: dict[bytes, frozenset[str]] = {}
        dates: dict[bytes, int] = {}
        for name, answers in self._by_folder(commands):
            found: dict[int, Seen] = {}
            for line in answers[1]:
                if b" FETCH (" not in line[:24]:
                    continue
                match = _FETCH.fullmatch(line)
                if match is None:
                    raise NotVerifiable(f"{self._who} shows a message of {name!r} as {line[:120]!r}")
                uid, flags, date, size = match.groups()
                if flags not in interned:
                    interned[flags] = frozenset(each for each in flags.decode().split() if each != "\\Recent")
                if date not in dates:
                    dates[date] = round(datetime.strptime(date.decode().strip(), "%d-%b-%Y %H:%M:%S %z").timestamp())
                found[int(uid)] = Seen(interned[flags], dates[date], int(size))
            yield name, self._opened(name, answers), found

    def digests(self, folder: str, uids: Sequence[int]) -> dict[int, str]:
        """The SHA-256, in hexadecimal, of the bodies of these messages; those that are not given are left out."""
        fetches = [b"UID FETCH %d (UID BODY.PEEK[])" % uid for uid in uids]
        found = {}
        # Several FETCHes of one folder may be answered mixed (RFC 3501 section 5.5): the UID says whose it is.
        for line in (
            line for answer in self._ask([b"EXAMINE %s" % _quoted(folder), *fetches], digest=True) for line in answer
        ):
            uid = re.search(rb"[( ]UID (\d+)", line)
            body = _BODY.search(line)
            if uid is not None and body is not None:
                found[int(uid[1])] = body[1].decode() if body[1] else sha256(_unquoted(body[2])).hexdigest()
        return found

    # ----------------------------------------------------------------------------

    def message_ids(self, folders: Sequence[str]) -> Iterator[tuple[str, dict[int, bytes]]]:
        """For each folder, what Gmail calls its messages in every folder (X-GM-MSGID), by UID."""
        fetch = b"UID FETCH 1:* (UID X-GM-MSGID)"
        commands = {name: [b"EXAMINE %s" % _quoted(name), fetch] for name in folders}
        for name, answers in self._by_folder(commands, may_refuse=b"UID FETCH"):
            found: dict[int, bytes] = {}
            for line in answers[1]:
                uid, number = re.search(rb"[( ]UID (\d+)", line), re.search(rb"[( ]X-GM-MSGID (\d+)", line)
                if uid and number:
                    found[int(uid[1])] = number[1]
            yield name, found

    def _listed(self, command: bytes, *, may_refuse: bytes = b"\0") -> dict[str, frozenset[str]]:
        (answer,) = self._ask([command], may_refuse=may_refuse)
        return {_name(match[2]): _words(match[1]) for line in answer if (match := _LIST.fullmatch(line))}

    def _opened(self, name: str, answers: list[list[bytes]]) -> Opened:
        exists = [int(each[1]) for answer in answers for line in answer if (each := _EXISTS.fullmatch(line))]
        uidvalidity = [int(each[1]) for line in answers[0] if (each := _UIDVALIDITY.match(line))]
        if not exists or not uidvalidity:
            raise NotVerifiable(f"{self._who} opens {name!r} without EXISTS or UIDVALIDITY")
        return Opened(exists[-1], uidvalidity[-1])  # the last EXISTS: messages may come meanwhile

    def _by_folder(
        self, commands: dict[str, list[bytes]], *, may_refuse: bytes = b"\0"
    ) -> Iterator[tuple[str, list[list[bytes]]]]:
        """The answers to each folder's commands; as many folders at a time as may be asked ahead."""
        waiting: list[str] = []
        for name in [*commands, None]:
            if name is not None:
                waiting.append(name)
                if sum(len(commands[each]) for each in waiting) < AHEAD:
                    continue
            together = [command for each in waiting for command in commands[each]]
            answers = iter(self._ask(together, may_refuse=may_refuse))
            for each in waiting:
                yield each, [next(answers) for _ in commands[each]]
            waiting = []

    def _ask(self, commands: Sequence[bytes], *, digest: bool = False, may_refuse: bytes = b"\0") -> list[list[bytes]]:
        """The untagged lines of each command's answer; one that is refused ends it all.

        ``may_refuse``: but for those that begin so.

        Raises:
            NotVerifiable
        """
        tags = [b"w%d" % (self._number + count) for count in range(len(commands))]
        self._number += len(commands)
        self._wire.send(b"".join(b"%s %s\r\n" % pair for pair in zip(tags, commands, strict=True)))
        answers: list[list[bytes]] = []
        lines: list[bytes] = []
        for tag, command in zip(tags, commands, strict=True):
            while (line := self._line(digest=digest)).startswith(b"* "):
                lines.append(line)
            refused = not line.upper().startswith(tag.upper() + b" OK")
            if refused and not (line.startswith(tag + b" ") and command.startswith(may_refuse)):
                what = command.decode("utf-8", "replace")[:80]
                raise NotVerifiable(f"{self._who} answers {what!r} with {line.decode('utf-8', 'replace')[:160]!r}")
            answers.append(lines)
            lines = []
        return answers

    def _line(self, *, digest: bool) -> bytes:
        """One response. A literal in it stands as a quoted string, or as its digest."""
        whole = b""
        while True:
            line = self._wire.readline()
            if not line.endswith(b"\n") or len(whole) > MAX_LINE:
                raise NotVerifiable(f"{self._who} ended the session of the verification")
            whole += line.rstrip(b"\r\n")
            literal = _LITERAL.search(whole)
            if literal is None or _WORDS.match(whole):
                return whole
            whole = whole[: literal.start()] + self._literal(int(literal[1]), digest=digest)

    def _literal(self, size: int, *, digest: bool) -> bytes:
        if not digest and size > MAX_LINE:
            raise NotVerifiable(f"{self._who} sends {size} bytes that were not asked for")
        read, taken, hashed = 0, b"", sha256()
        while read < size:
            piece = self._wire.read(min(size - read, 1 << 16))
            if not piece:
                raise NotVerifiable(f"{self._who} ended the session of the verification")
            read += len(piece)
            hashed.update(piece)
            if not digest:
                taken += piece
        if digest:
            return b"sha256:" + hashed.hexdigest().encode()
        return b'"' + taken.replace(b"\\", b"\\\\").replace(b'"', b'\\"') + b'"'


def _searches(expected: Sequence[int]) -> list[bytes]:
    """SEARCH commands that together ask for every UID."""
    if len(expected) <= AT_ONCE:
        return [b"UID SEARCH ALL"]
    cuts = [1, *(expected[place] for place in range(AT_ONCE, len(expected), AT_ONCE))]
    ends = [*(b"%d" % (cut - 1) for cut in cuts[1:]), b"*"]
    return [b"UID SEARCH UID %d:%s" % (start, end) for start, end in zip(cuts, ends, strict=True)]


def _quoted(name: str) -> bytes:
    raw = name.encode("utf-8", "surrogateescape")
    return b'"' + raw.replace(b"\\", b"\\\\").replace(b'"', b'\\"') + b'"'


def _unquoted(token: bytes) -> bytes:
    return re.sub(rb"\\(.)", rb"\1", token[1:-1], flags=re.DOTALL)


def _name(token: bytes) -> str:
    raw = _unquoted(token) if token.startswith(b'"') else token
    return raw.decode("utf-8", "surrogateescape")


def _words(text: bytes) -> frozenset[str]:
    return frozenset(text.decode("ascii", "replace").lower().split())


@contextmanager
def watching(command: Sequence[str], who: str) -> Iterator[Witness]:
    """A witness on a child that speaks IMAP and greets with PREAUTH, for the ``with`` block.

    It is killed, not logged out: a session that ends in order lets Dovecot
    remove what an ``autoexpunge`` of the operator's names.
    """
    with subprocess.Popen(
        list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        try:
            pipes = _Pipes(process, who)
            if not pipes.readline().startswith(b"* PREAUTH"):
                raise NotVerifiable(f"{who} does not open the mailbox", hint="See Dovecot's log.")
            yield Witness(pipes, who)
        finally:
            process.kill()


class _Pipes:
    """The pipes of a child, with an end to every wait."""

    def __init__(self, process: subprocess.Popen[bytes], who: str) -> None:
        if process.stdin is None or process.stdout is None:
            raise ValueError("a child without pipes")
        self._input, self._output, self._who = process.stdin.fileno(), process.stdout.fileno(), who
        os.set_blocking(self._input, False)
        self._read = bytearray()

    def send(self, data: bytes) -> None:
        end = time.monotonic() + PATIENCE
        while data:
            # Its answers are taken meanwhile: neither side waits for the other with full pipes.
            readable, writable, _ = select.select([self._output], [self._input], [], max(end - time.monotonic(), 0))
            if readable:
                self._fill()
            if writable:
                try:
                    data = data[os.write(self._input, data) :]
                except BrokenPipeError:
                    raise NotVerifiable(f"{self._who} ended the session of the verification") from None
                end = time.monotonic() + PATIENCE
            elif time.monotonic() > end:
                raise NotVerifiable(f"{self._who} does not answer in time")

    def readline(self) -> bytes:
        start = 0
        while (end := self._read.find(b"\n", start)) < 0:
            start = len(self._read)
            self._wait()
        line = bytes(self._read[: end + 1])
        del self._read[: end + 1]
        return line

    def read(self, size: int) -> bytes:
        if not self._read:
            self._wait()
        piece = bytes(self._read[:size])
        del self._read[:size]
        return piece

    def _wait(self) -> None:
        if not select.select([self._output], [], [], PATIENCE)[0]:
            raise NotVerifiable(f"{self._who} does not answer in time")
        self._fill()

    def _fill(self) -> None:
        piece = os.read(self._output, 1 << 18)
        if not piece:
            raise NotVerifiable(f"{self._who} ended the session of the verification")
        self._read += piece
