"""The users' page while a legacy server, or the database, is silent."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from bascule.lab.process import free_ports
from bascule.lab.sites import Lab, eventually, full
from bascule.lab.visitor import Visitor
from bascule.settings import Legacy
from tests.lab.conftest import another_page

pytestmark = pytest.mark.lab

SILENT = "silent.test"
FORMS = 40


class Server:
    """Takes connections and does with them what no real IMAP server can be made to do."""

    def __init__(self, answer: Callable[[socket.socket], None]) -> None:
        self._answer = answer
        self.connections: list[socket.socket] = []
        (self.port,) = free_ports(1)
        self._listener = socket.create_server(("127.0.0.1", self.port), backlog=128)
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self.connections.append(connection)
                threading.Thread(target=self._talk, args=(connection,), daemon=True).start()

    def _talk(self, connection: socket.socket) -> None:
        with suppress(OSError):
            self._answer(connection)

    def hang_up(self) -> None:
        """End every conversation, and take no more; again is no error."""
        for each in (self._listener, *self.connections):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()


def silent(_: socket.socket) -> None:
    """Not even a greeting."""


def dripping(connection: socket.socket) -> None:
    """A byte of a greeting now and then, for ever: no single read takes long."""
    connection.sendall(b"* OK ")
    while not threading.Event().wait(0.2):
        connection.sendall(b".")


def abusive(connection: socket.socket) -> None:
    """Refuses with words that a page, or a terminal, had better not show."""
    connection.sendall(b"* OK ready\r\n")
    for line in connection.makefile("rb"):
        tag, _, command = line.partition(b" ")
        if command.upper().startswith(b"CAPABILITY"):
            connection.sendall(b"* CAPABILITY IMAP4rev1 AUTH=PLAIN SASL-IR\r\n" + tag + b" OK done\r\n")
        else:
            connection.sendall(tag + b" NO <script>alert(1)</script> \x1b[31mraw words\r\n")


@contextmanager
def domain_at(lab: Lab, server: Server) -> Iterator[str]:
    """A domain of which ``server`` is the legacy server; the secret part of its users' URL."""
    where = ("--imap-host", "127.0.0.1", "--imap-port", str(server.port), "--imap-tls", "none")
    smtp = ("--smtp-host", "127.0.0.1", "--smtp-port", str(lab.legacy.smtp_port), "--no-messages")
    prepared = lab.new.cli("prepare", SILENT, *where, *smtp)
    assert prepared.returncode == 0, prepared.stdout
    try:
        # Nobody can be let in there, so that it is not activated by the command.
        lab.new.sql(
            "UPDATE bascule.domain SET mode = 'active', url_token = %s, url_expires_at = now() + interval '1 day' "
            "WHERE name = %s",
            "a-token-of-the-silent-domain", SILENT, role="postgres",
        )  # fmt: skip
        yield "a-token-of-the-silent-domain"
    finally:
        server.hang_up()
        lab.new.sql("DELETE FROM bascule.domain WHERE name = %s", SILENT, role="postgres")


def test_a_silent_legacy_server_stops_nobody_but_its_own_users(lab: Lab, tmp_path: Path) -> None:
    server = Server(silent)
    patient = Legacy(ca_file=lab.new.certificate.ca, timeout=600)
    with domain_at(lab, server) as token, another_page(lab.new, tmp_path, legacy=patient) as settings:
        base = settings.portal.public_url
        with ThreadPoolExecutor(FORMS) as people:
            visitors = [Visitor(f"{base}/m/{token}") for _ in range(FORMS)]
            waiting = [
                people.submit(each.request, f"user-{number}@{SILENT}", "a password", "Quay", "Alice")
                for number, each in enumerate(visitors)
            ]
            # Some wait for the server, which never answers; who comes after them is told so at once.
            eventually("as many ask the server as may", lambda: len(server.connections) >= 32)
            eventually("the others are answered", lambda: sum(each.done() for each in waiting) == FORMS - 32)
            other = Visitor(f"{base}/m/{lab.url.rpartition('/')[2]}")
            assert "Move your mailbox" in other.open()
            assert other.open(f"{base}/static/icon.svg").startswith("<svg")
            refused = other.request(full("paged"), "a guess", "Quay", "Alice")
            assert (other.status, "does not know this e-mail address" in refused) == (422, True)
            assert sum(each.done() for each in waiting) == FORMS - 32
            server.hang_up()
            answers = [each.result() for each in waiting]
        assert {each.status for each in visitors} == {503}
        assert all("The old mail server does not answer now" in each for each in answers)


def test_a_form_is_answered_in_time_whatever_the_server_does(lab: Lab, tmp_path: Path) -> None:
    hurried = Legacy(ca_file=lab.new.certificate.ca, timeout=2)
    with (
        domain_at(lab, Server(dripping)) as token,
        another_page(lab.new, tmp_path, legacy=hurried) as settings,
    ):
        visitor = Visitor(f"{settings.portal.public_url}/m/{token}")
        for _ in range(2):  # the second is not let wait behind the first, whose login goes on
            said = visitor.request(f"alice@{SILENT}", "a password", "Quay", "Alice")
            assert (visitor.status, "The old mail server does not answer now" in said) == (503, True)
    assert "did not answer lately" in (tmp_path / "page.log").read_text()


def test_words_of_the_legacy_server_are_not_shown(lab: Lab, tmp_path: Path) -> None:
    with domain_at(lab, Server(abusive)) as token, another_page(lab.new, tmp_path) as settings:
        visitor = Visitor(f"{settings.portal.public_url}/m/{token}")
        said = visitor.request(f"alice@{SILENT}", "a password", "Quay", "Alice")
        assert (visitor.status, "does not know this e-mail address" in said) == (422, True)
        assert "raw words" not in said
    assert "\x1b" not in (tmp_path / "page.log").read_text()


def test_a_database_that_hangs_is_not_waited_for(lab: Lab, tmp_path: Path) -> None:
    """Stopped, as by a disk that does not answer: each page says so after a while, and all is well afterwards."""
    with another_page(lab.new, tmp_path) as settings:
        base = settings.portal.public_url
        visitor = Visitor(f"{base}/m/{lab.url.rpartition('/')[2]}")
        assert "Move your mailbox" in visitor.open()
        postmaster = int((lab.new.postgres.folder / "data" / "postmaster.pid").read_text().split()[0])
        stopped = [postmaster, *map(int, Path(f"/proc/{postmaster}/task/{postmaster}/children").read_text().split())]
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        try:
            said = visitor.open()
            assert (visitor.status, "does not work now" in said) == (503, True)
            assert visitor.open(f"{base}/static/icon.svg").startswith("<svg")
        finally:
            for pid in stopped:
                os.kill(pid, signal.SIGCONT)
        eventually("it works again", lambda: "Move your mailbox" in visitor.open())
