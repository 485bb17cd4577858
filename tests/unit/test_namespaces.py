"""Whether moved mailboxes agree with the operator's namespaces; what is said was seen with Dovecot 2.3.19 and 2.4.1."""

from __future__ import annotations

import pytest

from bascule.namespaces import namespaces, objection

INBOX = "namespace inbox {\n  inbox = yes\n  mailbox Sent {\n    special_use = \\Sent\n  }\n  prefix = \n}\n"
COURIER = "namespace inbox {\n  inbox = yes\n  prefix = INBOX.\n  separator = .\n}\n"


def other(separator: str, prefix: str, listed: str = "yes") -> str:
    return f"namespace public {{\n  list = {listed}\n  prefix = {prefix}\n  separator = {separator}\n}}\n"


def test_namespaces_are_read() -> None:
    found = namespaces(f"listen = *\n{INBOX}passdb {{\n  driver = pam\n}}\n{other('.', 'Public.')}")
    assert [(each.name, each.prefix, each.separator, each.is_inbox, each.is_listed) for each in found] == [
        ("inbox", "", "/", True, True),
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
        (INBOX + other(".", "Public."), "/", "", "is listed with separator '.'"),
        (INBOX + other("", "Public/"), ".", "INBOX.", "is listed with separator '/'"),
        (INBOX + other(".", "Public.", "no"), "/", "", ""),
        (INBOX + other("/", "Public"), "/", "", "does not end in"),
        (COURIER + other(".", "INBOX."), ".", "INBOX.", "has the prefix"),
        (INBOX, ".", "INBOX", "does not end in its separator"),
        ("namespace {\n  inbox = yes\n}\n", "/", "", "is not named"),
        ("namespace mine {\n  inbox = yes\n}\n", "/", "", "is named mine"),
    ],
)
def test_what_dovecot_has_against_it(operators: str, separator: str, prefix: str, problem: str) -> None:
    found = objection(operators, separator, prefix, version="2.4.1")
    assert (found is None) == (not problem)
    assert found is None or (problem in found.problem and found.remedy)


@pytest.mark.parametrize(
    ("location", "separator"),
    [("maildir:/var/mail/public", "."), ("maildir:/var/mail/public:LAYOUT=fs", "/"), ("mdbox:/var/mail/public", "/")],
)
def test_a_separator_that_is_not_said_is_the_storages(location: str, separator: str) -> None:
    public = f"namespace public {{\n  location = {location}\n  prefix = Public{separator}\n}}\n"
    assert objection(INBOX + public, separator, "", version="2.4.1") is None
    assert objection(INBOX + public, "./".replace(separator, ""), "", version="2.4.1") is not None


def test_a_namespace_that_is_disabled_is_none() -> None:
    off = other(".", "Public.").replace("{\n", "{\n  disabled = yes\n")
    assert objection(INBOX + off, "/", "", version="2.4.1") is None


def test_dovecot_2_3_cannot_be_told_of_no_prefix() -> None:
    for separator in ("/", "."):
        found = objection(COURIER, separator, "", version="2.3.19.1")
        assert found is not None
        assert "the legacy server none" in found.problem
    assert objection(COURIER, "/", "mail/", version="2.3.19.1") is None
    assert objection(INBOX, "/", "", version="2.3.19.1") is None
