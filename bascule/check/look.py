"""One look of a running node at its Postfix or Dovecot: ``python -m bascule.check.look PART < settings.json``.

Prints what it finds as JSON and records it in the database, as the role of its
part: the operating system user is the part's own, not root.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import TypedDict

from bascule import check, legacy
from bascule.address import Address
from bascule.check.subject import Subject
from bascule.database import Connection, connect, value
from bascule.errors import BasculeError
from bascule.legacy import LegacySettings
from bascule.settings import Settings

#: What each part can see beside it.
CHECKS = {
    "policy_daemon": ("postfix.wired", "postfix.domain-class", "postfix.rewritten", "dns.legacy-host"),
    "worker": ("dovecot.userdb", "dns.legacy-host"),
}
MOST_ADDRESSES = 300  # of a domain that are looked at each time: those who move, and some of those who have moved


class Recorded(TypedDict):
    """As ``bascule.record_findings()`` takes it."""

    name: str
    domain: str | None
    level: str
    text: str
    remedy: str


def look(settings: Settings, part: str) -> list[Recorded]:
    """Look, record, and give what was found.

    Raises:
        DatabaseUnavailable, BasculeError
    """
    with connect(settings.dsn(part)) as connection:
        found = list(_found(connection, settings, part))
        value(connection, "SELECT bascule.record_findings(%s, %s)", settings.node, json.dumps(found))
    return found


def _found(connection: Connection, settings: Settings, part: str) -> Iterator[Recorded]:
    rows = connection.execute(
        f"SELECT {legacy.COLUMNS} FROM bascule.routing_domain WHERE mode <> 'closed' ORDER BY name".encode()
    ).fetchall()
    domains = [legacy.from_row(*row) for row in rows]
    checks = check.matching(CHECKS[part])
    of_the_host = [each for each in checks if "domain" not in each.needs]
    for number, domain in enumerate(domains):
        addresses = _addresses(connection, settings, domain) if part == "worker" else []
        subject = Subject(settings, legacy=domain, addresses=addresses)
        wanted = checks if number == 0 else [each for each in checks if each not in of_the_host]
        for finding in check.run(wanted, subject):
            if finding.level == "good" or finding.name.endswith(".readable"):
                continue  # a part may be on a host without the one or the other
            about_host = finding.name in {each.name for each in of_the_host}
            yield Recorded(
                name=finding.name,
                domain=None if about_host else domain.domain,
                level=finding.level,
                text=finding.text,
                remedy=finding.remedy,
            )


def _addresses(connection: Connection, settings: Settings, domain: LegacySettings) -> list[Address]:
    """Those whose mailboxes are kept, or will be kept, at this store."""
    rows = connection.execute(
        "SELECT mailbox.full_address FROM bascule.mailbox JOIN bascule.domain ON domain.id = mailbox.domain_id "
        "WHERE domain.name = %s AND mailbox.store = %s ORDER BY mailbox.state = 'local', random() LIMIT %s",
        (domain.domain, settings.worker.store, MOST_ADDRESSES),
    ).fetchall()
    return [Address.parse(address) for (address,) in rows]


def main() -> int:
    """Exit status 1, with the reason on standard error, if it could not look."""
    settings = Settings.model_validate_json(sys.stdin.read())
    try:
        found = look(settings, sys.argv[1])
    except BasculeError as error:
        sys.stderr.write(f"{error.message}\n")
        return 1
    sys.stdout.write(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
