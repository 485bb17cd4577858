"""What an IMAP server says, taken apart: the one place where its text is read (RFC 3501 section 9, RFC 9051).

Servers write what no grammar allows, so each reader here takes all that has
one meaning only, and raises :class:`Malformed` for the rest. Whatever the text,
nothing else is raised, and the work is in proportion to its length.

imapclient's own parser is not used for this: it goes byte by byte (about ten
times slower for a FETCH response), and ends at flags and names as they occur.
"""

from __future__ import annotations

import re
from calendar import timegm
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from email.utils import parsedate_tz

MAX_NUMBER = 2**32 - 1  # RFC 3501 section 9, number
MAX_MODSEQ = 2**63 - 1  # RFC 7162 section 7, mod-sequence-value
MAX_DEPTH = 20  # of parentheses
MAX_RANGES = 1_000_000  # in one sequence set
TEXT = 300  # characters of a server's words that are kept
#: Dates that a file system and Dovecot keep, in seconds since 1970.
DATES = range(2**32)

Token = bytes | None | list["Token"]
#: The literals of a response by the place of their ``{`` in its text.
Literals = Mapping[int, bytes]
_NONE: Literals = {}


class Malformed(ValueError):
    """Text that has no meaning in IMAP."""


def number(text: bytes | str, most: int = MAX_NUMBER, least: int = 0) -> int:
    """A number in decimal digits.

    Raises:
        Malformed: it is no number, or not within ``least`` and ``most``.
    """
    if not text.isdigit() or not text.isascii() or len(text) > 20:
        raise Malformed(f"not a number: {printable(text, 40)!r}")
    found = int(text)
    if not least <= found <= most:
        raise Malformed(f"not within {least} and {most}: {found}")
    return found


def printable(text: bytes | str, limit: int = TEXT) -> str:
    """A server's words made harmless for a terminal, a log and the database: no controls, not too long."""
    if isinstance(text, bytes):
        text = text[: 4 * limit].decode(errors="backslashreplace")
    if not text.isprintable():
        text = "".join(each if each.isprintable() else "?" for each in text[: 4 * limit])
    return text if len(text) <= limit else f"{text[:limit]}..."


# Lines and literals ----------------------------------------------------------------

_LITERAL = re.compile(rb"~?\{(\d+)\+?\}$")
_BODY = re.compile(rb"\bBODY\[\](?:<\d+>)? $", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Announced:
    """A literal that follows a line: the place of its ``{``, its size, whether it is the body of a message."""

    place: int
    size: int
    is_body: bool


def announced(line: bytes) -> Announced | None:
    """The literal that a line ends in (RFC 3501 section 4.3, RFC 3516 section 4.4)."""
    if line[-1:] != b"}" or (match := _LITERAL.search(line)) is None:
        return None
    if len(match[1]) > 20:
        raise Malformed("a literal of more bytes than there are")
    return Announced(match.start(), int(match[1]), _BODY.search(line, 0, match.start()) is not None)


# Strings and lists -----------------------------------------------------------------

_TOKEN = re.compile(rb'\(|\)|"(?:[^"\\]|\\.)*"|[^\s()"]+|"|\s+')
_QUOTED = re.compile(rb'"((?:[^"\\]|\\.)*)"')
_ESCAPED = re.compile(rb"\\(.)", re.DOTALL)


def unquoted(inner: bytes) -> bytes:
    """What stands between the quotes of a quoted string, without its backslashes."""
    return _ESCAPED.sub(rb"\1", inner) if b"\\" in inner else inner


def tokens(text: bytes, literals: Literals = _NONE) -> list[Token]:
    """A response as nested lists of strings; NIL is None.

    Raises:
        Malformed: its parentheses or quotes do not match, or are too deep.
    """
    stack: list[list[Token]] = [[]]
    for match in _TOKEN.finditer(text):
        token = match[0]
        first = token[:1]
        if token == b"(":
            stack.append([])
            if len(stack) > MAX_DEPTH:
                raise Malformed("too many parentheses")
        elif token == b")":
            closed = stack.pop()
            if not stack:
                raise Malformed("a parenthesis too many")
            stack[-1].append(closed)
        elif first == b'"':
            if len(token) == 1:
                raise Malformed("a quote without its end")
            stack[-1].append(unquoted(token[1:-1]))
        elif first.isspace():
            continue
        elif (literal := literals.get(match.start())) is not None:
            stack[-1].append(literal)
        else:
            stack[-1].append(None if token.upper() == b"NIL" else token)
    if len(stack) != 1:
        raise Malformed("a parenthesis without its end")
    return stack[0]


# Folders ---------------------------------------------------------------------------

_LISTED = re.compile(rb'\(([^()]*)\) +(?:(NIL)|"(\\?.)"|"(")"|(~?\{\d+\+?\})|""|([^\s"(){}])) +', re.IGNORECASE)
_EXTENDED = re.compile(rb' +\((?:"|CHILDINFO|OLDNAME)', re.IGNORECASE)
_STATUS_ITEMS = re.compile(rb" \(([^()]*)\) *$")


@dataclass(frozen=True, slots=True)
class Listed:
    """A LIST or LSUB response: attributes in lower case, delimiter or nothing, the name's very bytes."""

    attributes: frozenset[str]
    delimiter: bytes
    name: bytes


def listed(text: bytes, literals: Literals = _NONE) -> Listed:
    """What follows ``LIST `` or ``LSUB `` in ``text``, which is the whole response.

    Raises:
        Malformed
    """
    match = _LISTED.match(text, 5)
    if match is None:
        raise Malformed("not a listed folder")
    flags, _, quoted, quote, literal, bare = match.groups()
    delimiter = quoted[-1:] if quoted else quote or bare or b""
    if literal is not None:
        delimiter = literals.get(match.start(5), b"")
    attributes = frozenset(printable(each).lower() for each in flags.split())
    return Listed(attributes, delimiter, _name(text, match.end(), len(text), literals))


def _name(text: bytes, start: int, end: int, literals: Literals) -> bytes:
    """A folder's name in all its spellings, also those that only a server could think of."""
    if start in literals:
        return literals[start]
    raw = text[start:end]
    if (match := _QUOTED.match(raw)) is not None and raw[match.end() :].strip(b" ")[:1] in {b"", b"("}:
        return unquoted(match[1])
    if (extended := _EXTENDED.search(raw)) is not None:
        raw = raw[: extended.start()]
    if len(raw) > 1 and raw[:1] == raw[-1:] == b'"':
        return unquoted(raw[1:-1])  # with quotes within that should have been escaped
    if not raw:
        raise Malformed("a folder without a name")
    return raw  # an atom, or what should have been quoted: it may hold blanks


def status(text: bytes, literals: Literals = _NONE) -> tuple[bytes, dict[str, int]]:
    """Name and items of a STATUS response (RFC 3501 section 7.2.4); what is no number is left out.

    Raises:
        Malformed
    """
    # The items are the last parentheses; the name before them may hold anything.
    match = _STATUS_ITEMS.search(text, 7)
    if match is None:
        raise Malformed("not a STATUS response")
    words = match[1].upper().split()
    items = {}
    for key, value in zip(words[::2], words[1::2], strict=False):
        try:
            items[printable(key, 40)] = number(value, MAX_MODSEQ)
        except Malformed:
            continue
    return _name(text, 7, match.start(), literals), items


@dataclass(frozen=True, slots=True)
class Namespaces:
    """The personal namespace's prefix, and those of other users' and shared ones (RFC 2342 section 5)."""

    prefix: bytes
    foreign: tuple[bytes, ...]


def namespaces(text: bytes, literals: Literals = _NONE) -> Namespaces:
    """
    Raises:
        Malformed
    """
    personal, *others = [each if isinstance(each, list) else [] for each in tokens(text, literals)[1:4]] or [[]]
    prefixes = [each[0] for each in personal if isinstance(each, list) and each]
    first = next((each for each in prefixes if isinstance(each, bytes)), b"")
    found = [each[0] for other in others for each in other if isinstance(each, list) and each]
    # An empty prefix would mean every folder.
    return Namespaces(first, tuple(each for each in found if isinstance(each, bytes) and each))


# Messages --------------------------------------------------------------------------

_FETCH = re.compile(rb"(\d{1,20}) FETCH \(", re.IGNORECASE)
_ITEM = re.compile(
    rb" *([^\s()\[\]\"{}]+(?:\[[^\]]*\](?:<\d+>)?)?) +"
    rb'(?:(\d+)(?=[ )])|"((?:[^"\\]|\\.)*)"(?=[ )])|(\()|(~?\{\d+\+?\})(?=[ )])|([^\s()"{}]+)(?=[ )]))'
)
_LITERAL_ITEM = 5  # the group of it in _ITEM
_END = re.compile(rb" *\) *$")
_FLAGS_END = re.compile(rb"\)(?=[ )])")
_FLAGS_ENDS = 64  # that are tried
_NESTED = re.compile(rb'[()]|"(?:[^"\\]|\\.)*"')


@dataclass(frozen=True, slots=True)
class Fetched:
    """A FETCH response: the sequence number, and the items by name in upper case.

    A list is what stands between its parentheses, a string what it stands for;
    NIL is None.
    """

    sequence: int
    items: dict[bytes, bytes | None]

    def number(self, item: bytes, most: int = MAX_NUMBER, least: int = 1) -> int | None:
        """A numeric item, or None where it is missing or no number within these bounds."""
        value = self.items.get(item)
        if value is None or not value.isdigit() or len(value) > 20:
            return None
        found = int(value)
        return found if least <= found <= most else None


def is_fetch(text: bytes) -> bool:
    """Whether a response is a FETCH, right or not."""
    return text.partition(b" ")[2][:6].upper() == b"FETCH "


def fetched(text: bytes, literals: Literals = _NONE) -> Fetched | None:
    """A FETCH response (RFC 3501 section 7.4.2), whole to its last parenthesis; None for any other response.

    Raises:
        Malformed: it is one, and cannot be read, or something follows.
    """
    head = _FETCH.match(text)
    if head is None:
        if is_fetch(text):
            raise Malformed("not a FETCH response")
        return None
    # A keyword may hold a parenthesis: the flags end at the first one after which the rest makes sense.
    for skipped in range(_FLAGS_ENDS):
        items = _items(text, head.end(), literals, skipped)
        if items is not None:
            return Fetched(number(head[1], least=1), items)
        if b"FLAGS (" not in text.upper():
            break
    raise Malformed("not the items of a message")


def _items(text: bytes, start: int, literals: Literals, skipped: int) -> dict[bytes, bytes | None] | None:
    """The items from ``start`` on; None if they do not end as they should, where the text ends.

    ``skipped``: how many parentheses are taken for a part of a keyword.
    """
    items: dict[bytes, bytes | None] = {}
    while (match := _ITEM.match(text, start)) is not None:
        name, digits, quoted, nested, literal, atom = match.groups()
        name = name.upper()
        start = match.end()
        if digits is not None:
            items[name] = digits
        elif quoted is not None:
            items[name] = unquoted(quoted)
        elif nested is not None:
            end = _flags_end(text, start, skipped) if name == b"FLAGS" else _matching(text, start)
            if end < 0:
                return None
            items[name] = text[start:end]
            start = end + 1
        elif literal is not None:
            if match.start(_LITERAL_ITEM) not in literals:
                return None
            items[name] = literals[match.start(_LITERAL_ITEM)]
        else:
            items[name] = None if atom.upper() == b"NIL" else atom
    return items if _END.match(text, start) else None


def _flags_end(text: bytes, start: int, skipped: int) -> int:
    """The place of the parenthesis that ends the flags from ``start`` on, or -1."""
    for number_of, match in enumerate(_FLAGS_END.finditer(text, start)):
        if number_of == skipped:
            return match.start()
    return -1


def _matching(text: bytes, start: int) -> int:
    """The place of the parenthesis that closes the one before ``start``, or -1."""
    depth = 1
    for match in _NESTED.finditer(text, start):
        depth += {b"(": 1, b")": -1}.get(match[0], 0)
        if not depth:
            return match.start()
        if depth > MAX_DEPTH:
            break
    return -1


# Flags and dates -------------------------------------------------------------------

#: System flags are compared without case.
_CANONICAL = {flag.lower(): flag for flag in ("\\Draft", "\\Flagged", "\\Answered", "\\Seen", "\\Deleted")}
#: RFC 3501 section 9, flag-keyword: an atom.
_KEYWORD = re.compile(r"[!#$&'+,\-./0-9:;<=>?@A-Z\[^_`a-z|}~]+")


def flags(text: bytes) -> frozenset[str]:
    """Flags and keywords as said, but for \\Recent, which belongs to a session (RFC 3501 section 2.3.2).

    They are what stood between the parentheses, byte for byte (PEP 383), legal or not.
    """
    names = [each for each in text.decode("utf-8", "surrogateescape").split(" ") if each]
    return frozenset(_CANONICAL.get(name.lower(), name) for name in names if name.lower() != "\\recent")


def is_legal_keyword(keyword: str) -> bool:
    """Whether a keyword is an atom, as every server and client can read it (RFC 3501 section 9)."""
    return _KEYWORD.fullmatch(keyword) is not None


@dataclass(frozen=True, slots=True)
class Date:
    """Seconds since 1970, or None where it cannot be known; ``remark`` is what was odd, in words, or empty."""

    seconds: int | None
    remark: str = ""


_DATE = re.compile(rb"([ \d]?\d)-([A-Za-z]{3})-(\d{4}) (\d\d):(\d\d):(\d\d) ([+-])(\d\d)([0-5]\d)")
_MONTHS = {name: n for n, name in enumerate(b"Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split(), 1)}
_DAY = 86_400  # seconds


def internaldate(text: bytes | None) -> Date:
    """An INTERNALDATE without its quotes (RFC 3501 section 9, date-time), or any other form that dates have."""
    if text is None:
        return Date(None, "it has no date there")
    match = _DATE.fullmatch(text)
    if match is not None and match[2].title() in _MONTHS:
        day, month, year, hour, minute, second, sign, hours, minutes = match.groups()
        when = (int(year), _MONTHS[month.title()], int(day), int(hour), int(minute), int(second))
        offset = int(hours) * 3600 + int(minutes) * 60
        if _is_date(when) and offset < _DAY:
            seconds = timegm(when) - (-offset if sign == b"-" else offset)
            if seconds in DATES:
                return Date(seconds)
            return Date(None, f"its date there cannot be kept here: {printable(text, 60)!r}")
    return header_date(text)


def header_date(text: bytes) -> Date:
    """A date as messages have it (RFC 5322 section 3.3, obsolete forms), or nearly so."""
    shown = printable(text, 60)
    parsed = _parsed(text)
    offset, remark = (parsed[9] if parsed else 0), ""
    if parsed is None:
        parsed, offset = _parsed(text + b" +0000"), _DAY  # it may be without a zone
    if parsed is None or not _is_date(parsed[:6]):
        return Date(None, f"its date there cannot be read: {shown!r}")
    if offset is None or abs(offset) >= _DAY:
        offset, remark = 0, f"its date there is taken for UTC: {shown!r}"
    try:
        seconds = timegm(parsed[:6]) - offset
    except (ValueError, OverflowError):
        return Date(None, f"its date there cannot be read: {shown!r}")
    if seconds not in DATES:
        return Date(None, f"its date there cannot be kept here: {shown!r}")
    return Date(seconds, remark)


def _parsed(text: bytes) -> tuple[int, int, int, int, int, int, int, int, int, int | None] | None:
    try:
        return parsedate_tz(text[:200].decode("ascii", "replace"))
    except (ValueError, IndexError, TypeError):  # email.utils for some odd texts
        return None


def _is_date(when: tuple[int, ...]) -> bool:
    year, month, day, hour, minute, second = when
    return 0 < year < 10_000 and 1 <= month <= 12 and 1 <= day <= 31 and hour < 24 and minute < 60 and second <= 60


# Numbers of messages ---------------------------------------------------------------


def ranges(text: bytes) -> list[tuple[int, int]]:
    """A sequence set of UIDs, first and last of each range (RFC 3501 section 9, sequence-set).

    Raises:
        Malformed
    """
    if text.count(b",") >= MAX_RANGES:
        raise Malformed("too many ranges")
    found = []
    for part in text.split(b","):
        start, _, end = part.partition(b":")
        first, last = number(start, least=1), number(end or start, least=1)
        found.append((min(first, last), max(first, last)))
    return found


def vanished(text: bytes) -> list[tuple[int, int]]:
    """The UIDs of a VANISHED response (RFC 7162 section 3.2.10).

    Raises:
        Malformed
    """
    return ranges(text.rpartition(b" ")[2])


def searched(text: bytes) -> Iterator[tuple[int, int]]:
    """The UIDs of a SEARCH or ESEARCH response, as ranges (RFC 3501 section 7.2.5, RFC 4731 section 3.1).

    Raises:
        Malformed
    """
    words = text.split()
    if words[:1] and words[0].upper() == b"ESEARCH":
        upper = [word.upper() for word in words]
        if b"ALL" in upper[:-1]:
            yield from ranges(words[upper.index(b"ALL") + 1])
        return
    for word in words[1:]:
        if word[:1] == b"(":
            return  # (MODSEQ n), RFC 7162 section 3.1.5
        uid = number(word, least=1)
        yield uid, uid


# Response codes --------------------------------------------------------------------

_CODE = re.compile(r"\[([^\] ]+)(?: (\(.*?\)(?=\])|[^\]]*))?\]", re.DOTALL)
_BACKOFF = re.compile(r"backoff time:? *(\d{1,9}) *(milliseconds|ms|seconds|s)\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Code:
    """A response code: its name in upper case, or nothing, and what stands behind it (RFC 3501 section 7.1)."""

    name: str = ""
    argument: str = ""


def code(text: bytes | str) -> Code:
    """The response code at the start of a server's words; all of a status response but its OK, NO or BAD."""
    if isinstance(text, bytes):
        text = text[:10_000].decode("utf-8", "surrogateescape")
    found = _CODE.match(text)
    return Code(printable(found[1], 40).upper(), found[2] or "") if found else Code()


def backoff(text: str) -> float | None:
    """For how many seconds Exchange wants to be left alone, where it says so in words."""
    found = _BACKOFF.search(text)
    if found is None:
        return None
    return int(found[1]) / (1000 if found[2].lower().startswith("m") else 1)
