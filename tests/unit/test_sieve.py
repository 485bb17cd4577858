"""Sieve scripts as users have them, ManageSieve servers as they should not be, and what is here already."""

from __future__ import annotations

import os
import shutil
import ssl
import time
import tracemalloc
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path

import pytest
import trustme

from bascule.address import Address
from bascule.credential import Password
from bascule.errors import LegacyUnavailable
from bascule.lab.lines import Client, serving
from bascule.legacy import LegacySettings, Service, TlsMode, Trust
from bascule.migrator import sieve
from bascule.migrator.sieve import (
    Place,
    Scripts,
    ScriptsNotRead,
    personal_storage,
    place_here,
    read_scripts,
    unknown_extensions,
    write_scripts,
)

LATIN = 'require ["vacation"];\r\nvacation "Grüße";\r\n'.encode("latin-1")


def read(
    server: Callable[[Client], None],
    *,
    tls: TlsMode = "none",
    ca: Path | None = None,
    seconds: float = 20,
    timeout: float = 5,
) -> Scripts:
    with serving(server) as port:
        return read_scripts(
            LegacySettings("test", "imap.invalid", Service(143, "none"), "127.0.0.1", 25),
            Service(port, tls),
            Trust(ca, timeout),
            Address("user", "test"),
            Password("pw"),
            host="localhost",
            seconds=seconds,
        )


def manage_sieve(
    listing: bytes, scripts: dict[bytes, bytes], *, greeting: bytes = b'"SASL" "PLAIN"\r\nOK\r\n'
) -> Callable[[Client], None]:
    """A server that answers LISTSCRIPTS with ``listing`` and GETSCRIPT with what ``scripts`` has, byte for byte;
    it hangs up where there is none.
    """

    def serve(client: Client) -> None:
        client.raw(greeting)
        while line := client.line():
            word = line.split()[0]
            if word == b"AUTHENTICATE":
                client.raw(b'OK (SASL "cnNwYXV0aA==")\r\n')
            elif word == b"LISTSCRIPTS":
                client.raw(listing)
            elif word == b"GETSCRIPT":
                name = client.exactly(int(line.partition(b"{")[2].partition(b"+")[0]))
                client.line()
                if name not in scripts:
                    return
                client.raw(scripts[name])
            else:
                client.raw(b"OK\r\n")

    return serve


def test_the_password_is_said_in_tls_only(tmp_path: Path) -> None:
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    in_clear: list[bytes] = []

    def serve(client: Client) -> None:
        client.say(b'"STARTTLS"', b"OK")
        in_clear.append(client.line())
        client.say(b"OK")
        client.secure(context)
        # The capabilities once more (RFC 5804 section 2.2).
        manage_sieve(b'"a"\r\nOK\r\n', {b"a": literal(b"keep;")})(client)

    assert read(serve, tls="starttls", ca=tmp_path / "ca.pem").bodies == {"a": b"keep;"}
    assert in_clear == [b"STARTTLS"]
    with pytest.raises(LegacyUnavailable, match="is not trusted"):
        read(serve, tls="starttls")


def test_who_is_refused_reads_nothing() -> None:
    def serve(client: Client) -> None:
        client.say(b"OK")
        line = client.line()
        assert line == b'AUTHENTICATE "PLAIN" "%s"' % b64encode(b"\0user@test\0pw")
        client.say(b'NO "wrong password"')
        client.line()

    with pytest.raises(ScriptsNotRead, match="wrong password"):
        read(serve)


def literal(body: bytes) -> bytes:
    return b"{%d}\r\n%s\r\nOK\r\n" % (len(body), body)


def test_scripts_are_read_as_bytes() -> None:
    found = read(
        manage_sieve(
            b'"plain"\r\n{8}\r\nlatin \xe9x ACTIVE\r\n"quo\\"te\\\\d"\r\nOK "done"\r\n',
            {
                b"plain": b'"keep;"\r\nOK\r\n',
                b"latin \xe9x": literal(LATIN),
                b'quo"te\\d': b"{5+}\r\nOK\r\n#\r\nOK {4}\r\nfine\r\n",
            },
        )
    )
    latin = b"latin \xe9x".decode(errors="surrogateescape")
    assert found == Scripts({"plain": b"keep;", latin: LATIN, 'quo"te\\d': b"OK\r\n#"}, latin)


def test_one_that_is_refused_or_too_large_is_named_and_the_others_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sieve, "MAX_SCRIPT", 1000)
    scripts = {
        b"a": b"NO {7}\r\nno such\r\n",
        b"b": literal(b"#" * 1001),
        b"c": literal(b"#" * 1000),
        b"d": b'NO "\x1b[2J"\r\n',
    }
    found = read(manage_sieve(b'"a"\r\n"b" ACTIVE\r\n"c"\r\n"d"\r\nOK\r\n', scripts))
    assert found.bodies == {"c": b"#" * 1000}
    assert found.active == "b"
    assert "no such" in found.unread["a"]
    assert "larger" in found.unread["b"]
    assert "\x1b" not in found.unread["d"]


@pytest.mark.parametrize(
    "answer",
    [
        b"{4}\r\nkeep;\r\nstop;\r\nOK\r\n",  # larger than it was said to be
        b"{5}\r\nkeep;\r\nstop;\r\nOK\r\n",
        b'"keep;\r\n',
        b"OK\r\n",
        b"keep\r\nOK\r\n",
        b"BYE\r\n",
    ],
)
def test_a_script_whose_end_is_not_right_is_not_taken(answer: bytes) -> None:
    found = read(manage_sieve(b'"a"\r\n"b"\r\n"c"\r\nOK\r\n', {b"a": literal(b"keep;"), b"b": answer, b"c": answer}))
    assert found.bodies == {"a": b"keep;"}
    assert found.unread.keys() == {"b", "c"}


def test_a_session_that_ends_leaves_what_was_read() -> None:
    found = read(manage_sieve(b'"a"\r\n"b"\r\nOK\r\n', {b"a": literal(b"keep;")}))
    assert found.bodies == {"a": b"keep;"}
    assert found.unread.keys() == {"b"}


def endless_line(client: Client) -> None:
    while True:
        client.raw(b"x" * 65536)


def endless_lines(client: Client) -> None:
    while True:
        client.raw(b'"X"\r\n' * 10000)


def endless_literals(client: Client) -> None:
    while True:
        client.raw(b"{1000000}\r\n" + b"x" * 1_000_000)


def huge_literal(client: Client) -> None:
    client.raw(b"{999999999999}\r\n")
    endless_line(client)


def dripping(client: Client) -> None:
    while True:
        client.raw(b'"')
        time.sleep(0.02)


@pytest.mark.parametrize("server", [endless_line, endless_lines, endless_literals, huge_literal, dripping])
def test_a_hostile_server_is_left_in_time(server: Callable[[Client], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sieve, "MOST", 24 << 20)
    tracemalloc.start()
    try:
        with pytest.raises((LegacyUnavailable, ScriptsNotRead), match=r"too slow|without end|more than|in time"):
            read(server, seconds=2)
        assert tracemalloc.get_traced_memory()[1] < 40_000_000
    finally:
        tracemalloc.stop()


# Writing ----------------------------------------------------------------------------


def here(home: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (home / "sieve").iterdir()}


def test_what_was_read_is_written_with_the_line_ends_of_files(tmp_path: Path) -> None:
    assert write_scripts(tmp_path, Scripts({"müll": LATIN, "b": b"keep;"}, "müll")) == []
    assert here(tmp_path) == {"müll.sieve": LATIN.replace(b"\r\n", b"\n"), "b.sieve": b"keep;"}
    assert os.readlink(tmp_path / ".dovecot.sieve") == "sieve/müll.sieve"  # noqa: PTH115
    assert write_scripts(tmp_path, Scripts({"müll": LATIN, "b": b"keep;"}, "müll")) == []


def test_names_that_cannot_be_are_the_nearest_that_can(tmp_path: Path) -> None:
    long = "ü" * 200
    scripts = {"a/b": b"1", "a_b": b"2", "../../x": b"3", "": b"4", ".hidden": b"5", "nul\0": b"6", long: b"7"}
    broken = b"\xe9".decode(errors="surrogateescape")
    notes = write_scripts(tmp_path, Scripts(scripts | {broken: b"8", long + "x": b"9"}, "a/b"))
    assert here(tmp_path)["a_b.sieve"] == b"2", "who can keep a name does"
    assert sorted(here(tmp_path).values()) == [b"%d" % number for number in range(1, 10)]
    assert (tmp_path / ".dovecot.sieve").read_bytes() == b"1"
    assert len(notes) == 8
    assert "the Sieve script 'a/b' has the name 'a_b-2' here" in notes
    assert {path.name for path in tmp_path.iterdir()} == {"sieve", ".dovecot.sieve", ".bascule-sieve.json"}


def test_after_a_return_what_nobody_changed_here_is_brought_up_to_date(tmp_path: Path) -> None:
    write_scripts(tmp_path, Scripts({"a": b"1", "b": b"2", "c": b"3", "d": b"4"}, "a"))
    (tmp_path / "sieve" / "b.sieve").write_bytes(b"changed here")
    (tmp_path / "sieve" / "mine.sieve").write_bytes(b"made here")
    notes = write_scripts(tmp_path, Scripts({"a": b"one", "b": b"two", "d": b"4", "mine": b"theirs", "e": b"5"}, "d"))
    assert here(tmp_path) == {
        "a.sieve": b"one",
        "b.sieve": b"changed here",
        "d.sieve": b"4",
        "e.sieve": b"5",
        "mine.sieve": b"made here",
    }
    assert (tmp_path / ".dovecot.sieve").read_bytes() == b"4"
    assert notes == [
        "Sieve scripts that were changed or made here stay as they are here: 'b', 'mine'",
        "Sieve scripts of an earlier move were brought up to date: 'a', 'c'",
    ]
    assert len(write_scripts(tmp_path, Scripts({"a": b"1", "d": b"4"}, ""))) == 1
    assert not (tmp_path / ".dovecot.sieve").is_symlink()


def test_the_active_script_that_a_user_chose_here_stays(tmp_path: Path) -> None:
    write_scripts(tmp_path, Scripts({"a": b"1", "b": b"2"}, "a"))
    (tmp_path / ".dovecot.sieve").unlink()
    (tmp_path / "sieve" / "mine.sieve").write_bytes(b"made here")
    (tmp_path / ".dovecot.sieve").symlink_to("sieve/mine.sieve")
    notes = write_scripts(tmp_path, Scripts({"a": b"1", "b": b"2"}, "b"))
    assert (tmp_path / ".dovecot.sieve").read_bytes() == b"made here"
    assert notes == ["the Sieve script that was made active here stays so; on the legacy server it is 'b'"]


def test_a_user_with_scripts_from_elsewhere_keeps_them(tmp_path: Path) -> None:
    (tmp_path / "sieve").mkdir()
    (tmp_path / "sieve" / "a.sieve").write_bytes(b"the user's")
    (tmp_path / ".dovecot.sieve").write_bytes(b"not even a link")
    notes = write_scripts(tmp_path, Scripts({"a": b"1"}, "a"))
    assert here(tmp_path) == {"a.sieve": b"the user's"}
    assert (tmp_path / ".dovecot.sieve").read_bytes() == b"not even a link"
    assert len(notes) == 2


def test_a_worker_that_died_while_it_wrote_leaves_nothing_that_looks_like_the_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_scripts(tmp_path, Scripts({"a": b"1"}, "a"))
    written = sieve._replace

    class Killed(BaseException):
        pass

    def dies(path: Path, body: bytes) -> None:
        if path.suffix == ".sieve":
            raise Killed
        written(path, body)

    monkeypatch.setattr(sieve, "_replace", dies)
    with pytest.raises(Killed):
        write_scripts(tmp_path, Scripts({"a": b"2", "b": b"3"}, "b"))
    monkeypatch.undo()
    write_scripts(tmp_path, Scripts({"a": b"2", "b": b"3"}, "b"))
    assert here(tmp_path) == {"a.sieve": b"2", "b.sieve": b"3"}
    assert (tmp_path / ".dovecot.sieve").read_bytes() == b"3"


@pytest.mark.parametrize("record", ["", "[]", '{"scripts": 3, "active": []}', '{"scripts": {}}', "\0"])
def test_a_record_that_cannot_be_read_makes_nothing_ours(tmp_path: Path, record: str) -> None:
    write_scripts(tmp_path, Scripts({"a": b"1"}, "a"))
    (tmp_path / sieve.RECORD).write_text(record)
    assert write_scripts(tmp_path, Scripts({"a": b"2"}, "a"))
    assert here(tmp_path) == {"a.sieve": b"1"}


def test_what_cannot_be_written_is_named_and_raises_nothing(tmp_path: Path) -> None:
    (tmp_path / "sieve").mkdir()
    (tmp_path / "sieve" / "a.sieve").mkdir()
    notes = write_scripts(tmp_path, Scripts({"a": b"1", "b": b"2"}, "a", {"c": "too large"}))
    assert (tmp_path / "sieve" / "b.sieve").read_bytes() == b"2"
    assert [note.partition(":")[0] for note in notes] == [
        "the Sieve script 'c' was not read",
        "the Sieve script 'a' was not written",
        "the active Sieve script 'a' is not here, so that none filters",
    ]
    (tmp_path / "file").write_text("")
    notes = write_scripts(tmp_path / "file", Scripts({"a": b"1"}, "a"))
    assert notes


# Where ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "folder", "active"),
    [
        ("", "/h/sieve", "/h/.dovecot.sieve"),
        ("file:~/sieve;active=~/.dovecot.sieve", "/h/sieve", "/h/.dovecot.sieve"),
        ("file:~/sieve", "/h/sieve", "/h/.dovecot.sieve"),
        ("~/.dovecot.sieve", "/h/sieve", "/h/.dovecot.sieve"),
        ("file:/var/sieve/%d/%n;active=/var/sieve/%d/%n.sieve", "/var/sieve/t.test/An", "/var/sieve/t.test/An.sieve"),
        ("file:%h/s;active=%{home}/on;bindir=/x", "/h/s", "/h/on"),
        ("file:/v/%Lu/s;active=/v/%{user | domain}/a", "/v/an@t.test/s", "/v/t.test/a"),
        ("/var/vmail/%Ln.sieve", "/h/sieve", "/var/vmail/an.sieve"),
    ],
)
def test_where_dovecot_has_them(setting: str, folder: str, active: str) -> None:
    assert Place.of(setting, Path("/h"), Address("An", "t.test")) == Place(Path(folder), Path(active))


@pytest.mark.parametrize("setting", ["ldap:/etc/x", "dict:file:/x", "file:/v/%{auth_token}/s", "file:/v/%p"])
def test_a_place_that_is_none_for_files_is_named(setting: str) -> None:
    with pytest.raises(ScriptsNotRead):
        Place.of(setting, Path("/h"), Address("an", "t.test"))


@pytest.mark.parametrize(
    ("settings", "storage"),
    [
        ("base_dir = /run/dovecot\n", ""),
        ("plugin {\n  sieve_before = /x\n  sieve = file:/v/%d/%n;active=/v/a\n}\n", "file:/v/%d/%n;active=/v/a"),
        ("plugin {\n  sieve_dir = /x\n}\nservice sieve {\n  sieve = no\n}\n", ""),
        (
            "sieve_script b {\n  path = /b\n  type = before\n}\n"
            "sieve_script own {\n  active_path = ~/.a\n  driver = file\n  path = ~/s\n}\n",
            "file:~/s;active=~/.a",
        ),
        ("sieve_script own {\n  path = ~/s\n  type = personal\n}\n", "file:~/s"),
        ("sieve_script own {\n  driver = ldap\n  path = x\n}\n", "ldap:x"),
    ],
)
def test_what_doveconf_says_of_either_version(settings: str, storage: str) -> None:
    assert personal_storage(settings) == storage


@pytest.mark.skipif(shutil.which("doveconf") is None, reason="dovecot-core is not installed")
def test_a_real_doveconf_is_asked(tmp_path: Path) -> None:
    config = tmp_path / "dovecot.conf"
    config.write_text(f"base_dir = {tmp_path}/run\nplugin {{\n  sieve = file:/v/%d/%n;active=/v/%d/%n.sieve\n}}\n")
    assert place_here(config, tmp_path, Address("an", "t.test")) == Place(
        Path("/v/t.test/an"), Path("/v/t.test/an.sieve")
    )
    with pytest.raises(ScriptsNotRead, match="does not say"):
        place_here(tmp_path / "missing.conf", tmp_path, Address("an", "t.test"))


def test_scripts_go_to_that_place(tmp_path: Path) -> None:
    place = Place(tmp_path / "x" / "scripts", tmp_path / "y" / "active")
    assert write_scripts(tmp_path / "home-not-there", Scripts({}, ""), place) == []
    (tmp_path / "home").mkdir()
    assert write_scripts(tmp_path / "home", Scripts({"a": b"1"}, "a"), place) == []
    assert (tmp_path / "y" / "active").read_bytes() == b"1"


@pytest.mark.skipif(shutil.which("sievec") is None, reason="dovecot-sieve is not installed")
def test_what_sieve_here_does_not_know_is_named(tmp_path: Path) -> None:
    config = tmp_path / "dovecot.conf"
    config.write_text(f"base_dir = {tmp_path}/run\nmail_location = maildir:{tmp_path}/mail\n")
    write_scripts(
        tmp_path, Scripts({"good": LATIN, "bad": b'require ["imapflags", "notify"];\nkeep;\n', "junk": b"{"}, "good")
    )
    notes = unknown_extensions(config, Place.default(tmp_path))
    assert len(notes) == 1
    assert "'bad' needs what is not here" in notes[0]
    assert "imapflags" in notes[0]
    assert "notify" in notes[0]
