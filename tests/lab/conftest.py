"""One lab for all tests of this folder. Each test has users of its own, so that none depends on another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import pytest

from bascule.config_templates import render
from bascule.lab.mail import Ledger
from bascule.lab.process import Daemon, free_ports
from bascule.lab.sites import CATCH_ALL_DOMAIN, DOMAIN, IDN_DOMAIN, Lab, LegacySite, NewSite, eventually, full
from bascule.settings import Settings

#: Who is whose is said in the tests.
NAMES = (
    "proxied", "unreachable", "moved", "databaseless", "killed", "ghosted", "abandoned", "changed", "looping",
    "raced", "expired", "aliased", "faithful", "stayed", "held", "rekeyed", "returned", "unreturned",
    "stranded", "halfway", "undecided", "clientele", "cached", "mastered", "tokened", "limited", "unreadable",
    "kept-in-mdbox", "kept-in-sdbox", "reaped-1", "reaped-2", "reaped-3",
    "fronted-2.3", "fronted-2.4", "signed-here", "signed-there", "sealed", "circled", "overtaken",
    "shared-here", "shared-there", "shared-moving", "limited-guesser", "guessed-once", "guessed-page",
    "stayed-at-page", "scripted", "checked", "checked-loop", "checked-junk", "paged", "troubled", "paused", "awaited",
    "imported-1", "imported-2", "imported-3", "behind-proxy", "guessed-behind-proxy",
    "postfix-here", "postfix-there", "postfix-asked", "postfix-filtered", "postfix-seen", "postfix-grey", "postfix-tls",
    "outlived", "guessed-moved", "guessed-fresh", "cached-front", "checked-odd", "checked-own",
    "ruled", "unmounted", "emptied", "refoldered", "renewed", "reopened", "recalled",
    "cached-2.3", "cached-2.4", "waved-1", "waved-2", "wordless", "outbid", "newly", "named", "named-too", "stale",
    "relaying-here", "relaying-there", f"buch@{IDN_DOMAIN}",
)  # fmt: skip


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """Both sites, with the domain active; a first login moves nobody here."""
    with Lab() as running:
        running.create(
            {name: f"password of {name}" for name in NAMES},
            {"alias": "aliased", f"@{CATCH_ALL_DOMAIN}": "relaying-there"},
        )
        running.prepare("--no-first-login")
        activated = running.new.cli("activate", DOMAIN)
        assert activated.returncode == 0, activated.stdout
        running.url = activated.stdout.strip()
        yield running


@pytest.fixture
def new(lab: Lab) -> NewSite:
    return lab.new


@pytest.fixture
def legacy(lab: Lab) -> LegacySite:
    return lab.legacy


@pytest.fixture
def ledger() -> Ledger:
    return Ledger()


@pytest.fixture
def random() -> Random:
    return Random(3)  # noqa: S311 (mail, not keys)


Request = Callable[[str], None]
Await = Callable[..., None]


@pytest.fixture
def request_move(new: NewSite, legacy: LegacySite) -> Request:
    """Ask for a user to be moved, as an administrator."""

    def ask(name: str) -> None:
        done = new.cli("request", full(name), "--password-file", "-", stdin=legacy.users[name] + "\n")
        assert done.returncode == 0, done.stdout

    return ask


@pytest.fixture
def await_state(new: NewSite) -> Await:
    """Wait until a user is in a state."""

    def wait(name: str, state: str = "local", timeout: float = 60) -> None:
        eventually(f"{name} in state {state}, not {new.state(name)}", lambda: new.state(name) == state, timeout)

    return wait


@contextmanager
def another_page(new: NewSite, folder: Path, public_url: str = "", **changes: object) -> Iterator[Settings]:
    """A page with settings of its own beside the lab's; its log is ``page.log`` in ``folder``.

    ``changes`` are settings' tables; one source is not many people to it.
    """
    (port,) = free_ports(1)
    listen = f"127.0.0.1:{port}"
    portal = new.settings.portal.model_copy(
        update={"listen": listen, "public_url": public_url or f"http://{listen}", "metrics": None}
    )
    settings = new.settings.model_copy(update={"portal": portal, "trusted_sources": (), **changes})
    settings_file = folder / "bascule.toml"
    settings_file.write_text(render("bascule.toml.j2", **settings.model_dump()))
    page = Daemon([*new.portal.command[:-1], str(settings_file)], folder=folder, name="page")
    page.start()
    try:
        yield settings
    finally:
        page.stop()
