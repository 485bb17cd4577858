"""The last known state on disk: what comes back, what is written, and what cannot be used."""

from __future__ import annotations

import asyncio
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from bascule import snapshot
from bascule.address import Address
from bascule.directory import Account, Directory, Served
from bascule.snapshot import Snapshot

HERE = Address.parse("here@active.test")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "routes.sqlite"


def save(path: Path, directory: Directory, *addresses: Address, domains: bool = True) -> None:
    """Have these changes written."""

    async def run() -> None:
        kept = Snapshot(path)
        for address in addresses:
            kept.mailbox_changed(address)
        if domains:
            kept.domains_changed()
        keeping = asyncio.create_task(kept.keep(directory))
        async with asyncio.timeout(10):
            await kept.saved.wait()
        keeping.cancel()

    asyncio.run(run())


def restored(path: Path) -> Directory | None:
    directory = Directory()
    return directory if Snapshot(path).restore(directory) else None


def test_the_last_known_state_comes_back(directory: Directory, path: Path) -> None:
    save(path, directory, *directory.mailboxes)
    after = restored(path)
    assert after is not None
    assert after.loaded
    assert path.stat().st_mode & 0o777 == 0o600
    assert (after.domains, after.mailboxes, after.aliases) == (
        directory.domains,
        directory.mailboxes,
        directory.aliases,
    )


def test_what_is_known_of_passwords_and_names_comes_back(directory: Directory, path: Path) -> None:
    mailbox = directory.mailboxes[HERE]
    served = Served("here", None, "/", "")
    account = Account("{SSHA}x", False, "home", served, legacy_login="OLD\\here", declined=True, imported=True)
    directory.mailboxes[HERE] = replace(mailbox, account=account)
    save(path, directory, HERE)
    after = restored(path)
    assert after is not None
    assert after.mailboxes[HERE] == directory.mailboxes[HERE]


def test_a_change_writes_what_it_changes(directory: Directory, path: Path) -> None:
    save(path, directory, *directory.mailboxes)
    gone = Address.parse("moving@active.test")
    del directory.mailboxes[gone]
    directory.mailboxes[HERE] = replace(directory.mailboxes[HERE], state="returning", epoch=7)
    # Another change that nobody told of shows that not everything is written.
    untold = Address.parse("leaving@active.test")
    before = directory.mailboxes.pop(untold)
    save(path, directory, gone, HERE, domains=False)
    after = restored(path)
    assert after is not None
    assert after.mailboxes == directory.mailboxes | {untold: before}


@pytest.mark.parametrize("content", [b"", b"not a database at all, but long enough to be looked at" * 20])
def test_what_cannot_be_used_is_set_aside(directory: Directory, path: Path, content: bytes) -> None:
    path.write_bytes(content)
    assert restored(path) is None
    save(path, directory, *directory.mailboxes)
    assert restored(path) is not None


@pytest.mark.parametrize(
    "damage",
    [
        "PRAGMA user_version = 9",
        "UPDATE domain SET content = '{}'",
        "UPDATE domain SET content = 'x'",
        "DROP TABLE alias",
    ],
)
def test_another_layout_is_set_aside(directory: Directory, path: Path, damage: str) -> None:
    save(path, directory, *directory.mailboxes)
    with sqlite3.connect(path) as database:
        database.execute(damage)
    database.close()
    assert restored(path) is None
    assert not path.exists()
    assert path.with_suffix(".unusable").exists()


def test_no_snapshot_is_no_error(path: Path) -> None:
    assert restored(path) is None


def test_no_domains_are_a_state_like_another(path: Path) -> None:
    """Plugged in before any domain is prepared: an operator's own mail does not wait for the database."""
    save(path, Directory())
    after = restored(path)
    assert after is not None
    assert (after.loaded, after.domains) == (True, {})


def test_a_file_in_which_nothing_was_written_yet_says_nothing(path: Path) -> None:
    """Whoever wrote it was killed in between: there may be domains."""
    path.touch()
    assert restored(path) is None
    assert restored(path) is None, "nor does the layout, which is there now"
    save(path, Directory(), HERE, domains=False)
    assert restored(path) is None


def test_what_cannot_be_written_is_written_later(
    directory: Directory, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot, "RETRY", 0.01)
    folder = path.parent / "not-yet"

    async def run() -> None:
        kept = Snapshot(folder / "routes.sqlite")
        kept.domains_changed()
        kept.mailbox_changed(HERE)
        keeping = asyncio.create_task(kept.keep(directory))
        await asyncio.sleep(0.1)
        folder.mkdir()
        async with asyncio.timeout(10):
            await kept.saved.wait()
        keeping.cancel()

    asyncio.run(run())
    after = restored(folder / "routes.sqlite")
    assert after is not None
    assert set(after.mailboxes) == {HERE}
