"""Stamps, and the loop guard's decision."""

from __future__ import annotations

from collections.abc import Sequence

import Milter
import pytest

from bascule.milter.guard import STAMP, TRACE, Guard, stamps, tag, traces
from bascule.milter.routes import Route, Routes

KEY = b"k" * 32


class Told(Routes):
    """The policy daemon: what it says of each recipient, by what is before the first hyphen."""

    def __init__(self) -> None:
        pass

    def of(self, recipients: Sequence[str]) -> list[Route]:
        known: dict[str, Route] = {"moved": "local", "moving": "held", "foreign": None, "doubtful": "unknown"}
        return [known.get(each.lower().partition("@")[0], "legacy") for each in recipients]


class Recorded(Guard):
    """A guard outside of libmilter: what it would do to the message is recorded."""

    node = "mx.test"
    key = KEY
    routes = Told()

    def __init__(self) -> None:
        super().__init__()
        self._protocol = 0  # what libmilter negotiates
        self.added: list[tuple[str, str]] = []
        self.replied: tuple[str, ...] = ()
        self.verdict = -1

    def addheader(self, name: str, value: str, _: int = -1) -> None:
        self.added.append((name, value))

    def setreply(self, *reply: str) -> None:
        self.replied = reply

    def getsymval(self, _: str) -> str:
        return "QUEUEID"


def pass_through(recipients: list[str], headers: list[tuple[str, str]]) -> Recorded:
    guard = Recorded()
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
    assert len(added[0][1].split()) == 2


def test_a_message_that_comes_back_for_the_same_recipient_is_refused() -> None:
    stamp = pass_through(["<alice@lab.test>"], []).added[0]
    back = pass_through(["<Alice@LAB.test>"], [("Subject", "x"), stamp])
    assert back.verdict == Milter.REJECT
    assert back.replied[:2] == ("554", "5.4.6")
    assert back.added == []


def test_a_message_forwarded_to_somebody_else_goes_on() -> None:
    stamp = pass_through(["<alice@lab.test>"], []).added[0]
    onward = pass_through(["<bob@lab.test>"], [stamp])
    assert onward.verdict == Milter.CONTINUE
    assert onward.added


def test_a_stamp_of_another_key_means_nothing() -> None:
    foreign = (STAMP, tag(b"x" * 32, "alice@lab.test"))
    assert pass_through(["<alice@lab.test>"], [foreign]).verdict == Milter.CONTINUE


def test_one_connection_carries_many_messages() -> None:
    guard = Recorded()
    for _ in range(2):
        guard.envfrom("<>")
        guard.envrcpt("<alice@lab.test>")
        guard.eoh()
        guard.eom()
    assert [len(value.split()) for name, value in guard.added if name == STAMP] == [1, 1]


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
    stamp = (STAMP, tag(KEY, recipient))
    assert pass_through([recipient], [stamp]).verdict == verdict


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


@pytest.mark.parametrize("count", [0, 1, 35, 36, 37, 1000])
def test_lines_are_short_enough(count: int) -> None:
    tags = [tag(KEY, f"user{number}@lab.test") for number in range(count)]
    lines = stamps(tags)
    assert " ".join(lines).split() == tags
    assert all(len(STAMP) + 2 + len(line) < 998 for line in lines)
