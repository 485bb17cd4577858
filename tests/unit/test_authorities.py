"""The file of the authorities that legacy servers' chains need."""

from __future__ import annotations

import os
import socket
import ssl
import threading
from pathlib import Path

import pytest
import trustme

from bascule import authorities
from bascule.authorities import TooManyAuthorities, read, too_long, verified_chain, write


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
    assert too_long(path) is None
    monkeypatch.setattr(authorities, "MOST", len(before))
    other = trustme.CA()
    with pytest.raises(TooManyAuthorities):
        write(path, {"b.test": chain_of(other, "b.test", other)})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_the_systems_bundle_is_too_long() -> None:
    assert "Argument list too long" in (too_long(Path("/etc/ssl/certs/ca-certificates.crt")) or "")
