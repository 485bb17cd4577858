"""A directory with a mailbox in every state, and the routes over it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bascule.address import Address
from bascule.directory import Directory, Domain, Mailbox, Mode, State
from bascule.legacy import LegacySettings, Service, SmtpTls
from bascule.policy_daemon.routes import Routes

HOLD = "unix:/run/hold"

MakeRoutes = Callable[..., Routes]


def domain(name: str, mode: Mode) -> Domain:
    smtp_tls: SmtpTls = "verify" if name == "verified.test" else "may"
    imap = Service(993, "implicit")
    return Domain(1, mode, LegacySettings(name, "imap.old.test", imap, "mx.old.test", 25, smtp_tls=smtp_tls))


@pytest.fixture
def directory() -> Directory:
    modes: dict[str, Mode] = {
        "active.test": "active",
        "closed.test": "closed",
        "prepared.test": "prepared",
        "verified.test": "active",
        "xn--mlut-moa5l.test": "active",  # ümläut
    }
    made = Directory(loaded=True)
    made.domains = {name: domain(name, mode) for name, mode in modes.items()}
    boxes: list[tuple[str, State]] = [
        ("here@active.test", "local"),
        ("moving@active.test", "cutover"),
        ("leaving@active.test", "returning"),
        ("here@closed.test", "local"),
        ("here@ümläut.test", "local"),
    ]
    for number, (address, state) in enumerate(boxes):
        parsed = Address.parse(address)
        made.mailboxes[parsed] = Mailbox(number, parsed, state, 1, "unix:/run/lmtp")
    afar = Address.parse("afar@active.test")
    made.mailboxes[afar] = Mailbox(99, afar, "local", 1, "inet:store2.test:24")
    made.unmoved.add(Address.parse("here+own@active.test"))
    made.aliases[Address.parse("tom@active.test")] = Address.parse("unmoved@active.test")
    made.aliases[Address.parse("info@active.test")] = Address.parse("here@active.test")
    return made


@pytest.fixture
def accepted() -> list[Address]:
    """What the milter told of and was counted."""
    return []


@pytest.fixture
def routes(directory: Directory, accepted: list[Address]) -> Routes:
    return Routes(directory, HOLD, accepted.append)


@pytest.fixture
def unloaded(accepted: list[Address]) -> Routes:
    """Before the first load."""
    return Routes(Directory(), HOLD, accepted.append)
