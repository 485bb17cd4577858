"""What is known of legacy servers beyond what they say: recognised by greeting, ID or capabilities.

Everything here was reported of such servers in public. A profile only adds
care: a server that is none of these is asked as the standard says, and what it
refuses is done without.
"""

from __future__ import annotations

import re
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from bascule.imap.responses import backoff

#: With these words, and no response code, servers say "not now": at any command ...
_THROTTLED = re.compile(
    r"throttl|backoff time|server (?:is )?(?:too )?busy|rate limit|bandwidth limit|command or bandwidth"
    r"|too many (?:requests|commands|simultaneous|concurrent)|account is temporarily",
    re.IGNORECASE,
)
#: ... and these at a login.
_LIMITED = re.compile(
    r"too many|maximum|exceed|limit|simultaneous|concurrent|sessions?\b|connections?\b"
    r"|temporar|try (?:it )?again|later|in a (?:while|moment|minute)|not now|unavailable|overload|busy"
    r"|time(?:d)? ?out|connect|internal|server error|backend|maintenance|locked",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Throttled:
    """For how many seconds a server wants to be left alone; 0 where it does not say."""

    wait: float = 0


def throttled(words: str) -> Throttled | None:
    """Whether the words of a NO, BAD or BYE mean that it was too much, whatever was asked for."""
    return Throttled(backoff(words) or 0) if _THROTTLED.search(words) else None


def is_limit(words: str) -> bool:
    """Whether the words of a refused login speak of anything but name and password."""
    return _THROTTLED.search(words) is not None or _LIMITED.search(words) is not None


@dataclass(frozen=True, slots=True)
class Profile:
    """A kind of server.

    ``select_only``: UIDs and UIDVALIDITY are given for good at SELECT, not at EXAMINE or STATUS.
    ``no_qresync``: QRESYNC is offered and cannot be used when one folder is opened after another.
    ``newest``: a folder shows that many of its newest messages only, or 0 for all.
    ``note``: for an operator, what to know before anybody moves.
    """

    name: str
    greeting: str = ""
    identity: str = ""
    capabilities: frozenset[str] = frozenset()
    select_only: bool = False
    no_qresync: bool = False
    newest: int = 0
    note: str = ""


#: The first that fits counts: by a pattern in the greeting, by one in the ID response, or by all its capabilities.
PROFILES = (
    Profile("Courier", r"courier-imap", r"courier", frozenset({"ACL2=UNION"}), select_only=True),
    Profile("Zimbra", r"zimbra", r"zimbra", no_qresync=True, note="Shared folders are mounted among the user's own."),
    Profile(
        "Exchange",
        r"microsoft exchange",
        r"microsoft",
        note="It throttles: a mailbox may need several attempts. Calendars and contacts are not in its IMAP.",
    ),
    Profile(
        "Gmail",
        r"gimap ready",
        r"gimap",
        frozenset({"X-GM-EXT-1"}),
        note="Labels are folders: a message with several comes several times. 2.5 GB a day, 15 sessions.",
    ),
    Profile(
        "Yahoo",
        r"yahoo|\bimapgate\b",
        r"yahoo|aol",
        newest=10_000,
        note="A folder shows its newest 10,000 messages only, but at export.imap.mail.yahoo.com.",
    ),
    Profile("Domino", r"domino imap4", r"domino"),
    Profile("GroupWise", r"groupwise", r"groupwise"),
    Profile("Cyrus", r"cyrus", r"cyrus"),
    Profile("Dovecot", r"dovecot", r"dovecot"),
)
UNKNOWN = Profile("")


def recognise(greeting: str, capabilities: AbstractSet[str] = frozenset(), identity: str = "") -> Profile:
    """The profile of a server, or :data:`UNKNOWN`; ``identity`` is its answer to ID (RFC 2971)."""
    for profile in PROFILES:
        if profile.greeting and re.search(profile.greeting, greeting, re.IGNORECASE):
            return profile
        if profile.identity and re.search(profile.identity, identity, re.IGNORECASE):
            return profile
        if profile.capabilities and profile.capabilities <= capabilities:
            return profile
    return UNKNOWN
