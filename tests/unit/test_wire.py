"""What a peer may do to a connection, and what not: silence, drips, floods, resets, lengths that are not true."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from bascule.errors import LegacyBusy, LegacyUnavailable, LocalUnavailable, ServerUnavailable
from bascule.imap import pipeline as pipelines
from bascule.imap import wire as wires
from bascule.imap.pipeline import CommandRefused, Pipeline, Untagged
from bascule.imap.wire import DovecotHere, Wire
from bascule.lab.scripted import Script
from bascule.legacy import LegacyPeer

PEER = LegacyPeer("imap.old.test", 993, 5)
STEPS = pytest.mark.parametrize("step", [1, 16, 4096])


def wire_on(*said: bytes, step: int = 4096, failure: OSError | None = None) -> Wire:
    return Wire(Script(*said, step=step, failure=failure), PEER, silence=5)


def pipeline_on(*said: bytes, step: int = 4096) -> Pipeline:
    return Pipeline(wire_on(*said, step=step))


def pieces(_size: int, coming: Iterator[bytes]) -> object:
    return b"".join(coming)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


# Bytes --------------------------------------------------------------------------------


@STEPS
def test_lines_and_bytes_come_as_they_were_sent(step: int) -> None:
    wire = wire_on(b"one\r\n", b"two\nthree\r\n", b"x" * 100, b"four\r\n", step=step)
    assert wire.readline() == b"one\r\n"
    assert wire.readline() == b"two\n"
    assert wire.read(3) == b"thr"
    assert wire.readline() == b"ee\r\n"
    assert wire.read(100) == b"x" * 100
    assert wire.readline() == b"four\r\n"
    with pytest.raises(LegacyUnavailable, match="closed the connection"):
        wire.readline()


@STEPS
def test_a_line_has_a_bound(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wires, "MAX_LINE", 1000)
    wire = wire_on(b"x" * 1000 + b"\n" + b"y" * 9000, step=step)
    assert len(wire.readline()) == 1001
    with pytest.raises(LegacyUnavailable, match="a line of more than 1000 bytes"):
        wire.readline()


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        (ConnectionResetError(104, "Connection reset by peer"), "ended the connection"),
        (TimeoutError("timed out"), "does not answer in time"),
        (BrokenPipeError(32, "Broken pipe"), "ended the connection"),
    ],
)
def test_errors_of_the_network_speak_of_the_peer(failure: OSError, said: str) -> None:
    wire = wire_on(b"half a l", failure=failure)
    with pytest.raises(LegacyUnavailable, match=said) as found:
        wire.readline()
    assert found.value.__cause__ is failure
    assert found.value.hint
    # A server that counts sessions counts this one no more.
    assert isinstance(wire.socket, Script)
    assert wire.socket.is_closed


def test_whose_server_it_is_the_peer_knows() -> None:
    wire = Wire(Script(b"", failure=TimeoutError()), DovecotHere(), silence=5)
    with pytest.raises(LocalUnavailable, match="Dovecot here does not answer in time") as found:
        wire.readline()
    assert found.value.hint
    pipeline = Pipeline(Wire(Script(b"p1 NO [INUSE] later\r\n"), DovecotHere(), silence=5))
    with pytest.raises(LocalUnavailable, match="Dovecot here says to come back later"):
        pipeline.run(b"X")


def test_the_disk_s_errors_are_the_disk_s() -> None:
    pipeline = pipeline_on(b"* 1 FETCH (UID 1 BODY[] {3}\r\nabc)\r\n")
    pipeline.send(b"X")

    def full(_size: int, coming: Iterator[bytes]) -> object:
        next(coming)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left") as found:
        pipeline.read(full)
    assert not isinstance(found.value, ServerUnavailable)


# Time ---------------------------------------------------------------------------------


def test_silence_ends(pair: tuple[socket.socket, socket.socket]) -> None:
    with pytest.raises(LegacyUnavailable, match="does not answer in time") as found:
        Wire(pair[0], PEER, silence=0.05).readline()
    assert isinstance(found.value.__cause__, TimeoutError)


def test_what_the_peer_does_not_take_ends(pair: tuple[socket.socket, socket.socket]) -> None:
    with pytest.raises(LegacyUnavailable, match="does not answer in time"):
        Wire(pair[0], PEER, silence=0.05).send(b"x" * (8 << 20))


@pytest.mark.parametrize("reads", ["line", "bytes"])
def test_a_dripping_peer_uses_up_its_budget(reads: str, pair: tuple[socket.socket, socket.socket]) -> None:
    ended = threading.Event()

    def drip() -> None:
        try:
            for _ in range(500):
                if ended.wait(0.01):
                    return
                pair[1].sendall(b"x")
            pair[1].shutdown(socket.SHUT_RDWR)  # the budget was not heeded
        except OSError:
            return  # the wire has closed it

    dripping = threading.Thread(target=drip)
    dripping.start()
    try:
        wire = Wire(pair[0], PEER, silence=30)  # no read comes near it
        wire.allow(0.2)
        with pytest.raises(LegacyUnavailable, match="does not answer in time"):
            wire.readline() if reads == "line" else wire.read(1 << 20)
    finally:
        ended.set()
        dripping.join()


def test_bytes_at_a_reasonable_rate_add_to_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    class Slow(Script):
        """4,096 bytes each second."""

        def recv(self, size: int) -> bytes:
            clock[0] += 1
            return super().recv(size)

    wire = Wire(Slow(b"x" * (4096 * 500), step=4096), PEER, silence=2)
    wire.allow()
    assert sum(len(wire.read(4096)) for _ in range(500)) == 4096 * 500
    assert clock[0] == 500
    wire = Wire(Slow(b"x" * (4096 * 500), step=1000), PEER, silence=2)
    wire.allow()
    with pytest.raises(LegacyUnavailable, match="does not answer in time"):
        for _ in range(2000):
            wire.read(1000)
    assert clock[0] < 600


def test_the_budget_is_renewed_by_each_answer_but_not_in_a_login() -> None:
    pipeline = pipeline_on(b"p1 OK\r\np2 OK\r\n")
    allowed: list[float | None] = []

    def allow(seconds: float | None = None) -> None:
        allowed.append(seconds)

    pipeline.wire.allow = allow  # type: ignore[method-assign]
    pipeline.renews = False
    pipeline.run(b"A")
    assert not allowed
    pipeline.renews = True
    pipeline.run(b"B")
    assert allowed == [None, None]


# Bounds -------------------------------------------------------------------------------


def test_responses_without_end_are_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipelines, "RESPONSES", 10)
    with pytest.raises(LegacyUnavailable, match="more than 10 responses to one command"):
        pipeline_on(b"* OK still at it\r\n" * 11).run(b"X")
    # As many as there are messages are no flood, and each command is counted by itself.
    pipeline = pipeline_on(b"* 5 EXISTS\r\n", b"* OK\r\n" * 20, b"p1 OK\r\n", b"* OK\r\n" * 20, b"p2 OK\r\n")
    assert len(pipeline.run(b"X")) == 21
    assert len(pipeline.run(b"X")) == 20


def test_bytes_without_end_are_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipelines, "BYTES", 1000)
    with pytest.raises(LegacyUnavailable, match="more than 1000 bytes"):
        pipeline_on(b'* LIST () NIL "%s"\r\n' % (b"x" * 300) * 4).run(b"X")


def test_a_folder_with_more_messages_than_there_are_is_refused() -> None:
    with pytest.raises(LegacyUnavailable, match="4294967295 messages in one folder"):
        pipeline_on(b"* 4294967295 EXISTS\r\n").run(b"X")
    with pytest.raises(LegacyUnavailable, match="does not speak IMAP"):
        pipeline_on(b"* x EXISTS\r\n").run(b"X")


@pytest.mark.parametrize(
    "said",
    [
        b"* LIST () NIL {65537}\r\n",
        b"* LIST () NIL {99999999999}\r\n",
        b"* LIST () NIL {%s}\r\n" % (b"9" * 400),
        b"* 1 FETCH (BODY[TEXT] {99999999}\r\n",
        b"* 1 FETCH (UID 1 BODY[] {4294967296}\r\n",
        b"* 1 FETCH (UID 1 BODY[] {1}\r\nx BODY[] {99999}\r\n",
    ],
)
def test_literals_that_nobody_asked_for_have_a_bound(said: bytes) -> None:
    pipeline = pipeline_on(said)
    pipeline.send(b"X")
    with pytest.raises(LegacyUnavailable):
        pipeline.read(pieces)


def test_a_response_of_literals_without_end_is_stopped() -> None:
    with pytest.raises(LegacyUnavailable, match="a response without an end"):
        pipeline_on(b"* LIST {0}\r\n", b" {0}\r\n" * 100_000).run(b"X")


@STEPS
def test_bodies_and_other_literals_in_any_pieces(step: int) -> None:
    pipeline = pipeline_on(b"* 1 FETCH (X {3}\r\na\r\n BODY[] {5}\r\nb\r\n)\r UID 1)\r\np1 OK\r\n", step=step)
    pipeline.send(b"X")
    response = pipeline.read(pieces)
    assert isinstance(response, Untagged)
    assert response.body == b"b\r\n)\r"
    assert response.text == b"1 FETCH (X {3} BODY[] {5} UID 1)"
    assert sorted(response.literals.values()) == [b"", b"a\r\n"]


# Words --------------------------------------------------------------------------------


def test_a_server_s_words_are_harmless() -> None:
    with pytest.raises(CommandRefused) as found:
        pipeline_on(b"p1 NO [CANNOT] \x1b[31mred\0" + b"x" * 9000 + b"\r\n").run(b"X")
    assert found.value.message.isprintable()
    assert len(found.value.message) < 400
    assert found.value.code == "CANNOT"


@pytest.mark.parametrize(
    ("said", "code", "wait"),
    [
        (b"NO [LIMIT] enough", "LIMIT", 0),
        (b"BAD Request is throttled. Suggested Backoff Time: 299961 milliseconds", "THROTTLED", 299.961),
        (b"NO Server Busy", "THROTTLED", 0),
    ],
)
def test_a_server_that_wants_to_be_left_alone(said: bytes, code: str, wait: float) -> None:
    with pytest.raises(LegacyBusy) as found:
        pipeline_on(b"p1 " + said + b"\r\n").run(b"X")
    assert (found.value.code, found.value.wait) == (code, wait)
    assert found.value.hint


@pytest.mark.parametrize("said", [b"* BYE", b"* BYE \x07gone", b"* bye [UNAVAILABLE] x", b"* BYE Server Busy"])
def test_bye_ends_the_session(said: bytes) -> None:
    with pytest.raises(LegacyBusy):
        pipeline_on(said + b"\r\n").run(b"X")


@pytest.mark.parametrize("said", [b"p1 MAYBE\r\n", b"p1\r\n", b"p2 OK\r\n", b"+ go on\r\n", b"\r\n", b"*\r\n"])
def test_what_is_not_imap_is_named(said: bytes) -> None:
    with pytest.raises(LegacyUnavailable, match="does not speak IMAP"):
        pipeline_on(said).run(b"X")


def test_nothing_may_stand_behind_the_answer_to_starttls() -> None:
    pipeline = pipeline_on(b"p1 OK go\r\np2 OK smuggled\r\n")
    pipeline.run(b"STARTTLS")
    with pytest.raises(LegacyUnavailable, match="does not speak IMAP"):
        pipeline.wire.start_tls(None, "imap.old.test")  # type: ignore[arg-type]
