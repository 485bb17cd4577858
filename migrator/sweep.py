"""After the flip: what came late to the legacy mailbox is brought here, and the last message is written there.

A folder is looked at from the UIDNEXT of the flip on; from its beginning, if it
is the first time, if it has more messages below than it had, if one is seen
that may have been numbered anew, or if the folder was made anew. Whether it is
looked at STATUS says, but for INBOX, where nearly all late mail comes: there
are servers whose STATUS stands still until somebody opens the folder. Which
messages came late is decided in :mod:`bascule.migrator.late`;
:mod:`bascule.migrator.delivery` puts them into the mailbox.

One folder that cannot be read ends nothing: the others are swept, the last
message is written, and what was wrong is reported at the end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from pathlib import Path

from bascule import log
from bascule.errors import BasculeError, LegacyUnavailable, ServerUnavailable
from bascule.imap.reader import (
    Changes,
    FolderNotReadable,
    FolderRefused,
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
from bascule.migrator.acts import Identity, Straggler, recorded
from bascule.migrator.attempt import Attempt
from bascule.migrator.delivery import Delivery, content_at, deliverable, file_name, message_id_of, new_name
from bascule.migrator.known import LAST, Known, Look, Looks, Print
from bascule.migrator.late import Content, Identification, Sorting, Verdict, sort_by_place
from bascule.migrator.left_out import left_out
from bascule.migrator.letters import message_id
from bascule.migrator.storage import Evidence, evidence

CHUNK = 200  # messages whose bodies are on this host's disk at a time, but for those that came late


class Undecided(BasculeError):
    """Of some messages at the legacy server it cannot be found out whether they came late."""


class MailboxGone(BasculeError):
    """The mailbox of a user who has moved is not where it must be."""


class LateMessageUnreadable(LegacyUnavailable):
    """The legacy server does not give a message that came late."""


def sweep(attempt: Attempt) -> None:
    """Bring what came late, and write the last message and the welcome if they are not there yet.

    Raises:
        BasculeError, OSError: what was brought until then is kept.
    """
    acts, account = attempt.acts, attempt.account
    began = acts.now()
    late = bring_late(attempt)
    trouble = late.trouble
    last: BasculeError | None = None
    if account.last_message_at is None:
        if account.to_be_welcomed:
            try:
                attempt.letters.welcome(account)
                acts.welcomed(account.id)
            except BasculeError as error:
                trouble = trouble or error
        last = _write_last_message(attempt, is_there=late.last_message_is_there)
        if last is None and trouble is None:
            acts.last_message_written(account.id)
            log.get().info("last message written", address=str(account.address))
    if trouble is not None:
        raise trouble
    if last is None:
        acts.sweep_done(account.id, began)
    else:
        acts.sweep_done(account.id, began, last.message, last.hint)


def bring_late(attempt: Attempt) -> Late:
    """Bring what came late; what is wrong with single messages or folders is in the result.

    Raises:
        BasculeError, OSError: the legacy server or the mailbox here cannot be used.
    """
    account = attempt.account
    attempt.storage.recover(account.address, attempt.home, "local")
    insist_on_mailbox(attempt)
    with Delivery(attempt) as delivery:
        delivery.begin()
        attempt.sessions.reserve(1)
        late = Late(attempt, delivery)
        with late:
            late.bring()
    return late


def insist_on_mailbox(attempt: Attempt) -> None:
    """
    Raises:
        MailboxGone: Dovecot would make an empty one in its place.
    """
    if not attempt.storage.is_there(attempt.home):
        raise MailboxGone(
            f"the mailbox of {attempt.account.address} is not in {attempt.home}",
            hint="Is its file system mounted? Nothing is done with it until it is back.",
        )


def _write_last_message(attempt: Attempt, *, is_there: bool) -> BasculeError | None:
    """Append the last message in a session that has opened no folder, for there are servers that insist on that.

    Returns:
        Why it is not there; the legacy mailbox may be full, and that is no reason not to sweep it.
    """
    if is_there:
        return None
    try:
        with attempt.sessions.open_client() as client:
            client.append("INBOX", attempt.letters.last(attempt.account))
    except BasculeError as error:
        log.get().warning("last message not written", address=str(attempt.account.address), reason=error.message)
        return BasculeError(
            f"last message not written: {error.message}",
            hint="It is tried again at each sweep. Make room there, or do without: "
            f"bascule waive-last-message {attempt.account.address} --reason ...",
        )
    return None


class Here:
    """The mailbox here, for questions about one legacy folder."""

    def __init__(self, delivery: Delivery, folder: str, uidvalidity: int, everything: dict[str, list[Message]]) -> None:
        """``everything`` are the messages of all folders here, or nothing: then they are read when needed."""
        self._delivery = delivery
        self._folder = delivery.name_here(folder)
        self._uidvalidity = uidvalidity
        self._everything = everything
        self._digests: dict[tuple[str, int], bytes | None] = {}

    @cached_property
    def messages(self) -> dict[int, Message]:
        """What the folder here has under the UIDs of the legacy server."""
        if self._folder not in self._delivery.folders_here():
            return {}
        status = insist(self._delivery.here.statuses([self._folder]))[self._folder]
        if status.uidvalidity != self._uidvalidity or not status.messages:
            return {}
        changes = next(insisted(self._delivery.here.changes([(self._folder, None)])))
        return {each.uid: each for each in changes.new}

    def digest_at(self, uid: int) -> bytes | None:
        return self._digest(self._folder, self.messages[uid]) if uid in self.messages else None

    def holds(self, content: Content) -> bool:
        if not self._everything:
            here = self._delivery.here
            statuses = insist(here.statuses(sorted(self._delivery.folders_here())))
            used = [name for name, status in statuses.items() if status.messages]
            for changes in insisted(here.changes((name, None) for name in used)):
                self._everything[changes.folder] = changes.new
        return any(
            message.size == content.size and self._digest(folder, message) == content.digest
            for folder, messages in self._everything.items()
            for message in messages
        )

    def _digest(self, folder: str, message: Message) -> bytes | None:
        key = (folder, message.uid)
        if key not in self._digests:
            content = content_at(self._delivery.here, folder, message)
            self._digests[key] = None if content is None else content.digest
        return self._digests[key]


@dataclass(slots=True)
class _Body:
    """A message of the legacy server whose bytes are in a file."""

    message: Message
    content: Content
    file: Path


class Late:
    """One look at a whole legacy mailbox, in one session at a time; use it in a ``with`` statement."""

    def __init__(self, attempt: Attempt, delivery: Delivery) -> None:
        acts, account = attempt.acts, attempt.account
        self._attempt = attempt
        self._delivery = delivery
        #: The first thing that is wrong with one message or folder; the others were swept.
        self.trouble: BasculeError | None = None
        self.last_message_is_there = False
        self._not_read: dict[str, str] = {}  # why, by folder
        self._named: list[dict[str, object]] = []  # messages that are not brought
        self._on_wire: dict[str, str] = {}  # folders as the legacy server names them
        self._stack = ExitStack()
        self._source: Reader
        self._numbers = count()
        self._everything_here: dict[str, list[Message]] = {}
        self._flipped = acts.flipped_folders(account.id)
        self._had = {each["name"]: int(each["messages"]) for each in acts.verified_folders(account.id)}
        self._waived = acts.waived_messages(account.id)
        #: The folder whose messages came only where they are in no other, or empty.
        self._once = acts.once_at_flip(account.id)
        self._last_id = message_id("last", account)
        self._looks = Looks(attempt.home, account.migrated_at.isoformat() if account.migrated_at else "")

    def __enter__(self) -> Late:
        self._open()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _open(self) -> None:
        self._stack.close()
        self._source = self._stack.enter_context(self._attempt.sessions.open())

    def bring(self) -> None:
        """Bring what came late.

        Raises:
            BasculeError, OSError: the legacy server or the mailbox here cannot be used.
        """
        waived_folders = self._attempt.acts.waived_folders(self._attempt.account.id)
        layout = self._source.layout()
        on_wire = {recorded(each.name): each.name for each in layout.folders if each.selectable}
        not_brought = waived_folders | left_out(self._attempt, self._source, layout)
        self._on_wire = {name: wire for name, wire in on_wire.items() if name not in not_brought}
        statuses = self._statuses()
        first_of = {
            name: first for name, status in statuses.items() if (first := self._first(name, status)) is not None
        }
        anew = {name for name, status in statuses.items() if status.uidvalidity != self._at_flip(name, status)[0]}
        # A folder that was made anew is read whole, which takes long: the others come first.
        # What is in other folders, too, is brought from there, before it is looked at where it is once more.
        # All answers first: the same session then reads bodies.
        for changes in self._newer(
            dict(sorted(first_of.items(), key=lambda item: (item[0] == self._once, item[0] in anew)))
        ):
            try:
                if changes.folder == self._once:
                    self._folder_once(changes, statuses[changes.folder])
                    continue
                self._folder(changes, statuses[changes.folder], is_whole=first_of[changes.folder] == 1)
            except (Undecided, LateMessageUnreadable, FolderNotReadable) as error:
                self._note(error)
        self._looks.save()
        acts, mailbox_id = self._attempt.acts, self._attempt.account.id
        acts.set_unreadable_folders(mailbox_id, self._not_read)
        acts.set_unreadable(mailbox_id, self._named, complete=True)  # whatever was named before can be read by now

    def _statuses(self) -> dict[str, Status]:
        """The STATUS of each folder that can be read."""
        found: dict[str, Status] = {}
        inbox = [wire for name, wire in self._on_wire.items() if name == "INBOX"]
        others = [wire for name, wire in self._on_wire.items() if name != "INBOX"]
        for wire, status in (self._source.opened(inbox) | self._source.statuses(others)).items():
            if isinstance(status, FolderRefused):
                self._refused(status)
            else:
                found[recorded(wire)] = status
        return found

    def _newer(self, first_of: Mapping[str, int]) -> list[Changes]:
        """The messages of each folder from a UID on, but for folders that cannot be read; in the order of the names."""
        found: dict[str, Changes] = {}
        for changes in self._source.newer([(self._on_wire[name], first) for name, first in first_of.items()]):
            if isinstance(changes, FolderRefused):
                self._refused(changes)
            else:
                changes.folder = recorded(changes.folder)
                found[changes.folder] = changes
        return [found[name] for name in first_of if name in found]

    def _refused(self, folder: FolderRefused) -> None:
        """Go on without a folder that cannot be read."""
        name = recorded(folder.folder)
        self._not_read[name] = folder.reason
        self._note(
            FolderNotReadable(
                f"late mail of {name!r} is not brought, for it cannot be read: {folder.reason}", hint=self._hint(name)
            )
        )

    def _note(self, trouble: BasculeError) -> None:
        self.trouble = self.trouble or trouble

    def _hint(self, folder: str) -> str:
        address = self._attempt.account.address
        return (
            f"Look there. If nothing of it need come: bascule waive-messages {address} --folder {folder!r} --reason ..."
        )

    def _at_flip(self, name: str, status: Status) -> tuple[int, int]:
        """UIDVALIDITY and UIDNEXT at the flip; a folder that was made later is all new."""
        return self._flipped.get(name, (status.uidvalidity, 1))

    def _first(self, name: str, status: Status) -> int | None:
        """From which UID on a folder must be looked at; None: nothing has happened there."""
        uidvalidity, uidnext = self._at_flip(name, status)
        look = self._looks.get(name)
        if status.uidvalidity == uidvalidity and 0 < status.uidnext < uidnext:
            return uidnext  # what cannot be (RFC 3501 section 2.3.1.1): its STATUS says nothing of what has happened
        if not status.messages:
            return None
        if name == self._once:
            if status.uidvalidity != uidvalidity:
                self._note(
                    FolderNotReadable(
                        f"late mail of {name!r} is not brought: it was made anew, and what of it was in other folders "
                        "at the flip is not known any more",
                        hint=self._hint(name),
                    )
                )
                return None
            return uidnext if status.uidnext > uidnext or not status.uidnext else None
        if status.uidvalidity != uidvalidity:
            return None if look is not None and look.status == status and status.highestmodseq else 1
        has_newer = status.uidnext > uidnext or not status.uidnext
        if look is None:
            self._remember(name, uidvalidity, uidnext)
            return 1 if has_newer or status.messages > self._had.get(name, 0) else None
        if look.status == status and (status.highestmodseq or not has_newer) and not self._looks_for_last(name):
            return None
        return uidnext

    def _looks_for_last(self, name: str) -> bool:
        return name.upper() == "INBOX" and self._attempt.account.last_message_at is None

    def _remember(self, name: str, uidvalidity: int, uidnext: int) -> None:
        """Without evidence, keep what the mailbox here still has of a folder, before its owner removes more."""
        if name not in self._flipped or Known.load(self._attempt.home, name, uidvalidity, uidnext) is not None:
            return
        if len(self._came.get(name, ())) < self._had.get(name, 0):
            here = Here(self._delivery, name, uidvalidity, self._everything_here)
            self._known(name, uidvalidity, uidnext, here).save(self._attempt.home)

    def _known(self, name: str, uidvalidity: int, uidnext: int, here: Here) -> Known:
        """What is known of a folder, at first by the evidence of its flip and the mailbox here."""
        known = Known.load(self._attempt.home, name, uidvalidity, uidnext)
        if known is None:
            known = Known.of_flip(name, uidvalidity, uidnext, self._came.get(name, {}), self._had.get(name, 0))
            if not known.complete:
                known.learn(here.messages.values())
        return known

    # One folder -----------------------------------------------------------------------

    def _folder(self, changes: Changes, status: Status, *, is_whole: bool) -> None:
        name = changes.folder
        uidvalidity, uidnext = self._at_flip(name, status)
        here = Here(self._delivery, name, uidvalidity, self._everything_here)
        known = self._known(name, uidvalidity, uidnext, here)
        now = changes.uidvalidity or status.uidvalidity
        look = self._looks.get(name)
        sorting = self._sort(known, now, changes.new)
        below = (changes.exists or status.messages) - len(changes.new)
        if look is not None or known.complete:
            before = look.below if look is not None else len(known.prints)
        else:
            before = below
        if not is_whole and (sorting.is_renumbered or below > before):
            whole = self._newer({name: 1})
            if not whole:
                return
            changes = whole[0]
            now = changes.uidvalidity or now
            sorting = self._sort(known, now, changes.new)
            is_whole = True
        if is_whole:
            below = sum(1 for each in changes.new if each.uid < uidnext)
        if self._looks_for_last(name):
            places = [known.prints.get((now, message.uid)) for message in changes.new]
            self.last_message_is_there |= any(each is not None and each.origin == LAST for each in places)
        identification = Identification(sorting, known, here)
        try:
            self._identify(name, known, sorting, identification, self._unlisted(changes, sorting, known))
        finally:
            known.save(self._attempt.home)
        self._looks.set(name, Look(status, below))

    def _folder_once(self, changes: Changes, status: Status) -> None:
        """A folder of which only those messages came that were in no other: what came to it since the flip.

        What is in another folder now comes from there. Once it has, that is noted, so that it does not come a second
        time when somebody takes it out of that folder.
        """
        name = changes.folder
        uidvalidity, uidnext = self._at_flip(name, status)
        here = Here(self._delivery, name, uidvalidity, self._everything_here)
        known = self._known(name, uidvalidity, uidnext, here)
        brought = {each.uid for each in self._attempt.acts.stragglers(self._attempt.account.id) if each.folder == name}
        settled = brought | {uid for validity, uid in known.prints if validity == uidvalidity}
        dates = {each.uid: maildir.storable_date(each.internaldate) for each in changes.new}
        elsewhere = self._in_other_folders(name, (dates.keys() | changes.incomplete.keys()) - settled)
        known.prints |= {(uidvalidity, uid): Print(dates.get(uid, 0), 0, 0) for uid, came in elsewhere.items() if came}
        changes.new = [each for each in changes.new if each.uid not in elsewhere]
        changes.incomplete = {uid: reason for uid, reason in changes.incomplete.items() if uid not in elsewhere}
        sorting = self._sort(known, uidvalidity, changes.new)
        sorting.free_prints = {}  # those of the flip were not asked for
        identification = Identification(sorting, known, here)
        try:
            self._identify(name, known, sorting, identification, self._unlisted(changes, sorting, known))
        finally:
            known.save(self._attempt.home)
        self._looks.set(name, Look(status, 0))

    def _in_other_folders(self, name: str, uids: AbstractSet[int]) -> dict[int, bool]:
        """Those of the messages that are in another folder which comes along, too; whether they came from there."""
        if not uids:
            return {}
        ids = {recorded(wire): found for wire, found in self._source.message_ids(list(self._on_wire.values()))}
        own = {number: uid for uid, number in ids.pop(name, {}).items() if uid in uids}
        came = {(each.folder, each.uid) for each in self._attempt.acts.stragglers(self._attempt.account.id)}
        found: dict[int, bool] = {}
        for other, numbers in ids.items():
            shared = {uid: own[number] for uid, number in numbers.items() if number in own}
            if not shared:
                continue
            uidvalidity, uidnext = self._flipped.get(other, (0, 0))
            known = Known.load(self._attempt.home, other, uidvalidity, uidnext)
            for uid_there, uid in shared.items():
                is_known = known is not None and (uidvalidity, uid_there) in known.prints
                found[uid] = found.get(uid, False) or is_known or (other, uid_there) in came
        return found

    @cached_property
    def _came(self) -> dict[str, dict[int, Evidence]]:
        """The evidence of the flip, by folder and UID."""
        found: dict[str, dict[int, Evidence]] = {}
        for (name, uidvalidity, uid), each in evidence(self._attempt.home).items():
            if self._flipped.get(recorded(name), (0, 0))[0] == uidvalidity:
                found.setdefault(recorded(name), {})[uid] = each
        return found

    def _sort(self, known: Known, uidvalidity: int, messages: list[Message]) -> Sorting:
        acts, mailbox_id, name = self._attempt.acts, self._attempt.account.id, known.folder
        stragglers = [each for each in acts.stragglers(mailbox_id) if each.folder == name]
        notes = [each for each in acts.notes(mailbox_id) if each.folder == name]
        return sort_by_place(known, uidvalidity, messages, stragglers, notes, self._waived)

    def _unlisted(self, changes: Changes, sorting: Sorting, known: Known) -> dict[int, str]:
        """Why the server does not list a message whole, by UID, but for those that need not come."""
        here = {uid for uidvalidity, uid in known.prints if uidvalidity == sorting.uidvalidity}
        here |= {
            each.uid
            for each in self._attempt.acts.stragglers(self._attempt.account.id)
            if (each.folder, each.uidvalidity) == (changes.folder, sorting.uidvalidity)
        }
        return {
            uid: reason
            for uid, reason in changes.incomplete.items()
            if uid not in here and (changes.folder, sorting.uidvalidity, uid) not in self._waived
        }

    def _identify(
        self,
        name: str,
        known: Known,
        sorting: Sorting,
        identification: Identification,
        not_given: dict[int, str],
    ) -> None:
        """Read the doubtful messages, and bring those that came late."""
        acts, mailbox_id = self._attempt.acts, self._attempt.account.id
        left: list[_Body] = []
        for start in range(0, len(sorting.doubtful), CHUNK):
            for body in self._bodies(name, sorting.doubtful[start : start + CHUNK], not_given):
                if self._is_last(name, body.content):
                    identification.is_last(body.message, body.content)
                    body.file.unlink()
                elif identification.exactly(body.message, body.content) or self._came_from_another(
                    name, known, sorting.uidvalidity, body
                ):
                    body.file.unlink()
                else:
                    left.append(body)
        late: list[_Body] = []
        undecided: list[int] = []
        for body in left:
            verdict = identification.anyhow(body.message, body.content)
            if verdict is Verdict.LATE:
                late.append(body)
                continue
            body.file.unlink()
            if verdict is Verdict.UNDECIDED:
                undecided.append(body.message.uid)
        # What was numbered anew first: it makes room for those whose UID it had.
        self._record(name, identification)
        identification.finish()
        known.save(self._attempt.home)
        for body in late:
            self._bring(name, sorting.uidvalidity, body)
        named: list[dict[str, object]] = [
            {"folder": name, "uidvalidity": sorting.uidvalidity, "uid": uid, "reason": reason}
            for uid, reason in (not_given | dict.fromkeys(undecided, Verdict.UNDECIDED.value)).items()
        ]
        if named:
            acts.set_unreadable(mailbox_id, named, complete=False)
            self._named += named
        hint = self._hint(name)
        if not_given:
            uid, reason = next(iter(not_given.items()))
            raise LateMessageUnreadable(
                f"the late message with UID {uid} in {name!r} cannot be read: {reason}", hint=hint
            )
        if undecided:
            raise Undecided(
                f"of {len(undecided)} messages in {name!r}, the first with UID {undecided[0]}, it cannot be found out "
                "whether they came late or were removed here",
                hint=hint,
            )

    def _came_from_another(self, name: str, known: Known, uidvalidity: int, body: _Body) -> bool:
        """Whether a message of the folder that is brought in part was brought from another, before it was seen here."""
        if name != self._once:
            return False
        stragglers = self._attempt.acts.stragglers(self._attempt.account.id)
        if body.content.digest not in {each.digest for each in stragglers if each.folder != name}:
            return False
        date = maildir.storable_date(body.message.internaldate)
        known.prints[uidvalidity, body.message.uid] = Print(date, body.content.size, 0)
        return True

    def _bodies(self, name: str, messages: list[Message], not_given: dict[int, str]) -> list[_Body]:
        """The messages that the legacy server gives; why it does not give the others goes into ``not_given``."""

        def receive(size: int, pieces: Iterator[bytes]) -> object:
            return maildir.receive(f"{self._delivery.staging}/{next(self._numbers)}.new", size, pieces)

        received: list[_Body] = []

        def keep(_folder: str, message: Message, body: object) -> None:
            if not isinstance(body, maildir.Received):
                raise TypeError(f"not a received body: {type(body).__name__}")
            path = Path(body.path)
            content = Content(bytes.fromhex(body.digest), body.virtual_size, message_id_of(path))
            received.append(_Body(message, content, path))

        wanted = Wanted(batches(self._on_wire[name], messages))
        while len(wanted):
            try:
                self._source.bodies(wanted, receive, keep)
            except ServerUnavailable as error:  # one of them may have ended the session
                if is_told_to_wait(error) or not wanted.another_session():
                    raise
                self._open()
        refused = {uid: reason for (_, uid), reason in wanted.not_given_at_all.items()}
        if refused:  # but for those that are gone meanwhile
            there = self._source.which_are_there(self._on_wire[name], sorted(refused))
            not_given |= {uid: reason for uid, reason in refused.items() if uid in there}
        return sorted(received, key=lambda body: body.message.uid)

    def _is_last(self, folder: str, content: Content) -> bool:
        if folder.upper() != "INBOX" or content.message_id != self._last_id:
            return False
        self.last_message_is_there = True
        return True

    def _record(self, name: str, identification: Identification) -> None:
        acts, mailbox_id = self._attempt.acts, self._attempt.account.id
        moves: dict[Identity, Identity] = {
            (name, *old): (name, *new) for old, new in identification.moved_stragglers.items() if old != new
        }
        if moves:
            acts.renumber_stragglers(mailbox_id, name, moves)
        for note, uid in identification.found_notes:
            acts.returned(mailbox_id, note.folder, note.uid, uid)

    def _bring(self, name: str, uidvalidity: int, body: _Body) -> None:
        taken = {file_name(each) for each in self._attempt.acts.stragglers(self._attempt.account.id)}
        message, content = body.message, body.content
        self._delivery.stage(
            Straggler(
                name,
                uidvalidity,
                message.uid,
                delivered=False,
                message_id=content.message_id,
                digest=content.digest,
                internaldate=message.internaldate,
                flags=deliverable(message.flags),
                name=new_name(name, uidvalidity, message.uid, content.digest, taken),
            ),
            body.file,
        )
