"""The command line: bad input gets a clear error, exit status 1, and changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from bascule import schema
from bascule.cli import main
from bascule.config_templates import render
from bascule.credential import Password, Sealer, Unsealer, create_keys
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
        database=postgres.conninfo,
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


def test_closing_by_force_names_what_will_happen_and_asks(bascule: Bascule, owner: Connection) -> None:
    owner.execute("SELECT record_sighting('scanner@lab.test', 2)")
    words = "scanner@lab.test (receives mail at the legacy server"
    declined = bascule("close", "lab.test", "--force", "--reason", "enough", stdin="n\n")
    assert declined.exit_code == 1
    assert words in declined.output
    assert "mail for it will be refused" in declined.output
    assert owner.execute("SELECT mode FROM domain").fetchall() == [("active",)]
    assert bascule("close", "lab.test", "--force", "--yes").exit_code == 1  # no reason
    forced = bascule("close", "lab.test", "--force", "--yes", "--reason", "enough")
    assert (forced.exit_code, words in forced.output) == (0, True)
    assert owner.execute("SELECT mode FROM domain").fetchall() == [("closed",)]


def test_what_is_done_can_be_taken_back(bascule: Bascule, owner: Connection) -> None:
    for arguments, words in (
        (("expect", "Alice@lab.test", "--first-name", "Alice"), "is expected"),
        (("expect", "alice@lab.test"), "was known already"),
        (("alias", "info@lab.test", "alice@lab.test"), "info@lab.test is another name of alice@lab.test"),
        (("alias", "info@lab.test", "--remove"), "info@lab.test is no alias any more"),
        (("waive", "alice@lab.test", "--reason", "gone"), "alice@lab.test is given up"),
        (("waive", "alice@lab.test", "--undo"), "alice@lab.test is not given up any more"),
        (("pause", "alice@lab.test", "--reason", "away"), "alice@lab.test waits until: bascule resume alice@lab.test"),
        (("resume", "alice@lab.test"), "alice@lab.test goes on"),
        (("pause", "LAB.test", "--reason", "backup"), "LAB.test waits"),
        (("resume", "LAB.test"), "LAB.test goes on"),
    ):
        done = bascule(*arguments)
        assert (done.exit_code, words in done.output) == (0, True), done.output
    assert (
        owner.execute("SELECT FROM alias UNION ALL SELECT FROM sighting WHERE waived_at IS NOT NULL").fetchall() == []
    )


@pytest.mark.parametrize(
    "arguments",
    [("alias", "info@lab.test"), ("alias", "a@lab.test", "b@lab.test", "--remove"), ("waive", "a@lab.test")],
)
def test_half_a_command_is_wrong_usage(bascule: Bascule, arguments: tuple[str, ...]) -> None:
    assert bascule(*arguments).exit_code == 2


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("", "the first line does not name the columns"),
        ("user,pass\na@lab.test,hunter2\n", "the first line does not name the columns"),
        ("address,password\na@lab.test,hunter2,x\n", "line 2: it has not as many fields as the first line"),
        ("address,password\na@lab.test\n", "line 2: it has not as many fields as the first line"),
        ("address,password\na@elsewhere.test,hunter2\n", "line 2: the address is not one of lab.test"),
        ("address,password\nA,hunter2\n", "line 2: the address is none"),
        ('address,password\na@lab.test,"hunter2\n', "is not CSV in UTF-8"),
        (b"address,password\na@lab.test,hunter2\xff\n", "is not CSV in UTF-8"),
        ("address,password\n" + "x,hunter2\n" * 30, "... and 10 more"),
    ],
)
def test_a_file_with_a_mistake_is_refused_whole(
    bascule: Bascule, owner: Connection, tmp_path: Path, file: str | bytes, words: str
) -> None:
    path = tmp_path / "users.csv"
    path.write_bytes(file if isinstance(file, bytes) else file.encode())
    done = bascule("import", "lab.test", str(path))
    assert done.exit_code == 1
    assert words in done.output
    assert "hunter2" not in done.output
    assert owner.execute("SELECT FROM mailbox").fetchall() == []


def test_users_without_a_password_are_expected(bascule: Bascule, owner: Connection) -> None:
    """As a spreadsheet writes it: with a byte order mark, and columns in another order."""
    text = "\ufefffirst_name,address,last_name,password\r\nAlice,Alice@LAB.test,Quay,\r\n"
    done = bascule("import", "lab.test", "-", stdin=text.encode())
    assert (done.exit_code, "1 expected" in done.output) == (0, True), done.output
    known = owner.execute("SELECT address, first_name, last_name, state::text FROM mailboxes").fetchall()
    assert known == [("alice@lab.test", "Alice", "Quay", "legacy")]


def test_domains_and_addresses_are_completed(bascule: Bascule, owner: Connection, tmp_path: Path) -> None:
    for name in ("alice", "alan", "bob"):
        owner.execute("SELECT expect(%s)", (f"{name}@lab.test",))
    settings = str(tmp_path / "bascule.toml")

    def complete(words: str, typed: str) -> str:
        environment = {
            "_BASCULE_COMPLETE": "bash_complete",
            "COMP_WORDS": f"bascule --settings {settings} {words} {typed}",
            "COMP_CWORD": str(len(words.split()) + 3),
        }
        return CliRunner().invoke(main, [], env=environment, prog_name="bascule").output

    assert complete("close", "la") == "plain,lab.test\n"
    assert complete("retry", "al") == "plain,alan@lab.test\nplain,alice@lab.test\n"


def test_help_shows_the_usual_way() -> None:
    done = CliRunner().invoke(main, ["--help"])
    assert "The usual way of a domain" in done.output
    for command in main.commands:
        assert CliRunner().invoke(main, [command, "--help"]).exit_code == 0


def test_missing_settings_are_told() -> None:
    done = CliRunner().invoke(main, ["--settings", "/nowhere.toml", "status"])
    assert done.exit_code == 1
    assert "the settings file /nowhere.toml cannot be read" in done.output


def test_stored_passwords_are_sealed_anew(bascule: Bascule, owner: Connection, tmp_path: Path) -> None:
    keys = (str(tmp_path / "seal.pub"), str(tmp_path / "seal.key"))
    bascule("prepare", "new.test", *PREPARE)
    former = Sealer(tmp_path / "seal.pub").seal(Password("pâte"))
    owner.execute(
        "INSERT INTO mailbox (domain_id, local_part, store, sealed_credential) "
        "SELECT id, 'alice', 'local', %s FROM domain WHERE name = 'new.test'",
        (former,),
    )
    assert bascule("keys", "rotate", *keys).exit_code == 0
    done = bascule("keys", "reseal")
    assert (done.exit_code, done.output.split(",")[0]) == (0, "1 sealed anew")
    assert bascule("keys", "reseal").output.startswith("0 sealed anew")
    assert bascule("keys", "forget", keys[1]).exit_code == 0
    (sealed,) = owner.execute("SELECT sealed_credential FROM mailbox WHERE local_part = 'alice'").fetchall()[0]
    assert Unsealer(tmp_path / "seal.key").unseal(sealed).secret == "pâte"
    # Lost to a key that is nowhere any more: it is named.
    owner.execute("UPDATE mailbox SET sealed_credential = %s WHERE local_part = 'alice'", (former,))
    done = bascule("keys", "reseal")
    assert done.exit_code == 1
    assert "alice@new.test" in done.output


def test_whether_the_schema_is_this_versions_is_told(bascule: Bascule, postgres: Postgres, owner: Connection) -> None:
    dsn = postgres.dsn("postgres")
    assert bascule("db", "status", "--dsn", dsn).exit_code == 0
    owner.execute("COMMENT ON SCHEMA bascule IS 'another version''s'")
    assert bascule("db", "status", "--dsn", dsn).exit_code == 3
    assert bascule("db", "upgrade", "--dsn", dsn).exit_code == 0
    assert bascule("db", "status", "--dsn", dsn).exit_code == 0


def test_postgresql_is_told_a_verifier_and_no_password(bascule: Bascule, postgres: Postgres, owner: Connection) -> None:
    done = bascule(
        "db", "password", "bascule_worker", "--dsn", postgres.dsn("postgres"), "--password-file", "-", stdin="geheim\n"
    )
    assert done.exit_code == 0
    (verifier,) = owner.execute("SELECT rolpassword FROM pg_authid WHERE rolname = 'bascule_worker'").fetchall()[0]
    assert verifier.startswith("SCRAM-SHA-256$")
    assert "geheim" not in (postgres.folder / "postgres.log").read_text()


def test_the_schema_says_whose_it_is(bascule: Bascule, postgres: Postgres, owner: Connection) -> None:
    dsn = postgres.dsn("postgres")
    assert bascule("db", "status", "--dsn", dsn).exit_code == 0
    owner.execute("COMMENT ON SCHEMA bascule IS 'another text'")
    assert bascule("db", "status", "--dsn", dsn).exit_code == 3
    owner.execute("UPDATE alembic_version SET version_num = 'later'")
    try:
        status, refused = bascule("db", "status", "--dsn", dsn), bascule("db", "upgrade", "--dsn", dsn)
    finally:
        owner.execute("UPDATE alembic_version SET version_num = %s", (schema.head(),))
    assert (status.exit_code, refused.exit_code) == (4, 1)
    assert "is of a later version" in refused.output
    assert bascule("db", "upgrade", "--dsn", dsn).exit_code == 0
    assert bascule("db", "status", "--dsn", dsn).exit_code == 0
