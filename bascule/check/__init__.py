"""``bascule check``: everything that must be right before users move, tried for real and told in plain words."""

from __future__ import annotations

from collections.abc import Iterator

from bascule.address import Address
from bascule.check.dns import Here, check_dns
from bascule.check.finding import Finding
from bascule.check.imap import check_imap
from bascule.check.smtp import check_smtp
from bascule.check.wiring import Probe, check_dovecot, check_parts, check_postfix
from bascule.credential import Password
from bascule.database import Connection
from bascule.directory import Mode
from bascule.endpoint import host_and_port
from bascule.legacy import LegacySettings, Trust
from bascule.settings import Settings

__all__ = ["Finding", "check_legacy", "check_site"]


def check_legacy(
    legacy: LegacySettings, trust: Trust, address: Address | None = None, password: Password | None = None
) -> Iterator[Finding]:
    """The legacy servers, in the order in which an operator would correct them."""
    yield from check_imap(legacy, trust, address, password)
    yield from check_smtp(legacy, trust.timeout, address)


def check_site(
    connection: Connection,
    configuration: Settings,
    legacy: LegacySettings,
    trust: Trust,
    address: Address | None = None,
    password: Password | None = None,
) -> Iterator[Finding]:
    """The DNS, the parts, and the Postfix and Dovecot of this host."""
    row = connection.execute("SELECT mode FROM bascule.domains WHERE domain = %s", (legacy.domain,)).fetchone()
    mode: Mode = "prepared" if row is None else row[0]
    parts = connection.execute("SELECT part, name, alive FROM bascule.parts ORDER BY 1, 2").fetchall()
    nodes = {name for part, name, alive in parts if part == "policy_daemon" and alive} or {configuration.node}
    users = configuration.users
    told = {host_and_port(where)[0] for where in (users.imap, users.pop3, users.submission) if where}
    here = Here(tuple(sorted(nodes)), tuple(sorted(told)))
    yield from check_dns(legacy.domain, mode, here, configuration.dns.resolvers)
    yield from check_parts([(part, name, alive) for part, name, alive in parts])
    probe = None
    if address is not None and password is not None:
        probe = Probe(address, password, *_standing(connection, address, mode))
    yield from check_postfix(configuration, legacy, trust, probe)
    yield from check_dovecot(configuration, legacy, trust, probe)


def _standing(connection: Connection, address: Address, mode: Mode) -> tuple[bool, bool]:
    """Whether a user has moved, and whether a login would be a request."""
    row = connection.execute("SELECT state FROM bascule.mailboxes WHERE address = %s", (str(address),)).fetchone()
    state = "legacy" if row is None else row[0]
    moves = connection.execute(
        "SELECT first_login_migrates FROM bascule.domain WHERE name = %s", (address.domain,)
    ).fetchone()
    is_request = mode == "active" and state == "legacy" and bool(moves and moves[0])
    return state in {"local", "cutover", "returning"}, is_request
