"""Parts that hang, which is worse than if they had died: the authenticator and PostgreSQL, stopped by SIGSTOP."""

from __future__ import annotations

import os
import signal
import smtplib
import socket
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest
from imapclient.exceptions import LoginError

from bascule import netstring
from bascule.address import Address
from bascule.hooks.deputy import file_name
from bascule.lab.fronts import Front
from bascule.lab.mail import Ledger, copies, send
from bascule.lab.postgres import Postgres
from bascule.lab.process import Daemon, LabError
from bascule.lab.servers import Dovecot, settings_once
from bascule.lab.sites import DOMAIN, Lab, LegacySite, NewSite, eventually, full, imap
from bascule.settings import Authenticator

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
        with suppress(ProcessLookupError):  # a child that has just ended
            os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in stopped:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


@contextmanager
def dead(authenticator: Daemon) -> Iterator[None]:
    authenticator.kill()
    try:
        yield
    finally:
        authenticator.start()


@contextmanager
def silent(authenticator: Daemon) -> Iterator[None]:
    with hanging(authenticator.pid):
        yield


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


@dataclass(frozen=True)
class Way:
    """A Dovecot, and the authenticator that it asks."""

    dovecot: Dovecot
    authenticator: Daemon
    settings: Authenticator

    def left_for(self, address: str) -> bytes:
        """What its hook finds while the authenticator does not answer."""
        path = self.settings.deputy / (file_name(Address.parse(address)) or "")
        return path.read_bytes() if path.exists() and self.settings.deputy_until.exists() else b""


@pytest.fixture(scope="module", params=["checkpassword", "Lua 2.3", "Lua 2.4"])
def way(lab: Lab, request: pytest.FixtureRequest) -> Iterator[Way]:
    """Every way in."""
    new = lab.new
    if request.param == "checkpassword":
        yield Way(new.dovecot, new.authenticator, new.settings.authenticator)
        return
    with Front(new, request.param.split()[1]) as front:
        yield Way(front.dovecot, front.authenticator, front.settings.authenticator)


@pytest.fixture(scope="module")
def dovecot(way: Way) -> Dovecot:
    return way.dovecot


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
        eventually("what is left is complete", front.settings.authenticator.deputy_until.exists)
        with hanging(front.authenticator.pid):
            for user in (here, f"{here}@elsewhere.test"):
                with imap(front.dovecot.ports.imap, user, own[here]):
                    pass
            assert recipient(front.dovecot, here).startswith("250 ")
            # Ours is never taken for theirs.
            refused(front.dovecot, "AUTHENTICATIONFAILED", full(here), own[here])
            with imap(front.dovecot.ports.imap, full(here), legacy.users[here]):
                pass
            assert front.dovecot.doveadm("user", "-f", "home", full(here)).strip() == str(
                new.settings.worker.mail_root / DOMAIN / here
            )
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


# Without the authenticator ------------------------------------------------------------


def sasl(new: NewSite, user: str, password: str) -> int:
    """What Postfix answers to AUTH."""
    secret = b64encode(f"\0{user}\0{password}".encode()).decode()
    with smtplib.SMTP("127.0.0.1", new.smtp_port, timeout=60) as smtp:
        smtp.ehlo()
        return smtp.docmd("AUTH", f"PLAIN {secret}")[0]


@contextmanager
def asked_by_postfix(new: NewSite, dovecot: Dovecot) -> Iterator[None]:
    """It is this Dovecot that checks Postfix's logins."""
    path = new.postfix.folder / "main.cf"
    before = path.read_text()
    path.write_text(settings_once(f"{before}\nsmtpd_sasl_path = {dovecot.folder}/sasl\n"))
    new.postfix.reload()
    try:
        yield
    finally:
        path.write_text(before)
        new.postfix.reload()


def proxied(dovecot: Dovecot, user: str) -> int:
    return sum("roxying to" in line and user in line for line in dovecot.log().splitlines())


@pytest.mark.parametrize("outage", [dead, silent])
def test_nobody_waits_for_an_authenticator_that_is_away(
    way: Way,
    new: NewSite,
    legacy: LegacySite,
    here: str,
    ledger: Ledger,
    random: Random,
    outage: Callable[[Daemon], AbstractContextManager[None]],
) -> None:
    dovecot, moved, stayed = way.dovecot, full(here), full("stayed")
    identity = f"{dovecot.folder.parent.name}-{outage.__name__}@test"
    eventually("what is left is of now", lambda: b"password" in way.left_for(moved))
    before = proxied(dovecot, moved), proxied(dovecot, stayed)
    with outage(way.authenticator), asked_by_postfix(new, dovecot):
        began = time.monotonic()
        with imap(dovecot.ports.imap, moved, legacy.users[here]):
            pass
        refused(dovecot, "AUTHENTICATIONFAILED", moved, f"wrong {identity}")
        with imap(dovecot.ports.imap, stayed, legacy.users["stayed"]):
            pass
        refused(dovecot, "AUTHENTICATIONFAILED", stayed, f"wrong {identity}")
        assert (proxied(dovecot, moved), proxied(dovecot, stayed)) == (before[0], before[1] + 1)
        # To Postfix a reply is the proof: of who has not moved there is none.
        assert sasl(new, moved, legacy.users[here]) == 235
        assert sasl(new, moved, f"wrong {identity}") == 535
        assert sasl(new, stayed, legacy.users["stayed"]) == 454
        assert sasl(new, stayed, f"wrong {identity}") == 454
        assert recipient(dovecot, moved).startswith("250 ")
        assert recipient(dovecot, stayed).startswith("451 ")
        assert dovecot.doveadm("user", "-f", "home", moved).strip() == str(
            new.settings.worker.mail_root / DOMAIN / here
        )
        assert time.monotonic() - began < 120, "nothing hangs"
        if dovecot is new.dovecot:  # to which Postfix delivers
            send(new.smtp_port, identity, here, ledger, random)
            eventually("mail, by Postfix and LMTP", lambda: received(dovecot, here, legacy.users[here], identity))
        assert "User doesn't exist" not in dovecot.log().replace("nobody", "")


def test_what_is_too_old_is_not_used(way: Way, new: NewSite, legacy: LegacySite, here: str) -> None:
    """The node may have been forgotten since; before the first heartbeat it is the same."""
    moved, until = full(here), way.settings.deputy_until
    eventually("what is left is of now", lambda: b"password" in way.left_for(moved))
    with dead(way.authenticator):
        good = until.read_text()
        try:
            for content in (f"{time.time() - 1:.0f}\n", "", None):
                until.unlink() if content is None else until.write_text(content)
                for user, password in ((moved, legacy.users[here]), (full("stayed"), legacy.users["stayed"])):
                    refused(way.dovecot, "UNAVAILABLE", user, password)
                assert recipient(way.dovecot, moved).startswith("451 ")
        finally:
            until.write_text(good)
        with imap(way.dovecot.ports.imap, moved, legacy.users[here]):
            pass


LETS_IN = netstring.encode(b"login\0*\0ok\0user=outlived@lab.test")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"99" + LETS_IN[2:-1],
        LETS_IN[:-1],
        LETS_IN + b"junk",
        netstring.encode(b"password\0{UNKNOWN}x") + LETS_IN,
        None,
    ],
    ids=["nothing", "half", "no end", "junk", "a hash that nobody knows", "unreadable"],
)
def test_half_of_what_was_left_is_nothing(way: Way, legacy: LegacySite, here: str, content: bytes | None) -> None:
    """Who has moved is not taken for somebody who has not, nor a password for wrong."""
    moved = full(here)
    eventually("what is left is of now", lambda: b"password" in way.left_for(moved))
    path = way.settings.deputy / (file_name(Address.parse(moved)) or "")
    with dead(way.authenticator):
        good = path.read_bytes()
        try:
            if content is None:
                path.unlink()
                path.mkdir()
            else:
                path.write_bytes(content)
            before = proxied(way.dovecot, moved)
            refused(way.dovecot, "UNAVAILABLE", moved, legacy.users[here])
            assert proxied(way.dovecot, moved) == before
        finally:
            if content is None:
                path.rmdir()
            path.write_bytes(good)
            path.chmod(0o644)


@contextmanager
def taking_any_name(dovecot: Dovecot) -> Iterator[None]:
    before = dovecot.config.read_text()
    dovecot.stop()
    dovecot.config.write_text(f"{before}\nauth_username_chars =\n")
    dovecot.start()
    try:
        yield
    finally:
        dovecot.stop()
        dovecot.config.write_text(before)
        dovecot.start()


def test_hooks_find_the_file_of_a_name(way: Way) -> None:
    """Of any name that Dovecot may be told to take; who has none is as everybody else in the domain."""

    def said(user: str) -> str:
        return way.dovecot.doveadm("auth", "test", "-x", "service=imap", user, "any")

    eventually("what is left is complete", way.settings.deputy_until.exists)
    with dead(way.authenticator), taking_any_name(way.dovecot):
        for local_part in ("..", ".x", "a-b_c.d", "A.B", "a@b", "~", "a/../b", "50%", "%2e", "a'b+c", "*"):
            user = f"{local_part}@{DOMAIN}"
            path = way.settings.deputy / (file_name(Address.parse(user)) or "")
            assert "mine=yes" not in said(user)
            path.write_bytes(netstring.encode(f"login\0*\0ok\0user={user.lower()}\0mine=yes".encode()))
            path.chmod(0o644)
            try:
                assert "mine=yes" in said(user), user
                assert "mine=yes" not in said(f"x{user}"), user
            finally:
                path.unlink()
        assert "host=localhost" in said(f"x@{DOMAIN}")
        for user in (f"josé@{DOMAIN}", f'"x"@{DOMAIN}', f"{'x' * 250}@{DOMAIN}", f"a b@{DOMAIN}"):
            with pytest.raises(LabError):
                said(user)


def test_passwords_are_not_looked_at_where_memory_is_short(new: NewSite, legacy: LegacySite, here: str) -> None:
    """One login after the other takes 64 MiB: better that they wait than that the kernel ends something."""
    moved = full(here)
    with Front(new, "2.3") as front:
        meminfo, stub = front.folder / "meminfo", front.folder / "bascule.lua"
        stub.write_text(
            "local open = io.open\n"
            f'io.open = function(path, mode) return open(path == "/proc/meminfo" and "{meminfo}" or path, mode) end\n'
            + stub.read_text()
        )
        front.dovecot.stop()
        front.dovecot.start()
        way = Way(front.dovecot, front.authenticator, front.settings.authenticator)
        eventually("what is left is of now", lambda: b"password" in way.left_for(moved))
        with dead(front.authenticator):
            meminfo.write_text("MemTotal:       16384000 kB\nMemFree:  900 kB\nMemAvailable:     524287 kB\n")
            refused(front.dovecot, "UNAVAILABLE", moved, legacy.users[here])
            with imap(front.dovecot.ports.imap, full("stayed"), legacy.users["stayed"]):
                pass
            meminfo.write_text("MemTotal:       16384000 kB\nMemFree:  900 kB\nMemAvailable:     524288 kB\n")
            with imap(front.dovecot.ports.imap, moved, legacy.users[here]):
                pass
