"""Words that others chose, made fit for a terminal: a server's replies, names of folders, what an error quotes."""

from __future__ import annotations

import unicodedata

#: Control characters, and those that turn the direction of writing or are not seen (Unicode, general category):
#: an escape sequence could write over what stands above it, and a command could be other than what is read.
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
MOST = 2000  # characters; what a server says in one line is a reason, not a book


def printable(text: str) -> str:
    """``text`` in one line, with every character that is not seen as it is written replaced by its escape (``\\x1b``).

    What is longer than ``MOST`` is cut off, and says so.
    """
    seen = "".join(_escaped(character) for character in text[:MOST])
    return seen if len(text) <= MOST else f"{seen} ... ({len(text) - MOST} more characters)"


def printable_lines(text: str) -> str:
    """:func:`printable` for each line of a text of ours that has several."""
    return "\n".join(printable(line) for line in text.split("\n"))


def _escaped(character: str) -> str:
    if unicodedata.category(character) not in _HIDDEN:
        return character
    return character.encode("unicode_escape").decode()
