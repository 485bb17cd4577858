"""Rules for folders on real servers, and at a scripted Gmail and Exchange: what stays, what comes, what is named."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from bascule.lab.scripted import Exchange, Folder, Gmail, Mail, Server, mail
from bascule.lab.sites import DOMAIN, Lab, eventually, full, imap

pytestmark = pytest.mark.lab

Request = Callable[[str], None]
Await = Callable[..., None]

PATIENCE = 120  # seconds that a move may take on a busy machine


def ruled(lab: Lab, domain: str, *rule: str) -> None:
    done = lab.new.cli("folder-rule", "add", domain, *rule)
    assert done.returncode == 0, done.stdout


def subjects(port: int, address: str, password: str) -> dict[str, list[str]]:
    """What a client sees: the subjects in each folder that has some, and the names of those that have none."""
    found: dict[str, list[str]] = {}
    with imap(port, address, password) as client:
        for flags, _, name in client.list_folders():
            if {b"\\Noselect", b"\\NonExistent"} & set(flags):
                continue
            client.select_folder(name, readonly=True)
            uids = client.search()
            data = client.fetch(uids, ["BODY.PEEK[]"]) if uids else {}
            bodies = [each[b"BODY[]"].decode() for each in data.values()]
            found[name] = sorted(
                body.partition("Subject: ")[2].splitlines()[0] for body in bodies if "@far.test" in body
            )
    return found


def having(found: dict[str, list[str]]) -> dict[str, list[str]]:
    return {name: each for name, each in found.items() if each}


def moved(lab: Lab, address: str) -> None:
    """Wait until a user has moved, or something is in the way."""

    def settled() -> tuple[str, str | None] | None:
        (row,) = lab.new.sql("SELECT state, problem FROM bascule.mailboxes WHERE address = %s", address)
        return (row[0], row[1]) if row[0] == "local" or row[1] else None

    state, problem = eventually("the move", settled, PATIENCE)
    assert state == "local", problem


def swept(lab: Lab, address: str) -> None:
    """Wait for a sweep that begins now."""
    (before,) = lab.new.sql("SELECT clock_timestamp()")
    eventually("the last message", lambda: _after(lab, address, "last_message_at"), PATIENCE)
    assert lab.new.cli("retry", address).returncode == 0
    eventually("a sweep", lambda: _after(lab, address, "swept_at", before[0]), PATIENCE)


def _after(lab: Lab, address: str, column: str, moment: object = "-infinity") -> bool:
    rows = lab.new.sql(f"SELECT {column} > %s FROM bascule.mailboxes WHERE address = %s", moment, address)
    return bool(rows and rows[0][0])


def test_what_rules_leave_out_stays_from_check_to_return(lab: Lab, request_move: Request, await_state: Await) -> None:
    name, password = "ruled", lab.legacy.users["ruled"]
    with lab.legacy.client(name) as client:
        for folder in ("Ruled", "Ruled/out", "Ruled/out/deep", "Ruled/in", "Alte Post"):
            client.create_folder(folder)
            client.append(folder, mail(folder), ["\\Seen"])
        client.append("INBOX", mail("in"))
    ruled(lab, DOMAIN, "--pattern", "Ruled/out*", "--leave-out")
    ruled(lab, DOMAIN, "--name", "Alte Post", "--rename", "Old mail", "--as", "\\Archive")
    checked = lab.new.cli(
        "check", DOMAIN, "--user", full(name), "--password-file", "-", "--only", "legacy.imap.*", stdin=password + "\n"
    ).stdout
    assert "left at the legacy server: 'Ruled/out' (1), 'Ruled/out/deep' (1): the rule for the pattern" in checked
    assert "the folder 'Alte Post' is kept as 'Old mail', as a rule says" in checked
    request_move(name)
    moved(lab, full(name))
    # Rules hold as they were: these come too late.
    for rule in (("--pattern", "Ruled/out*"), ("--name", "Alte Post")):
        assert lab.new.cli("folder-rule", "remove", DOMAIN, *rule).returncode == 0
    left = "SELECT folder, messages, reason FROM bascule.left_out WHERE address = %s ORDER BY 1"
    assert lab.new.sql(left, full(name)) == [
        (folder, 1, "the rule for the pattern 'Ruled/out*'") for folder in ("Ruled/out", "Ruled/out/deep")
    ]
    report = lab.new.cli("report", DOMAIN).stdout
    assert "left out: the folder 'Ruled/out/deep' (1 message): the rule for the pattern 'Ruled/out*'" in report
    port = lab.new.dovecot.ports.imap
    here = {"INBOX": ["in"], "Ruled": ["Ruled"], "Ruled/in": ["Ruled/in"], "Old mail": ["Alte Post"]}
    assert having(subjects(port, full(name), password)) == here
    with lab.new.client(name, password) as client:
        assert {folder for flags, _, folder in client.list_folders() if b"\\Archive" in flags} == {"Old mail"}
    with lab.legacy.client(name) as client:
        client.create_folder("Ruled/outside")  # which the pattern of the flip fits, too
        for folder in ("Ruled/out", "Ruled/outside", "Alte Post", "Ruled/in"):
            client.append(folder, mail(f"late {folder}"))
    swept(lab, full(name))
    here |= {"Old mail": ["Alte Post", "late Alte Post"], "Ruled/in": ["Ruled/in", "late Ruled/in"]}
    assert having(subjects(port, full(name), password)) == here
    assert [row[0] for row in lab.new.sql(left, full(name))] == ["Ruled/out", "Ruled/out/deep", "Ruled/outside"]
    verified = lab.new.cli("verify", full(name))
    assert verified.returncode == 0, verified.stdout
    with lab.new.client(name, password) as client:
        client.append("Old mail", mail("new here"))
        client.create_folder("Ruled/out")  # of one's own, under a name that is taken there
        client.append("Ruled/out", mail("mine"))
    assert lab.new.cli("return", full(name), "--reason", "test").returncode == 0
    await_state(name, "legacy", timeout=PATIENCE)
    assert having(subjects(lab.legacy.ports.imap, full(name), password)) == {
        "INBOX": ["in"],
        "Ruled": ["Ruled"],
        "Ruled/in": ["Ruled/in", "late Ruled/in"],
        "Ruled/out": ["Ruled/out", "late Ruled/out", "mine"],
        "Ruled/out/deep": ["Ruled/out/deep"],
        "Ruled/outside": ["late Ruled/outside"],
        "Alte Post": ["Alte Post", "late Alte Post", "new here"],
    }


@contextmanager
def scripted(lab: Lab, domain: str, server: Server, *rules: tuple[str, ...]) -> Iterator[str]:
    """A domain whose legacy server is this one; the address of its user, who has moved."""
    with server:
        done = lab.new.cli(
            "domain", "add", domain, "--imap-host", "localhost", "--imap-port", str(server.port), "--imap-tls", "none",
            "--smtp-host", "127.0.0.1", "--smtp-port", str(lab.legacy.smtp_port), "--no-messages", "--no-first-login",
        )  # fmt: skip
        assert done.returncode == 0, done.stdout
        for rule in rules:
            ruled(lab, domain, *rule)
        activated = lab.new.cli("activate", domain)
        assert activated.returncode == 0, activated.stdout
        address = f"u@{domain}"
        done = lab.new.cli("request", address, "--password-file", "-", stdin="secret\n")
        assert done.returncode == 0, done.stdout

        moved(lab, address)
        yield address
        closed = lab.new.cli("close", domain, "--force", "--yes", "--reason", "seen")
        assert closed.returncode == 0, closed.stdout


def test_at_gmail_each_message_comes_once_late_ones_too(lab: Lab) -> None:
    server = Gmail()
    numbers = {
        "read": server.post("read", b"INBOX"),
        "work": server.post("work", b"INBOX", b"Work", Gmail.IMPORTANT),
        "starred": server.post("starred", Gmail.STARRED, flags=b"\\Flagged"),
        "archived": server.post("archived"),
    }
    with scripted(lab, "gmail.test", server) as address:
        port = lab.new.dovecot.ports.imap
        here = {"INBOX": ["read", "work"], "Work": ["work"], "Archive": ["archived", "starred"]}
        found = subjects(port, address, "secret")
        assert having(found) == here
        assert "[Gmail]/Starred" not in found
        with imap(port, address, "secret") as client:
            assert {name for flags, _, name in client.list_folders() if b"\\Archive" in flags} == {"Archive"}
            client.select_folder("Archive", readonly=True)
            assert sorted(client.search("FLAGGED")) == [3]  # as there
        server.post("late", b"INBOX")
        late = server.post("late work", b"Work", Gmail.IMPORTANT)
        server.post("late archived")
        server.unlabel(numbers["read"], b"INBOX")
        swept(lab, address)
        here = {
            "INBOX": ["late", "read", "work"],
            "Work": ["late work", "work"],
            "Archive": ["archived", "late archived", "starred"],
        }
        assert having(subjects(port, address, "secret")) == here
        server.unlabel(late, b"Work")
        swept(lab, address)
        assert having(subjects(port, address, "secret")) == here
        named = lab.new.sql("SELECT folder, messages FROM bascule.left_out WHERE address = %s ORDER BY 1", address)
        assert named == [("[Gmail]/Important", 1), ("[Gmail]/Starred", 1)]


@pytest.mark.parametrize("is_ruled", [True, False])
def test_exchanges_calendars_stay_where_a_rule_says_so(lab: Lab, *, is_ruled: bool) -> None:
    names = ("Kalender", "Kontakte", "Aufgaben", "Notizen", "Gesendete Elemente", "Agenda")
    folders = [Folder(name.encode(), [Mail(1, mail(name))], uidvalidity=20 + at) for at, name in enumerate(names)]
    server = Exchange([Folder(b"INBOX", [Mail(1, mail("in"))]), *folders])
    rules = [("--exchange-items",), ("--map-special-use",)] if is_ruled else []
    with scripted(lab, f"exchange-{is_ruled}.test".lower(), server, *rules) as address:
        port = lab.new.dovecot.ports.imap
        kept = {"INBOX": ["in"]} | {name: [name] for name in (names[4:] if is_ruled else names)}
        assert having(subjects(port, address, "secret")) == kept
        with imap(port, address, "secret") as client:
            sent = {name for flags, _, name in client.list_folders() if b"\\Sent" in flags and name in names}
        assert sent == ({"Gesendete Elemente"} if is_ruled else set())
        named = lab.new.sql("SELECT folder, messages FROM bascule.left_out WHERE address = %s ORDER BY 1", address)
        assert named == ([(name, 1) for name in sorted(names[:4])] if is_ruled else [])
