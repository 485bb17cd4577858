"""Mailboxes that move on an administrator's word: copied ahead, in waves, with brought hashes or with no password.

And users whom the legacy server knows by another name than their address.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from functools import partial
from random import Random

import pytest
from imapclient.exceptions import LoginError

from bascule.lab.mail import Ledger, fill_mailbox, identities, message, read_mailbox
from bascule.lab.sites import DOMAIN, MASTER, Lab, eventually, full, imap
from bascule.lab.visitor import Visitor

pytestmark = pytest.mark.lab

Await = Callable[..., None]

#: By which the legacy server knows some users.
LOGIN_NAMES = {"named": "u12345", "named-too": "LAB\\named-too"}


@pytest.fixture(scope="module", autouse=True)
def _copied_by_a_master_user(lab: Lab) -> Iterator[None]:
    lab.legacy.login_names |= LOGIN_NAMES
    lab.legacy.set_users(lab.legacy.users, lab.legacy.aliases)
    refused = lab.new.cli("move", full("waved-1"))
    assert refused.returncode == 1
    assert "as each user" in refused.stdout
    done = lab.new.cli(
        "copy-login", "master", DOMAIN, MASTER, "--password-file", "-", stdin=lab.legacy.master_password + "\n"
    )
    assert done.returncode == 0, done.stdout
    yield
    assert lab.new.cli("copy-login", "user", DOMAIN).returncode == 0


def hashed(scheme: str, password: str) -> str:
    done = subprocess.run(
        ["doveadm", "-c", "/dev/null", "pw", "-s", scheme, "-p", password], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def cli(lab: Lab, *arguments: str, stdin: str = "") -> str:
    done = lab.new.cli(*arguments, stdin=stdin)
    assert done.returncode == 0, done.stdout
    return str(done.stdout)


def column(lab: Lab, name: str, what: str) -> object:
    ((found,),) = lab.new.sql(f"SELECT {what} FROM bascule.mailboxes WHERE address = %s", full(name))
    return found


def is_proved(lab: Lab, name: str) -> bool:
    return column(lab, name, "password") == "proved"


def await_staged(lab: Lab, name: str) -> None:
    eventually(f"{name} copied ahead", lambda: column(lab, name, "staged_at"))
    assert lab.new.state(name) == "copying"


def insist_on_all(lab: Lab, ledger: Ledger, *names: str) -> None:
    found = {}
    for name in names:
        with lab.new.client(name, lab.legacy.users[name]) as client:
            found[name] = identities(read_mailbox(client))
    ledger.compare(found).insist()


def test_a_wave_is_copied_ahead_and_flips_at_its_hour_with_the_hashes_that_were_brought(
    lab: Lab, ledger: Ledger, random: Random, await_state: Await
) -> None:
    hashes = {
        "waved-1": hashed("SHA512-CRYPT", lab.legacy.users["waved-1"]),
        "waved-2": hashed("BLF-CRYPT", lab.legacy.users["waved-2"]),
    }
    lab.legacy.hashes |= hashes
    lab.legacy.set_users(lab.legacy.users, lab.legacy.aliases)
    for name in hashes:
        fill_mailbox(lab.legacy, name, ledger, random, messages=20)
    listed = "address,first_name\n" + "".join(f"{full(name)},Wave\n" for name in hashes)
    told = cli(lab, "move", "--from", "-", "--later", stdin=listed)
    assert "2 moves" in told
    assert "2 of them have no password here yet" in told
    for name in hashes:
        await_staged(lab, name)
        assert column(lab, name, "flip_at::text") == "infinity"
    assert "no password here yet" in cli(lab, "status", DOMAIN)
    # As Dovecot has it, and as /etc/shadow does.
    cli(
        lab, "password", "import", DOMAIN, "--from", "-", stdin=f"address,hash\n{full('waved-1')},{hashes['waved-1']}\n"
    )
    shadow = f"daemon:*:1:::::\nwaved-2:{hashes['waved-2'].removeprefix('{BLF-CRYPT}')}:19000::::::\n"
    told = cli(lab, "password", "import", DOMAIN, "--from", "-", "--shadow", stdin=shadow)
    assert "1 kept, in force from the flip on" in told
    assert "1 left out" in told
    with lab.legacy.client("waved-1") as client:  # what comes until the flip is copied, too
        client.append("Archive", message(ledger.give("late@filled.test", "waved-1"), full("waved-1"), random))
    hour = datetime.now().astimezone() + timedelta(seconds=4)
    told = cli(lab, "move", full("waved-1"), "--at", hour.isoformat())
    assert "no password" not in told
    await_state("waved-1")
    ((migrated_at,),) = lab.new.sql("SELECT migrated_at FROM bascule.mailboxes WHERE address = %s", full("waved-1"))
    assert migrated_at >= hour
    assert lab.new.state("waved-2") == "copying"
    cli(lab, "move", full("waved-2"))
    await_state("waved-2")
    notes = lab.new.sql("SELECT notes FROM bascule.verifications WHERE address = ANY (%s)", [*map(full, hashes)])
    assert notes == [([],), ([],)], "POP3 and ManageSieve were read as the master user"
    assert {column(lab, name, "password") for name in hashes} == {"imported"}
    for name in hashes:
        with pytest.raises(LoginError, match="AUTHENTICATIONFAILED"), lab.new.client(name, "wrong"):
            pass
        with lab.new.client(name, lab.legacy.users[name]) as client:
            eventually("the hash is renewed", partial(is_proved, lab, name))
            client.noop()  # the session goes on: the password is the same
        kept = lab.new.sql(
            "SELECT password_hash FROM bascule.mailbox WHERE full_address = %s", full(name), role="postgres"
        )
        assert kept[0][0].startswith("{ARGON2ID}")
    insist_on_all(lab, ledger, *hashes)
    stays = cli(
        lab, "password", "import", DOMAIN, "--from", "-", stdin=f"address,hash\n{full('waved-1')},{hashes['waved-1']}\n"
    )
    assert "1 left as they are" in stays
    said = "".join(daemon.log.read_text() for daemon in lab.new.daemons) + json.dumps(
        lab.new.sql("SELECT event, reason FROM bascule.events"), default=str
    )
    assert "password renewed" in said
    for name, each in hashes.items():
        assert each.partition("}")[2] not in said
        assert lab.legacy.users[name] not in said


def test_without_a_password_nothing_flips_unless_it_is_wanted(
    lab: Lab, ledger: Ledger, random: Random, await_state: Await
) -> None:
    password = lab.legacy.users["wordless"]
    fill_mailbox(lab.legacy, "wordless", ledger, random, messages=10)
    assert "have no password here yet" in cli(lab, "move", full("wordless"))
    eventually("it waits", lambda: "nobody could log in" in str(column(lab, "wordless", "problem")))
    assert lab.new.state("wordless") == "copying"
    assert "password import" in str(column(lab, "wordless", "advice"))
    named = lab.new.cli("check", DOMAIN, "--only", "bascule.passwords").stdout
    assert "on the move without a password" in named
    assert full("wordless") in named
    cli(lab, "move", full("wordless"), "--without-password")
    await_state("wordless")
    ((notes,),) = lab.new.sql("SELECT notes FROM bascule.verifications WHERE address = %s", full("wordless"))
    assert "no password came along" in notes[0]
    obstacles = lab.new.sql("SELECT why FROM bascule.closing_obstacles WHERE address = %s", full("wordless"))
    assert any("no password is known here" in why for (why,) in obstacles)
    assert "moved without a password" in lab.new.cli("check", DOMAIN, "--only", "bascule.passwords").stdout
    with pytest.raises(LoginError, match="AUTHENTICATIONFAILED"), lab.new.client("wordless", "wrong"):
        pass
    lab.legacy.dovecot.stop()
    try:
        with pytest.raises(LoginError, match="UNAVAILABLE"), lab.new.client("wordless", password):
            pass
    finally:
        lab.legacy.dovecot.start()
    with lab.new.client("wordless", password) as client:
        assert b"PROXY" not in b"".join(client.capabilities())
        eventually("the first login sets it", lambda: column(lab, "wordless", "password") == "proved")
    insist_on_all(lab, ledger, "wordless")
    # From now on the legacy server has no say.
    lab.legacy.set_users(lab.legacy.users | {"wordless": "another one"}, lab.legacy.aliases)
    try:
        with pytest.raises(LoginError, match="AUTHENTICATIONFAILED"), lab.new.client("wordless", "another one"):
            pass
        with lab.new.client("wordless", password):
            pass
    finally:
        lab.legacy.set_users(lab.legacy.users | {"wordless": password}, lab.legacy.aliases)


def test_a_proved_password_wins_over_a_brought_hash(
    lab: Lab, ledger: Ledger, random: Random, await_state: Await
) -> None:
    fill_mailbox(lab.legacy, "outbid", ledger, random, messages=5)
    cli(lab, "move", full("outbid"), "--later")
    await_staged(lab, "outbid")
    former = f"address,hash\n{full('outbid')},{hashed('SSHA256', 'of last year')}\n"
    assert "1 kept, in force" in cli(lab, "password", "import", DOMAIN, "--from", "-", stdin=former)
    with lab.new.client("outbid", lab.legacy.users["outbid"]):
        eventually("the login is kept", lambda: column(lab, "outbid", "password") == "proved")
    assert "1 kept; the password that the legacy server took" in cli(
        lab, "password", "import", DOMAIN, "--from", "-", stdin=former
    )
    assert lab.new.state("outbid") == "copying"
    cli(lab, "move", full("outbid"))
    await_state("outbid")
    with pytest.raises(LoginError, match="AUTHENTICATIONFAILED"), lab.new.client("outbid", "of last year"):
        pass
    insist_on_all(lab, ledger, "outbid")


def test_a_file_with_a_mistake_is_refused_whole_and_not_quoted(lab: Lab) -> None:
    good, bad = hashed("SSHA512", "x"), "{SSHA512}" + "QUFB" * 3
    lines = f"address,hash\n{full('newly')},{good}\n{full('stale')},{bad}\nx@elsewhere.test,{good}\n"
    done = lab.new.cli("password", "import", DOMAIN, "--from", "-", stdin=lines)
    assert done.returncode == 1
    assert "line 3: what follows {SSHA512} is not a digest of its length" in done.stdout
    assert "line 4: the address is not one of lab.test" in done.stdout
    assert "QUFB" not in done.stdout
    assert lab.new.state("newly") is None


def test_who_is_not_at_the_legacy_server_is_told(lab: Lab) -> None:
    done = lab.new.cli("move", full("nobody-there"))
    assert done.returncode == 1
    assert "the legacy server knows no nobody-there@lab.test" in done.stdout
    assert lab.new.state("nobody-there") is None


@pytest.mark.parametrize("name", LOGIN_NAMES)
def test_a_user_is_known_there_by_another_name(
    lab: Lab, ledger: Ledger, random: Random, await_state: Await, name: str
) -> None:
    password, login = lab.legacy.users[name], LOGIN_NAMES[name]
    fill_mailbox(lab.legacy, name, ledger, random, messages=10)
    with pytest.raises(LoginError, match="AUTHENTICATIONFAILED"), imap(lab.legacy.ports.imap, full(name), password):
        pass
    row = f"address,login,password\n{full(name)},{login},{password}\n"
    assert "1 good" in cli(lab, "import", DOMAIN, "-", "--dry-run", stdin=row)
    assert lab.new.state(name) is None
    cli(lab, "expect", full(name), "--login", login)

    listed = "SELECT 1 FROM bascule.login_mailbox WHERE legacy_login = %s"
    assert lab.new.sql(listed, login, role="bascule_authenticator")
    insist_on_all(lab, ledger, name)  # proxied
    if name == "named":
        cli(lab, "import", DOMAIN, "-", stdin=row)
    else:
        said = Visitor(lab.url).request(full(name), password, "Doe", "Jane")
        assert lab.new.state(name) in {"requested", "copying", "cutover", "local"}, said
    await_state(name)
    insist_on_all(lab, ledger, name)
    assert column(lab, name, "legacy_login") == login
