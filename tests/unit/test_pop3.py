"""Which UIDL belongs to which message, and what a POP3 server may do to who asks it."""

from __future__ import annotations

import ssl
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import trustme
from hypothesis import given, settings
from hypothesis import strategies as st

from bascule.address import Address
from bascule.credential import Password
from bascule.errors import LegacyBusy, LegacyUnavailable
from bascule.lab.lines import Client, serving
from bascule.legacy import LegacySettings, Service, TlsMode, Trust
from bascule.migrator import conversation, pop3
from bascule.migrator.conversation import Conversation
from bascule.migrator.pop3 import Identity, Uidls, UidlsNotKnown, ranges, uidls


@dataclass(frozen=True)
class Mail:
    """A message: its UID, UIDL, Message-ID, size, and what else its header says."""

    uid: int
    uidl: bytes
    message_id: str = ""
    size: int = 100
    more: str = ""

    @property
    def header(self) -> bytes:
        identity = f"Message-ID: <{self.message_id}>\r\n" if self.message_id else ""
        return f"Subject: of {self.more}\r\n{identity}\r\n".encode()


def mails(*numbers: int, size: Callable[[int], int] = lambda number: 100 + number) -> list[Mail]:
    return [Mail(number, b"u%d" % number, f"{number}@test", size(number), str(number)) for number in numbers]


@dataclass
class Server:
    """A POP3 server with these messages; ``answers`` are given in place of its own, by the first word of a command."""

    mails: list[Mail]
    answers: dict[bytes, list[bytes]] = field(default_factory=dict)
    capabilities: tuple[bytes, ...] = (b"TOP", b"UIDL", b"PIPELINING")
    asked: list[bytes] = field(default_factory=list)

    def __call__(self, client: Client) -> None:
        client.say(b"+OK ready")
        self.talk(client)

    def talk(self, client: Client) -> None:
        while line := client.line():
            self.asked.append(line)
            word = line.split()[0]
            if word in self.answers:
                client.say(*self.answers[word])
            elif word == b"CAPA":
                client.say(b"+OK", *self.capabilities, b".")
            elif word == b"LIST":
                client.say(b"+OK", *(b"%d %d" % (n, mail.size) for n, mail in enumerate(self.mails, 1)), b".")
            elif word == b"UIDL":
                client.say(b"+OK", *(b"%d %s" % (n, mail.uidl) for n, mail in enumerate(self.mails, 1)), b".")
            elif word == b"TOP":
                header = self.mails[int(line.split()[1]) - 1].header
                client.say(b"+OK", *header.splitlines(), b".")
            else:
                client.say(b"+OK")
            if word == b"QUIT":
                return


def ask(
    server: Callable[[Client], None],
    inbox: list[Mail],
    *,
    tls: TlsMode = "none",
    host: str = "127.0.0.1",
    ca: Path | None = None,
    sizes: bool = True,
    seconds: float = 20,
    timeout: float = 5,
    password: str = "pw",  # noqa: S107 (of a test)
) -> Uidls:
    headers = {mail.uid: mail.header + b"body\r\n" for mail in inbox}
    with serving(server) as port:
        return uidls(
            LegacySettings("test", "imap.invalid", Service(143, "none"), "127.0.0.1", 25),
            Service(port, tls),
            Trust(ca, timeout),
            Address("user", "test"),
            Password(password),
            [(mail.uid, mail.size if sizes else 0) for mail in inbox],
            lambda uid: headers.get(uid, b""),
            host=host,
            seconds=seconds,
        )


def kept(inbox: list[Mail]) -> dict[int, str]:
    return {mail.uid: mail.uidl.decode() for mail in inbox}


def test_the_same_order_needs_no_headers() -> None:
    inbox = mails(1, 2, 5, 9)
    server = Server(inbox)
    assert ask(server, inbox) == Uidls(kept(inbox), "")
    assert not [line for line in server.asked if line.startswith(b"TOP")]

    assert server.asked[-2:] == [b"RSET", b"QUIT"], "the server keeps the mailbox locked until then"


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[ssl.SSLContext, Path]:
    """What a server has, and the authority that vouches for it."""
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    return context, tmp_path / "ca.pem"


@pytest.mark.parametrize("tls", ["starttls", "implicit"])
def test_nothing_is_said_before_tls(tls: TlsMode, certificate: tuple[ssl.SSLContext, Path]) -> None:
    context, ca = certificate
    inbox = mails(1, 2)
    in_clear: list[bytes] = []

    def serve(client: Client) -> None:
        if tls == "starttls":
            client.say(b"+OK")
            in_clear.append(client.line())
            client.say(b"+OK")
        client.secure(context)
        server = Server(inbox)
        if tls == "starttls":
            server.talk(client)
        else:
            server(client)

    assert ask(serve, inbox, tls=tls, host="localhost", ca=ca) == Uidls(kept(inbox), "")
    assert in_clear == ([b"STLS"] if tls == "starttls" else [])
    with pytest.raises(LegacyUnavailable, match="is not trusted here"):
        ask(serve, inbox, tls=tls, host="localhost", ca=None)


def test_what_comes_before_tls_is_not_taken_for_what_comes_in_it(certificate: tuple[ssl.SSLContext, Path]) -> None:
    def serve(client: Client) -> None:
        client.say(b"+OK")
        client.line()
        client.raw(b"+OK\r\n+OK\r\n+OK\r\n")
        client.secure(certificate[0])

    with pytest.raises(LegacyUnavailable, match="sends more before TLS"):
        ask(serve, mails(1), tls="starttls", host="localhost", ca=certificate[1])


def test_starttls_that_is_refused(certificate: tuple[ssl.SSLContext, Path]) -> None:
    server = Server(mails(1), {b"STLS": [b"-ERR no"]})
    with pytest.raises(UidlsNotKnown, match="STLS"):
        ask(server, mails(1), tls="starttls", host="localhost", ca=certificate[1])
    assert server.asked == [b"STLS"]


@pytest.mark.parametrize("capabilities", [(), (b"PIPELINING",)])
def test_another_order_is_told_by_message_id(capabilities: tuple[bytes, ...]) -> None:
    inbox = mails(*range(1, 60))
    there = [*inbox[:20], *reversed(inbox[20:25]), *inbox[25:]]
    assert ask(Server(there, capabilities=capabilities), inbox) == Uidls(kept(inbox), "")


def test_messages_of_one_size_may_have_changed_places() -> None:
    inbox = mails(1, 2, 3, 4, size=lambda number: 100 if number in {2, 3} else number)
    there = [inbox[0], inbox[2], inbox[1], inbox[3]]
    server = Server(there)
    assert ask(server, inbox) == Uidls(kept(inbox), "")
    assert [line for line in server.asked if line.startswith(b"TOP")] == [b"TOP 2 0", b"TOP 3 0"]


@pytest.mark.parametrize("sizes", [True, False])
def test_sizes_that_nobody_knows_or_that_are_counted_otherwise(sizes: bool) -> None:
    inbox = mails(*range(1, 8))
    there = [replace(mail, size=mail.size + 7) for mail in reversed(inbox)]
    assert ask(Server(there), inbox, sizes=sizes) == Uidls(kept(inbox), "")


def test_one_message_id_twice_is_told_by_size_then_by_header() -> None:
    inbox = [
        Mail(1, b"a", "same@test", 100, "list"),
        Mail(2, b"b", "same@test", 200, "direct"),
        Mail(3, b"c", "other@test", 50, "list"),
        Mail(4, b"d", "other@test", 50, "direct"),
        Mail(5, b"e", "", 60, "no id"),
    ]
    assert ask(Server([inbox[3], inbox[4], inbox[1], inbox[2], inbox[0]]), inbox) == Uidls(kept(inbox), "")


def test_copies_of_one_message_keep_their_uidls_in_any_order() -> None:
    inbox = [Mail(1, b"a", "same@test"), Mail(2, b"b", "same@test"), Mail(3, b"c", "third@test", 7)]
    assert ask(Server([inbox[2], inbox[0], inbox[1]]), inbox) == Uidls(kept(inbox), "")


def test_copies_of_one_header_are_told_by_size_where_they_can() -> None:
    inbox = [Mail(1, b"a", "same@test", 10), Mail(2, b"b", "same@test", 12), Mail(3, b"c", "same@test", 12)]
    assert ask(Server([inbox[1], inbox[0], inbox[2]]), inbox) == Uidls(kept(inbox), "")


def test_what_cannot_be_told_apart_is_named_and_the_rest_is_kept() -> None:
    inbox = [*mails(1, 2, 3), Mail(4, b"x", "same@test"), Mail(5, b"y", "same@test")]
    # Of the copies POP3 lists three: any of them may be a message that INBOX does not have.
    there = [inbox[4], inbox[0], Mail(6, b"z", "same@test"), inbox[1], inbox[2], inbox[3]]
    found = ask(Server(there), inbox)
    assert found.by_uid == kept(inbox[:3])
    assert "3 of the 6 messages" in found.note
    assert found.note.endswith("number 1,3,6")


def test_uidls_that_are_missing_or_illegal_are_named() -> None:
    inbox = mails(1, 2, 3, 4, 5)
    lines = [b"+OK", b"1 u1", b"2 with a blank", b"3 caf\xe9", b"5 " + b"x" * 100, b"what?", b"99999999999 u", b"."]
    found = ask(Server(inbox, {b"UIDL": lines}), inbox)
    assert found.by_uid == {1: "u1", 5: "x" * 100}
    assert "number 2:4" in found.note


@pytest.mark.parametrize(("more", "asked"), [(1, 1), (pop3.NEW, pop3.NEW), (pop3.NEW + 1, 29 + pop3.NEW + 1)])
def test_messages_that_came_between_the_listings(more: int, asked: int) -> None:
    inbox = mails(*range(1, 30))
    server = Server([*inbox, *mails(*range(30, 30 + more))])
    assert ask(server, inbox).by_uid == kept(inbox)
    assert len([line for line in server.asked if line.startswith(b"TOP")]) == asked


def test_top_that_is_refused_or_odd() -> None:
    inbox = mails(*range(1, 6))
    there = [*inbox[:3], inbox[4], inbox[3]]
    found = ask(Server(there, {b"TOP": [b"-ERR no such command"]}), inbox)
    assert found.by_uid == {}
    assert "number 1:5" in found.note


def test_a_header_with_dots_and_folds_is_the_same_on_both_sides() -> None:
    stored = b"Subject: a\r\nX: 1\r\n.dot: 2\r\nMessage-ID:\r\n <one@\r\n two>\r\n\r\nbody\r\nMessage-ID: <no>\r\n"
    identity = Identity.of(1, stored)
    assert identity.message_id == b"<one@two>"
    assert Identity.of(1, stored.replace(b"\r\n", b"\n")) == identity
    inbox = mails(1, 2)
    top = [b"+OK", b"Subject: a", b"X: 1", b"..dot: 2", b"Message-ID:", b" <one@", b" two>", b"", b"."]
    with serving(Server(inbox, {b"TOP": top})) as port:
        found = uidls(
            LegacySettings("test", "127.0.0.1", Service(143, "none"), "127.0.0.1", 25),
            Service(port, "none"),
            Trust(None, 5),
            Address("user", "test"),
            Password("pw"),
            [(1, 0)],
            lambda _: stored,
        )
    assert found.by_uid == {}, "POP3 lists it twice: it may be either"
    assert found.note


@pytest.mark.parametrize(
    ("word", "says"),
    [(b"USER", b"-ERR no"), (b"PASS", b"-ERR [AUTH] wrong"), (b"UIDL", b"-ERR unknown"), (b"LIST", b"garbage \x1b[2J")],
)
def test_a_refusal_is_repeated_without_what_a_terminal_would_obey(word: bytes, says: bytes) -> None:
    with pytest.raises(UidlsNotKnown) as error:
        ask(Server(mails(1), {word: [says]}), mails(1))
    assert word.decode() in error.value.message
    assert "\x1b" not in error.value.message


def test_a_mailbox_in_use_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pop3, "PAUSES", (0.0, 0.0))
    inbox = mails(1, 2)
    calls = 0

    def serve(client: Client) -> None:
        nonlocal calls
        calls += 1
        Server(inbox, {} if calls == 3 else {b"PASS": [b"-ERR [in-use] somebody is there"]})(client)

    assert ask(serve, inbox).by_uid == kept(inbox)
    calls = 3
    with pytest.raises(LegacyBusy, match="somebody is there"):
        ask(serve, inbox)


def test_a_password_is_one_line() -> None:
    server = Server(mails(1))
    with pytest.raises(UidlsNotKnown):
        ask(server, mails(1), password="pw\r\nDELE 1")
    assert not [line for line in server.asked if line.startswith((b"PASS", b"DELE"))]


def endless_greeting(client: Client) -> None:
    while True:
        client.raw(b"+" * 65536)


def endless_listing(client: Client) -> None:
    client.say(b"+OK")
    while line := client.line():
        client.say(b"+OK")
        while line.startswith(b"UIDL"):
            client.raw(b"1 " + b"x" * 60 + b"\r\n" + b"\r\n" * 10000)


def dripping(client: Client) -> None:
    while True:
        client.raw(b"+")
        time.sleep(0.02)


def dripping_later(client: Client) -> None:
    client.say(b"+OK")
    while line := client.line():
        client.say(b"+OK")
        while line.startswith(b"LIST"):
            client.raw(b"1 2\r\n")
            time.sleep(0.02)


@pytest.mark.parametrize(
    ("server", "words"),
    [
        (endless_greeting, "without end"),
        (endless_listing, "has no end"),
        (dripping, "too slow|in time"),
        (dripping_later, "too slow|in time"),
    ],
)
def test_a_hostile_server_is_left_in_time(
    server: Callable[[Client], None], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pop3, "MOST", 32 << 20)
    monkeypatch.setattr(pop3, "MAX_MESSAGES", 1000)
    tracemalloc.start()
    try:
        with pytest.raises((LegacyUnavailable, UidlsNotKnown), match=words):
            ask(server, mails(1), seconds=2)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


def test_headers_that_drip_cost_only_their_own_uidls() -> None:
    """What was known by then is kept."""
    inbox = mails(*range(1, 6), size=lambda number: number if number < 3 else 50)

    def serve(client: Client) -> None:
        server = Server(inbox)
        client.say(b"+OK")
        while line := client.line():
            if line.startswith(b"TOP 4"):
                while True:
                    client.raw(b"+")
                    time.sleep(0.02)
            word = line.split()[0]
            if word == b"TOP":
                client.say(b"+OK", *inbox[int(line.split()[1]) - 1].header.splitlines(), b".")
            elif word in {b"LIST", b"UIDL"}:
                value = (lambda mail: b"%d" % mail.size) if word == b"LIST" else (lambda mail: mail.uidl)
                client.say(b"+OK", *(b"%d %s" % (n, value(mail)) for n, mail in enumerate(server.mails, 1)), b".")
            else:
                client.say(b"+OK", *((b".",) if word == b"CAPA" else ()))

    found = ask(serve, inbox, seconds=2)
    assert found.by_uid == kept(inbox[:3])
    assert "number 4:5" in found.note


@pytest.mark.parametrize("piece", [1, 3])
def test_answers_in_pieces(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversation, "PIECE", piece)
    inbox = mails(1, 2, 3)
    assert ask(Server([inbox[2], inbox[0], inbox[1]]), inbox) == Uidls(kept(inbox), "")


def test_long_lines_are_cut_and_what_follows_them_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversation, "PIECE", 100)
    inbox = mails(1, 2)
    listing = [b"+OK " + b"x" * 5000, b"1 " + b"x" * 5000, b"2 u2", b"."]
    assert ask(Server(inbox, {b"UIDL": listing}), inbox).by_uid == {2: "u2"}
    listing[1] = b"1 " + b"x" * (pop3.MAX_LINE - 2)
    assert ask(Server(inbox, {b"UIDL": listing}), inbox).by_uid == {1: "x" * (pop3.MAX_LINE - 2), 2: "u2"}


def test_nobody_listens() -> None:
    with serving(Server([])) as port:
        pass
    with pytest.raises(LegacyUnavailable, match="nothing listens"):
        Conversation("POP3", "127.0.0.1", Service(port, "none"), Trust(None, 5), seconds=5, most=100)


def test_a_server_that_hangs_up() -> None:
    with pytest.raises(
        LegacyUnavailable, match=r"closed the connection|ended the connection|reset by peer|Broken pipe"
    ):
        ask(lambda client: client.say(b"+OK"), mails(1))


@settings(deadline=None, max_examples=60)
@given(st.permutations(range(12)), st.lists(st.sampled_from([10, 20]), min_size=12, max_size=12))
def test_any_order_with_few_sizes(order: list[int], sizes: list[int]) -> None:
    inbox = mails(*range(1, 13), size=lambda number: sizes[number - 1])
    assert ask(Server([inbox[place] for place in order]), inbox) == Uidls(kept(inbox), "")


def test_numbers_are_named_in_ranges() -> None:
    assert ranges([1, 2, 3, 7, 9, 10]) == "1:3,7,9:10"
    assert ranges(list(range(1, 100, 2))).count(",") == 19
    assert ranges(list(range(1, 100, 2))).endswith(" and more")
