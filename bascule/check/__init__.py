"""``bascule check``: a list of named checks, each tried for real and told in plain words.

The command, ``bascule activate``, the running nodes and the Ansible roles use
the same list. A check is one function, entered by :func:`registry.check`.
"""

from __future__ import annotations

from bascule.check import dns, dovecot, imap, logins, mail, parts, postfix, smtp
from bascule.check.finding import Finding
from bascule.check.registry import CHECKS, Check, matching, run
from bascule.check.subject import Subject, User

__all__ = [
    "CHECKS", "Check", "Finding", "Subject", "User", "dns", "dovecot", "imap", "logins", "mail", "matching", "of_host",
    "parts", "postfix", "run", "smtp", "stopping",
]  # fmt: skip

#: Whose checks come first: what an operator corrects first.
_ORDER = [module.__name__ for module in (imap, smtp, dns, parts, postfix, dovecot, mail, logins)]
_in_order = sorted(CHECKS.values(), key=lambda each: _ORDER.index(each.look.__module__))
CHECKS.clear()
CHECKS.update((each.name, each) for each in _in_order)


def of_host() -> list[Check]:
    """The checks that need no domain: before bascule is plugged in, too."""
    return [each for each in CHECKS.values() if each.needs <= {"Postfix", "Dovecot"}]


def stopping() -> list[Check]:
    """Those with which a domain is not activated if they find anything wrong."""
    return [each for each in CHECKS.values() if each.stops]
