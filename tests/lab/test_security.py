"""What the login path lets out, and whom it lets in: limits, dead and untrusted legacy servers, core dumps."""

from __future__ import annotations

import os
import smtplib
import socket
import threading
from base64 import b64encode
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from random import Random
from urllib.request import urlopen

import pytest

from bascule import netstring
from bascule.attempts import PER_ACCOUNT, PER_SOURCE
from bascule.config_templates import render
from bascule.hooks.pace import PACE, PATIENCE
from bascule.lab.mail import message
from bascule.lab.process import Daemon
from bascule.lab.sites import Lab, LegacySite, NewSite, eventually, full, make_deputy_folder
from bascule.lab.visitor import Visitor
from bascule.settings import Settings

pytestmark = pytest.mark.lab

Request = Callable[[str], None]
Await = Callable[..., None]


def ask(path: Path, user: str, password: str, service: str = "imap", source: str = "192.0.2.1") -> str:
    """The authenticator's result for one login, asked as a hook asks it; empty: the connection was ended."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(60)
        connection.connect(str(path))
        connection.sendall(netstring.encode("\0".join([user, password, service, source]).encode()))
        answer = connection.makefile("rb").read()
    payloads = netstring.Parser().feed(answer)
    return payloads[0].split(b"\0")[0].decode() if payloads else ""


@contextmanager
def authenticator(new: NewSite, name: str, **changes: object) -> Iterator[Path]:
    """One more authenticator, with other settings; its socket."""
    folder = new.folder / name
    folder.mkdir()
    mine = new.settings.authenticator.model_copy(
        update={
            "socket": folder / "socket",
            "snapshot": folder / "snapshot",
            "domains": folder / "domains",
            "deputy": folder / "deputy",
            "deputy_until": folder / "deputy-until",
            "metrics": None,
        }
    )
    make_deputy_folder(mine.deputy, os.geteuid())
    settings: Settings = new.settings.model_copy(update={"node": name, "authenticator": mine, **changes})
    path = folder / "bascule.toml"
    path.write_text(render("bascule.toml.j2", **settings.model_dump()))
    daemon = Daemon([*new.authenticator.command[:-1], str(path)], folder=folder, name="authenticator")
    daemon.start()
    try:
        eventually("it has loaded", lambda: "directory loaded" in daemon.tail())
        yield folder / "socket"
    finally:
        daemon.stop()
        new.forget_node(name, "authenticator")


def ask_all(path: Path, user: str, passwords: list[str], source: str) -> list[str]:
    """The results of logins at the same time; ``source`` may have the number of each in it."""
    with ThreadPoolExecutor(len(passwords)) as threads:
        return list(
            threads.map(lambda each: ask(path, user, each[1], source=source.format(each[0])), enumerate(passwords))
        )


@pytest.mark.parametrize(
    ("name", "source"), [("limited-guesser", "203.0.113.{}"), ("guessed-moved", "127.0.0.1")], ids=["legacy", "moved"]
)
def test_guessing_is_slow_and_the_owner_is_not_kept_out(
    new: NewSite, legacy: LegacySite, request_move: Request, await_state: Await, name: str, source: str
) -> None:
    """At a user who has not moved, from everywhere, and at one who has, through a webmail on this host."""
    if name == "guessed-moved":
        request_move(name)
        await_state(name)
    user, password = full(name), legacy.users[name]
    path = new.settings.authenticator.socket
    assert ask(path, user, password, source="198.51.100.1") == "ok"
    before = legacy.dovecot.log().count("auth failed")
    guesses = ask_all(path, user, [f"guess {number}" for number in range(60)], source)
    looked_at = guesses.count("refused")
    assert PER_ACCOUNT.amount <= looked_at <= PER_ACCOUNT.amount + PATIENCE / PACE["account"] + 2
    assert set(guesses) == {"refused", "temporary"}
    assert legacy.dovecot.log().count("auth failed") - before <= looked_at
    # From where they are known, and from where nobody has seen them.
    assert ask(path, user, password, source="198.51.100.1") == "ok"
    assert ask(path, user, f"{password} ", source="198.51.100.1") == "refused"
    assert ask(path, user, password, source="192.0.2.200") == "ok"
    # Another node, or this one after a restart, has heard of it.
    with authenticator(new, f"other-{name}") as other:
        log = other.parent / "authenticator.log"
        eventually(
            "it has heard",
            lambda: ask(other, user, "one more", source="192.0.2.201") and "login slowed down" in log.read_text(),
        )
        assert ask(other, user, "another one", source="198.51.100.1") == "refused", "the owner's place is known there"


def test_a_right_password_is_not_asked_of_the_legacy_server_twice(new: NewSite, legacy: LegacySite) -> None:
    user, password = full("guessed-once"), legacy.users["guessed-once"]
    path = new.settings.authenticator.socket
    assert ask(path, user, password) == "ok"
    legacy.dovecot.stop()
    try:
        assert ask(path, user, password) == "ok"
        assert ask(path, user, "another one") == "temporary"
    finally:
        legacy.dovecot.start()


@pytest.mark.parametrize(
    "request_", [b"", b"nonsense", b"3:a\0b,", b"99999999:", netstring.encode(b"a\0" + b"x" * 5000 + b"\0imap\0")]
)
def test_what_is_no_request_is_not_answered(new: NewSite, request_: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(30)
        connection.connect(str(new.settings.authenticator.socket))
        connection.sendall(request_)
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(4096) == b""
    assert ask(new.settings.authenticator.socket, full("stayed"), "wrong") == "refused"


def test_a_certificate_that_is_not_trusted_is_a_temporary_failure(new: NewSite, legacy: LegacySite) -> None:
    untrusting = new.settings.legacy.model_copy(update={"ca_file": None})
    with authenticator(new, "untrusting", legacy=untrusting) as path:
        assert ask(path, full("stayed"), legacy.users["stayed"]) == "temporary"
        assert "is not trusted here" in (path.parent / "authenticator.log").read_text()


def test_a_silent_legacy_server_delays_its_own_users_only(new: NewSite, legacy: LegacySite) -> None:
    """It takes connections, and says nothing: its logins are still waiting when the other domain's are long done."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(200)
        done = new.cli(
            "prepare", "silent.test", "--imap-host", "localhost", "--imap-port", str(silent.getsockname()[1]),
            "--smtp-host", "127.0.0.1",
        )  # fmt: skip
        assert done.returncode == 0, done.stdout
        new.cli("activate", "silent.test")
        path = new.settings.authenticator.socket
        answers: list[str] = []
        eventually("the domain is known", lambda: "silent.test" in str(new.sql("SELECT domain FROM bascule.domains")))
        threads = [
            threading.Thread(target=lambda n=number: answers.append(ask(path, f"u{n}@silent.test", "x")))
            for number in range(100)
        ]
        for thread in threads:
            thread.start()
        for name in ("stayed", "proxied", "sealed"):
            with new.client(name, legacy.users[name]):
                pass
        assert any(thread.is_alive() for thread in threads)
        for thread in threads:
            thread.join(60)
        assert set(answers) <= {"temporary", "unknown"}


def test_memory_does_not_end_in_core_dumps(new: NewSite) -> None:
    for daemon in new.daemons:
        limits = Path(f"/proc/{daemon.pid}/limits").read_text()
        assert [line.split()[4] for line in limits.splitlines() if line.startswith("Max core file size")] == ["0"]
        # What may not be dumped belongs to root (proc(5)): no other process of the same user may read it.
        assert Path(f"/proc/{daemon.pid}/environ").stat().st_uid == 0, daemon.name


def test_passwords_are_in_no_command_line_and_no_environment(new: NewSite, legacy: LegacySite) -> None:
    with new.client("stayed", legacy.users["stayed"]):
        pass
    secret = legacy.users["stayed"].encode()
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            for name in ("cmdline", "environ"):
                try:
                    content = (process / name).read_bytes()
                except OSError:
                    continue  # it has ended
                assert secret not in content, process.name


def test_metrics(lab: Lab, random: Random) -> None:
    new = lab.new
    with pytest.raises(smtplib.SMTPRecipientsRefused), smtplib.SMTP("127.0.0.1", new.smtp_port, timeout=30) as smtp:
        smtp.sendmail("x@elsewhere.test", [full("nobody")], message("never@test", full("nobody"), random))
    assert ask(new.settings.authenticator.socket, full("nobody"), "wrong") == "refused"

    def scraped(listen: str | None) -> str:
        with urlopen(f"http://{listen}/metrics", timeout=10) as answer:
            return str(answer.read().decode())

    routing = scraped(new.settings.policy_daemon.metrics)
    assert "bascule_socketmap_lookups_total{" in routing
    assert "bascule_database_connected 1.0" in routing
    assert "bascule_barrier_seconds_count" in routing
    assert 'bascule_logins_total{result="refused"' in scraped(new.settings.authenticator.metrics)
    assert "bascule_loops_refused_total" in scraped(new.settings.milter.metrics)


# Postfix's SASL ---------------------------------------------------------------------


def submit(new: NewSite, name: str, password: str, identity: str, random: Random) -> None:
    secret = b64encode(f"\0{full(name)}\0{password}".encode()).decode()
    with smtplib.SMTP("127.0.0.1", new.smtp_port, timeout=30) as smtp:
        smtp.ehlo()
        code, text = smtp.docmd("AUTH", f"PLAIN {secret}")
        if code != 235:
            raise smtplib.SMTPAuthenticationError(code, text)
        smtp.sendmail(full(name), [full("stayed")], message(identity, full("stayed"), random))


def test_postfix_takes_submissions_of_people_on_either_side(
    lab: Lab, random: Random, request_move: Request, await_state: Await
) -> None:
    new, legacy = lab.new, lab.legacy
    request_move("scripted")
    await_state("scripted")
    for name in ("scripted", "proxied"):
        submit(new, name, legacy.users[name], f"sasl-{name}@test", random)
        assert f"sasl_username={full(name)}" in new.postfix.log()
        with pytest.raises(smtplib.SMTPAuthenticationError, match="535"):
            submit(new, name, "wrong", "never@test", random)
    deputy = new.settings.authenticator.deputy / f"{full('scripted')}"
    eventually("what is left is of now", lambda: deputy.exists() and b"password" in deputy.read_bytes())
    for stop, start in ((legacy.dovecot.stop, legacy.dovecot.start), (new.authenticator.kill, new.authenticator.start)):
        stop()
        try:
            with pytest.raises(smtplib.SMTPAuthenticationError, match="454"):
                submit(new, "guessed-once", "never tried before", "never@test", random)
            submit(new, "scripted", legacy.users["scripted"], "sasl-alone@test", random)
        finally:
            start()


def test_guessing_at_the_page_ends_soon(lab: Lab) -> None:
    visitor = Visitor(lab.url)
    said = [
        (visitor.request(full("guessed-page"), f"guess {number}", "X", "Y"), visitor.status)
        for number in range(PER_ACCOUNT.amount + 2)
    ]
    assert {status for _, status in said[: PER_ACCOUNT.amount]} == {422}
    assert [status for _, status in said[PER_ACCOUNT.amount :]] == [429, 429]
    assert "too many wrong passwords" in said[-1][0]
    lab.new.portal.stop()
    lab.new.portal.start()
    again = Visitor(lab.url)
    again.request(full("guessed-page"), "one more guess", "X", "Y")
    assert again.status == 429, "a page that was started anew has heard of what was guessed"
    visitor.request(full("stayed-at-page"), lab.legacy.users["stayed-at-page"], "X", "Y")
    assert visitor.status == 200


def test_a_source_that_guesses_at_the_page_is_kept_out(lab: Lab) -> None:
    """By what the reverse proxy says of it, the last hop: what the client itself claims does not count."""
    guesser = Visitor(lab.url, forwarded_for="198.51.100.99, 192.0.2.77")
    for number in range(PER_SOURCE.amount):
        guesser.request(full(f"nobody-{number}"), "guess", "X", "Y")
        assert guesser.status == 422
    guesser.request(full("stayed"), "guess", "X", "Y")
    assert guesser.status == 429
    other = Visitor(lab.url, forwarded_for="192.0.2.77, 198.51.100.99")
    other.request(full("stayed"), "another guess", "X", "Y")
    assert other.status == 422
