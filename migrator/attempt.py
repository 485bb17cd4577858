"""One attempt at one mailbox: everything that copying, sweeping or returning it needs, as one value."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bascule.credential import Password, Unsealer
from bascule.errors import BasculeError
from bascule.legacy import Trust
from bascule.migrator.account import Account
from bascule.migrator.acts import Acts
from bascule.migrator.letters import Letters
from bascule.migrator.local import Local
from bascule.migrator.sessions import Sessions
from bascule.migrator.storage import Storage


class InUse(BasculeError):
    """Another worker is at this mailbox. Temporary."""


class HomeGone(BasculeError):
    """The home of a user who has moved is not where it was."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """``account`` was read under the mailbox's lock: no other worker changes it meanwhile."""

    acts: Acts
    account: Account
    #: The mailbox's home directory on this host.
    home: Path
    storage: Storage
    #: This host's Dovecot.
    local: Local
    #: Sessions at the legacy server.
    sessions: Sessions
    letters: Letters
    trust: Trust
    unsealer: Unsealer

    def password(self) -> Password:
        """The user's password.

        Raises:
            CannotUnseal, BasculeError: there is none that this worker can open.
        """
        return self.account.password(self.unsealer)

    def proved_password(self) -> Password | None:
        """The same; None: the mailbox moves on an administrator's word, and its user has given none.

        Raises:
            CannotUnseal, BasculeError: as :meth:`password`.
        """
        if self.account.on_word and self.account.sealed_credential is None:
            return None
        return self.password()


@contextmanager
def exclusively(home: Path, *, has_moved: bool = False) -> Iterator[None]:
    """Be the only worker at a mailbox on this host; the kernel ends it with the process.

    ``has_moved``: the home must be there, and is not made if its file system is not mounted.

    Raises:
        InUse, HomeGone
    """
    if has_moved and not home.is_dir():
        raise HomeGone(
            f"{home} is not there",
            hint="Is its file system mounted? Nothing is done with the mailbox until it is back.",
        )
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(home / ".bascule.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InUse(f"another worker is at {home}") from error
        yield
    finally:
        os.close(descriptor)
