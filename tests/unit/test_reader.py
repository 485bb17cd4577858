"""The reader against servers as they are: real sockets, real logins, and a server that does as a script says."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from bascule.address import Address
from bascule.credential import Password
from bascule.errors import LegacyBusy, LegacyUnavailable, ServerUnavailable
from bascule.imap import bodies as fetching
from bascule.imap import names
from bascule.imap import reader as reader_module
from bascule.imap.bodies import Batch, Message, Wanted, batches
from bascule.imap.reader import Changes, FolderNotReadable, FolderRefused, Reader, Status, insist, insisted
from bascule.imap.writer import Writer
from bascule.lab.scripted import Command, Folder, Mail, Server, Session, mail
from bascule.legacy import LegacySettings, Service, Trust, UserLogin, session

SIZE = len(mail("m1"))
LOGIN = UserLogin(Address.parse("u@here.test"), Password("secret"))


@contextmanager
def reading(server: Server, timeout: float = 5) -> Iterator[Reader]:
    settings = LegacySettings("here.test", "127.0.0.1", Service(server.port, "none"), "127.0.0.1", 25)
    with session(settings, Trust(timeout=timeout), LOGIN) as connection:
        yield Reader.of(connection)


def inbox(*uids: int) -> list[Folder]:
    return [Folder(b"INBOX", [Mail(uid, mail(f"m{uid}")) for uid in uids])]


def listed(server: Server, folder: str = "INBOX", *, sizes: bool = True) -> Changes | FolderRefused:
    with server, reading(server) as reader:
        (found,) = reader.changes([(folder, None)], sizes=sizes)
        # Nothing is left on the line.
        assert reader.statuses([folder]).keys() == {folder}
        return found


def whole(server: Server, folder: str = "INBOX") -> Changes:
    found = listed(server, folder)
    assert isinstance(found, Changes), found
    assert not found.incomplete
    assert not found.nameless
    return found


# Messages -----------------------------------------------------------------------------


class Omits(Server):
    """Leaves an item out of UID 2's answer, for good or only when others are asked for, too."""

    omitted = b""
    for_good = True

    def fetch_line(self, session: Session, number: int, mail: Mail, names: list[bytes]) -> bytes:
        left = [name for name in names if name != self.omitted or mail.uid != 2]
        if not self.for_good and len(names) <= 2:
            left = names
        return super().fetch_line(session, number, mail, left)


@pytest.mark.parametrize("omitted", [b"UID", b"FLAGS", b"INTERNALDATE", b"RFC822.SIZE"])
def test_an_item_that_is_left_out_is_asked_for_alone(omitted: bytes) -> None:
    server = Omits(inbox(1, 2, 3))
    server.folders[0].mails[1].flags = b"\\Seen"
    server.omitted, server.for_good = omitted, False
    found = whole(server)
    assert [message.uid for message in found.new] == [1, 2, 3]
    second = found.new[1]
    assert (sorted(second.flags), second.size) == (["\\Seen"], SIZE)
    assert second.internaldate == found.new[0].internaldate
    assert second.is_dated


@pytest.mark.parametrize("omitted", [b"FLAGS", b"INTERNALDATE"])
def test_what_came_late_is_asked_for_alone_as_well(omitted: bytes) -> None:
    server = Omits(inbox(1, 2, 3))
    server.omitted, server.for_good = omitted, False
    with server, reading(server) as reader:
        (found,) = insisted(reader.newer([("INBOX", 2)]))
    assert [message.uid for message in found.new] == [2, 3]


def test_a_message_without_a_date_takes_that_of_its_header() -> None:
    server = Omits(inbox(1, 2, 3))
    server.omitted = b"INTERNALDATE"
    server.folders[0].mails[1].body = mail("m2", header="Date: Tue, 02 May 2023 11:12:13 +0200\r\n")
    second = whole(server).new[1]
    assert (second.internaldate, second.is_dated) == (1683018733, False)
    assert "the date of its header is taken" in second.remarks[0]
    assert "LOGOUT" in server.log[-1].decode()


def test_when_it_was_received_counts_more_than_when_it_was_written() -> None:
    server = Server(inbox(1))
    header = "Received: by b; Wed, 03 May 2023 00:00:00 +0000\r\nReceived: by a; Mon, 01 May 2023 00:00:00 +0000\r\n"
    server.folders[0].mails[0].body = mail("m", header=header + "Date: Tue, 02 May 2023 11:12:13 +0200\r\n")
    server.folders[0].mails[0].date = b'"14-Dez-2011 09:26:53 +0100"'
    (message,) = whole(server).new
    assert message.internaldate == 1683072000
    assert "14-Dez-2011" in message.remarks[0]


@pytest.mark.parametrize("date", [b"NIL", b'""', b'"00-Jan-0000 00:00:00 +0000"', b'" 1-Jan-0001 00:00:00 +0000"'])
def test_dates_that_cannot_be_known_stop_nothing(date: bytes) -> None:
    server = Server(inbox(1, 2, 3))
    server.folders[0].mails[1].date = date
    found = whole(server)
    assert [message.is_dated for message in found.new] == [True, False, True]
    assert "the present time is taken" in found.new[1].remarks[0]
    assert found.new[1].internaldate > 1_700_000_000


def test_a_message_without_a_size_has_none() -> None:
    omits = Omits(inbox(1, 2, 3))
    omits.omitted = b"RFC822.SIZE"
    assert [message.size for message in whole(omits).new] == [SIZE, 0, SIZE]
    server = Server(inbox(1, 2))
    server.folders[0].mails[1].size = b"NIL"
    assert [message.size for message in whole(server).new] == [SIZE, 0]


def test_a_message_without_flags_is_named() -> None:
    server = Omits(inbox(1, 2, 3))
    server.omitted = b"FLAGS"
    found = listed(server)
    assert isinstance(found, Changes)
    assert [message.uid for message in found.new] == [1, 3]
    assert found.incomplete == {2: "the server does not give its flags"}
    assert found.nameless == 0
    with pytest.raises(FolderNotReadable, match="UID 2: the server does not give its flags"):
        list(insisted([found]))


def test_a_message_without_a_uid_is_found_where_its_uid_must_be() -> None:
    server = Omits(inbox(1, 2, 3))
    server.omitted = b"UID"
    assert [message.uid for message in whole(server).new] == [1, 2, 3]


class Hides(Server):
    """Announces UID 2, and lists it only where ``shown`` says so."""

    shown: frozenset[bytes] = frozenset()

    def on_fetch(self, session: Session, command: Command, mails: list[tuple[int, Mail]], names: list[bytes]) -> None:
        how = b"alone" if len(mails) == 1 else command.verb
        super().on_fetch(session, command, [each for each in mails if each[1].uid != 2 or how in self.shown], names)

    def on_search(self, session: Session, command: Command, *, by_uid: bool) -> None:
        if b"SEARCH" in self.shown:
            super().on_search(session, command, by_uid=by_uid)
        else:
            session.say(b"* SEARCH 1 3")
            session.ok(command)


@pytest.mark.parametrize("shown", [{b"alone", b"SEARCH"}, {b"alone", b"FETCH"}, {b"alone"}])
def test_a_message_that_is_left_out_is_found_in_other_ways(shown: set[bytes]) -> None:
    server = Hides(inbox(1, 2, 3))
    server.shown = frozenset(shown)
    assert [message.uid for message in whole(server).new] == [1, 2, 3]


@pytest.mark.parametrize("shown", [set(), {b"SEARCH"}])
def test_a_message_that_is_announced_and_never_listed_is_counted(shown: set[bytes]) -> None:
    server = Hides(inbox(1, 2, 3))
    server.shown = frozenset(shown)
    found = listed(server)
    assert isinstance(found, Changes)
    assert [message.uid for message in found.new] == [1, 3]
    assert (found.exists, found.nameless) == (3, 1)
    with pytest.raises(FolderNotReadable, match="3 messages announced, 2 named"):
        list(insisted([found]))


def test_one_message_in_several_responses() -> None:
    class Parts(Server):
        def fetch_line(self, session: Session, number: int, mail: Mail, names: list[bytes]) -> bytes:
            parts = [[b"RFC822.SIZE"], [b"UID", b"FLAGS"], [b"INTERNALDATE"]] if len(names) > 2 else [names]
            return b"\r\n".join(super(Parts, self).fetch_line(session, number, mail, part) for part in parts)

    server = Parts(inbox(1, 2, 3))
    server.folders[0].mails[2].flags = b"\\Seen"
    found = whole(server)
    assert [(message.uid, message.size, sorted(message.flags)) for message in found.new] == [
        (1, SIZE, []), (2, SIZE, []), (3, SIZE, ["\\Seen"]),
    ]  # fmt: skip
    assert sum(line.startswith(b"UID FETCH") for line in server.log) == 1


def test_what_servers_say_meanwhile() -> None:
    class Talkative(Server):
        def fetch_line(self, session: Session, number: int, mail: Mail, names: list[bytes]) -> bytes:
            said = b"* 99 EXISTS\r\n* 0 RECENT\r\n* 3 FETCH (FLAGS (\\Flagged))\r\n* OK [ALERT] (quota {5}\r\n"
            more = b"\r\n* 2 FETCH (UID 2 FLAGS (\\Deleted))\r\n* 9 FETCH (MODSEQ (5) UID 800)"
            return said + super().fetch_line(session, number, mail, names) + more

    found = whole(Talkative(inbox(1, 2, 3)))
    assert [message.uid for message in found.new] == [1, 2, 3]
    assert found.new[1].flags == {"\\Deleted"}


def test_messages_that_are_expunged_meanwhile_are_not_missed() -> None:
    class Expunges(Server):
        def on_fetch(
            self, session: Session, command: Command, mails: list[tuple[int, Mail]], names: list[bytes]
        ) -> None:
            session.say(b"* 2 EXPUNGE")
            super().on_fetch(session, command, [each for each in mails if each[1].uid != 2], names)

    server = Expunges(inbox(1, 2, 3))
    assert [message.uid for message in whole(server).new] == [1, 3]
    assert sum(b"FETCH" in line for line in server.log) == 1


KEYWORDS = [b"roof(south", b"left)right", b"a]b {5} %* \\*", b'"two words"', b"\xdf \x04x", b"\\Starred", b"k" * 300]


@pytest.mark.parametrize("flags", KEYWORDS)
def test_keywords_of_any_kind_lose_no_message(flags: bytes) -> None:
    server = Server(inbox(1, 2, 3))
    server.folders[0].mails[1].flags = b"\\Seen " + flags
    second = whole(server).new[1]
    assert second.flags == {"\\Seen", *flags.decode("utf-8", "surrogateescape").split(" ")}


class RefusesFetch(Server):
    """``refuses``: what a FETCH of several messages, or of UID 2, must not ask for."""

    refuses = b""

    def on_fetch(self, session: Session, command: Command, mails: list[tuple[int, Mail]], names: list[bytes]) -> None:
        if self.refuses in names and any(each.uid == 2 for _, each in mails):
            session.no(command, b"[SERVERBUG] cannot read message 2")
        else:
            super().on_fetch(session, command, mails, names)


def test_all_sizes_refused_because_of_one() -> None:
    server = RefusesFetch(inbox(1, 2, 3))
    server.refuses = b"RFC822.SIZE"
    assert [(message.uid, message.size) for message in whole(server).new] == [(1, 0), (2, 0), (3, 0)]


def test_all_dates_refused_because_of_one() -> None:
    server = RefusesFetch(inbox(1, 2, 3))
    server.refuses = b"INTERNALDATE"
    found = whole(server)
    assert [(message.uid, message.is_dated) for message in found.new] == [(1, True), (2, False), (3, True)]


def test_all_flags_refused_because_of_one() -> None:
    server = RefusesFetch(inbox(1, 2, 3))
    server.refuses = b"FLAGS"
    found = listed(server)
    assert isinstance(found, Changes)
    assert [message.uid for message in found.new] == [1, 3]
    assert found.incomplete == {2: "the server refuses it: [SERVERBUG] cannot read message 2"}


def test_an_empty_folder_may_refuse_to_be_listed() -> None:
    class Empty(Server):
        def on_fetch(self, session: Session, command: Command, *_: object) -> None:
            session.bad(command, b"no messages")

    found = whole(Empty(inbox()))
    assert (found.new, found.exists, found.uidnext) == ([], 0, 1)


def test_what_was_seen_and_what_was_not() -> None:
    """UIDNEXT is the server's; a UID that was given and is not yet visible is not taken for seen."""

    class Ahead(Server):
        def on_open(self, session: Session, command: Command) -> None:
            session.say(b"* OK [UIDNEXT 50] next")
            session.folder = self.folder(command.words[0])
            session.say(b"* OK [UIDVALIDITY 5] valid\r\n* 2 EXISTS")
            session.ok(command)

    found = whole(Ahead(inbox(1, 7)))
    assert (found.uidnext, found.unseen_from) == (50, 8)


# Folders ------------------------------------------------------------------------------


@pytest.mark.parametrize("spelled", [b"Inbox", b"inbox", b"INBOX"])
def test_inbox_in_any_case(spelled: bytes) -> None:
    server = Server([Folder(spelled, [Mail(1, mail("in"))]), Folder(spelled + b"/Offers"), Folder(b"Sent")])
    with server, reading(server) as reader:
        layout = reader.layout()
        assert [each.name for each in layout.folders] == ["INBOX", spelled.decode() + "/Offers", "Sent"]
        assert layout.subscribed == ("INBOX", spelled.decode() + "/Offers", "Sent")
        assert reader.statuses(["INBOX"]) == {"INBOX": Status(1_234_567_890, 2, 1)}


def test_inbox_exists_listed_or_not() -> None:
    class NotListed(Server):
        def on_list(self, session: Session, command: Command) -> None:
            session.say(b'* LIST () "." "Sent"')
            session.ok(command)

    server = NotListed([*inbox(1, 2), Folder(b"Sent")])
    with server, reading(server) as reader:
        folders = reader.layout().folders
        assert [(each.name, each.selectable, each.delimiter) for each in folders] == [
            ("INBOX", True, "."), ("Sent", True, "."),
        ]  # fmt: skip
        assert insist(reader.statuses(["INBOX"]))["INBOX"].messages == 2


@pytest.mark.parametrize("delimiter", [b'"\\""', b'"&"', b'"*"', b'"_"', b'"z"', b'"\xa7"'])
def test_a_delimiter_that_dovecot_cannot_have_is_none_here(delimiter: bytes) -> None:
    server = Server([Folder(b"INBOX", delimiter=delimiter), Folder(b"a/b", delimiter=delimiter)])
    with server, reading(server) as reader:
        layout = reader.layout()
    assert layout.separator == "/"
    assert names.of_layout(layout)["a/b"].parts == ("a_b",), "it is one name there"


def test_the_delimiter_is_that_of_ones_own_folders() -> None:
    class Shares(Server):
        namespace = b'(("" "/")) NIL (("#news." "."))'

    folders = [Folder(b"#news.x", delimiter=b'"."'), Folder(b"a/b"), Folder(b"flat", delimiter=b"NIL")]
    with Shares(folders) as server, reading(server) as reader:
        assert reader.layout().separator == "/"


def test_a_folder_that_list_leaves_out_is_asked_for_by_name() -> None:
    class LeavesOut(Server):
        def on_list(self, session: Session, command: Command) -> None:
            session.say(b'* %s () "." INBOX' % command.verb)
            session.ok(command)

        def on_lsub(self, session: Session, command: Command) -> None:
            for name in (b"Sent", b"Gone"):
                session.say(b'* LSUB () "." %s' % name)
            session.ok(command)

    server = LeavesOut([*inbox(1), Folder(b"Sent"), Folder(b"Known"), Folder(b"Other")])
    with server, reading(server) as reader:
        assert [each.name for each in reader.layout().folders] == ["INBOX"]
        layout = reader.layout(["Known", "INBOX", "Also gone", "no\nname"])
        assert reader.unlisted(layout.subscribed).keys() == {"Sent"}
    assert [(each.name, each.selectable, each.delimiter) for each in layout.folders] == [
        ("INBOX", True, "."), ("Known", True, "."),
    ]  # fmt: skip


class Untrue(Server):
    """Its STATUS knows of no messages."""

    items = b"MESSAGES 0 UIDNEXT 1 UIDVALIDITY 1234567890"

    def status_items(self, folder: Folder) -> bytes:  # noqa: ARG002
        return self.items


@pytest.mark.parametrize("items", [Untrue.items, b"UIDNEXT 3 UIDVALIDITY 1234567890", b"UIDVALIDITY 1234567890"])
def test_that_a_folder_is_empty_is_believed_when_it_is_opened(items: bytes) -> None:
    server = Untrue([*inbox(1, 2), Folder(b"empty"), Folder(b"Sent", [Mail(7, mail("s"))])])
    server.items = items
    with server, reading(server) as reader:
        found = insist(reader.statuses(["INBOX", "empty", "Sent"]))
    assert {name: (status.messages, status.uidnext) for name, status in found.items()} == {
        "INBOX": (2, 3),
        "empty": (0, 1),
        "Sent": (1, 8),
    }


def test_an_empty_folder_that_does_not_open_is_refused() -> None:
    class Shut(Server):
        def on_open(self, session: Session, command: Command) -> None:
            session.no(command, b"not yours")

    with Shut([Folder(b"INBOX")]) as server, reading(server) as reader:
        assert reader.statuses(["INBOX"]) == {"INBOX": FolderRefused("INBOX", "not yours")}


def test_blanks_behind_a_number_mean_nothing() -> None:
    class Blanks(Server):
        def on_open(self, session: Session, command: Command) -> None:
            session.folder = self.folders[0]
            session.say(b"* OK [UIDVALIDITY 5] ")
            session.say(b"* 3 EXISTS ")
            session.ok(command)

        def fetch_line(self, session: Session, number: int, mail: Mail, names: list[bytes]) -> bytes:
            return super().fetch_line(session, number, mail, names) + b"  "

    changes = listed(Blanks(inbox(1, 2)))
    assert isinstance(changes, Changes)
    assert (changes.exists, changes.nameless, [each.uid for each in changes.new]) == (3, 1, [1, 2])


@pytest.mark.parametrize("omitted", [b"INTERNALDATE", b"RFC822.SIZE", b"FLAGS"])
def test_what_very_many_lack_is_asked_for_together(monkeypatch: pytest.MonkeyPatch, omitted: bytes) -> None:
    monkeypatch.setattr(reader_module, "MAX_SINGLY", 3)

    class Lacks(Server):
        def item(self, mail: Mail, name: bytes) -> bytes:
            return b"" if name == omitted else super().item(mail, name)

    header = "Date: Mon, 2 Jan 2006 03:04:05 +0000\r\n"
    server = Lacks([Folder(b"INBOX", [Mail(uid, mail(f"m{uid}", header=header)) for uid in (1, 3, 5, 7, 9)])])
    found = listed(server)
    if omitted == b"FLAGS":
        assert found == FolderRefused("INBOX", "5 messages announced, 0 listed: it gives less than it announces")
        return
    assert isinstance(found, Changes)
    assert [each.uid for each in found.new] == [1, 3, 5, 7, 9]
    if omitted == b"INTERNALDATE":
        assert {(each.internaldate, each.is_dated) for each in found.new} == {(1_136_171_045, False)}
    assert sum(b"FETCH" in each for each in server.log) < 8


def test_a_large_folder_is_searched_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "SEARCHED", 2)
    server = Hides(inbox(1, 2, 3, 4, 5, 8))
    server.shown = frozenset({b"alone"})
    changes = listed(server)
    assert isinstance(changes, Changes)
    searches = [each for each in server.log if b"SEARCH" in each]
    assert len(searches) == 3
    assert {each.uid for each in changes.new} | changes.incomplete.keys() == {1, 2, 3, 4, 5, 8}


def test_folders_that_are_listed_twice_are_one() -> None:
    class Twice(Server):
        def on_list(self, session: Session, command: Command) -> None:
            for name in (b"INBOX", b"Inbox", b"Sent", b"Sent"):
                session.say(b'* %s () "/" "%s"' % (command.verb, name))
            session.ok(command)

        on_lsub = on_list

    server = Twice([*inbox(1), Folder(b"Sent")])
    with server, reading(server) as reader:
        layout = reader.layout()
    assert [each.name for each in layout.folders] == ["INBOX", "Sent"]
    assert layout.subscribed == ("INBOX", "Sent")


NAMES = [
    b"Gr\xfc\xdfe",
    b"Gr\xc3\xbc\xc3\x9fe",
    b"Tide & Quay",
    b"Gr&APw",
    b'say "hi" \\o',
    b"a\tb",
    b"NIL",
    b" x ",
    b"50% *",
]


@pytest.mark.parametrize("name", NAMES)
def test_names_are_carried_byte_by_byte(name: bytes) -> None:
    server = Server([*inbox(1), Folder(name, [Mail(7, mail("odd"))], delimiter=b"NIL")])
    with server, reading(server) as reader:
        folder = reader.layout().folders[1]
        assert folder.name.encode("utf-8", "surrogateescape") == name
        assert folder.delimiter == ""
        assert insist(reader.statuses([folder.name]))[folder.name].messages == 1
        (changes,) = insisted(reader.changes([(folder.name, None)]))
        assert [message.uid for message in changes.new] == [7]


def test_a_name_without_quotes() -> None:
    server = Server([*inbox(1), Folder(b"Boats 1", [Mail(1, mail("one"))], listed=b"Boats 1")])
    with server, reading(server) as reader:
        assert [each.name for each in reader.layout().folders] == ["INBOX", "Boats 1"]
        assert insist(reader.statuses(["Boats 1"]))["Boats 1"].messages == 1


def test_a_name_that_cannot_be_sent_is_named_alone() -> None:
    server = Server([*inbox(1), Folder(b"a\r\nb", listed=b"{4}\r\na\r\nb")])
    with server, reading(server) as reader:
        names = [each.name for each in reader.layout().folders]
        found = reader.statuses(names)
        assert isinstance(found["INBOX"], Status)
        refused = found["a\r\nb"]
        assert isinstance(refused, FolderRefused)
        assert refused.error().message.isprintable()
        both = {each.folder: each for each in reader.changes((name, None) for name in names)}
        assert isinstance(both["a\r\nb"], FolderRefused)
        assert isinstance(both["INBOX"], Changes)


class Closed(Server):
    """The folder Calendar refuses to be asked or opened."""

    refuses: frozenset[bytes] = frozenset({b"STATUS", b"EXAMINE"})

    def on_status(self, session: Session, command: Command) -> None:
        if command.words[0] == b"Calendar" and b"STATUS" in self.refuses:
            session.no(command, b"[NOPERM] not for mail programs")
        else:
            super().on_status(session, command)

    def on_open(self, session: Session, command: Command) -> None:
        if command.words[0] == b"Calendar" and b"EXAMINE" in self.refuses:
            session.no(command, b"not to be opened, 42")  # and the former folder stays open, as some servers have it
        else:
            super().on_open(session, command)


def many() -> list[Folder]:
    names = [b"INBOX", b"Calendar", *(b"f%d" % number for number in range(60))]
    return [Folder(name, [Mail(number + 1, mail(name.decode()))]) for number, name in enumerate(names)]


@pytest.mark.parametrize("refuses", [{b"STATUS", b"EXAMINE"}, {b"EXAMINE"}, {b"STATUS"}])
def test_a_folder_that_refuses_is_named_alone(refuses: set[bytes]) -> None:
    server = Closed(many())
    server.refuses = frozenset(refuses)
    names = [each.name.decode() for each in server.folders]
    with server, reading(server) as reader:
        statuses = reader.statuses(names)
        changes = {each.folder: each for each in reader.changes((name, None) for name in names)}
    assert [name for name in names if isinstance(statuses[name], FolderRefused)] == (
        ["Calendar"] if len(refuses) == 2 else []
    )
    refused = changes.pop("Calendar")
    if b"EXAMINE" in refuses:
        assert refused == FolderRefused("Calendar", "not to be opened, 42")
        with pytest.raises(FolderNotReadable, match="'Calendar' cannot be read: not to be opened, 42") as found:
            list(insisted([refused]))
        assert found.value.hint
    else:
        assert isinstance(refused, Changes)
    # No folder has what is another's.
    for number, each in enumerate(server.folders):
        found_here = changes.get(each.name.decode())
        if found_here is not None:
            assert isinstance(found_here, Changes)
            assert [message.uid for message in found_here.new] == [number + 1]


# What is offered and refused ----------------------------------------------------------


class Refuses(Server):
    """Offers everything, and refuses every command or item whose text holds ``word``."""

    capabilities = b"IMAP4rev1 AUTH=PLAIN NAMESPACE ENABLE CONDSTORE QRESYNC ID LIST-EXTENDED SPECIAL-USE"
    word = b"-"

    def on_other(self, session: Session, command: Command) -> None:
        if self.word == command.verb or b" " + self.word in b" " + command.text:
            session.bad(command, b"no")
        else:
            session.ok(command)

    def on_list(self, session: Session, command: Command) -> None:
        if self.word in command.text or self.word == command.verb:
            session.bad(command, b"no")
        else:
            super().on_list(session, command)

    on_lsub = on_list

    def on_namespace(self, session: Session, command: Command) -> None:
        if self.word == b"NAMESPACE":
            session.bad(command, b"no")
        else:
            super().on_namespace(session, command)

    def status_items(self, folder: Folder) -> bytes:
        return super().status_items(folder) + (b"" if self.word == b"HIGHESTMODSEQ" else b" HIGHESTMODSEQ 7")

    def on_status(self, session: Session, command: Command) -> None:
        if self.word == b"HIGHESTMODSEQ" and self.word in command.text:
            session.bad(command, b"no")
        else:
            super().on_status(session, command)

    def on_open(self, session: Session, command: Command) -> None:
        if b"(%s" % self.word in command.text:
            session.bad(command, b"no")
        else:
            super().on_open(session, command)


@pytest.mark.parametrize(
    "word", [b"ENABLE", b"QRESYNC", b"HIGHESTMODSEQ", b"LSUB", b"NAMESPACE", b"RETURN", b"ID", b"-"]
)
def test_what_is_offered_and_refused_is_done_without(word: bytes) -> None:
    server = Refuses(inbox(1, 2))
    server.word = word
    with server, reading(server) as reader:
        for _ in range(2):
            layout = reader.layout()
            assert [each.name for each in layout.folders] == ["INBOX"]
            status = insist(reader.statuses(["INBOX"]))["INBOX"]
            assert (status.messages, status.highestmodseq) == (2, 0 if word == b"HIGHESTMODSEQ" else 7)
            (changes,) = insisted(reader.changes([("INBOX", status)]))
            assert changes.uidvalidity == 1_234_567_890
        asked = [line for line in server.log if word in re.split(rb"[ ()]", line)]
    if word not in {b"-", b"QRESYNC"}:
        # Not asked again, once it was refused.
        assert len(asked) == 1, asked


def test_a_login_that_lists_nothing_says_so() -> None:
    class Nothing(Server):
        def on_list(self, session: Session, command: Command) -> None:
            session.bad(command, b"User is authenticated but not connected.")

        on_lsub = on_list

    with Nothing() as server, reading(server) as reader:
        with pytest.raises(LegacyUnavailable, match="does not list the folders: User is authenticated") as found:
            reader.layout()
        assert "mailbox" in found.value.hint


def test_a_range_above_the_last_uid_may_be_refused() -> None:
    class Strict(Server):
        def on_fetch(
            self, session: Session, command: Command, mails: list[tuple[int, Mail]], names: list[bytes]
        ) -> None:
            first, star, _ = command.words[1].partition(b":*")
            if star and session.folder is not None and int(first) >= session.folder.uidnext:
                session.bad(command, b"no such numbers")
            else:
                super().on_fetch(session, command, mails, names)

    with Strict(inbox(1, 4)) as server, reading(server) as reader:
        for _ in range(2):
            (changes,) = insisted(reader.newer([("INBOX", 5)]))
            assert [message.uid for message in changes.new] == []
        assert sum(line.startswith(b"UID FETCH 5:* ") for line in server.log) == 2  # it is remembered
        (changes,) = insisted(reader.changes([("INBOX", Status(1_234_567_890, 5, 2))]))
        assert {*changes.flags, *(message.uid for message in changes.new)} == {1, 4}


def test_courier_is_read_by_select() -> None:
    server = Server([*inbox(1), Folder(b"a", [Mail(3, mail("a"))])])
    server.greeting = b"* OK [CAPABILITY IMAP4rev1] Courier-IMAP ready.\r\n"
    server.capabilities = b"IMAP4rev1 ACL2=UNION"
    with server, reading(server) as reader:
        assert reader.profile.name == "Courier"
        assert insist(reader.statuses(["INBOX", "a"]))["a"] == Status(1_234_567_890, 4, 1)
        assert [each.folder for each in insisted(reader.changes([("a", None)]))] == ["a"]
        assert reader.which_are_there("a", [3, 4]) == {3}
        reader.bodies(Wanted(batches("a", [Message(3, 1, 0, frozenset())])), body_of, lambda *_: None)
    verbs = {line.partition(b" ")[0] for line in server.log}
    assert b"SELECT" in verbs
    assert not {b"EXAMINE", b"STATUS"} & verbs
    assert not any(b"BODY[" in line for line in server.log)


def test_zimbra_is_not_asked_for_qresync() -> None:
    class Zimbra(Refuses):
        def on_other(self, session: Session, command: Command) -> None:
            if command.verb == b"ID":
                session.say(b'* ID ("NAME" "Zimbra" "VERSION" "9")')
            session.ok(command)

    with Zimbra() as server, reading(server) as reader:
        assert reader.profile.name == "Zimbra"
    assert not any(line.startswith(b"ENABLE") for line in server.log)


def test_long_lists_of_uids_are_cut() -> None:
    server = Server(inbox(*range(1, 3001, 2)))
    with server, reading(server) as reader:
        assert reader.which_are_there("INBOX", list(range(1, 5001, 2))) == set(range(1, 3001, 2))
    assert max(map(len, server.log)) < 4096


# Bodies -------------------------------------------------------------------------------


def body_of(_size: int, pieces: Iterator[bytes]) -> object:
    return b"".join(pieces)


class Copied:
    """Everything of a folder, over as many sessions as it takes, as the copy does it."""

    def __init__(self, server: Server, folder: str = "INBOX", timeout: float = 5) -> None:
        self.bodies: dict[int, bytes] = {}
        self.lost = 0
        mails = next(each for each in server.folders if each.name == folder.encode()).mails
        self.wanted = Wanted(batches(folder, (Message(each.uid, len(each.body), 0, frozenset()) for each in mails)))
        while True:
            try:
                with reading(server, timeout) as reader:
                    reader.bodies(self.wanted, body_of, self.keep)
            except LegacyBusy as error:
                if error.code:
                    raise
                self.lost += 1
            except ServerUnavailable:
                self.lost += 1
            if not len(self.wanted):
                return
            if not self.wanted.another_session():
                raise AssertionError("too many sessions are lost")

    def keep(self, _folder: str, message: Message, body: object) -> None:
        assert isinstance(body, bytes)
        assert message.uid not in self.bodies
        self.bodies[message.uid] = body

    @property
    def named(self) -> list[int]:
        return sorted(uid for _, uid in self.wanted.not_given_at_all)

    def is_right(self, server: Server, but: set[int]) -> None:
        """Everything came as it is, but what is named, and that is what it should be."""
        assert self.named == sorted(but)
        assert self.bodies == {each.uid: each.body for each in server.folders[0].mails if each.uid not in but}


class Killed(Server):
    """Ends the session at some messages, in some way, within their bodies or before them."""

    killers: frozenset[int] = frozenset()
    how = "reset"
    within = True

    def on_fetch(self, session: Session, command: Command, mails: list[tuple[int, Mail]], names: list[bytes]) -> None:
        for number, each in mails:
            line = self.fetch_line(session, number, each, names)
            if each.uid in self.killers and b"BODY.PEEK[]" in names:
                session.raw(line[: len(line) // 2] if self.within else b"")
                getattr(session, self.how)()
            session.say(line)
        session.ok(command)


@pytest.mark.parametrize("within", [True, False])
@pytest.mark.parametrize("how", ["reset", "end"])
def test_the_message_that_ends_the_session_is_found_alone(how: str, *, within: bool) -> None:
    with Killed(inbox(*range(1, 3001))) as server:
        server.killers, server.how, server.within = frozenset({150}), how, within
        copied = Copied(server)
        copied.is_right(server, {150})
    assert copied.lost <= 5


def test_many_messages_that_end_sessions_are_all_found() -> None:
    with Killed(inbox(*range(1, 1501))) as server:
        server.killers = frozenset(range(50, 1500, 100))
        copied = Copied(server)
        copied.is_right(server, set(server.killers))


def test_a_message_at_which_the_server_falls_silent_is_found() -> None:
    with Killed(inbox(*range(1, 8))) as server:
        server.killers, server.how = frozenset({3}), "stall"
        copied = Copied(server, timeout=0.5)
        copied.is_right(server, {3})
    assert "does not answer in time" in copied.wanted.not_given_at_all["INBOX", 3]


def test_sessions_that_end_by_chance_name_nobody() -> None:
    class Cut(Server):
        """Each session ends within its fourth body."""

        def fetch_line(self, session: Session, number: int, mail: Mail, names: list[bytes]) -> bytes:
            line = super().fetch_line(session, number, mail, names)
            session.given += 1
            if session.given > 3:
                session.raw(line[: len(line) // 2])
                session.reset()
            return line

    with Cut(inbox(*range(1, 41))) as server:
        Copied(server).is_right(server, set())


def test_a_server_that_gives_nothing_more_names_nobody() -> None:
    class Down(Server):
        def on_fetch(self, session: Session, *_: object) -> None:
            session.reset()

    with Down(inbox(*range(1, 41))) as server, pytest.raises(LegacyBusy, match="gives no message any more"):
        Copied(server)


class WrongLength(Server):
    """The literal of UID 3 announces so many bytes more than there are."""

    more = 0

    def item(self, mail: Mail, name: bytes) -> bytes:
        said = super().item(mail, name)
        if name == b"BODY.PEEK[]" and mail.uid == 3:
            return said.replace(b"{%d}" % len(mail.body), b"{%d}" % (len(mail.body) + self.more))
        return said


@pytest.mark.parametrize("more", [400, 1, 2, -1, -2, -3, -60, -95])
def test_a_body_is_kept_only_if_its_length_is_true(more: int) -> None:
    with WrongLength(inbox(*range(1, 8))) as server:
        server.more = more
        Copied(server, timeout=0.5).is_right(server, {3})


def test_a_session_is_not_trusted_after_a_wrong_length() -> None:
    """Even where what follows can be read: the rest of this body stands on one line with its end."""
    with WrongLength(inbox(*range(1, 8))) as server:
        server.more = -3
        server.folders[0].mails[2].body = b"x" * 200
        copied = Copied(server)
        copied.is_right(server, {3})
    assert copied.lost >= 2
    assert "does not speak IMAP" in copied.wanted.not_given_at_all["INBOX", 3]


class NoBody(Server):
    """Gives something else for the bodies of some messages."""

    answers: dict[int, bytes]

    def item(self, mail: Mail, name: bytes) -> bytes:
        if name == b"BODY.PEEK[]" and mail.uid in self.answers:
            return self.answers[mail.uid]
        return super().item(mail, name)


def test_bodies_in_all_forms() -> None:
    with NoBody(inbox(*range(1, 6))) as server:
        server.answers = {
            1: b"BODY[] {0}\r\n",
            2: b'BODY[] "short \\"one\\""',
            3: b"BODY[] NIL",
            4: b"",
            5: b'BODY[] ""',
        }
        copied = Copied(server)
    assert copied.bodies == {1: b"", 2: b'short "one"', 5: b""}
    assert copied.named == [3, 4]
    assert "answers without it" in copied.wanted.not_given_at_all["INBOX", 3]


class Damaged(Server):
    """Refuses some messages in words."""

    damaged: frozenset[int] = frozenset()
    words = b"[SERVERBUG] cannot read it"

    def on_fetch(self, session: Session, command: Command, mails: list[tuple[int, Mail]], names: list[bytes]) -> None:
        is_body = any(name.startswith(b"BODY.PEEK[]") for name in names)
        if is_body and any(each.uid in self.damaged for _, each in mails):
            session.no(command, self.words)
        else:
            super().on_fetch(session, command, mails, names)


@pytest.mark.parametrize("count", [1, 3, 40])
def test_damaged_messages_are_named(count: int) -> None:
    with Damaged(inbox(*range(1, 201))) as server:
        server.damaged = frozenset(range(101, 101 + count))
        copied = Copied(server)
        copied.is_right(server, set(server.damaged))
    assert copied.lost == 0


@pytest.mark.parametrize("before", [0, 100])
def test_a_server_that_refuses_everything_is_busy(before: int) -> None:
    """Throttling in words that nobody knows: no message is unreadable because of it."""

    class Throttles(Server):
        def on_fetch(
            self, session: Session, command: Command, mails: list[tuple[int, Mail]], names: list[bytes]
        ) -> None:
            if any(each.uid > before for _, each in mails) or "throttled" in session.notes:
                session.notes.add("throttled")
                session.no(command, b"enough for today")
            else:
                super().on_fetch(session, command, mails, names)

    with Throttles(inbox(*range(1, 351))) as server, reading(server) as reader:
        wanted = Wanted(batches("INBOX", (Message(uid, 95, 0, frozenset()) for uid in range(1, 351))))
        given: list[int] = []
        with pytest.raises(LegacyBusy, match=r"gives no message any more") as found:
            reader.bodies(wanted, body_of, lambda _, message, __: given.append(message.uid))
    assert found.value.code == "THROTTLED"
    assert not wanted.not_given_at_all
    assert len(given) == before
    # Nothing is forgotten: all the others are still wanted.
    left = [uid for batch in [*wanted._batches, *wanted._suspects] for uid in (m.uid for m in batch.messages)]
    assert sorted({*left, *given}) == list(range(1, 351))
    assert sum(b"BODY" in line for line in server.log) < 100


def test_exchange_says_how_long() -> None:
    with Damaged(inbox(*range(1, 31))) as server, reading(server) as reader:
        server.damaged = frozenset(range(1, 31))
        server.words = b"Request is throttled. Suggested Backoff Time: 299961 milliseconds"
        wanted = Wanted(batches("INBOX", (Message(uid, 95, 0, frozenset()) for uid in range(1, 31))))
        with pytest.raises(LegacyBusy) as found:
            reader.bodies(wanted, body_of, lambda *_: None)
    assert (found.value.code, found.value.wait) == ("THROTTLED", 299.961)
    assert not wanted.not_given_at_all
    assert len(wanted)


def test_messages_that_nobody_asked_for_have_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "BATCH_MESSAGES", 10)

    class Floods(Server):
        def on_fetch(self, session: Session, *_: object) -> None:
            for _number in range(12):
                session.say(b"* 9 FETCH (UID 9 BODY[] {1}\r\nx)")

    with (
        Floods(inbox(1)) as server,
        reading(server) as reader,
        pytest.raises(LegacyUnavailable, match="messages that were not asked for"),
    ):
        reader.bodies(Wanted([Batch("INBOX", (Message(1, 1, 0, frozenset()),))]), body_of, lambda *_: None)


def test_a_full_disk_is_nobody_s_fault() -> None:
    def full(_size: int, _pieces: Iterator[bytes]) -> object:
        raise OSError(28, "No space left on device")

    with Server(inbox(*range(1, 301))) as server, reading(server) as reader:
        wanted = Wanted(batches("INBOX", (Message(uid, 95, 0, frozenset()) for uid in range(1, 301))))
        with pytest.raises(OSError, match="No space left"):
            reader.bodies(wanted, full, lambda *_: None)
    assert not wanted._suspects
    assert sorted(m.uid for batch in wanted._batches for m in batch.messages) == list(range(1, 301))
    assert wanted.suspect() is None


def test_a_batch_is_not_lost_when_it_cannot_be_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    with Server(inbox(*range(1, 301))) as server, reading(server) as reader:
        wanted = Wanted(batches("INBOX", (Message(uid, 95, 0, frozenset()) for uid in range(1, 301))))
        sent = 0
        send = reader._pipeline.wire.send

        def breaks(data: bytes) -> None:
            nonlocal sent
            sent += 1
            if sent == 2:
                raise LegacyUnavailable("broken pipe")
            send(data)

        monkeypatch.setattr(reader._pipeline.wire, "send", breaks)
        with pytest.raises(LegacyUnavailable, match="broken pipe"):
            reader.bodies(wanted, body_of, lambda *_: None)
    left = [m.uid for batch in [*wanted._batches, *wanted._suspects] for m in batch.messages]
    assert sorted(left) == list(range(1, 301))


def test_suspects_wait_until_nothing_else_is_under_way() -> None:
    batch = Batch("a", (Message(1, 1, 0, frozenset()),))
    wanted = Wanted([batch])
    assert wanted.take() == batch
    wanted.suspected([Batch("a", (Message(2, 1, 0, frozenset()),))])
    assert wanted.suspect() is None  # another session has a batch
    wanted.settled()
    assert wanted.suspect() is not None


# Writing ------------------------------------------------------------------------------


def test_what_was_written_is_read_back() -> None:
    with Server([*inbox(1), Folder(b"a")]) as server:
        settings = LegacySettings("here.test", "127.0.0.1", Service(server.port, "none"), "127.0.0.1", 25)
        with session(settings, Trust(timeout=5), LOGIN) as connection:
            writer = Writer.of(connection)
            body = mail("new")
            assert writer.append("a", frozenset({"\\Seen"}), 0, len(body), iter([body[:10], body[10:]])) == 1
            assert writer.select("a") is None
            assert writer.with_message_id("<new@far.test>", 1) == {1}
            with pytest.raises(ServerUnavailable, match="does not take a message for 'nowhere'") as found:
                writer.append("nowhere", frozenset(), 0, len(body), iter([body]))
            assert re.search("full", found.value.hint)
    assert server.folders[1].mails[0].body == body
