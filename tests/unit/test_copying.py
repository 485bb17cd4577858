"""Passes against a server that does as a script says: what comes, what is named, what the next pass finds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bascule.address import Address
from bascule.credential import Password
from bascule.imap.folder_rules import FolderRule, FolderRules
from bascule.imap.reader import Reader
from bascule.lab.scripted import Command, Folder, Gmail, Mail, Server, Session, mail
from bascule.legacy import LegacySettings, Service, Trust, UserLogin, session
from bascule.migrator import copying, maildir
from bascule.migrator.acts import recorded
from bascule.migrator.copying import Copy, Pass, Progress

WHEN = 1_338_700_089  # what the scripted server says


class Condstore(Server):
    """Offers CONDSTORE; HIGHESTMODSEQ is what a test says."""

    capabilities = b"IMAP4rev1 AUTH=PLAIN NAMESPACE CONDSTORE"
    modseq = 5

    def status_items(self, folder: Folder) -> bytes:
        return super().status_items(folder) + b" HIGHESTMODSEQ %d" % self.modseq


def messages(*uids: int, flags: bytes = b"\\Seen") -> list[Mail]:
    return [Mail(uid, mail(f"m{uid}"), flags) for uid in uids]


class Copier:
    """One mailbox and its copy."""

    def __init__(self, server: Server, root: Path, **options: object) -> None:
        self.server, self.root = server, root
        self.reports: list[tuple[int, int, int]] = []
        self.sessions = 0
        self.copy = Copy(self._open, root, self._report, **options)  # type: ignore[arg-type]

    def _report(self, progress: Progress) -> None:
        self.reports.append((progress.total, progress.copied, progress.bytes))

    @contextmanager
    def _open(self) -> Iterator[Reader]:
        tls = Service(self.server.port, "none")
        settings = LegacySettings("here.test", "127.0.0.1", tls, "127.0.0.1", 25)
        login = UserLogin(Address("u", "here.test"), Password("secret"))
        self.sessions += 1
        with session(settings, Trust(timeout=2), login) as connection:
            yield Reader.of(connection)

    def run(self) -> Pass:
        with self.copy:
            return self.copy.run()

    def stored(self, *parts: str) -> dict[int, bytes]:
        """The bodies that are in a folder's directory, by UID."""
        uidlist = (self.root.joinpath(*parts) / "dovecot-uidlist").read_text().splitlines()[1:]
        cur = self.root.joinpath(*parts) / "cur"
        names = {path.name.partition(":")[0]: path for path in cur.iterdir()}
        found = {int(line.split()[0]): names.pop(line.partition(":")[2]).read_bytes() for line in uidlist}
        assert not names, "a file that no index names"
        return found

    def flags(self, uid: int) -> frozenset[str]:
        folder = maildir.Folder(self.root, "INBOX", self.server.folders[0].uidvalidity)
        folder.open()
        return folder.messages[uid].flags


@pytest.fixture
def copier(tmp_path: Path) -> Iterator[Callable[..., Copier]]:
    servers: list[Server] = []

    def start(kind: type[Server], folders: list[Folder], **options: object) -> Copier:
        servers.append(kind(folders))
        return Copier(servers[-1], tmp_path / "Maildir", **options)

    yield start
    for server in servers:
        server.stop()


Start = Callable[..., Copier]


class Deleting(Server):
    """Another program of the user's deletes the last folder when this one has heard of it."""

    on_verb = b"LIST"

    def _answered(self, command: Command) -> None:
        if command.verb == self.on_verb and self.folders[-1].name == b"Passing":
            self.folders.pop()

    def on_list(self, session: Session, command: Command) -> None:
        super().on_list(session, command)
        self._answered(command)

    def on_status(self, session: Session, command: Command) -> None:
        super().on_status(session, command)
        if command.words[0] == b"Passing":
            self._answered(command)


class DeletingLater(Deleting):
    on_verb = b"STATUS"


@pytest.mark.parametrize("kind", [Deleting, DeletingLater])
def test_a_folder_that_is_deleted_meanwhile_is_not_called_unreadable(kind: type[Server], copier: Start) -> None:
    work = copier(kind, [Folder(b"INBOX", messages(1)), Folder(b"Passing", messages(2))])
    done = work.run()
    assert work.copy.refused == {}
    assert [each.name for each in done.folders] == ["INBOX"]
    assert not (work.root / "Passing").exists()


class Closed(Server):
    """Lists a folder that it does not have."""

    def on_list(self, session: Session, command: Command) -> None:
        session.say(b'* %s () "/" Closed' % command.verb)
        super().on_list(session, command)


def test_a_folder_that_is_still_listed_is(copier: Start) -> None:
    work = copier(Closed, [Folder(b"INBOX", messages(1))])
    work.run()
    assert work.copy.refused.keys() == {"Closed"}


def test_everything_comes_and_the_next_pass_finds_nothing_to_do(copier: Start) -> None:
    folders = [Folder(b"INBOX", messages(1, 4)), Folder(b"a/b", messages(2)), Folder(b"empty")]
    work = copier(Server, [*folders, Folder(b"a", attributes=b"\\Noselect")])
    done = work.run()
    assert work.stored() == {1: mail("m1"), 4: mail("m4")}
    assert work.stored("a", "b") == {2: mail("m2")}
    assert work.stored("empty") == {}
    assert not (work.root / "a" / "cur").exists()
    assert (work.root / "subscriptions").read_text() == "INBOX\na\na/b\nempty\n"
    assert done.changes == 3
    assert {(each.name, each.uidvalidity, each.uidnext, each.messages) for each in done.folders} == {
        ("INBOX", 1_234_567_890, 5, 2),
        ("a/b", 1_234_567_890, 3, 1),
        ("empty", 1_234_567_890, 1, 0),
    }
    assert work.reports[-1] == (3, 3, sum(len(mail(f"m{uid}")) for uid in (1, 2, 4)))
    again = work.run()
    assert again.changes == 0
    assert sorted(each.name for each in again.folders) == ["INBOX", "a/b", "empty"]
    assert again.notes == []


def test_dates_and_flags_come_along(copier: Start) -> None:
    work = copier(Server, [Folder(b"INBOX", messages(1, flags=b"\\Answered $Work"))])
    work.run()
    assert work.flags(1) == {"\\Answered", "$Work"}
    (path,) = (work.root / "cur").iterdir()
    assert path.stat().st_mtime == WHEN


def test_what_changed_is_found(copier: Start) -> None:
    inbox, old = Folder(b"INBOX", messages(1, 2, 3)), Folder(b"old", messages(1))
    work = copier(Server, [inbox, old])
    work.run()
    inbox.mails = [*messages(1, flags=b"\\Flagged"), *messages(3, 7)]
    work.server.folders = [inbox, Folder(b"fresh", messages(1))]
    done = work.run()
    assert done.changes == 4  # flagged, gone, two came
    assert work.stored().keys() == {1, 3, 7}
    assert work.flags(1) == {"\\Flagged"}
    assert not (work.root / "old").exists()
    assert work.stored("fresh").keys() == {1}


def test_a_folder_in_which_nothing_happened_is_not_asked_again(copier: Start) -> None:
    work = copier(Condstore, [Folder(b"INBOX", messages(1, 2, flags=b"a(b"))])
    first = work.run()
    assert first.dropped == {"INBOX": {"a(b": "is no keyword (RFC 3501 section 9)"}}
    work.server.log.clear()
    again = work.run()
    assert not [each for each in work.server.log if b"FETCH" in each]
    assert again.folders == first.folders
    assert again.dropped == first.dropped
    assert again.notes == first.notes == ["INBOX: the keyword 'a(b' is not kept: it is no keyword (RFC 3501 section 9)"]
    assert again.modseqs == {"INBOX": 5}
    work.copy.forget()
    work.run()
    assert [each for each in work.server.log if b"FETCH" in each]


def test_a_server_whose_word_about_changes_does_not_fit_is_compared_in_full(copier: Start) -> None:
    work = copier(Condstore, [Folder(b"INBOX", messages(1, 2, 3))])
    work.run()
    work.server.folders[0].mails = messages(1, 3, 4)
    Condstore.modseq = 6  # and CHANGEDSINCE says nothing of what is gone
    try:
        assert work.run().changes == 2
    finally:
        Condstore.modseq = 5
    assert work.stored().keys() == {1, 3, 4}


def test_a_folder_that_was_made_anew_is_copied_anew(copier: Start) -> None:
    work = copier(Server, [Folder(b"INBOX", messages(1, 2))])
    work.run()
    work.server.folders = [Folder(b"INBOX", [Mail(1, mail("other"))], uidvalidity=99)]
    work.run()
    assert work.stored() == {1: mail("other")}


def test_another_message_under_a_known_uid_is_fetched(copier: Start) -> None:
    work = copier(Server, [Folder(b"INBOX", messages(1, 2))])
    work.run()
    work.server.folders[0].mails[0] = Mail(1, mail("another"), date=b'"01-Jan-2013 00:00:00 +0000"')
    work.copy.forget()  # as after a verification that found the dates to differ
    work.run()
    assert work.stored() == {1: mail("another"), 2: mail("m2")}


def test_a_place_that_was_another_folders_is_emptied(copier: Start) -> None:
    work = copier(Server, [Folder(b"INBOX"), Folder(b"R&D", [Mail(1, mail("raw"))])])
    work.run()
    # Now there is one that has the name by right; it has the same UIDVALIDITY and UIDs.
    work.server.folders.append(Folder(b"R&-D", [Mail(1, mail("right"))]))
    work.run()
    assert work.stored("R&-D") == {1: mail("right")}
    assert work.stored("R&-D-2") == {1: mail("raw")}


def test_names_that_cannot_be_kept_are_noted(copier: Start) -> None:
    work = copier(Server, [Folder(b"INBOX"), Folder(b"R&D", messages(1))])
    done = work.run()
    assert work.stored("R&-D").keys() == {1}
    assert done.notes == ["the folder 'R&D' is kept as 'R&D'"]
    assert done.places["R&D"].is_renamed


def test_what_is_waived_does_not_come(copier: Start) -> None:
    validity = Folder(b"INBOX").uidvalidity
    work = copier(Server, [Folder(b"INBOX", messages(1, 2))], waived=frozenset({("INBOX", validity, 2)}))
    assert work.run().waived == {("INBOX", validity, 2)}
    assert work.stored().keys() == {1}
    assert work.run().changes == 0


def test_the_next_uid_is_what_was_seen_and_not_below_what_the_server_says(copier: Start) -> None:
    class Ahead(Server):
        def status_items(self, folder: Folder) -> bytes:
            return super().status_items(folder).replace(b"UIDNEXT 3", b"UIDNEXT 40")

        def on_open(self, session: Session, command: Command) -> None:
            session.folder = self.folders[0]
            session.say(b"* 2 EXISTS")
            session.say(b"* OK [UIDVALIDITY %d] valid" % session.folder.uidvalidity)
            session.say(b"* OK [UIDNEXT 40] next")
            session.ok(command)

    (state,) = copier(Ahead, [Folder(b"INBOX", messages(1, 2))]).run().folders
    assert (state.uidnext, state.next_here) == (3, 40)


def test_a_folder_that_does_not_open_is_named_and_the_others_come(copier: Start) -> None:
    class Refusing(Server):
        def on_status(self, session: Session, command: Command) -> None:
            if command.words[0] == b"Calendar":
                session.no(command, b"not mail")
            else:
                super().on_status(session, command)

        def on_open(self, session: Session, command: Command) -> None:
            if command.words[0] == b"Calendar":
                session.no(command, b"not mail")
            else:
                super().on_open(session, command)

    folders = [Folder(b"INBOX", messages(1)), Folder(b"Calendar", messages(1))]
    work = copier(Refusing, folders)
    done = work.run()
    assert work.stored().keys() == {1}
    assert [each.name for each in done.folders] == ["INBOX"]
    assert work.copy.refused.keys() == {"Calendar"}
    assert "not mail" in work.copy.refused["Calendar"]
    waiving = Copier(work.server, work.root, waived_folders=frozenset({"Calendar"}))
    assert "not all is here, as an administrator decided" in waiving.run().notes[0]
    assert waiving.copy.refused == {}


class Forgetful(Server):
    """Announces a message of which FETCH says nothing."""

    def on_fetch(self, session: Session, command: Command, mails: list[tuple[int, Mail]], names: list[bytes]) -> None:
        super().on_fetch(session, command, [each for each in mails if each[1].uid != 2], names)


def test_messages_that_are_announced_and_not_listed_are_named(copier: Start) -> None:
    work = copier(Forgetful, [Folder(b"INBOX", messages(1, 2, 3))])
    work.run()
    assert work.stored().keys() == {1, 3}
    named = {uid for _, _, uid in work.copy.unreadable}
    assert named == {2} or "2 are listed" in work.copy.refused["INBOX"]


def test_a_message_that_is_not_given_is_named_and_the_others_come(copier: Start) -> None:
    class Damaged(Server):
        def item(self, mail: Mail, name: bytes) -> bytes:
            return b"BODY[] NIL" if mail.uid == 2 and name == b"BODY.PEEK[]" else super().item(mail, name)

    work = copier(Damaged, [Folder(b"INBOX", messages(1, 2, 3))])
    work.run()
    assert work.stored().keys() == {1, 3}
    assert {(each.folder, each.uid) for each in work.copy.unreadable.values()} == {("INBOX", 2)}
    work.server.log.clear()
    work.run()
    assert [each for each in work.server.log if b"BODY" in each], "a folder that is not whole is compared again"


def test_a_message_that_ends_the_session_is_named_alone(copier: Start) -> None:
    class Killing(Server):
        def on_fetch(
            self, session: Session, command: Command, mails: list[tuple[int, Mail]], names: list[bytes]
        ) -> None:
            if b"BODY.PEEK[]" in names and any(each.uid == 7 for _, each in mails):
                session.reset()
            super().on_fetch(session, command, mails, names)

    work = copier(Killing, [Folder(b"INBOX", messages(*range(1, 30)))])
    work.run()
    assert work.stored().keys() == set(range(1, 30)) - {7}
    assert {uid for _, _, uid in work.copy.unreadable} == {7}


class OtherUidvalidity(Server):
    """STATUS has another UIDVALIDITY than the folder when it is opened."""

    def status_items(self, folder: Folder) -> bytes:
        return super().status_items(folder).replace(b"1234567890", b"5")


def test_a_uidvalidity_is_the_one_with_which_a_folder_opens(copier: Start) -> None:
    work = copier(OtherUidvalidity, [Folder(b"INBOX", messages(1, 2)), Folder(b"a", messages(1))])
    done = work.run()
    assert {(each.name, each.uidvalidity) for each in done.folders} == {("INBOX", 1_234_567_890), ("a", 1_234_567_890)}
    assert work.stored() == {1: mail("m1"), 2: mail("m2")}
    before = {path.name for path in (work.root / "cur").iterdir()}
    assert work.run().changes == 0, "nothing is emptied because of what STATUS says"
    assert {path.name for path in (work.root / "cur").iterdir()} == before


def test_all_keywords_are_kept_beside_a_staging_area_whatever_status_says(copier: Start) -> None:
    keywords = b" ".join(b"k%02d" % number for number in range(30))
    work = copier(OtherUidvalidity, [Folder(b"INBOX", [Mail(1, mail("m1"), keywords)])], is_staging=True)
    assert work.run().notes == []
    assert maildir.more_keywords(work.root) == {1: {"k26", "k27", "k28", "k29"}}


def test_a_folder_that_was_made_anew_is_begun_afresh(copier: Start) -> None:
    work = copier(Condstore, [Folder(b"INBOX", messages(1, 2, 3))])
    work.run()
    work.server.folders[0].uidvalidity = 99
    work.server.folders[0].mails = [Mail(1, mail("another"))]
    assert work.run().folders[0].uidvalidity == 99
    assert work.stored() == {1: mail("another")}


def test_a_folder_with_a_uidvalidity_of_the_moment_is_named(copier: Start) -> None:
    class OfTheMoment(Server):
        def on_open(self, session: Session, command: Command) -> None:
            self.folders[0].uidvalidity += 1
            super().on_open(session, command)

    work = copier(OfTheMoment, [Folder(b"INBOX", messages(1)), Folder(b"a", messages(1))])
    work.run()
    assert work.copy.refused == {"INBOX": "has another UIDVALIDITY whenever it is opened"}
    assert work.stored("a") == {1: mail("m1")}


@pytest.mark.parametrize("items", [b"MESSAGES 0 UIDNEXT 1 UIDVALIDITY 1234567890", b"UIDNEXT 3 UIDVALIDITY 1234567890"])
def test_a_status_that_knows_of_no_messages_is_not_believed(copier: Start, items: bytes) -> None:
    class Untrue(Server):
        def status_items(self, folder: Folder) -> bytes:  # noqa: ARG002
            return items

    work = copier(Untrue, [Folder(b"INBOX", messages(1, 2)), Folder(b"empty")])
    done = work.run()
    assert work.stored() == {1: mail("m1"), 2: mail("m2")}
    assert [(each.name, each.uidnext) for each in done.folders] == [("INBOX", 3), ("empty", 1)]


def test_a_uid_above_which_there_is_no_room_is_named(copier: Start) -> None:
    folder = Folder(b"INBOX", messages(1, copying.LAST_UID, copying.LAST_UID + 1, 2**32 - 1))
    work = copier(Server, [folder])
    done = work.run()
    assert work.stored().keys() == {1, copying.LAST_UID}
    assert {uid for _, _, uid in work.copy.unreadable} == {copying.LAST_UID + 1, 2**32 - 1}
    assert done.folders[0].uidnext == done.folders[0].next_here == copying.LAST_UID + 1
    work.copy.waived = frozenset(work.copy.unreadable)
    work.run()
    assert work.copy.unreadable == {}
    assert work.stored().keys() == {1, copying.LAST_UID}


def test_a_uidnext_that_leaves_no_room_is_not_taken_over(copier: Start) -> None:
    class Untrue(Server):
        def status_items(self, folder: Folder) -> bytes:
            return super().status_items(folder).replace(b"UIDNEXT 3", b"UIDNEXT 4294967295")

        def on_open(self, session: Session, command: Command) -> None:
            session.say(b"* OK [UIDNEXT 4294967295] next")
            super().on_open(session, command)

    work = copier(Untrue, [Folder(b"INBOX", messages(1, 2))])
    for _ in range(3):
        done = work.run()
        assert (done.folders[0].uidnext, done.folders[0].next_here) == (3, 3)


def test_a_message_that_is_found_and_not_shown_is_named_when_the_verification_misses_it(copier: Start) -> None:
    class Finds(Server):
        def on_search(self, session: Session, command: Command, *, by_uid: bool) -> None:  # noqa: ARG002
            session.say(b"* SEARCH 1 2 3")
            session.ok(command)

    work = copier(Finds, [Folder(b"INBOX", messages(1, 3))])
    work.run()
    assert work.copy.unreadable == {}
    work.copy.distrust("INBOX", [2, 3, 4])
    work.run()
    (named,) = work.copy.unreadable.values()
    assert (named.folder, named.uid, named.reason) == ("INBOX", 2, "the server finds it, and does not show it")
    assert work.stored().keys() == {1, 3}


@pytest.mark.parametrize("marks", [frozenset({1, 2, 3}), frozenset({1, 2})])
def test_a_server_that_marks_as_read_what_is_only_looked_at_is_named(copier: Start, marks: frozenset[int]) -> None:
    class Marks(Server):
        def fetch_line(self, session: Session, number: int, mail: Mail, names: list[bytes]) -> bytes:
            line = super().fetch_line(session, number, mail, names)
            if b"BODY.PEEK[]" in names and mail.uid in marks:
                mail.flags = b"\\Seen"
            return line

    work = copier(Marks, [Folder(b"INBOX", [*messages(1, 2, 3, flags=b""), *messages(4)])])
    assert work.run().notes == []
    for _ in range(2):
        notes = work.run().notes
        assert [note.partition(":")[0] for note in notes] == (
            ["the legacy server seems to mark as read what is only looked at"] if 3 in marks else []
        )


def test_a_folder_that_one_list_leaves_out_is_not_removed_here(copier: Start) -> None:
    class Forgets(Server):
        forgets = False

        def on_list(self, session: Session, command: Command) -> None:
            if not self.forgets:
                super().on_list(session, command)
            else:
                session.ok(command)

        on_lsub = on_list

    work = copier(Forgets, [Folder(b"INBOX"), Folder(b"a", messages(1))])
    work.run()
    assert isinstance(work.server, Forgets)
    work.server.forgets = True
    done = work.run()
    assert (done.changes, [each.name for each in done.folders]) == (0, ["INBOX", "a"])
    assert work.stored("a") == {1: mail("m1")}
    del work.server.folders[1]
    work.run()
    assert not (work.root / "a").exists()


def test_what_is_subscribed_and_not_listed_is_named(copier: Start) -> None:
    class Virtual(Server):
        def on_list(self, session: Session, command: Command) -> None:
            session.say(b'* LIST () "/" INBOX')
            session.ok(command)

        def on_lsub(self, session: Session, command: Command) -> None:
            super().on_list(session, command)

    work = copier(Virtual, [Folder(b"INBOX"), Folder(b"virtual/All", messages(1)), Folder(b"empty")])
    assert work.run().notes == [
        "virtual/All: subscribed, but not among the folders that the legacy server lists, and not copied: 1 messages"
    ]
    # A rule says so: then it is named with the others that are left out, and is no difference.
    work.copy.rules = ruled(FolderRule("pattern", "virtual/*"))
    with work.copy:
        done = work.copy.run()
        assert (done.left_out, done.notes) == ({"virtual/All": "the rule for the pattern 'virtual/*'"}, [])
        assert work.copy.count_left_out(done) == {"virtual/All": 1}
    assert not (work.root / "virtual").exists()


def test_what_an_administrator_waived_is_known_by_its_recorded_name(copier: Start) -> None:
    class Refusing(Server):
        def on_open(self, session: Session, command: Command) -> None:
            if command.words[0] == b"Gr\xfc":
                session.no(command, b"damaged")
            else:
                super().on_open(session, command)

        def on_status(self, session: Session, command: Command) -> None:
            if command.words[0] == b"Gr\xfc":
                session.no(command, b"damaged")
            else:
                super().on_status(session, command)

        def item(self, mail: Mail, name: bytes) -> bytes:
            return b"BODY[] NIL" if name == b"BODY.PEEK[]" and mail.uid == 2 else super().item(mail, name)

    work = copier(Refusing, [Folder(b"INBOX"), Folder(b"Gr\xfc"), Folder(b"Gr\xe4", messages(1, 2)), Folder(b"nu\0l")])
    work.run()
    assert {recorded(name) for name in work.copy.refused} == {"Gr\\udcfc", "nu\\x00l"}
    assert {(recorded(name), uid) for name, _, uid in work.copy.unreadable} == {("Gr\\udce4", 2)}
    work.copy.waived = frozenset((recorded(name), of, uid) for name, of, uid in work.copy.unreadable)
    work.copy.waived_folders = frozenset(map(recorded, work.copy.refused))
    done = work.run()
    assert (work.copy.refused, work.copy.unreadable) == ({}, {})
    assert done.waived == {("Gr\udce4", 1_234_567_890, 2)}, "as the verification has the names"


def test_what_is_distrusted_is_fetched_again(copier: Start) -> None:
    work = copier(Condstore, [Folder(b"INBOX", messages(1, 2))])
    work.run()
    (path,) = (each for each in (work.root / "cur").iterdir() if ".U2V" in each.name)
    path.write_bytes(b"x" * path.stat().st_size)
    work.copy.distrust("INBOX", [2])
    assert work.run().changes == 1
    assert work.stored()[2] == mail("m2")


def test_uidls_are_written_for_inbox_only(copier: Start) -> None:
    work = copier(Condstore, [Folder(b"INBOX", messages(1, 2)), Folder(b"Sent", messages(1))])
    work.run()
    work.copy.set_uidls({1: "first-uidl"})
    work.run()
    assert "1 Pfirst-uidl :" in (work.root / "dovecot-uidlist").read_text()
    assert "first-uidl" not in (work.root / "Sent" / "dovecot-uidlist").read_text()
    with work.copy:
        assert [each.uid for each in work.copy.inbox()] == [1, 2]


def test_an_empty_inbox_has_no_messages(copier: Start) -> None:
    work = copier(Server, [Folder(b"INBOX")])
    with work.copy:
        assert work.copy.inbox() == []


def test_several_sessions_are_used_when_they_are_worth_it(copier: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "WORTH_A_SESSION", 1)
    work = copier(Server, [Folder(b"INBOX", messages(*range(1, 450)))], sessions=3)
    work.run()
    assert len(work.stored()) == 449
    assert work.sessions == 3


def test_for_a_while_there_can_be_no_session(copier: Start) -> None:
    work = copier(Server, [Folder(b"INBOX", messages(1))])
    work.server.max_sessions = 1
    with work.copy:
        work.copy.run()
        with work.copy.without_session(), work._open() as other:
            assert other.layout().folders
        assert work.copy.run().changes == 0


def test_large_mailboxes_are_compared_in_groups(copier: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "GROUP", 2)
    folders = [Folder(b"INBOX", messages(1, 2)), Folder(b"a", messages(1)), Folder(b"b", messages(1, 2, 3))]
    work = copier(Server, folders)
    assert work.run().changes == 6
    assert (len(work.stored()), len(work.stored("a")), len(work.stored("b"))) == (2, 1, 3)
    assert work.run().changes == 0


def test_a_pass_that_is_stopped_keeps_what_came(copier: Start) -> None:
    class Stop(Exception):
        pass

    work = copier(Server, [Folder(b"INBOX", messages(1)), Folder(b"later", messages(1))])

    def stop(progress: Progress) -> None:
        if progress.bytes:
            raise Stop

    work.copy._report = stop
    with pytest.raises(Stop):
        work.run()
    work.copy._report = work._report
    work.run()
    assert work.stored().keys() == work.stored("later").keys() == {1}


# Rules for folders --------------------------------------------------------------------------


def ruled(*rules: FolderRule) -> FolderRules:
    return FolderRules(rules)


def test_what_a_rule_leaves_out_does_not_come_and_is_counted(copier: Start) -> None:
    folders = [Folder(b"INBOX", messages(1)), Folder(b"Public/a", messages(1, 2)), Folder(b"Public/b", messages(3))]
    work = copier(
        Server, folders, rules=ruled(FolderRule("pattern", "Public/*"), FolderRule("name", "Public/b", "copy"))
    )
    with work.copy:
        done = work.copy.run()
        assert work.copy.count_left_out(done) == {"Public/a": 2}
    assert done.left_out == {"Public/a": "the rule for the pattern 'Public/*'"}
    assert sorted(each.name for each in done.folders) == ["INBOX", "Public/b"]
    assert work.stored("Public", "b") == {3: mail("m3")}
    assert not (work.root / "Public" / "a").exists()
    assert (work.root / "subscriptions").read_text() == "INBOX\nPublic/b\n"
    assert work.reports[-1][:2] == (2, 2)
    assert not [each for each in work.server.log if b"EXAMINE" in each and b"Public/a" in each]


def test_a_rule_holds_from_the_next_pass_on(copier: Start) -> None:
    folders = [Folder(b"INBOX", messages(1)), Folder(b"a", messages(2)), Folder(b"a/b", messages(3))]
    work = copier(Condstore, folders)
    work.run()
    work.copy.rules = ruled(FolderRule("name", "a"))
    assert list(work.run().left_out) == ["a"]
    assert not (work.root / "a" / "cur").exists()
    assert work.stored("a", "b") == {3: mail("m3")}
    work.copy.rules = ruled()
    assert work.run().left_out == {}
    assert work.stored("a") == {2: mail("m2")}


def test_a_folder_goes_where_a_rule_says_and_back(copier: Start) -> None:
    folders = [Folder(b"INBOX", messages(1)), Folder(b"Sent Items", messages(2, 5))]
    work = copier(Condstore, folders)
    work.run()
    for name in ("Sent", "Sent Items"):
        work.copy.rules = (
            ruled(FolderRule("name", "Sent Items", "copy", "Sent", "\\Sent")) if name == "Sent" else ruled()
        )
        done = work.run()
        assert done.places["Sent Items"].parts == (name,)
        assert work.stored(name) == {2: mail("m2"), 5: mail("m5")}
        assert sorted(path.parent.name for path in work.root.glob("*/cur")) == [name]
        assert done.notes == []
        assert bool(done.by_rule) == (name == "Sent")
        assert work.run().changes == 0


def test_a_name_that_another_folder_has_is_not_taken_and_is_told_apart(copier: Start) -> None:
    folders = [Folder(b"INBOX"), Folder(b"Sent", messages(1)), Folder(b"Sent Items", messages(2))]
    work = copier(Server, folders, rules=ruled(FolderRule("name", "Sent Items", "copy", "Sent")))
    assert work.run().notes == ["the folder 'Sent Items' is kept as 'Sent-2'"]
    assert (work.stored("Sent"), work.stored("Sent-2")) == ({1: mail("m1")}, {2: mail("m2")})


class BreaksOff(Server):
    """Ends the session where it is asked about what others share."""

    def on_status(self, session: Session, command: Command) -> None:
        if command.words[0] == b"shared":
            session.end()
        super().on_status(session, command)


def test_a_folder_that_ends_sessions_can_be_left_out(copier: Start) -> None:
    work = copier(
        BreaksOff, [Folder(b"INBOX", messages(1)), Folder(b"shared")], rules=ruled(FolderRule("name", "shared"))
    )
    with work.copy:
        done = work.copy.run()
        assert work.copy.count_left_out(done) == {"shared": None}
        assert work.copy.run().changes == 0
    assert work.stored() == {1: mail("m1")}


# Gmail ----------------------------------------------------------------------------------------

SENT, SPAM = b"[Gmail]/Sent Mail", b"[Gmail]/Spam"


def bodies(work: Copier) -> dict[str, list[str]]:
    """The subjects that each folder here has."""
    found = {}
    for cur in work.root.rglob("cur"):
        name = "/".join(cur.parent.relative_to(work.root).parts) or "INBOX"
        subjects = [path.read_bytes().split(b"Subject: ")[1].split(b"\r\n")[0].decode() for path in cur.iterdir()]
        if subjects:
            found[name] = sorted(subjects)
    return found


def at_gmail(copier: Start) -> tuple[Copier, Gmail, dict[str, int]]:
    work = copier(Gmail, [])
    assert isinstance(work.server, Gmail)
    post = work.server.post
    numbers = {
        "read": post("read", b"INBOX"),
        "work": post("work", b"INBOX", b"Work", Gmail.IMPORTANT),
        "sent": post("sent", SENT),
        "archived": post("archived"),
        "starred": post("starred", Gmail.STARRED, flags=b"\\Flagged"),
        "spam": post("spam", SPAM),
    }
    return work, work.server, numbers


def test_gmails_all_mail_brings_what_is_nowhere_else(copier: Start) -> None:
    work, server, _ = at_gmail(copier)
    done = work.run()
    assert bodies(work) == {
        "INBOX": ["read", "work"],
        "Work": ["work"],
        "[Gmail]/Sent Mail": ["sent"],
        "[Gmail]/Spam": ["spam"],
        "Archive": ["archived", "starred"],
    }
    assert set(done.left_out) == {"[Gmail]/Starred", "[Gmail]/Important"}
    assert done.once == "[Gmail]/All Mail"
    assert work.reports[-1][:2] == (7, 7)
    archive = maildir.Folder(work.root / "Archive", done.once, 11)
    archive.open()
    # With the UIDs that they have there, and what is starred with its flag.
    assert {uid: sorted(each.flags) for uid, each in archive.messages.items()} == {4: [], 5: ["\\Flagged"]}
    assert all(b"BODY" not in each for each in server.log if b"Starred" in each)
    assert work.run().changes == 0


def test_what_is_archived_or_labelled_between_two_passes_changes_its_place(copier: Start) -> None:
    work, server, numbers = at_gmail(copier)
    with work.copy:
        work.copy.run()
        server.unlabel(numbers["read"], b"INBOX")
        server.put(b"Work", Mail(0, mail("archived"), message_id=numbers["archived"]))
        work.copy.run()
        assert bodies(work) == {
            "INBOX": ["work"],
            "Work": ["archived", "work"],
            "[Gmail]/Sent Mail": ["sent"],
            "[Gmail]/Spam": ["spam"],
            "Archive": ["read", "starred"],
        }
        server.unlabel(numbers["work"], b"INBOX")
        assert work.copy.run().changes == 1  # it is in Work still
        assert work.copy.run().changes == 0
    # Another worker knows nothing of what the first one saw.
    server.unlabel(numbers["work"], b"Work")
    successor = Copier(server, work.root)
    successor.run()
    assert bodies(successor)["Archive"] == ["read", "starred", "work"]


class GmailAsItIs(Gmail):
    """With CONDSTORE; that a message is in other folders, or no longer, is no change of it in All Mail."""

    capabilities = Gmail.capabilities + b" CONDSTORE"

    def status_items(self, folder: Folder) -> bytes:
        return super().status_items(folder) + b" HIGHESTMODSEQ 5"


def test_all_mail_is_read_when_others_changed_and_only_then(copier: Start) -> None:
    work = copier(GmailAsItIs, [])
    assert isinstance(work.server, Gmail)
    number = work.server.post("read", b"INBOX")
    with work.copy:
        work.copy.run()
        assert bodies(work) == {"INBOX": ["read"]}
        work.server.log.clear()
        work.copy.run()
        assert not [each for each in work.server.log if b"FETCH" in each]
        work.server.unlabel(number, b"INBOX")
        work.copy.run()
        assert bodies(work) == {"Archive": ["read"]}
        work.server.put(b"Work", work.server.folders[2].mails[0])
        work.copy.run()
        assert bodies(work) == {"Work": ["read"]}


def test_what_gmail_gives_no_number_comes_twice_rather_than_not(copier: Start) -> None:
    work, server, _ = at_gmail(copier)
    for each in server.folders[0].mails:
        each.message_id = 0
    work.run()
    assert bodies(work)["Archive"] == ["archived", "read", "starred"]
    assert bodies(work)["INBOX"] == ["read", "work"]


class Stubborn(Gmail):
    """Does not open one of the folders of which it gives the STATUS, and still has the former one open."""

    def on_open(self, session: Session, command: Command) -> None:
        if command.words[0] == b"Work":
            session.no(command, b"not now")
            return
        super().on_open(session, command)


def test_a_folder_that_is_not_opened_takes_nothing_from_all_mail(copier: Start) -> None:
    work = copier(Stubborn, [])
    assert isinstance(work.server, Gmail)
    work.server.post("in Work", b"Work")
    work.server.post("in INBOX", b"INBOX")
    work.run()
    assert bodies(work) == {"Archive": ["in Work"], "INBOX": ["in INBOX"]}
    assert set(work.copy.refused) == {"Work"}


def test_a_rule_leaves_all_mail_out_or_has_it_whole(copier: Start) -> None:
    work, _, _ = at_gmail(copier)
    work.copy.rules = ruled(FolderRule("special-use", "\\All", "copy"))
    work.run()
    assert bodies(work)["[Gmail]/All Mail"] == ["archived", "read", "sent", "starred", "work"]
    work.copy.rules = ruled(FolderRule("special-use", "\\All"))
    assert set(work.run().left_out) == {"[Gmail]/All Mail"}
    assert bodies(work)["[Gmail]/Starred"] == ["starred"]  # it is in no other


class Dwindling(Gmail):
    """``unlisted``: folders that LIST leaves out for a while."""

    unlisted: frozenset[bytes] = frozenset()

    def on_list(self, session: Session, command: Command) -> None:
        folders = self.folders
        self.folders = [each for each in folders if each.name not in self.unlisted]
        super().on_list(session, command)
        self.folders = folders

    on_lsub = on_list


@pytest.mark.parametrize("is_new", [False, True], ids=["the same worker", "another worker"])
def test_a_list_that_leaves_all_mail_out_does_not_bring_everything_twice(copier: Start, *, is_new: bool) -> None:
    work = copier(Dwindling, [])
    assert isinstance(work.server, Dwindling)
    work.server.post("read", b"INBOX", Gmail.STARRED, flags=b"\\Flagged")
    work.server.post("archived")
    work.run()
    came = {"INBOX": ["read"], "Archive": ["archived"]}
    assert bodies(work) == came
    work.server.unlisted = frozenset({Gmail.ALL})
    again = Copier(work.server, work.root) if is_new else work
    done = again.run()
    assert bodies(again) == came
    assert (done.changes, done.once, set(done.left_out)) == (
        0,
        "[Gmail]/All Mail",
        {"[Gmail]/Starred", "[Gmail]/Important"},
    )


def test_a_list_does_not_bring_what_a_rule_leaves_out_by_leaving_it_out(copier: Start) -> None:
    work = copier(Dwindling, [])
    assert isinstance(work.server, Dwindling)
    work.server.post("spam", SPAM)
    work.run()
    assert bodies(work) == {"[Gmail]/Spam": ["spam"]}
    # From now on it is left out; and LIST does not show it.
    work.copy.rules = ruled(FolderRule("special-use", "\\Junk"))
    work.server.unlisted = frozenset({SPAM})
    for _ in range(2):
        assert "[Gmail]/Spam" in work.run().left_out
        assert bodies(work) == {}
    work.server.unlisted = frozenset()
    work.server.folders = [each for each in work.server.folders if each.name != SPAM]
    assert "[Gmail]/Spam" not in work.run().left_out


class Untrue(Gmail):
    """Says another UIDVALIDITY of All Mail than it has as it is opened."""

    def status_items(self, folder: Folder) -> bytes:
        said = folder.uidvalidity + (folder.name == self.ALL)
        return b"MESSAGES %d UIDNEXT %d UIDVALIDITY %d" % (len(folder.mails), folder.uidnext, said)


def test_an_all_mail_whose_status_is_not_true_brings_no_more_than_one_that_is(copier: Start) -> None:
    work = copier(Untrue, [])
    assert isinstance(work.server, Gmail)
    work.server.post("read", b"INBOX")
    work.server.post("archived")
    for _ in range(2):
        work.run()
        assert bodies(work) == {"INBOX": ["read"], "Archive": ["archived"]}


def test_a_folder_that_is_waived_and_left_out_is_named_as_left_out(copier: Start) -> None:
    folders = [Folder(b"INBOX", messages(1)), Folder(b"Old", messages(2))]
    work = copier(Server, folders, rules=ruled(FolderRule("name", "Old")))
    work.copy.waived_folders = frozenset({"Old"})
    done = work.run()
    assert (list(done.left_out), done.notes) == (["Old"], [])


def test_what_has_come_to_another_folder_meanwhile_is_no_message_that_is_not_shown(copier: Start) -> None:
    work, server, numbers = at_gmail(copier)
    work.run()
    # A verification missed it in All Mail, and then it got a label.
    work.copy.distrust("[Gmail]/All Mail", [4])
    server.put(b"Work", Mail(0, mail("archived"), message_id=numbers["archived"]))
    work.run()
    assert (bodies(work)["Archive"], bodies(work)["Work"]) == (["starred"], ["archived", "work"])
    assert not work.copy.unreadable
