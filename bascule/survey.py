"""What is known of mailboxes before anybody moves: how large they are, and what will not come along or look different.

Each is looked at by the checks of ``bascule check`` that speak of one mailbox,
and these by the reader that copies mailboxes: nothing is copied or changed.
What is found is kept, in the view ``surveys``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass

from bascule import check
from bascule.address import Address
from bascule.check import Finding, Subject, User
from bascule.check.facts import Here, Once
from bascule.database import Connection, value
from bascule.legacy import LegacySettings
from bascule.settings import Settings

#: The checks that speak of one mailbox.
CHECKS = (
    "legacy.imap.login",
    "legacy.imap.quota",
    "legacy.imap.permissions",
    "legacy.imap.folders",
    "legacy.imap.folder-rules",
    "legacy.imap.folder-names",
    "legacy.imap.messages",
    "legacy.imap.keywords",
    "legacy.imap.shared",
    "legacy.imap.newest-only",
    "bascule.unreadable",
    "dovecot.namespaces",
    "dovecot.quota",
    "dovecot.message-size",
)
#: Said of the host, not of a mailbox.
_OF_THE_HOST = {"bascule.not-tried", "postfix.readable", "dovecot.readable"}


@dataclass(frozen=True, slots=True)
class Surveyed:
    """One mailbox. Sizes are in bytes, of what was seen; all are 0 if the mailbox was not seen.

    ``findings`` are those that are not good.
    """

    address: Address
    messages: int
    folders: int
    bytes: int
    largest: int
    findings: tuple[Finding, ...]

    @property
    def level(self) -> str:
        """good: it comes along as it is; note: with differences; wrong: not as it is."""
        levels = {each.level for each in self.findings}
        return "wrong" if "wrong" in levels else "note" if "note" in levels else "good"


class Surveyor:
    """Looks at the mailboxes of one domain; ``legacy_only``: not at what Dovecot here makes of them."""

    def __init__(
        self, settings: Settings, legacy: LegacySettings, connection: Connection, *, legacy_only: bool = False
    ) -> None:
        self._settings = settings
        self._legacy = legacy
        self._connection = connection
        self._legacy_only = legacy_only
        self._commands = Once(Here(settings.postfix.config_directory, settings.dovecot.config_file))

    def survey(self, user: User) -> Surveyed:
        """Look at one mailbox, and keep what was found."""
        subject = Subject(
            self._settings,
            legacy=self._legacy,
            user=user,
            connection=self._connection,
            commands=self._commands,
            legacy_only=self._legacy_only,
            named=sys.maxsize,
        )
        wanted = [
            each for each in check.matching(CHECKS) if not (self._legacy_only and each.name.startswith("dovecot."))
        ]
        said = list(check.run(wanted, subject))
        is_seen = not any(each.name == "legacy.imap.login" and each.level == "wrong" for each in said)
        seen = subject.survey if is_seen else None
        surveyed = Surveyed(
            user.address,
            messages=sum(seen.messages.values()) if seen else 0,
            folders=len(seen.folders) if seen else 0,
            bytes=seen.size if seen else 0,
            largest=seen.largest if seen else 0,
            findings=tuple(each for each in said if each.level != "good" and each.name not in _OF_THE_HOST),
        )
        self._keep(surveyed)
        return surveyed

    def survey_all(self, users: Sequence[User], *, at_once: int) -> Iterator[Surveyed]:
        """Each as it is done, ``at_once`` at a time."""
        with ThreadPoolExecutor(at_once, thread_name_prefix="survey") as pool:
            try:
                for done in as_completed([pool.submit(self.survey, user) for user in users]):
                    yield done.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _keep(self, surveyed: Surveyed) -> None:
        value(
            self._connection,
            "SELECT bascule.record_survey(%s, %s, %s, %s, %s, %s)",
            str(surveyed.address),
            surveyed.messages,
            surveyed.folders,
            surveyed.bytes,
            surveyed.largest,
            json.dumps([asdict(each) for each in surveyed.findings]),
        )


def unmoved(connection: Connection, domain: str) -> Iterable[Address]:
    """The mailboxes of a domain that are known and have not moved."""
    rows = connection.execute(
        "SELECT address FROM bascule.mailboxes WHERE domain = %s AND state IN ('legacy', 'requested', 'copying') "
        "ORDER BY 1",
        (domain,),
    ).fetchall()
    return [Address.parse(address) for (address,) in rows]
