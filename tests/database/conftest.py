"""A PostgreSQL cluster for the session, an empty schema for each test."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
from click.testing import CliRunner, Result

from bascule.cli import main
from bascule.config_templates import render
from bascule.credential import create_keys
from bascule.database import Connection
from bascule.lab.postgres import Postgres
from bascule.lab.process import free_ports
from bascule.settings import Keys, Legacy, Settings

Bascule = Callable[..., Result]

TABLES = (
    "survey, login_guess, login_source, journal, acknowledgement, node, sighting, alias, straggler, mailbox_folder, "
    "mailbox, domain, store"
)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    if os.geteuid() != 0:
        pytest.fail("these tests need root: PostgreSQL runs as a user of its own")
    with tempfile.TemporaryDirectory(prefix="bascule-test-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        cluster = Postgres(folder / "postgres", port=free_ports(1)[0])
        try:
            cluster.create()
            yield cluster
        finally:
            cluster.stop("immediate")


@pytest.fixture
def owner(postgres: Postgres) -> Iterator[Connection]:
    """The owner of the schema, on empty tables."""
    with psycopg.connect(postgres.dsn("postgres"), autocommit=True) as connection:
        connection.execute("SET search_path = bascule, queue")
        connection.execute("ALTER TABLE journal DISABLE TRIGGER append_only")
        connection.execute(f"TRUNCATE {TABLES}, queue.procrastinate_jobs RESTART IDENTITY CASCADE".encode())
        connection.execute("ALTER TABLE journal ENABLE TRIGGER append_only")
        connection.execute("INSERT INTO store VALUES ('local', 'unix:/run/lmtp')")
        connection.execute(
            "INSERT INTO domain (name, store, imap_host, imap_port, imap_tls, smtp_host, smtp_port) "
            "VALUES ('lab.test', 'local', 'imap.old.test', 993, 'implicit', 'mx.old.test', 25)"
        )
        connection.execute("SELECT activate_domain('lab.test', 'token')")
        # One node of each part, alive however long a test takes: without them nothing flips.
        connection.execute(
            "INSERT INTO node (name, part, heartbeat_at) SELECT name, part, now() + interval '1 hour' "
            "FROM (VALUES ('mx', 'policy_daemon'), ('store', 'authenticator')) AS node (name, part)"
        )
        yield connection


@pytest.fixture
def acknowledge(owner: Connection) -> Callable[[int, int], None]:
    """Acknowledge the epoch of a mailbox, as the nodes of :func:`owner` do when they have put a hold into force."""

    def by_both(mailbox: int, epoch: int) -> None:
        for node, part in (("mx", "policy_daemon"), ("store", "authenticator")):
            owner.execute("SELECT acknowledge(%s, %s, %s, %s)", (mailbox, node, part, epoch))

    return by_both


@pytest.fixture
def bascule(postgres: Postgres, owner: Connection, tmp_path: Path) -> Bascule:
    """Run the command as an administrator of the test's database."""
    create_keys(tmp_path / "seal.pub", tmp_path / "seal.key")
    path = tmp_path / "bascule.toml"
    # As after a check that reached the legacy server: nothing here does.
    authorities = tmp_path / "authorities.pem"
    authorities.write_text("# imap.old.test\n-----BEGIN CERTIFICATE-----\nx\n-----END CERTIFICATE-----\n")
    written = Settings(
        database=postgres.conninfo,
        keys=Keys(public=tmp_path / "seal.pub", private=tmp_path / "seal.key"),
        legacy=Legacy(authorities=authorities),
    )
    path.write_text(render("bascule.toml.j2", **written.model_dump()))

    def run(*arguments: str, stdin: str | bytes = "") -> Result:
        return CliRunner().invoke(main, ["--settings", str(path), *arguments], input=stdin)

    return run
