"""The witness takes nothing for an answer but what it expects."""

from __future__ import annotations

import sys
from hashlib import sha256
from pathlib import Path

import pytest

from bascule.migrator import witness
from bascule.migrator.witness import NotVerifiable, Opened, Seen, Witness, watching

INBOX = [b"* 2 EXISTS", b"* OK [UIDVALIDITY 7] fine"]
MESSAGE = b'* 1 FETCH (UID 3 FLAGS (\\Seen \\Recent $Work) INTERNALDATE "29-Feb-2004 23:59:58 +0000" RFC822.SIZE 12)'


class Scripted:
    """A wire whose server answers each command by its beginning; what it sends may be in pieces of one byte."""

    def __init__(self, answers: dict[bytes, list[bytes]], *, at_once: int = 1 << 20, refuses: bytes = b"\0") -> None:
        self.answers, self.at_once, self.refuses = answers, at_once, refuses
        self.commands: list[bytes] = []
        self.tags: list[bytes] = []
        self.most_waiting = 0
        self.waiting = b""

    def send(self, data: bytes) -> None:
        self.most_waiting = max(self.most_waiting, len(data.splitlines()))
        for line in data.splitlines():
            tag, _, command = line.partition(b" ")
            self.commands.append(command)
            self.tags.append(tag)
            for beginning, lines in self.answers.items():
                if command.startswith(beginning):
                    self.waiting += b"".join(each + b"\r\n" for each in lines)
                    break
            self.waiting += tag + (b" NO not you\r\n" if command.startswith(self.refuses) else b" OK done\r\n")

    def readline(self) -> bytes:
        line, end, self.waiting = self.waiting.partition(b"\n")
        return line + end

    def read(self, size: int) -> bytes:
        size = min(size, self.at_once)
        piece, self.waiting = self.waiting[:size], self.waiting[size:]
        return piece


def looking(answers: dict[bytes, list[bytes]], **how: object) -> Witness:
    return Witness(Scripted(answers, **how), "the server")  # type: ignore[arg-type]


def test_folders_are_read_however_their_names_are_written() -> None:
    lines = [
        b'* LIST (\\HasNoChildren) "/" INBOX',
        b'* LIST (\\Noselect \\HasChildren) "/" "a \\"quoted\\" \\\\ name"',
        b"* LIST () NIL {5}\r\nin (x",
        b'* LIST (\\Sent) "." Sent',
    ]
    found = looking({b"LIST": lines}).folders()
    assert found == {
        "INBOX": frozenset({"\\hasnochildren"}),
        'a "quoted" \\ name': frozenset({"\\noselect", "\\haschildren"}),
        "in (x": frozenset(),
        "Sent": frozenset({"\\sent"}),
    }


def test_subscriptions_are_read_without_mere_parents() -> None:
    lines = [b'* LSUB () "/" INBOX', b'* LSUB (\\Noselect) "/" parent', b'* LSUB () "/" "two words"']
    assert looking({b"LSUB": lines}).subscribed() == {"INBOX", "two words"}


def test_other_namespaces_are_all_but_ones_own() -> None:
    lines = [b'* NAMESPACE (("INBOX." ".")("virtual." ".")) (("user." ".")) (("" ".")("Public." "."))']
    assert looking({b"NAMESPACE": lines}).other_namespaces("INBOX.") == ("virtual.", "user.", "Public.")


@pytest.mark.parametrize(
    "opening",
    [
        [b"* 2 exists", b"* ok [uidvalidity 7] fine"],
        [b"* 2 EXISTS ", b"* OK [UIDVALIDITY 7] "],
        [b"* OK [ALERT] nearly full {5}", b"* 2 EXISTS", b"* NO say {3}", b"* OK [UIDVALIDITY 7] {9}"],
    ],
)
def test_a_folder_opens_in_any_spelling(opening: list[bytes]) -> None:
    search = [b"* OK [ALERT] nearly full {5}", b"* search 1 2"]
    ((_, opened, found),) = looking({b"EXAMINE": opening, b"UID SEARCH ALL": search}).uids({"INBOX": [1, 2]})
    assert (opened, found) == (Opened(2, 7), {1, 2})


def test_uids_are_those_that_search_finds() -> None:
    search = [b"* SEARCH 1 2", b"* 3 EXISTS", b"* 12345699 RECENT", b"* SEARCH 5", b"* SEARCH"]
    ((name, opened, found),) = looking({b"EXAMINE": INBOX, b"UID SEARCH ALL": search}).uids({"INBOX": [1, 2]})
    assert (name, opened, found) == ("INBOX", Opened(3, 7), {1, 2, 5})


def test_a_large_folder_is_searched_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(witness, "AT_ONCE", 2)
    wire = Scripted({b"EXAMINE": INBOX, b"UID SEARCH": [b"* SEARCH 9"]})
    list(Witness(wire, "the server").uids({"INBOX": [1, 4, 6, 8, 9]}))
    assert wire.commands[1:] == [b"UID SEARCH UID 1:5", b"UID SEARCH UID 6:8", b"UID SEARCH UID 9:*"]


def test_a_server_that_refuses_to_search_finds_nothing_and_is_counted_all_the_same() -> None:
    ((_, opened, found),) = looking({b"EXAMINE": INBOX}, refuses=b"UID SEARCH").uids({"INBOX": [1]})
    assert (opened.exists, found) == (2, set())


def test_messages_are_seen_whole() -> None:
    second = b'* 2 FETCH (UID 4 FLAGS () INTERNALDATE " 1-Jan-2001 00:00:00 +0130" RFC822.SIZE 0 MODSEQ (9))'
    ((name, opened, found),) = looking({b"EXAMINE": INBOX, b"UID FETCH": [MESSAGE, second]}).messages(["INBOX"])
    assert (name, opened) == ("INBOX", Opened(2, 7))
    assert found == {
        3: Seen(frozenset({"\\Seen", "$Work"}), 1_078_099_198, 12),
        4: Seen(frozenset(), 978_301_800, 0),
    }


@pytest.mark.parametrize(
    "line",
    [
        b"* 1 FETCH (UID 3 FLAGS () RFC822.SIZE 12)",
        b'* 1 FETCH (FLAGS () INTERNALDATE "29-Feb-2004 23:59:58 +0000" RFC822.SIZE 12)',
        MESSAGE[:-1],
        MESSAGE.replace(b"12)", b"NIL)"),
    ],
)
def test_a_message_that_is_not_shown_whole_ends_the_verification(line: bytes) -> None:
    with pytest.raises(NotVerifiable, match="shows a message of 'INBOX' as"):
        list(looking({b"EXAMINE": INBOX, b"UID FETCH": [line]}).messages(["INBOX"]))


@pytest.mark.parametrize("opening", [[b"* 2 EXISTS"], [b"* OK [UIDVALIDITY 7] fine"], []])
def test_a_folder_without_a_count_or_a_uidvalidity_is_not_verifiable(opening: list[bytes]) -> None:
    with pytest.raises(NotVerifiable, match="without EXISTS or UIDVALIDITY"):
        list(looking({b"EXAMINE": opening}).messages(["INBOX"]))


def test_a_folder_that_does_not_open_is_not_verifiable() -> None:
    with pytest.raises(NotVerifiable, match="EXAMINE"):
        list(looking({}, refuses=b"EXAMINE").messages(["INBOX"]))


def test_many_folders_are_asked_ahead_and_none_is_left_out() -> None:
    names = [f"folder {number}" for number in range(100)]
    wire = Scripted({b"EXAMINE": INBOX, b"UID FETCH": [MESSAGE]})
    found = {name: seen for name, _, seen in Witness(wire, "the server").messages(names)}
    assert list(found) == names
    assert all(seen.keys() == {3} for seen in found.values())
    assert len(set(wire.tags)) == len(wire.tags) == 200
    assert 10 <= wire.most_waiting <= 26


@pytest.mark.parametrize("at_once", [1, 3, 1 << 20])
def test_bodies_are_known_by_their_digest_and_their_uid(at_once: int) -> None:
    body = b"Subject: x\r\n\r\n* 3 FETCH (\r\nw1 OK no\r\n"
    literal = b"{%d}\r\n%s" % (len(body), body)
    answers = {
        b"UID FETCH 1 ": [b"* 2 FETCH (UID 2 BODY[] %s)" % literal],  # mixed
        b"UID FETCH 2 ": [b"* 1 FETCH (BODY[] {0}\r\n UID 1)"],
        b"UID FETCH 3 ": [b'* 3 FETCH (UID 3 BODY[] "a \\"b\\"")'],
        b"UID FETCH 4 ": [b"* 4 FETCH (UID 4 BODY[] NIL)"],
    }
    found = looking(answers, at_once=at_once).digests("INBOX", [1, 2, 3, 4, 5])
    assert found == {
        1: sha256(b"").hexdigest(),
        2: sha256(body).hexdigest(),
        3: sha256(b'a "b"').hexdigest(),
    }


def test_a_session_that_ends_within_an_answer_ends_the_verification() -> None:
    wire = Scripted({b"UID FETCH": [b"* 1 FETCH (UID 1 BODY[] {100}\r\ncut"]})
    wire.answers[b"EXAMINE"] = INBOX
    with pytest.raises(NotVerifiable, match="ended the session"):
        Witness(wire, "the server").digests("INBOX", [1])


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'* LIST () "/" {2000000}\r\n', "not asked for"),
        (b"* LIST " + b"{0}\r\n" + b"x" * 1_100_000 + b"{0}\r\n", "ended the session"),
    ],
)
def test_what_was_not_asked_for_is_not_taken(line: bytes, words: str) -> None:
    with pytest.raises(NotVerifiable, match=words):
        looking({b"LIST": [line]}).folders()


@pytest.mark.parametrize("waiting", [b"", b"* LIST () NIL x", b"w0 O"])
def test_a_connection_that_ends_ends_the_verification(waiting: bytes) -> None:
    class Ending(Scripted):
        def send(self, data: bytes) -> None:
            super().send(data)
            self.waiting = waiting

    with pytest.raises(NotVerifiable, match="ended the session"):
        Witness(Ending({}), "the server").folders()


def child(script: str) -> list[str]:
    return [sys.executable, "-c", script]


GREETS = "import sys; print('* PREAUTH hello', end='\\r\\n', flush=True);"


def test_a_child_is_killed_and_not_logged_out(tmp_path: Path) -> None:
    note = tmp_path / "commands"
    script = GREETS + f"open({str(note)!r}, 'w').write(sys.stdin.read())"
    with watching(child(script), "Dovecot here"):
        pass
    assert not note.exists() or note.read_text() == ""


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("print('* BYE not today', end='\\r\\n')", "does not open the mailbox"),
        ("pass", "ended the session"),
        (GREETS, "ended the session"),
        (GREETS + "import time; time.sleep(60)", "does not answer in time"),
        ("import time; time.sleep(60)", "does not answer in time"),
    ],
)
def test_a_child_that_does_not_answer_is_given_up(script: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(witness, "PATIENCE", 1.0)
    with pytest.raises(NotVerifiable, match=words), watching(child(script), "Dovecot here") as looker:
        looker.folders()


@pytest.mark.parametrize("pause", ["sys.stdout.flush(); time.sleep(0.2)", "pass"])
def test_what_has_come_is_taken_without_waiting_for_more(pause: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(witness, "PATIENCE", 2.0)
    script = (
        GREETS + "\nimport time\ntag = sys.stdin.readline().split()[0]\n"
        f"sys.stdout.write('* LIST () NIL {{3}}\\r\\n'); {pause}\n"
        "sys.stdout.write('abc\\r\\n' + tag + ' OK done\\r\\n'); sys.stdout.flush(); time.sleep(60)\n"
    )
    with watching(child(script), "Dovecot here") as looker:
        assert looker.folders() == {"abc": frozenset()}


def test_neither_side_waits_with_full_pipes() -> None:
    script = (
        GREETS + "\nfor line in sys.stdin:\n"
        " tag = line.split()[0]\n"
        " print('* LIST () \"/\" ' + 'x' * 50000, end='\\r\\n')\n"
        " print(tag, 'OK done', end='\\r\\n', flush=True)\n"
    )
    with watching(child(script), "Dovecot here") as looker:
        assert len(looker._ask([b"LIST " + b"y" * 50_000] * 40)) == 40


def test_what_may_be_refused_is_done_without() -> None:
    look = looking({}, refuses=b"NAMESPACE")
    assert look.other_namespaces("", may_refuse=True) == ()
    with pytest.raises(NotVerifiable):
        look.other_namespaces("")
    look = looking({}, refuses=b"LIST (")
    assert look.special_uses(may_refuse=True) == {}
    with pytest.raises(NotVerifiable):
        look.special_uses()


def test_gmails_numbers_are_read_whatever_their_order() -> None:
    lines = [
        b"* 1 FETCH (X-GM-MSGID 1278455344230334865 UID 3)",
        b"* 2 FETCH (UID 4 X-GM-MSGID 5)",
        b"* 3 FETCH (UID 9)",
    ]
    look = looking({b"UID FETCH": lines, b"EXAMINE": INBOX})
    assert dict(look.message_ids(["INBOX"])) == {"INBOX": {3: b"1278455344230334865", 4: b"5"}}
    assert dict(looking({b"EXAMINE": INBOX}, refuses=b"UID FETCH").message_ids(["INBOX"])) == {"INBOX": {}}
    with pytest.raises(NotVerifiable):
        dict(looking({}, refuses=b"EXAMINE").message_ids(["INBOX"]))
