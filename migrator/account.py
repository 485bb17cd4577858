"""What a worker knows of one mailbox, as one value."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from bascule.address import Address
from bascule.credential import Password, Unsealer
from bascule.directory import Mode, State
from bascule.errors import BasculeError
from bascule.language import Language
from bascule.legacy import CopyLogin, LegacySettings


@dataclass(frozen=True, slots=True)
class Limits:
    """What workers may ask of a domain's legacy server: sessions in all and for one mailbox, bytes a second."""

    connections: int
    per_mailbox: int
    bytes_per_second: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """A row of ``mailbox`` with what its domain says of it, as it was when it was read."""

    id: int
    address: Address
    #: Below mail_root.
    home: str
    state: State
    epoch: int
    domain_mode: Mode
    legacy: LegacySettings
    sealed_credential: bytes | None
    #: Whether the user's new password is waited for.
    needs_credential: bool
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
    #: Whether an administrator decides where something cannot be kept as it is.
    waits_on_difference: bool
    #: It moves on an administrator's word, with or without the user's password.
    on_word: bool = False
    #: A hash was brought from the legacy side, which is in force if no password is proved.
    has_imported_hash: bool = False
    #: It flips though nobody could log in then but by asking the legacy server.
    without_password: bool = False
    #: Its hour to flip had not come when this was read.
    flips_later: bool = False
    #: It was complete here before, but for the flip.
    staged: bool = False

    def password(self, unsealer: Unsealer) -> Password:
        """
        Raises:
            CannotUnseal, BasculeError: there is none that this worker can open.
        """
        if self.sealed_credential is None:
            hint = "Request the migration again."
            if self.on_word:
                hint = (
                    "It moves on an administrator's word, for which workers need a login of their own there: "
                    "bascule copy-login master. Or give the password: bascule request."
                )
            raise BasculeError(f"no password is stored for {self.address}", hint=hint)
        return unsealer.unseal(self.sealed_credential)
