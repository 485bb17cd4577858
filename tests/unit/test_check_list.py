"""The list of checks: names, needs, order, and the page that names them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from bascule.check import CHECKS, Check, Finding, Subject, matching, of_host, run, stopping
from bascule.check.facts import NotReadable
from bascule.check.finding import Said, good, note, wrong
from bascule.check.registry import check
from bascule.cli import main
from bascule.errors import BasculeError
from bascule.settings import Settings

PAGE = Path(__file__).parents[2] / "docs" / "operating.md"
TABLE = re.compile(r"(<!-- checks: [^\n]*-->\n)(.*?)(<!-- /checks -->)", re.DOTALL)


def test_the_page_names_every_check() -> None:
    """After a change: BASCULE_WRITE_DOCS=1 pytest tests/unit/test_check_list.py."""
    rows = [
        f"| `{each.name}` | {each.summary[0].lower() + each.summary[1:]}{'. *Stops*' if each.stops else ''} |\n"
        for each in CHECKS.values()
    ]
    page = PAGE.read_text()
    # A table ends where a line does not begin with a bar, so that the marks stand before and after it.
    now = TABLE.sub(lambda found: f"{found[1]}\n| check | it looks at |\n|---|---|\n{''.join(rows)}\n{found[3]}", page)
    if os.environ.get("BASCULE_WRITE_DOCS"):
        PAGE.write_text(now)
    assert now == page


@pytest.mark.parametrize("each", CHECKS.values(), ids=lambda each: each.name)
def test_each_has_a_name_that_can_be_typed_and_a_summary(each: Check) -> None:
    assert re.fullmatch(r"[a-z0-9]+(\.[a-z0-9-]+)+", each.name)
    assert 20 < len(each.summary) < 120
    assert not each.summary.endswith(".")


def test_a_check_comes_after_those_on_which_it_depends() -> None:
    names = list(CHECKS)
    assert names[0] == "legacy.imap.reach"  # without which nothing else is of use
    for each in CHECKS.values():
        for former in each.after:
            assert names.index(former) < names.index(each.name), (former, each.name)


def test_what_stops_an_activation() -> None:
    assert {each.name for each in stopping()} == {
        "dns.legacy-host", "postfix.domain-class", "postfix.rewritten", "dovecot.userdb", "dovecot.username-format",
        "bascule.findings", "dovecot.authorities",
    }  # fmt: skip


def test_the_checks_of_a_host_need_neither_domain_nor_database() -> None:
    for each in of_host():
        assert not each.needs & {"domain", "user", "database", "plugged"}
    assert {"postfix.relay-recipient-maps", "dovecot.conf-d", "dovecot.ssl-ca"} <= {each.name for each in of_host()}


def test_two_checks_cannot_have_one_name() -> None:
    with pytest.raises(ValueError, match="two checks are named"):
        check("postfix.wired", "Postfix")(lambda _: iter(()))


def test_names_may_be_patterns() -> None:
    assert [each.name for each in matching(["legacy.smtp.*", "dns.mx"])][:2] == [
        "legacy.smtp.reach",
        "legacy.smtp.null-sender",
    ]
    with pytest.raises(BasculeError, match=r"there is no check dns\.typo"):
        matching(["dns.mx", "dns.typo"])


def made(name: str, *said: Said, after: tuple[str, ...] = (), error: Exception | None = None) -> Check:
    def look(_: Subject) -> Iterator[Said]:
        """Whether it works."""
        yield from said
        if error is not None:
            raise error

    return Check(name, "bascule", frozenset(), after, False, look)


def ran(*checks: Check) -> list[tuple[str, str, str]]:
    return [(each.name, each.level, each.text) for each in run(checks, Subject(Settings()))]


def test_what_depends_on_something_wrong_is_not_tried_and_said() -> None:
    assert ran(
        made("a.a", wrong("bad", "mend it")),
        made("b.b", good("not seen"), after=("a.a",)),
        made("c.c", good("not seen"), after=("b.b",)),
        made("d.d", good("seen")),
    ) == [
        ("a.a", "wrong", "bad"),
        ("d.d", "good", "seen"),
        ("bascule.not-tried", "note", "not tried, for what is wrong above: b.b, c.c"),
    ]


def test_a_note_holds_nothing_up() -> None:
    assert [name for name, *_ in ran(made("a.a", note("hm")), made("b.b", good("x"), after=("a.a",)))] == ["a.a", "b.b"]


@pytest.mark.parametrize(
    ("error", "level", "words"),
    [
        (BasculeError("it broke", hint="mend it"), "wrong", "it broke"),
        (NotReadable("it is not here"), "note", "it is not here"),
        (
            PermissionError(13, "Permission denied"),
            "note",
            "Whether it works: this cannot be looked at: Permission denied",
        ),
    ],
)
def test_trouble_of_one_check_holds_up_no_other(error: Exception, level: str, words: str) -> None:
    assert ran(made("a.a", good("first"), error=error), made("b.b", good("x"))) == [
        ("a.a", "good", "first"),
        ("a.a", level, words),
        ("b.b", "good", "x"),
    ]


def test_a_mistake_of_ours_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        ran(made("a.a", error=ZeroDivisionError()))


def command(*arguments: str, stdin: str = "") -> tuple[int, str]:
    done = CliRunner().invoke(main, arguments, input=stdin)
    return done.exit_code, done.output


def test_the_command_lists_them() -> None:
    status, said = command("check", "--list")
    assert status == 0
    assert "postfix.domain-class\n    Whether the domain is one of Postfix's own" in said
    assert "activate refuses" in said
    rows = json.loads(command("check", "--list", "--json")[1])
    assert [row["name"] for row in rows] == list(CHECKS)


FACTS = {
    "postconf -x": "compatibility_level = 3.6\nqueue_directory = /var/spool/postfix\nrelay_recipient_maps = hash:/x\n",
    "postconf -n": "relay_recipient_maps = hash:/x\n",
    "postconf -M": "smtp       inet  n       -       y       -       -       smtpd\n",
    "postconf -P": "",
}


def test_facts_of_another_host(tmp_path: Path) -> None:
    """An Ansible role hands over what the commands printed there; nothing is run, nor read, here."""
    facts = tmp_path / "facts.json"
    facts.write_text(json.dumps(FACTS))
    status, said = command("check", "--host", "--facts", str(facts), "--json")
    found = [Finding(**each) for each in json.loads(said)]
    assert status == 1
    assert [each.name for each in found if each.level == "wrong"] == ["postfix.relay-recipient-maps"]
    assert {each.name: each.level for each in found}["dovecot.readable"] == "note"
    assert {each.name: each.level for each in found}["postfix.chroot"] == "good"


@pytest.mark.parametrize("facts", ["no JSON", "[]", '{"postconf -n": 1}'])
def test_facts_that_are_none(facts: str) -> None:
    status, said = command("check", "--host", "--facts", "-", stdin=facts)
    assert (status, "the facts are not" in said) == (1, True)


def test_only_some() -> None:
    status, said = command("check", "--host", "--facts", "-", "--only", "postfix.r*", stdin=json.dumps(FACTS))
    assert status == 1
    assert "postfix.relay-recipient-maps" in said
    assert "postfix.chroot" not in said
