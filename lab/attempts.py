"""An attempt at a mailbox of which everything is in memory, and which may die at any step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from bascule.address import Address
from bascule.errors import LegacyUnavailable
from bascule.imap.folder_rules import FolderRule
from bascule.imap.reader import Reader
from bascule.lab.memory import Mail, MemoryServer, follow_maildir
from bascule.migrator import maildir
from bascule.migrator.acts import Identity, Note, Straggler
from bascule.migrator.attempt import Attempt
from bascule.migrator.storage import EVIDENCE

LETTERS = {letter: flag for flag, letter in maildir.FLAG_LETTERS.items()}
LAST = b"Subject: last\r\nMessage-ID: %s\r\n\r\nYou have moved.\r\n"
MOVED = datetime(2026, 1, 1, tzinfo=UTC)


class Killed(BaseException):
    """The worker was killed."""


@dataclass
class Steps:
    """Counts what is done, and dies before the step with a number."""

    die_at: int = 0
    done: int = 0

    def tick(self) -> None:
        self.done += 1
        if self.done == self.die_at:
            raise Killed


@dataclass
class MemoryActs:
    """The tables of one mailbox, with the acts that change them; each is a step."""

    steps: Steps
    flipped: dict[str, tuple[int, int]] = field(default_factory=dict)
    folders: list[dict[str, Any]] = field(default_factory=list)
    rows: dict[Identity, Straggler] = field(default_factory=dict)
    kept_notes: dict[tuple[str, int], Note] = field(default_factory=dict)
    waived: set[Identity] = field(default_factory=set)
    waived_names: set[str] = field(default_factory=set)
    unreadable: list[dict[str, Any]] = field(default_factory=list)
    unreadable_folders: dict[str, str] = field(default_factory=dict)
    swept: list[tuple[str | None, str]] = field(default_factory=list)
    last_written: bool = False
    is_welcomed: bool = False
    wanted: tuple[bool, bool] = (True, False)
    state: str = "local"
    left_behind: str = ""
    rules: list[FolderRule] = field(default_factory=list)
    once: str = ""
    left_out: dict[str, str] = field(default_factory=dict)
    left: float = 60.0

    def now(self) -> datetime:
        return MOVED

    def flipped_folders(self, _: int) -> dict[str, tuple[int, int]]:
        return dict(self.flipped)

    def verified_folders(self, _: int) -> list[dict[str, Any]]:
        return self.folders

    def stragglers(self, _: int) -> list[Straggler]:
        return list(self.rows.values())

    def notes(self, _: int) -> list[Note]:
        return list(self.kept_notes.values())

    def waived_messages(self, _: int) -> frozenset[Identity]:
        return frozenset(self.waived)

    def waived_folders(self, _: int) -> frozenset[str]:
        return frozenset(self.waived_names)

    def rules_at_flip(self, _: int) -> list[FolderRule]:
        return self.rules

    def once_at_flip(self, _: int) -> str:
        return self.once

    def left_out_folders(self, _: int) -> frozenset[str]:
        return frozenset(self.left_out)

    def set_left_out(self, _: int, folders: list[dict[str, Any]], *, complete: bool) -> None:
        self.steps.tick()
        found = {each["name"]: each["reason"] for each in folders}
        self.left_out = found if complete else self.left_out | found

    def return_is_wanted(self, _: int) -> tuple[bool, bool]:
        return self.wanted

    def seconds_left(self, _: int) -> float:
        return self.left

    def stage_straggler(self, _: int, straggler: Straggler) -> None:
        self.steps.tick()
        before = self.rows.get(straggler.identity)
        if before is None or (before.delivered and before.name != straggler.name):
            self.rows[straggler.identity] = replace(straggler, delivered=False, place="", guid="")
        self.steps.tick()

    def straggler_delivered(self, _: int, identity: Identity, place: str, guid: str) -> None:
        self.steps.tick()
        if not self.rows[identity].delivered:
            self.rows[identity] = replace(self.rows[identity], delivered=True, place=place, guid=guid)
        self.steps.tick()

    def renumber_stragglers(self, _: int, _folder: str, moves: dict[Identity, Identity]) -> None:
        self.steps.tick()
        kept = {new: self.rows[old] for old, new in moves.items()}
        for identity in (*moves, *moves.values()):
            self.rows.pop(identity, None)
        for (folder, uidvalidity, uid), row in kept.items():
            self.rows[folder, uidvalidity, uid] = replace(row, folder=folder, uidvalidity=uidvalidity, uid=uid)
        self.steps.tick()

    def set_unreadable(self, _: int, messages: list[dict[str, Any]], *, complete: bool) -> None:
        if complete:
            self.unreadable.clear()
        self.unreadable.extend(each for each in messages if each not in self.unreadable)

    def set_unreadable_folders(self, _: int, reasons: dict[str, str]) -> None:
        self.unreadable_folders = dict(reasons)

    def sweep_done(self, _: int, _began: datetime, trouble: str | None = None, advice: str = "") -> None:
        self.swept.append((trouble, advice))

    def last_message_written(self, _: int) -> None:
        self.steps.tick()
        self.last_written = True

    def welcomed(self, _: int) -> None:
        self.is_welcomed = True

    def intend_return(self, _: int, note: Note) -> None:
        self.steps.tick()
        self.kept_notes[note.folder, note.uid] = replace(note, legacy_uid=None, appended=False)
        self.steps.tick()

    def appended(self, _: int, folder: str, uid: int) -> None:
        self.steps.tick()
        self.kept_notes[folder, uid] = replace(self.kept_notes[folder, uid], appended=True)
        self.steps.tick()

    def returned(self, _: int, folder: str, uid: int, legacy_uid: int) -> None:
        self.steps.tick()
        self.kept_notes[folder, uid] = replace(self.kept_notes[folder, uid], legacy_uid=legacy_uid, appended=True)
        self.steps.tick()

    # The hold: everybody acknowledges at once.

    def begin_return(self, _: int) -> int:
        self.steps.tick()
        self.state = "returning"
        return 1

    def undo_return(self, _: int, _reason: str) -> None:
        self.state = "local"

    def finish_return(self, _: int, _epoch: int, left_behind: str = "") -> None:
        self.steps.tick()
        self.state, self.left_behind = "legacy", left_behind

    def listen(self, *, wanted: bool) -> None: ...

    def unacknowledged(self, _: int, _epoch: int) -> list[tuple[str, str]]:
        return []


class MemoryStorage:
    """A mailbox in a home: a Maildir whose files are real, or dbox, of which there is a directory only."""

    def __init__(self, *, is_maildir: bool) -> None:
        self.is_maildir = is_maildir

    def root(self, home: Path) -> Path:
        return home / "mail"

    def is_there(self, home: Path) -> bool:
        return self.root(home).is_dir()

    def recover(self, *_: object) -> None: ...
    def close(self, _: Path) -> None: ...
    def reopen(self, *_: object) -> None: ...
    def leave(self, _: Path) -> None: ...

    def closed_location(self, _: Path) -> str:
        return "closed"


class World:
    """A user who has moved: the legacy mailbox, the one here, and what is recorded."""

    def __init__(self, home: Path, *, is_maildir: bool = True, folders: tuple[str, ...] = ("INBOX", "Sent")) -> None:
        self.home = home
        self.steps = Steps()
        self.there = MemoryServer(folders=folders)
        self.here = MemoryServer(folders=folders)
        self.acts = MemoryActs(self.steps)
        self.storage = MemoryStorage(is_maildir=is_maildir)
        self.last_message_at: datetime | None = MOVED
        self.to_be_welcomed = False
        self.welcome: Callable[[], None] = lambda: None
        self.sessions = 0
        self.refuses_client = ""
        for name in folders:
            path = self.storage.root(home) if name == "INBOX" else self.storage.root(home) / name
            for part in ("cur", "new", "tmp") if is_maildir else ():
                (path / part).mkdir(parents=True, exist_ok=True)
        self.storage.root(home).mkdir(exist_ok=True)
        if is_maildir:
            self.here.refresh = follow_maildir(self.here, self.storage.root(home), LETTERS)

    def flip(self, *, evidence: bool = True) -> None:
        """What is at the legacy server is copied, and recorded."""
        import gzip  # noqa: PLC0415 (for this one line of a test's tool)

        lines = []
        for name, folder in self.there.folders.items():
            copy = self.here.folders[name]
            copy.uidvalidity, copy.uidnext = folder.uidvalidity, folder.uidnext + 1000
            for uid, mail in folder.mails.items():
                copy.mails[uid] = Mail(mail.body, mail.internaldate, mail.flags, f"copy-{name}-{uid}")
                received = maildir.receive(str(self.home / "x"), len(mail.body), [mail.body])
                lines.append(
                    f"{name}\t{folder.uidvalidity}\t{uid}\t{received.size}\t{received.digest[:32]}\t{mail.internaldate}\n"
                )
            self.acts.flipped[name] = (folder.uidvalidity, max(folder.mails, default=0) + 1)
            self.acts.folders.append({"name": name, "here": name, "messages": len(folder.mails)})
        if evidence:
            with gzip.open(self.home / EVIDENCE, "wt") as file:
                file.writelines(lines)

    def attempt(self) -> Attempt:
        """A worker's next attempt."""
        address = Address("alice", "lab.test")
        account = SimpleNamespace(
            id=1,
            address=address,
            migrated_at=MOVED,
            last_message_at=self.last_message_at,
            to_be_welcomed=self.to_be_welcomed and not self.acts.is_welcomed,
            state=self.acts.state,
        )
        letters = SimpleNamespace(last=self._last, welcome=lambda _: self.welcome())
        local = SimpleNamespace(open=self.here.open, end_sessions=lambda _: None)
        sessions = SimpleNamespace(
            reserve=lambda wanted: wanted, open=self._open, open_target=self._open, open_client=self._open_client
        )
        made = SimpleNamespace(
            acts=self.acts, account=account, home=self.home, storage=self.storage, local=local, sessions=sessions,
            letters=letters,
        )  # fmt: skip
        return cast(Attempt, made)

    def _last(self, account: Any) -> bytes:
        from bascule.migrator.letters import message_id  # noqa: PLC0415 (it reads settings)

        return LAST % message_id("last", account).encode()

    @contextmanager
    def _open(self) -> Iterator[Reader]:
        self.sessions += 1
        with self.there.open() as session:
            yield cast(Reader, session)

    @contextmanager
    def _open_client(self) -> Iterator[Any]:
        self.sessions += 1

        def append(folder: str, body: bytes) -> None:
            if self.refuses_client:
                raise LegacyUnavailable(self.refuses_client)
            self.steps.tick()
            self.there.put(folder, body, date=999)
            self.steps.tick()

        with nullcontext(SimpleNamespace(append=append)) as client:
            yield client
