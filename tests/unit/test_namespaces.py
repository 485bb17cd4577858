"""Whether moved mailboxes agree with the operator's namespaces; what is said was seen with Dovecot 2.3.19 and 2.4.1."""

from __future__ import annotations

import pytest

from bascule.namespaces import namespaces, outcome

INBOX = "namespace inbox {\n  inbox = yes\n  mailbox Sent {\n    special_use = \\Sent\n  }\n  prefix = \n}\n"
COURIER = "namespace inbox {\n  inbox = yes\n  prefix = INBOX.\n  separator = .\n}\n"


def other(separator: str, prefix: str, listed: str = "yes") -> str:
    return f"namespace public {{\n  list = {listed}\n  prefix = {prefix}\n  separator = {separator}\n}}\n"


def test_namespaces_are_read() -> None:
    found = namespaces(f"listen = *\n{INBOX}passdb {{\n  driver = pam\n}}\n{other('.', 'Public.')}")
    assert [(each.name, each.prefix, each.separator, each.is_inbox, each.is_listed) for each in found] == [
        ("inbox", "", "", True, True),
        ("public", "Public.", ".", False, True),
    ]


@pytest.mark.parametrize(
    ("operators", "separator", "prefix", "problem"),
    [
        ("", "/", "", ""),
        (INBOX, "/", "", ""),
        (INBOX, ".", "INBOX.", ""),
        (COURIER, "/", "", ""),
        (INBOX + other("/", "Public/"), "/", "", ""),
        (INBOX + other("", "Public/"), "/", "", ""),
        (INBOX + other(".", "Public."), "/", "", "must use the same"),
        (INBOX + other("", "Public/"), ".", "INBOX.", "must use the same"),
        (INBOX + other(".", "Public.", "no"), "/", "", ""),
        (INBOX + other("/", "Public"), "/", "", "does not end in"),
        (COURIER + other(".", "INBOX."), ".", "INBOX.", "has the prefix"),
        (INBOX, ".", "INBOX", "does not end in its separator"),
        ("namespace {\n  inbox = yes\n}\n", "/", "", "is called"),
        ("namespace mine {\n  inbox = yes\n}\n", "/", "", "is called"),
    ],
)
def test_what_will_be(operators: str, separator: str, prefix: str, problem: str) -> None:
    found = outcome(operators, separator, prefix, version="2.4.1")
    assert (found.separator, found.prefix) == (separator, prefix)
    assert problem in found.problem
    assert bool(found.remedy) == bool(problem) == bool(found.problem)


def test_dovecot_2_3_cannot_be_told_of_no_prefix() -> None:
    assert "the legacy server none" in outcome(COURIER, "/", "", version="2.3.19.1").problem
    assert outcome(COURIER, "/", "mail/", version="2.3.19.1").problem == ""
    assert outcome(INBOX, "/", "", version="2.3.19.1").problem == ""
