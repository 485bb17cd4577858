"""What stops an attempt before its flip: each error is raised where it must be, and only there."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace
from typing import Any, cast

import pytest

from bascule.address import Address
from bascule.credential import Password
from bascule.errors import LegacyUnavailable
from bascule.legacy import Trust
from bascule.migrator.cutover import (
    CannotBeKept,
    MessagesUnreadable,
    NoPassword,
    _insist_on_a_password,
    _insist_on_whole,
    _name_not_served,
    _take_along,
)
from bascule.migrator.hold import MARGIN, NotAcknowledged, await_acknowledgements
from bascule.migrator.sessions import CopyLoginRefused, NoneFree, OAuthClient, Sessions
from bascule.migrator.verification import NotEqual, NotServed

ADDRESS = Address.parse("anna@old.test")


def insist_on_whole(*, unreadable: int = 0, refused: int = 0, notes: tuple[str, ...] = (), waits: bool = False) -> None:
    account = SimpleNamespace(address=ADDRESS, waits_on_difference=waits)
    copy = SimpleNamespace(unreadable=dict.fromkeys(range(unreadable)), refused=dict.fromkeys(range(refused)))
    _insist_on_whole(
        cast(Any, SimpleNamespace(account=account)), cast(Any, copy), cast(Any, SimpleNamespace(notes=notes))
    )


def test_who_has_everything_goes_on() -> None:
    insist_on_whole()
    insist_on_whole(notes=("a folder is renamed",))
    insist_on_whole(waits=True)


@pytest.mark.parametrize(("unreadable", "refused"), [(1, 0), (0, 1), (2, 3)])
def test_what_the_legacy_server_does_not_give_stops_a_cutover(unreadable: int, refused: int) -> None:
    with pytest.raises(MessagesUnreadable, match=f"does not give {unreadable} of the messages") as raised:
        insist_on_whole(unreadable=unreadable, refused=refused)
    assert "bascule waive-messages anna@old.test" in raised.value.hint
    assert (f"{refused} of the folders" in raised.value.message) == bool(refused)


def test_a_difference_stops_a_cutover_where_the_domain_waits_for_it() -> None:
    with pytest.raises(CannotBeKept, match="a folder is renamed, and 1 more") as raised:
        insist_on_whole(notes=("a folder is renamed", "so is another"), waits=True)
    assert "old.test --on-difference note" in raised.value.hint


@pytest.mark.parametrize(
    ("sealed", "imported", "without"), [(b"x", False, False), (None, True, False), (None, False, True)]
)
def test_who_can_log_in_afterwards_flips(sealed: bytes | None, imported: bool, without: bool) -> None:
    account = SimpleNamespace(sealed_credential=sealed, has_imported_hash=imported, without_password=without)
    _insist_on_a_password(cast(Any, SimpleNamespace(account=account)))


def test_nothing_flips_to_which_nobody_could_log_in() -> None:
    account = SimpleNamespace(address=ADDRESS, sealed_credential=None, has_imported_hash=False, without_password=False)
    with pytest.raises(NoPassword, match=r"nobody could log in to anna@old\.test here") as raised:
        _insist_on_a_password(cast(Any, SimpleNamespace(account=account)))
    assert "bascule password import old.test" in raised.value.hint
    assert "bascule move --without-password anna@old.test" in raised.value.hint


def test_what_needs_the_password_and_does_not_come_along_is_named() -> None:
    account = SimpleNamespace(
        address=ADDRESS, sealed_credential=None, has_imported_hash=False, legacy=SimpleNamespace(pop3=1, sieve=1)
    )
    attempt = SimpleNamespace(
        account=account, trust=None, proved_password=lambda: None, sessions=SimpleNamespace(master=lambda: None)
    )
    notes = _take_along(cast(Any, attempt), cast(Any, None))
    assert [note.split()[0] for note in notes] == ["no", "POP3", "Sieve"]
    account.legacy = SimpleNamespace(pop3=None, sieve=None)
    account.has_imported_hash = True
    assert _take_along(cast(Any, attempt), cast(Any, None)) == []


def test_what_the_storage_does_not_keep_byte_for_byte_is_named() -> None:
    named: list[object] = []

    def set_unreadable(mailbox_id: int, messages: list[object], *, complete: bool) -> None:
        assert (mailbox_id, complete) == (7, False)
        named.extend(messages)

    account = SimpleNamespace(id=7, address=ADDRESS)
    attempt = cast(Any, SimpleNamespace(account=account, acts=SimpleNamespace(set_unreadable=set_unreadable)))
    _name_not_served(attempt, NotEqual("something else"))
    assert named == []
    with pytest.raises(
        MessagesUnreadable, match="2 of the messages are not here as they came in, UID 4 in 'a'"
    ) as told:
        _name_not_served(attempt, NotServed("a", 9, [4, 6]))
    assert "bascule waive-messages anna@old.test" in told.value.hint
    reason = "Dovecot here does not keep it byte for byte"
    assert named == [{"folder": "a", "uidvalidity": 9, "uid": uid, "reason": reason} for uid in (4, 6)]


class Acknowledgements:
    """A node that acknowledges at the ``at``-th look; 0: never."""

    def __init__(self, at: int, seconds: float) -> None:
        self.at, self.seconds, self.looks = at, seconds, 0

    def listen(self, *, wanted: bool) -> None:
        self.listens = wanted

    def seconds_left(self, _mailbox_id: int) -> float:
        return self.seconds

    def unacknowledged(self, _mailbox_id: int, _epoch: int) -> list[tuple[str, str]]:
        self.looks += 1
        return [] if self.looks == self.at else [("policy-daemon", "mx1"), ("authenticator", "store1")]

    def wait_for_acknowledgement(self, _seconds: float) -> None:
        assert self.listens


def test_a_hold_that_a_node_does_not_acknowledge_is_undone() -> None:
    with pytest.raises(NotAcknowledged, match="policy-daemon on mx1, authenticator on store1") as raised:
        await_acknowledgements(cast(Any, Acknowledgements(0, MARGIN)), 1, 1)
    assert "forget_node" in raised.value.hint


def test_a_hold_that_every_node_acknowledges_goes_on() -> None:
    acts = Acknowledgements(3, MARGIN + 60)
    await_acknowledgements(cast(Any, acts), 1, 1)
    assert acts.looks == 3
    assert not acts.listens


@pytest.mark.parametrize("free", [0, 2])
def test_no_more_sessions_are_opened_than_are_free(free: int) -> None:
    account = SimpleNamespace(
        domain_id=1, limits=SimpleNamespace(connections=5), legacy=SimpleNamespace(imap_host="imap.old.test")
    )
    acts = SimpleNamespace(take_connections=lambda _domain_id, wanted: min(free, wanted))
    sessions = Sessions(cast(Any, acts), cast(Any, account), Trust(), cast(Any, None))
    if free:
        assert sessions.reserve(3) == free
        return
    with pytest.raises(NoneFree, match=r"all 5 sessions .* imap\.old\.test"):
        sessions.reserve(3)


@contextmanager
def token_endpoint(status: int, body: bytes) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Not on the terminal."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/token"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        (400, b'{"error": "invalid_grant"}', CopyLoginRefused),
        (401, b"{}", CopyLoginRefused),
        (429, b"{}", LegacyUnavailable),
        (503, b"{}", LegacyUnavailable),
        (200, b"{}", LegacyUnavailable),
        (200, b"no JSON", LegacyUnavailable),
    ],
)
def test_a_token_that_is_refused_and_one_that_is_not_to_be_had_now(
    status: int, body: bytes, error: type[Exception]
) -> None:
    with token_endpoint(status, body) as url, pytest.raises(error) as raised:
        OAuthClient(url, "bascule", Password("s3cret")).token(Trust())
    assert "s3cret" not in repr(raised.value)


def test_a_token_is_had() -> None:
    with token_endpoint(200, b'{"access_token": "t0ken", "expires_in": 60}') as url:
        assert OAuthClient(url, "bascule", Password("s3cret")).token(Trust()) is not None
