"""A session with this host's own Dovecot, without a password, for mailboxes that are Dovecot's.

Dovecot's ``imap`` is run as a child with ``-u``: it looks the user up in the
userdb, so that whatever storage, separator and prefix the user has are as in
the user's own sessions, and greets with PREAUTH (Dovecot 2.3 manual,
"Pre-authenticated IMAP").
"""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bascule.address import Address
from bascule.errors import LocalUnavailable
from bascule.imap.pipeline import CommandRefused, Connection, Pipeline, capabilities
from bascule.imap.responses import printable
from bascule.imap.wire import DovecotHere, Wire
from bascule.imap.writer import Writer
from bascule.location import dovecot_settings
from bascule.migrator.witness import Witness, watching

LIBEXEC = Path("/usr/lib/dovecot")
PATIENCE = 30  # seconds
DEADLINE = 3600  # seconds for one doveadm: a first dsync of a large mailbox takes its time
NO_SUCH_USER = 68  # doveadm kick: nobody with that name is logged in


class Local:
    """Dovecot on this host, as the user that workers run as and mailboxes belong to."""

    def __init__(self, config_file: Path) -> None:
        self.config_file = config_file

    @contextmanager
    def open(self, address: Address, *, location: str | None = None) -> Iterator[Writer]:
        """A session of ``address``, for the ``with`` block; ``location`` is where it is, if not where Dovecot has it.

        Raises:
            LocalUnavailable
        """
        ours, theirs = socket.socketpair()
        with ours, theirs:
            end = theirs.fileno()
            process = subprocess.Popen(self._imap(address, location), stdin=end, stdout=end, stderr=subprocess.DEVNULL)
            theirs.close()
            pipeline = Pipeline(Wire(ours, DovecotHere(), silence=PATIENCE))
            try:
                try:
                    greeting = pipeline.greeting()
                    connection = Connection(pipeline, printable(greeting), capabilities(pipeline))
                except (LocalUnavailable, CommandRefused) as error:
                    raise LocalUnavailable(
                        f"Dovecot does not open the mailbox of {address} here", hint="See Dovecot's log."
                    ) from error
                yield Writer(connection)
            finally:
                pipeline.wire.close()
                try:
                    process.wait(PATIENCE)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()

    @contextmanager
    def witness(self, address: Address) -> Iterator[Witness]:
        """A session of ``address`` that only looks, for the ``with`` block.

        Raises:
            NotVerifiable
        """
        with watching(self._imap(address, None), "Dovecot here") as witness:
            yield witness

    def _imap(self, address: Address, location: str | None) -> list[str]:
        return [str(LIBEXEC / "imap"), "-c", str(self.config_file), *_override(location), "-u", str(address)]

    def end_sessions(self, address: Address) -> None:
        """End the user's sessions on this host.

        Raises:
            LocalUnavailable: Dovecot does not do it.
        """
        self.doveadm("kick", str(address), good=(0, NO_SUCH_USER))

    def doveadm(self, *arguments: str, location: str | None = None, good: tuple[int, ...] = (0,)) -> int:
        """Run doveadm; its exit status. ``location`` is where the mailbox is, if not where Dovecot has it.

        Raises:
            LocalUnavailable: it ends with a status that is not ``good``.
        """
        try:
            done = subprocess.run(
                ["doveadm", "-c", str(self.config_file), *_override(location), *arguments],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=False,
                timeout=DEADLINE,
            )
        except subprocess.TimeoutExpired as error:
            raise LocalUnavailable(
                f"doveadm {' '.join(arguments[:2])} did not end within {DEADLINE / 60:.0f} minutes",
                hint="Is Dovecot in order, and the disk? See Dovecot's log.",
            ) from error
        if done.returncode not in good:
            raise LocalUnavailable(
                f"doveadm {' '.join(arguments[:2])} failed: {done.stderr.strip()[-500:]}", hint="See Dovecot's log."
            )
        return done.returncode


def _override(location: str | None) -> list[str]:
    """Options of doveadm and imap. Dovecot 2.4 takes 2.3's, too, and does not heed them: the version must be known."""
    if location is None:
        return []
    version = subprocess.run(
        ["dovecot", "--version"], stdin=subprocess.DEVNULL, capture_output=True, check=True, timeout=PATIENCE
    ).stdout
    settings = dovecot_settings(location, version.decode())
    return [word for name, value in settings.items() for word in ("-o", f"{name}={value}")]
