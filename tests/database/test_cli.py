"""The command line: bad input gets a clear error, exit status 1, and changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from bascule.cli import main
from bascule.config_templates import render
from bascule.credential import create_keys
from bascule.database import Connection
from bascule.lab.postgres import Postgres
from bascule.settings import Keys, Settings

Bascule = Callable[..., Result]
PREPARE = ("--imap-host", "imap.old.test", "--smtp-host", "mx.old.test")


@pytest.fixture
def bascule(postgres: Postgres, owner: Connection, tmp_path: Path) -> Bascule:
    """Run the command as an administrator of the test's database."""
    create_keys(tmp_path / "seal.pub", tmp_path / "seal.key")
    path = tmp_path / "bascule.toml"
    written = Settings(
        database=f"host={postgres.folder} dbname=bascule",
        keys=Keys(public=tmp_path / "seal.pub", private=tmp_path / "seal.key"),
    )
    path.write_text(render("bascule.toml.j2", **written.model_dump()))

    def run(*arguments: str, stdin: str | bytes = "") -> Result:
        return CliRunner().invoke(main, ["--settings", str(path), *arguments], input=stdin)

    return run


def test_a_domain_is_prepared_and_corrected(bascule: Bascule, owner: Connection) -> None:
    assert bascule("prepare", "New.test", *PREPARE, "--pop3-port", "995").exit_code == 0
    assert bascule("prepare", "new.test", *PREPARE, "--imap-port", "143", "--imap-tls", "starttls").exit_code == 0
    rows = owner.execute("SELECT imap_port, imap_tls, pop3_port, pop3_tls, mode FROM domain WHERE name = 'new.test'")
    assert rows.fetchall() == [(143, "starttls", None, None, "prepared")]


def test_a_port_implies_its_tls(bascule: Bascule, owner: Connection) -> None:
    assert bascule("prepare", "new.test", *PREPARE, "--pop3-port", "995", "--submission-port", "587").exit_code == 0
    rows = owner.execute("SELECT pop3_tls, submission_tls FROM domain WHERE name = 'new.test'")
    assert rows.fetchall() == [("implicit", "starttls")]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("prepare", "nodots", *PREPARE), "'nodots' is not a domain name"),
        (("prepare", "new.test", *PREPARE, "--store", "x"), "no store 'x' is known"),
        (("prepare", "new.test", *PREPARE, "--sweep-interval", "soon"), "invalid input syntax for type interval"),
        (("prepare", "new.test", *PREPARE, "--cutover-budget", "0 seconds"), "cutover_budget"),
        (("store", "x", "nonsense"), "is not unix:path or inet:host:port"),
        (("check", "new.test"), "no domain new.test is known here"),
        (("check", "lab.test", "--user", "x@elsewhere.test"), "x@elsewhere.test is not an address of lab.test"),
        (("check", "lab.test", "--user", "x"), "'x' is not an e-mail address"),
        (("activate", "lab.test"), "lab.test is already active"),
        (("activate", "new.test"), "no domain new.test is known here"),
        (("request", "x@elsewhere.test"), "not an address of a domain known here"),
        (("request", "nonsense"), "'nonsense' is not an e-mail address"),
        (("alias", "a@lab.test", "nobody@lab.test"), "nothing is known of a mailbox nobody@lab.test"),
        (("retry", "nobody@lab.test"), "nothing is known of a mailbox nobody@lab.test"),
        (("give-up", "nobody@lab.test", "--reason", "x"), "nothing is known of a mailbox nobody@lab.test"),
        (("status", "new.test"), "no domain new.test is known here"),
        (("close", "new.test"), "no domain new.test is known here"),
        (("db", "upgrade", "--dsn", "host=/nowhere"), "the database does not answer"),
    ],
)
def test_bad_input_is_told(bascule: Bascule, owner: Connection, arguments: tuple[str, ...], words: str) -> None:
    before = owner.execute("SELECT d::text FROM domain AS d UNION ALL SELECT s::text FROM store AS s").fetchall()
    done = bascule(*arguments)
    assert words in done.output
    assert done.exit_code == 1
    assert (
        owner.execute("SELECT d::text FROM domain AS d UNION ALL SELECT s::text FROM store AS s").fetchall() == before
    )


def test_activation_prints_the_url(bascule: Bascule, owner: Connection) -> None:
    assert bascule("prepare", "new.test", *PREPARE).exit_code == 0
    url = bascule("activate", "new.test").output.strip()
    token = url.rpartition("/m/")[2]
    assert owner.execute("SELECT name FROM portal_domain(%s)", (token,)).fetchall() == [("new.test",)]
    assert len(token) >= 32
    assert bascule("rotate-url", "new.test").output.strip() != url


def test_a_password_that_is_not_text_is_not_shown(bascule: Bascule, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"hunter\xff2")
    done = bascule("check", "lab.test", "--user", "a@lab.test", "--password-file", str(secret))
    assert done.exit_code == 1
    assert "is not UTF-8 text" in done.output
    assert "hunter" not in done.output


def test_status_and_closing(bascule: Bascule, owner: Connection) -> None:
    owner.execute("SELECT record_sighting('scanner@lab.test', 2)")
    assert bascule("status").output == (
        "lab.test: active, 0 migrated, 0 pending, 0 with trouble, 1 forgotten; "
        "under way: bascule.closing_obstacles says what is left\n"
    )
    assert "scanner@lab.test  2 messages" in bascule("status", "LAB.test").output
    refused = bascule("close", "lab.test")
    assert refused.exit_code == 1
    assert "scanner@lab.test (receives mail" in refused.output
    assert bascule("waive", "scanner@lab.test", "--reason", "scrapped").exit_code == 0
    assert bascule("close", "lab.test").exit_code == 0


def test_help_shows_the_usual_way() -> None:
    done = CliRunner().invoke(main, ["--help"])
    assert "The usual way of a domain" in done.output
    for command in main.commands:
        assert CliRunner().invoke(main, [command, "--help"]).exit_code == 0


def test_missing_settings_are_told() -> None:
    done = CliRunner().invoke(main, ["--settings", "/nowhere.toml", "status"])
    assert done.exit_code == 1
    assert "the settings file /nowhere.toml cannot be read" in done.output
