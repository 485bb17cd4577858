"""What the checks of the legacy server make of a session: of a server that answers what no real one can be made to."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import pytest
from imapclient import IMAPClient

from bascule.address import Address
from bascule.check import Finding, Subject, User, logins, matching, run
from bascule.check.imap import FolderRead, Survey, look_around
from bascule.check.subject import NAMED
from bascule.credential import Password
from bascule.errors import BasculeError, LegacyUnavailable
from bascule.imap.folder_rules import FolderRule, FolderRules
from bascule.imap.reader import FolderRefused
from bascule.lab.process import free_ports
from bascule.legacy import LegacySettings, Service, Trust
from bascule.settings import Dovecot, Legacy, Settings

USER = User(Address("a", "moving.test"), Password("secret"))


def legacy(port: int = 1, host: str = "127.0.0.1") -> LegacySettings:
    return LegacySettings("moving.test", host, Service(port, "none"), "127.0.0.1", 2)


def levels(name: str, survey: Survey, *, host: str = "127.0.0.1", **settings: object) -> list[str]:
    subject = Subject(Settings().model_copy(update=settings), legacy=legacy(host=host), user=USER)
    subject.survey = survey
    said: list[Finding] = list(run(matching([name]), subject))
    assert all(each.remedy for each in said if each.level == "wrong")
    return [each.level for each in said]


def folder(name: str, **values: Any) -> FolderRead:
    return replace(FolderRead(name, 1, 1, frozenset(), 0), **values)


FULL = Survey(folders=("INBOX", "x"), messages={"INBOX": 1, "x": 2})


@pytest.mark.parametrize(
    ("name", "survey", "expected"),
    [
        ("legacy.imap.quota", Survey(), []),
        ("legacy.imap.quota", Survey(quotas=[("STORAGE", 10, 100)]), ["good"]),
        ("legacy.imap.quota", Survey(quotas=[("STORAGE", 99, 100)]), ["note"]),
        ("legacy.imap.quota", Survey(quotas=[("STORAGE", 99, 0)]), []),
        ("legacy.imap.permissions", Survey(), []),
        ("legacy.imap.permissions", Survey(rights={"INBOX": "lrswipkxte", "x": "lrswipkxte"}), []),
        ("legacy.imap.permissions", Survey(rights={"INBOX": "lrswip", "x": "lswip"}), ["wrong"]),
        ("legacy.imap.permissions", Survey(rights={"INBOX": "lrs"}), ["wrong"]),
        ("legacy.imap.permissions", Survey(rights={"INBOX": "lrswi", "x": "lrs"}), ["note"]),
        ("legacy.imap.folders", FULL, ["good"]),
        ("legacy.imap.folders", Survey(folders=("x",), messages={"x": 1}), ["wrong", "good"]),
        (
            "legacy.imap.folders",
            Survey(folders=("INBOX", "x"), messages={"INBOX": 1}, unopened={"x": "no"}),
            ["wrong", "good"],
        ),
        ("legacy.imap.messages", Survey(messages={"x": 3}, read=[folder("x", exists=3, given=3)]), ["good"]),
        ("legacy.imap.messages", Survey(messages={"x": 3}, read=[folder("x", exists=3, given=2)]), ["wrong"]),
        ("legacy.imap.messages", Survey(messages={"x": 3}, unread={"x": "bad date"}), ["wrong"]),
        ("legacy.imap.messages", Survey(messages={"x": 1}, read=[folder("x", odd_dates=1)]), ["note", "good"]),
        ("legacy.imap.keywords", Survey(read=[folder("x", keywords=frozenset(map(str, range(26))))]), []),
        ("legacy.imap.keywords", Survey(read=[folder("x", keywords=frozenset(map(str, range(27))))]), ["note"]),
        ("legacy.imap.folder-names", FULL, []),
        ("legacy.imap.folder-names", Survey(folders=("a/new",), delimiters={"a/new": "/"}), ["note"]),
        ("legacy.imap.folder-names", Survey(folders=("b",), capabilities=frozenset({"UTF8=ACCEPT"})), []),
        ("legacy.imap.folder-names", Survey(folders=("b&AOQ-",), capabilities=frozenset({"UTF8=ACCEPT"})), ["note"]),
        ("legacy.imap.shared", FULL, []),
        ("legacy.imap.shared", Survey(foreign=("user.bob", "user.bob.Plans")), ["note"]),
        ("legacy.imap.newest-only", FULL, []),
        ("legacy.imap.newest-only", Survey(capabilities=frozenset({"X-GM-EXT-1"})), ["note"]),
    ],
)
def test_what_a_session_saw(name: str, survey: Survey, expected: list[str]) -> None:
    assert levels(name, survey) == expected


def test_a_server_that_is_known_by_its_name_to_show_the_newest_only() -> None:
    assert levels("legacy.imap.newest-only", Survey(), host="imap.mail.yahoo.com") == ["note"]


def test_many_folders_are_not_named_one_by_one() -> None:
    names = tuple(f"~{number}" for number in range(20))
    survey = Survey(folders=names, delimiters=dict.fromkeys(names, "."))
    assert levels("legacy.imap.folder-names", survey) == ["note"] * (NAMED + 1)


# The session itself -----------------------------------------------------------------------


GREETING = "* OK [CAPABILITY IMAP4rev1 AUTH=PLAIN] hello"


@contextmanager
def imap_server(
    answers: Mapping[str, str], greeting: str = "* OK [CAPABILITY IMAP4rev1 AUTH=PLAIN] hello"
) -> Iterator[Any]:
    """Answers commands by their first word; gives its port and what it was told."""
    told: list[str] = []
    listener = socket.create_server(("127.0.0.1", free_ports(1)[0]))

    def serve() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            with client, client.makefile("rwb") as stream:
                stream.write(f"{greeting}\r\n".encode())
                stream.flush()
                for line in stream:
                    tag, _, command = line.decode().strip().partition(" ")
                    told.append(command)
                    word = command.partition(" ")[0].upper()
                    if word == "AUTHENTICATE":
                        stream.write(b"+ \r\n")
                        stream.flush()
                        stream.readline()
                    stream.write(answers.get(word, f"{tag} OK done").replace("TAG", tag).encode() + b"\r\n")
                    stream.flush()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield listener.getsockname()[1], told
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


@dataclass
class Listed:
    name: str
    selectable: bool = True
    delimiter: str = "."
    special_use: str = ""
    attributes: frozenset[str] = frozenset()


@dataclass
class Layout:
    separator: str = "."
    prefix: str = ""
    folders: Sequence[Listed] = ()
    foreign: Sequence[str] = ()


@dataclass
class Status:
    messages: int


@dataclass
class Profile:
    name: str = ""
    note: str = ""


@dataclass
class Message:
    size: int = 100
    internaldate: int = 1_000_000_000
    flags: frozenset[str] = frozenset()
    remarks: tuple[str, ...] = ()


@dataclass
class Changes:
    exists: int
    new: list[Message] = field(default_factory=list)


Content = list[Message] | FolderRefused


class Told:
    """A reader of a mailbox that is told here."""

    profile = Profile()

    def announces(self, _: str) -> bool:
        return False

    def __init__(self, folders: Mapping[str, Content]) -> None:
        self._folders = folders

    def layout(self) -> Layout:
        return Layout(folders=[Listed("INBOX.parent", False), *map(Listed, self._folders)])

    def statuses(self, folders: Sequence[str]) -> Mapping[str, Status | FolderRefused]:
        return {name: self._status(name) for name in folders}

    def _status(self, name: str) -> Status | FolderRefused:
        found = self._folders[name]
        if isinstance(found, FolderRefused):
            return found if name == "closed" else Status(1)
        return Status(len(found))

    def changes(self, wanted: Iterable[tuple[str, None]]) -> Iterator[Changes | FolderRefused]:
        for name, _ in wanted:
            found = self._folders[name]
            yield found if isinstance(found, FolderRefused) else Changes(len(found) + (name == "short"), found)


STATUS = "* STATUS INBOX (MESSAGES 1)\r\nTAG OK done"
CAPABILITY = "* CAPABILITY IMAP4rev1 AUTH=PLAIN\r\nTAG OK done"


def surveyed(folders: Mapping[str, Content], answers: Mapping[str, str] | None = None) -> Survey:
    with imap_server({"STATUS": STATUS, "CAPABILITY": CAPABILITY} | dict(answers or {})) as (port, _):
        subject = Subject(Settings(legacy=Legacy(timeout=5)), legacy=legacy(port), user=USER)
        with patch.object(subject, "reader", lambda: nullcontext(Told(folders))):
            return look_around(subject)


def test_everything_is_counted() -> None:
    odd = Message(internaldate=-5), Message(internaldate=10**11)
    survey = surveyed(
        {
            "INBOX": [Message(flags=frozenset({"\\Seen", "work"}))],
            "short": [Message()],
            "closed": FolderRefused("closed", "not this one"),
            "dates": list(odd),
        }
    )
    assert survey.folders == ("INBOX", "short", "closed", "dates")
    assert survey.unopened == {"closed": "not this one"}
    assert {each.name: (each.exists, each.given, each.odd_dates) for each in survey.read} == {
        "INBOX": (1, 1, 0), "short": (2, 1, 0), "dates": (2, 2, 2),
    }  # fmt: skip
    assert survey.read[[each.name for each in survey.read].index("INBOX")].keywords == {"work"}
    assert survey.size == 400


def test_what_rules_leave_out_is_named_and_not_looked_at() -> None:
    content: dict[str, Content] = {
        "INBOX": [Message()],
        "Gel&APY-scht": [Message(), Message()],
        "closed": FolderRefused("closed", "not this one"),
        "Sent Items": [Message()],
    }
    rules = FolderRules(
        [
            FolderRule("name", "Gelöscht"),
            FolderRule("pattern", "cl*"),
            FolderRule("name", "Sent Items", "copy", "Sent"),
            FolderRule("name", "nowhere"),
        ]
    )
    with imap_server({"STATUS": STATUS, "CAPABILITY": CAPABILITY}) as (port, _):
        subject = Subject(Settings(legacy=Legacy(timeout=5)), legacy=legacy(port), user=USER)
        subject.folder_rules = rules
        with patch.object(subject, "reader", lambda: nullcontext(Told(content))):
            subject.survey = look_around(subject)
        found = list(run(matching(["legacy.imap.*rules", "legacy.imap.folders", "legacy.imap.folder-names"]), subject))
    assert [(each.level, each.text) for each in found] == [
        ("good", "a@moving.test has 2 messages in 2 folders, separator '.'"),
        ("note", "left at the legacy server: 'Gelöscht' (2): the rule for the name 'Gelöscht'"),
        ("note", "left at the legacy server: 'closed' (not counted): the rule for the pattern 'cl*'"),
        ("note", "the folder 'Sent Items' is kept as 'Sent', as a rule says"),
        ("note", "the rule for the name 'nowhere' fits no folder of this user"),
    ]


def test_a_folder_that_cannot_be_read_hides_no_other() -> None:
    survey = surveyed({"INBOX": FolderRefused("INBOX", "it breaks off"), "z": [Message()]})
    assert survey.unread == {"INBOX": "it breaks off"}
    assert [each.name for each in survey.read] == ["z"]


def test_a_login_that_opens_nothing_is_no_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LegacyUnavailable, match="and then opens nothing"):
        surveyed({}, {"STATUS": "TAG BAD not connected"})


def said_of_login(answers: Mapping[str, str]) -> Finding:
    with imap_server({"STATUS": STATUS, "CAPABILITY": CAPABILITY} | dict(answers)) as (port, _):
        subject = Subject(Settings(legacy=Legacy(timeout=5)), legacy=legacy(port), user=USER)
        (found,) = run(matching(["legacy.imap.login"]), subject)
        return found


def test_words_of_a_server_in_a_finding_do_nothing() -> None:
    found = said_of_login({"AUTHENTICATE": "TAG NO [AUTHENTICATIONFAILED] \x1b[2J[/x]"})
    assert found.level == "wrong"
    assert "[2J[/x]" in found.text
    assert "\x1b" not in found.text


# The password here -------------------------------------------------------------------------


def login_here(monkeypatch: pytest.MonkeyPatch, *, is_this_host: bool, capability: str) -> tuple[list[str], str]:
    """What a Dovecot without a certificate of its own is told, and what went wrong."""
    monkeypatch.setattr(logins, "_is_this_host", lambda _: is_this_host)
    greeting = f"* OK [CAPABILITY IMAP4rev1 {capability} AUTH=PLAIN] hello"
    with imap_server({"STARTTLS": "TAG BAD no", "LIST": "TAG OK"}, greeting) as (port, told):
        subject = Subject(Settings(dovecot=Dovecot(imap=f"127.0.0.1:{port}")), legacy=legacy(), user=USER)
        try:
            logins._folders(subject, "a@moving.test", Password("secret"))
        except (BasculeError, IMAPClient.Error) as error:
            return told, str(error)
        return told, ""


def test_no_password_goes_to_another_host_in_clear(monkeypatch: pytest.MonkeyPatch) -> None:
    told, error = login_here(monkeypatch, is_this_host=False, capability="")
    assert "offers no TLS: no password is sent there" in error
    assert not [command for command in told if command.upper().startswith(("AUTH", "LOGIN"))]


@pytest.mark.parametrize("is_this_host", [True, False])
def test_where_tls_is_offered_nothing_goes_in_clear(monkeypatch: pytest.MonkeyPatch, is_this_host: bool) -> None:
    told, error = login_here(monkeypatch, is_this_host=is_this_host, capability="STARTTLS")
    assert error
    assert "STARTTLS" in told
    assert not [command for command in told if command.upper().startswith(("AUTH", "LOGIN"))]


def test_only_another_host_must_prove_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = Subject(Settings(), legacy=legacy())
    assert not logins._context(subject, "127.0.0.1").check_hostname
    elsewhere = logins._context(subject, "store1.example.org")
    assert elsewhere.check_hostname
    assert elsewhere is Trust(None).context()


# Services beside IMAP -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pop3", "sieve", "submission"])
def test_a_service_that_nobody_serves(name: str) -> None:
    others: dict[str, Any] = {name: Service(free_ports(1)[0], "starttls")}
    settings = replace(legacy(), **others)
    (found,) = run(matching([f"legacy.{name}"]), Subject(Settings(legacy=Legacy(timeout=5)), legacy=settings))
    assert (found.level, "nothing listens at" in found.text) == ("wrong", True)


@pytest.mark.parametrize("name", ["pop3", "sieve", "submission"])
def test_a_service_that_the_domain_has_not(name: str) -> None:
    assert list(run(matching([f"legacy.{name}"]), Subject(Settings(), legacy=legacy()))) == []


def test_a_server_that_says_nothing_of_what_it_can_do() -> None:
    with pytest.raises(LegacyUnavailable, match=r"does not say what it can do|does not speak IMAP"):
        surveyed({}, {"CAPABILITY": "TAG OK done"})
