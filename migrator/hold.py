"""Holding a mailbox's mail and logins while its last changes are written, at a cutover and at a return."""

from __future__ import annotations

import time
from collections.abc import Callable

import psycopg

from bascule.database import translated
from bascule.errors import BasculeError
from bascule.migrator.acts import Acts

NODE_HINT = (
    "Is that part in order? See its log there. If its host is gone for good: "
    "bascule psql, SELECT forget_node('HOST', 'PART', 'why')."
)
MARGIN = 5.0  # seconds of the budget that must be left for what follows


class NotAcknowledged(BasculeError):
    """A live node has not put the hold into force in time; it is undone."""


def await_acknowledgements(acts: Acts, mailbox_id: int, epoch: int) -> None:
    """Return when every live node has acknowledged ``epoch``.

    Raises:
        NotAcknowledged
    """
    acts.listen(wanted=True)
    deadline = time.monotonic() + acts.seconds_left(mailbox_id) - MARGIN
    while waiting := acts.unacknowledged(mailbox_id, epoch):
        if time.monotonic() > deadline:
            names = ", ".join(f"{part} on {node}" for part, node in waiting)
            raise NotAcknowledged(f"not acknowledged in time by: {names}", hint=NODE_HINT)
        acts.wait_for_acknowledgement(1)
    acts.listen(wanted=False)


def undo(act: Callable[[int, str], None], mailbox_id: int, error: BaseException) -> None:
    """Take back, by ``act``, a cutover or a return for which ``error`` is the reason."""
    if isinstance(error, psycopg.OperationalError):
        return  # the database is away; a policy daemon undoes it when its time is over
    if isinstance(error, psycopg.Error):
        error = translated(error)
    act(mailbox_id, error.message if isinstance(error, BasculeError) else type(error).__name__)
