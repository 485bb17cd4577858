"""Whether the mailboxes that move agree with the namespaces that the operator's Dovecot has.

Dovecot wants one hierarchy separator for all namespaces with ``list = yes``, and
that their prefixes end in it (Dovecot 2.3 source, mail-namespace.c,
``namespaces_check``). A mailbox that has moved keeps the legacy server's
separator and prefix, in the namespace ``inbox``; the others stay the operator's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_BLOCK = re.compile(r"^\s*namespace(?:\s+(\S+))?\s*\{")
_SETTING = re.compile(r"^\s*(\w+)\s*=\s*(.*?)\s*$")


@dataclass(frozen=True, slots=True)
class Namespace:
    """A namespace of ``doveconf -n``."""

    name: str
    prefix: str
    #: Empty: the storage's own, which is "/" for what bascule stores.
    separator: str
    is_inbox: bool
    is_listed: bool


def namespaces(doveconf: str) -> list[Namespace]:
    """The namespaces in the output of ``doveconf -n``, 2.3's or 2.4's."""
    found: list[Namespace] = []
    name, depth = "", 0
    values: dict[str, str] = {}
    for line in doveconf.splitlines():
        if depth == 0:
            if block := _BLOCK.match(line):
                name, values, depth = block[1] or "", {}, 1
            continue
        stripped = line.strip()
        if stripped == "}":
            depth -= 1
            if depth == 0:
                found.append(
                    Namespace(
                        name,
                        _unquoted(values.get("prefix", "")),
                        _unquoted(values.get("separator", "")),
                        values.get("inbox", "no") == "yes",
                        values.get("list", "yes") in {"yes", "children"} and values.get("hidden", "no") == "no",
                    )
                )
        elif stripped.endswith("{"):
            depth += 1
        elif depth == 1 and (setting := _SETTING.match(line)):
            values[setting[1]] = setting[2]
    return found


def _unquoted(value: str) -> str:
    return value[1:-1] if len(value) > 1 and value[0] == value[-1] == '"' else value


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a mailbox that moves will have, or why it cannot have it."""

    separator: str
    prefix: str
    #: Why Dovecot would open no mailbox that moves, in words; empty: it will.
    problem: str = ""
    remedy: str = ""


def outcome(doveconf: str, separator: str, prefix: str, *, version: str) -> Outcome:
    """What the userdb will say, for a legacy server's separator and prefix, and whether Dovecot takes it.

    ``doveconf`` is the output of ``doveconf -n``, ``version`` Dovecot's, as ``2.3`` or ``2.4.1``.
    """
    had = namespaces(doveconf)
    inbox = next((each for each in had if each.is_inbox), None)
    if inbox is not None and inbox.name != "inbox":
        return Outcome(
            separator,
            prefix,
            f"the namespace that has INBOX is called {inbox.name or '(nothing)'!r}, not 'inbox'",
            "Write 'namespace inbox { ... }': only a namespace with a name can be set for a user.",
        )
    if inbox is not None and inbox.prefix and not prefix and version.startswith("2.3"):
        return Outcome(
            separator,
            prefix,
            f"the namespace 'inbox' has the prefix {inbox.prefix!r}, the legacy server none, and Dovecot 2.3 cannot be "
            "told of no prefix for one user",
            "Take the prefix away, if your own users can have that; or use Dovecot 2.4.",
        )
    others = [each for each in had if not each.is_inbox and each.is_listed]
    for other in others:
        theirs = other.separator or "/"
        if theirs != separator:
            return Outcome(
                separator,
                prefix,
                f"the namespace {other.name!r} has the separator {theirs!r}, the legacy server {separator!r}: "
                "all namespaces with list=yes must use the same",
                f"Give {other.name!r} separator = {separator} and a prefix that ends in it, or list = no.",
            )
        if other.prefix and not other.prefix.endswith(separator):
            return Outcome(
                separator,
                prefix,
                f"the prefix {other.prefix!r} of the namespace {other.name!r} does not end in {separator!r}",
                f"Give {other.name!r} a prefix that ends in {separator}, or list = no.",
            )
        if other.prefix == prefix:
            return Outcome(
                separator,
                prefix,
                f"the namespace {other.name!r} has the prefix {prefix!r} that the legacy server has for a user's own "
                "folders",
                f"Give {other.name!r} another prefix.",
            )
    if prefix and not prefix.endswith(separator):
        return Outcome(
            separator,
            prefix,
            f"the legacy server's prefix {prefix!r} does not end in its separator {separator!r}",
            "Dovecot knows no such namespace; folders would be named otherwise than the users' programs expect.",
        )
    return Outcome(separator, prefix)
