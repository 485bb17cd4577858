"""The command line: bad input gets a clear error, exit status 1, and changes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest
from click.testing import CliRunner

from bascule import schema
from bascule.cli import main
from bascule.cli.options import SETTINGS
from bascule.credential import Password, Sealer, Unsealer
from bascule.database import Connection, value
from bascule.lab.postgres import Postgres
from tests.database.conftest import Bascule

PREPARE = ("--imap-host", "imap.old.test", "--smtp-host", "mx.old.test")


def test_prepare_is_the_former_name_of_domain_add_and_set(bascule: Bascule, owner: Connection) -> None:
    """It works as scripts use it; what is not named stays as it was, and it says so."""
    first = bascule("prepare", "New.test", *PREPARE, "--pop3-port", "995", "--no-first-login")
    assert (first.exit_code, "new.test is prepared" in first.output) == (0, True)
    again = bascule("prepare", "new.test", *PREPARE, "--imap-port", "143", "--imap-tls", "starttls")
    assert again.exit_code == 0
    assert "new.test: imap_port 993 -> 143, imap_tls implicit -> starttls; all else is as it was" in again.output
    assert "say: bascule domain add, bascule domain set" in again.output
    rows = owner.execute(
        "SELECT imap_port, imap_tls, pop3_port, pop3_tls, first_login_migrates, mode FROM domain "
        "WHERE name = 'new.test'"
    )
    assert rows.fetchall() == [(143, "starttls", 995, "implicit", False, "prepared")]


def test_prepare_of_a_new_domain_needs_both_hosts(bascule: Bascule, owner: Connection) -> None:
    done = bascule("prepare", "new.test", "--smtp-host", "mx.old.test")
    assert (done.exit_code, "Missing option '--imap-host'" in done.output) == (2, True)
    assert owner.execute("SELECT FROM domain WHERE name = 'new.test'").fetchall() == []


SHAPE = "SELECT to_jsonb(d) - 'id' - 'created_at' FROM domain AS d WHERE name = 'new.test'"


def test_setting_one_thing_changes_nothing_else(bascule: Bascule, owner: Connection) -> None:
    """Every option by itself, on a domain where nothing is as by default."""
    owner.execute("INSERT INTO store VALUES ('other', 'unix:/run/other')")
    everything = {
        "--imap-host": "a.test", "--imap-port": "143", "--imap-tls": "starttls", "--smtp-host": "b.test",
        "--smtp-port": "2525", "--pop3-port": "110", "--pop3-tls": "none", "--submission-port": "465",
        "--submission-tls": "implicit", "--sieve-port": "4191", "--sieve-tls": "none", "--login-form": "local_part",
        "--store": "other", "--sweep-interval": "00:01:00", "--cutover-budget": "00:00:30", "--connections": "7",
        "--connections-per-mailbox": "3", "--quiet-period": "02:00:00", "--language": "fr",
        "--bytes-per-second": "1000",
    }  # fmt: skip
    words = [word for pair in everything.items() for word in pair]
    added = bascule("domain", "add", "new.test", *words, "--no-messages", "--no-first-login")
    assert added.exit_code == 0, added.output
    others = {
        "--imap-host": "c.test", "--imap-port": "993", "--imap-tls": "none", "--smtp-host": "d.test",
        "--smtp-port": "25",
        "--pop3-tls": "starttls", "--submission-tls": "none", "--sieve-tls": "starttls", "--login-form": "address",
        "--store": "local", "--sweep-interval": "00:02:00", "--cutover-budget": "00:00:40", "--connections": "8",
        "--connections-per-mailbox": "4", "--quiet-period": "03:00:00", "--language": "ar", "--bytes-per-second": "off",
        "--messages": "", "--first-login": "", "--smtp-tls": "verify", "--on-difference": "wait",
        "--first-login-delay": "01:00:00",
    }  # fmt: skip
    for option, setting in others.items():
        (before,) = owner.execute(SHAPE).fetchall()[0]
        done = bascule("domain", "set", "new.test", option, *([setting] if setting else []))
        assert done.exit_code == 0, done.output
        (after,) = owner.execute(SHAPE).fetchall()[0]
        different = [column for column in before if before[column] != after[column]]
        assert len(different) == 1, (option, different)
        assert f"new.test: {different[0]} " in done.output
    assert set(others) | {"--pop3-port", "--submission-port", "--sieve-port"} == {
        each.option.partition("/")[0] for each in SETTINGS
    }


def test_a_service_is_taken_out_with_its_security(bascule: Bascule, owner: Connection) -> None:
    bascule("domain", "add", "new.test", *PREPARE, "--pop3-port", "110")
    done = bascule("domain", "set", "new.test", "--pop3-port", "off")
    assert "pop3_port 110 -> off, pop3_tls starttls -> off" in done.output
    rows = owner.execute("SELECT pop3_port, pop3_tls FROM domain WHERE name = 'new.test'").fetchall()
    assert rows == [(None, None)]


def test_a_domain_is_not_added_twice(bascule: Bascule, owner: Connection) -> None:
    (before,) = owner.execute("SELECT d::text FROM domain AS d WHERE name = 'lab.test'").fetchall()
    done = bascule("domain", "add", "lab.test", *PREPARE, "--connections", "1")
    assert (done.exit_code, "lab.test is known here already" in done.output) == (1, True)
    assert owner.execute("SELECT d::text FROM domain AS d WHERE name = 'lab.test'").fetchall() == [before]


def test_domains_are_shown_and_listed(bascule: Bascule, owner: Connection) -> None:
    bascule("domain", "add", "new.test", *PREPARE, "--sieve-port", "4190")
    shown = bascule("domain", "show", "new.test").output
    assert "new.test: prepared" in shown
    assert "--sieve-tls                starttls" in shown
    assert "--pop3-port                off" in shown
    assert json.loads(bascule("domain", "show", "new.test", "--json").output)["imap_port"] == 993
    listed = bascule("domain", "list").output
    assert listed == "lab.test: active, legacy server imap.old.test\nnew.test: prepared, legacy server imap.old.test\n"


def test_a_domain_is_taken_out_again(bascule: Bascule, owner: Connection) -> None:
    """A mistyped name, with what came in for it meanwhile; the journal stays."""
    bascule("domain", "add", "new.test", *PREPARE)
    owner.execute("SELECT expect('a@new.test'), record_sighting('b@new.test', 1)")
    owner.execute("SELECT assign_alias('c@new.test', 'a@new.test')")
    done = bascule("domain", "remove", "new.test")
    assert (done.exit_code, "new.test is known here no more" in done.output) == (0, True)
    assert owner.execute("SELECT name FROM domain").fetchall() == [("lab.test",)]
    events = owner.execute("SELECT event FROM journal WHERE domain = 'new.test' ORDER BY id DESC LIMIT 1").fetchall()
    assert events == [("removed",)]


def test_a_domain_whose_users_move_stays(bascule: Bascule, owner: Connection) -> None:
    owner.execute("SELECT request_migration('alice@lab.test', 'portal', 'sealed')")
    done = bascule("domain", "remove", "lab.test")
    assert done.exit_code == 1
    assert "lab.test cannot be taken out: alice@lab.test moved, or on the move" in done.output
    owner.execute("SELECT give_up('alice@lab.test', 'x')")
    assert bascule("domain", "remove", "lab.test").exit_code == 0


def test_a_changed_legacy_host_is_told_with_what_the_database_says_of_it(bascule: Bascule, owner: Connection) -> None:
    """A notice of the database, on what it erased for instance, reaches the administrator."""
    owner.execute(
        "CREATE FUNCTION speak() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE NOTICE 'two passwords are erased' USING HINT = 'Ask for them again.'; RETURN NEW; END $$"
    )
    owner.execute("CREATE TRIGGER speak BEFORE UPDATE ON domain FOR EACH ROW EXECUTE FUNCTION speak()")
    try:
        done = bascule("domain", "set", "lab.test", "--imap-host", "other.test")
    finally:
        owner.execute("DROP TRIGGER speak ON domain; DROP FUNCTION speak")
    assert "two passwords are erased\nAsk for them again.\n" in done.output
    assert "lab.test: imap_host imap.old.test -> other.test" in done.output


def test_words_of_a_server_cannot_move_the_cursor(bascule: Bascule, owner: Connection) -> None:
    owner.execute("SELECT request_migration('alice@lab.test', 'portal', 'sealed')")
    owner.execute("UPDATE mailbox SET last_error = E'a \x1b[2Jb [gmail] [/x] \u202ec', last_error_at = now()")
    shown = bascule("status", "lab.test").output
    assert "a \\x1b[2Jb [gmail] [/x] \\u202ec" in shown
    assert "\x1b" not in shown


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
        (("domain", "set", "new.test", "--connections", "3"), "no domain new.test is known here"),
        (("domain", "set", "lab.test", "--store", "x"), "no store 'x' is known"),
        (("domain", "remove", "new.test"), "no domain new.test is known here"),
        (("domain", "show", "new.test"), "no domain new.test is known here"),
        (("check", "lab.test", "--only", "no.such"), "there is no check no.such"),
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
    url = bascule("activate", "new.test").stdout.strip()
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


def test_a_verification_that_no_worker_does_in_time_is_not_waited_for(
    bascule: Bascule, owner: Connection, acknowledge: Callable[[int, int], None]
) -> None:
    mailbox = int(value(owner, "SELECT request_migration('alice@lab.test', 'portal', 'sealed')"))
    owner.execute("SELECT begin_copy(%s)", (mailbox,))
    refused = bascule("verify", "alice@lab.test", "--patience", "0")
    assert (refused.exit_code, "it is verified before it moves" in refused.output) == (1, True)
    epoch = int(value(owner, "SELECT begin_cutover(%s)", mailbox))
    acknowledge(mailbox, epoch)
    report = json.dumps({"separator": "/", "prefix": "", "folders": []})
    owner.execute("SELECT finish_cutover(%s, %s, '{ARGON2ID}x', %s)", (mailbox, epoch, report))
    late = bascule("verify", "Alice@lab.test", "--patience", "0")
    assert late.exit_code == 1
    assert "has not been verified within 0 s; it is done as soon as a worker is free" in late.output
    assert value(owner, "SELECT count(*) FROM queue.procrastinate_jobs WHERE task_name = 'verify'") == 1


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
    [
        ("alias", "info@lab.test"),
        ("alias", "a@lab.test", "b@lab.test", "--remove"),
        ("waive", "a@lab.test"),
        ("domain", "set", "lab.test"),
        ("check",),
        ("check", "lab.test", "--host"),
    ],
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


def test_activation_is_refused_by_what_a_node_found(bascule: Bascule, postgres: Postgres, owner: Connection) -> None:
    """Wherever the command is run: the node sees its own Postfix."""
    bascule("domain", "add", "new.test", *PREPARE)
    found = [{"name": "postfix.domain-class", "domain": "new.test", "level": "wrong", "text": "it is in mydestination"}]
    with psycopg.connect(postgres.dsn("bascule_policy_daemon"), autocommit=True) as node:
        node.execute("SELECT bascule.record_findings('mx1', %s)", (json.dumps(found),))
    refused = bascule("activate", "new.test")
    assert refused.exit_code == 1
    assert "new.test is not activated:\nmx1 says: it is in mydestination (bascule.findings)" in refused.output
    assert bascule("activate", "new.test", "--force").exit_code == 1  # no reason
    assert owner.execute("SELECT mode FROM domain WHERE name = 'new.test'").fetchall() == [("prepared",)]
    forced = bascule("activate", "new.test", "--force", "--reason", "it goes tonight")
    assert (forced.exit_code, "/m/" in forced.stdout) == (0, True)
    rows = owner.execute("SELECT reason FROM journal WHERE event = 'activated by force'").fetchall()
    assert rows == [("it goes tonight\nbascule.findings: mx1 says: it is in mydestination",)]


def test_activation_is_refused_where_the_legacy_server_is_a_store(bascule: Bascule, owner: Connection) -> None:
    """As after its name was pointed here."""
    bascule("domain", "add", "new.test", *PREPARE)
    bascule("store", "second", "inet:store2.test:24", "--login-host", "IMAP.old.test")
    refused = bascule("activate", "new.test")
    assert refused.exit_code == 1
    assert "the legacy server is said to be at imap.old.test:993, and that is the store second" in refused.output
    assert owner.execute("SELECT mode FROM domain WHERE name = 'new.test'").fetchall() == [("prepared",)]


def silenced(owner: Connection, *nodes: str) -> None:
    owner.execute("UPDATE node SET heartbeat_at = now() - interval '16 seconds' WHERE name = ANY (%s)", (list(nodes),))


def test_silent_nodes_are_named_with_what_to_do(bascule: Bascule, owner: Connection) -> None:
    said = "gives no sign of life"
    assert said not in bascule("status").output + bascule("status", "lab.test").output
    silenced(owner, "store")
    for done in (bascule("status"), bascule("status", "lab.test"), bascule("node", "list")):
        assert done.exit_code == 0, done.output
        assert "authenticator on store gives no sign of life since" in done.output
        assert "bascule node forget store authenticator --reason WHY" in done.output
        assert "policy_daemon on mx gives" not in done.output
    told = json.loads(bascule("status", "lab.test", "--json").output)["silent"]
    assert [(each["part"], each["node"]) for each in told] == [("authenticator", "store")]
    owner.execute("DELETE FROM node WHERE name = 'mx'")
    assert (
        "no policy_daemon runs on any host: no mailbox flips -> Start bascule-policy-daemon" in bascule("status").output
    )


def test_nodes_are_listed(bascule: Bascule, owner: Connection) -> None:
    silenced(owner, "store")
    listed = bascule("node", "list").output
    assert "policy_daemon on mx: alive" in listed
    assert "authenticator on store: alive" not in listed
    parts = json.loads(bascule("node", "list", "--json").output)
    assert [(each["part"], each["name"], each["alive"]) for each in parts] == [
        ("authenticator", "store", False),
        ("policy_daemon", "mx", True),
    ]


def test_a_node_is_forgotten_by_a_command(bascule: Bascule, owner: Connection) -> None:
    forget = ("node", "forget", "mx", "policy_daemon", "--reason")
    alive = bascule(*forget, "burnt")
    assert (alive.exit_code, "policy_daemon on mx is alive" in alive.output) == (1, True)
    silenced(owner, "mx", "store")
    assert bascule("node", "forget", "mx", "policy_daemon").exit_code == 2, "without a reason"
    assert bascule(*forget, "burnt").exit_code == 0
    # Of an authenticator it is asked whether its Dovecot runs.
    asks = ("node", "forget", "store", "authenticator", "--reason", "burnt")
    refused = bascule(*asks, stdin="n\n")
    assert (refused.exit_code, "only if no Dovecot runs there" in refused.output) == (1, True)
    assert owner.execute("SELECT name FROM node").fetchall() == [("store",)]
    assert bascule(*asks, "--yes").exit_code == 0
    assert owner.execute("SELECT name FROM node").fetchall() == []
    told = owner.execute("SELECT reason FROM journal WHERE event = 'node forgotten' ORDER BY id").fetchall()
    assert told == [("policy_daemon on mx: burnt",), ("authenticator on store: burnt",)]
    unknown = bascule(*asks, "--yes")
    assert (unknown.exit_code, "no authenticator on store is known" in unknown.output) == (1, True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("move",), "Name whom to move"),
        (("move", "anna@lab.test", "--at", "2020-01-01T00:00"), "it is past"),
        (("move", "anna@lab.test", "--at", "tomorrow"), "write it as 2026-11-28T22:00"),
        (("move", "anna@lab.test", "--at", "2126-01-01T00:00", "--later"), "either --at or --later"),
        (("password", "import", "lab.test"), "Missing option"),
    ],
)
def test_a_move_on_word_is_told_what_is_wrong_with_it(
    bascule: Bascule, owner: Connection, arguments: tuple[str, ...], words: str
) -> None:
    done = bascule(*arguments)
    assert done.exit_code == 2
    assert words in done.output
    assert owner.execute("SELECT FROM mailbox").fetchall() == []


def test_who_cannot_move_on_word_is_told_and_the_others_go_on(bascule: Bascule, owner: Connection) -> None:
    owner.execute("UPDATE domain SET copy_login = 'master', sealed_copy_login = 'sealed'")
    owner.execute(
        "SELECT expect('anna@lab.test'), expect('bert@lab.test'), assign_alias('info@lab.test', 'anna@lab.test')"
    )
    for name in ("anna", "bert"):
        owner.execute("SELECT request_migration(%s, 'portal', 'sealed')", (f"{name}@lab.test",))
    unknown = bascule("move", "x@elsewhere.test")
    assert (unknown.exit_code, "no domain elsewhere.test is known" in unknown.output) == (1, True)
    done = bascule("move", "anna@lab.test", "bert@lab.test", "--at", "2126-01-01T00:00+00:00")
    assert done.exit_code == 0, done.output
    assert "2 moves" in done.output
    assert value(owner, "SELECT min(flip_at) = '2126-01-01T00:00+00:00' FROM mailbox")
    status = bascule("status", "lab.test")
    assert "flips at 2126-01-01 00:00" in status.output
    json.loads(bascule("status", "lab.test", "--json").output)
    bascule("move", "anna@lab.test", "--later")
    assert "flips later" in bascule("status", "lab.test").output


def test_a_name_there_is_told_with_who_is_expected(bascule: Bascule, owner: Connection) -> None:
    assert bascule("expect", "anna@lab.test", "--login", "OLD\\anna").exit_code == 0
    assert value(owner, "SELECT legacy_login FROM mailboxes") == "OLD\\anna"
    refused = bascule("expect", "bert@lab.test", "--login", "a\tb")
    assert (refused.exit_code, "control character" in refused.output) == (1, True)
    assert value(owner, "SELECT count(*) FROM mailbox") == 1, "nothing was changed"


# Rules for folders --------------------------------------------------------------------------


def test_rules_for_folders_are_added_listed_and_removed(bascule: Bascule, owner: Connection) -> None:
    for arguments in (
        ("--name", "Old", "--leave-out"),
        ("--pattern", "Public/*", "--rename", "Was/*"),
        ("--special-use", "\\Junk", "--leave-out"),
        ("--name", "Gesendet", "--as", "\\Sent"),
        ("--exchange-items",),
        ("--map-special-use",),
    ):
        done = bascule("folder-rule", "add", "lab.test", *arguments)
        assert done.exit_code == 0, done.output
    assert "comes along, as Was/*" in bascule("folder-rule", "list", "lab.test").output
    listed = json.loads(bascule("folder-rule", "list", "lab.test", "--json").output)
    assert [(each["kind"], each["folder"], each["action"]) for each in listed] == [
        ("common-names", "", "copy"),
        ("exchange-items", "", "leave-out"),
        ("name", "Gesendet", "copy"),
        ("name", "Old", "leave-out"),
        ("pattern", "Public/*", "copy"),
        ("special-use", "\\Junk", "leave-out"),
    ]
    for which in (("--name", "Old"), ("--special-use", "\\Junk"), ("--map-special-use",)):
        assert bascule("folder-rule", "remove", "lab.test", *which).exit_code == 0
    assert value(owner, "SELECT count(*) FROM folder_rule") == 3


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (("lab.test", "--leave-out"), 2, "Say which folders, in one way: --name"),
        (("lab.test", "--name", "a", "--pattern", "a*", "--leave-out"), 2, "Say which folders, in one way"),
        (("lab.test", "--name", "a"), 2, "Say what is done with them"),
        (("lab.test", "--name", "", "--leave-out"), 1, "needs to say which"),
        (("lab.test", "--pattern", "a", "--leave-out"), 1, "has no * in it"),
        (("lab.test", "--special-use", "Junk", "--leave-out"), 1, "is no special use"),
        (("lab.test", "--name", "INBOX", "--leave-out"), 1, "INBOX always comes along"),
        (("lab.test", "--name", "a", "--leave-out", "--rename", "b"), 1, "left out has no name"),
        (("other.test", "--name", "a", "--leave-out"), 1, "no domain other.test is known"),
    ],
)
def test_a_rule_that_makes_no_sense_changes_nothing(
    bascule: Bascule, owner: Connection, arguments: tuple[str, ...], status: int, words: str
) -> None:
    done = bascule("folder-rule", "add", *arguments)
    assert (done.exit_code, words in done.output) == (status, True), done.output
    assert value(owner, "SELECT count(*) FROM folder_rule") == 0


def test_a_rule_that_is_not_there_is_not_removed(bascule: Bascule) -> None:
    done = bascule("folder-rule", "remove", "lab.test", "--name", "a")
    assert (done.exit_code, "has no rule for name a" in done.output) == (1, True)
    assert bascule("folder-rule", "list", "nowhere.test").exit_code == 1


def test_the_report_names_what_was_left_out(bascule: Bascule, owner: Connection, tmp_path: Path) -> None:
    owner.execute("SELECT request_migration('alice@lab.test', 'portal', 'sealed')")
    owner.execute(
        "UPDATE mailbox SET state = 'copying'; UPDATE mailbox SET state = 'cutover', cutover_deadline = now()"
    )
    owner.execute(
        "UPDATE mailbox SET state = 'local', cutover_deadline = NULL, migrated_at = now(), "
        "password_hash = '{ARGON2ID}x'"
    )
    left = [
        {"name": "Gel&APY-scht", "reason": "the rule for the name 'Gelöscht'", "messages": 1},
        {"name": "shared", "reason": "the rule for the pattern 's*'", "messages": None},
    ]
    found = json.dumps({"folders": [], "waived": [], "notes": [], "odd_sizes": []})
    owner.execute("INSERT INTO verification (mailbox_id, report) VALUES (1, %s)", (found,))
    owner.execute("SELECT set_left_out(1, %s, true)", (json.dumps(left),))
    words = [
        "left out: the folder 'Gelöscht' (1 message): the rule for the name 'Gelöscht'",
        "left out: the folder 'shared' (not counted there): the rule for the pattern 's*'",
    ]
    told = bascule("report", "lab.test").output
    assert [line in told for line in words] == [True, True], told
    assert bascule("report", "lab.test", "--html", str(tmp_path / "report.html")).exit_code == 0
    page = (tmp_path / "report.html").read_text().replace("&#39;", "'")
    assert [line in page for line in words] == [True, True]
