"""The page's wrong passwords, to authenticators and other pages, and theirs to it; never in the way of a form."""

from __future__ import annotations

import threading

from bascule import log
from bascule.attempts import Attempts
from bascule.database import Pool, value
from bascule.errors import BasculeError
from bascule.guesses import INTERVAL, QUERY, Exchange


class Sharing:
    """Without the database, the page counts by itself; what it counted is told once the database is back."""

    def __init__(self, attempts: Attempts, database: Pool, *, node: str) -> None:
        self._attempts = attempts
        self._database = database
        self._exchange = Exchange(attempts, node)
        self._works = True
        self._once = threading.Lock()

    def start(self) -> None:
        """Share in a thread of its own, as long as the process lives."""
        threading.Thread(target=self._run, name="sharing", daemon=True).start()

    def _run(self) -> None:
        never = threading.Event()
        while not never.wait(INTERVAL):
            self.once()

    def once(self) -> None:
        """Tell and hear now."""
        with self._once:
            guesses, _ = self._attempts.untold()  # where people come from is the authenticators' to say
            try:
                with self._database.connection() as connection:
                    rows = connection.execute(QUERY.encode(), self._exchange.parameters(guesses)).fetchall()
            except BasculeError as error:
                self._attempts.told_not(guesses, ())
                if self._works:
                    log.get().warning("guesses are not shared now", reason=error.message)
                self._works = False
                return
            self._works = True
            self._exchange.hear(rows)

    def comes_from_home(self, address: str, site: str) -> bool:
        """Whether a user logged in from there within a day, as the authenticators have seen; if in doubt not."""
        try:
            with self._database.connection() as connection:
                return bool(value(connection, "SELECT bascule.logged_in_from(%s, %s)", address, site))
        except BasculeError:
            return False
