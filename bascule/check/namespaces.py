"""Whether Dovecot would open a mailbox with the legacy server's separator and prefix beside the operator's namespaces.

A mailbox that has moved keeps the legacy server's separator and prefix, in the
namespace ``inbox``, by userdb fields; the others stay the operator's. Dovecot
opens no mailbox of a user whose namespaces do not agree (its source,
mail-namespace.c, ``namespaces_check``): those with ``list = yes`` or
``children`` have one separator, and prefixes that end in it and do not begin
with it; no two have the same prefix, listed or not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bascule.check.facts import Block, DovecotFacts


@dataclass(frozen=True, slots=True)
class Namespace:
    """A namespace of Dovecot's configuration."""

    name: str
    prefix: str
    separator: str
    is_inbox: bool
    #: Whether its separator and prefix must agree with the others'.
    is_listed: bool

    def __str__(self) -> str:
        """As an operator finds it."""
        return f"the namespace {self.name or self.prefix or '(unnamed)'}"


@dataclass(frozen=True, slots=True)
class Problem:
    """Why Dovecot would open no mailbox that moves, and what to do about it."""

    text: str
    remedy: str


def namespaces(facts: DovecotFacts) -> list[Namespace]:
    """The namespaces that this Dovecot has."""
    return [
        Namespace(
            block.name,
            _unquoted(block.get("prefix")),
            _separator(block),
            block.get("inbox") == "yes",
            block.get("list", "yes") in {"yes", "children"},
        )
        for block in facts.blocks("namespace")
        if block.get("disabled") != "yes"
    ]


def _separator(block: Block) -> str:
    """What it says, or that of the storage: bascule's layout, which one without a location has too, is the file
    system's."""
    if said := _unquoted(block.get("separator")):
        return said
    location = block.get("location") or block.get("mail_driver")
    return "." if location.startswith("maildir") and "LAYOUT=fs" not in location else "/"


def _unquoted(value: str) -> str:
    return value[1:-1] if len(value) > 1 and value[0] == value[-1] == '"' else value


def inbox_problem(facts: DovecotFacts) -> Problem | None:
    """Why no user's separator and prefix could be set here, whatever the legacy server has."""
    inbox = next((each for each in namespaces(facts) if each.is_inbox), None)
    if inbox is None or inbox.name == "inbox":
        return None
    return Problem(
        f"the namespace with the INBOX is {f'named {inbox.name}' if inbox.name else 'not named'}: moved users' folders "
        "would get neither separator nor prefix of the legacy server",
        "Name it: namespace inbox { inbox = yes ... }.",
    )


def problems(facts: DovecotFacts, separator: str, prefix: str) -> Iterator[Problem]:
    """What of this configuration does not go with the separator and prefix of a legacy server."""
    had = namespaces(facts)
    own_prefix = next((each.prefix for each in had if each.is_inbox), "")
    if own_prefix and not prefix and facts.version.startswith("2.3"):
        yield Problem(
            f"the prefix of the INBOX's namespace here is {own_prefix!r}, the legacy server has none, and Dovecot 2.3 "
            "cannot be told of no prefix for one user: nobody can be moved",
            "Take the prefix out here (or give your own users theirs by userdb fields namespace/inbox/prefix and "
            ".../separator); or use Dovecot 2.4.",
        )
    if prefix and (not prefix.endswith(separator) or prefix.startswith(separator)):
        yield Problem(
            f"the legacy server's prefix {prefix!r} does not end in its separator {separator!r}, or begins with it: "
            "Dovecot takes no such namespace, and nobody can be moved",
            "Have the legacy server say another prefix (RFC 2342): users' programs would find their folders under "
            "other names here.",
        )
    for other in (each for each in had if not each.is_inbox):
        if other.prefix == prefix:
            yield Problem(
                f"{other} has the prefix {prefix!r}, which a user's own folders have at the legacy server: nobody can "
                "be moved",
                "Give it another prefix: no two may be the same.",
            )
        elif other.is_listed and other.separator != separator:
            yield Problem(
                f"{other} is listed with separator {other.separator!r}, and the legacy server has {separator!r}: "
                "nobody can be moved",
                f"Dovecot wants one separator for all that are listed: say separator = {separator} there, and a prefix "
                "that ends in it; or list = no.",
            )
        elif (
            other.is_listed
            and other.prefix
            and (not other.prefix.endswith(separator) or other.prefix.startswith(separator))
        ):
            yield Problem(
                f"{other} is listed with the prefix {other.prefix!r}, which does not end in its separator "
                f"{separator!r}, or begins with it: nobody can be moved",
                f"Give it a prefix that ends in {separator}, or say list = no there.",
            )
