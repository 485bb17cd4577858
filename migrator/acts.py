"""What a worker may do in the database: one method for each function of the schema, and for each question.

No other module of the migrator holds SQL. Errors of the database come as they
are, as ``psycopg.Error``; :func:`bascule.database.translated` says what they mean.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from psycopg.rows import dict_row

from bascule import legacy
from bascule.address import Address
from bascule.database import Connection, value
from bascule.imap.folder_rules import FolderRule
from bascule.migrator.account import Account, Limits

#: Folder, UIDVALIDITY and UID of a message at the legacy server.
Identity = tuple[str, int, int]

_LEGACY = tuple(name.strip() for name in legacy.COLUMNS.split(","))
_ACCOUNT = f"""
SELECT mailbox.id, mailbox.local_part, bascule.home_of(domain.name, mailbox.local_part) AS home, mailbox.state,
       mailbox.epoch, domain.mode AS domain_mode, mailbox.sealed_credential,
       mailbox.needs_credential, domain.id AS domain_id, domain.connections,
       domain.connections_per_mailbox, domain.bytes_per_second, domain.copy_login, domain.sealed_copy_login,
       mailbox.return_requested_at IS NOT NULL AS return_requested, mailbox.migrated_at, mailbox.last_message_at,
       mailbox.paused_at IS NOT NULL OR domain.paused_at IS NOT NULL AS paused,
       coalesce(mailbox.language, domain.language) AS language,
       domain.writes_to_users AND mailbox.welcomed_at IS NULL AS to_be_welcomed, domain.url_token,
       domain.on_difference = 'wait' AS waits_on_difference,
       mailbox.proof = 'word' AS on_word, mailbox.imported_hash IS NOT NULL AS has_imported_hash,
       mailbox.without_password, mailbox.staged_at IS NOT NULL AS staged,
       coalesce(mailbox.flip_at > clock_timestamp(), false) AS flips_later, mailbox.legacy_login,
       {", ".join(f"domain.{name}" for name in _LEGACY)}
  FROM bascule.mailbox JOIN bascule.domain ON domain.id = mailbox.domain_id
 WHERE mailbox.id = %s"""
_WAITING = (
    "SELECT mailbox.id FROM bascule.mailbox JOIN bascule.domain ON domain.id = mailbox.domain_id "
    "WHERE mailbox.needs_credential AND mailbox.trouble_told_at IS NULL "
    "AND mailbox.state IN ('requested', 'copying') AND domain.writes_to_users AND domain.mode = 'active'"
)

_FIRST_LOGINS = (
    "SELECT mailbox.id FROM bascule.mailbox JOIN bascule.domain ON domain.id = mailbox.domain_id "
    "WHERE mailbox.first_login_at IS NOT NULL AND mailbox.first_login_told_at IS NULL "
    "AND mailbox.first_login_declined_at IS NULL AND domain.writes_to_users AND domain.mode = 'active'"
)


@dataclass(frozen=True, slots=True)
class Straggler:
    """A row of ``straggler``: a message that came late to the legacy mailbox, and was staged or brought here."""

    folder: str
    uidvalidity: int
    uid: int
    delivered: bool
    #: Empty where it is not known.
    message_id: str = ""
    #: SHA-256 of its bytes; None where it is not known.
    digest: bytes | None = None
    #: Seconds since 1970; None where it is not known.
    internaldate: int | None = None
    flags: Sequence[str] = ()
    #: The name of its file; empty: as former versions made it.
    name: str = ""
    #: The folder here that it was put into, and what Dovecot calls it; empty where it is not known.
    place: str = ""
    guid: str = ""

    @property
    def identity(self) -> Identity:
        return (self.folder, self.uidvalidity, self.uid)


@dataclass(frozen=True, slots=True)
class Note:
    """A row of ``returned_message``: a message of this side that a return appends at the legacy server."""

    folder: str
    uid: int
    guid: str
    digest: bytes
    legacy_uidnext: int
    legacy_uid: int | None = None
    legacy_uidvalidity: int | None = None
    internaldate: int | None = None
    message_id: str = ""
    #: The server said OK to the APPEND.
    appended: bool = False


class Acts:
    """The acts of one worker's connection, used by one thread. ``stopping``: set when the worker is to end."""

    def __init__(self, connection: Connection, stopping: threading.Event | None = None) -> None:
        self._connection = connection
        self._stopping = stopping or threading.Event()

    # Questions ------------------------------------------------------------------

    @property
    def is_connected(self) -> bool:
        """Whether the database can still be asked on this connection."""
        return not self._connection.broken

    def now(self) -> datetime:
        """The database's clock."""
        found: datetime = self._value("SELECT clock_timestamp()")
        return found

    def account(self, mailbox_id: int) -> Account | None:
        """The mailbox with this id, or None if it was removed."""
        with self._connection.cursor(row_factory=dict_row) as cursor:
            row = cursor.execute(_ACCOUNT.encode(), (mailbox_id,)).fetchone()
        if row is None:
            return None
        settings = legacy.from_row(*(row.pop(name) for name in _LEGACY)).known_as(row.pop("legacy_login"))
        limits = Limits(row.pop("connections"), row.pop("connections_per_mailbox"), row.pop("bytes_per_second"))
        address = Address(row.pop("local_part"), settings.domain)
        return Account(address=address, legacy=settings, limits=limits, **row)

    def waived_messages(self, mailbox_id: int) -> frozenset[Identity]:
        """The messages that need not come, as an administrator decided."""
        rows = self._rows(
            "SELECT folder, uidvalidity, uid FROM bascule.unreadable_message "
            "WHERE mailbox_id = %s AND waived_at IS NOT NULL",
            mailbox_id,
        )
        return frozenset((folder, uidvalidity, uid) for folder, uidvalidity, uid in rows)

    def waived_folders(self, mailbox_id: int) -> frozenset[str]:
        """The legacy folders that need not come, as an administrator decided."""
        rows = self._rows(
            "SELECT folder FROM bascule.unreadable_folder WHERE mailbox_id = %s AND waived_at IS NOT NULL", mailbox_id
        )
        return frozenset(folder for (folder,) in rows)

    def folder_rules(self, domain_id: int) -> list[FolderRule]:
        """Which folders of a domain's mailboxes come along, and how."""
        rows = self._rows(
            "SELECT kind, folder, action, name_here, special_use_here FROM bascule.folder_rule "
            "WHERE domain_id = %s ORDER BY id",
            domain_id,
        )
        return [FolderRule(*row) for row in rows]

    def rules_at_flip(self, mailbox_id: int) -> list[FolderRule]:
        """The rules by which a mailbox was copied that has moved."""
        found = self._value(
            "SELECT report -> 'folder_rules' FROM bascule.verification WHERE mailbox_id = %s", mailbox_id
        )
        return [FolderRule(**each) for each in found or []]

    def once_at_flip(self, mailbox_id: int) -> str:
        """The legacy folder of a mailbox that has moved whose messages came where they are in no other, or empty."""
        found = self._value("SELECT report ->> 'once' FROM bascule.verification WHERE mailbox_id = %s", mailbox_id)
        return str(found or "")

    def left_out_folders(self, mailbox_id: int) -> frozenset[str]:
        """The legacy folders that a rule leaves out."""
        rows = self._rows("SELECT folder FROM bascule.left_out_folder WHERE mailbox_id = %s", mailbox_id)
        return frozenset(folder for (folder,) in rows)

    def set_left_out(self, mailbox_id: int, folders: Sequence[Mapping[str, object]], *, complete: bool) -> None:
        """Record folders that a rule leaves out: name, reason, messages or None; ``complete``: there are no others."""
        self._do("SELECT bascule.set_left_out(%s, %s, %s)", mailbox_id, _json(list(folders)), complete)

    def flipped_folders(self, mailbox_id: int) -> dict[str, tuple[int, int]]:
        """UIDVALIDITY and UIDNEXT of each legacy folder, by name, as the final pass saw them."""
        rows = self._rows(
            "SELECT name, uidvalidity, uidnext FROM bascule.mailbox_folder WHERE mailbox_id = %s", mailbox_id
        )
        return {name: (uidvalidity, uidnext) for name, uidvalidity, uidnext in rows}

    def stragglers(self, mailbox_id: int) -> list[Straggler]:
        """All messages of a mailbox that came late."""
        rows = self._rows(
            "SELECT folder, uidvalidity, uid, delivered_at IS NOT NULL, message_id, digest, internaldate, flags, name, "
            "place, guid FROM bascule.straggler WHERE mailbox_id = %s",
            mailbox_id,
        )
        return [Straggler(*row) for row in rows]

    def notes(self, mailbox_id: int) -> list[Note]:
        """All messages that a return of this mailbox has appended, or was about to."""
        rows = self._rows(
            "SELECT folder, uid, guid, digest, legacy_uidnext, legacy_uid, legacy_uidvalidity, internaldate, "
            "message_id, appended_at IS NOT NULL FROM bascule.returned_message WHERE mailbox_id = %s",
            mailbox_id,
        )
        return [Note(*row) for row in rows]

    def return_is_wanted(self, mailbox_id: int) -> tuple[bool, bool]:
        """Whether a return is requested, and whether by force."""
        rows = self._rows(
            "SELECT return_requested_at IS NOT NULL, return_forced FROM bascule.mailbox WHERE id = %s", mailbox_id
        )
        return next(iter(rows), (False, False))

    def take_connections(self, domain_id: int, wanted: int) -> int:
        """Reserve sessions at a legacy server until this connection ends; how many were free, at most ``wanted``."""
        return int(self._value("SELECT bascule.take_connections(%s, %s)", domain_id, wanted))

    # The copy -------------------------------------------------------------------

    def begin_copy(self, mailbox_id: int) -> None:
        """
        Raises:
            psycopg.Error: (BA002) it is not to be copied any more.
        """
        self._do("SELECT bascule.begin_copy(%s)", mailbox_id)

    def report_progress(self, mailbox_id: int, copied: int, total: int, size: int) -> bool:
        """Record how far a copy is, in messages and bytes; whether it is to go on.

        While the worker ends, only what is already held is finished.
        """
        goes_on = self._value("SELECT bascule.report_progress(%s, %s, %s, %s)", mailbox_id, copied, total, size)
        if goes_on and self._stopping.is_set():
            goes_on = self._value("SELECT state = 'cutover' FROM bascule.mailbox WHERE id = %s", mailbox_id)
        return bool(goes_on)

    def set_unreadable(self, mailbox_id: int, messages: Sequence[Mapping[str, object]], *, complete: bool) -> None:
        """Record messages that the legacy server does not give; ``complete``: there are no others."""
        self._do("SELECT bascule.set_unreadable(%s, %s, %s)", mailbox_id, _json(list(messages)), complete)

    def set_unreadable_folders(self, mailbox_id: int, reasons: Mapping[str, str]) -> None:
        """Record the folders that cannot be opened or stored, each with the reason; there are no others."""
        self._do("SELECT bascule.set_unreadable_folders(%s, %s)", mailbox_id, _json(dict(reasons)))

    def set_hierarchy(self, mailbox_id: int, separator: str, prefix: str, special_uses: Mapping[str, str]) -> None:
        """Record how folder names are written, and the name of the folder of each special use."""
        self._do(
            "SELECT bascule.set_hierarchy(%s, %s, %s, %s)",
            mailbox_id,
            separator,
            prefix,
            json.dumps(dict(special_uses)),
        )

    def attempt_failed(
        self,
        mailbox_id: int,
        message: str,
        *,
        refused: bool = False,
        at_least: float = 0,
        advice: str = "",
        passes: bool = False,
    ) -> None:
        """Record a failure and queue the next attempt, ``at_least`` seconds from now.

        ``refused``: there is none until the user's new password is known.
        ``passes``: the trouble ends by itself, so that without ``advice`` there is nothing to do.
        """
        self._do(
            "SELECT bascule.attempt_failed(%s, %s, %s, make_interval(secs => %s), %s, %s)",
            mailbox_id, _storable(message), refused, at_least, _storable(advice), passes,
        )  # fmt: skip

    def stage(self, mailbox_id: int) -> bool:
        """The mailbox is complete here; whether it waits for its hour to flip, and is kept fresh until then."""
        return bool(self._value("SELECT bascule.stage(%s)", mailbox_id))

    # The cutover and the return ---------------------------------------------------

    def begin_cutover(self, mailbox_id: int) -> int:
        """Hold the mailbox's mail and logins; the epoch that is to be acknowledged."""
        return int(self._value("SELECT bascule.begin_cutover(%s)", mailbox_id))

    def undo_cutover(self, mailbox_id: int, reason: str) -> None:
        self._do("SELECT bascule.undo_cutover(%s, %s)", mailbox_id, _storable(reason))

    def finish_cutover(
        self, mailbox_id: int, epoch: int, password_hash: str | None, report: Mapping[str, object]
    ) -> None:
        """The flip. ``password_hash``: of the proved password; None: the imported one is in force, if there is one.

        Raises:
            psycopg.Error: (BA002) it was undone meanwhile, or is over its time.
        """
        self._do("SELECT bascule.finish_cutover(%s, %s, %s, %s)", mailbox_id, epoch, password_hash, _json(dict(report)))

    def begin_return(self, mailbox_id: int) -> int:
        """Hold the mailbox's mail and logins; the epoch that is to be acknowledged."""
        return int(self._value("SELECT bascule.begin_return(%s)", mailbox_id))

    def undo_return(self, mailbox_id: int, reason: str) -> None:
        self._do("SELECT bascule.undo_return(%s, %s)", mailbox_id, _storable(reason))

    def finish_return(self, mailbox_id: int, epoch: int, left_behind: str = "") -> None:
        """The flip back. ``left_behind``: what was not written to the legacy server, in words, for the journal.

        Raises:
            psycopg.Error: (BA002) it was undone meanwhile, or is over its time.
        """
        self._do("SELECT bascule.finish_return(%s, %s, %s)", mailbox_id, epoch, _storable(left_behind))

    def seconds_left(self, mailbox_id: int) -> float:
        """How much of the time of a cutover or a return is left."""
        query = "SELECT extract(epoch FROM cutover_deadline - clock_timestamp()) FROM bascule.mailbox WHERE id = %s"
        return float(self._value(query, mailbox_id) or 0)

    def unacknowledged(self, mailbox_id: int, epoch: int) -> list[tuple[str, str]]:
        """Part and node of everybody who has not yet put a change of state into force."""
        rows = self._rows("SELECT part, node FROM bascule.unacknowledged(%s, %s)", mailbox_id, epoch)
        return [(part, node) for part, node in rows]

    def wait_for_acknowledgement(self, seconds: float) -> None:
        """Return when a node acknowledges something, or after so long; begin with :meth:`listen`."""
        list(self._connection.notifies(timeout=seconds, stop_after=1))

    def listen(self, *, wanted: bool) -> None:
        """Be notified of acknowledgements, or no longer."""
        self._do("LISTEN bascule_acknowledgement" if wanted else "UNLISTEN bascule_acknowledgement")

    def intend_return(self, mailbox_id: int, note: Note) -> None:
        """A message is about to be appended to the legacy mailbox."""
        self._do(
            "SELECT bascule.intend_return(%s, %s, %s, %s, %s, %s, %s, %s, %s)",
            mailbox_id, note.folder, note.uid, note.guid, note.digest, note.legacy_uidnext, note.legacy_uidvalidity,
            note.internaldate, _storable(note.message_id),
        )  # fmt: skip

    def appended(self, mailbox_id: int, folder: str, uid: int) -> None:
        """The server said OK to the APPEND of a message of this side, and not which UID it gave."""
        self._do("SELECT bascule.appended(%s, %s, %s)", mailbox_id, folder, uid)

    def returned(self, mailbox_id: int, folder: str, uid: int, legacy_uid: int) -> None:
        """It is there, under this UID."""
        self._do("SELECT bascule.returned(%s, %s, %s, %s)", mailbox_id, folder, uid, legacy_uid)

    # After the move ---------------------------------------------------------------

    def stage_straggler(self, mailbox_id: int, straggler: Straggler) -> None:
        """The file of a late message is complete beside the mailbox."""
        self._do(
            "SELECT bascule.stage_straggler(%s, %s, %s, %s, %s, %s, %s, %s, %s)",
            mailbox_id, *straggler.identity, _storable(straggler.message_id), straggler.digest,
            straggler.internaldate, list(straggler.flags), straggler.name,
        )  # fmt: skip

    def straggler_delivered(self, mailbox_id: int, identity: Identity, place: str, guid: str) -> None:
        """It was put into the folder ``place`` here; Dovecot calls it ``guid``."""
        self._do("SELECT bascule.straggler_delivered(%s, %s, %s, %s, %s, %s)", mailbox_id, *identity, place, guid)

    def renumber_stragglers(self, mailbox_id: int, folder: str, moves: Mapping[Identity, Identity]) -> None:
        """The legacy server has numbered late messages of a folder anew."""
        found = [
            {"uidvalidity": old[1], "uid": old[2], "to_uidvalidity": new[1], "to_uid": new[2]}
            for old, new in moves.items()
        ]
        self._do("SELECT bascule.renumber_stragglers(%s, %s, %s)", mailbox_id, folder, json.dumps(found))

    def sweep_done(self, mailbox_id: int, began: datetime, trouble: str | None = None, advice: str = "") -> None:
        """All that was at the legacy server at ``began`` is here; queue the next sweep.

        ``trouble`` is what is wrong all the same, with advice.
        """
        said = None if trouble is None else _storable(trouble)
        self._do("SELECT bascule.sweep_done(%s, %s, %s, %s)", mailbox_id, began, said, _storable(advice))

    def last_message_written(self, mailbox_id: int) -> None:
        """The last message is in the legacy mailbox."""
        self._do("SELECT bascule.last_message_written(%s)", mailbox_id)

    def welcomed(self, mailbox_id: int) -> None:
        """The welcome is in the mailbox here."""
        self._do("SELECT bascule.welcomed(%s)", mailbox_id)

    def verified_folders(self, mailbox_id: int) -> list[dict[str, Any]]:
        """The folders of a mailbox as they were verified at the flip: name, name here, UIDVALIDITY, UIDNEXT."""
        found = self._value("SELECT report -> 'folders' FROM bascule.verification WHERE mailbox_id = %s", mailbox_id)
        return list(found or [])

    def record_verification(self, mailbox_id: int, result: Mapping[str, object]) -> None:
        """What was found when a mailbox that has moved was verified again."""
        self._do("SELECT bascule.record_verification(%s, %s)", mailbox_id, json.dumps(dict(result)))

    # Of the worker, not of one mailbox ----------------------------------------------

    def waiting_for_password(self, store: str) -> list[int]:
        """Ids of the mailboxes of a store whose users are to be asked for their new password."""
        rows = self._rows(f"{_WAITING} AND mailbox.store = %s", store)
        return [mailbox_id for (mailbox_id,) in rows]

    def waits_for_password(self, mailbox_id: int) -> bool:
        """Whether the user of a mailbox is to be asked for the new password."""
        return bool(self._rows(f"{_WAITING} AND mailbox.id = %s", mailbox_id))

    def trouble_told(self, mailbox_id: int) -> None:
        """The user was asked for the new password."""
        self._do("SELECT bascule.trouble_told(%s)", mailbox_id)

    def waiting_for_notice(self, store: str) -> list[int]:
        """Ids of the mailboxes of a store whose users are to be notified that a first login sets their move off."""
        return [mailbox_id for (mailbox_id,) in self._rows(f"{_FIRST_LOGINS} AND mailbox.store = %s", store)]

    def waits_for_notice(self, mailbox_id: int) -> bool:
        """Whether the user of a mailbox is to be notified of it."""
        return bool(self._rows(f"{_FIRST_LOGINS} AND mailbox.id = %s", mailbox_id))

    def first_login_told(self, mailbox_id: int) -> None:
        """The user was notified; a delay of the domain's begins."""
        self._do("SELECT bascule.first_login_told(%s)", mailbox_id)

    @contextmanager
    def only_writer(self, mailbox_id: int) -> Iterator[bool]:
        """Whether no other worker writes to this user, for the ``with`` block. No row is locked meanwhile."""
        lock = "('bascule.mailbox'::regclass::oid::integer, hashint8(%s))"
        mine = bool(self._value(f"SELECT pg_try_advisory_lock{lock}", mailbox_id))
        try:
            yield mine
        finally:
            if mine and self.is_connected:
                self._do(f"SELECT pg_advisory_unlock{lock}", mailbox_id)

    # ------------------------------------------------------------------------------

    def _do(self, query: str, *parameters: object) -> None:
        self._connection.execute(query.encode(), parameters)

    def _value(self, query: str, *parameters: object) -> Any:
        return value(self._connection, query, *parameters)

    def _rows(self, query: str, *parameters: object) -> Iterable[tuple[Any, ...]]:
        return self._connection.execute(query.encode(), parameters).fetchall()


def recorded(folder: str) -> str:
    """The name under which a folder is in the database, where no bytes are kept that are not UTF-8.

    No two folders have the same: a byte that is not UTF-8 stands as ``\\udcXX``.
    """
    return _storable(folder)


def _storable(text: str) -> str:
    """PostgreSQL keeps no NUL in a text, nor what is not Unicode, and what a server says may hold both."""
    return text.encode(errors="backslashreplace").decode().replace("\0", "\\x00")


def _json(value: object) -> str:
    """As :func:`_storable`, of every text in ``value``."""

    def storable(each: object) -> object:
        if isinstance(each, str):
            return _storable(each)
        if isinstance(each, Mapping):
            return {storable(name): storable(one) for name, one in each.items()}
        if isinstance(each, Sequence):
            return [storable(one) for one in each]
        return each

    return json.dumps(storable(value))
