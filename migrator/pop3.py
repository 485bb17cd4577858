"""POP3 UIDLs: what a POP3 client knows its messages by (RFC 1939 section 7).

Most servers list by POP3 what INBOX holds, in the order of the UIDs; then the
sizes agree, one after the other. Some have another order (Courier sorts by the
names of files), list a part only, or count bytes in another way. Then messages
are known by their Message-ID, or by their whole header, which TOP gives.

A UIDL at the wrong message is worse than none: a client may delete what it never
fetched. So whatever cannot be told apart for certain gets none, and is named.
"""

from __future__ import annotations

import hashlib
import re
import time
from base64 import b64encode
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from bascule.address import Address
from bascule.credential import Password
from bascule.errors import BasculeError, LegacyBusy, LegacyUnavailable
from bascule.legacy import LegacySettings, MasterLogin, Service, Trust, plain
from bascule.migrator.conversation import Conversation

SECONDS = 180.0  # that the whole session may take
MOST = 256 << 20  # bytes that the server may send in all
MAX_LINE = 512  # bytes of a response (RFC 2449 section 4)
MAX_MESSAGES = 1_000_000  # in a listing
MAX_HEADER = 256 << 10  # bytes by which messages are told apart
BATCH = 100  # TOP commands that are sent ahead where the server offers PIPELINING
NEW = 20  # messages that may have come between the two listings
PAUSES = (1.0, 3.0, 10.0)  # seconds
NAMED = 20  # ranges of message numbers in a note

#: Codes of RFC 2449 and RFC 3206 with which a server says that it cannot now.
_BUSY = re.compile(rb"-ERR \[(IN-USE|LOGIN-DELAY|SYS/TEMP)", re.IGNORECASE)
_SIZE = re.compile(rb"(\d{1,9}) +(\d{1,18})(?: |$)")
_UIDL = re.compile(rb"(\d{1,9}) +([!-~]+) *$")  # RFC 1939 wants at most 70 characters; not all servers keep to it
_MESSAGE_ID = re.compile(rb"^message-id[ \t]*:(.*(?:\n[ \t].*)*)", re.IGNORECASE | re.MULTILINE)


class UidlsNotKnown(BasculeError):
    """The POP3 server does not say what its UIDLs are."""


@dataclass(frozen=True, slots=True)
class Listed:
    """A message as the POP3 server lists it: its size in bytes, or None, and its UIDL, or nothing."""

    number: int
    size: int | None
    uidl: str


@dataclass(frozen=True, slots=True)
class Uidls:
    """The UIDLs of INBOX by UID, and in words what was left out, or nothing."""

    by_uid: Mapping[int, str]
    note: str


@dataclass(frozen=True, slots=True)
class Identity:
    """What a message is known by."""

    size: int
    message_id: bytes
    header: bytes

    @classmethod
    def of(cls, size: int, header: bytes) -> Identity:
        """``header`` is the beginning of a message; it ends with the first empty line."""
        lines = []
        for line in header[:MAX_HEADER].split(b"\n"):
            bare = line.rstrip(b"\r")
            if not bare:
                break
            lines.append(bare)
        text = b"\n".join(lines)
        found = _MESSAGE_ID.search(text)
        message_id = b"".join(found[1].split()) if found else b""
        return cls(size, message_id, hashlib.sha256(text).digest() if text else b"")

    def keys(self) -> tuple[Hashable, Hashable, Hashable]:
        """From what is told apart at once to what seldom is needed; None where it says nothing."""
        return (
            self.message_id or None,
            (self.message_id, self.size) if self.message_id and self.size else None,
            self.header or None,
        )


def uidls(
    legacy: LegacySettings,
    service: Service,
    trust: Trust,
    address: Address,
    password: Password | MasterLogin,
    inbox: Sequence[tuple[int, int]],
    header_of: Callable[[int], bytes],
    *,
    host: str | None = None,
    seconds: float = SECONDS,
) -> Uidls:
    """The UIDLs of INBOX; ``inbox`` is its UIDs and sizes in bytes, in order, 0
    where a size is not known, and ``header_of`` the beginning of a message by UID,
    or nothing. ``host`` is where POP3 is served, by default where IMAP is.
    ``password``: the user's, or a master user who may act as any (RFC 5034).

    A client of the user's may have the mailbox open (RFC 1939 section 3): it is asked again after a while.

    Raises:
        UidlsNotKnown: the server refuses.
        LegacyUnavailable: it cannot be used now.
    """
    for pause in PAUSES:
        try:
            return _uidls(
                legacy, service, trust, address, password, inbox, header_of, host or legacy.imap_host, seconds
            )
        except LegacyBusy:
            time.sleep(pause)
    return _uidls(legacy, service, trust, address, password, inbox, header_of, host or legacy.imap_host, seconds)


def _uidls(
    legacy: LegacySettings,
    service: Service,
    trust: Trust,
    address: Address,
    password: Password | MasterLogin,
    inbox: Sequence[tuple[int, int]],
    header_of: Callable[[int], bytes],
    name: str,
    seconds: float,
) -> Uidls:
    with Conversation("POP3", name, service, trust, seconds=seconds, most=MOST) as conversation:
        session = _Session(conversation)
        session.begin(service.tls == "starttls", legacy.login_name(address), password)
        listed = session.listed()
        found = _by_order(inbox, listed)
        if len(found) < len(listed):
            found |= _by_identity(inbox, listed, found, header_of, session)
        session.end()
    uidl_of = {each.number: each.uidl for each in listed if each.uidl}
    by_uid = {uid: uidl_of[number] for uid, number in found.items() if number in uidl_of}
    kept = {found[uid] for uid in by_uid}
    left = [each.number for each in listed if each.number not in kept]
    note = ""
    if left:
        note = (
            f"POP3 clients may download again {len(left)} of the {len(listed)} messages that POP3 lists, which cannot "
            f"be told apart or have no usable UIDL: number {ranges(left)}"
        )
    return Uidls(by_uid, note)


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as a sequence set (RFC 9051 section 9), cut off after some ranges."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    said = [f"{first}" if first == last else f"{first}:{last}" for first, last in parts[:NAMED]]
    return ",".join(said) + (" and more" if len(parts) > NAMED else "")


def _by_order(inbox: Sequence[tuple[int, int]], listed: Sequence[Listed]) -> dict[int, int]:
    """Message numbers by UID, if both lists have the same sizes in the same order.

    Messages of one size are left out: they may have changed places.
    """
    pairs = list(zip(inbox, listed, strict=False))
    if abs(len(inbox) - len(listed)) > NEW or any(size != each.size for (_, size), each in pairs):
        return {}
    here, there = Counter(size for _, size in inbox), Counter(each.size for each in listed)
    return {uid: each.number for (uid, size), each in pairs if size and here[size] == there[size] == 1}


def _by_identity(
    inbox: Sequence[tuple[int, int]],
    listed: Sequence[Listed],
    found: Mapping[int, int],
    header_of: Callable[[int], bytes],
    session: _Session,
) -> dict[int, int]:
    """Message numbers by UID for what is not yet in ``found``."""
    numbers = set(found.values())
    there = dict(session.identities([each for each in listed if each.number not in numbers]))
    here = {uid: Identity.of(size, header_of(uid)) for uid, size in inbox if uid not in found}
    matched: dict[int, int] = {}
    for stage in range(3):
        mine, theirs = (_grouped(side, stage) for side in (here, there))
        for key, uids in mine.items():
            same = theirs.get(key, [])
            # The last stage: messages with one header are copies of one another, and in any order as good.
            if len(uids) == len(same) and (len(same) == 1 or stage == 2):
                for uid, number in zip(uids, same, strict=True):
                    matched[uid] = number
                    del here[uid], there[number]
    return matched


def _grouped(messages: Mapping[int, Identity], stage: int) -> dict[Hashable, list[int]]:
    """UIDs or numbers of the messages with one key."""
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for number, identity in messages.items():
        if (key := identity.keys()[stage]) is not None:
            groups[key].append(number)
    return groups


class _Session:
    """What is asked of a POP3 server."""

    def __init__(self, conversation: Conversation) -> None:
        self._conversation = conversation

    def begin(self, starttls: bool, name: str, password: Password | MasterLogin) -> None:
        self._answer("the greeting")
        if starttls:
            self._command(b"STLS")
            self._conversation.secure()
        if isinstance(password, MasterLogin):  # USER and PASS have no place for a second name
            self._command(b"AUTH PLAIN " + b64encode(plain(name, password)), shown="AUTH PLAIN")
            return
        self._command(b"USER " + _argument(name))
        self._command(b"PASS " + _argument(password.secret), shown="PASS")

    def listed(self) -> list[Listed]:
        """Every message, in the order of the numbers."""
        uidl_of = {int(found[1]): found[2].decode() for line in self._listing(b"UIDL") if (found := _UIDL.match(line))}
        sizes = {int(found[1]): int(found[2]) for line in self._listing(b"LIST") if (found := _SIZE.match(line))}
        numbers = sorted(uidl_of.keys() | sizes.keys())
        return [Listed(number, sizes.get(number), uidl_of.get(number, "")) for number in numbers]

    def identities(self, messages: Sequence[Listed]) -> Iterator[tuple[int, Identity]]:
        """What TOP says of them; those that it refuses, and those that come when the time is over, are left out."""
        batch = BATCH if self._offers_pipelining() else 1
        with suppress(LegacyUnavailable):
            for start in range(0, len(messages), batch):
                some = messages[start : start + batch]
                self._conversation.send(b"".join(b"TOP %d 0\r\n" % each.number for each in some))
                for each in some:
                    try:
                        self._answer("TOP")
                    except UidlsNotKnown:
                        continue
                    yield each.number, Identity.of(each.size or 0, self._header())

    def end(self) -> None:
        """Take leave; nothing depends on it any more."""
        with suppress(BasculeError):
            self._command(b"RSET")
            self._command(b"QUIT")

    def _offers_pipelining(self) -> bool:
        try:
            return any(line.split()[:1] == [b"PIPELINING"] for line in self._listing(b"CAPA"))
        except UidlsNotKnown:
            return False

    def _command(self, line: bytes, *, shown: str = "") -> None:
        self._conversation.send(line + b"\r\n")
        self._answer(shown or line.split()[0].decode())

    def _answer(self, to: str) -> None:
        line = self._conversation.line(MAX_LINE)
        if line.upper().startswith(b"+OK"):
            return
        text = "".join(letter if letter.isprintable() else "?" for letter in line.decode("ascii", "replace"))
        if _BUSY.match(line):
            raise LegacyBusy(f"POP3: the server says to {to}: {text[:200]}")
        raise UidlsNotKnown(f"the POP3 server says to {to}: {text[:200]}")

    def _listing(self, command: bytes) -> list[bytes]:
        self._command(command)
        lines: list[bytes] = []
        while (line := self._conversation.line(MAX_LINE + 1)) != b".":
            lines.append(line if len(line) <= MAX_LINE else b"")  # what was cut says nothing
            if len(lines) > MAX_MESSAGES:
                raise UidlsNotKnown(f"the POP3 server's answer to {command.decode()} has no end")
        return lines

    def _header(self) -> bytes:
        """The answer to TOP, as far as it is needed (RFC 1939 section 3: a dot before a dot)."""
        kept: list[bytes] = []
        size = 0
        while (line := self._conversation.line(MAX_HEADER)) != b".":
            if size < MAX_HEADER:
                kept.append(line.removeprefix(b".") if line.startswith(b"..") else line)
            size += len(line) + 1
        return b"\n".join(kept)


def _argument(text: str) -> bytes:
    """
    Raises:
        UidlsNotKnown: it would be taken for more than one line.
    """
    data = text.encode()
    if any(octet < 0x20 or octet == 0x7F for octet in data):
        raise UidlsNotKnown("POP3 cannot carry control characters in a name or password")
    return data
