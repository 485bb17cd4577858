"""One thing that was tried, in words for the operator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

#: good: as it must be; note: the migration works, but know it; wrong: correct it first.
Level = Literal["good", "note", "wrong"]

Area = Literal["IMAP", "SMTP", "DNS", "Postfix", "Dovecot", "bascule"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found. ``remedy`` says what to do, and is empty where there is nothing to do."""

    level: Level
    area: Area
    text: str
    remedy: str = ""
