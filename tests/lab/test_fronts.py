"""The Lua passdb, on Dovecot 2.3 and on Debian 13's Dovecot 2.4, which has no checkpassword any more."""

from __future__ import annotations

import poplib
import socket
import threading
from base64 import b64encode
from collections.abc import Callable, Iterator
from random import Random
from typing import BinaryIO

import pytest
from imapclient import IMAPClient
from imapclient.exceptions import IMAPClientError, LoginError

from bascule.check.dovecot import ASIDE
from bascule.lab.fronts import Front
from bascule.lab.ghost import ghost
from bascule.lab.mail import Ledger, read_mailbox, send, submit
from bascule.lab.process import LabError
from bascule.lab.sites import DOMAIN, Lab, LegacySite, NewSite, eventually, imap

pytestmark = pytest.mark.lab

Request = Callable[[str], None]
Await = Callable[..., None]


@pytest.fixture(scope="module", params=["2.3", pytest.param("2.4", marks=pytest.mark.namespaces)])
def front(lab: Lab, request: pytest.FixtureRequest) -> Iterator[Front]:
    with Front(lab.new, request.param) as running:
        yield running


@pytest.fixture
def name(front: Front) -> str:
    """The user of each version: who moves once cannot move again."""
    return f"fronted-{front.version}"


def sieve_scripts(port: int, user: str, password: str) -> str:
    """What LISTSCRIPTS answers (RFC 5804)."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        said = connection.makefile("rb")
        _until_status(said)
        secret = b64encode(f"\0{user}\0{password}".encode()).decode()
        connection.sendall(f'AUTHENTICATE "PLAIN" "{secret}"\r\nLISTSCRIPTS\r\n'.encode())
        return _until_status(said) + _until_status(said)


def _until_status(said: BinaryIO) -> str:
    text = ""
    while True:
        line = said.readline()
        text += line.decode()
        if not line or line.startswith((b"OK", b"NO", b"BYE")):
            return text


def test_every_service_is_proxied(front: Front, legacy: LegacySite, name: str, ledger: Ledger, random: Random) -> None:
    password, ports = legacy.users[name], front.dovecot.ports
    submit(ports.submission, name, password, name, f"by-submission-{front.version}@test", ledger, random)

    def received() -> bool:
        with imap(ports.imap, f"{name}@{DOMAIN}", password) as client:
            return bool(client.select_folder("INBOX", readonly=True)[b"EXISTS"])

    eventually("submitted mail", received)
    pop3 = poplib.POP3("127.0.0.1", ports.pop3, timeout=30)
    pop3.user(f"{name}@{DOMAIN}")
    pop3.pass_(password)
    assert pop3.stat()[0] == 1
    pop3.quit()
    assert "OK" in sieve_scripts(ports.sieve, f"{name}@{DOMAIN}", password).splitlines()[-1]
    for protocol in ("imap-login", "pop3-login", "submission-login", "managesieve-login"):
        assert any(
            protocol in line and "roxy" in line and f"{name}@{DOMAIN}" in line
            for line in front.dovecot.log().splitlines()
        ), protocol


@pytest.mark.parametrize("user", ["{name}@lab.test", "nobody@lab.test", "{name}@elsewhere.test", "{name}"])
def test_a_wrong_password_is_wrong(front: Front, name: str, user: str) -> None:
    with (
        pytest.raises(LoginError, match="AUTHENTICATIONFAILED"),
        imap(front.dovecot.ports.imap, user.format(name=name), "wrong"),
    ):
        pass


def test_without_the_legacy_server_it_is_temporary(front: Front, legacy: LegacySite, name: str) -> None:
    """With the authenticator or without: then the proxying login process is told so."""
    user = f"{name}@{DOMAIN}"
    legacy.dovecot.stop()
    try:
        with pytest.raises(LoginError, match="UNAVAILABLE"), imap(front.dovecot.ports.imap, user, "never tried"):
            pass
    finally:
        legacy.dovecot.start()
    eventually("what is left is complete", front.settings.authenticator.deputy_until.exists)
    front.authenticator.kill()
    try:
        with imap(front.dovecot.ports.imap, user, legacy.users[name]):
            pass
        legacy.dovecot.stop()
        try:
            with pytest.raises(LoginError, match="UNAVAILABLE"), imap(front.dovecot.ports.imap, user, "never tried"):
                pass
        finally:
            legacy.dovecot.start()
    finally:
        front.authenticator.start()
    with imap(front.dovecot.ports.imap, user, legacy.users[name]):
        pass


def test_a_session_ends_at_the_cutover_and_the_next_login_waits_for_the_flip(
    front: Front,
    new: NewSite,
    legacy: LegacySite,
    name: str,
    ledger: Ledger,
    random: Random,
    request_move: Request,
    await_state: Await,
) -> None:
    user, password = f"{name}@{DOMAIN}", legacy.users[name]
    send(new.smtp_port, f"before-{front.version}@test", name, ledger, random)
    entered = threading.Event()
    failures: list[BaseException] = []

    def log_in() -> None:
        try:
            with imap(front.dovecot.ports.imap, user, password) as client:
                client.select_folder("INBOX", readonly=True)
                assert new.state(name) == "local"
                entered.set()
        except BaseException as error:  # noqa: BLE001 (raised again by the test)
            failures.append(error)

    with imap(front.dovecot.ports.imap, user, password) as proxied:
        with ghost(new):
            request_move(name)
            await_state(name, "cutover")
            eventually("the session is ended", lambda: _is_ended(proxied))
            thread = threading.Thread(target=log_in)
            thread.start()
            assert not entered.wait(1)
        thread.join(30)
    assert not failures, failures
    assert entered.is_set()
    with legacy.client(name) as client:
        before = read_mailbox(client)
    with imap(front.dovecot.ports.imap, user, password) as client:
        after = read_mailbox(client)
    # All that was there is here, under its UIDs.
    uids = {uid for uid, seen in before["INBOX"].messages.items() if not seen.message_id.startswith("bascule-last")}
    assert uids <= set(after["INBOX"].messages)
    assert before["INBOX"].uidvalidity == after["INBOX"].uidvalidity
    with pytest.raises(LoginError, match="AUTHENTICATIONFAILED"), imap(front.dovecot.ports.imap, user, "wrong"):
        pass


@pytest.mark.parametrize("version", ["2.3", "2.4"])
def test_dovecots_own_cache_does_not_outlive_a_flip(
    new: NewSite, legacy: LegacySite, request_move: Request, await_state: Await, version: str
) -> None:
    name = f"cached-{version}"
    user, password = f"{name}@{DOMAIN}", legacy.users[name]
    with Front(new, version, auth_cache_size="10M") as caching:
        for _ in range(3):
            with imap(caching.dovecot.ports.imap, user, password):
                pass
        with ghost(new):
            request_move(name)
            await_state(name, "cutover")
            # Held, and not answered from the cache: the legacy server hears of nobody.
            before = _proxied(caching, user)
            with socket.socket() as waiting:
                waiting.settimeout(30)
                waiting.connect(("127.0.0.1", caching.dovecot.ports.imap))
                said = waiting.makefile("rb")
                said.readline()
                waiting.sendall(f'a LOGIN {user} "{password}"\r\n'.encode())
                waiting.settimeout(1)
                with pytest.raises(TimeoutError):
                    said.readline()
            assert _proxied(caching, user) == before
        await_state(name)
        for _ in range(3):
            with imap(caching.dovecot.ports.imap, user, password):
                pass
        assert _proxied(caching, user) == before
        # The check of the operator's own userdbs sees past ours, and nothing of that is kept for others.
        for _ in range(2):
            with pytest.raises(LabError, match="doesn't exist"):
                caching.dovecot.doveadm("user", "-x", "service=lmtp", "-x", f"rip={ASIDE}", user)
            home = caching.dovecot.doveadm("user", "-x", "service=lmtp", "-f", "home", user)
            assert home.strip().endswith(f"{DOMAIN}/{name}")


def _proxied(front: Front, user: str) -> int:
    """How many sessions of the user were proxied."""
    return sum("roxying to" in line and user in line for line in front.dovecot.log().splitlines())


def _is_ended(client: IMAPClient) -> bool:
    try:
        client.noop()
    except (OSError, IMAPClientError):
        return True
    return False


def test_no_password_is_in_its_logs(front: Front, legacy: LegacySite) -> None:
    texts = [front.dovecot.log(), front.authenticator.log.read_text()]
    for secret in ("never tried", *legacy.users.values()):
        assert not any(secret in text for text in texts), secret
