"""What a client knew before the move, it finds after it; what cannot be read is named and waited for."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import pytest

from bascule.address import Address
from bascule.credential import Password
from bascule.lab.mail import (
    Ledger,
    differences,
    fill_mailbox,
    identities,
    legacy_maildir,
    message,
    read_mailbox,
    send,
    uidls,
)
from bascule.lab.process import VMAIL, program
from bascule.lab.sites import DOMAIN, Lab, eventually
from bascule.legacy import LegacySettings, Service, Trust
from bascule.migrator.sieve import read_scripts

pytestmark = pytest.mark.lab

Request = Callable[[str], None]
Await = Callable[..., None]

SCRIPT = b'require ["fileinto"];\r\nif header :contains "subject" "bridge" { fileinto "Archive"; }\r\n'


def test_what_clients_rely_on_is_kept(
    lab: Lab, ledger: Ledger, random: Random, request_move: Request, await_state: Await
) -> None:
    name, password = "clientele", lab.legacy.users["clientele"]
    fill_mailbox(lab.legacy, name, ledger, random, messages=30)
    home = lab.legacy.dovecot.folder / "mail" / name
    (home / "sieve").mkdir()
    (home / "sieve" / "to the archive.sieve").write_bytes(SCRIPT)
    (home / ".dovecot.sieve").symlink_to("sieve/to the archive.sieve")
    for path in (home / "sieve", home / "sieve" / "to the archive.sieve"):
        subprocess.run(["chown", f"{VMAIL}:{VMAIL}", str(path)], check=True)
    with lab.legacy.client(name) as client:
        before = client.folder_status("INBOX", ["HIGHESTMODSEQ"])[b"HIGHESTMODSEQ"]
    uidls_before = uidls(lab.legacy.ports.pop3, name, password)
    request_move(name)
    await_state(name)
    assert lab.new.sql("SELECT notes FROM bascule.verifications WHERE address = %s", f"{name}@lab.test") == [([],)]
    uidls_after = uidls(lab.new.dovecot.ports.pop3, name, password)
    assert {identity: uidls_after[identity] for identity in uidls_before} == uidls_before
    with lab.new.client(name, password) as client:
        uses = {folder: flags for flags, _, folder in client.list_folders()}
        assert b"\\Trash" in uses["Trash"]
        assert b"\\Sent" in uses["Sent"]
        assert client.folder_status("INBOX", ["HIGHESTMODSEQ"])[b"HIGHESTMODSEQ"] > before
        client.enable("CONDSTORE")
        client.select_folder("INBOX")
        uid = client.search()[0]
        client.add_flags([uid], ["\\Answered", "changed-here"])
        changed = client.fetch(client.search(), ["FLAGS"], [f"CHANGEDSINCE {before}"])
        assert any(b"changed-here" in data[b"FLAGS"] for data in changed.values())
    legacy = LegacySettings(DOMAIN, "localhost", Service(1, "none"), "127.0.0.1", 25)
    service = Service(lab.new.dovecot.ports.sieve, "starttls")
    trust = Trust(lab.new.settings.legacy.ca_file, 10)
    scripts = read_scripts(legacy, service, trust, Address(name, DOMAIN), Password(password))
    assert scripts.bodies == {"to the archive": SCRIPT.replace(b"\r\n", b"\n")}  # as files have it here
    assert scripts.active == "to the archive"


def synchronise(port: int, name: str, password: str, cache: Path) -> str:
    """Bring a local cache up to date with mbsync, a mail client that keeps to UIDs; what went over the wire."""
    settings = cache / "mbsyncrc"
    settings.write_text(
        f'IMAPStore far\nHost 127.0.0.1\nPort {port}\nUser {name}@{DOMAIN}\nPass "{password}"\nSSLType None\n\n'
        f"MaildirStore near\nPath {cache}/mail/\nInbox {cache}/mail/INBOX\nSubFolders Verbatim\n\n"
        "Channel all\nFar :far:\nNear :near:\nPatterns *\nCreate Near\nSync Pull\nSyncState *\n"
    )
    (cache / "mail").mkdir(exist_ok=True)
    done = subprocess.run(
        [program("mbsync"), "-c", str(settings), "-Dn", "all"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_client_with_a_cache_fetches_no_body_again(
    lab: Lab,
    tmp_path: Path,
    ledger: Ledger,
    random: Random,
    request_move: Request,
    await_state: Await,
) -> None:
    name, password, port = "cached", lab.legacy.users["cached"], lab.new.dovecot.ports.imap
    fill_mailbox(lab.legacy, name, ledger, random, messages=50)
    assert synchronise(port, name, password, tmp_path).count("BODY.PEEK[]") > 40
    assert "BODY.PEEK[]" not in synchronise(port, name, password, tmp_path)
    before = sorted(path.name for path in (tmp_path / "mail").rglob("cur/*"))
    request_move(name)
    await_state(name)
    after_the_move = synchronise(port, name, password, tmp_path)
    assert "UID FETCH" in after_the_move
    assert "BODY.PEEK[]" not in after_the_move
    assert sorted(path.name for path in (tmp_path / "mail").rglob("cur/*")) == before


def test_a_message_that_cannot_be_read_is_named_and_waited_for(
    lab: Lab, ledger: Ledger, random: Random, request_move: Request, await_state: Await
) -> None:
    name, user = "unreadable", f"unreadable@{DOMAIN}"
    maildir = legacy_maildir(lab.legacy, name)
    for number in range(30):
        path = maildir / "cur" / f"{1_100_000_000 + number}.{number}.lab:2,S"
        body = message(f"{number}@unreadable.test", user, random)
        path.write_bytes(body)
        if number in {7, 20}:
            path.chmod(0)  # Dovecot runs as an unprivileged user: [SERVERBUG]
        else:
            subprocess.run(["chown", f"{VMAIL}:{VMAIL}", str(path)], check=True)
            ledger.give(f"{number}@unreadable.test", name)
    request_move(name)
    query = "SELECT folder, uid, reason FROM bascule.unreadable WHERE address = %s ORDER BY uid"
    rows = eventually("two are named", lambda: lab.new.sql(query, user))
    assert [(folder, uid) for folder, uid, _ in rows] == [("INBOX", 8), ("INBOX", 21)]
    assert all(reason for _, _, reason in rows)
    problem = lab.new.sql("SELECT problem FROM bascule.mailboxes WHERE address = %s", user)[0][0]
    assert "does not give every message" in problem
    assert lab.new.state(name) == "copying"
    # One of them is mended there, the other is waived.
    mended = next(path for path in (maildir / "cur").iterdir() if f".{7}.lab" in path.name)
    mended.chmod(0o600)
    subprocess.run(["chown", f"{VMAIL}:{VMAIL}", str(mended)], check=True)
    ledger.give("7@unreadable.test", name)
    waived = lab.new.cli("waive-messages", user, "--folder", "INBOX", "--uid", "21", "--reason", "it is a joke")
    assert "moves without 1 message" in waived.stdout
    await_state(name)
    with lab.new.client(name, lab.legacy.users[name]) as client:
        ledger.compare({name: identities(read_mailbox(client))}).insist()
    written = "SELECT last_message_at FROM bascule.mailboxes WHERE address = %s AND last_message_at IS NOT NULL"
    eventually("the last message is written", lambda: lab.new.sql(written, user))
    refused = lab.new.cli("waive-messages", user, "--reason", "none is left")
    assert refused.returncode == 1
    assert "has no such unreadable message" in refused.stdout


@contextmanager
def storage(lab: Lab, location: str) -> Iterator[None]:
    """The new side keeps its mailboxes in another format."""
    settings_file, config = lab.new.settings_file, lab.new.dovecot.config
    texts = {path: path.read_text() for path in (settings_file, config)}
    try:
        for path, text in texts.items():
            path.write_text(text.replace("maildir:~/Maildir:LAYOUT=fs", location))
        lab.new.dovecot.stop()
        lab.new.dovecot.start()
        lab.new.worker.stop()
        lab.new.worker.start()
        yield
    finally:
        for path, text in texts.items():
            path.write_text(text)
        lab.new.dovecot.stop()
        lab.new.dovecot.start()
        lab.new.worker.stop()
        lab.new.worker.start()


@pytest.mark.parametrize("driver", ["mdbox", "sdbox"])
def test_mailboxes_may_be_kept_in_dbox(
    lab: Lab, driver: str, ledger: Ledger, random: Random, request_move: Request, await_state: Await
) -> None:
    name, user = f"kept-in-{driver}", f"kept-in-{driver}@{DOMAIN}"
    password = lab.legacy.users[name]
    fill_mailbox(lab.legacy, name, ledger, random, messages=40)
    labels = [f"label{number:02}" for number in range(30)]  # a Maildir keeps 26
    with lab.legacy.client(name) as client:
        client.create_folder("Marked * of old")
        for identity, marks in ((f"marked@{name}.test", [*labels, "\\Seen"]), (f"unmarked@{name}.test", [])):
            client.append("Marked * of old", message(identity, user, random), flags=marks)
            ledger.give(identity, name)
        before = read_mailbox(client)
    with storage(lab, f"{driver}:~/{driver}"):
        request_move(name)
        await_state(name)
        home = lab.new.folder / "mail" / DOMAIN / name
        assert (home / driver).is_dir()
        with lab.new.client(name, password) as client:
            after = read_mailbox(client)
            assert client.select_folder("INBOX")[b"UIDNEXT"] > max(client.search()) + 900  # the gap
        assert differences(before, after) == []
        with lab.new.client(name, password) as client:
            client.select_folder("Marked * of old", readonly=True)
            flags = [
                set(each[b"FLAGS"]) - {b"\\Recent"}
                for _, each in sorted(client.fetch(client.search(), ["FLAGS"]).items())
            ]
            assert flags == [{b"\\Seen", *(label.encode() for label in labels)}, set()]
        notes = lab.new.sql("SELECT notes FROM bascule.verifications WHERE address = %s", user)
        assert "keyword" not in str(notes)
        eventually("the staging area is removed", lambda: not _staging(home).exists())
        send(lab.legacy.smtp_port, f"late@{name}.test", name, ledger, random)
        eventually("a straggler is brought", lambda: _has(lab, name, f"late@{name}.test"))
        send(lab.new.smtp_port, f"new@{name}.test", name, ledger, random)
        eventually("new mail is delivered", lambda: _has(lab, name, f"new@{name}.test"))
        with lab.new.client(name, password) as client:
            ledger.compare({name: identities(read_mailbox(client))}).insist()
        assert lab.new.cli("return", user, "--reason", "the test").returncode == 0
        await_state(name, "legacy")
    with lab.legacy.client(name) as client:
        ledger.compare({name: identities(read_mailbox(client))}).insist()


def _staging(home: Path) -> Path:
    return home / ".bascule-staging"


def _has(lab: Lab, name: str, identity: str) -> bool:
    with lab.new.client(name, lab.legacy.users[name]) as client:
        client.select_folder("INBOX", readonly=True)
        return bool(client.search(["HEADER", "Message-ID", identity]))
