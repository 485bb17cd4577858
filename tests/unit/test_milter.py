"""Stamps, and the loop guard's decision."""

from __future__ import annotations

import time
from collections.abc import Sequence

import Milter
import pytest

from bascule.milter.guard import PLACES, STAMP, TRACE, Door, Guard, Stamp, stamps, traces
from bascule.milter.routes import Route, Routes

KEY = b"k" * 32
HERE = Door("mx.test", "25")


def stamp(*recipients: str, key: bytes = KEY, door: Door = HERE) -> tuple[str, str]:
    return STAMP, next(stamps(key, door, recipients))


class Told(Routes):
    """The policy daemon: what it says of each recipient, by the local part; and what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def accepted(self, recipients: Sequence[str]) -> None:
        self.told += recipients

    def of(self, recipients: Sequence[str]) -> list[Route]:
        known: dict[str, Route] = {"moved": "local", "moving": "held", "foreign": None, "doubtful": "unknown"}
        return [known.get(each.lower().partition("@")[0], "legacy") for each in recipients]


class Recorded(Guard):
    """A guard outside of libmilter: what it would do to the message is recorded."""

    node = "mx.test"
    key = KEY

    def __init__(self) -> None:
        super().__init__()
        self.routes: Told = Told()  # one for each, to see what it was told
        self._protocol = 0  # what libmilter negotiates
        self.added: list[tuple[str, str]] = []
        self.replied: tuple[str, ...] = ()
        self.verdict = -1

    def addheader(self, name: str, value: str, _: int = -1) -> None:
        self.added.append((name, value))

    def setreply(self, *reply: str) -> None:
        self.replied = reply

    def getsymval(self, name: str) -> str:
        return self.port if name == "{daemon_port}" else "QUEUEID"

    port = "25"


def pass_through(
    recipients: list[str], headers: list[tuple[str, str]], *, client: str = "192.0.2.7", port: str = "25"
) -> Recorded:
    guard = Recorded()
    guard.port = port
    guard.connect("client.test", 2, (client, 4711))
    guard.envfrom("<s@elsewhere.test>")
    for each in recipients:
        guard.envrcpt(each)
    for name, value in headers:
        guard.header(name, value)
    guard.verdict = guard.eoh()
    if guard.verdict == Milter.CONTINUE:
        guard.eom()
    return guard


def test_a_stamp_names_nobody() -> None:
    added = pass_through(["<alice@lab.test>", "<bob@lab.test>"], []).added
    assert [name for name, _ in added] == [STAMP, TRACE]
    assert not any("alice" in value for _, value in added)


@pytest.mark.parametrize("count", [1, 2, 7, PLACES])
def test_a_stamp_does_not_say_how_many(count: int) -> None:
    """Nor, from one message to the next, who: a Bcc is nobody else's business (RFC 5321 section 7.2)."""
    recipients = [f"<user{number}@lab.test>" for number in range(count)]
    first, second = (pass_through(recipients, []).added[0][1] for _ in range(2))
    assert len(first) == len(second) == len(pass_through(["<x@lab.test>"], []).added[0][1])
    assert not set(first.split()[1:]) & set(second.split()[1:])
    places = [list(Stamp.parse(value).tags) for value in (first, second) if Stamp.parse(value)]  # type: ignore[union-attr]
    assert [len(each) for each in places] == [PLACES, PLACES]


def test_a_message_that_comes_back_for_the_same_recipient_is_refused() -> None:
    name, value = pass_through(["<alice@lab.test>"], []).added[0]
    folded = value.replace(" ", "\r\n\t", 3)
    back = pass_through(["<Alice@LAB.test>"], [("Subject", "x"), (name.upper(), folded)])
    assert back.verdict == Milter.REJECT
    assert back.replied[:2] == ("554", "5.4.6")
    assert back.added == []


def test_forged_stamps_do_not_keep_the_guard_busy() -> None:
    """1,000 recipients and 1,800 stamps are one message of Postfix's limits; the last stamp is ours."""
    forged = [(STAMP, f"mx.test/25 {number:032x}") for number in range(1800)]
    began = time.process_time()
    same = pass_through(["<alice@lab.test>"] * 1000, [*forged, stamp("alice@lab.test")])
    many = pass_through([f"<user{number}@lab.test>" for number in range(1000)], [*forged, stamp("user7@lab.test")])
    assert time.process_time() - began < 4
    assert same.verdict == many.verdict == Milter.REJECT


def test_a_message_forwarded_to_somebody_else_goes_on() -> None:
    onward = pass_through(["<bob@lab.test>"], [stamp("alice@lab.test")])
    assert onward.verdict == Milter.CONTINUE
    assert onward.added


def test_a_stamp_of_another_key_means_nothing() -> None:
    foreign = stamp("alice@lab.test", key=b"x" * 32)
    assert pass_through(["<alice@lab.test>"], [foreign]).verdict == Milter.CONTINUE


def test_one_connection_carries_many_messages() -> None:
    guard = Recorded()
    for _ in range(2):
        guard.envfrom("<>")
        guard.envrcpt("<alice@lab.test>")
        guard.eoh()
        guard.eom()
    found = [Stamp.parse(value) for name, value in guard.added if name == STAMP]
    assert [each is not None and each.is_for(KEY, "alice@lab.test") for each in found] == [True, True]


@pytest.mark.parametrize(
    ("recipient", "verdict"),
    [
        ("alice@lab.test", Milter.REJECT),
        ("moved@lab.test", Milter.CONTINUE),  # it was relayed before the flip, and ends here
        ("moving@lab.test", Milter.TEMPFAIL),
        ("doubtful@lab.test", Milter.TEMPFAIL),
        ("foreign@elsewhere.test", Milter.CONTINUE),
    ],
)
def test_only_what_would_circle_is_refused(recipient: str, verdict: int) -> None:
    assert pass_through([recipient], [stamp(recipient)]).verdict == verdict


@pytest.mark.parametrize("recipient", ["alice@lab.test", "moving@lab.test", "doubtful@lab.test"])
@pytest.mark.parametrize("client", ["127.0.0.1", "::1", "10.1.2.3"])
def test_the_second_pass_of_a_filter_is_no_loop(recipient: str, client: str) -> None:
    """It gives the message back by another port; there it is stamped, and not traced or counted a second time."""
    first = pass_through([recipient], [])
    second = pass_through([recipient], first.added, client=client, port="10025")
    assert second.verdict == Milter.CONTINUE
    assert [name for name, _ in second.added] == [STAMP]
    assert second.routes.told == []
    # Through the legacy server it comes to a port where it was already.
    for port in ("25", "10025"):
        assert (
            pass_through([recipient], first.added + second.added, client=client, port=port).verdict != Milter.CONTINUE
        )


def test_a_message_from_outside_or_another_host_has_no_second_pass() -> None:
    there = stamp("alice@lab.test", door=Door("mx2.test", "25"))
    assert pass_through(["alice@lab.test"], [there], client="127.0.0.1", port="10025").verdict == Milter.REJECT
    here = stamp("alice@lab.test")
    assert pass_through(["alice@lab.test"], [here], client="192.0.2.7", port="10025").verdict == Milter.REJECT
    assert pass_through(["alice@lab.test"], [here], client="", port="10025").verdict == Milter.REJECT


def test_what_was_accepted_for_the_legacy_server_is_told() -> None:
    recipients = ["alice@lab.test", "moved@lab.test", "foreign@elsewhere.test"]
    assert pass_through(recipients, []).routes.told == ["alice@lab.test"]


@pytest.mark.parametrize("value", ["", "x", "mx.test/25", "mx.test/25 short", f"nodoor {'a' * 32}", "a" * 24])
def test_what_is_no_stamp_is_none(value: str) -> None:
    assert Stamp.parse(value) is None
    assert pass_through(["alice@lab.test"], [(STAMP, value)]).verdict == Milter.CONTINUE


def test_mail_to_others_is_left_alone() -> None:
    assert pass_through(["<foreign@elsewhere.test>"], []).added == []


def test_without_the_policy_daemon_everybody_is_stamped() -> None:
    assert [name for name, _ in pass_through(["<doubtful@lab.test>"], []).added] == [STAMP]


def test_a_trace_names_routes_and_domains() -> None:
    recipients = ["moved@lab.test", "alice@Lab.test", "bob@lab.test", "x@other.test", "foreign@elsewhere.test"]
    routes: list[Route] = ["local", "legacy", "legacy", "held", None]
    assert traces("mx.test", recipients, routes) == [
        "by mx.test; domain=lab.test; route=legacy,local",
        "by mx.test; domain=other.test; route=held",
    ]


def test_routes_are_unknown_when_nobody_answers() -> None:
    assert Routes("unix:/nonexistent/socket").of(["a@lab.test", "b@lab.test"]) == ["unknown", "unknown"]


@pytest.mark.parametrize("count", [0, 1, PLACES, PLACES + 1, 1000])
def test_lines_are_short_enough_and_nobody_is_left_out(count: int) -> None:
    recipients = [f"user{number}@lab.test" for number in range(count)]
    lines = list(stamps(KEY, Door("mx." + "x" * 60 + ".example.org", "25"), recipients))
    assert all(len(STAMP) + 2 + len(line) < 998 for line in lines)
    read = [each for each in map(Stamp.parse, lines) if each is not None]
    assert len(read) == len(lines) == -(-count // PLACES)
    assert all(any(each.is_for(KEY, recipient) for each in read) for recipient in recipients)
    assert not any(each.is_for(KEY, "other@lab.test") for each in read)
