"""Wrong passwords count at every page and at every authenticator, whoever counted them, and after a restart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psycopg
import pytest

from bascule.address import Address
from bascule.attempts import PER_ACCOUNT, Attempts
from bascule.credential import Password, create_keys
from bascule.database import Connection
from bascule.errors import DatabaseUnavailable, LegacyRefusedLogin
from bascule.guesses import QUERY, Exchange
from bascule.lab.postgres import Postgres
from bascule.portal.logins import LegacyLogins
from bascule.portal.requests import BadForm, Requests
from bascule.settings import Keys, Settings

RIGHT = "the right one"
NEAR, FAR = "192.0.2.1", "198.51.100.7"

Page = Callable[[], Requests]


@pytest.fixture
def page(postgres: Postgres, owner: Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Page:
    """A page as its process has it after a start; the legacy server knows one password."""

    def check(_self: object, _legacy: object, address: Address, password: Password) -> None:
        if password.secret != RIGHT:
            raise LegacyRefusedLogin(f"wrong password for {address}")

    monkeypatch.setattr(LegacyLogins, "check", check)
    keys = Keys(public=tmp_path / "seal.pub", private=tmp_path / "seal.key")
    create_keys(keys.public, keys.private)
    settings = Settings(
        database=f"host={postgres.folder} port={postgres.port} dbname=bascule", keys=keys, trusted_sources=()
    )

    def start() -> Requests:
        requests = Requests(settings)
        requests.sharing.once()
        return requests

    return start


def asked(page: Requests, password: str, source: str = FAR) -> str:
    """How a request is answered."""
    form = {"email": "alice@lab.test", "password": password, "first_name": "A", "last_name": "Quay"}
    try:
        page.make("token", page.domain_of("token"), form, source, "en")
    except BadForm as error:
        return error.reason
    return "made"


def guessed(page: Requests) -> None:
    for number in range(PER_ACCOUNT.amount):
        assert asked(page, f"guess {number}", f"203.0.113.{number}") == "wrong"
    page.sharing.once()


def test_guesses_at_one_page_count_at_another_and_after_a_restart(page: Page) -> None:
    one, other = page(), page()
    guessed(one)
    assert asked(other, RIGHT, "192.0.2.99") == "made", "it has heard of nothing yet"
    other.sharing.once()
    assert asked(other, "one more") == "too_many"
    assert asked(page(), "one more") == "too_many", "a page that was started anew"
    one.sharing.once()  # nobody hears their own guesses again
    assert one._attempts.reached(Address("bob", "lab.test"), FAR) == []


def test_guesses_at_dovecot_count_at_the_page_and_the_other_way_round(postgres: Postgres, page: Page) -> None:
    one = page()
    attempts = Attempts(())
    exchange = Exchange(attempts, "store")
    alice, bob = Address("alice", "lab.test"), Address("bob", "lab.test")
    for number in range(PER_ACCOUNT.amount):
        attempts.failed(alice, Password(f"guess {number}"), f"203.0.113.{number}")
        one._attempts.failed(bob, Password(f"guess {number}"), f"203.0.113.{number}")
    one.sharing.once()
    with psycopg.connect(postgres.dsn("bascule_authenticator"), autocommit=True) as node:
        told, _ = attempts.untold()
        exchange.hear(node.execute(QUERY.encode(), exchange.parameters(told)).fetchall())
    assert attempts.barred(bob, FAR) == "too many wrong passwords for bob@lab.test"
    assert asked(one, RIGHT, "192.0.2.99") == "made"
    one.sharing.once()
    assert asked(one, "one more") == "too_many"


def test_an_owner_who_is_at_home_is_let_in_while_others_guess(postgres: Postgres, page: Page) -> None:
    one = page()
    guessed(one)
    assert asked(one, RIGHT, NEAR) == "too_many"
    with psycopg.connect(postgres.dsn("bascule_authenticator"), autocommit=True) as node:
        node.execute(
            "SELECT bascule.share_sources('1970-01-01', %s)",
            (f'[{{"address": "alice@lab.test", "site": "{NEAR}"}}]',),
        )
    assert asked(one, RIGHT, FAR) == "too_many"
    assert asked(one, RIGHT, NEAR) == "made"


def test_without_the_database_a_page_counts_by_itself_and_tells_later(page: Page) -> None:
    one, other = page(), page()
    database = one.sharing._database

    def away() -> None:
        raise DatabaseUnavailable("it is away")

    one.sharing._database = SimpleNamespace(connection=away)  # type: ignore[assignment]
    guessed(one)
    assert asked(one, "one more") == "too_many"
    other.sharing.once()
    assert asked(other, RIGHT, "192.0.2.99") == "made"
    one.sharing._database = database
    one.sharing.once()
    other.sharing.once()
    assert asked(other, "one more") == "too_many"
