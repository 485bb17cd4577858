"""From a request to the flip: copy until little changes, hold the mail, copy the rest, verify, flip."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import psycopg

from bascule import log
from bascule.credential import Unsealer
from bascule.database import Connection, translated, value
from bascule.errors import BasculeError
from bascule.legacy import Trust, authenticate, imap_session
from bascule.migrator.account import Account
from bascule.migrator.copying import Progress, run_pass
from bascule.migrator.source import Source
from bascule.migrator.verification import verify

SMALL_PASS = 20  # changes; the final pass, while mail is held, will be about as large
MAX_PASSES = 20  # a mailbox that never comes to rest is cut over after so many
PROGRESS_INTERVAL = 0.5  # seconds between reports to the database
MARGIN = 5.0  # seconds of the budget that must be left for verification and flip


class NotAcknowledged(BasculeError):
    """A live node has not put the cutover into force in time; the cutover is undone."""


def migrate(connection: Connection, account: Account, root: Path, trust: Trust, unsealer: Unsealer) -> None:
    """Take a requested mailbox to state local, or raise having left it in state copying.

    Raises:
        BasculeError, OSError: why it did not come to the flip. What was copied is kept.
    """
    logger = log.get().bind(address=str(account.address))
    if account.state == "cutover":
        connection.execute("SELECT bascule.undo_cutover(%s, 'its worker died')", (account.id,))
    connection.execute("SELECT bascule.begin_copy(%s)", (account.id,))
    password = account.password(unsealer)
    report = _reporter(connection, account.id)
    with imap_session(account.legacy, trust, account.address, password) as client:
        source = Source(client)
        for number in range(1, MAX_PASSES + 1):
            changes = run_pass(source, root, report, count=number == 1).changes
            logger.info("pass done", number=number, changes=changes)
            if changes <= SMALL_PASS:
                break
        # The copy may have taken hours: is this still the user's password? It will be the one here.
        authenticate(account.legacy, trust, account.address, password)
        hashed = password.hashed()  # costly on purpose, so before the mail is held
        epoch = int(value(connection, "SELECT bascule.begin_cutover(%s)", account.id))
        began = time.monotonic()
        try:
            _await_acknowledgements(connection, account.id, epoch)
            final = run_pass(source, root, report)
            verification = verify(source, root, final)
            connection.execute(
                "SELECT bascule.finish_cutover(%s, %s, %s, %s)",
                (account.id, epoch, hashed, json.dumps(verification.report())),
            )
        except BaseException as error:
            _undo(connection, account, error)
            raise
        logger.info("flipped", changes=final.changes, held_ms=round((time.monotonic() - began) * 1000))


def _undo(connection: Connection, account: Account, error: BaseException) -> None:
    if isinstance(error, psycopg.OperationalError):
        return  # the database is away; a policy daemon undoes the cutover when its time is over
    if isinstance(error, psycopg.Error):
        error = translated(error)
    reason = error.message if isinstance(error, BasculeError) else type(error).__name__
    connection.execute("SELECT bascule.undo_cutover(%s, %s)", (account.id, reason))


def _await_acknowledgements(connection: Connection, mailbox_id: int, epoch: int) -> None:
    """Return when every live node has acknowledged ``epoch``.

    Raises:
        NotAcknowledged
    """
    connection.execute("LISTEN bascule_acknowledgement")
    deadline = (
        time.monotonic()
        + float(
            value(
                connection,
                "SELECT extract(epoch FROM cutover_deadline - clock_timestamp()) FROM bascule.mailbox WHERE id = %s",
                mailbox_id,
            )
            or 0
        )
        - MARGIN
    )
    while waiting := connection.execute(
        "SELECT part, node FROM bascule.unacknowledged(%s, %s)", (mailbox_id, epoch)
    ).fetchall():
        if time.monotonic() > deadline:
            names = ", ".join(f"{part} on {node}" for part, node in waiting)
            raise NotAcknowledged(f"not acknowledged in time by: {names}", hint="Is that part in order? See its log.")
        list(connection.notifies(timeout=1, stop_after=1))
    connection.execute("UNLISTEN bascule_acknowledgement")


def _reporter(connection: Connection, mailbox_id: int) -> Callable[[Progress], None]:
    last = 0.0

    def report(progress: Progress) -> None:
        nonlocal last
        now = time.monotonic()
        if progress.copied < progress.total and now - last < PROGRESS_INTERVAL:
            return
        last = now
        connection.execute(
            "SELECT bascule.report_progress(%s, %s, %s, %s)",
            (mailbox_id, progress.copied, progress.total, progress.bytes),
        )

    return report
