"""The users' page on a database of its own, with mailboxes in every state; no worker, no legacy server."""

from __future__ import annotations

import os
import secrets
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import psycopg
import pytest
from flask import Flask
from selenium.webdriver import Chrome
from waitress.server import create_server

from bascule.credential import create_keys
from bascule.database import Connection, value
from bascule.lab.browser import WIDE, browser
from bascule.lab.postgres import Postgres
from bascule.lab.process import free_ports
from bascule.portal.page import create
from bascule.settings import Keys, Legacy, Portal, Settings, Users

TOKEN = "token-of-the-browser-tests"
SETTINGS_OF_CLIENTS = Users(
    organisation="Port of Example",
    contact="Help desk, telephone 4711",
    imap="imap.new.example.org:993",
    submission="smtp.new.example.org:587",
)


@pytest.fixture(scope="session")
def folder() -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.fail("these tests need root: PostgreSQL runs as a user of its own")
    with tempfile.TemporaryDirectory(prefix="bascule-test-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture(scope="session")
def owner(folder: Path) -> Iterator[Connection]:
    cluster = Postgres(folder / "postgres")
    try:
        cluster.create()
        with psycopg.connect(cluster.dsn("postgres"), autocommit=True) as connection:
            connection.execute("SET search_path = bascule, queue")
            connection.execute("INSERT INTO store VALUES ('local', 'unix:/run/lmtp')")
            connection.execute(
                "INSERT INTO domain (name, store, imap_host, imap_port, imap_tls, smtp_host, smtp_port) "
                "VALUES ('example.org', 'local', '127.0.0.1', %s, 'none', 'mx.old.test', 25)",
                free_ports(1),  # nobody listens there
            )
            connection.execute("SELECT activate_domain('example.org', %s)", (TOKEN,))
            connection.execute("SET session_replication_role = replica")
            yield connection
    finally:
        cluster.stop("immediate")


@pytest.fixture(scope="session")
def page(folder: Path, owner: Connection) -> Iterator[tuple[str, Flask]]:
    """The URL before /m/, and the application."""
    create_keys(folder / "seal.pub", folder / "seal.key")
    port = free_ports(1)[0]
    settings = Settings(
        database=f"host={folder}/postgres dbname=bascule",
        keys=Keys(public=folder / "seal.pub"),
        legacy=Legacy(timeout=3),
        users=SETTINGS_OF_CLIENTS,
        portal=Portal(public_url="http://localhost"),
    )
    application = create(settings, secrets.token_bytes(32))
    server = create_server(application, listen=f"127.0.0.1:{port}")
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield f"http://127.0.0.1:{port}", application
    finally:
        server.close()
        thread.join(10)


Put = Callable[..., int]


@pytest.fixture
def put(owner: Connection) -> Put:
    """A mailbox in a state, whatever way it came there; its id."""

    def make(state: str, **columns: object) -> int:
        owner.execute("DELETE FROM mailbox")
        values: dict[str, object] = {
            "local_part": "amina.bakr",
            "full_address": "amina.bakr@example.org",
            "state": state,
            "sealed_credential": b"sealed",
            "password_hash": "{ARGON2ID}x",
            **columns,
        }
        names = ", ".join(values)
        places = ", ".join(["%s"] * len(values))
        return int(
            value(
                owner,
                f"INSERT INTO mailbox (domain_id, store, {names}) SELECT id, 'local', {places} FROM domain "
                "RETURNING id",
                *values.values(),
            )
        )

    return make


Look = Callable[[Chrome, int], None]
Visit = Callable[..., AbstractContextManager[Chrome]]


@pytest.fixture
def look(page: tuple[str, Flask]) -> Look:
    """Take a browser to the progress of a mailbox, as if it had asked for it."""
    base, application = page

    def open_progress(chrome: Chrome, mailbox: int) -> None:
        serializer = application.session_interface.get_signing_serializer(application)  # type: ignore[attr-defined]
        chrome.add_cookie({"name": "bascule", "value": serializer.dumps({"mailbox": mailbox})})
        chrome.get(f"{base}/m/{TOKEN}/progress")

    return open_progress


@pytest.fixture
def visit(page: tuple[str, Flask], look: Look) -> Visit:
    """A browser at the form, or at the progress of a mailbox."""

    @contextmanager
    def opened(
        language: str = "en", mailbox: int | None = None, *, size: tuple[int, int] = WIDE, javascript: bool = True
    ) -> Iterator[Chrome]:
        with browser(language, size=size, javascript=javascript) as chrome:
            chrome.get(f"{page[0]}/m/{TOKEN}")
            if mailbox is not None:
                look(chrome, mailbox)
            yield chrome

    return opened
