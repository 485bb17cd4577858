"""What a worker knows of one mailbox, as one value."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from bascule import legacy
from bascule.address import Address
from bascule.credential import Password, Unsealer
from bascule.database import Connection
from bascule.directory import Mode, State
from bascule.errors import BasculeError
from bascule.language import Language
from bascule.legacy import CopyLogin, LegacySettings


class InUse(BasculeError):
    """Another worker is at this mailbox. Temporary."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What workers may ask of a domain's legacy server: sessions in all and for one mailbox, bytes a second."""

    connections: int
    per_mailbox: int
    bytes_per_second: int | None


@dataclass(frozen=True, slots=True)
class Account:
    id: int
    address: Address
    #: Below mail_root.
    home: str
    state: State
    epoch: int
    domain_mode: Mode
    legacy: LegacySettings
    sealed_credential: bytes | None
    domain_id: int
    limits: Limits
    copy_login: CopyLogin
    sealed_copy_login: bytes | None
    return_requested: bool
    migrated_at: datetime | None
    last_message_at: datetime | None
    paused: bool
    language: Language
    #: Whether the welcome is still to be written.
    to_be_welcomed: bool
    #: The secret part of the users' URL, while the domain is active.
    url_token: str | None

    def password(self, unsealer: Unsealer) -> Password:
        """
        Raises:
            CannotUnseal, BasculeError: there is none that this worker can open.
        """
        if self.sealed_credential is None:
            raise BasculeError(f"no password is stored for {self.address}", hint="Request the migration again.")
        return unsealer.unseal(self.sealed_credential)


def load(connection: Connection, mailbox_id: int) -> Account | None:
    """The mailbox with this id, or None if it was removed."""
    columns = ", ".join(f"domain.{name.strip()}" for name in legacy.COLUMNS.split(","))
    row = connection.execute(
        f"SELECT mailbox.local_part, bascule.home_of(domain.name, mailbox.local_part), mailbox.state, "
        f"mailbox.epoch, domain.mode, mailbox.sealed_credential, domain.id, domain.connections, "
        f"domain.connections_per_mailbox, domain.bytes_per_second, domain.copy_login, domain.sealed_copy_login, "
        f"mailbox.return_requested_at IS NOT NULL, mailbox.migrated_at, mailbox.last_message_at, "
        f"mailbox.paused_at IS NOT NULL OR domain.paused_at IS NOT NULL, coalesce(mailbox.language, domain.language), "
        f"domain.writes_to_users AND mailbox.welcomed_at IS NULL, domain.url_token, "
        f"{columns} FROM bascule.mailbox "
        f"JOIN bascule.domain ON domain.id = mailbox.domain_id WHERE mailbox.id = %s".encode(),
        (mailbox_id,),
    ).fetchone()
    if row is None:
        return None
    local_part, home, state, epoch, mode, sealed, domain_id, connections, per_mailbox, rate, *rest = row
    copy_login, sealed_copy_login, return_requested, migrated_at, last_message_at, *rest = rest
    paused, language, to_be_welcomed, url_token, *settings = rest
    return Account(
        mailbox_id,
        Address(local_part, settings[0]),
        home,
        state,
        epoch,
        mode,
        legacy.from_row(*settings),
        sealed,
        domain_id,
        Limits(connections, per_mailbox, rate),
        copy_login,
        sealed_copy_login,
        return_requested,
        migrated_at,
        last_message_at,
        paused,
        language,
        to_be_welcomed,
        url_token,
    )


def waived_of(connection: Connection, mailbox_id: int) -> frozenset[tuple[str, int, int]]:
    """Folder, UIDVALIDITY and UID of the messages that need not come, as an administrator decided."""
    rows = connection.execute(
        "SELECT folder, uidvalidity, uid FROM bascule.unreadable_message "
        "WHERE mailbox_id = %s AND waived_at IS NOT NULL",
        (mailbox_id,),
    ).fetchall()
    return frozenset((folder, uidvalidity, uid) for folder, uidvalidity, uid in rows)


def flipped_folders(connection: Connection, mailbox_id: int) -> dict[str, tuple[int, int]]:
    """UIDVALIDITY and UIDNEXT of each legacy folder, by name, as the final pass saw them."""
    rows = connection.execute(
        "SELECT name, uidvalidity, uidnext FROM bascule.mailbox_folder WHERE mailbox_id = %s", (mailbox_id,)
    ).fetchall()
    return {name: (uidvalidity, uidnext) for name, uidvalidity, uidnext in rows}


@contextmanager
def exclusively(home: Path) -> Iterator[None]:
    """Be the only worker at a mailbox on this host; the kernel ends it with the process.

    Raises:
        InUse
    """
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
