"""Sending a user who has moved back to the legacy server.

First while the user works on as normal, again and again until little is left;
then the mailbox is held like at a cutover, the rest is written, and the route
flips. Each time both sides are read, :mod:`bascule.migrator.return_plan` says
what is to be done, and whether that is plausible, and then it is done.

A message is appended exactly once. That it will be is recorded in the database
before, that the server said OK, and under which UID it is there, after. After a
death in between, the message can only be among those that came to the folder
since: it is looked for there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property

from bascule import log
from bascule.errors import BasculeError, LegacyUnavailable, LocalUnavailable, ServerUnavailable
from bascule.imap.pipeline import CommandRefused
from bascule.imap.reader import Batch, Message, Wanted, insist, insisted, is_told_to_wait
from bascule.imap.wire import PIECE
from bascule.imap.writer import Writer
from bascule.migrator import known
from bascule.migrator.acts import Note, recorded
from bascule.migrator.attempt import Attempt
from bascule.migrator.cutover import MAX_PASSES, SMALL_PASS
from bascule.migrator.delivery import ARRIVING, Digest, content_at, names_here
from bascule.migrator.hold import MARGIN, await_acknowledgements, undo
from bascule.migrator.known import Known
from bascule.migrator.late import Content
from bascule.migrator.left_out import left_out
from bascule.migrator.mirror import Mirror
from bascule.migrator.return_plan import Folder, Plan, Records, Side, Store, insist_on_plausible, kept, plan
from bascule.migrator.storage import Evidence, evidence
from bascule.migrator.sweep import bring_late, insist_on_mailbox

STUBBORN = 2  # times that a flag is stored before it is given up: the server does not keep it


class NotClean(BasculeError):
    """Both sides did not become equal in time; the return is undone and tried again."""


class CalledOff(BasculeError):
    """The return is not wanted any more."""


def give_back(attempt: Attempt) -> None:
    """Take a mailbox whose return was requested to state legacy, or raise having left it in state local.

    Raises:
        BasculeError, OSError: why it did not come to the flip. What was written is kept.
    """
    acts, account, home, storage = attempt.acts, attempt.account, attempt.home, attempt.storage
    logger = log.get().bind(address=str(account.address))
    if account.state == "returning":
        acts.undo_return(account.id, "its worker died")
    # What came late is known then, whatever the legacy server calls it by now.
    late = bring_late(attempt)
    if late.trouble is not None:
        logger.warning("not all late mail was brought", reason=late.trouble.message)
    with attempt.sessions.open_target() as there:
        back = Return(attempt, there)
        for number in range(1, MAX_PASSES + 1):
            changes = len(back.make_equal(None))
            logger.info("return pass done", number=number, changes=changes)
            if changes <= SMALL_PASS:
                break
        epoch = acts.begin_return(account.id)
        try:
            await_acknowledgements(acts, account.id, epoch)
            attempt.local.end_sessions(account.address)
            storage.close(home)
            back.make_equal_at_last(storage.closed_location(home))
            left_behind = [*dict.fromkeys(back.left_behind), *_changed_scripts(attempt)]
            acts.finish_return(account.id, epoch, "\n".join(left_behind))
        except BaseException as error:
            storage.reopen(home, account.address)
            undo(acts.undo_return, account.id, error)
            raise
    storage.leave(home)
    known.forget(home)
    logger.info("returned")


def _changed_scripts(attempt: Attempt) -> list[str]:
    """The Sieve scripts that were changed here: they are not written back."""
    moved = attempt.account.migrated_at
    folder = attempt.home / "sieve"
    if moved is None or not folder.is_dir():
        return []
    changed = sorted(
        path.stem for path in folder.glob("*.sieve") if path.is_file() and path.stat().st_mtime > moved.timestamp()
    )
    return [f"The Sieve script {name!r} was changed here, and is not changed at the legacy server." for name in changed]


class Return:
    """One return of one mailbox, written in one session."""

    def __init__(self, attempt: Attempt, there: Writer) -> None:
        self._attempt = attempt
        self._acts, self._account = attempt.acts, attempt.account
        self._there = there
        self._spool = attempt.home / ".bascule-return"
        self._seen_here, self._seen_there = Mirror(with_guids=True), Mirror()
        self._keeps: dict[str, frozenset[str] | None] = {}
        self._stored: Counter[tuple[str, int, str]] = Counter()
        self._refused: dict[str, set[str]] = {}
        self._known: dict[str, Known] = {}
        self._names_here: dict[str, str] = {}
        self._on_wire: dict[str, str] = {}
        self._at_flip = {each["name"]: int(each["messages"]) for each in self._acts.verified_folders(self._account.id)}
        self._legacy_names = {here: name for name, here in names_here(attempt).items()}
        self._flipped = self._acts.flipped_folders(self._account.id)
        self._selected = ""
        self._tried: set[tuple[str, str]] = set()
        #: What cannot be written to the legacy server, in words.
        self.left_behind: list[str] = []

    def make_equal_at_last(self, location: str) -> None:
        """Write until both sides are found equal; nobody changes the mailbox here any more.

        Raises:
            NotClean: they are not, and time is over, or nothing helps.
        """
        before: Plan | None = None
        while len(done := self.make_equal(location)):
            # Flags that do not stay are given up after a while; for nothing else is there a reason to go on and on.
            missing = (done.creates, done.appends, done.expunges)
            if before is not None and any(missing) and missing == (before.creates, before.appends, before.expunges):
                raise NotClean(
                    f"the legacy mailbox of {self._account.address} does not become equal: {done.why()}",
                    hint="See what the legacy server makes of it. The user stays here meanwhile; "
                    f"to call the return off: bascule cancel-return {self._account.address}",
                )
            if self._acts.seconds_left(self._account.id) < MARGIN:
                raise NotClean(
                    f"the legacy mailbox of {self._account.address} was not equal in time: {done.why()}",
                    hint="It is tried again; a larger cutover budget of the domain gives it more time.",
                )
            before = done

    def make_equal(self, location: str | None) -> Plan:
        """Read both sides, and do what makes them equal; what that was.

        Raises:
            Implausible: nothing was done.
            CalledOff
            BasculeError
        """
        is_wanted, is_forced = self._acts.return_is_wanted(self._account.id)
        if not is_wanted:
            raise CalledOff(f"the return of {self._account.address} was called off")
        if location is None:
            insist_on_mailbox(self._attempt)
        with self._attempt.local.open(self._account.address, location=location) as here_session:
            here = self._read_here(here_session)
            there = self._read_there(here)
            records = self._records(here)
            todo = plan(here, there, records)
            if self._resolve(records, here, set(todo.places.values())):
                records = self._records(here)
                todo = plan(here, there, records)
            if not is_forced:
                insist_on_plausible(here, there, records, self._at_flip, self._account.address)
            self._execute(todo, here, there, here_session)
        return todo

    # Reading --------------------------------------------------------------------------

    def _read_here(self, session: Writer) -> Side:
        """The mailbox here, by the names that the legacy server has for its folders."""
        layout = session.layout()
        selectable = [each.name for each in layout.folders if each.selectable]
        legacy_names = names_there(selectable, self._legacy_names)
        self._names_here = {legacy_names[name]: name for name in selectable}
        folders = self._seen_here.read(session, selectable)
        return Side(
            {legacy_names[name]: folder for name, folder in folders.items()},
            frozenset(legacy_names.get(name, self._legacy_names.get(name, name)) for name in layout.subscribed),
            layout.separator,
        )

    def _read_there(self, here: Side) -> Side:
        # A folder that one LIST leaves out is there all the same: nothing is appended to it once more.
        layout = self._there.layout(here.folders)
        self._selected = ""
        waived = self._acts.waived_folders(self._account.id)
        # One that was left out, and that the user has made here: what is there stays, for it was never here.
        waived |= left_out(self._attempt, self._there, layout) - here.folders.keys()
        self._on_wire = {recorded(each.name): each.name for each in layout.folders if each.selectable}
        wanted = {name: wire for name, wire in self._on_wire.items() if name not in waived}
        read = self._seen_there.read(self._there, list(wanted.values()))
        folders = {name: read[wire] for name, wire in wanted.items()}
        for name in folders.keys() & here.folders.keys() - self._keeps.keys():
            if folders[name].messages or here.folders[name].messages:
                self._select(name)
        return Side(
            {
                name: replace(folder, kept=self._keeps.get(name), refused=frozenset(self._refused.get(name, ())))
                for name, folder in folders.items()
            },
            frozenset(map(recorded, layout.subscribed)),
            layout.separator,
        )

    def _wire(self, name: str) -> str:
        """The name of a folder as the legacy server has it."""
        return self._on_wire.get(name, name)

    def _records(self, here: Side) -> Records:
        for name, (uidvalidity, uidnext) in self._flipped.items():
            if name in self._known:
                continue
            found = Known.load(self._attempt.home, name, uidvalidity, uidnext)
            if found is None:
                came = {
                    uid: each
                    for (folder, validity, uid), each in self._evidence.items()
                    if (recorded(folder), validity) == (name, uidvalidity)
                }
                found = Known.of_flip(name, uidvalidity, uidnext, came, self._at_flip.get(name, 0))
                folder_here = here.folders.get(name)
                if not found.complete and folder_here is not None and folder_here.uidvalidity == uidvalidity:
                    found.learn(folder_here.messages.values())
            self._known[name] = found
        return Records(
            self._known,
            self._acts.stragglers(self._account.id),
            self._acts.notes(self._account.id),
            self._acts.waived_messages(self._account.id),
        )

    def _resolve(self, records: Records, here: Side, taken: set[tuple[str, int]]) -> bool:
        """Find out the UIDs of messages that were, or may have been, appended; whether one was found.

        One that is still here and of which nobody knows whether it was appended is looked for in its turn.
        """
        found = False
        for note in records.notes:
            folder = here.folders.get(note.folder)
            is_here = folder is not None and note.uid in folder.messages and folder.guids.get(note.uid, "") == note.guid
            is_there = note.folder in self._on_wire
            if note.legacy_uid is not None or (is_here and not note.appended) or not is_there:
                continue
            if not self._is_first("note", f"{note.folder} {note.uid} {note.guid}"):
                continue
            if (uid := self._find(note, taken, is_sure=False)) is not None:
                self._acts.returned(self._account.id, note.folder, note.uid, uid)
                taken.add((note.folder, uid))
                found = True
        return found

    # Writing --------------------------------------------------------------------------

    def _execute(self, todo: Plan, here: Side, there: Side, session: Writer) -> None:
        for name in todo.creates:
            self._there.create(name)
        for name, wanted in todo.subscriptions:
            if self._is_first("subscription", name):
                self._there.subscribe(self._wire(name), wanted=wanted)
        taken = set(todo.places.values())
        for name, uid in todo.appends:
            found = self._append(name, uid, here, there, session, taken)
            if found is not None:
                taken.add((name, found))
        self._spool.unlink(missing_ok=True)
        # All that is to be there is there; only now is anything removed.
        for name, uids in todo.expunges.items():
            self._expunge(name, uids, there.folders[name], taken)
        for store in todo.stores:
            self._store(store)
        for name in todo.deletes:
            self._delete(name)

    def _append(
        self, name: str, uid: int, here: Side, there: Side, session: Writer, taken: set[tuple[str, int]]
    ) -> int | None:
        """Append a message, unless an attempt that died did; its UID there, or None where that cannot be found out."""
        acts, mailbox_id = self._acts, self._account.id
        folder_here = here.folders[name]
        message, guid = folder_here.messages[uid], folder_here.guids.get(uid, "")
        content = self._spool_message(name, message, session)
        for note in acts.notes(mailbox_id):
            if (note.folder, note.uid, note.guid, note.digest) != (name, uid, guid, content.digest):
                continue
            if note.legacy_uid is None and (found := self._find(note, taken, is_sure=False)) is not None:
                acts.returned(mailbox_id, name, uid, found)
                return found
        keeps = self._select(name)
        first = max((at for folder, at in taken if folder == name), default=0)
        first = max([first, *there.folders[name].messages] if name in there.folders else [first]) + 1
        note = Note(
            name, uid, guid, content.digest, first, None, self._there.uidvalidity, message.internaldate,
            content.message_id,
        )  # fmt: skip
        acts.intend_return(mailbox_id, note)
        found = self._append_spooled(name, kept(message.flags - {ARRIVING}, keeps), message)
        if found is None:
            acts.appended(mailbox_id, name, uid)
            found = self._find(note, taken, is_sure=True)
        if found is not None:
            acts.returned(mailbox_id, name, uid, found)
        return found

    def _append_spooled(self, name: str, flags: frozenset[str], message: Message) -> int | None:
        if not self._there.expunges_singly:
            flags -= {"\\Deleted"}  # set afterwards: an EXPUNGE of ours would take it
        system = frozenset(flag for flag in flags if flag.startswith("\\"))
        try:
            return self._append_with(name, flags, message)
        except ServerUnavailable as error:
            if flags == system or is_told_to_wait(error):
                raise
            # It may be for a keyword. If the session is lost, so is the next command.
            found = self._append_with(name, system, message)
            self.left_behind.append(f"The legacy server refuses a keyword of a message in {name!r}: {error.message}")
            return found

    def _append_with(self, name: str, flags: frozenset[str], message: Message) -> int | None:
        with self._spool.open("rb") as body:
            size = self._spool.stat().st_size
            return self._there.append(
                self._wire(name), flags, message.internaldate, size, iter(lambda: body.read(PIECE), b"")
            )

    def _spool_message(self, name: str, message: Message, session: Writer) -> Content:
        """Put a message from here into the spool file; what it holds."""
        digest = Digest()

        def receive(_size: int, pieces: Iterator[bytes]) -> object:
            with self._spool.open("wb") as file:
                for piece in pieces:
                    digest.update(piece)
                    file.write(piece)
            return True

        came: list[int] = []
        wanted = Wanted([Batch(self._names_here[name], (message,))])
        session.bodies(wanted, receive, lambda _, each, __: came.append(each.uid))
        if not came:
            raise LocalUnavailable(
                f"Dovecot does not give the message with UID {message.uid} of {name!r} here",
                hint="It may have been removed meanwhile; if it stays so, see Dovecot's log.",
            )
        return digest.content()

    def _find(self, note: Note, taken: set[tuple[str, int]], *, is_sure: bool) -> int | None:
        """The UID of the message that was, or may have been, appended; ``is_sure``: it was."""
        known_there = {uid for folder, uid in taken if folder == note.folder}
        known_there |= {
            each.legacy_uid
            for each in self._acts.notes(self._account.id)
            if each.folder == note.folder and each.legacy_uid is not None
        }
        self._selected = ""
        changes = next(insisted(self._there.newer([(self._wire(note.folder), note.legacy_uidnext)])))
        new = [each for each in changes.new if each.uid not in known_there]
        similar: list[int] = []
        for message in sorted(new, key=lambda each: (each.internaldate != note.internaldate, each.uid)):
            content = content_at(self._there, self._wire(note.folder), message)
            if content is None:
                continue
            if content.digest == note.digest:
                return message.uid
            # There are servers that alter what is appended.
            if message.internaldate == note.internaldate and note.message_id == content.message_id:
                similar.append(message.uid)
        if similar:
            return similar[0]
        return new[0].uid if is_sure and len(new) == 1 else None

    def _expunge(self, name: str, uids: tuple[int, ...], before: Folder, taken: set[tuple[str, int]]) -> None:
        """Remove messages that are, when looked at once more, still those that were read."""
        self._selected = ""
        self._select(name)
        if self._there.uidvalidity not in {0, before.uidvalidity}:
            raise LegacyUnavailable(f"the folder {name!r} was made anew on the legacy server meanwhile")
        gone = [
            message.uid
            for message in self._there.look_again(self._wire(name), uids)
            if _is_same(message, before.messages[message.uid])
        ]
        if not gone:
            return
        if not self._there.expunges_singly:
            # Those of ours that are marked here, too, are marked again afterwards, as the next plan says.
            ours = {uid for folder, uid in taken if folder == name}
            if marked := (self._there.marked_deleted() - set(gone)) & ours:
                self._there.change_flags(sorted(marked), {"\\Deleted"}, wanted=False)
        try:
            self._there.expunge(sorted(gone))
        except ServerUnavailable as error:
            if is_told_to_wait(error):
                raise
            raise LegacyUnavailable(
                f"nothing can be expunged from {name!r}: {error.message}", hint=error.hint
            ) from error

    def _store(self, store: Store) -> None:
        """Set flags, or take them away; those that the server does not keep are given up, and named."""
        self._select(store.folder)
        for flag in store.flags:
            self._stored.update((store.folder, uid, flag.lower()) for uid in store.uids)
            if any(self._stored[store.folder, uid, flag.lower()] > STUBBORN for uid in store.uids):
                self._give_up_flag(store.folder, flag, "it does not stay as it is set")
        flags = {flag for flag in store.flags if flag.lower() not in self._refused.get(store.folder, ())}
        try:
            if flags:
                self._there.change_flags(store.uids, flags, wanted=store.wanted)
        except CommandRefused:
            for flag in sorted(flags):
                try:
                    self._there.change_flags(store.uids, {flag}, wanted=store.wanted)
                except CommandRefused as error:
                    self._give_up_flag(store.folder, flag, error.message)

    def _give_up_flag(self, name: str, flag: str, why: str) -> None:
        self._refused.setdefault(name, set()).add(flag.lower())
        self.left_behind.append(f"The legacy server does not keep the flag {flag} in {name!r}: {why}")

    def _delete(self, name: str) -> None:
        """Remove a folder in which there is nothing, as it says just before."""
        if not self._is_first("folder", name):
            return
        self._selected = ""
        self._select("INBOX")  # some refuse to remove what is open
        messages = insist(self._there.statuses([self._wire(name)]))[self._wire(name)].messages
        if messages:
            self.left_behind.append(f"The folder {name!r} stays at the legacy server: {messages} messages came to it.")
        else:
            self._there.delete(self._wire(name))

    def _select(self, name: str) -> frozenset[str] | None:
        """Open a folder there for writing, for there are servers that refuse APPEND where it is open read-only."""
        if self._selected != name:
            self._keeps[name] = self._there.select(self._wire(name))
            self._selected = name
        return self._keeps[name]

    def _is_first(self, kind: str, name: str) -> bool:
        """Whether this is tried for the first time: it is no reason to go on and on."""
        is_first = (kind, name) not in self._tried
        self._tried.add((kind, name))
        return is_first

    @cached_property
    def _evidence(self) -> Mapping[tuple[str, int, int], Evidence]:
        return evidence(self._attempt.home)


def names_there(here: Iterable[str], copied: Mapping[str, str]) -> dict[str, str]:
    """The legacy name of each folder here: where it was copied from, else its own, or the next that is free.

    ``copied``: the legacy name of each folder that was copied, by its name here. A rule may have given a folder
    another name here, and the user may since have made one that is called as that one is there.
    """
    names = {name: copied[name] for name in here if name in copied}
    taken = set(names.values())
    for name in sorted(set(here) - names.keys()):
        found, number = name, 1
        while found in taken:
            number += 1
            found = f"{name}-{number}"
        taken.add(found)
        names[name] = found
    return names


def _is_same(now: Message, before: Message) -> bool:
    """Whether a message there is the one that was read under its UID."""
    is_dated = now.is_dated and before.is_dated
    return (not is_dated or now.internaldate == before.internaldate) and (
        now.size == before.size or 0 in {now.size, before.size}
    )
