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
    #: As it is said, or else the storage's own.
    separator: str
    is_inbox: bool
    is_listed: bool

    def __str__(self) -> str:
        return f"the namespace {self.name or self.prefix or '(unnamed)'}"


def _separator_of(values: dict[str, str]) -> str:
    """Of a storage: Maildir++ has dots, all else slashes (the manual, "Mail Location")."""
    location = values.get("location") or values.get("mail_driver", "")
    return "." if location.startswith("maildir") and "LAYOUT=fs" not in location else "/"


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
            if depth == 0 and values.get("disabled", "no") == "no":
                found.append(
                    Namespace(
                        name,
                        _unquoted(values.get("prefix", "")),
                        _unquoted(values.get("separator", "")) or _separator_of(values),
                        values.get("inbox", "no") == "yes",
                        values.get("list", "yes") in {"yes", "children"},
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
class Objection:
    """Why Dovecot would open no mailbox that moves, or under other names, and what helps; in words."""

    problem: str
    remedy: str


def spaces(doveconf: str) -> tuple[Namespace | None, list[Namespace]]:
    """The namespace with the INBOX, and the others that are listed."""
    had = namespaces(doveconf)
    inbox = next((each for each in had if each.is_inbox), None)
    return inbox, [each for each in had if not each.is_inbox and each.is_listed]


def objection_to_name(inbox: Namespace | None) -> Objection | None:
    """Only a namespace with a name can be set for a user."""
    if inbox is None or inbox.name == "inbox":
        return None
    return Objection(
        f"the namespace with the INBOX is {f'named {inbox.name}' if inbox.name else 'not named'}: moved users' "
        "folders would get neither separator nor prefix of the legacy server",
        "Name it: namespace inbox { inbox = yes ... }.",
    )


def objection(doveconf: str, separator: str, prefix: str, *, version: str) -> Objection | None:
    """What Dovecot has against a legacy server's separator and prefix, which a mailbox that moves keeps; None: nothing.

    ``doveconf`` is the output of ``doveconf -n``, ``version`` Dovecot's, as ``2.3`` or ``2.4.1``.
    """
    inbox, others = spaces(doveconf)
    misnamed = objection_to_name(inbox)
    if misnamed is not None:
        return misnamed
    if inbox is not None and inbox.prefix and not prefix and version.startswith("2.3"):
        return Objection(
            f"the namespace 'inbox' has the prefix {inbox.prefix!r}, the legacy server none, and Dovecot 2.3 cannot be "
            "told of no prefix for one user",
            "Take the prefix out here (or give your own users theirs by the userdb field namespace/inbox/prefix); or "
            "use Dovecot 2.4.",
        )
    for other in others:
        if other.separator != separator:
            return Objection(
                f"{other} is listed with separator {other.separator!r}, and the legacy server has {separator!r}",
                f"Dovecot wants one separator for all that are listed: say separator = {separator} there and a prefix "
                "that ends in it, or list = no.",
            )
        if other.prefix and not other.prefix.endswith(separator):
            return Objection(
                f"the prefix {other.prefix!r} of {other} does not end in {separator!r}",
                f"Give it a prefix that ends in {separator}, or list = no.",
            )
        if other.prefix == prefix:
            return Objection(
                f"{other} has the prefix {prefix!r} that the legacy server has for a user's own folders",
                "Give it another prefix.",
            )
    if prefix and not prefix.endswith(separator):
        return Objection(
            f"the legacy server's prefix {prefix!r} does not end in its separator {separator!r}",
            "Dovecot knows no such namespace; folders would be named otherwise than the users' programs expect.",
        )
    return None
