"""The pipelined IMAP session and the reader on it, against a wire that plays a script.

The script stands for servers that the lab has not: what they answer is legal, or was seen in the field.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bascule.errors import LegacyBusy, LegacyUnavailable
from bascule.imap import responses
from bascule.imap.bodies import Batch, Message, Wanted, batches
from bascule.imap.pipeline import CommandRefused, Connection, Pipeline, quoted, uid_set
from bascule.imap.reader import Changes, FolderNotReadable, FolderRefused, Reader, Status, insisted
from bascule.imap.wire import Wire
from bascule.lab.scripted import Script
from bascule.legacy import LegacyPeer

PEER = LegacyPeer("imap.old.test", 993, 5)
CLOSED = "imap.old.test:993 closed the connection"


def pipeline_on(*answers: bytes) -> Pipeline:
    return Pipeline(Wire(Script(*answers), PEER, silence=5))


def source(*answers: bytes, capabilities: frozenset[str] = frozenset()) -> tuple[Reader, Script]:
    script = Script(*answers)
    pipeline = Pipeline(Wire(script, PEER, silence=5))
    return Reader(Connection(pipeline, "", capabilities)), script


def changes_of(reader: Reader, *wanted: tuple[str, Status | None]) -> list[Changes]:
    return list(insisted(reader.changes(wanted)))


def fetched(reader: Reader, folder: str, messages: list[Message]) -> tuple[dict[int, bytes], Wanted]:
    """The bodies that come, by UID."""
    found: dict[int, bytes] = {}
    wanted = Wanted(batches(folder, messages))

    def keep(_folder: str, message: Message, body: object) -> None:
        assert isinstance(body, bytes)
        assert message.uid not in found
        found[message.uid] = body

    reader.bodies(wanted, lambda _, pieces: b"".join(pieces), keep)
    return found, wanted


def some(*uids: int) -> list[Message]:
    return [Message(uid, 3, 0, frozenset()) for uid in uids]


# The session ------------------------------------------------------------------------


def test_answers_may_come_in_any_order() -> None:
    script = Script(b"* 1 EXISTS\r\np2 OK two\r\n* 2 EXISTS\r\np1 OK one\r\np3 NO [CANNOT] three\r\n")
    pipeline = Pipeline(Wire(script, PEER, silence=5))
    first, second = pipeline.send(b"ONE", b"TWO")
    third = pipeline.send(b"THREE")
    assert script.sent == b"p1 ONE\r\np2 TWO\r\np3 THREE\r\n"
    assert [each.text for each in pipeline.answers([first, second])] == [b"1 EXISTS", b"2 EXISTS"]
    with pytest.raises(CommandRefused, match="three") as refused:
        list(pipeline.answers(third))
    assert refused.value.code == "CANNOT"
    assert len(pipeline) == 0


@pytest.mark.parametrize("code", ["OVERQUOTA", "LIMIT", "INUSE", "UNAVAILABLE", "throttled"])
def test_a_server_that_cannot_now_says_so(code: str) -> None:
    pipeline = pipeline_on(f"p1 NO [{code}] come back\r\n".encode())
    with pytest.raises(LegacyBusy, match="come back") as busy:
        pipeline.run(b"FETCH")
    assert busy.value.code == code.upper()
    assert ("full there" in busy.value.hint) == (code == "OVERQUOTA")


def test_bye_is_never_taken_for_an_answer() -> None:
    pipeline = pipeline_on(b"* BYE [UNAVAILABLE] maintenance\r\n")
    with pytest.raises(LegacyBusy, match="maintenance") as busy:
        pipeline.run(b"NOOP")
    assert busy.value.code == "UNAVAILABLE"
    assert "sessions" not in busy.value.hint


@pytest.mark.parametrize(
    "answer",
    [b"", b"* 1 FETCH (UID 1 BODY[] {10}\r\nabc", b"p7 OK not asked\r\n", b"garbage\r\n", b"* 1 FETCH (UID 1 FLAGS ("],
)
def test_what_is_cut_off_or_not_imap_is_temporary(answer: bytes) -> None:
    pipeline = pipeline_on(answer)
    pipeline.send(b"X")
    with pytest.raises(LegacyUnavailable):
        while True:
            pipeline.read(lambda _, pieces: b"".join(pieces))


def test_text_for_people_is_not_read_as_data() -> None:
    pipeline = pipeline_on(b"* OK [ALERT] braces {5}\r\n* NO (oops\r\np1 OK done {3}\r\n")
    assert [each.text for each in pipeline.run(b"NOOP")] == [b"OK [ALERT] braces {5}", b"NO (oops"]


def test_a_literal_that_was_not_asked_for_does_not_fill_the_memory() -> None:
    pipeline = pipeline_on(b"* LIST () NIL {99999999}\r\n")
    with pytest.raises(LegacyUnavailable, match="not asked for"):
        pipeline.run(b"LIST")


@given(st.recursive(st.binary(max_size=8), lambda inner: st.lists(inner, max_size=4), max_leaves=12).map(lambda x: [x]))
def test_tokens_are_what_was_written(data: list[object]) -> None:
    literals: dict[int, bytes] = {}
    text = b""

    def write(item: object) -> None:
        nonlocal text
        if isinstance(item, list):
            text += b"("
            for each in item:
                write(each)
            text += b")"
            return
        assert isinstance(item, bytes)
        if b"\r" in item or b"\n" in item or b"\0" in item or len(item) % 2:
            literals[len(text)] = item
            text += b"{%d} " % len(item)
        else:
            text += b'"' + item.replace(b"\\", b"\\\\").replace(b'"', b'\\"') + b'" '

    for each in data:
        write(each)
    assert responses.tokens(text, literals) == data


@given(st.sets(st.integers(1, 2**32 - 1), min_size=1, max_size=60))
def test_uid_sets_name_what_they_are_made_of(uids: set[int]) -> None:
    named: set[int] = set()
    for part in uid_set(sorted(uids)).decode().split(","):
        first, _, last = part.partition(":")
        named |= set(range(int(first), int(last or first) + 1))
    assert named == uids


def test_ranges_are_joined() -> None:
    assert uid_set([1, 2, 3, 7, 9, 10]) == b"1:3,7,9:10"


def test_a_name_with_a_line_break_is_not_sent() -> None:
    assert quoted('a "b" \\c') == b'"a \\"b\\" \\\\c"'
    with pytest.raises(CommandRefused, match="line break"):
        quoted("a\r\nx DELETE INBOX")


# The tree -----------------------------------------------------------------------------


def test_a_tree_in_all_its_spellings() -> None:
    reader, _ = source(
        b'* LIST (\\HasChildren) "." INBOX\r\n'
        b'* LIST (\\NoSelect) "." "INBOX.a \\"b\\""\r\n'
        b'* LIST (\\Sent) "." {9}\r\nINBOX.&-x\r\n'
        b'* LSUB () "." INBOX.007\r\n'
        b"p1 OK\r\n"
        b'* LSUB (\\Noselect) "." INBOX.parent\r\n'
        b'* LIST () "." user.other.box\r\n'
        b'* NAMESPACE (("INBOX." ".")) (("user." ".")) (("" "."))\r\n'
        b'* LIST () "." INBOX.007\r\n'
        b"p3 OK\r\np2 OK\r\n",
        capabilities=frozenset({"NAMESPACE"}),
    )
    layout = reader.layout()
    assert (layout.separator, layout.prefix) == (".", "INBOX.")
    assert [(each.name, each.selectable, each.special_use) for each in layout.folders] == [
        ("INBOX", True, ""),
        ('INBOX.a "b"', False, ""),
        ("INBOX.&-x", True, "\\Sent"),
        ("INBOX.007", True, ""),
    ]
    assert layout.subscribed == ("INBOX.007",)


def test_statuses_are_told_apart_by_name() -> None:
    reader, script = source(
        b'* STATUS "b (odd" (MESSAGES 2 UIDNEXT 9 UIDVALIDITY 5 HIGHESTMODSEQ 77)\r\np2 OK\r\n'
        b"* STATUS Inbox (UIDVALIDITY 4 MESSAGES 1)\r\np1 OK\r\n",
        capabilities=frozenset({"CONDSTORE"}),
    )
    assert reader.statuses(["INBOX", "b (odd"]) == {"INBOX": Status(4, 0, 1, 0), "b (odd": Status(5, 9, 2, 77)}
    assert b"HIGHESTMODSEQ" in script.sent


# Changes ------------------------------------------------------------------------------


def test_everything_of_a_folder() -> None:
    reader, _ = source(
        b"* 2 EXISTS\r\n* OK [UIDVALIDITY 5] x\r\n* OK [UIDNEXT 8] x\r\np1 OK\r\n"
        b'* 1 FETCH (FLAGS (\\SEEN UID 5 $Label1 \\Recent) INTERNALDATE " 7-Jul-1996 02:44:25 -0700" '
        b"RFC822.SIZE 10 UID 3)\r\n* 2 FETCH (FLAGS (\\Answered))\r\n"
        b'* 2 FETCH (UID 7 RFC822.SIZE 0 FLAGS () INTERNALDATE "1-jan-1970 00:00:01 +0000")\r\np2 OK\r\n'
    )
    (changes,) = changes_of(reader, ("INBOX", None))
    assert changes.complete
    assert (changes.uidvalidity, changes.uidnext, changes.exists) == (5, 8, 2)
    assert changes.new == [
        Message(3, 10, 836732665, frozenset({"\\Seen", "UID", "5", "$Label1"})),
        Message(7, 0, 1, frozenset()),
    ]


def test_changes_by_qresync() -> None:
    reader, script = source(
        b"p1 OK enabled\r\n* OK [UIDVALIDITY 5] x\r\n* VANISHED (EARLIER) 1,4:6\r\n"
        b"* 2 FETCH (UID 3 FLAGS (\\Flagged) MODSEQ (90))\r\np2 OK\r\n"
        b'* 9 FETCH (UID 8 FLAGS () RFC822.SIZE 1 INTERNALDATE "01-Jan-2001 00:00:00 +0000")\r\n'
        b"* 8 FETCH (UID 7 FLAGS ())\r\np3 OK\r\n",
        capabilities=frozenset({"QRESYNC", "ENABLE", "CONDSTORE"}),
    )
    (changes,) = changes_of(reader, ("a", Status(5, 8, 6, 80)))
    assert b'EXAMINE "a" (QRESYNC (5 80))\r\np3 UID FETCH 8:* ' in script.sent
    assert not changes.complete
    assert changes.vanished == [(1, 1), (4, 6)]
    # "8:*" gives the last message even when it is below 8: it is not taken for a new one.
    assert changes.flags == {3: frozenset({"\\Flagged"}), 7: frozenset()}
    assert [message.uid for message in changes.new] == [8]


def test_folders_are_asked_ahead_of_their_turn() -> None:
    reader, script = source(
        *(
            b"* OK [UIDVALIDITY %d] x\r\np%d OK\r\np%d OK\r\n" % (number, 2 * number - 1, 2 * number)
            for number in range(1, 4)
        )
    )
    changes = insisted(reader.changes((name, None) for name in ("a", "b", "c")))
    assert next(changes).uidvalidity == 1
    assert script.sent.count(b"EXAMINE") == 3
    assert [each.uidvalidity for each in changes] == [2, 3]


def test_a_server_that_refuses_all_sizes_because_of_one_is_asked_without() -> None:
    reader, script = source(
        b"* OK [UIDVALIDITY 5] x\r\np1 OK\r\np2 NO [SERVERBUG] cannot stat\r\n"
        b"* OK [UIDVALIDITY 5] x\r\np3 OK\r\np4 NO [SERVERBUG] cannot stat\r\n"
        b'* 1 FETCH (UID 3 FLAGS () INTERNALDATE "01-Jan-2001 00:00:00 +0000")\r\n'
        b"p5 OK\r\np6 OK\r\np7 OK\r\n"
    )
    (changes,) = changes_of(reader, ("a", None))
    assert [(message.uid, message.size) for message in changes.new] == [(3, 0)]
    assert b"p5 UID FETCH 1:* (UID FLAGS INTERNALDATE)\r\n" in script.sent


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        (b"p1 NO gone\r\np2 BAD no folder\r\np3 NO gone\r\n", "gone"),
        (b"p1 OK\r\np2 OK\r\np3 OK\r\n", "gives no UIDVALIDITY"),
        (
            b"* OK [UIDVALIDITY 5] x\r\n* NO [UIDNOTSTICKY] x\r\np1 OK\r\np2 OK\r\n"
            b"* OK [UIDVALIDITY 5] x\r\n* NO [UIDNOTSTICKY] x\r\np3 OK\r\n",
            "no persistent UIDs",
        ),
    ],
)
def test_a_folder_that_cannot_be_read_is_named(answers: bytes, said: str) -> None:
    reader, _ = source(answers)
    (found,) = reader.changes([("a", None)])
    assert isinstance(found, FolderRefused)
    assert found.folder == "a"
    assert said in found.reason
    with pytest.raises(FolderNotReadable, match="'a' cannot be read"):
        list(insisted([found]))


# Bodies -------------------------------------------------------------------------------


def test_bodies_in_every_legal_form() -> None:
    reader, script = source(
        b"p1 OK\r\n"
        b"* 1 FETCH (UID 1 BODY[] {3}\r\none)\r\n"
        b"* 2 FETCH (FLAGS (\\Seen) BODY[] {3}\r\ntwo UID 2)\r\n"  # the UID may come after the body
        b'* 3 FETCH (UID 3 BODY[] "t\\"3")\r\n'
        b'* 4 FETCH (BODY[] "" UID 4)\r\n'
        b"* 9 FETCH (UID 9 BODY[] {5}\r\nother)\r\n"  # nobody asked
        b"* 5 EXPUNGE\r\n"
        b"p2 OK\r\n"
    )
    found, wanted = fetched(reader, "INBOX", some(1, 2, 3, 4))
    assert found == {1: b"one", 2: b"two", 3: b't"3', 4: b""}
    assert not wanted.not_given_at_all
    assert script.sent == b'p1 EXAMINE "INBOX"\r\np2 UID FETCH 1:4 (UID BODY.PEEK[])\r\n'


def test_bodies_of_two_commands_may_come_mixed() -> None:
    large = [Message(uid, 3 << 20, 0, frozenset()) for uid in (1, 2)]  # one command each
    reader, _ = source(
        b"p1 OK\r\n* 2 FETCH (UID 2 BODY[] {1}\r\nb)\r\n* 1 FETCH (UID 1 BODY[] {1}\r\na)\r\np3 OK\r\np2 OK\r\n"
    )
    found, wanted = fetched(reader, "INBOX", large)
    assert found == {1: b"a", 2: b"b"}
    assert not wanted.not_given_at_all


def test_a_message_that_is_refused_is_asked_for_by_itself() -> None:
    reader, _ = source(
        b"p1 OK\r\n* 1 FETCH (UID 1 BODY[] {1}\r\na)\r\np2 NO [SERVERBUG] cannot read it\r\n"
        b"p3 NO [SERVERBUG] cannot read it\r\n* 3 FETCH (UID 3 BODY[] {1}\r\nc)\r\np4 OK\r\n"
    )
    found, wanted = fetched(reader, "INBOX", some(1, 2, 3))
    assert found == {1: b"a", 3: b"c"}
    assert wanted.not_given_at_all == {("INBOX", 2): "the legacy server refuses it: [SERVERBUG] cannot read it"}


def test_a_message_without_its_body_is_asked_for_by_itself() -> None:
    reader, _ = source(b"p1 OK\r\n* 1 FETCH (UID 1 BODY[] NIL)\r\np2 OK\r\np3 OK\r\n")
    found, wanted = fetched(reader, "INBOX", some(1))
    assert found == {}
    assert wanted.not_given_at_all == {("INBOX", 1): "the legacy server answers without it"}


def test_a_message_that_ends_the_session_is_found_out() -> None:
    wanted = Wanted([Batch("INBOX", tuple(some(1, 2)))])
    kept: list[int] = []

    def session(answers: bytes) -> None:
        reader, _ = source(answers)
        reader.bodies(wanted, lambda _, pieces: b"".join(pieces), lambda _, message, __: kept.append(message.uid))

    with pytest.raises(LegacyUnavailable):
        session(b"p1 OK\r\n* 1 FETCH (UID 1 BODY[] {1}\r\na)\r\n* OK still here\r\n* 2 FETCH (UID 2")
    # Nothing was asked for before it: it was the culprit, or it was chance.
    with pytest.raises(LegacyUnavailable):
        session(b"p1 OK\r\n* BYE crashed\r\n")
    assert not wanted.not_given_at_all
    with pytest.raises(LegacyUnavailable):
        session(b"p1 OK\r\n")
    assert kept == [1]
    assert wanted.not_given_at_all == {("INBOX", 2): f"the session is lost when it is asked for: {CLOSED}"}
    assert len(wanted) == 0


def test_what_was_asked_for_and_not_answered_is_wanted_again() -> None:
    large = [Message(uid, 3 << 20, 0, frozenset()) for uid in range(1, 6)]
    wanted = Wanted(batches("INBOX", large))
    reader, _ = source(b"p1 OK\r\n* 1 FETCH (UID 1 BODY[] {1}\r\na)\r\np2 OK\r\n")
    with pytest.raises(LegacyUnavailable):
        reader.bodies(wanted, lambda _, pieces: b"".join(pieces), lambda *_: None)
    left = []
    while (suspect := wanted.suspect()) is not None:
        left += [message.uid for message in suspect.messages]
        wanted.settled()
    assert left == [2, 3, 4, 5]
    assert not wanted.not_given_at_all


@given(st.lists(st.integers(0, 9 << 20), max_size=300))
def test_batches_hold_everything_and_not_too_much(sizes: list[int]) -> None:
    messages = [Message(uid, size, 0, frozenset()) for uid, size in enumerate(sizes, 1)]
    cut = list(batches("a", iter(messages)))
    assert [message for batch in cut for message in batch.messages] == messages
    for batch in cut:
        assert len(batch.messages) <= 100
        assert len(batch.messages) == 1 or sum(message.size for message in batch.messages) <= 4 << 20


def test_a_large_body_comes_in_pieces() -> None:
    size = 3 << 20
    reader, _ = source(b"p1 OK\r\n* 1 FETCH (UID 1 BODY[] {%d}\r\n" % size, b"x" * size, b")\r\np2 OK\r\n")
    pieces: list[int] = []

    def receive(announced: int, coming: Iterator[bytes]) -> object:
        assert announced == size
        pieces.extend(len(piece) for piece in coming)
        return True

    reader.bodies(Wanted([Batch("a", tuple(some(1)))]), receive, lambda *_: None)
    assert sum(pieces) == size
    assert max(pieces) <= 1 << 18


def test_guids_are_told_by_uid() -> None:
    reader, _ = source(
        b"p1 OK\r\n* 1 FETCH (UID 4 X-GUID 1200.L7.5.0123456789abcdef.bascule,S=66)\r\n"
        b'* 2 FETCH (X-GUID "f00d" UID 9)\r\np2 OK\r\n'
    )
    assert reader.guids("INBOX") == {4: "1200.L7.5.0123456789abcdef.bascule,S=66", 9: "f00d"}
