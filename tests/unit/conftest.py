"""A directory with a mailbox in every state, and the routes over it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bascule.address import Address
from bascule.directory import Directory, Domain, Mailbox, Mode, State
from bascule.legacy import LegacySettings, Service
from bascule.policy_daemon.routes import Routes

HOLD = "unix:/run/hold"

MakeRoutes = Callable[..., Routes]


def domain(name: str, mode: Mode) -> Domain:
    return Domain(1, mode, LegacySettings(name, "imap.old.test", Service(993, "implicit"), "mx.old.test", 25))


@pytest.fixture
def directory() -> Directory:
    modes: dict[str, Mode] = {
        "active.test": "active",
        "closed.test": "closed",
        "prepared.test": "prepared",
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
    made.aliases[Address.parse("info@active.test")] = Address.parse("here@active.test")
    return made


@pytest.fixture
def barriers() -> list[str]:
    """The nonces whose lookup was seen."""
    return []


@pytest.fixture
def routes(directory: Directory, barriers: list[str]) -> Routes:
    return Routes(directory, HOLD, barriers.append)


@pytest.fixture
def unloaded(barriers: list[str]) -> Routes:
    """Before the first load."""
    return Routes(Directory(), HOLD, barriers.append)
