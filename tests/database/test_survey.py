"""``bascule survey``: what of each mailbox will not come along or look different is known before anybody moves."""

from __future__ import annotations

import json
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import Result

from bascule.check import Finding
from bascule.check.facts import Once, Output
from bascule.database import Connection, value
from bascule.lab.scripted import Command, Folder, Mail, Server, Session, mail
from bascule.survey import CHECKS
from tests.database.conftest import Bascule

LABELS = b" ".join(b"label%02d" % number for number in range(30))
DOMAIN = "moving.test"


class Mixed(Server):
    """A folder for each thing that a move changes or leaves; a master user may act as anybody."""

    capabilities = b"IMAP4rev1 AUTH=PLAIN NAMESPACE"
    namespace = b'(("" "/")) (("Other Users/" "/")) NIL'

    def on_authenticate(self, session: Session, command: Command) -> None:
        session.raw(b"+ \r\n")
        acting_as, user, password = b64decode(session.line()).split(b"\0")
        if user == b"master":
            self.logins.append((acting_as, password))
            if password == b"of the master":
                session.say(command.tag + b" OK [CAPABILITY " + self.capabilities + b"] done")
            else:
                session.no(command, b"[AUTHENTICATIONFAILED] wrong")
            return
        session.log_in(command, user, password)

    def on_status(self, session: Session, command: Command) -> None:
        if command.words[0] == b"Closed":
            session.no(command, b"[NOPERM] not yours")
        else:
            super().on_status(session, command)

    def on_open(self, session: Session, command: Command) -> None:
        if command.words[0] == b"Closed":
            session.no(command, b"[NOPERM] not yours")
        else:
            super().on_open(session, command)


@pytest.fixture
def mixed() -> Iterator[Mixed]:
    folders = [
        Folder(b"INBOX", [Mail(1, mail("small", "x"), LABELS), Mail(2, mail("large", "x" * 3_000_000))]),
        Folder(b"Projects/new", [Mail(1, mail("other", "x"))]),
        *[Folder(b"~%d" % number) for number in range(8)],
        Folder(b"Other Users/bob/Plans", [Mail(1, mail("bob's", "x"))]),
        Folder(b"Closed"),
    ]
    with Mixed(folders, {"alice": "secret", "bob": "of bob"}) as server:
        yield server


@pytest.fixture
def domain(owner: Connection, mixed: Mixed) -> None:
    owner.execute(
        "INSERT INTO domain (name, store, imap_host, imap_port, imap_tls, smtp_host, smtp_port) "
        "VALUES (%s, 'local', '127.0.0.1', %s, 'none', '127.0.0.1', 25)",
        (DOMAIN, mixed.port),
    )


def surveyed(bascule: Bascule, *options: str, stdin: str = "") -> Result:
    return bascule("survey", DOMAIN, "--legacy-only", *options, stdin=stdin)


@pytest.mark.usefixtures("domain")
def test_one_mailbox(bascule: Bascule, owner: Connection, mixed: Mixed) -> None:
    before = [(folder.name, len(folder.mails)) for folder in mixed.folders]
    done = surveyed(bascule, "--user", f"alice@{DOMAIN}", "--password-file", "-", stdin="secret\n")
    assert done.exit_code == 1, "Closed cannot be opened"
    for words in (
        f"alice@{DOMAIN}: 3 messages in 11 folders, 2.9 MiB, the largest 2.9 MiB",
        "the folder 'Projects/new' will be 'Projects/new_' here",
        *(f"the folder '~{number}' will be '_~{number}' here" for number in range(8)),  # each, not the first five
        "the folder 'INBOX' has 30 keywords; 26 are kept",
        "1 folders that others share with the user do not come along: 'Other Users/bob/Plans'",
        "the folder 'Closed' is listed and cannot be opened",
        f"{DOMAIN}: 1 mailboxes, 3 messages, 2.9 MiB",
        "1 cannot be moved as they are",
    ):
        assert words in done.output, (words, done.output)
    assert [(folder.name, len(folder.mails)) for folder in mixed.folders] == before
    told = b" ".join(mixed.log).upper()
    assert b"EXAMINE" in told
    assert not any(verb in told for verb in (b"SELECT", b"APPEND", b"STORE", b"EXPUNGE", b"BODY[]"))
    assert value(owner, "SELECT count(*) FROM mailbox") == 0, "nobody is asked to move"


@pytest.mark.usefixtures("domain", "mixed")
def test_what_a_rule_leaves_out_is_named_and_hinders_nobody(bascule: Bascule, owner: Connection) -> None:
    for folder in ("Closed", "nowhere"):
        owner.execute("SELECT add_folder_rule(%s, 'name', %s, 'leave-out')", (DOMAIN, folder))
    done = surveyed(bascule, "--user", f"alice@{DOMAIN}", "--password-file", "-", stdin="secret\n")
    assert "left at the legacy server: 'Closed' (not counted): the rule for the name 'Closed'" in done.output
    assert (done.exit_code, "nowhere" in done.output) == (0, False), done.output


@pytest.mark.usefixtures("domain")
def test_it_is_kept_and_shown_again(bascule: Bascule, owner: Connection, mixed: Mixed) -> None:
    surveyed(bascule, "--user", f"alice@{DOMAIN}", "--password-file", "-", stdin="secret\n")
    again = surveyed(bascule, "--json")
    (row,) = json.loads(again.output)
    assert (row["address"], row["messages"], row["folders"], row["level"]) == (f"alice@{DOMAIN}", 3, 11, "wrong")
    assert {Finding(**each).name for each in row["findings"]} <= set(CHECKS)
    mixed.folders[:] = [Folder(b"INBOX", [Mail(1, mail("small", "x"))])]
    mended = surveyed(bascule, "--user", f"alice@{DOMAIN}", "--password-file", "-", stdin="secret\n")
    assert (mended.exit_code, "1 move as they are" in mended.output) == (0, True), mended.output
    rows = owner.execute("SELECT address, messages, level, differences FROM surveys").fetchall()
    assert rows == [(f"alice@{DOMAIN}", 1, "good", [])]


@pytest.mark.usefixtures("domain")
def test_all_of_a_file(bascule: Bascule, owner: Connection, tmp_path: Path) -> None:
    file = tmp_path / "users.csv"
    file.write_text(f"address,password\nalice@{DOMAIN},secret\nbob@{DOMAIN},of bob\ncarol@{DOMAIN},wrong\n")
    done = surveyed(bascule, "--file", str(file))
    assert done.exit_code == 1
    assert f"{DOMAIN}: 3 mailboxes, 6 messages" in done.output
    assert "secret" not in done.output
    levels: dict[str, int] = dict(owner.execute("SELECT address, messages FROM surveys").fetchall())
    assert levels == {f"alice@{DOMAIN}": 3, f"bob@{DOMAIN}": 3, f"carol@{DOMAIN}": 0}
    ((carol,),) = owner.execute("SELECT differences FROM surveys WHERE address ~ 'carol'").fetchall()
    assert len(carol) == 1, "not tried: what follows from a wrong password is no difference of the mailbox"
    assert "refuses" in carol[0]
    file.write_text(f"address,password\nalice@{DOMAIN},\n")
    lacking = surveyed(bascule, "--file", str(file))
    assert (lacking.exit_code, "no password of alice" in lacking.output) == (1, True)


@pytest.mark.usefixtures("domain")
def test_a_whole_domain_as_a_master_user(bascule: Bascule, owner: Connection, mixed: Mixed) -> None:
    master = ("--master", "master", "--password-file", "-")
    nobody = surveyed(bascule, *master, stdin="of the master\n")
    assert (nobody.exit_code, "no mailbox of moving.test is known" in nobody.output) == (1, True)
    for name in ("alice", "bob"):
        owner.execute("SELECT expect(%s)", (f"{name}@{DOMAIN}",))
    done = surveyed(bascule, *master, stdin="of the master\n")
    assert f"{DOMAIN}: 2 mailboxes, 6 messages" in done.output
    assert {user for user, _ in mixed.logins} == {b"alice@moving.test", b"bob@moving.test"}
    refused = surveyed(bascule, *master, stdin="another\n")
    assert f"{DOMAIN}: 2 mailboxes, 0 messages" in refused.output


@pytest.mark.usefixtures("domain")
def test_what_a_copy_was_not_given_is_known(bascule: Bascule, owner: Connection, mixed: Mixed) -> None:
    mixed.folders[:] = [Folder(b"INBOX", [Mail(1, mail("small", "x"))])]
    owner.execute("SELECT expect(%s)", (f"alice@{DOMAIN}",))
    owner.execute(
        "INSERT INTO unreadable_message (mailbox_id, folder, uidvalidity, uid, reason) "
        "SELECT id, 'INBOX', 7, 9, 'it ends the session' FROM mailbox"
    )
    done = surveyed(bascule, "--user", f"alice@{DOMAIN}", "--password-file", "-", stdin="secret\n")
    assert "the legacy server did not give UID 9 of the folder 'INBOX': it ends the session" in done.output
    assert f"bascule waive-messages alice@{DOMAIN}" in done.output


@pytest.mark.usefixtures("domain")
def test_what_is_asked_wrongly(bascule: Bascule, tmp_path: Path) -> None:
    both = surveyed(bascule, "--user", f"alice@{DOMAIN}", "--file", "-")
    assert both.exit_code == 2
    foreign = surveyed(bascule, "--user", "alice@elsewhere.test", "--password-file", "-", stdin="x\n")
    assert (foreign.exit_code, "not an address of moving.test" in foreign.output) == (1, True)
    assert bascule("survey", "nowhere.test").exit_code == 1


def test_a_host_is_asked_once_for_all_mailboxes() -> None:
    class Counting:
        asked = 0

        def run(self, *command: str) -> Output:
            self.asked += 1
            return Output(0, " ".join(command), "")

    counting = Counting()
    once = Once(counting)
    assert [once.run("doveconf", "-n").text for _ in range(3)] == ["doveconf -n"] * 3
    assert once.run("postconf", "-n").text == "postconf -n"
    assert counting.asked == 2
