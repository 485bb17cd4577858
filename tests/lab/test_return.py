"""Sending a user who has moved back to the legacy server."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from random import Random

import pytest

from bascule.lab.ghost import cutover_budget, ghost
from bascule.lab.mail import Ledger, Traffic, fill_mailbox, identities, message, read_mailbox, send
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
