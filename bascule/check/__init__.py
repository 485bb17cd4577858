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
from bascule.database import Connection, value
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
    mode, first_login_migrates = _domain(connection, legacy.domain)
    parts = connection.execute("SELECT part, name, alive FROM bascule.parts ORDER BY 1, 2").fetchall()
    nodes = {name for part, name, alive in parts if part == "policy_daemon" and alive} or {configuration.node}
    users = configuration.users
    told = {host_and_port(where)[0] for where in (users.imap, users.pop3, users.submission) if where}
    here = Here(tuple(sorted(nodes)), tuple(sorted(told)))
    yield from check_dns(legacy.domain, mode, here, configuration.dns.resolvers)
    yield from check_parts([(part, name, alive) for part, name, alive in parts])
    probe = None
    if address is not None and password is not None:
        state = value(connection, "SELECT state FROM bascule.mailboxes WHERE address = %s", str(address)) or "legacy"
        probe = Probe(
            address,
            password,
            has_moved=state in {"local", "cutover", "returning"},
            login_is_a_request=mode == "active" and first_login_migrates and state == "legacy",
        )
    yield from check_postfix(configuration, legacy, trust, probe)
    yield from check_dovecot(configuration, legacy, trust, probe)


def _domain(connection: Connection, name: str) -> tuple[Mode, bool]:
    """Mode, and whether a first login is a request, of a domain that is known."""
    row = connection.execute(
        "SELECT mode, first_login_migrates FROM bascule.domain WHERE name = %s", (name,)
    ).fetchone()
    return ("prepared", False) if row is None else (row[0], row[1])
