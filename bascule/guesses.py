"""Wrong passwords, from one running instance to the others, through PostgreSQL: authenticators and users' pages."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Sequence
from typing import Any

from bascule.attempts import Attempts, Kind

INTERVAL = 2.0  # seconds between two exchanges

#: What the question's parameters are, and what its rows are; see schema/functions/logins.sql.
QUERY = "SELECT id, kind, subject, guesses FROM bascule.share_guesses(%s, %s, %s)"


class Exchange:
    """One instance's part in it. The first time all of the last ten minutes is heard: also what this host's own
    process counted before it was started anew."""

    def __init__(self, attempts: Attempts, node: str) -> None:
        self._attempts = attempts
        self._instance = f"{node}/{secrets.token_hex(8)}"
        self._after = 0

    def parameters(self, guesses: Iterable[tuple[Kind, str, int]]) -> tuple[object, ...]:
        """Of :data:`QUERY`, to tell the others these guesses (kind, subject, number)."""
        told = json.dumps([{"kind": kind, "subject": subject, "guesses": number} for kind, subject, number in guesses])
        return self._instance, self._after, told

    def hear(self, rows: Sequence[Sequence[Any]]) -> None:
        """Take up what :data:`QUERY` answered."""
        self._attempts.hear(((row[1], row[2], row[3]) for row in rows), ())
        self._after = max([self._after, *(row[0] for row in rows)])
