"""Postfix's protocols over a socket, at every read size, and against clients that misbehave."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import uvloop
from hypothesis import given
from hypothesis import strategies as st

from bascule import netstring, serving
from bascule.directory import Directory
from bascule.policy_daemon import servers
from bascule.policy_daemon.routes import Routes

Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[bytes]]


MakeServer = Callable[[str], serving.Server | servers.PromptServer]


def socketmap(routes: Routes) -> MakeServer:
    return lambda endpoint: servers.PromptServer(endpoint, lambda: servers.Socketmap(routes))


def policy(decide: Callable[[dict[str, str]], str | Awaitable[str]]) -> MakeServer:
    return lambda endpoint: servers.PromptServer(endpoint, lambda: servers.Policy(decide))


def streams(handler: serving.Handler) -> MakeServer:
    return lambda endpoint: serving.Server(endpoint, handler)


def converse(tmp_path: Path, make: MakeServer, talk: Talk) -> bytes:
    """Start the server, hold one conversation, stop."""

    async def run() -> bytes:
        server = make(f"unix:{tmp_path / 'socket'}")
        await server.start()
        reader, writer = await asyncio.open_unix_connection(tmp_path / "socket")
        try:
            async with asyncio.timeout(10):
                return await talk(reader, writer)
        finally:
            writer.close()
            await server.stop()

    return uvloop.run(run())


def sending(data: bytes, size: int = 4096) -> Talk:
    """Send ``data`` in pieces, end the sending side, read all replies."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        for start in range(0, len(data), size):
            writer.write(data[start : start + size])
            await writer.drain()
        writer.write_eof()
        return await reader.read()

    return talk


SOCKETMAP_REQUESTS = b"".join(
    netstring.encode(each)
    for each in (b"transport here@active.test", b"domains elsewhere.test", b"aliases info@active.test", b"nonsense x")
)
SOCKETMAP_REPLIES = b"".join(
    netstring.encode(each)
    for each in (
        b"OK bascule-lmtp:unix:/run/lmtp",
        b"NOTFOUND ",
        b"OK here@active.test",
        b"PERM bascule has no map 'nonsense'; it has transport, domains, aliases, senders, route, accepted",
    )
)


@pytest.mark.parametrize("size", [1, 16, 128, 4096])
def test_socketmap(routes: Routes, tmp_path: Path, size: int) -> None:
    assert converse(tmp_path, socketmap(routes), sending(SOCKETMAP_REQUESTS, size)) == SOCKETMAP_REPLIES


@pytest.mark.parametrize(
    "data", [b"100001:", b"GET / HTTP/1.0\r\n\r\n", netstring.encode(b"transport"), b"5:hello;", b"\xff" * 50]
)
def test_a_client_that_does_not_speak_socketmap_is_dropped(routes: Routes, tmp_path: Path, data: bytes) -> None:
    assert converse(tmp_path, socketmap(routes), sending(data)) == b""


def test_keys_that_are_not_text_are_not_found(routes: Routes, tmp_path: Path) -> None:
    request = netstring.encode(b"transport \xff\xfe@elsewhere.test")
    assert converse(tmp_path, socketmap(routes), sending(request)) == netstring.encode(b"NOTFOUND ")


REQUEST = b"request=smtpd_access_policy\nprotocol_state=RCPT\nrecipient=%s\n\n"


@pytest.mark.parametrize("size", [1, 16, 128, 4096])
def test_policy(routes: Routes, tmp_path: Path, size: int) -> None:
    data = REQUEST % b"anybody@active.test" + REQUEST % b"here@active.test"

    async def asked() -> str:
        await asyncio.sleep(0)
        return "450 4.2.0 ask again"

    def answer(attributes: dict[str, str]) -> str | Awaitable[str]:
        found = routes.verification(attributes["recipient"])
        return found if isinstance(found, str) else asked()

    replies = converse(tmp_path, policy(answer), sending(data, size))
    assert replies == b"action=450 4.2.0 ask again\n\naction=DUNNO\n\n"


@pytest.mark.parametrize("data", [b"nonsense\n\n", b"request=other\n\n", b"a=b\n" * 20_000])
def test_a_client_that_does_not_speak_policy_is_dropped(tmp_path: Path, data: bytes) -> None:
    def never(_: dict[str, str]) -> str:
        raise AssertionError("must not be asked")

    assert converse(tmp_path, policy(never), sending(data)) == b""


def test_half_a_request_is_given_up(routes: Routes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "REQUEST_TIMEOUT", 0.1)

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        writer.write(b"30:transport here")
        return await reader.read()  # ends when the server gives up; the client never does

    assert converse(tmp_path, socketmap(routes), talk) == b""


@given(st.binary(max_size=400), st.integers(min_value=1, max_value=60))
def test_any_bytes_are_answered_or_refused(data: bytes, size: int) -> None:
    """Whatever comes, in whatever pieces, neither protocol fails otherwise."""
    for conversation in (
        servers.Socketmap(Routes(Directory(), "unix:/run/hold", lambda _: None)),
        servers.Policy(lambda _: "DUNNO"),
    ):
        try:
            for start in range(0, len(data), size):
                assert isinstance(conversation.answer(data[start : start + size]), bytes)
        except serving.BadRequest as error:
            assert str(error)


@given(
    st.binary(max_size=100).filter(lambda key: b"," not in key), st.sampled_from(["transport", "domains", "aliases"])
)
def test_any_key_gets_one_reply(key: bytes, map_name: str) -> None:
    conversation = servers.Socketmap(Routes(Directory(loaded=True), "unix:/run/hold", lambda _: None))
    reply = conversation.answer(netstring.encode(map_name.encode() + b" " + key))
    assert [each.split(b" ")[0] for each in netstring.Parser().feed(reply)] == [b"NOTFOUND"]


def test_what_was_asked_is_answered_before_the_end(tmp_path: Path) -> None:
    """A stop does not cut off who is being answered, nor wait for who is idle."""
    asked, answer = asyncio.Event(), asyncio.Event()

    async def slowly(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await serving.read(reader, pending=False):
            asked.set()
            await answer.wait()
            writer.write(data.upper())
            await writer.drain()

    async def run() -> tuple[bytes, bytes]:
        server = serving.Server(f"unix:{tmp_path / 'socket'}", slowly)
        await server.start()
        idle, idle_writer = await asyncio.open_unix_connection(tmp_path / "socket")
        reader, writer = await asyncio.open_unix_connection(tmp_path / "socket")
        writer.write(b"hello")
        await asked.wait()
        stopping = asyncio.create_task(server.stop())
        assert await idle.read() == b""
        with pytest.raises(ConnectionError):
            await asyncio.open_unix_connection(tmp_path / "socket")
        answer.set()
        answered = await reader.read()
        await stopping
        for each in (idle_writer, writer):
            each.close()
        return answered, await reader.read()

    assert uvloop.run(run()) == (b"HELLO", b"")


def test_who_never_stops_asking_does_not_stop_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "ANSWER_TIMEOUT", 0.1)

    async def never(_reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        await asyncio.Event().wait()

    async def talk(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> bytes:
        await asyncio.sleep(0)
        return b""

    assert converse(tmp_path, streams(never), talk) == b""


def test_a_client_that_does_not_read_is_not_listened_to(routes: Routes, tmp_path: Path) -> None:
    """Its requests pile up on its own side; when it reads, it gets every reply."""
    request, count = netstring.encode(b"domains elsewhere.test"), 60_000

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        writer.write(request * count)
        writer.write_eof()
        return await reader.read()

    assert converse(tmp_path, socketmap(routes), talk) == netstring.encode(b"NOTFOUND ") * count


HELLO = b"LHLO mx.test\r\nMAIL FROM:<>\r\n"


def lmtp(arrived: list[str]) -> MakeServer:
    return streams(servers.Lmtp(lambda recipient: recipient.endswith("@barrier.test"), arrived.append).serve)


@pytest.mark.parametrize("size", [1, 16, 4096])
def test_held_mail_is_always_told_to_come_back(tmp_path: Path, size: int) -> None:
    arrived: list[str] = []
    data = (
        HELLO
        + b"RCPT TO:<alice@lab.test>\r\nRSET\r\nMAIL FROM:<a@b.test>\r\nRCPT TO:<bob@lab.test>\r\nDATA\r\nQUIT\r\n"
    )
    said = converse(tmp_path, lmtp(arrived), sending(data, size)).split(b"\r\n")
    assert [line[:9] for line in said if line.startswith((b"4", b"5"))] == [b"450 4.2.1", b"450 4.2.1", b"503 5.5.1"]
    assert arrived == []


@pytest.mark.parametrize("size", [1, 16, 4096])
def test_a_barrier_has_arrived_when_it_is_whole(tmp_path: Path, size: int) -> None:
    data = HELLO + b"RCPT TO:<alice@lab.test>\r\nRCPT TO:<x@barrier.test>\r\nDATA\r\nSubject: barrier\r\n\r\n"
    broken_off: list[str] = []
    converse(tmp_path, lmtp(broken_off), sending(data, size))
    assert broken_off == []
    arrived: list[str] = []
    said = converse(tmp_path, lmtp(arrived), sending(data + b".\r\nQUIT\r\n", size))
    assert arrived == ["x@barrier.test"]
    assert said.endswith(b"354 go on\r\n250 2.0.0 ok\r\n221 2.0.0 bye\r\n")


def test_a_line_without_end_is_not_lmtp(tmp_path: Path) -> None:
    assert converse(tmp_path, lmtp([]), sending(b"x" * 100_000)) == b"220 bascule\r\n"


def test_an_answer_that_takes_time_is_given_before_the_end(tmp_path: Path) -> None:
    async def slowly() -> str:
        await asyncio.sleep(0.05)
        return "DUNNO"

    async def run() -> bytes:
        server = policy(lambda _: slowly())(f"unix:{tmp_path / 'socket'}")
        await server.start()
        reader, writer = await asyncio.open_unix_connection(tmp_path / "socket")
        writer.write(REQUEST % b"x@y.test")
        while not any(each.answering for each in getattr(server, "clients")):  # noqa: ASYNC110, B009
            await asyncio.sleep(0)
        await server.stop()
        answered = await reader.read()
        writer.close()
        return answered

    assert uvloop.run(run()) == b"action=DUNNO\n\n"
