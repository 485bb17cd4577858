"""Whole moves from servers that no real server can be made to be: everything comes, or what does not is named."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bascule.lab.scripted import Command, Folder, Mail, Server, Session, mail
from bascule.lab.sites import Lab, eventually, imap

pytestmark = pytest.mark.lab

#: How long a move may take on a busy machine, in seconds.
PATIENCE = 120


def inbox(count: int = 7) -> list[Folder]:
    return [Folder(b"INBOX", [Mail(uid, mail(f"m{uid}", f"text of {uid} " * 30)) for uid in range(1, count + 1)])]


def prepared(lab: Lab, domain: str, server: Server) -> str:
    """A domain whose legacy server is this one; the address of its user."""
    done = lab.new.cli(
        "prepare", domain, "--imap-host", "localhost", "--imap-port", str(server.port), "--imap-tls", "none",
        "--smtp-host", "127.0.0.1", "--smtp-port", str(lab.legacy.smtp_port), "--no-messages", "--no-first-login",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    activated = lab.new.cli("activate", domain)
    assert activated.returncode == 0, activated.stdout
    return f"u@{domain}"


def requested(lab: Lab, address: str) -> None:
    done = lab.new.cli("request", address, "--password-file", "-", stdin="secret\n")
    assert done.returncode == 0, done.stdout


def seen_here(lab: Lab, address: str) -> list[bytes]:
    """Every body that a client sees at the new server."""
    found = []
    with imap(lab.new.dovecot.ports.imap, address, "secret") as client:
        for flags, _, name in client.list_folders():
            if b"\\Noselect" not in flags and b"\\NonExistent" not in flags:
                client.select_folder(name, readonly=True)
                if uids := client.search():
                    found += [data[b"BODY[]"] for data in client.fetch(uids, ["BODY.PEEK[]"]).values()]
    return sorted(found)


class NoDate(Server):
    """Gives no date of arrival for one message."""

    def item(self, mail: Mail, name: bytes) -> bytes:
        return b"" if name == b"INTERNALDATE" and mail.uid == 3 else super().item(mail, name)


class InParts(Server):
    """Gives the items of each message in two responses."""

    def fetch_line(self, session: Session, number: int, mail: Mail, names: list[bytes]) -> bytes:
        parts = [[b"UID", b"FLAGS"], [b"UID", b"RFC822.SIZE", b"INTERNALDATE"]] if len(names) > 2 else [names]
        return b"\r\n".join(super(InParts, self).fetch_line(session, number, mail, part) for part in parts)


class NotListed(Server):
    """LIST leaves INBOX out."""

    def on_list(self, session: Session, command: Command) -> None:
        session.ok(command)


class WantsId(Server):
    """Opens nothing for a client that has not said who it is."""

    capabilities = b"IMAP4rev1 ID AUTH=PLAIN NAMESPACE"

    def on_other(self, session: Session, command: Command) -> None:
        session.notes.add(command.verb.decode())
        session.ok(command)

    def on_status(self, session: Session, command: Command) -> None:
        if "ID" in session.notes:
            super().on_status(session, command)
        else:
            session.no(command, b"who are you")


class Cuts(Server):
    """Ends each session within its fourth body."""

    def fetch_line(self, session: Session, number: int, mail: Mail, names: list[bytes]) -> bytes:
        line = super().fetch_line(session, number, mail, names)
        session.given += b"BODY.PEEK[]" in names
        if session.given > 3:
            session.raw(line[: len(line) // 2])
            session.reset()
        return line


@pytest.mark.parametrize("kind", [NoDate, InParts, NotListed, WantsId, Cuts])
def test_everything_comes(lab: Lab, kind: Callable[[list[Folder]], Server]) -> None:
    with kind(inbox()) as server:
        wanted = sorted(each.body for each in server.folders[0].mails)
        address = prepared(lab, f"{kind.__name__.lower()}.test", server)
        requested(lab, address)

        def settled() -> tuple[str, str | None] | None:
            (row,) = lab.new.sql("SELECT state, problem FROM bascule.mailboxes WHERE address = %s", address)
            return (row[0], row[1]) if row[0] == "local" or row[1] else None

        assert eventually("the move", settled, PATIENCE) == ("local", None)
        assert seen_here(lab, address) == wanted
        assert lab.new.cli("close", address.partition("@")[2], "--force", "--yes", "--reason", "seen").returncode == 0


class Ends(Server):
    """Resets the connection at UID 3."""

    def fetch_line(self, session: Session, number: int, mail: Mail, names: list[bytes]) -> bytes:
        if mail.uid == 3 and b"BODY.PEEK[]" in names:
            session.reset()
        return super().fetch_line(session, number, mail, names)


class TooLong(Server):
    """The body of UID 3 is shorter than its literal says."""

    def item(self, mail: Mail, name: bytes) -> bytes:
        said = super().item(mail, name)
        if name == b"BODY.PEEK[]" and mail.uid == 3:
            return said.replace(b"{%d}" % len(mail.body), b"{%d}" % (len(mail.body) + 400))
        return said


@pytest.mark.parametrize("kind", [Ends, TooLong])
def test_the_message_that_does_not_come_is_named(lab: Lab, kind: Callable[[list[Folder]], Server]) -> None:
    with kind(inbox()) as server:
        address = prepared(lab, f"{kind.__name__.lower()}.test", server)
        requested(lab, address)

        def named() -> list[tuple[object, ...]]:
            return lab.new.sql("SELECT folder, uid FROM bascule.unreadable WHERE address = %s", address)

        eventually("the message is named", named, PATIENCE)
        assert [tuple(row) for row in named()] == [("INBOX", 3)]
        assert lab.new.cli("close", address.partition("@")[2], "--force", "--yes", "--reason", "seen").returncode == 0
