"""Moving users while things go wrong: whatever is killed, the end is the same."""

from __future__ import annotations

import os
import smtplib
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random

import pytest
from imapclient.exceptions import LoginError

from bascule.lab.ghost import cutover_budget, ghost, slow_line
from bascule.lab.mail import (
    Count,
    Ledger,
    Traffic,
    copies,
    delivered_files,
    differences,
    fill_mailbox,
    found_in_new,
    identities,
    legacy_maildir,
    message,
    read_mailbox,
    send,
)  # fmt: skip
from bascule.lab.postgres import Postgres
from bascule.lab.process import VMAIL, Daemon
from bascule.lab.servers import Dovecot
from bascule.lab.sites import DOMAIN, Lab, LegacySite, NewSite, eventually
from bascule.lab.visitor import Visitor

pytestmark = pytest.mark.lab

Request = Callable[[str], None]
Await = Callable[..., None]


def put_messages(legacy: LegacySite, name: str, count: int, ledger: Ledger) -> None:
    """Many small messages, written into the legacy Maildir at once."""
    maildir = legacy_maildir(legacy, name)
    random = Random(1)  # noqa: S311 (mail, not keys)
    for number in range(count):
        identity = ledger.give(f"{number}-{name}@many.test", name)
        path = maildir / "cur" / f"{1_100_000_000 + number}.{number}.lab:2,S"
        path.write_bytes(message(identity, f"{name}@{DOMAIN}", random))
        os.chown(path, VMAIL, VMAIL)


def insist_on_the_same(lab: Lab, name: str, ledger: Ledger) -> None:
    """The mailbox here is the legacy one, but for the last message there and what came since here."""
    with lab.legacy.client(name) as client:
        before = read_mailbox(client)
    for folder in before.values():
        for uid in [uid for uid, seen in folder.messages.items() if seen.message_id.startswith("bascule-last-")]:
            del folder.messages[uid]
    with lab.new.client(name, lab.legacy.users[name]) as client:
        after = read_mailbox(client)
    assert differences(before, after) == []
    count = ledger.compare({name: identities(after)})
    count.insist()
    assert count.found == count.sent > 0


def test_a_mailbox_is_moved_faithfully(
    lab: Lab, ledger: Ledger, random: Random, request_move: Request, await_state: Await
) -> None:
    fill_mailbox(lab.legacy, "faithful", ledger, random, messages=60)
    with lab.legacy.client("faithful") as client:
        subscribed = sorted(name for _, _, name in client.list_sub_folders())
        listed = sorted((name, b"\\Noselect" in flags) for flags, _, name in client.list_folders())
    request_move("faithful")
    await_state("faithful")
    insist_on_the_same(lab, "faithful", ledger)
    with lab.new.client("faithful", lab.legacy.users["faithful"]) as client:
        assert sorted(name for _, _, name in client.list_sub_folders()) == subscribed
        assert sorted((name, b"\\Noselect" in flags) for flags, _, name in client.list_folders()) == listed
        selected = client.select_folder("INBOX")
        assert selected[b"UIDNEXT"] > max(client.search()) + 900  # the gap
    verified = lab.new.sql("SELECT messages FROM bascule.verifications WHERE address = 'faithful@lab.test'")
    assert verified == [(len(ledger.expected),)]


def test_a_worker_killed_during_the_copy_goes_on_where_it_stopped(
    lab: Lab, ledger: Ledger, request_move: Request, await_state: Await
) -> None:
    put_messages(lab.legacy, "killed", 2500, ledger)
    mailbox = lab.new.folder / "mail" / DOMAIN / "killed" / "Maildir"
    with slow_line(lab.new, 10_000_000):
        request_move("killed")
        for wanted in (200, 900):
            eventually(f"{wanted} messages copied", partial(_has_copied, mailbox, wanted))
            lab.new.worker.kill()
            try:
                assert lab.new.state("killed") == "copying"
                assert wanted <= _count(mailbox) < 2500
            finally:
                lab.new.worker.start()
    oldest = {path.name.partition(":")[0]: path.stat().st_ino for path in delivered_files(mailbox)}
    await_state("killed")
    insist_on_the_same(lab, "killed", ledger)
    now = {path.name.partition(":")[0]: path.stat().st_ino for path in delivered_files(mailbox)}
    assert all(now[name] == inode for name, inode in oldest.items()), "what was copied is not copied again"


def _has_copied(mailbox: Path, wanted: int) -> bool:
    return _count(mailbox) >= wanted


def _count(mailbox: Path) -> int:
    try:
        return len(os.listdir(os.path.join(mailbox, "cur")))  # noqa: PTH118, PTH208 (a race with the writer)
    except FileNotFoundError:
        return 0


def test_two_workers_at_one_store_do_the_work_once(
    lab: Lab, ledger: Ledger, random: Random, request_move: Request, await_state: Await
) -> None:
    fill_mailbox(lab.legacy, "raced", ledger, random, messages=40)
    second = lab.new.another_worker()
    second.start()
    try:
        with Traffic(lab.new.smtp_port, ["raced"], ledger, pause=0.05):
            request_move("raced")
            await_state("raced")
    finally:
        second.stop()
    eventually("no mail is under way", lambda: lab.new.postfix.is_empty() and lab.legacy.postfix.is_empty())

    def counted() -> Count:
        return ledger.compare(found_in_new(lab.new, {"raced": lab.legacy.users["raced"]}))

    # What the legacy server had in its own queue at the flip comes by the next sweep.
    eventually("late messages are swept", lambda: not counted().lost)
    counted().insist()


def test_a_cutover_that_is_not_acknowledged_undoes_itself(
    lab: Lab, ledger: Ledger, random: Random, request_move: Request, await_state: Await
) -> None:
    new, password = lab.new, lab.legacy.users["ghosted"]
    send(new.smtp_port, "before@ghosted.test", "ghosted", ledger, random)
    with ghost(new), cutover_budget(new, "10 seconds"):
        request_move("ghosted")
        await_state("ghosted", "cutover")
        eventually(
            "the hold is in force", lambda: "address=ghosted@lab.test state=cutover" in new.policy_daemon.tail(500)
        )
        send(new.smtp_port, "during@ghosted.test", "ghosted", ledger, random)
        eventually("held", lambda: any("holds this mail" in str(each["recipients"]) for each in new.postfix.queue()))
        await_state("ghosted", "copying")
        problem = new.sql("SELECT problem FROM bascule.mailboxes WHERE address = %s", f"ghosted@{DOMAIN}")[0][0]
        assert problem == "not acknowledged in time by: policy_daemon on ghost"
        eventually("held mail went to legacy", lambda: _at(lab.legacy, "ghosted", password, "during@ghosted.test"))
    new.cli("retry", f"ghosted@{DOMAIN}")
    await_state("ghosted")
    insist_on_the_same(lab, "ghosted", ledger)


def test_a_worker_killed_in_the_cutover_holds_nobodys_mail(
    lab: Lab, ledger: Ledger, random: Random, request_move: Request, await_state: Await
) -> None:
    new, password = lab.new, lab.legacy.users["abandoned"]
    with ghost(new), cutover_budget(new, "12 seconds"):
        request_move("abandoned")
        await_state("abandoned", "cutover")
        new.worker.kill()
        send(new.smtp_port, "during@abandoned.test", "abandoned", ledger, random)
        await_state("abandoned", "copying")  # the policy daemon undid it
        eventually("held mail went to legacy", lambda: _at(lab.legacy, "abandoned", password, "during@abandoned.test"))
    new.worker.start()
    await_state("abandoned")
    insist_on_the_same(lab, "abandoned", ledger)


def _at(site: LegacySite | NewSite, name: str, password: str, identity: str) -> bool:
    with site.client(name, password) as client:
        return bool(copies(client, identity))


def test_a_login_in_the_cutover_waits_for_the_flip(
    lab: Lab, ledger: Ledger, random: Random, request_move: Request, await_state: Await
) -> None:
    send(lab.new.smtp_port, "before@held.test", "held", ledger, random)
    entered = threading.Event()
    failures: list[BaseException] = []

    def log_in() -> None:
        try:
            with lab.new.client("held", lab.legacy.users["held"]) as client:
                client.select_folder("INBOX", readonly=True)
                assert lab.new.state("held") == "local"
                entered.set()
        except BaseException as error:  # noqa: BLE001 (raised again by the test)
            failures.append(error)

    with ghost(lab.new):
        request_move("held")
        await_state("held", "cutover")
        thread = threading.Thread(target=log_in)
        thread.start()
        assert not entered.wait(2)
    thread.join(30)
    assert not failures, failures
    assert entered.is_set()


def change_password(lab: Lab, name: str, password: str) -> None:
    """At the legacy server; Dovecot looks at its file once a second."""
    old = lab.legacy.users[name]
    lab.legacy.set_users(lab.legacy.users | {name: password}, lab.legacy.aliases)
    eventually("the old password is refused", lambda: _refuses(lab.legacy, name, old))


def _refuses(legacy: LegacySite, name: str, password: str) -> bool:
    try:
        with legacy.client(name, password):
            return False
    except LoginError:
        return True


def await_new_password(lab: Lab, name: str) -> None:
    query = "SELECT state FROM bascule.mailboxes WHERE address = %s AND problem LIKE 'waits for%%'"
    states = eventually("it waits for the new password", lambda: lab.new.sql(query, f"{name}@{DOMAIN}"))
    assert states == [("copying",)]


def test_a_changed_password_is_taken_up_at_the_next_login(
    lab: Lab, ledger: Ledger, random: Random, request_move: Request, await_state: Await
) -> None:
    send(lab.new.smtp_port, "first@changed.test", "changed", ledger, random)
    lab.new.worker.stop()
    request_move("changed")
    change_password(lab, "changed", "the new one")
    lab.new.worker.start()
    await_new_password(lab, "changed")
    with lab.new.client("changed", "the new one"):
        pass
    await_state("changed")
    insist_on_the_same(lab, "changed", ledger)


def test_a_password_changed_during_the_copy_is_noticed_before_the_flip(
    lab: Lab, ledger: Ledger, request_move: Request, await_state: Await
) -> None:
    put_messages(lab.legacy, "rekeyed", 1500, ledger)
    mailbox = lab.new.folder / "mail" / DOMAIN / "rekeyed" / "Maildir"
    lab.new.sql("UPDATE bascule.domain SET bytes_per_second = 9000000")  # of which a mailbox has two twentieths
    request_move("rekeyed")
    eventually("the copy is under way", lambda: _has_copied(mailbox, 100))
    change_password(lab, "rekeyed", "the new one")
    assert lab.new.state("rekeyed") == "copying"
    await_new_password(lab, "rekeyed")
    lab.new.sql("UPDATE bascule.domain SET bytes_per_second = NULL")
    with lab.new.client("rekeyed", "the new one"):
        pass
    await_state("rekeyed")
    insist_on_the_same(lab, "rekeyed", ledger)


def test_a_request_that_cannot_be_checked_changes_nothing(lab: Lab) -> None:
    lab.legacy.dovecot.stop()
    try:
        visitor = Visitor(lab.url)
        page = visitor.request(f"expired@{DOMAIN}", lab.legacy.users["expired"], "X", "Y")
        assert visitor.status == 503
        assert "does not answer now. Nothing was changed" in page
        done = lab.new.cli("request", f"expired@{DOMAIN}", "--password-file", "-", stdin="x\n")
        assert done.returncode == 1
        assert "nothing listens at" in done.stdout
    finally:
        lab.legacy.dovecot.start()
    assert lab.new.state("expired") is None


def test_an_expired_link_says_so(lab: Lab) -> None:
    lab.new.sql(
        "UPDATE bascule.domain SET url_expires_at = now() - interval '1 second' WHERE name = 'lab.test'",
        role="postgres",
    )
    try:
        visitor = Visitor(lab.url)
        assert "This link has expired" in visitor.open()
        assert visitor.status == 410
        visitor.open(form={"email": f"expired@{DOMAIN}", "password": lab.legacy.users["expired"]})
        assert visitor.status in {400, 410}
    finally:
        lab.new.sql(
            "UPDATE bascule.domain SET url_expires_at = now() + interval '1 day' WHERE name = 'lab.test'",
            role="postgres",
        )
    assert lab.new.state("expired") is None


def test_a_form_without_its_token_is_refused(lab: Lab) -> None:
    visitor = Visitor(lab.url)
    form = {"email": f"expired@{DOMAIN}", "password": lab.legacy.users["expired"], "first_name": "x", "last_name": "y"}
    visitor.open(form=form)
    assert visitor.status == 400
    assert lab.new.state("expired") is None


def test_a_message_that_legacy_sends_back_does_not_circle(lab: Lab, ledger: Ledger, random: Random) -> None:
    send(lab.new.smtp_port, "once@looping.test", "looping", ledger, random)
    password = lab.legacy.users["looping"]
    eventually("delivered", lambda: _at(lab.legacy, "looping", password, "once@looping.test"))
    with lab.legacy.client("looping") as client:
        client.select_folder("INBOX", readonly=True)
        body = client.fetch(client.search(), ["BODY.PEEK[]"]).popitem()[1][b"BODY[]"]
    assert b"Bascule-Stamp: " in body
    with (
        smtplib.SMTP("127.0.0.1", lab.new.smtp_port, timeout=30) as smtp,
        pytest.raises(smtplib.SMTPDataError) as error,
    ):
        smtp.sendmail("forwarder@lab.test", [f"looping@{DOMAIN}"], body)
    assert error.value.smtp_code == 554
    assert "5.4.6 bascule" in str(error.value.smtp_error)


def test_a_dead_milter_stops_no_mail(lab: Lab, ledger: Ledger, random: Random) -> None:
    lab.new.milter.kill()
    try:
        send(lab.new.smtp_port, "unstamped@stayed.test", "stayed", ledger, random)
    finally:
        lab.new.milter.start()
    eventually("delivered", lambda: _at(lab.legacy, "stayed", lab.legacy.users["stayed"], "unstamped@stayed.test"))


def test_subaddresses_and_aliases_follow_their_mailbox(
    lab: Lab, ledger: Ledger, random: Random, request_move: Request, await_state: Await
) -> None:
    request_move("aliased")
    await_state("aliased")
    assert lab.new.cli("alias", f"alias@{DOMAIN}", f"aliased@{DOMAIN}").returncode == 0
    eventually("the alias is known", lambda: _sent_here(lab, "alias", ledger, random))
    for number, recipient in enumerate(("aliased+tag", "ALIASED", "Alias", "alias+news")):
        identity = f"variant-{number}@aliased.test"
        send(lab.new.smtp_port, identity, "aliased", ledger, random, recipient=f"{recipient}@{DOMAIN}")
        eventually(
            f"mail to {recipient}",
            partial(_at, lab.new, "aliased", lab.legacy.users["aliased"], identity),
        )


def _sent_here(lab: Lab, local_part: str, ledger: Ledger, random: Random) -> bool:
    """Whether mail to an address is delivered here; each attempt sends one more."""
    identity = f"probe-{random.random()}@aliased.test"
    send(lab.new.smtp_port, identity, "aliased", ledger, random, recipient=f"{local_part}@{DOMAIN}")
    eventually(
        "the probe is somewhere",
        lambda: any(_at(site, "aliased", lab.legacy.users["aliased"], identity) for site in (lab.new, lab.legacy)),
    )
    return _at(lab.new, "aliased", lab.legacy.users["aliased"], identity)


def test_whatever_is_killed_nothing_is_lost_or_doubled(
    lab: Lab, ledger: Ledger, request_move: Request, await_state: Await
) -> None:
    """Every part of ours, PostgreSQL and Dovecot are ended with -9 in turn, under traffic, while users move.

    ``BASCULE_SEED`` sets another schedule.
    """
    new, chance = lab.new, Random(int(os.environ.get("BASCULE_SEED", "1")))  # noqa: S311 (a schedule, not keys)
    names = ["reaped-1", "reaped-2", "reaped-3"]
    for name in names:
        put_messages(lab.legacy, name, 150, ledger)
    daemons = [new.policy_daemon, new.authenticator, new.milter, new.worker]
    with Traffic(new.smtp_port, names, ledger, pause=0.05):
        for name in names:
            request_move(name)
        victims: list[Daemon | Postgres | Dovecot] = [*daemons, *daemons, new.postgres, new.dovecot]
        for victim in chance.sample(victims, 10):
            time.sleep(chance.uniform(0.2, 1.5))
            victim.kill()
            time.sleep(chance.uniform(0.1, 1.0))
            victim.start()
            if victim is new.postgres:  # the service manager would do it
                new.worker.stop()
                new.worker.start()
        for name in names:
            await_state(name, timeout=300)
    eventually("no mail is under way", lambda: new.postfix.is_empty() and lab.legacy.postfix.is_empty(), 150)
    eventually("late messages are swept", lambda: _count_of(lab, names, ledger).found == len(ledger.expected), 60)
    count = _count_of(lab, names, ledger)
    count.insist()
    assert count.sent > 450


def _count_of(lab: Lab, names: list[str], ledger: Ledger) -> Count:
    return ledger.compare(found_in_new(lab.new, {name: lab.legacy.users[name] for name in names}))
