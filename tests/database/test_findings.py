"""What nodes find by themselves, and what follows from it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest

from bascule.database import Connection
from bascule.lab.postgres import Postgres

Found = dict[str, str | None]
FOUND: Found = {
    "name": "postfix.domain-class",
    "domain": "lab.test",
    "level": "wrong",
    "text": "it is",
    "remedy": "take it out",
}


@contextmanager
def part(postgres: Postgres, name: str) -> Iterator[Connection]:
    with psycopg.connect(postgres.dsn(f"bascule_{name}"), autocommit=True) as connection:
        yield connection


def record(connection: Connection, *found: dict[str, Any], node: str = "mx1") -> None:
    connection.execute("SELECT bascule.record_findings(%s, %s)", (node, json.dumps(found)))


def known(owner: Connection) -> list[tuple[object, ...]]:
    return owner.execute("SELECT node, domain, name, level, text FROM findings ORDER BY 1, 2, 3, 5").fetchall()


def test_what_is_found_no_more_is_gone(postgres: Postgres, owner: Connection) -> None:
    other = FOUND | {"name": "postfix.wired", "domain": None}
    with part(postgres, "policy_daemon") as mx:
        record(mx, FOUND, other)
        assert known(owner) == [
            ("mx1", "lab.test", "postfix.domain-class", "wrong", "it is"),
            ("mx1", None, "postfix.wired", "wrong", "it is"),
        ]
        ((first, last),) = owner.execute("SELECT first_seen, last_seen FROM findings WHERE domain IS NULL").fetchall()
        record(mx, other)
        ((again, later),) = owner.execute("SELECT first_seen, last_seen FROM findings").fetchall()
        assert first == again
        assert later > last
        record(mx)
    assert known(owner) == []


def test_each_part_and_node_speaks_for_itself(postgres: Postgres, owner: Connection) -> None:
    with part(postgres, "policy_daemon") as mx, part(postgres, "worker") as worker:
        record(mx, FOUND)
        record(mx, FOUND, node="mx2")
        record(worker, FOUND | {"name": "dovecot.userdb"})
        record(worker)  # its own only
        record(mx, node="mx2")
    assert known(owner) == [("mx1", "lab.test", "postfix.domain-class", "wrong", "it is")]


@pytest.mark.parametrize("domain", ["gone.test", "lab.test"])
def test_a_finding_goes_with_its_domain(postgres: Postgres, owner: Connection, domain: str) -> None:
    with part(postgres, "policy_daemon") as mx:
        record(mx, FOUND | {"domain": domain})
    owner.execute("SELECT remove_domain('lab.test')")
    assert known(owner) == []


def test_a_node_that_is_no_more_does_not_speak_for_ever(postgres: Postgres, owner: Connection) -> None:
    with part(postgres, "policy_daemon") as mx:
        record(mx, FOUND)
    owner.execute("UPDATE finding SET last_seen = now() - interval '25 hours'")
    assert known(owner) == []


@pytest.mark.parametrize("found", [FOUND | {"level": "good"}, FOUND | {"level": None}, FOUND | {"name": ""}])
def test_nonsense_is_refused(postgres: Postgres, owner: Connection, found: dict[str, Any]) -> None:
    with part(postgres, "worker") as worker, pytest.raises(psycopg.errors.IntegrityError):
        record(worker, found)


def test_an_address_that_check_invented_is_never_forgotten(postgres: Postgres, owner: Connection) -> None:
    """It is an address of nobody's, also where the legacy server takes mail for every address."""
    with part(postgres, "policy_daemon") as mx:
        for local_part in ("bascule-check-3f40aa00bb11", "bascule-check-me", "bascule-check-3f40aa00bb11x"):
            mx.execute("SELECT bascule.record_sighting(%s, 1)", (f"{local_part}@lab.test",))
    seen = owner.execute("SELECT address FROM forgotten ORDER BY 1").fetchall()
    assert seen == [("bascule-check-3f40aa00bb11x@lab.test",), ("bascule-check-me@lab.test",)]


def test_activation_against_what_was_found_is_in_the_journal(postgres: Postgres, owner: Connection) -> None:
    owner.execute("UPDATE domain SET mode = 'prepared', url_token = NULL, url_expires_at = NULL")
    act = "SELECT bascule.activate_domain_regardless('lab.test', 'x', '1 day', %s, 'what was found')"
    with part(postgres, "admin") as admin:
        with pytest.raises(psycopg.DatabaseError, match="needs a reason"):
            admin.execute(act, ("",))
        admin.execute(act, ("we know",))
    rows = owner.execute("SELECT event, reason FROM journal ORDER BY id DESC LIMIT 1").fetchall()
    assert rows == [("activated by force", "we know\nwhat was found")]
    assert owner.execute("SELECT mode FROM domain").fetchall() == [("active",)]


def test_a_domain_to_which_users_were_sent_back_needs_a_reason(postgres: Postgres, owner: Connection) -> None:
    owner.execute("SELECT expect('alice@lab.test')")
    owner.execute("UPDATE mailbox SET migrated_at = now()")
    with pytest.raises(psycopg.DatabaseError, match="say why it is taken out"):
        owner.execute("SELECT remove_domain('lab.test')")
    owner.execute("SELECT remove_domain('lab.test', 'another way')")
    assert owner.execute("SELECT reason FROM journal ORDER BY id DESC LIMIT 1").fetchall() == [("another way",)]
