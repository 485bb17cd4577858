"""Which bodies are still to be fetched, and which the server does not give.

A server may end the session at a message that it cannot read. Its last answers
may then never arrive, so the first unanswered message is not the culprit: all
that were asked for are suspects. A suspect is asked for when nothing else of
the mailbox is under way: the batch first, then each of its messages, and what
loses the session is asked for once more, first thing in a fresh session. Only
what loses that one, too, is named.

In the same way a message is named that the server refuses, or answers without,
when it is asked for by itself. But a server that gives nothing more at all is
not a server with many broken messages: see :meth:`Wanted.is_doubtful`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from threading import Lock

from bascule.errors import BUSY_CODES, LegacyBusy, ServerUnavailable
from bascule.imap import responses
from bascule.imap.pipeline import CommandRefused, Pipeline, Receive, Untagged, quoted, uid_set
from bascule.imap.responses import Malformed

AHEAD = 32  # commands that are sent before their turn, at most
BATCH_MESSAGES, BATCH_BYTES = 100, 4 << 20  # that one FETCH asks for, at most (a larger message comes alone)
STRIKES = 2  # times that a message loses a session, asked for by itself
MAX_LOST = 40  # sessions in a row that give nothing; a message may lose three until it is named
RUN = 10  # messages in a row that are not given, before it is asked whether the server gives any at all


@dataclass(frozen=True, slots=True)
class Message:
    """``size`` is RFC822.SIZE, which need not be true, or 0 where the server does not say it.

    ``internaldate`` is in seconds since 1970. ``flags`` are as the server said
    them, byte for byte, also those that are no legal keywords
    (:func:`bascule.imap.responses.is_legal_keyword`).
    ``remarks`` are, in words, what was odd: it goes into the report. ``is_dated``:
    whether the server gave the date; else it is the nearest that could be found,
    and may be another one the next time.
    """

    uid: int
    size: int
    internaldate: int
    flags: frozenset[str]
    remarks: tuple[str, ...] = ()
    is_dated: bool = True


@dataclass(frozen=True, slots=True)
class Batch:
    """Messages of one folder whose bodies are asked for together."""

    folder: str
    messages: tuple[Message, ...]

    def apart(self) -> list[Batch]:
        """Each of its messages by itself."""
        return [Batch(self.folder, (message,)) for message in self.messages]


def batches(folder: str, messages: Iterable[Message]) -> Iterator[Batch]:
    """Cut messages into what one FETCH may ask for."""
    group: list[Message] = []
    size = 0
    for message in messages:
        if group and (len(group) == BATCH_MESSAGES or size + message.size > BATCH_BYTES):
            yield Batch(folder, tuple(group))
            group, size = [], 0
        group.append(message)
        size += message.size
    if group:
        yield Batch(folder, tuple(group))


class Wanted:
    """The batches that are still to be fetched, shared by the sessions of one mailbox.

    What the server does not give at all is in ``not_given_at_all``, by folder
    and UID with the reason. ``given`` counts the bodies that came.
    """

    def __init__(self, batches: Iterable[Batch]) -> None:
        self._batches = deque(batches)
        self._suspects: deque[Batch] = deque()
        self._under_way = 0
        self._asked_singly: set[tuple[str, int]] = set()
        self._strikes: dict[tuple[str, int], int] = {}
        #: Those of ``not_given_at_all`` since the server gave something last, and the sessions lost since then.
        self._run: list[Batch] = []
        self._lost = 0
        self._lock = Lock()
        self.not_given_at_all: dict[tuple[str, int], str] = {}
        self.given = 0
        #: A message that was given, to ask for again when nothing else is.
        self.known: Batch | None = None

    def __len__(self) -> int:
        return len(self._batches) + len(self._suspects)

    def has_batches(self) -> bool:
        """Whether there is something that any session may ask for."""
        return bool(self._batches)

    def take(self) -> Batch | None:
        """The next batch, to be :meth:`settled`; None: there is none now."""
        with self._lock:
            if not self._batches:
                return None
            self._under_way += 1
            return self._batches.popleft()

    def suspect(self) -> Batch | None:
        """What is to be asked for with nothing else under way, to be :meth:`settled`; None: there is none now."""
        with self._lock:
            if self._batches or self._under_way or not self._suspects:
                return None
            self._under_way += 1
            return self._suspects.popleft()

    def settled(self) -> None:
        """A batch that was taken is under way no more."""
        with self._lock:
            self._under_way -= 1

    def stop(self) -> None:
        """Want nothing any more."""
        with self._lock:
            self._batches.clear()
            self._suspects.clear()

    def put_back(self, batches: Iterable[Batch]) -> None:
        """They were not asked for, or it is not their fault that they were not answered."""
        with self._lock:
            self._batches.extendleft(reversed(list(batches)))

    def suspected(self, batches: Iterable[Batch]) -> None:
        """A session was lost when these were under way."""
        with self._lock:
            self._suspects.extendleft(reversed(list(batches)))

    def lost_by(self, batch: Batch, reason: str, *, was_fresh: bool) -> None:
        """A session was lost when this suspect was asked for by itself; ``was_fresh``: and nothing before it."""
        if len(batch.messages) > 1:
            self.suspected(batch.apart())
            return
        key = (batch.folder, batch.messages[0].uid)
        with self._lock:
            self._strikes[key] = self._strikes.get(key, 0) + 1
            if was_fresh and self._strikes[key] >= STRIKES:
                self._name(batch, reason)
            else:
                self._suspects.appendleft(batch)

    def another_session(self) -> bool:
        """A session was lost; whether another one may do better, for the server gives something now and then."""
        with self._lock:
            self._lost += 1
            return self._lost <= MAX_LOST

    def came(self, folder: str, message: Message) -> None:
        """A body was given: the server gives some."""
        with self._lock:
            self.given += 1
            self._lost = 0
            self._run.clear()
            self.known = Batch(folder, (message,))

    def not_given(self, batch: Batch, reason: str) -> None:
        """The server refuses these or answers without them; if they were asked for together, each is wanted again."""
        with self._lock:
            for message in batch.messages:
                key = (batch.folder, message.uid)
                single = Batch(batch.folder, (message,))
                if len(batch.messages) == 1 and key in self._asked_singly:
                    self._name(single, reason)
                else:
                    self._asked_singly.add(key)
                    self._batches.append(single)

    def is_doubtful(self) -> bool:
        """Whether so many in a row were not given that the server may give none at all."""
        with self._lock:
            return len(self._run) >= RUN

    def gives_others(self) -> None:
        """What was named in a row is named rightly: the server does give other messages."""
        with self._lock:
            self._lost = 0
            self._run.clear()

    def gives_nothing(self) -> None:
        """Nothing can be said of what was named in a row: it is wanted again."""
        with self._lock:
            for batch in self._run:
                key = (batch.folder, batch.messages[0].uid)
                self.not_given_at_all.pop(key, None)
                self._strikes.pop(key, None)
            self._suspects.extend(self._run)
            self._run.clear()

    def _name(self, single: Batch, reason: str) -> None:
        self.not_given_at_all[single.folder, single.messages[0].uid] = reason
        self._run.append(single)


#: Takes the folder, the message, and what the receiver made of its body.
Keep = Callable[[str, Message, object], None]


def is_told_to_wait(error: ServerUnavailable) -> bool:
    """Whether the legacy server says itself that it is too much for it."""
    return isinstance(error, LegacyBusy) and error.code in BUSY_CODES


class Fetching:
    """What one session fetches of what is wanted.

    ``opening`` is SELECT or EXAMINE; ``opened`` the folder that is open already, or nothing.
    """

    def __init__(self, pipeline: Pipeline, opening: bytes, wanted: Wanted, receive: Receive, keep: Keep) -> None:
        self._pipeline = pipeline
        self._name = pipeline.peer.name
        self._opening = opening
        self._wanted = wanted
        self._receive = receive
        self._keep = keep
        self._opened = ""
        #: By tag, what was asked for; a string: the opening of that folder.
        self._asked: dict[bytes, Batch | str] = {}
        self._missing: dict[tuple[str, int], Message] = {}
        #: A body that is right as far as it goes; it is kept when what follows is right, too.
        self._unconfirmed: tuple[str, Message, object] | None = None
        self._not_asked_for = 0

    def run(self, *, is_fresh: bool) -> None:
        """Fetch until nothing is left that this session may ask for.

        ``is_fresh``: no body was asked for in this session before.

        Raises:
            ServerUnavailable: the connection is closed. What was asked for and
                not answered is wanted again, or suspected.
        """
        while True:
            if self._pipelined():
                is_fresh = False
            if self._wanted.is_doubtful():
                self._find_out()
            elif (suspect := self._wanted.suspect()) is not None:
                self._alone(suspect, is_fresh=is_fresh)
                is_fresh = False
            elif not self._wanted.has_batches():
                return

    def _pipelined(self) -> bool:
        """Fetch the batches, several commands ahead; whether there were any."""
        were_any = False
        last = self._opened
        taken: Batch | None = None
        try:
            while True:
                while len(self._asked) < AHEAD and not self._wanted.is_doubtful():
                    taken = self._wanted.take()
                    if taken is None:
                        break
                    were_any = True
                    self._ask(taken, last)
                    last, taken = taken.folder, None
                if not self._asked:
                    return were_any
                self._answer()
        except BaseException as error:
            self._abandon(taken, error)
            raise

    def _alone(self, suspect: Batch, *, is_fresh: bool) -> None:
        """Ask for a suspect with nothing else under way."""
        try:
            # By itself, too, so that a session that is lost later is not lost by the opening.
            if self._opened != suspect.folder:
                self._open(suspect.folder)
                while self._asked:
                    self._answer()
            self._ask(suspect, self._opened)
            while self._asked:
                self._answer()
        except BaseException as error:
            left = self._left(suspect) if self._opened == suspect.folder else suspect
            was_opened = self._opened == suspect.folder
            self._settle_all(1)
            if not isinstance(error, ServerUnavailable):
                self._wanted.suspected([left] if left.messages else [])
                raise
            self._close()
            if left.messages and was_opened and not is_told_to_wait(error):
                reason = f"the session is lost when it is asked for: {error.message}"
                self._wanted.lost_by(left, reason, was_fresh=is_fresh)
            else:
                self._wanted.suspected([left] if left.messages else [])
            raise

    def _abandon(self, taken: Batch | None, error: BaseException) -> None:
        """Want again, or suspect, what was under way when the session ended."""
        asked = [each for each in self._asked.values() if isinstance(each, Batch)]
        left = [each for each in map(self._left, asked) if each.messages]
        not_asked = [taken] if taken is not None else []
        if isinstance(error, ServerUnavailable):
            self._close()
            # Any may be the culprit: answers that were on their way are lost with a reset, even that to the opening.
            # One by itself was asked for with nothing else under way: this much is found out.
            self._wanted.suspected(left[0].apart() if len(left) == 1 else left)
            left = []
        self._wanted.put_back([*left, *not_asked])
        self._settle_all(len(asked) + (taken is not None))

    def _left(self, batch: Batch) -> Batch:
        """What of a batch did not come."""
        return Batch(batch.folder, tuple(each for each in batch.messages if (batch.folder, each.uid) in self._missing))

    def _settle_all(self, batches: int) -> None:
        self._asked.clear()
        self._missing.clear()
        self._unconfirmed = None
        for _ in range(batches):
            self._wanted.settled()

    def _close(self) -> None:
        self._pipeline.wire.close()

    def _open(self, folder: str) -> None:
        (tag,) = self._pipeline.send(b"%s %s" % (self._opening, quoted(folder)))
        self._asked[tag] = folder

    def _ask(self, batch: Batch, last_opened: str) -> None:
        self._missing |= {(batch.folder, message.uid): message for message in batch.messages}
        uids = uid_set(sorted(message.uid for message in batch.messages))
        commands = [b"UID FETCH %s (UID BODY.PEEK[])" % uids]
        if batch.folder != last_opened:
            commands.insert(0, b"%s %s" % (self._opening, quoted(batch.folder)))
        asked: list[Batch | str] = [batch.folder, batch]
        tags = self._pipeline.send(*commands)
        self._asked |= zip(tags, asked[-len(tags) :], strict=True)

    def _answer(self) -> None:
        """Read one response."""
        response = self._pipeline.read(self._receive)
        if self._unconfirmed is not None:
            folder, message, body = self._unconfirmed
            self._unconfirmed = None
            self._keep(folder, message, body)
            self._missing.pop((folder, message.uid), None)
            self._wanted.came(folder, message)
        if isinstance(response, Untagged):
            self._take(response)
            return
        done = self._asked.pop(response.tag)
        if isinstance(done, str):
            if response.refused is not None:
                raise self._cannot_open(done, response.refused)
            self._opened = done
            return
        left = tuple(each for each in done.messages if self._missing.pop((done.folder, each.uid), None))
        if left:
            why = f"refuses it: {response.refused.message}" if response.refused else "answers without it"
            self._wanted.not_given(Batch(done.folder, left), f"{self._name} {why}")
        self._wanted.settled()

    def _take(self, untagged: Untagged) -> None:
        try:
            fetched = responses.fetched(untagged.text, untagged.literals)
        except Malformed as error:
            if untagged.body is None:
                return  # an odd one that has no body, of this message or another
            # What follows a body is wrong: its length was not true, and whatever comes next may be a part of it.
            raise self._pipeline.peer.violates(untagged.text) from error
        if fetched is None or b"BODY[]" not in fetched.items:
            if untagged.body is not None:
                raise self._pipeline.peer.violates(untagged.text)
            return
        body, text = untagged.body, fetched.items[b"BODY[]"]
        message = self._missing.get((self._opened, fetched.number(b"UID") or 0))
        if message is None:
            self._not_asked_for += 1
            if self._not_asked_for > BATCH_MESSAGES:
                raise self._pipeline.peer.too_much("messages that were not asked for")
            return
        if text is None:
            return  # NIL: there is none
        if body is None:
            body = self._receive(len(text), iter((text,)))  # a short one may be a quoted string
        self._unconfirmed = (self._opened, message, body)

    def _cannot_open(self, folder: str, refused: CommandRefused) -> ServerUnavailable:
        return self._pipeline.peer.unavailable(
            f"the folder {folder!r} cannot be opened on {self._name}: {refused.message}",
            hint="Can the user open it there? Mend or remove it there, or leave it out.",
        )

    def _find_out(self) -> None:
        """Whether the server gives other messages: ask once more for one that it gave.

        Raises:
            ServerUnavailable: it does not, so nothing is said of those that it did not give.
        """
        known = self._wanted.known
        given = False
        reason = "it gives no message at all"
        if known is not None:
            uid = known.messages[0].uid
            try:
                tags = self._pipeline.send(
                    b"%s %s" % (self._opening, quoted(known.folder)), b"UID FETCH %d (UID BODY.PEEK[]<0.64>)" % uid
                )
                self._opened = known.folder
                while len(self._pipeline):
                    response = self._pipeline.read(lambda size, pieces: sum(map(len, pieces)) if size else 0)
                    if isinstance(response, Untagged):
                        fetched = responses.fetched(response.text, response.literals)
                        given |= fetched is not None and any(
                            item.startswith(b"BODY[]") and value is not None for item, value in fetched.items.items()
                        )
                    elif response.refused is not None and response.tag in tags:
                        reason = response.refused.message
            except Malformed as error:
                self._wanted.gives_nothing()
                self._close()
                raise self._pipeline.peer.violates("") from error
            except ServerUnavailable:
                self._wanted.gives_nothing()
                raise
        if given:
            self._wanted.gives_others()
            return
        self._wanted.gives_nothing()
        raise self._pipeline.peer.busy(
            f"{self._name} gives no message any more, not even one that it gave before: {reason}",
            code="THROTTLED",
            wait=0,
        )
