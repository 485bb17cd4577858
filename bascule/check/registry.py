"""The list of checks: each is one function with a name that never changes, and says what it needs.

A check looks and changes nothing, but for the probe message, which it removes, and
the file of the legacy servers' authorities, which is bascule's own, and for which
Dovecot is reloaded.
What it finds is words for the operator; whoever asks (the command, a running
node, an Ansible role) decides what follows from them.
"""

from __future__ import annotations

import fnmatch
import subprocess
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from bascule.check.facts import NotReadable
from bascule.check.finding import Area, Finding, Said
from bascule.check.subject import Subject
from bascule.errors import BasculeError
from bascule.words import printable

#: What a check cannot do without. Postfix, Dovecot: the one of this host, readable; plugged: bascule is in it already;
#: domain: its legacy settings; user: an address and its legacy password; database: bascule's own.
Need = Literal["Postfix", "Dovecot", "plugged", "domain", "user", "database"]

Look = Callable[[Subject], Iterator[Said]]


@dataclass(frozen=True, slots=True)
class Check:
    """One thing to look at."""

    name: str
    area: Area
    needs: frozenset[Need]
    #: Checks that must have found nothing wrong: without what they look at, this one would only repeat it.
    after: tuple[str, ...]
    #: Whether what it finds wrong would lose or misdirect mail: a domain is not activated with it.
    stops: bool
    look: Look = field(repr=False)

    @property
    def summary(self) -> str:
        """What it looks at, in a line."""
        return (self.look.__doc__ or "").partition("\n")[0].rstrip(".")


#: All checks by name, in the order in which an operator would correct what they find.
CHECKS: dict[str, Check] = {}


def check(
    name: str, area: Area, *, needs: Iterable[Need] = (), after: Iterable[str] = (), stops: bool = False
) -> Callable[[Look], Look]:
    """Enter a function into the list; the first line of its docstring says what it looks at."""

    def enter(look: Look) -> Look:
        if name in CHECKS:
            raise ValueError(f"two checks are named {name}")
        CHECKS[name] = Check(name, area, frozenset(needs), tuple(after), stops, look)
        return look

    return enter


def matching(patterns: Iterable[str]) -> list[Check]:
    """The checks with one of the names; a name may have ``*`` in it.

    Raises:
        BasculeError: there is none of that name.
    """
    wanted: set[str] = set()
    for pattern in patterns:
        found = fnmatch.filter(CHECKS, pattern)
        if not found:
            raise BasculeError(f"there is no check {pattern}", hint="bascule check --list names them.")
        wanted.update(found)
    return [each for each in CHECKS.values() if each.name in wanted]


def run(checks: Iterable[Check], subject: Subject) -> Iterator[Finding]:
    """What each finds, as it comes: some take a while.

    What needs a domain, a user or the database that ``subject`` has not is left
    out. What cannot be looked at for another reason is said.
    """
    failed: set[str] = set()
    unread: dict[Need, str] = {}
    untried: list[str] = []
    for each in checks:
        if not subject.has(each.needs):
            continue
        if failed.intersection(each.after):
            untried.append(each.name)
            failed.add(each.name)
            continue
        reason = next((why for need in sorted(each.needs) if (why := _unreadable(subject, need, unread))), None)
        if reason is not None:
            continue
        for finding in _found(each, subject):
            if finding.level == "wrong":
                failed.add(each.name)
            yield finding
    for need, why in unread.items():
        if why:
            yield _unread(need, why)
    if untried:
        yield Finding(
            "note",
            "bascule",
            f"not tried, for what is wrong above: {', '.join(untried)}",
            "Correct it first.",
            "bascule.not-tried",
        )


def _unreadable(subject: Subject, need: Need, known: dict[Need, str]) -> str:
    """Why the Postfix or Dovecot of this host cannot be looked at; empty: it can."""
    if need not in known and need in {"Postfix", "Dovecot"}:
        try:
            _ = subject.postfix if need == "Postfix" else subject.dovecot
            known[need] = ""
        except BasculeError as error:
            known[need] = error.message
    return known.get(need, "")


def _unread(need: Need, why: str) -> Finding:
    if need == "Postfix":
        remedy = "Run the check on an MX, as root, to have it checked."
        return Finding("note", "Postfix", f"main.cf cannot be read here: {printable(why)}", remedy, "postfix.readable")
    remedy = "Run the check on a store, as root, to have it checked."
    text = f"Dovecot's configuration cannot be read here: {printable(why)}"
    return Finding("note", "Dovecot", text, remedy, "dovecot.readable")


def _found(each: Check, subject: Subject) -> Iterator[Finding]:
    """What one check says; trouble of its own is a finding, too, and holds up no other."""
    try:
        for said in each.look(subject):
            yield Finding(said.level, each.area, printable(said.text), printable(said.remedy), each.name)
    except NotReadable as error:
        yield Finding("note", each.area, printable(error.message), "Is it running? Run the check as root.", each.name)
    except BasculeError as error:
        yield Finding("wrong", each.area, printable(error.message), printable(error.hint), each.name)
    except (OSError, subprocess.SubprocessError) as error:
        words = getattr(error, "strerror", None) or error
        text = f"{each.summary}: this cannot be looked at: {printable(str(words))}"
        yield Finding("note", each.area, text, "Run the check as root.", each.name)
