"""The file of the authorities that legacy servers' chains need."""

from __future__ import annotations

import os
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trustme

from bascule import authorities
from bascule.authorities import TooManyAuthorities, read, too_long, verified_chain, write
from bascule.check.dovecot import legacy_authorities
from bascule.check.facts import NotReadable
from bascule.check.registry import CHECKS
from bascule.check.subject import Subject
from bascule.lab.scripted import Server
from bascule.legacy import LegacySettings, Service, Trust


def chain_of(authority: trustme.CA, name: str, trusted: trustme.CA) -> list[bytes]:
    """What a server with a certificate of this authority shows to who trusts ``trusted``."""
    issued = authority.issue_cert(name)
    for_server, for_client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context()
    issued.configure_cert(for_server)
    trusted.configure_trust(for_client)
    ours, theirs = socket.socketpair()

    def serve() -> None:
        with for_server.wrap_socket(theirs, server_side=True) as connection:
            connection.recv(1)

    thread = threading.Thread(target=serve)
    thread.start()
    with for_client.wrap_socket(ours, server_hostname=name) as connection:
        chain = verified_chain(connection)
    thread.join()
    return chain


def test_one_authority_for_each_server(tmp_path: Path) -> None:
    path = tmp_path / "authorities.pem"
    root, another = trustme.CA(), trustme.CA()
    intermediate = root.create_child_ca()
    chain = chain_of(intermediate, "imap.old.test", root)
    assert len(chain) == 3
    assert write(path, {"imap.old.test": chain, "imap.older.test": chain_of(root, "imap.older.test", root)})
    assert not write(path, {"imap.old.test": chain}), "nothing new"
    assert write(path, {"imap.other.test": chain_of(another, "imap.other.test", another)})
    assert path.stat().st_mode & 0o777 == 0o644
    roots = {root.cert_pem.bytes().decode(), another.cert_pem.bytes().decode()}
    assert set(read(path).values()) == roots
    assert set(read(path)) == {"imap.old.test", "imap.older.test", "imap.other.test"}
    assert path.read_text().count("BEGIN CERTIFICATE") == 2
    context = ssl.create_default_context(cafile=str(path))  # OpenSSL reads it
    assert context.cert_store_stats()["x509_ca"] == 2


def test_a_server_that_has_another_authority_now(tmp_path: Path) -> None:
    path = tmp_path / "authorities.pem"
    former, present = trustme.CA(), trustme.CA()
    write(path, {"imap.old.test": chain_of(former, "imap.old.test", former)})
    write(path, {"imap.old.test": chain_of(present, "imap.old.test", present)})
    assert read(path) == {"imap.old.test": present.cert_pem.bytes().decode()}


def test_everybody_may_read_it_whatever_the_umask(tmp_path: Path) -> None:
    authority = trustme.CA()
    before = os.umask(0o077)
    try:
        write(tmp_path / "a.pem", {"a.test": chain_of(authority, "a.test", authority)})
    finally:
        os.umask(before)
    assert (tmp_path / "a.pem").stat().st_mode & 0o777 == 0o644


def test_too_many_are_refused_and_nothing_is_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "authorities.pem"
    authority = trustme.CA()
    chain = chain_of(authority, "a.test", authority)
    write(path, {"a.test": chain})
    before = path.read_bytes()
    monkeypatch.setattr(authorities, "MOST", len(before))
    assert too_long(len(before)) is None
    other = trustme.CA()
    with pytest.raises(TooManyAuthorities, match=r"is left as it was: with an ssl_ca of [0-9]+ bytes"):
        write(path, {"b.test": chain_of(other, "b.test", other)})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


class Secured(Server):
    implicit_tls = True


@pytest.fixture
def secured(tmp_path: Path) -> Iterator[tuple[Server, Path]]:
    """A legacy server with TLS, and the file of the authority that it needs."""
    authority = trustme.CA()
    issued = authority.issue_cert("localhost")
    key, certificate, trusted = tmp_path / "key.pem", tmp_path / "cert.pem", tmp_path / "ca.pem"
    issued.private_key_pem.write_to_path(key)
    issued.cert_chain_pems[0].write_to_path(certificate)
    authority.cert_pem.write_to_path(trusted)
    Secured.certificate = (certificate, key)
    with Secured() as server:
        yield server, trusted


class FakeDovecot:
    """One that is reloaded, unless ``fails`` says why not."""

    version = "2.3"

    def __init__(self, path: Path, fails: str = "") -> None:
        self._path = path
        self._fails = fails
        #: What it has read.
        self.read = ""

    def reload(self) -> None:
        if self._fails:
            raise NotReadable(self._fails)
        self.read = self._path.read_text()


def looked(server: Server, trusted: Path, path: Path, **changes: Any) -> list[tuple[str, str]]:
    """Level and words of what the check finds."""
    subject = SimpleNamespace(
        legacy=LegacySettings("here.test", "localhost", Service(server.port, "implicit"), "localhost", 25),
        settings=SimpleNamespace(legacy=SimpleNamespace(ca_file=None, authorities=path)),
        trust=Trust(trusted, 5),
        dovecot=FakeDovecot(path),
    )
    for name, value in changes.items():
        setattr(subject, name, value)
    return [(said.level, said.text) for said in legacy_authorities(cast(Subject, subject))]


def test_the_check_makes_the_file_and_has_dovecot_read_it_once(secured: tuple[Server, Path], tmp_path: Path) -> None:
    path = tmp_path / "authorities.pem"
    dovecot = FakeDovecot(path)
    ((level, words),) = looked(*secured, path, dovecot=dovecot)
    assert (level, "localhost" in words, "has been reloaded" in words) == ("note", True, True)
    assert read(path)["localhost"] in secured[1].read_text()
    assert dovecot.read == path.read_text()
    ((level, _),) = looked(*secured, path, dovecot=FakeDovecot(path, "it would be reloaded for nothing"))
    assert level == "good"


def test_a_dovecot_that_is_not_reloaded_is_said(secured: tuple[Server, Path], tmp_path: Path) -> None:
    path = tmp_path / "authorities.pem"
    ((level, words),) = looked(*secured, path, dovecot=FakeDovecot(path, "doveadm: Dovecot is not running"))
    assert (level, "does not take it up: doveadm: Dovecot is not running" in words) == ("wrong", True)


def test_a_server_that_is_away_is_wrong_only_without_its_authority(
    secured: tuple[Server, Path], tmp_path: Path
) -> None:
    server, trusted = secured
    path = tmp_path / "authorities.pem"
    gone = SimpleNamespace(port=1)
    ((level, words),) = looked(cast(Server, gone), trusted, path)
    assert (level, "has no authority for it" in words) == ("wrong", True)
    looked(server, trusted, path)
    assert looked(cast(Server, gone), trusted, path) == []


def test_a_file_that_cannot_be_made_stops_an_activation(secured: tuple[Server, Path], tmp_path: Path) -> None:
    ((level, words),) = looked(*secured, tmp_path / "nowhere" / "authorities.pem")
    assert level == "wrong"
    assert "may not trust the certificate of localhost" in words
    assert CHECKS["dovecot.authorities"].stops


def test_dovecot_2_4_and_an_authority_of_the_operators_need_no_file(
    secured: tuple[Server, Path], tmp_path: Path
) -> None:
    path = tmp_path / "authorities.pem"
    assert looked(*secured, path, dovecot=SimpleNamespace(version="2.4")) == []
    named = SimpleNamespace(legacy=SimpleNamespace(ca_file=secured[1], authorities=path))
    assert looked(*secured, path, settings=named) == []
    assert not path.exists()
