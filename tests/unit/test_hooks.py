"""What hooks and authenticator say to each other, and logins at a legacy server that does not answer."""

from __future__ import annotations

import asyncio
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bascule import netstring
from bascule.address import Address
from bascule.check.dovecot import ASIDE
from bascule.credential import Password
from bascule.errors import BasculeError, LegacyBusy, LegacyRefusedLogin, LegacyUnavailable
from bascule.hooks import legacy_logins
from bascule.hooks.deputy import Answer, Left
from bascule.hooks.legacy_logins import AT_ONE_SERVER, LegacyLogins
from bascule.hooks.protocol import AT_WORK, MAX_FIELD, Login, Lookup, Reply, Users, decode
from bascule.legacy import LegacySettings, Service, Trust
from bascule.serving import BadRequest

CHECKPASSWORD = Path(__file__).resolve().parents[2] / "hooks" / "bascule-checkpassword"
#: Stands for Dovecot's own: it prints what it would return.
REPLY = """#!/bin/sh
echo "user=$USER extra=$EXTRA"
for name in $EXTRA; do eval echo "$name=\\$$name"; done
"""


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=200))
def test_a_request_is_read_as_it_was_made(text: str) -> None:
    for former in (False, True):
        fields = [] if former else ["login"]
        request = decode("\0".join([*fields, text, text, "imap", "192.0.2.1"]).encode())
        assert isinstance(request, Login)
        assert (request.user, request.password.secret, request.wants_sign) == (text, text, not former)
    assert decode(f"userdb\0{text}\0lmtp".encode()) == Lookup("userdb", text, "lmtp")
    assert decode(b"users") == Users()


@pytest.mark.parametrize(
    "payload",
    [b"", b"a\0b", b"a\0b\0c\0d\0e", b"otherdb\0b\0c", b"\xff\0b\0c\0d", b"a\0" + b"s3cret" * MAX_FIELD + b"\0imap\0"],
)
def test_what_is_no_request_is_refused_and_not_quoted(payload: bytes) -> None:
    with pytest.raises(BadRequest) as error:
        decode(payload)
    assert "s3cret" not in str(error.value)
    assert error.value.__cause__ is None


@contextmanager
def answering(path: Path, answer: bytes) -> Iterator[list[bytes]]:
    """An authenticator that says one thing; what it was asked."""
    asked: list[bytes] = []
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()

        def serve() -> None:
            connection, _ = listening.accept()
            with connection:
                parser = netstring.Parser()
                while not asked:
                    asked.extend(parser.feed(connection.recv(4096)))
                connection.sendall(answer)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield asked


def checkpassword(
    tmp_path: Path, given: bytes, listed: str | None = "a.test", database: str | None = "passdb", **more: str
) -> subprocess.CompletedProcess[bytes]:
    """Run the script as Dovecot does, for a database; None: as version 0.1 has it."""
    program = tmp_path / "checkpassword-reply"
    program.write_text(REPLY)
    program.chmod(0o755)
    secrets = tmp_path / "descriptor-3"
    secrets.write_bytes(given)
    domains = tmp_path / "domains"
    if listed is not None:
        domains.write_text(f"# Domains\n{listed}\n")
    left = f"{tmp_path / 'deputy'} {tmp_path / 'until'}"
    given_to = f"{tmp_path / 'socket'}" + ("" if database is None else f" {domains} {database} {left}")
    command = f'exec {sys.executable} -IS {CHECKPASSWORD} {given_to} {program} 3<"{secrets}"'
    environment = {"SERVICE": "imap", "TCPREMOTEIP": "192.0.2.1", "PATH": "/usr/bin:/bin", **more}
    return subprocess.run(["/bin/sh", "-c", command], env=environment, capture_output=True, timeout=30, check=False)


@pytest.mark.parametrize(
    ("reply", "code", "printed"),
    [
        (Reply("ok"), 0, "user=Al@a.test extra=\n"),
        (Reply("ok", {"user": "al@a.test"}), 0, "user=al@a.test extra=\n"),
        (
            Reply("ok", {"proxy": "y", "host": "old.test", "user": "al@a.test"}),
            0,
            "user=al@a.test extra=proxy host\nproxy=y\nhost=old.test\n",
        ),
        (Reply("refused"), 1, ""),
        (Reply("unknown"), 0, "user=Al@a.test extra=noauthenticate\nnoauthenticate=y\n"),
        (Reply("temporary"), 111, ""),
    ],
)
def test_checkpassword(tmp_path: Path, reply: Reply, code: int, printed: str) -> None:
    with answering(tmp_path / "socket", AT_WORK + reply.encode()) as asked:
        done = checkpassword(tmp_path, "Al@a.test\0pässword\0001\0".encode())
    assert (done.returncode, done.stdout.decode(), done.stderr.decode()) == (code, printed, "")
    assert asked == ["login\0Al@a.test\0pässword\0imap\x00192.0.2.1".encode()]


@pytest.mark.parametrize(
    ("reply", "code", "printed"),
    [
        (
            Reply("ok", {"user": "al@a.test", "home": "/mail/al", "namespace/inbox/separator": "."}),
            0,
            "user=al@a.test extra=userdb_user userdb_namespace/inbox/separator\n",
        ),
        (Reply("refused"), 111, ""),
        (Reply("unknown"), 3, ""),
        (Reply("temporary"), 111, ""),
    ],
)
def test_checkpassword_as_a_userdb(tmp_path: Path, reply: Reply, code: int, printed: str) -> None:
    """Dovecot says the name as auth_username_format left it, and the original one in the environment."""
    with answering(tmp_path / "socket", reply.encode()) as asked:
        done = checkpassword(
            tmp_path, b"al\0\0\0", database="userdb", AUTHORIZED="1", AUTH_ORIG_USER="al@a.test", SERVICE="lmtp"
        )
    assert (done.returncode, done.stdout.decode().splitlines(keepends=True)[:1]) == (code, [printed] if printed else [])
    assert asked == [b"userdb\0al@a.test\0lmtp"]


def test_checkpassword_steps_aside_for_the_check_of_the_operators_userdbs(tmp_path: Path) -> None:
    asked = checkpassword(
        tmp_path, b"al@a.test\0\0\0", database="userdb", AUTHORIZED="1", SERVICE="lmtp", TCPREMOTEIP=ASIDE
    )
    assert asked.returncode == 3
    # A login from there is a login.
    assert checkpassword(tmp_path, b"al@a.test\0secret\0001\0", TCPREMOTEIP=ASIDE).returncode == 111


@pytest.mark.parametrize(
    ("reply", "code", "printed"),
    [
        (Reply("ok", {"proxy": "y", "host": "old.test"}), 0, "user=al@a.test extra=proxy host\n"),
        (Reply("refused"), 3, ""),
        (Reply("unknown"), 0, "user=al@a.test extra=noauthenticate\n"),
        (Reply("temporary"), 111, ""),
    ],
)
def test_checkpassword_as_a_passdb_without_a_password(tmp_path: Path, reply: Reply, code: int, printed: str) -> None:
    with answering(tmp_path / "socket", reply.encode()) as asked:
        done = checkpassword(tmp_path, b"al@a.test\0\0\0", AUTHORIZED="1", CREDENTIALS_LOOKUP="1", SCHEME="")
    assert (done.returncode, done.stdout.decode().splitlines(keepends=True)[:1]) == (code, [printed] if printed else [])
    assert asked == [b"passdb\0al@a.test\0imap"]


@pytest.mark.parametrize("name", ["al", "al@b.test", "al@a.test.b"])
def test_names_of_others_do_not_wait_for_the_authenticator(tmp_path: Path, name: str) -> None:
    """There is none. Without a password they go on to the next passdb, too: a static userdb asks so who exists."""
    for more in ({}, {"AUTHORIZED": "1"}):
        done = checkpassword(tmp_path, f"{name}\0secret\0001\0".encode(), **more)
        assert (done.returncode, "noauthenticate" in done.stdout.decode()) == (0, True)
    found = checkpassword(tmp_path, f"{name}\0\0\0".encode(), database="userdb", AUTHORIZED="1")
    assert found.returncode == 3


def test_a_configuration_of_version_0_1_names_the_socket_only(tmp_path: Path) -> None:
    """It is there until the playbook has written the new one, while the program is the new one already."""
    for reply, code, printed in (
        (Reply("ok"), 0, "user=al@a.test extra=\n"),
        (Reply("refused"), 1, ""),
        (Reply("unknown"), 0, "user=al@a.test extra=noauthenticate\nnoauthenticate=y\n"),
    ):
        with answering(tmp_path / "socket", AT_WORK + reply.encode()) as asked:
            done = checkpassword(tmp_path, b"al@a.test\0s3cret\0001\0", database=None)
        assert (done.returncode, done.stdout.decode()) == (code, printed)
        assert asked == [b"login\0al@a.test\0s3cret\0imap\x00192.0.2.1"]
        (tmp_path / "socket").unlink()


def test_while_there_is_no_list_every_domain_may_be_ours(tmp_path: Path) -> None:
    assert checkpassword(tmp_path, b"al@b.test\0secret\0001\0", listed=None).returncode == 111
    assert checkpassword(tmp_path, b"al@b.test\0\0\0", listed=None, database="userdb", AUTHORIZED="1").returncode == 111


def test_an_authenticator_that_hangs_is_given_up_soon(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        listening.listen()
        assert checkpassword(tmp_path, b"al@a.test\0secret\0001\0").returncode == 111


@pytest.mark.parametrize("answer", [b"", b"2:o", b"junk", b"2:ok", b"99:ok,", b"4:maybe,", b"5:maybe,"])
def test_half_an_answer_is_no_answer(tmp_path: Path, answer: bytes) -> None:
    with answering(tmp_path / "socket", answer):
        assert checkpassword(tmp_path, b"al@a.test\0s3cret\0001\0").returncode == 111


def test_without_the_authenticator_it_is_temporary(tmp_path: Path) -> None:
    done = checkpassword(tmp_path, b"al@a.test\0s3cret\0001\0")
    assert done.returncode == 111
    assert b"does not answer" in done.stderr
    assert b"s3cret" not in done.stderr


# What the authenticator left ---------------------------------------------------------


def leave(tmp_path: Path, names: dict[str, Left], *, good: float = 60) -> None:
    (tmp_path / "until").write_text(f"{time.time() + good:.0f}\n")
    (tmp_path / "deputy").mkdir()
    for name, left in names.items():
        (tmp_path / "deputy" / name).write_bytes(left.encode())


OF_AL = Left(
    (
        Answer("login", "smtp", Reply("ok", {"user": "al@a.test"})),
        Answer("login", "*", Reply("ok", {"user": "al@a.test", "proxy": "y"})),
        Answer("userdb", "*", Reply("ok", {"user": "al@a.test", "home": "/mail/al", "x": ""})),
    ),
    Password("right").hashed(),
)
OF_A_TEST = Left((Answer("login", "imap", Reply("ok", {"user": "*@a.test", "proxy": "y", "destuser": "*"})),))


@pytest.mark.parametrize(
    ("name", "password", "service", "code", "printed"),
    [
        ("al@a.test", "right", "imap", 0, "user=al@a.test extra=proxy\nproxy=y\n"),
        ("AL@A.Test", "right", "pop3", 0, "user=al@a.test extra=proxy\nproxy=y\n"),
        ("al@a.test", "right", "smtp", 0, "user=al@a.test extra=\n"),
        ("al@a.test", "wrong", "imap", 1, ""),
        ("al@a.test", "wrong", "smtp", 1, ""),
        ("bo@a.test", "any", "imap", 0, "user=bo@a.test extra=proxy destuser\nproxy=y\ndestuser=bo\n"),
        ("b/../o@a.test", "any", "imap", 0, "user=b/../o@a.test extra=proxy destuser\nproxy=y\ndestuser=b/../o\n"),
        ("../deputy/al@a.test", "any", "pop3", 111, ""),
        ("bo@a.test", "any", "pop3", 111, ""),
        ("bo@a.test", "any", "lmtp", 111, ""),
        ('"al"@a.test', "right", "imap", 111, ""),
        ("\u212aal@a.test", "right", "imap", 111, ""),
        ("a l@a.test", "right", "imap", 111, ""),
        ("@a.test", "right", "imap", 111, ""),
        ("x" * 249 + "@a.test", "right", "imap", 111, ""),
    ],
)
def test_without_the_authenticator_what_it_left_is_used(
    tmp_path: Path, name: str, password: str, service: str, code: int, printed: str
) -> None:
    leave(tmp_path, {"al@a.test": OF_AL, "@a.test": OF_A_TEST})
    done = checkpassword(tmp_path, f"{name}\0{password}\0001\0".encode(), SERVICE=service)
    assert (done.returncode, done.stdout.decode()) == (code, printed)
    assert b"does not answer" in done.stderr
    assert password.encode() not in done.stderr


def test_of_who_has_not_moved_postfix_is_given_no_proof(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave(tmp_path, {"@a.test": OF_A_TEST})
    began = time.monotonic()
    assert checkpassword(tmp_path, b"bo@a.test\0any\0001\0", SERVICE="smtp").returncode == 111
    assert time.monotonic() - began > 12, "for ten seconds of silence are a temporary failure to it"


@pytest.mark.parametrize(
    ("name", "service", "code", "printed"),
    [
        ("al", "lmtp", 0, "user=al@a.test extra=userdb_user\n"),
        ("bo", "lmtp", 111, ""),
    ],
)
def test_without_the_authenticator_mailboxes_are_found(
    tmp_path: Path, name: str, service: str, code: int, printed: str
) -> None:
    leave(tmp_path, {"al@a.test": OF_AL, "@a.test": OF_A_TEST})
    done = checkpassword(
        tmp_path,
        f"{name}\0\0\0".encode(),
        database="userdb",
        AUTHORIZED="1",
        AUTH_ORIG_USER=f"{name}@a.test",
        SERVICE=service,
    )
    assert (done.returncode, done.stdout.decode().splitlines(keepends=True)[:1]) == (code, [printed] if printed else [])


@pytest.mark.parametrize("spoilt", ["old", "no moment", "half", "unknown hash", "no file"])
def test_what_was_left_is_used_whole_and_in_time_or_not_at_all(tmp_path: Path, spoilt: str) -> None:
    leave(tmp_path, {"al@a.test": OF_AL, "@a.test": OF_A_TEST}, good=-1 if spoilt == "old" else 60)
    file = tmp_path / "deputy" / "al@a.test"
    if spoilt == "no moment":
        (tmp_path / "until").unlink()
    elif spoilt == "half":
        file.write_bytes(OF_AL.encode()[:-1])
    elif spoilt == "unknown hash":
        file.write_bytes(replace(OF_AL, password_hash="{UNKNOWN}x").encode())
    elif spoilt == "no file":
        file.unlink()
        (tmp_path / "deputy" / "@a.test").unlink()
    assert checkpassword(tmp_path, b"al@a.test\0right\0001\0").returncode == 111


def test_a_password_that_is_not_text_is_refused(tmp_path: Path) -> None:
    assert checkpassword(tmp_path, b"al@a.test\0\xff\xfe\0001\0").returncode == 1


# A legacy server that does not answer ------------------------------------------------


@contextmanager
def silent_server() -> Iterator[int]:
    """Takes connections and says nothing."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(1024)
        yield listening.getsockname()[1]


def settings_for(port: int) -> LegacySettings:
    return LegacySettings("a.test", "127.0.0.1", Service(port, "none"), "127.0.0.1", 25)


def test_a_silent_legacy_server_has_its_share_and_no_more() -> None:
    async def run() -> None:
        logins = LegacyLogins(Trust(timeout=1))
        with silent_server() as port, silent_server() as other:
            alice, password = Address("alice", "a.test"), Password("x")

            async def reason(number: int) -> str:
                with pytest.raises(LegacyUnavailable) as error:
                    await logins.check(settings_for(number), alice, password)
                return error.value.message

            first = [asyncio.create_task(reason(port)) for _ in range(AT_ONE_SERVER + 1)]
            # One too many: answered at once, while the others still wait; those of another server are not in the way.
            done, waiting = await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
            assert [re.sub(r".*:\d+ ", "", task.result()) for task in done] == ["is slow, too many logins wait for it"]
            assert len(waiting) == AT_ONE_SERVER
            elsewhere = asyncio.create_task(reason(other))
            await asyncio.wait([*first, elsewhere])
            assert "does not answer in time" in elsewhere.result()
            # It is known to be down: one login tries, the others are told so at once.
            again = [asyncio.create_task(reason(port)) for _ in range(20)]
            reasons = sorted(await asyncio.gather(*again))
            assert sum("did not answer lately" in each for each in reasons) == 19
            assert sum("does not answer in time" in each for each in reasons) == 1

    asyncio.run(run())


@pytest.mark.parametrize(
    "answer", [LegacyRefusedLogin("wrong password"), LegacyBusy("come back later", code="LIMIT")], ids=["no", "not now"]
)
def test_a_server_that_answers_again_is_not_down_any_more(
    monkeypatch: pytest.MonkeyPatch, answer: BasculeError
) -> None:
    """Whatever it answers: the first who asks need not know the password."""
    outcomes: list[BasculeError] = []

    def scripted(*_: object) -> None:
        if outcomes:
            raise outcomes.pop(0)

    monkeypatch.setattr(legacy_logins, "authenticate", scripted)
    unreachable = LegacyUnavailable("nothing listens")
    unreachable.__cause__ = ConnectionRefusedError()
    outcomes += [unreachable, answer]

    async def run() -> None:
        logins = LegacyLogins(Trust())
        for expected in (LegacyUnavailable, type(answer)):
            with pytest.raises(expected):
                await logins.check(settings_for(143), Address("alice", "a.test"), Password("x"))
        await asyncio.gather(
            *(logins.check(settings_for(143), Address("alice", "a.test"), Password("x")) for _ in range(AT_ONE_SERVER))
        )

    asyncio.run(run())
