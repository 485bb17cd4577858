"""One pass: bring the mailbox here into line with the legacy one.

Passes are repeated; each asks only for what it finds to differ. A pass that
dies leaves whole messages, and the next one goes on from there. What the last
whole pass saw of each folder is kept beside the mailbox, so that the next one
can skip the folders in which nothing happened and ask the others for changes
only (RFC 7162).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from threading import Lock

from bascule import log
from bascule.errors import LegacyRefusedLogin, LegacyUnavailable
from bascule.imap import names
from bascule.imap.folder_rules import FolderRules, Traits
from bascule.imap.reader import (
    Changes,
    FolderRefused,
    Layout,
    ListedFolder,
    Message,
    Reader,
    Status,
    Wanted,
    batches,
    insist,
    insisted,
    is_told_to_wait,
)
from bascule.migrator import maildir
from bascule.migrator.acts import recorded
from bascule.migrator.pop3 import MAX_HEADER

#: UIDs given here begin this far above the legacy server's next one, so that no
#: client takes a message that came late there for one that came here.
UID_GAP = 1000
GROUP = 20_000  # messages in the folders that are compared together, before their bodies are fetched
WORTH_A_SESSION = 8  # batches for which one more session to the legacy server is opened
WRITE_OUT = 32 << 20  # bytes that are received before the disk is made to write
REPORT_INTERVAL = 0.5  # seconds
MARKED = 3  # unread messages that all became read when they were copied, before it is taken for the server's doing
#: The last UID that a message may have here: above it there are enough for the gap and for a lifetime of new
#: messages. Where none is left, Dovecot can give none, and no longer opens the folder.
LAST_UID = 2**32 - 2**24

Open = Callable[[], AbstractContextManager[Reader]]


@dataclass(slots=True)
class Progress:
    """Counts of one pass: messages there, messages here, bytes copied."""

    total: int = 0
    copied: int = 0
    bytes: int = 0


@dataclass(frozen=True, slots=True)
class FolderState:
    """What a pass saw of a folder of the legacy server.

    ``uidnext`` is one more than the highest UID that was seen: a message with it
    or a higher one came later. The server's own may be higher, for a UID may be
    given before its message can be seen; ``next_here`` is not below that either.
    """

    name: str
    uidvalidity: int
    uidnext: int
    messages: int
    next_here: int


@dataclass(frozen=True, slots=True)
class Former:
    """What the last whole pass noted of a folder: its STATUS, the UID that comes next, keywords that are not kept.

    ``place`` is the path of its place here, ``attributes`` are what LIST said of it.
    """

    status: Status
    uidnext: int
    dropped: dict[str, str]
    place: tuple[str, ...]
    attributes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A message that the legacy server says it has and does not give."""

    folder: str
    uidvalidity: int
    uid: int
    reason: str


@dataclass(slots=True)
class Pass:
    """What a pass did: how many messages it added, expunged or flagged anew; HIGHESTMODSEQ by folder, if any.

    ``dropped`` are, by folder, keywords that cannot be kept here, with reasons;
    ``unsettled`` are folders that Dovecot has to read anew; ``notes`` is in words what differs here.

    ``layout`` has what comes along; ``left_out`` are the legacy folders that a rule leaves out, each with the
    reason, ``once`` the one whose messages come only where they are in no other folder, or empty, and ``by_rule``
    is in words what else is otherwise because a rule says so.
    """

    layout: Layout
    places: Mapping[str, names.Place]
    waived: AbstractSet[tuple[str, int, int]] = frozenset()
    waived_folders: AbstractSet[str] = frozenset()
    changes: int = 0
    folders: list[FolderState] = field(default_factory=list)
    modseqs: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, dict[str, str]] = field(default_factory=dict)
    unsettled: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    left_out: Mapping[str, str] = field(default_factory=dict)
    once: str = ""
    by_rule: list[str] = field(default_factory=list)
    renamed: Mapping[str, str] = field(default_factory=dict)

    def path(self, root: Path, folder: str) -> Path:
        """The directory of a legacy folder's place below the mailbox's root."""
        return root.joinpath(*self.places[folder].parts)


class Copy:
    """The copy of one mailbox, pass after pass; use it in a ``with`` statement.

    ``root`` is the Maildir, taken over before; it also holds what is kept between
    passes. Up to ``sessions`` sessions to the legacy server, made by
    ``open_source``, are used at the same time.

    ``is_staging``: the mailbox is kept in another storage than Maildir in the end.

    ``waived`` are messages that need not come, by folder, UIDVALIDITY and UID, and
    ``waived_folders`` whole folders, both as they are recorded
    (:func:`bascule.migrator.acts.recorded`); ``unreadable`` are those that did not
    come, also when the pass failed. ``rules`` say which folders come along, from the next pass on.
    """

    def __init__(
        self,
        open_source: Open,
        root: Path,
        report: Callable[[Progress], None],
        *,
        sessions: int = 1,
        waived: frozenset[tuple[str, int, int]] = frozenset(),
        waived_folders: frozenset[str] = frozenset(),
        is_staging: bool = False,
        rules: FolderRules | None = None,
    ) -> None:
        self.rules = rules or FolderRules()
        #: The attributes of each folder that the last pass left out.
        self._left_out: Mapping[str, frozenset[str]] = {}
        #: X-GM-MSGID by UID of each folder, with the STATUS before it was asked for.
        self._ids: dict[str, tuple[Status, dict[int, int]]] = {}
        #: The messages of the folder that comes only in part which are in another folder, too; None: not known yet.
        self._elsewhere: frozenset[int] | None = None
        self._open_source = open_source
        self._is_staging = is_staging
        self.root = root
        self._report = report
        self._sessions = sessions
        self._states = root / ".bascule-passed.json"  # goes where the copy goes
        self.waived = waived
        self.waived_folders = waived_folders
        self._distrusted: dict[str, set[int]] = {}
        self._stack = ExitStack()
        self.source: Reader
        self.sizes = True  # whether the server can be asked for them
        self._uidls: Mapping[int, str] = {}
        self._uidls_are_new = False
        self.unreadable: dict[tuple[str, int, int], Unreadable] = {}
        #: Messages that were copied unread, and those of them that were read ever since.
        self._unread: set[tuple[str, int]] = set()
        self._read_since: set[tuple[str, int]] = set()
        #: Folders that the legacy server does not open, with the reason.
        self.refused: dict[str, str] = {}

    def __enter__(self) -> Copy:
        self._open()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _open(self) -> None:
        self._stack.close()
        self.source = self._stack.enter_context(self._open_source())

    @contextmanager
    def without_session(self) -> Iterator[None]:
        """For the ``with`` block have no session: some servers bear one of a user. Another is opened after it."""
        self._stack.close()
        yield
        self._open()

    def forget(self) -> None:
        """Compare everything in the next pass, whatever former ones saw."""
        self._states.unlink(missing_ok=True)

    def set_uidls(self, uidls: Mapping[int, str]) -> None:
        """Give the messages of INBOX these POP3 UIDLs, by UID, in the next pass."""
        self._uidls_are_new = uidls != self._uidls
        self._uidls = uidls

    def inbox(self) -> list[Message]:
        """The messages of the legacy INBOX now, by UID."""
        status = insist(self.source.statuses(["INBOX"]))["INBOX"]
        return next(insisted(self.source.changes([("INBOX", None)], sizes=self.sizes))).new if status.messages else []

    def inbox_header(self) -> Callable[[int], bytes]:
        """Gives the beginning of a message of INBOX, as it was copied, by UID; nothing for one that was not."""
        files = maildir.files_of(self.root)

        def header(uid: int) -> bytes:
            if (path := files.get(uid)) is None:
                return b""
            with path.open("rb") as file:
                return file.read(MAX_HEADER)

        return header

    def distrust(self, folder: str, uids: Iterable[int]) -> None:
        """Fetch these messages of a legacy folder anew in the next pass, whatever is here."""
        self._distrusted.setdefault(folder, set()).update(uids)

    def run(self) -> Pass:
        """Copy everything that differs.

        Raises:
            LegacyUnavailable, OSError: what was copied until then is kept.
        """
        former_unreadable, self.unreadable = self.unreadable, {}
        self.refused = {}
        try:
            done = self._run()
        except BaseException:
            self.unreadable = former_unreadable | self.unreadable
            raise
        return done

    def _run(self) -> Pass:
        former = self._read_states()
        # What was copied is not removed here because one LIST leaves it out, nor is what is left out no longer named.
        listed = _as_before(self.source.layout([*former, *self._left_out]), former, self._left_out)
        names_there = {each.name for each in listed.folders}
        on_wire = {recorded(name): name for name in names_there}
        arranged = self.rules.arrange(listed, Traits.of(self.source))
        self._left_out = {each.name: each.attributes for each in listed.folders if each.name in arranged.left_out}
        layout, places = arranged.layout, names.of_layout(arranged.layout, arranged.renamed)
        this_pass = Pass(
            layout,
            places,
            {(on_wire.get(name, name), uidvalidity, uid) for name, uidvalidity, uid in self.waived},
            {on_wire.get(name, name) for name in self.waived_folders},
            left_out=arranged.left_out,
            once=arranged.once,
            by_rule=arranged.in_words(places),
            renamed=arranged.renamed,
        )
        now = self._statuses([each.name for each in layout.folders if each.selectable], this_pass)
        elsewhere = self._in_other_folders(this_pass.once, now) if this_pass.once in now else None
        if elsewhere != self._elsewhere:
            former.pop(this_pass.once, None)
        self._elsewhere = elsewhere
        progress = Progress(total=sum(status.messages for status in now.values()) - len(self._elsewhere or ()))
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        for group in _groups(now):
            self._copy_group(group, now, former, this_pass, progress)
        gone = self._gone()
        self.refused = {name: reason for name, reason in self.refused.items() if name not in gone}
        # What was copied of a folder that is refused now is kept: it may be opened again.
        kept = {this_pass.path(self.root, name) for name in (now.keys() | self.refused.keys()) - gone}
        maildir.remove_other_folders(self.root, kept)
        for folder in layout.folders:
            if not folder.selectable:
                this_pass.path(self.root, folder.name).mkdir(mode=0o700, parents=True, exist_ok=True)
        maildir.write_subscriptions(
            self.root, [this_pass.places[name].parts for name in layout.subscribed if name in this_pass.places]
        )
        # A folder that is not whole is compared in full again.
        unread = {folder for folder, _, _ in self.unreadable} | self.refused.keys()
        attributes = {each.name: tuple(sorted(each.attributes)) for each in layout.folders}
        states = {
            state.name: asdict(
                Former(
                    now[state.name],
                    state.uidnext,
                    this_pass.dropped.get(state.name, {}),
                    places[state.name].parts,
                    attributes[state.name],
                )
            )
            for state in this_pass.folders
            if state.name not in unread
        }
        maildir.replace(self._states, json.dumps(states))
        self._uidls_are_new = False
        self._distrusted = {}
        this_pass.modseqs = {name: status.highestmodseq for name, status in now.items() if status.highestmodseq}
        this_pass.notes += _differences(this_pass)
        self._name_subscribed([each for each in layout.subscribed if each not in names_there], this_pass)
        if len(self._read_since) >= MARKED and len(self._read_since) == len(self._unread):
            this_pass.notes.append(
                f"the legacy server seems to mark as read what is only looked at: all {len(self._unread)} messages "
                "that were unread before they were copied are read now, there and here"
            )
        self._report(progress)
        return this_pass

    def _gone(self) -> set[str]:
        """The refused folders that are not listed any more: the user has renamed or deleted them meanwhile."""
        if not self.refused:
            return set()
        return self.refused.keys() - {folder.name for folder in self.source.layout(self.refused).folders}

    def _statuses(self, folders: list[str], this_pass: Pass) -> dict[str, Status]:
        """The STATUS of each folder that can be read.

        One that was made anew is emptied here: so not before it says so itself, as it is opened.
        """
        found = self.source.statuses(folders)
        made_anew = [
            name
            for name, status in found.items()
            if isinstance(status, Status)
            and maildir.uidvalidity_of(this_pass.path(self.root, name)) not in {0, status.uidvalidity}
        ]
        now: dict[str, Status] = {}
        for name, status in (found | self.source.opened(made_anew)).items():
            if isinstance(status, FolderRefused):
                self._refuse(name, status.reason, this_pass)
            else:
                now[name] = status
        return now

    def _name_subscribed(self, folders: list[str], this_pass: Pass) -> None:
        """Name those folders that are subscribed, have messages and are not listed.

        They may be views of other folders, or somebody else's: what is not listed is not the user's for certain.
        """
        found = {name: status.messages for name, status in self.source.unlisted(folders).items() if status.messages}
        layout = replace(this_pass.layout, folders=tuple(ListedFolder(name, selectable=True) for name in found))
        by_rule = self.rules.arrange(layout, Traits.of(self.source)).left_out
        this_pass.left_out = {**this_pass.left_out, **by_rule}
        this_pass.notes += [
            f"{names.readable(name)}: subscribed, but not among the folders that the legacy server lists, and "
            f"not copied: {messages} messages"
            for name, messages in found.items()
            if name not in by_rule
        ]

    def _refuse(self, folder: str, reason: str, this_pass: Pass) -> None:
        """A folder cannot be read, or not whole."""
        if folder in this_pass.waived_folders:
            this_pass.notes.append(
                f"{names.readable(folder)}: not all is here, as an administrator decided: it {reason}"
            )
        else:
            self.refused[folder] = reason

    def _in_other_folders(self, once: str, now: Mapping[str, Status]) -> frozenset[int]:
        """The UIDs of those messages of a folder that are in another one which comes along, too."""
        asked = [
            name
            for name, status in now.items()
            if status.messages and (not status.highestmodseq or self._ids.get(name, (None,))[0] != status)
        ]
        self._ids = {name: ids for name, ids in self._ids.items() if name in now and now[name].messages}
        self._ids |= {name: (now[name], ids) for name, ids in self.source.message_ids(asked)}
        others = {each for name, (_, ids) in self._ids.items() if name != once for each in ids.values()}
        _, ids = self._ids.get(once, (None, {}))
        return frozenset(uid for uid, each in ids.items() if each in others)

    def count_left_out(self, done: Pass) -> dict[str, int | None]:
        """How many messages each folder has that a rule leaves out; None: the legacy server does not say.

        Raises:
            LegacyUnavailable: another session cannot be opened.
        """
        try:
            found = self.source.statuses(list(done.left_out))
        except LegacyUnavailable as error:
            # It is for such folders that some are left out.
            log.get().info("folders that are left out are not counted", reason=error.message)
            self._open()
            return dict.fromkeys(done.left_out)
        return {name: None if isinstance(status, FolderRefused) else status.messages for name, status in found.items()}

    # One group of folders -------------------------------------------------------

    def _copy_group(
        self,
        group: list[str],
        now: dict[str, Status],
        former: dict[str, Former],
        this_pass: Pass,
        progress: Progress,
    ) -> None:
        pending: list[str] = []
        here: dict[str, maildir.Folder] = {}
        for name in group:
            status = now[name]
            rewritten = (self._uidls_are_new and name.upper() == "INBOX") or name in self._distrusted
            seen = former.get(name)
            if seen is not None and seen.place != this_pass.places[name].parts:
                del former[name]
                seen = None
            if seen is not None and seen.status == status and status.highestmodseq and not rewritten:
                progress.copied += status.messages
                next_here = _next_here(status.uidnext, seen.uidnext)
                this_pass.folders.append(
                    FolderState(name, status.uidvalidity, seen.uidnext, status.messages, next_here)
                )
                this_pass.dropped[name] = dict(seen.dropped)
                continue
            path = this_pass.path(self.root, name)
            here[name] = maildir.Folder(path, name, status.uidvalidity, is_staging=self._is_staging)
            here[name].open()
            for uid in self._distrusted.get(name, set()) & here[name].messages.keys():
                here[name].expunge(uid)
            pending.append(name)
        if not pending:
            return
        progress.copied += sum(len(folder.messages) for folder in here.values())
        self._report(progress)
        try:
            found = self._compare(pending, now, former, here, this_pass)
        except LegacyUnavailable as error:
            if not self.sizes or is_told_to_wait(error):
                raise
            log.get().info("session lost, going on without sizes", reason=error.message)
            self.sizes = False
            self._open()
            found = self._compare(pending, now, former, here, this_pass)
        pending = [name for name in pending if name in found]
        wanted = Wanted(batch for name in pending for batch in batches(name, found[name].new))
        if len(wanted):
            self._fetch(wanted, here, this_pass, progress)
        for name in pending:
            folder, changes = here[name], found[name]
            lacking = max((uid for uid in changes.incomplete if uid <= LAST_UID), default=0)
            uidnext = max(changes.unseen_from, max(folder.messages, default=0) + 1, lacking + 1)
            if not changes.complete:
                uidnext = max(uidnext, former[name].uidnext)
            next_here = _next_here(changes.uidnext, uidnext)
            folder.write_index(next_here, self._uidls if name.upper() == "INBOX" else None)
            if folder.indexes_forgotten:
                this_pass.unsettled.append(name)
            this_pass.dropped[name] = folder.dropped
            this_pass.folders.append(FolderState(name, folder.uidvalidity, uidnext, len(folder.messages), next_here))

    def _compare(
        self,
        pending: list[str],
        now: dict[str, Status],
        former: Mapping[str, Former],
        here: dict[str, maildir.Folder],
        this_pass: Pass,
    ) -> dict[str, Changes]:
        """Expunge and flag here what was there; leaves in each folder's ``new`` the messages that are missing here."""
        found = {}
        asked = {}
        for name in pending:
            if now[name].messages == 0:  # some servers refuse to FETCH 1:* from an empty folder
                found[name] = Changes(name, now[name].uidvalidity, max(now[name].uidnext, 1))
                self._apply(found[name], here[name], this_pass)
                continue
            # From what was seen on, not from the UIDNEXT that was said: it may be any number.
            since = replace(former[name].status, uidnext=former[name].uidnext) if name in former else None
            if since is not None and since.uidvalidity != now[name].uidvalidity:
                since = None
            asked[name] = None if name in self._distrusted or name == this_pass.once else since
        doubtful: list[str] = []
        anew: list[str] = []
        for changes in self.source.changes(asked.items(), sizes=self.sizes):
            if isinstance(changes, FolderRefused):
                self._refuse(changes.folder, changes.reason, this_pass)
                continue
            folder = here[changes.folder]
            self._leave_out(changes, this_pass)
            if changes.uidvalidity != folder.uidvalidity:
                anew.append(changes.folder)
                continue
            self._apply(changes, folder, this_pass)
            found[changes.folder] = changes
            waived = sum(1 for name, _, _ in this_pass.waived if name == changes.folder)
            known = len(folder.messages) + len(changes.new) + waived + len(changes.incomplete)
            if asked[changes.folder] is not None and changes.exists != known:
                doubtful.append(changes.folder)
        self._make_anew(anew, now, here, this_pass)
        for changes in self.source.changes(((name, None) for name in [*doubtful, *anew]), sizes=self.sizes):
            if isinstance(changes, FolderRefused):
                found.pop(changes.folder, None)
                self._refuse(changes.folder, changes.reason, this_pass)
                continue
            self._leave_out(changes, this_pass)
            if changes.uidvalidity != here[changes.folder].uidvalidity:
                found.pop(changes.folder, None)
                self._refuse(changes.folder, "has another UIDVALIDITY whenever it is opened", this_pass)
                continue
            self._apply(changes, here[changes.folder], this_pass)
            found[changes.folder] = changes
        for name in self._distrusted.keys() & found.keys():
            elsewhere = self._elsewhere if name == this_pass.once else None
            self._note_not_shown(found[name], here[name], elsewhere or frozenset())
        for changes in found.values():
            self._note_unlisted(changes, this_pass)
        return found

    def _make_anew(
        self, folders: list[str], now: dict[str, Status], here: dict[str, maildir.Folder], this_pass: Pass
    ) -> None:
        """Begin afresh with folders whose UIDVALIDITY is not the one that STATUS gave a moment ago.

        They were made anew there meanwhile, or what STATUS says is not true.
        """
        for name, status in self.source.opened(folders).items():
            if isinstance(status, FolderRefused):
                continue  # it is refused again when its messages are asked for
            now[name] = status
            path = this_pass.path(self.root, name)
            here[name] = maildir.Folder(path, name, status.uidvalidity, is_staging=self._is_staging)
            here[name].open()

    def _note_not_shown(self, changes: Changes, folder: maildir.Folder, elsewhere: AbstractSet[int]) -> None:
        """Name the messages, missing in a verification, that the legacy server finds and does not show.

        ``elsewhere``: those that come with another folder.
        """
        shown = folder.messages.keys() | {message.uid for message in changes.new} | changes.incomplete.keys()
        if missing := self._distrusted[changes.folder] - shown - elsewhere:
            there = self.source.found(changes.folder) & missing
            changes.incomplete |= dict.fromkeys(there, "the server finds it, and does not show it")

    def _note_unlisted(self, changes: Changes, this_pass: Pass) -> None:
        """Name what the server announces and does not list."""
        for uid, reason in changes.incomplete.items():
            identity = (changes.folder, changes.uidvalidity, uid)
            if identity not in this_pass.waived:
                self.unreadable[identity] = Unreadable(*identity, reason)
        if changes.nameless:
            named = changes.exists - changes.nameless
            self._refuse(changes.folder, f"has {changes.exists} messages, and {named} are listed", this_pass)

    def _leave_out(self, changes: Changes, this_pass: Pass) -> None:
        """Leave out what is not copied: messages with too high a UID; and of a folder that comes once, and was listed
        whole, what is in another folder, too.
        """
        _leave_out_beyond(changes)
        if changes.folder != this_pass.once:
            return
        elsewhere = self._elsewhere or frozenset()
        changes.new = [message for message in changes.new if message.uid not in elsewhere]
        changes.incomplete = {uid: reason for uid, reason in changes.incomplete.items() if uid not in elsewhere}

    def _apply(self, changes: Changes, folder: maildir.Folder, this_pass: Pass) -> None:
        new = {message.uid: message for message in changes.new}
        if changes.complete:
            gone = [uid for uid in folder.messages if uid not in changes.flags and uid not in new]
        else:
            gone = [
                uid
                for first, last in changes.vanished
                for uid in (range(first, last + 1) if last - first < len(folder.messages) else list(folder.messages))
                if first <= uid <= last and uid in folder.messages
            ]
        for uid in gone:
            folder.expunge(uid)
        this_pass.changes += len(gone)
        known = [(uid, message.flags) for uid, message in new.items()]
        for uid, flags in [*changes.flags.items(), *known]:
            stored = folder.messages.get(uid)
            if "\\Seen" in flags and (changes.folder, uid) in self._unread:
                self._read_since.add((changes.folder, uid))
            if stored is not None and stored.flags != flags and stored.flags != (kept := folder.storable(flags)):
                folder.set_flags(uid, kept)
                this_pass.changes += 1
        for uid, message in new.items():
            stored = folder.messages.get(uid)
            # Another message under the UID of a former one: some servers number a new folder as the old one.
            if (
                stored is not None
                and message.is_dated
                and stored.internaldate != maildir.storable_date(message.internaldate)
            ):
                folder.expunge(uid)
                this_pass.changes += 1
        changes.new = [
            message
            for uid, message in sorted(new.items())
            if uid not in folder.messages and (changes.folder, folder.uidvalidity, uid) not in this_pass.waived
        ]
        # Only the missing ones are of use from here on.
        changes.flags = {}

    # Bodies ---------------------------------------------------------------------

    def _fetch(self, wanted: Wanted, here: Mapping[str, maildir.Folder], this_pass: Pass, progress: Progress) -> None:
        """Fetch what is wanted over as many sessions as it is worth; a lost session is replaced."""
        # Any folder's tmp will do, for all are on one file system: a body may come before its UID.
        receive = next(iter(here.values())).receive
        lock = Lock()

        def keep(folder: str, message: Message, body: object) -> None:
            if not isinstance(body, maildir.Received):
                raise TypeError(f"not a received body: {type(body).__name__}")
            here[folder].keep(message.uid, message.internaldate, message.flags, body)
            with lock:
                if "\\Seen" not in message.flags:
                    self._unread.add((folder, message.uid))
                progress.copied += 1
                progress.bytes += body.size
                this_pass.changes += 1

        def with_own_session() -> None:
            self.source.bodies(wanted, receive, keep)

        def with_another_session() -> None:
            try:
                with self._open_source() as source:
                    source.bodies(wanted, receive, keep)
            except LegacyRefusedLogin as error:
                # The same password has opened the first session: some servers say so when there are too many.
                raise LegacyUnavailable(f"one more session is refused: {error.message}") from error

        helpers = min(self._sessions - 1, len(wanted) // WORTH_A_SESSION)
        with ThreadPoolExecutor(self._sessions, thread_name_prefix="session") as pool:
            own = pool.submit(with_own_session)
            running = {own, *(pool.submit(with_another_session) for _ in range(helpers))}
            written = progress.bytes
            try:
                while running:
                    done, running = wait(running, timeout=REPORT_INTERVAL, return_when=FIRST_COMPLETED)
                    self._report(progress)
                    if progress.bytes - written >= WRITE_OUT:
                        # While more is received: the disk is not left idle until the end.
                        written = progress.bytes
                        maildir.flush_file_system(self.root)
                    for future in done:
                        _insist_on_end(future, wanted)
                    if not running and len(wanted):
                        running = {pool.submit(with_another_session)}
            except BaseException:
                wanted.stop()
                # What is known is kept: the next attempt need not find it out again.
                for (name, uid), reason in wanted.not_given_at_all.items():
                    identity = (name, here[name].uidvalidity, uid)
                    self.unreadable[identity] = Unreadable(*identity, reason)
                raise
        if own.exception() is not None:
            self._open()
        self._note_unreadable(wanted, here)

    def _note_unreadable(self, wanted: Wanted, here: Mapping[str, maildir.Folder]) -> None:
        for name in {folder for folder, _ in wanted.not_given_at_all}:
            uids = sorted(uid for folder, uid in wanted.not_given_at_all if folder == name)
            for uid in self.source.which_are_there(name, uids):
                identity = (name, here[name].uidvalidity, uid)
                self.unreadable[identity] = Unreadable(*identity, wanted.not_given_at_all[name, uid])

    def _read_states(self) -> dict[str, Former]:
        try:
            return {
                name: Former(
                    Status(**former["status"]),
                    former["uidnext"],
                    former["dropped"],
                    tuple(former["place"]),
                    tuple(former["attributes"]),
                )
                for name, former in json.loads(self._states.read_text()).items()
            }
        except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError):
            return {}  # everything is compared


def _as_before(layout: Layout, former: Mapping[str, Former], left_out: Mapping[str, frozenset[str]]) -> Layout:
    """The layout, in which folders that were asked for by name have the attributes with which they were listed before.

    What a rule for a special use, or for Gmail, makes of a folder does not change because one LIST leaves it out.
    """
    known = {name: frozenset(each.attributes) for name, each in former.items()} | dict(left_out)
    return replace(
        layout,
        folders=tuple(
            each.with_attributes(known.get(each.name, frozenset())) if each.name in layout.unlisted else each
            for each in layout.folders
        ),
    )


def _next_here(said: int, uidnext: int) -> int:
    """The UID that comes next here; ``said``: the legacy server's word for it, ``uidnext``: by what it has."""
    return max(said, uidnext) if said <= LAST_UID else uidnext


def _leave_out_beyond(changes: Changes) -> None:
    """Have messages whose UIDs leave no room for new ones count as such that do not come."""
    beyond = [message.uid for message in changes.new if message.uid > LAST_UID]
    if not beyond:
        return
    changes.new = [message for message in changes.new if message.uid <= LAST_UID]
    reason = "its UID is so high that none are left for new messages: copy it there within its folder, and remove it"
    changes.incomplete |= dict.fromkeys(beyond, reason)
    changes.unseen_from = max((message.uid for message in changes.new), default=0) + 1


def _differences(done: Pass) -> Iterator[str]:
    """In words, what a client of the new server will see otherwise than at the legacy server."""
    layout = done.layout
    by_rule = {
        names.readable(name): {names.readable(text), names.readable(layout.prefix + text)}
        for name, text in done.renamed.items()
    }
    for place in done.places.values():
        if place.is_renamed:
            name = names.readable(place.name(layout.separator, layout.prefix))
            if name not in by_rule.get(place.text, ()):
                yield f"the folder {place.text!r} is kept as {name!r}"
    for folder, dropped in done.dropped.items():
        for keyword, reason in dropped.items():
            yield f"{names.readable(folder)}: the keyword {keyword!r} is not kept: it {reason}"


def _insist_on_end(session: Future[None], wanted: Wanted) -> None:
    """See how a session ended: at its end, or lost in a way that another may do better.

    Raises:
        LegacyUnavailable: too many are lost, or the legacy server says itself that it is too much for it.
        BaseException: what ended it was not the legacy server.
    """
    try:
        session.result()
    except LegacyUnavailable as error:
        if is_told_to_wait(error):
            raise
        if not wanted.another_session():
            wanted.gives_nothing()
            raise
        log.get().info("session lost", reason=error.message)


def _groups(now: Mapping[str, Status]) -> Iterator[list[str]]:
    """Folders that are compared together, so that what is known of messages stays small."""
    group: list[str] = []
    messages = 0
    for name, status in now.items():
        if group and messages + status.messages > GROUP:
            yield group
            group, messages = [], 0
        group.append(name)
        messages += status.messages
    if group:
        yield group
