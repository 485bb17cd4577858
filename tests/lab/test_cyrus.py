"""A legacy server that is not Dovecot: Cyrus, with INBOX. before every folder and dots between them."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from random import Random

import pytest

from bascule.lab.mail import Ledger, Traffic, differences, identities, message, read_mailbox, send
from bascule.lab.sites import DOMAIN, CyrusSite, Lab, eventually

pytestmark = pytest.mark.lab

NAME = "cyrilla"
FOLDERS = ["INBOX.Sent", "INBOX.Sent.2019", "INBOX.&AMk-t&AOk- &- Co", "INBOX.a~b +c", "INBOX.Empty"]


@pytest.fixture(scope="module")
def cyrus() -> Iterator[Lab]:
    with Lab(CyrusSite) as running:
        running.create({NAME: "secret of cyrilla"}, {})
        running.prepare("--no-first-login")
        activated = running.new.cli("activate", DOMAIN)
        assert activated.returncode == 0, activated.stdout
        yield running


def fill(lab: Lab, ledger: Ledger, random: Random) -> None:
    with lab.legacy.client(NAME) as client:
        client.folder_encode = False
        for folder in FOLDERS:
            client.create_folder(folder)
        client.subscribe_folder(FOLDERS[0])
        for number in range(60):
            identity = ledger.give(f"{number}@cyrus.test", NAME)
            date = datetime(2009, 1, 31, 12, number % 60, tzinfo=UTC)
            flags = random.choice([(), ("\\Seen",), ("\\Answered", "$Forwarded"), ("\\Flagged", "Work")])
            folder = random.choice(["INBOX", *FOLDERS[:-1]])
            body = message(identity, f"{NAME}@{DOMAIN}", random, size=random.choice([0, 5000, 90_000]))
            client.append(folder, body, flags, date)
        client.select_folder("INBOX")
        client.delete_messages(client.search()[:1])  # marked, not expunged


def test_a_user_moves_from_cyrus_and_back(cyrus: Lab, random: Random) -> None:
    ledger = Ledger()
    fill(cyrus, ledger, random)
    user = f"{NAME}@{DOMAIN}"
    with Traffic(cyrus.new.smtp_port, [NAME], ledger):
        done = cyrus.new.cli("request", user, "--password-file", "-", stdin="secret of cyrilla\n")
        assert done.returncode == 0, done.stdout
        eventually("moved", lambda: cyrus.new.state(NAME) == "local", 20)
    eventually("no mail is under way", lambda: cyrus.new.postfix.is_empty() and cyrus.legacy.postfix.is_empty())
    with cyrus.legacy.client(NAME) as client:
        client.folder_encode = False
        before = read_mailbox(client)
        subscribed = [name for _, _, name in client.list_sub_folders()]
    for folder in before.values():
        for uid in [uid for uid, seen in folder.messages.items() if seen.message_id.startswith("bascule-last-")]:
            del folder.messages[uid]
    for folder_name, uid in cyrus.new.sql("SELECT folder, uid FROM bascule.stragglers"):
        before[folder_name].messages.pop(uid, None)
    with cyrus.new.client(NAME, "secret of cyrilla") as client:
        client.folder_encode = False
        after = read_mailbox(client)
        assert [name for _, _, name in client.list_sub_folders()] == subscribed
    assert differences(before, after) == []
    assert before.keys() == after.keys()
    ledger.compare({NAME: identities(after)}).insist()

    send(cyrus.new.smtp_port, "came-here@cyrus.test", NAME, ledger, random)
    with cyrus.new.client(NAME, "secret of cyrilla") as client:
        client.select_folder("INBOX.Sent")
        client.move(client.search()[:2], "INBOX.Empty")
    assert cyrus.new.cli("return", user, "--reason", "the test").returncode == 0
    eventually("returned", lambda: cyrus.new.state(NAME) == "legacy")
    eventually("no mail is under way", lambda: cyrus.new.postfix.is_empty() and cyrus.legacy.postfix.is_empty())
    with cyrus.legacy.client(NAME) as client:
        client.folder_encode = False
        back = read_mailbox(client)
    ledger.compare({NAME: identities(back)}).insist()
    moved = {str(each, "ascii") if isinstance(each, bytes) else each: len(seen.messages) for each, seen in back.items()}
    assert moved["INBOX.Empty"] == 2
