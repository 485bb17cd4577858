"""Parts that hang, which is worse than if they had died: the authenticator and PostgreSQL, stopped by SIGSTOP."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from random import Random

import pytest
from imapclient.exceptions import LoginError

from bascule.lab.fronts import Front
from bascule.lab.mail import Ledger, copies, send
from bascule.lab.postgres import Postgres
from bascule.lab.process import LabError
from bascule.lab.servers import Dovecot
from bascule.lab.sites import DOMAIN, Lab, LegacySite, NewSite, eventually, full, imap

pytestmark = pytest.mark.lab

Request = Callable[[str], None]
Await = Callable[..., None]

NAME = "outlived"


@contextmanager
def killed(postgres: Postgres) -> Iterator[None]:
    postgres.kill()
    try:
        yield
    finally:
        postgres.start()


def processes(root: int) -> list[int]:
    """A process and its descendants."""
    found = [root]
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # it has ended
        if parent == root:
            found += processes(int(path.parent.name))
    return found


@contextmanager
def hanging(root: int) -> Iterator[None]:
    stopped = processes(root)
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in stopped:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


@contextmanager
def stopped(postgres: Postgres) -> Iterator[None]:
    with hanging(int((postgres.folder / "data" / "postmaster.pid").read_text().splitlines()[0])):
        yield


def refused(dovecot: Dovecot, how: str, user: str, password: str) -> None:
    """A login does not succeed, and this is said."""
    with pytest.raises(LoginError, match=how), imap(dovecot.ports.imap, user, password):
        pass


def recipient(dovecot: Dovecot, address: str) -> str:
    """What LMTP answers to RCPT TO."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(30)
        connection.connect(str(dovecot.lmtp_socket))
        said = connection.makefile("rb")

        def answer() -> str:
            while (line := said.readline())[3:4] == b"-":
                pass
            return line.decode()

        answer()
        for command in ("LHLO lab.test", "MAIL FROM:<x@elsewhere.test>"):
            connection.sendall(f"{command}\r\n".encode())
            answer()
        connection.sendall(f"RCPT TO:<{address}>\r\n".encode())
        return answer()


@pytest.fixture(scope="module", params=["checkpassword", "Lua 2.3", "Lua 2.4"])
def dovecot(lab: Lab, request: pytest.FixtureRequest) -> Iterator[Dovecot]:
    """Every way in."""
    if request.param == "checkpassword":
        yield lab.new.dovecot
        return
    with Front(lab.new, request.param.split()[1]) as front:
        yield front.dovecot


@pytest.fixture
def here(new: NewSite, request_move: Request, await_state: Await) -> str:
    """A user who has moved."""
    if new.state(NAME) is None:
        request_move(NAME)
    await_state(NAME)
    return NAME


@pytest.mark.parametrize("database", [killed, stopped])
def test_who_has_moved_goes_on_without_the_database(
    dovecot: Dovecot,
    new: NewSite,
    legacy: LegacySite,
    here: str,
    ledger: Ledger,
    random: Random,
    database: Callable[[Postgres], AbstractContextManager[None]],
) -> None:
    identity = f"{dovecot.folder.parent.name}-{database.__name__}@test"
    with imap(dovecot.ports.imap, full(here), legacy.users[here]):
        pass
    with database(new.postgres):
        began = time.monotonic()
        with imap(dovecot.ports.imap, full(here), legacy.users[here]):
            pass
        refused(dovecot, "AUTHENTICATIONFAILED", full(here), f"wrong {identity}")
        with imap(dovecot.ports.imap, full("stayed"), legacy.users["stayed"]):
            pass
        assert recipient(dovecot, full(here)).startswith("250 ")
        # Ours, and not here: it waits, and is never "no such user".
        assert recipient(dovecot, full("stayed")).startswith("451 ")
        assert dovecot.doveadm("user", "-f", "home", full(here)).strip() == str(
            new.settings.worker.mail_root / DOMAIN / here
        )
        assert time.monotonic() - began < 60, "nothing hangs"
        if dovecot is not new.dovecot:  # checkpassword cannot list
            assert full(here) in dovecot.doveadm("user", "*").split()
        send(new.smtp_port, identity, here, ledger, random)
        eventually("mail, by Postfix and LMTP", lambda: received(dovecot, here, legacy.users[here], identity))
        assert "User doesn't exist" not in dovecot.log().replace("nobody", "")
    new.worker.stop()
    new.worker.start()


def received(dovecot: Dovecot, name: str, password: str, identity: str) -> bool:
    with imap(dovecot.ports.imap, full(name), password) as client:
        return copies(client, identity) == 1


def test_an_authenticator_that_starts_without_the_database_knows_all(
    new: NewSite, legacy: LegacySite, here: str
) -> None:
    with stopped(new.postgres):
        new.authenticator.kill()
        new.authenticator.start()
        assert "last known state taken up" in new.authenticator.tail()
        with new.client(here, legacy.users[here]):
            pass
    assert new.settings.authenticator.snapshot.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("version", ["2.3", "2.4"])
def test_the_operators_own_users_do_not_wait_for_us(new: NewSite, legacy: LegacySite, here: str, version: str) -> None:
    """Names without a domain of ours, and with one, on a Dovecot whose own users are found without their domain."""
    own = {here: "the operator's own"}  # of the same local part as somebody who has moved
    with Front(new, version, own_users=own) as front:
        with hanging(front.authenticator.pid):
            for user in (here, f"{here}@elsewhere.test"):
                with imap(front.dovecot.ports.imap, user, own[here]):
                    pass
            assert recipient(front.dovecot, here).startswith("250 ")
            # Ours is never taken for theirs.
            refused(front.dovecot, "UNAVAILABLE", full(here), own[here])
            assert recipient(front.dovecot, full(here)).startswith("451 ")
        refused(front.dovecot, "AUTHENTICATIONFAILED", full(here), own[here])
        with imap(front.dovecot.ports.imap, full(here), legacy.users[here]):
            pass
        assert recipient(front.dovecot, full(here)).startswith("250 ")
        assert recipient(front.dovecot, full("stayed")).startswith("451 ")
        home = front.dovecot.doveadm("user", "-f", "home", full(here)).strip()
        assert home == str(new.settings.worker.mail_root / DOMAIN / here)
        assert front.dovecot.doveadm("user", "-f", "home", here).strip() == f"{front.folder}/own/{here}"
        with pytest.raises(LabError):
            front.dovecot.doveadm("user", full("stayed"))
