"""How a run tells what it does, and insists on what must hold."""

from __future__ import annotations

import time

from bascule.lab.process import LabError


class Telling:
    """What the plays of the lab have in common: lines with the time since the beginning."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def tell(self, text: str) -> None:
        print(f"[{time.monotonic() - self._began:6.1f} s] {text}", flush=True)

    def show(self, text: str) -> None:
        print("\n".join(f"           | {line}" for line in text.strip("\n").splitlines()), flush=True)

    def insist(self, holds: object, what: str) -> None:
        """
        Raises:
            LabError: it does not hold.
        """
        if not holds:
            raise LabError(f"this must hold and does not: {what}")
