"""The one place that each legacy folder has here: its own name, or the nearest that Dovecot can open.

A place is a path of names below the mailbox's root, in modified UTF-7 (RFC 3501
section 5.1.3). What Dovecot does not open was tried with Dovecot 2.3 and 2.4:
names that are not modified UTF-7, ``~`` at the head, INBOX below the prefix,
INBOX in another case as a parent, and the names that a Maildir or Dovecot
itself uses within a folder.
"""

from __future__ import annotations

import binascii
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256

from imapclient import imap_utf7

from bascule.imap.reader import Layout

MAX_PART = 220  # bytes of one name; a file system takes 255, and Dovecot writes its own beside it
MAX_PATH = 900  # bytes of all of them

#: Names that a Maildir, a dbox, Dovecot or bascule itself uses in a folder's directory.
_TAKEN = {"", ".", "..", "cur", "new", "tmp", "dbox-Mails"}
_TAKEN_HEADS = ("dovecot", "subscriptions", "maildirsize", "maildirfolder", ".bascule")
_SHIFTED = re.compile(r"&([A-Za-z0-9+,]*)-")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a legacy folder is here; no parts: INBOX. ``text`` is its legacy name for people."""

    parts: tuple[str, ...]
    text: str
    #: Whether a client sees another name than at the legacy server.
    is_renamed: bool = False

    def name(self, separator: str, prefix: str) -> str:
        """The folder's name here, as on the wire."""
        return prefix + separator.join(self.parts) if self.parts else "INBOX"


def places(
    folders: Iterable[tuple[str, str]], separator: str, prefix: str, renamed: Mapping[str, str] | None = None
) -> dict[str, Place]:
    """The place of each folder, by its name as on the wire.

    ``folders``: name and delimiter of each; an empty delimiter: the name is flat.
    ``renamed``: by name, what a folder is to be called instead; one that has that name by itself keeps it.
    ``separator`` and ``prefix`` are those of the mailbox here, which are the
    legacy server's. The result depends on the set of names only, not on their order.
    """
    proposed = {name: _proposed(name, delimiter, separator, prefix) for name, delimiter in folders}
    for name, other in (renamed or {}).items():
        place = _proposed(other, separator, separator, prefix)
        proposed[name] = Place(place.parts, readable(name), is_renamed=True)
    found: dict[str, Place] = {}
    taken: set[tuple[str, ...]] = set()
    # Who can keep the name comes first, so that nobody else gets it.
    for name in sorted(proposed, key=lambda each: (proposed[each].is_renamed, each)):
        place = proposed[name]
        number = 1
        parts = place.parts
        while parts in taken:
            number += 1
            parts = (*place.parts[:-1], f"{place.parts[-1] if place.parts else 'INBOX'}-{number}")
        taken.add(parts)
        found[name] = Place(parts, place.text, is_renamed=place.is_renamed or number > 1)
    return found


def of_layout(layout: Layout, renamed: Mapping[str, str] | None = None) -> dict[str, Place]:
    """The place of each folder of a legacy mailbox, which keeps its separator and prefix here."""
    folders = ((folder.name, folder.delimiter) for folder in layout.folders)
    return places(folders, layout.separator, layout.prefix, renamed)


def place_of(name: str, known: Mapping[str, Place], delimiter: str, separator: str, prefix: str) -> Place:
    """The place of a folder that need not be among ``known``: a subscription may outlive its folder."""
    return known.get(name) or _proposed(name, delimiter, separator, prefix)


def readable(name: str) -> str:
    """A folder's name as on the wire, for people."""
    raw = name.encode("utf-8", "surrogateescape")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        text = raw.decode("latin-1")
    return _SHIFTED.sub(_unshifted, text)


def _unshifted(match: re.Match[str]) -> str:
    """What a shifted sequence stands for; itself, if it is not one."""
    if not match[1]:
        return "&"
    try:
        code = binascii.a2b_base64(match[1].replace(",", "/") + "=" * (-len(match[1]) % 4))
        return code.decode("utf-16-be")
    except (binascii.Error, UnicodeDecodeError):
        return match[0]


def _proposed(name: str, delimiter: str, separator: str, prefix: str) -> Place:
    if name.upper() == "INBOX":
        return Place((), "INBOX")
    text = readable(name)
    within, expected = name, name
    if prefix and name.lower().startswith(prefix.lower()) and len(name) > len(prefix):
        within = name[len(prefix) :]
    raw = within.split(delimiter) if delimiter else [within]
    parts = _shortened([_storable(part, separator) for part in raw], name)
    # Below a prefix INBOX is the mailbox's own INBOX once more; without one it is the parent of what is in it.
    # In any case: dsync takes it for INBOX.
    if len(parts) == 1 and parts[0].upper() == "INBOX":
        parts = [parts[0] + "_"]
    elif not prefix and parts[0].upper() == "INBOX":
        parts[0] = "INBOX"
    elif parts[0].startswith("~"):
        parts[0] = "_" + parts[0]
    place = Place(tuple(parts), text)
    return Place(place.parts, text, is_renamed=place.name(separator, prefix) != expected)


def _storable(part: str, separator: str) -> str:
    """One name of the path, in modified UTF-7 as Dovecot writes it."""
    text = "".join(
        "_" if letter < " " or letter in {"\x7f", "/", separator} or "\ud800" <= letter <= "\udfff" else letter
        for letter in readable(part)
    )
    if text in _TAKEN:
        text += "_"
    elif text.lower().startswith(_TAKEN_HEADS):
        text = "_" + text
    encoded: str = imap_utf7.encode(text).decode("ascii")
    if len(encoded) <= MAX_PART:
        return encoded
    tail = "-" + sha256(part.encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return next(each for each in _heads(text) if len(each) <= MAX_PART - len(tail)) + tail


def _heads(text: str) -> Iterator[str]:
    """A text in modified UTF-7, shorter and shorter."""
    for length in range(len(text), -1, -1):
        yield imap_utf7.encode(text[:length]).decode("ascii")


def _shortened(parts: list[str], name: str) -> list[str]:
    """A path that the file system takes: what is too deep ends in one name."""
    if sum(map(len, parts)) + len(parts) <= MAX_PATH:
        return parts
    kept: list[str] = []
    while parts and sum(map(len, kept)) + len(kept) + len(parts[0]) < MAX_PATH - MAX_PART:
        kept.append(parts.pop(0))
    return [*kept, "deep-" + sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:16]]
