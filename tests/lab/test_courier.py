"""A legacy server that is neither Dovecot nor Cyrus: Courier.

Its UIDs and UIDVALIDITY are permanent from the first SELECT on, and not before; it
orders messages by the names of their files; it refuses APPEND to a folder that the
same session has open read-only; its POP3 server keeps a list of its own.
"""

from __future__ import annotations

import json
import os
import poplib
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial
from random import Random

import pytest
from imapclient import IMAPClient

from bascule.check.finding import Finding
from bascule.lab.mail import Ledger, SeenFolder, Traffic, differences, identities, message, read_mailbox, send, uidls
from bascule.lab.process import VMAIL
from bascule.lab.sites import DOMAIN, CourierSite, Lab, eventually

pytestmark = pytest.mark.lab

NAMES = ("checked", "proxied", "faithful", "unopened", "shuffled", "overtaken", "popular", "returned")
FOLDERS = ["INBOX.Sent", "INBOX.Sent.2019", "INBOX.&AMk-t&AOk- &- Co", "INBOX.a~b +c", "INBOX.Empty"]


@pytest.fixture(scope="module")
def courier() -> Iterator[Lab]:
    with Lab(CourierSite) as running:
        running.create({name: f"secret of {name}" for name in NAMES}, {})
        running.prepare("--no-first-login")
        activated = running.new.cli("activate", DOMAIN)
        assert activated.returncode == 0, activated.stdout
        yield running


def deliver(lab: Lab, name: str, file: str, body: bytes, folder: str = "") -> None:
    """Put a message into a Maildir as a delivering program does: written in tmp, renamed into new."""
    maildir = lab.legacy.maildir(name) / folder
    for part in (maildir, maildir / "cur", maildir / "new", maildir / "tmp"):
        part.mkdir(exist_ok=True)
        os.chown(part, VMAIL, VMAIL)
    path = maildir / "tmp" / file
    path.write_bytes(body.replace(b"\r\n", b"\n"))
    os.chown(path, VMAIL, VMAIL)
    path.rename(maildir / "new" / file)


def fill(lab: Lab, name: str, ledger: Ledger, random: Random, messages: int = 60) -> None:
    """Folders, flags, keywords and dates, by a client."""
    with lab.legacy.client(name) as client:
        client.folder_encode = False
        for folder in FOLDERS:
            client.create_folder(folder)
        client.subscribe_folder(FOLDERS[0])
        client.subscribe_folder(FOLDERS[2])
        for number in range(messages):
            identity = ledger.give(f"{number}-{name}@courier.test", name)
            date = datetime(2009, 1, 31, 12, number % 60, tzinfo=UTC)
            flags = random.choice([(), ("\\Seen",), ("\\Answered", "$Forwarded"), ("\\Flagged", "Work")])
            folder = random.choice(["INBOX", *FOLDERS[:-1]])
            body = message(identity, f"{name}@{DOMAIN}", random, size=random.choice([0, 5000, 90_000]))
            client.append(folder, body, flags, date)
        client.select_folder("INBOX")
        client.add_flags(client.search()[:1], ["\\Deleted"])  # marked, not expunged


def request(lab: Lab, name: str) -> None:
    done = lab.new.cli("request", f"{name}@{DOMAIN}", "--password-file", "-", stdin=lab.legacy.users[name] + "\n")
    assert done.returncode == 0, done.stdout


def await_state(lab: Lab, name: str, state: str) -> None:
    def said() -> str:
        query = "SELECT state, problem, advice FROM bascule.mailboxes WHERE address = %s"
        return str(lab.new.sql(query, f"{name}@{DOMAIN}"))

    eventually(f"{name} in state {state}: {said()}", lambda: lab.new.state(name) == state, 40)


def move(lab: Lab, name: str) -> None:
    request(lab, name)
    await_state(lab, name, "local")


def quiet(lab: Lab) -> None:
    """No mail is under way."""
    eventually("no mail is under way", lambda: lab.new.postfix.is_empty() and lab.legacy.postfix.is_empty())


def swept_again(lab: Lab, name: str, times: int = 2) -> None:
    """Wait until so many sweeps that begin from now on are done."""
    query = "SELECT swept_at FROM bascule.mailboxes WHERE address = %s"
    for _ in range(times):
        now = lab.new.sql("SELECT clock_timestamp()")[0][0]

        def done(since: datetime = now) -> bool:
            at = lab.new.sql(query, f"{name}@{DOMAIN}")[0][0]
            return at is not None and at > since

        eventually(f"{name} is swept: {lab.new.sql('SELECT address, problem FROM bascule.mailboxes')}", done)


def read(client: IMAPClient, *, readonly: bool = True) -> dict[str, SeenFolder]:
    """By the names of the folders as they are on the wire."""
    client.folder_encode = False
    return {_text(name): folder for name, folder in read_mailbox(client, readonly=readonly).items()}


def _text(name: str | bytes) -> str:
    return name.decode("ascii") if isinstance(name, bytes) else name


def here(lab: Lab, name: str) -> dict[str, SeenFolder]:
    with lab.new.client(name, lab.legacy.users[name]) as client:
        return read(client)


def there(lab: Lab, name: str) -> dict[str, SeenFolder]:
    """What the legacy server has, but for the last message; by SELECT, as every client does."""
    with lab.legacy.client(name) as client:
        found = read(client, readonly=False)
    for folder in found.values():
        for uid in [uid for uid, seen in folder.messages.items() if seen.message_id.startswith("bascule-last-")]:
            del folder.messages[uid]
    return found


def subscribed(client: IMAPClient) -> list[str]:
    client.folder_encode = False
    # \\Noselect: it is not subscribed, but something below it is (RFC 3501 section 6.3.9). Courier says so of INBOX.
    return sorted(_text(name) for flags, _, name in client.list_sub_folders() if b"\\Noselect" not in flags)


def test_check_finds_nothing_wrong(courier: Lab) -> None:
    courier.new.start_dns()
    try:
        done = courier.new.cli(
            *("check", DOMAIN, "--user", f"checked@{DOMAIN}", "--password-file", "-", "--json"),
            stdin=courier.legacy.users["checked"] + "\n",
        )
    finally:
        courier.new.dns.stop()
    findings = [Finding(**each) for each in json.loads(done.stdout)]
    assert [each.text for each in findings if each.level == "wrong"] == []
    assert done.returncode == 0
    assert courier.new.state("checked") is None


def test_who_has_not_moved_is_served_by_courier(courier: Lab, random: Random) -> None:
    name, ledger = "proxied", Ledger()
    fill(courier, name, ledger, random, 20)
    with courier.new.client(name, courier.legacy.users[name]) as client:
        assert differences(read(client), there(courier, name)) == []
    session = poplib.POP3("127.0.0.1", courier.new.dovecot.ports.pop3, timeout=30)
    session.user(f"{name}@{DOMAIN}")
    session.pass_(courier.legacy.users[name])
    assert session.stat()[0] == len(there(courier, name)["INBOX"].messages)
    session.quit()


def test_a_mailbox_is_moved_faithfully(courier: Lab, random: Random) -> None:
    name, ledger = "faithful", Ledger()
    fill(courier, name, ledger, random)
    with courier.legacy.client(name) as client:
        wanted = subscribed(client)
    with Traffic(courier.new.smtp_port, [name], ledger):
        move(courier, name)
    quiet(courier)
    swept_again(courier, name)
    before, after = there(courier, name), here(courier, name)
    for folder, uid in courier.new.sql(
        "SELECT folder, uid FROM bascule.stragglers WHERE address = %s", f"{name}@{DOMAIN}"
    ):
        before[folder].messages.pop(uid, None)
    assert differences(before, after) == []
    assert before.keys() == after.keys()
    with courier.new.client(name, courier.legacy.users[name]) as client:
        assert subscribed(client) == wanted
    ledger.compare({name: identities(after)}).insist()
    written = "SELECT last_message_at IS NOT NULL, problem FROM bascule.mailboxes WHERE address = %s"
    assert courier.new.sql(written, f"{name}@{DOMAIN}") == [(True, None)]
    with courier.legacy.client(name) as client:
        client.select_folder("INBOX")
        assert len(client.search(["HEADER", "Message-ID", "<bascule-last-"])) == 1
        unseen = client.search(["UNSEEN", "NOT", "HEADER", "Message-ID", "<bascule-last-"])
        mine = {uid for uid, seen in after["INBOX"].messages.items() if "\\Seen" not in seen.flags}
        assert mine & before["INBOX"].messages.keys() <= set(unseen), "reading marks nothing as read"


def test_folders_that_nobody_ever_opened(courier: Lab, random: Random) -> None:
    """A POP3 user, and a folder that only a filter has filled: without UIDs until somebody SELECTs them."""
    name, ledger = "unopened", Ledger()
    for number in range(12):
        for folder in ("", ".Filtered"):
            identity = ledger.give(f"{number}{folder}-{name}@courier.test", name)
            file = f"{1_600_000_000 + number}.M{number}P1.elsewhere"
            deliver(courier, name, file, message(identity, f"{name}@{DOMAIN}", random), folder)
    move(courier, name)
    after = here(courier, name)
    ledger.compare({name: identities(after)}).insist()
    assert differences(there(courier, name), after) == []
    send(courier.legacy.smtp_port, f"late@{name}.test", name, ledger, random)
    identity = ledger.give(f"filtered@{name}.test", name)
    deliver(courier, name, "1600000100.M1P1.elsewhere", message(identity, f"{name}@{DOMAIN}", random), ".Filtered")
    eventually("it is swept", lambda: not ledger.compare({name: identities(here(courier, name))}).lost)
    swept_again(courier, name)
    ledger.compare({name: identities(here(courier, name))}).insist()


def arrived(lab: Lab, name: str, identity: str) -> bool:
    return identities(here(lab, name))[identity] > 0


def test_late_mail_in_any_order_comes_once(courier: Lab, random: Random) -> None:
    """Exim does not pad microseconds: of two messages of one second the later one may sort first."""
    name, ledger = "shuffled", Ledger()
    fill(courier, name, ledger, random, 12)
    move(courier, name)
    swept_again(courier, name)
    # And one from a host whose clock is behind.
    for file in ("1600000005.H99999P1.host", "1600000005.H100000P2.host", "1500000000.H1P1.late-clock"):
        identity = ledger.give(f"{file}@{name}.test", name)
        deliver(courier, name, file, message(identity, f"{name}@{DOMAIN}", random))
        eventually(f"{file} is swept", partial(arrived, courier, name, identity), 30)
    swept_again(courier, name, 3)
    ledger.compare({name: identities(here(courier, name))}).insist()


def test_late_mail_that_sorts_before_what_the_final_pass_saw(courier: Lab, random: Random) -> None:
    name, ledger = "overtaken", Ledger()
    for number in range(6):
        identity = ledger.give(f"{number}-{name}@courier.test", name)
        deliver(courier, name, f"1600000000.M{number}P1.elsewhere", message(identity, f"{name}@{DOMAIN}", random))
    request(courier, name)
    await_state(courier, name, "local")
    courier.new.worker.stop()
    for file in ("1600000000.M00P1.elsewhere", "1599999999.M9P1.elsewhere", "1600000000.M51P1.elsewhere"):
        identity = ledger.give(f"{file}@{name}.test", name)
        deliver(courier, name, file, message(identity, f"{name}@{DOMAIN}", random))
    courier.new.worker.start()
    eventually("all are swept", lambda: not ledger.compare({name: identities(here(courier, name))}).lost, 30)
    swept_again(courier, name, 3)
    ledger.compare({name: identities(here(courier, name))}).insist()


def test_pop3_clients_fetch_nothing_again(courier: Lab, random: Random) -> None:
    """Also where the POP3 server counts the messages in another order than their UIDs have."""
    name, ledger, password = "popular", Ledger(), courier.legacy.users["popular"]
    for batch in range(4):
        # Each is given its UID before the next one comes, which sorts before it.
        for number in reversed(range(6)):
            identity = ledger.give(f"{batch}-{number}-{name}@courier.test", name)
            body = message(identity, f"{name}@{DOMAIN}", random, size=number * 1000)
            deliver(courier, name, f"{1_600_000_000 + batch}.M{number}P1.elsewhere", body)
            with courier.legacy.client(name) as client:
                client.select_folder("INBOX")
        if batch == 1:
            uidls(courier.legacy.ports.pop3, name, password)
    before = uidls(courier.legacy.ports.pop3, name, password)
    assert len(before) == 24
    move(courier, name)
    assert courier.new.sql("SELECT notes FROM bascule.verifications WHERE address = %s", f"{name}@{DOMAIN}") == [([],)]
    after = uidls(courier.new.dovecot.ports.pop3, name, password)
    assert {identity: after.get(identity) for identity in before} == before


def content(mailbox: dict[str, SeenFolder]) -> dict[str, Counter[tuple[str, frozenset[str], str]]]:
    """What each folder holds, whatever the UIDs are."""
    return {
        folder: Counter((each.message_id, each.flags, each.digest) for each in seen.messages.values())
        for folder, seen in mailbox.items()
    }


def test_a_user_goes_back_and_moves_again(courier: Lab, random: Random) -> None:
    name, ledger = "returned", Ledger()
    fill(courier, name, ledger, random)
    deliver(
        courier,
        name,
        "1600000000.M1P1.elsewhere",
        message(ledger.give(f"filtered@{name}.test", name), f"{name}@{DOMAIN}", random),
        ".Filtered",
    )
    move(courier, name)
    swept_again(courier, name)
    send(courier.legacy.smtp_port, f"late@{name}.test", name, ledger, random)
    eventually("it is swept", partial(arrived, courier, name, f"late@{name}.test"))
    send(courier.new.smtp_port, f"came-here@{name}.test", name, ledger, random)
    eventually("it is delivered", partial(arrived, courier, name, f"came-here@{name}.test"))
    with courier.new.client(name, courier.legacy.users[name]) as client:
        client.select_folder("INBOX.Sent")
        uids = client.search()
        client.move(uids[:2], "INBOX.Empty")
        client.add_flags(uids[2:4], ["\\Flagged", "$Label2"])
        client.create_folder("INBOX.Made here")
        client.append(
            "INBOX.Made here", message(ledger.give(f"made@{name}.test", name), "x@lab.test", random), ["todo"]
        )
    mine = content(here(courier, name))
    assert courier.new.cli("return", f"{name}@{DOMAIN}", "--reason", "the test").returncode == 0
    await_state(courier, name, "legacy")
    quiet(courier)
    back = there(courier, name)
    ledger.compare({name: identities(back)}).insist()
    assert content(back) == mine
    move(courier, name)
    quiet(courier)
    after = here(courier, name)
    assert differences(back, after) == []
    ledger.compare({name: identities(after)}).insist()
