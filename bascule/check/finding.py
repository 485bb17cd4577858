"""One thing that was looked at, in words for the operator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

#: good: as it must be; note: the migration works, but know it; wrong: correct it first.
Level = Literal["good", "note", "wrong"]

Area = Literal["IMAP", "SMTP", "DNS", "Postfix", "Dovecot", "bascule"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found. ``remedy`` says what to do, and is empty where there is nothing to do.

    ``name`` is that of the check (:mod:`bascule.check.registry`).
    """

    level: Level
    area: Area
    text: str
    remedy: str = ""
    name: str = ""


@dataclass(frozen=True, slots=True)
class Said:
    """A finding before its check has put its name and area to it."""

    level: Level
    text: str
    remedy: str = ""


def first(names: Sequence[str], most: int) -> str:
    """So many of the names, and how many more there are."""
    named = ", ".join(names[:most])
    return named if len(names) <= most else f"{named} and {len(names) - most} more"


def good(text: str) -> Said:
    """It is as it must be."""
    return Said("good", text)


def note(text: str, remedy: str = "") -> Said:
    """The migration works, but the operator is to know it."""
    return Said("note", text, remedy)


def wrong(text: str, remedy: str) -> Said:
    """It is to be corrected first."""
    return Said("wrong", text, remedy)
