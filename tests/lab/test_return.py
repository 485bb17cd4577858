"""Sending a user who has moved back to the legacy server."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable
from random import Random

import pytest

from bascule.lab.ghost import cutover_budget, ghost
from bascule.lab.mail import Ledger, Traffic, fill_mailbox, identities, message, read_mailbox, send
from bascule.lab.process import VMAIL
from bascule.lab.sites import DOMAIN, Lab, eventually

pytestmark = pytest.mark.lab

Request = Callable[[str], None]
Await = Callable[..., None]


def content(lab: Lab, name: str, *, here: bool) -> dict[str, Counter[tuple[str, frozenset[str], str]]]:
    """What each folder holds, whatever the UIDs are."""
    client = lab.new.client(name, lab.legacy.users[name]) if here else lab.legacy.client(name)
    with client as session:
        return {
            folder: Counter((each.message_id, each.flags, each.digest) for each in seen.messages.values())
            for folder, seen in read_mailbox(session).items()
        }


def use_the_mailbox_here(lab: Lab, name: str, ledger: Ledger, random: Random) -> None:
    """What people do between the move and the return."""
    with lab.new.client(name, lab.legacy.users[name]) as client:
        client.select_folder("Archive")
        uids = client.search()
        client.add_flags(uids[:2], ["\\Flagged", "$Label2"])
        client.move(uids[2:4], "Sent")
        expunged = uids[4]
        gone = client.fetch([expunged], ["ENVELOPE"])[expunged][b"ENVELOPE"].message_id.decode().strip("<>")
        client.delete_messages([expunged])
        client.expunge()
        ledger.take_back(gone)
        client.create_folder("Made here/below")
        client.subscribe_folder("Made here/below")
        body = message(ledger.give(f"made-here@{name}.test", name), f"{name}@{DOMAIN}", random, size=200_000)
        client.append("Made here/below", body, ["\\Seen", "todo"])
        client.rename_folder("Trash", "Old trash")
    send(lab.new.smtp_port, f"came-here@{name}.test", name, ledger, random)


def test_a_user_goes_back_with_everything(
    lab: Lab, ledger: Ledger, random: Random, request_move: Request, await_state: Await
) -> None:
    name = "returned"
    fill_mailbox(lab.legacy, name, ledger, random, messages=60)
    request_move(name)
    await_state(name)
    eventually("the last message is written", lambda: _last_message_at(lab, name))
    send(lab.legacy.smtp_port, f"late@{name}.test", name, ledger, random)  # a colleague, inside the legacy server
    eventually("it is swept", lambda: f"late@{name}.test" in _identities(lab, name, here=True))
    late = _uid_at_legacy(lab, name, f"late@{name}.test")
    use_the_mailbox_here(lab, name, ledger, random)
    eventually("delivered here", lambda: f"came-here@{name}.test" in _identities(lab, name, here=True))
    with lab.new.client(name, lab.legacy.users[name]) as still_open, Traffic(lab.new.smtp_port, [name], ledger):
        before = content(lab, name, here=True)
        done = lab.new.cli("return", f"{name}@{DOMAIN}", "--reason", "the fax does not print")
        assert done.returncode == 0, done.stdout
        await_state(name, "legacy")
        with pytest.raises(Exception, match=r"(?i)closed|eof|broken|reset|abort|shutting down"):
            still_open.select_folder("INBOX")
    eventually("no mail is under way", lambda: lab.new.postfix.is_empty() and lab.legacy.postfix.is_empty())
    after = content(lab, name, here=False)
    for folder, messages in before.items():
        if folder != "INBOX":  # where the traffic goes
            assert after.get(folder) == messages, folder
    assert after.keys() - before.keys() == set()
    count = ledger.compare({name: _identities(lab, name, here=False)})
    count.insist()
    assert not [each for each in _identities(lab, name, here=False) if each.startswith("bascule-last-")]
    assert _uid_at_legacy(lab, name, f"late@{name}.test") == late, "what was swept is not appended again"
    with lab.legacy.client(name) as client:
        assert "Made here/below" in [folder for _, _, folder in client.list_sub_folders()]
    # And once more, forward: the copy here is brought into line, not doubled.
    request_move(name)
    await_state(name)
    eventually("no mail is under way", lambda: lab.new.postfix.is_empty() and lab.legacy.postfix.is_empty())
    ledger.compare({name: _identities(lab, name, here=True)}).insist()


def _last_message_at(lab: Lab, name: str) -> object:
    return lab.new.sql("SELECT last_message_at FROM bascule.mailboxes WHERE address = %s", f"{name}@{DOMAIN}")[0][0]


def _identities(lab: Lab, name: str, *, here: bool) -> Counter[str]:
    client = lab.new.client(name, lab.legacy.users[name]) if here else lab.legacy.client(name)
    with client as session:
        return identities(read_mailbox(session))


def _uid_at_legacy(lab: Lab, name: str, identity: str) -> list[int]:
    with lab.legacy.client(name) as client:
        client.select_folder("INBOX", readonly=True)
        return list(client.search(["HEADER", "Message-ID", identity]))


def test_only_who_has_moved_can_be_returned(lab: Lab) -> None:
    refused = lab.new.cli("return", f"unreturned@{DOMAIN}", "--reason", "no")
    assert refused.returncode == 1
    assert "nothing is known of a mailbox unreturned@lab.test" in refused.stdout


def test_a_return_that_is_not_acknowledged_undoes_itself(
    lab: Lab, ledger: Ledger, random: Random, request_move: Request, await_state: Await
) -> None:
    name = "stranded"
    send(lab.new.smtp_port, f"before@{name}.test", name, ledger, random)
    request_move(name)
    await_state(name)
    with ghost(lab.new), cutover_budget(lab.new, "10 seconds"):
        assert lab.new.cli("return", f"{name}@{DOMAIN}", "--reason", "the test").returncode == 0
        await_state(name, "returning")
        send(lab.new.smtp_port, f"during@{name}.test", name, ledger, random)
        await_state(name, "local")
        problem = lab.new.sql("SELECT problem FROM bascule.mailboxes WHERE address = %s", f"{name}@{DOMAIN}")[0][0]
        assert problem == "not acknowledged in time by: policy_daemon on ghost"
        eventually("held mail is delivered here", lambda: f"during@{name}.test" in _identities(lab, name, here=True))
    await_state(name, "legacy", timeout=180)  # it is tried again, later each time
    ledger.compare({name: _identities(lab, name, here=False)}).insist()


def test_a_worker_killed_in_the_return_leaves_the_mailbox_as_it_was(
    lab: Lab, ledger: Ledger, random: Random, request_move: Request, await_state: Await
) -> None:
    name = "halfway"
    home = lab.new.folder / "mail" / DOMAIN / name
    send(lab.new.smtp_port, f"before@{name}.test", name, ledger, random)
    request_move(name)
    await_state(name)
    with ghost(lab.new), cutover_budget(lab.new, "12 seconds"):
        assert lab.new.cli("return", f"{name}@{DOMAIN}", "--reason", "the test").returncode == 0
        await_state(name, "returning")
        lab.new.worker.kill()
        # As if it had died just after it closed the mailbox.
        (home / "Maildir").rename(home / "Maildir.returning")
        (home / "Maildir").touch()
        await_state(name, "local")  # the policy daemon undid it
        send(lab.new.smtp_port, f"during@{name}.test", name, ledger, random)
    lab.new.worker.start()
    await_state(name, "legacy", timeout=180)
    eventually("no mail is under way", lambda: lab.new.postfix.is_empty() and lab.legacy.postfix.is_empty())
    ledger.compare({name: _identities(lab, name, here=False)}).insist()
    assert not (home / "Maildir.returning").exists()


def _problem(lab: Lab, name: str) -> str:
    found = lab.new.sql("SELECT problem, advice FROM bascule.mailboxes WHERE address = %s", f"{name}@{DOMAIN}")
    return " | ".join(each or "" for each in found[0])


def _sweep_now(lab: Lab, name: str) -> None:
    assert lab.new.cli("retry", f"{name}@{DOMAIN}").returncode == 0


def test_a_mailbox_that_is_not_where_it_was_takes_nothing_from_the_legacy_server(
    lab: Lab, ledger: Ledger, random: Random, request_move: Request, await_state: Await
) -> None:
    """A mail file system that is not mounted, a Maildir that was restored empty, a user who really has emptied it."""
    name = "unmounted"
    home = lab.new.folder / "mail" / DOMAIN / name
    fill_mailbox(lab.legacy, name, ledger, random, messages=60)
    request_move(name)
    await_state(name)
    eventually("the last message is written", lambda: _last_message_at(lab, name))
    before = content(lab, name, here=False)
    (home / "Maildir").rename(home / "elsewhere")
    assert lab.new.cli("return", f"{name}@{DOMAIN}", "--reason", "the test").returncode == 0
    eventually("it is refused", lambda: "is not in" in _problem(lab, name))
    assert "mounted" in _problem(lab, name)
    assert not (home / "Maildir").exists(), "nobody makes an empty one in its place"
    # Somebody did: a client that logged in.
    with lab.new.client(name, lab.legacy.users[name]) as client:
        client.select_folder("INBOX")
    assert lab.new.cli("retry", f"{name}@{DOMAIN}").returncode == 0
    eventually("it is not believed", lambda: "reads as empty here" in _problem(lab, name))
    assert "--force" in _problem(lab, name)
    assert content(lab, name, here=False) == before, "nothing was changed there"
    assert lab.new.state(name) == "local"
    shutil.rmtree(home / "Maildir")
    (home / "elsewhere").rename(home / "Maildir")
    assert lab.new.cli("retry", f"{name}@{DOMAIN}").returncode == 0
    await_state(name, "legacy", timeout=180)
    ledger.compare({name: _identities(lab, name, here=False)}).insist()


def test_what_is_gone_here_on_purpose_is_returned_by_force(
    lab: Lab, ledger: Ledger, random: Random, request_move: Request, await_state: Await
) -> None:
    name = "emptied"
    send(lab.legacy.smtp_port, f"before@{name}.test", name, ledger, random)
    eventually("it is there", lambda: _identities(lab, name, here=False))
    request_move(name)
    await_state(name)
    with lab.new.client(name, lab.legacy.users[name]) as client:
        client.select_folder("INBOX")
        client.delete_messages(client.search())
        client.expunge()
    ledger.take_back(f"before@{name}.test")
    assert lab.new.cli("return", f"{name}@{DOMAIN}", "--reason", "the test").returncode == 0
    eventually("it is not believed", lambda: "reads as empty here" in _problem(lab, name))
    lab.new.sql("SELECT bascule.return_mailbox(%s, 'they are all read', true)", f"{name}@{DOMAIN}")
    await_state(name, "legacy", timeout=180)
    assert _identities(lab, name, here=False) == Counter()


def test_late_mail_of_a_folder_that_is_not_here_is_not_doubled_by_a_return(
    lab: Lab, ledger: Ledger, random: Random, request_move: Request, await_state: Await
) -> None:
    name = "refoldered"
    request_move(name)
    await_state(name)
    body = message(ledger.give(f"late@{name}.test", name), f"{name}@{DOMAIN}", random)
    with lab.legacy.client(name) as client:
        client.create_folder("Made there")
        client.append("Made there", body, ["\\Flagged", "todo"])
    eventually("it is swept", lambda: f"late@{name}.test" in _identities(lab, name, here=True))
    flags = [flags for seen in content(lab, name, here=True).values() for _, flags, _ in seen]
    assert frozenset({"\\Flagged", "todo"}) in flags, "with its keyword"
    assert lab.new.cli("return", f"{name}@{DOMAIN}", "--reason", "the test").returncode == 0
    await_state(name, "legacy", timeout=180)
    there = content(lab, name, here=False)
    assert [folder for folder, seen in there.items() if seen] == ["Made there"]
    ledger.compare({name: _identities(lab, name, here=False)}).insist()


def test_a_legacy_folder_made_anew_ends_neither_the_sweeps_nor_a_forced_return(
    lab: Lab, ledger: Ledger, random: Random, request_move: Request, await_state: Await
) -> None:
    name = "renewed"
    with lab.legacy.client(name) as client:
        client.create_folder("Junk-like")
        for number in range(3):
            body = message(ledger.give(f"{number}@{name}.test", name), f"{name}@{DOMAIN}", random)
            client.append("Junk-like", body, ["\\Seen"])
    request_move(name)
    await_state(name)
    with lab.legacy.client(name) as client:
        client.select_folder("Junk-like")
        kept = client.fetch([1], ["BODY.PEEK[]", "INTERNALDATE"])[1]
        client.unselect_folder()  # or Dovecot ends the session of a folder that is gone
        client.delete_folder("Junk-like")
        client.create_folder("Junk-like")
        client.append("Junk-like", kept[b"BODY[]"], [], kept[b"INTERNALDATE"])
        body = message(ledger.give(f"late@{name}.test", name), f"{name}@{DOMAIN}", random)
        client.append("Junk-like", body, [])
    send(lab.legacy.smtp_port, f"inbox@{name}.test", name, ledger, random)
    wanted = {f"late@{name}.test", f"inbox@{name}.test"}
    eventually("both are swept", lambda: wanted <= _identities(lab, name, here=True).keys())
    ledger.compare({name: _identities(lab, name, here=True)}).insist()
    assert lab.new.cli("return", f"{name}@{DOMAIN}", "--reason", "the test").returncode == 0
    eventually("it is not believed", lambda: "made anew on the legacy server" in _problem(lab, name))
    lab.new.sql("SELECT bascule.return_mailbox(%s, 'we know', true)", f"{name}@{DOMAIN}")
    await_state(name, "legacy", timeout=180)
    ledger.compare({name: _identities(lab, name, here=False)}).insist()


def test_a_mailbox_that_a_return_closed_is_opened_by_whoever_comes_next(
    lab: Lab, ledger: Ledger, random: Random, request_move: Request, await_state: Await
) -> None:
    name = "reopened"
    home = lab.new.folder / "mail" / DOMAIN / name
    send(lab.new.smtp_port, f"before@{name}.test", name, ledger, random)
    request_move(name)
    await_state(name)
    lab.new.worker.stop()
    try:
        (home / "Maildir").rename(home / "Maildir.returning")
        (home / "Maildir").touch(mode=0o400)
        os.chown(home / "Maildir", VMAIL, VMAIL)
        send(lab.legacy.smtp_port, f"late@{name}.test", name, ledger, random)
    finally:
        lab.new.worker.start()
    _sweep_now(lab, name)
    eventually("the sweep opens it", (home / "Maildir").is_dir)
    eventually("it is swept", lambda: f"late@{name}.test" in _identities(lab, name, here=True))
    ledger.compare({name: _identities(lab, name, here=True)}).insist()


def test_a_return_is_called_off_after_it_wrote(
    lab: Lab, ledger: Ledger, random: Random, request_move: Request, await_state: Await
) -> None:
    name = "recalled"
    send(lab.new.smtp_port, f"before@{name}.test", name, ledger, random)
    request_move(name)
    await_state(name)
    body = message(ledger.give(f"here@{name}.test", name), f"{name}@{DOMAIN}", random)
    with lab.new.client(name, lab.legacy.users[name]) as client:
        client.append("INBOX", body, ["\\Seen"])
    with ghost(lab.new), cutover_budget(lab.new, "8 seconds"):
        assert lab.new.cli("return", f"{name}@{DOMAIN}", "--reason", "the test").returncode == 0
        eventually("it is appended", lambda: f"here@{name}.test" in _identities(lab, name, here=False))
        await_state(name, "returning")
        await_state(name, "local")
        done = lab.new.cli("cancel-return", f"{name}@{DOMAIN}")
        assert done.returncode == 0, done.stdout
    swept = "SELECT 1 FROM bascule.mailboxes WHERE address = %s AND problem IS NULL AND last_message_at IS NOT NULL"
    eventually("it is swept on", lambda: lab.new.sql(swept, f"{name}@{DOMAIN}"))
    ledger.compare({name: _identities(lab, name, here=True)}).insist()
    assert lab.new.cli("return", f"{name}@{DOMAIN}", "--reason", "the test").returncode == 0
    await_state(name, "legacy", timeout=180)
    ledger.compare({name: _identities(lab, name, here=False)}).insist()


def test_a_return_is_called_off_before_it_writes(lab: Lab, request_move: Request, await_state: Await) -> None:
    name = "undecided"
    request_move(name)
    await_state(name)
    lab.new.worker.stop()
    try:
        assert lab.new.cli("return", f"{name}@{DOMAIN}", "--reason", "the test").returncode == 0
        assert lab.new.cli("close", DOMAIN).returncode == 1
        obstacles = lab.new.sql("SELECT why FROM bascule.closing_obstacles WHERE address = %s", f"{name}@{DOMAIN}")
        assert ("is being returned",) in obstacles
        assert "stays here" in lab.new.cli("cancel-return", f"{name}@{DOMAIN}").stdout
    finally:
        lab.new.worker.start()
    swept = "SELECT 1 FROM bascule.mailboxes WHERE address = %s AND swept_at > now() - interval '5 seconds'"
    eventually("it is swept on", lambda: lab.new.sql(swept, f"{name}@{DOMAIN}"))
    assert lab.new.state(name) == "local"
