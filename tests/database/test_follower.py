"""A directory that follows a real database: loads, changes, a lost connection, and the snapshot."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
from structlog.testing import capture_logs

from bascule import follower
from bascule.address import Address
from bascule.database import Connection, connect
from bascule.directory import Directory, Mailbox
from bascule.errors import DatabaseUnavailable
from bascule.follower import BATCH, Follower
from bascule.lab.postgres import Postgres
from bascule.lab.process import free_ports, program
from bascule.lab.sites import eventually
from bascule.settings import Settings
from bascule.snapshot import Snapshot

Change = tuple[str, str | None, str | None]


class Followed:
    """A follower at work, and what it told."""

    def __init__(self, dsn: str, path: Path) -> None:
        self.directory = Directory()
        self.changes: list[Change] = []
        self.snapshot = Snapshot(path)
        self._told = asyncio.Event()
        self.follower = Follower(
            self.directory,
            self.snapshot,
            dsn,
            node="mx3",
            part="policy_daemon",
            on_change=self._changed,
            on_update=self._told.set,
            on_sure=self._sure,
        )
        #: How many mailboxes the directory had each time that it was sure to be the database's.
        self.sure: list[int] = []

    def _sure(self) -> None:
        self.sure.append(len(self.directory.mailboxes))
        self._told.set()

    def _changed(self, before: Mailbox | None, after: Mailbox | None) -> None:
        box = after or before
        assert box is not None
        states = [None if each is None else each.state for each in (before, after)]
        self.changes.append((str(box.address), states[0], states[1]))

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not holds():
                self._told.clear()
                await self._told.wait()


def follow(
    postgres: Postgres, path: Path, work: Callable[[Followed], Awaitable[None]], *, dsn: str | None = None
) -> Followed:
    """Do ``work`` while a follower runs."""

    async def run() -> Followed:
        followed = Followed(dsn or postgres.dsn("bascule_policy_daemon"), path)
        followed.follower.restore()
        running = asyncio.create_task(followed.follower.run())
        try:
            await work(followed)
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
        return followed

    return asyncio.run(run())


def insert(owner: Connection, name: str, state: str) -> None:
    """A mailbox in a state, whatever way it came there."""
    owner.execute("SET session_replication_role = replica")
    owner.execute(
        "INSERT INTO mailbox (domain_id, local_part, full_address, store, state, password_hash, sealed_credential, "
        "cutover_deadline) "
        "SELECT id, %s, %s || '@lab.test', 'local', %s::mailbox_state, '{ARGON2ID}x', 'x', "
        "CASE WHEN %s IN ('cutover', 'returning') THEN now() + interval '1 hour' END FROM domain",
        (name, name, state, state),
    )
    owner.execute("SET session_replication_role = origin")


def insert_many(owner: Connection, many: int) -> None:
    owner.execute("SET session_replication_role = replica")
    owner.execute(
        "INSERT INTO mailbox (domain_id, local_part, full_address, store, state, password_hash) "
        "SELECT id, 'user' || number, 'user' || number || '@lab.test', 'local', 'local', '{ARGON2ID}x' "
        "FROM domain, generate_series(1, %s) AS number",
        (many,),
    )
    owner.execute("SET session_replication_role = origin")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "snapshot.sqlite"


def test_all_that_are_not_at_legacy_are_loaded(postgres: Postgres, owner: Connection, path: Path) -> None:
    for name, state in (("a", "legacy"), ("b", "cutover"), ("c", "local"), ("d", "returning")):
        insert(owner, name, state)

    async def work(followed: Followed) -> None:
        await followed.until(lambda: followed.directory.loaded)

    followed = follow(postgres, path, work)
    assert {box.address.local_part: box.state for box in followed.directory.mailboxes.values()} == {
        "b": "cutover",
        "c": "local",
        "d": "returning",
    }
    # What is settled needs nothing done; what is on the move does.
    assert sorted(followed.changes) == [("b@lab.test", None, "cutover"), ("d@lab.test", None, "returning")]


def test_more_than_one_batch(postgres: Postgres, owner: Connection, path: Path) -> None:
    insert_many(owner, 2 * BATCH + 1)

    async def work(followed: Followed) -> None:
        await followed.until(lambda: followed.directory.loaded)
        await followed.snapshot.saved.wait()

    assert len(follow(postgres, path, work).directory.mailboxes) == 2 * BATCH + 1
    again = Directory()
    assert Snapshot(path).restore(again)
    assert len(again.mailboxes) == 2 * BATCH + 1


def test_changes_are_followed(postgres: Postgres, owner: Connection, path: Path) -> None:
    insert(owner, "a", "cutover")

    async def work(followed: Followed) -> None:
        await followed.until(lambda: followed.directory.loaded)
        owner.execute("UPDATE mailbox SET state = 'copying', cutover_deadline = NULL, sealed_credential = 'x'")
        await followed.until(lambda: not followed.directory.mailboxes)
        owner.execute("UPDATE mailbox SET state = 'cutover', cutover_deadline = now() + interval '1 hour'")
        await followed.until(lambda: bool(followed.directory.mailboxes))
        owner.execute("UPDATE mailbox SET state = 'local', cutover_deadline = NULL")
        await followed.until(lambda: "local" in [box.state for box in followed.directory.mailboxes.values()])
        await followed.snapshot.saved.wait()

    assert follow(postgres, path, work).changes == [
        ("a@lab.test", None, "cutover"),
        ("a@lab.test", "cutover", None),
        ("a@lab.test", None, "cutover"),
        ("a@lab.test", "cutover", "local"),
    ]
    again = Directory()
    assert Snapshot(path).restore(again)
    assert [box.state for box in again.mailboxes.values()] == ["local"]


def test_new_domains_and_aliases_are_known(postgres: Postgres, owner: Connection, path: Path) -> None:
    insert(owner, "a", "local")

    async def work(followed: Followed) -> None:
        await followed.until(lambda: followed.directory.loaded)
        owner.execute(
            "INSERT INTO domain (name, store, imap_host, imap_port, imap_tls, smtp_host, smtp_port) "
            "VALUES ('second.test', 'local', 'imap.old.test', 993, 'implicit', 'mx.old.test', 25)"
        )
        await followed.until(lambda: "second.test" in followed.directory.domains)
        owner.execute("SELECT assign_alias('info@lab.test', 'a@lab.test')")
        await followed.until(lambda: Address("info", "lab.test") in followed.directory.aliases)

    follow(postgres, path, work)


def test_what_changed_while_the_connection_was_lost(
    postgres: Postgres, owner: Connection, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follower, "RECONNECT", 0.2)
    for name in ("kept", "gone", "changed"):
        insert(owner, name, "local")

    async def work(followed: Followed) -> None:
        await followed.until(lambda: followed.directory.loaded)
        kept = followed.directory.mailboxes[Address("kept", "lab.test")]
        owner.execute("SET session_replication_role = replica")  # so that nobody is told
        owner.execute("DELETE FROM mailbox WHERE local_part = 'gone'")
        owner.execute("UPDATE mailbox SET epoch = 5 WHERE local_part = 'changed'")
        owner.execute("SET session_replication_role = origin")
        insert(owner, "new", "local")
        owner.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'bascule_policy_daemon'")
        await followed.until(lambda: Address("new", "lab.test") in followed.directory.mailboxes)
        assert followed.directory.mailboxes[Address("kept", "lab.test")] is kept, "no second copy in memory"

    assert sorted(follow(postgres, path, work).changes) == [
        ("changed@lab.test", "local", "local"),
        ("gone@lab.test", "local", None),
        ("new@lab.test", None, "local"),
    ]


def test_a_start_from_the_snapshot_tells_what_differs(postgres: Postgres, owner: Connection, path: Path) -> None:
    insert(owner, "a", "local")

    async def load(followed: Followed) -> None:
        await followed.until(lambda: followed.follower.connected)
        await followed.snapshot.saved.wait()

    follow(postgres, path, load)
    insert(owner, "b", "local")

    async def again(followed: Followed) -> None:
        assert followed.directory.loaded
        assert len(followed.directory.mailboxes) == 1
        await followed.until(lambda: len(followed.directory.mailboxes) == 2)

    assert follow(postgres, path, again).changes == [("b@lab.test", None, "local")]


def test_a_mailbox_whose_name_looks_like_a_detail_is_known_before_it_moves(
    postgres: Postgres, owner: Connection, tmp_path: Path
) -> None:
    """Told before the load and after it; kept for a start without the database; forgotten when it has moved itself."""
    early, late = Address.parse("a-early@lab.test"), Address.parse("a+late@lab.test")
    owner.execute("SELECT expect(%s), expect('plain@lab.test')", (str(early),))

    async def work(followed: Followed) -> None:
        followed.directory.delimiter = "+-"
        await followed.until(lambda: followed.directory.loaded)
        assert followed.directory.unmoved == {early}
        owner.execute("SELECT expect(%s)", (str(late),))
        await followed.until(lambda: followed.directory.unmoved == {early, late})
        assert followed.directory.base(late) == late
        assert followed.directory.base(Address.parse("a+tag@lab.test")) == Address.parse("a@lab.test")
        for state in ("requested", "copying", "cutover"):
            owner.execute(
                "UPDATE mailbox SET state = %s, sealed_credential = 'x', cutover_deadline = "
                "CASE WHEN %s = 'cutover' THEN now() + interval '1 hour' END WHERE full_address = %s",
                (state, state, str(early)),
            )
        await followed.until(lambda: followed.directory.unmoved == {late})
        assert followed.directory.mailbox(early) is not None
        async with asyncio.timeout(20):
            await followed.snapshot.saved.wait()

    follow(postgres, tmp_path / "routes.sqlite", work)
    restored = Directory()
    assert Snapshot(tmp_path / "routes.sqlite").restore(restored)
    assert restored.unmoved == {late}


def test_a_notification_that_was_lost_is_made_up_for(
    postgres: Postgres, owner: Connection, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follower, "RELOAD", 0.5)

    async def work(followed: Followed) -> None:
        await followed.until(lambda: followed.follower.connected)
        insert(owner, "a", "local")  # and nobody is told
        await followed.until(lambda: Address("a", "lab.test") in followed.directory.mailboxes)

    assert follow(postgres, path, work).changes == [("a@lab.test", None, "local")]


def test_a_mailbox_with_a_delimiter_in_its_name_is_not_another_s_detail(
    postgres: Postgres, owner: Connection, path: Path
) -> None:
    """mary and info have moved; mary-jane, whom an administrator expects, and info-desk have not."""
    insert(owner, "mary", "local")
    owner.execute("SELECT assign_alias('info@lab.test', 'mary@lab.test')")
    owner.execute("SELECT expect('mary-jane@lab.test'), expect('info-desk@lab.test')")

    def of(followed: Followed, name: str) -> object:
        found = followed.directory.mailbox(Address(name, "lab.test"))
        return None if found is None else found.address.local_part

    async def work(followed: Followed) -> None:
        followed.directory.delimiter = "-"
        await followed.until(lambda: followed.directory.loaded)
        assert of(followed, "mary-jane") is None
        assert followed.directory.alias(Address("info-desk", "lab.test")) is None
        assert followed.directory.alias(Address("info-x", "lab.test")) == Address("mary-x", "lab.test")
        assert of(followed, "mary-anything") == of(followed, "mary-late") == "mary"
        owner.execute("SELECT expect('mary-late@lab.test')")
        await followed.until(lambda: of(followed, "mary-late") is None)
        owner.execute("DELETE FROM mailbox WHERE local_part LIKE 'mary-%'")
        owner.execute("SELECT pg_notify('bascule_mailbox', 'mary-jane@lab.test')")
        await followed.until(lambda: of(followed, "mary-jane") == "mary")

    follow(postgres, path, work)


def test_a_name_that_is_another_host_s_stops_no_route(postgres: Postgres, owner: Connection, path: Path) -> None:
    owner.execute("INSERT INTO node (name, part, speaker) VALUES ('mx3', 'policy_daemon', 'another')")

    async def work(followed: Followed) -> None:
        await followed.until(lambda: followed.follower.connected)
        owner.execute("SELECT request_migration('b@lab.test', 'portal', 'sealed')")
        insert(owner, "a", "local")
        owner.execute("SELECT pg_notify('bascule_mailbox', 'a@lab.test')")
        await followed.until(lambda: Address("a", "lab.test") in followed.directory.mailboxes)
        assert followed.follower.connected

    with capture_logs() as logs:
        follow(postgres, path, work)
    refused = [each for each in logs if each["event"] == "heartbeat refused"]
    assert refused
    assert "that is another" in refused[0]["reason"]
    assert "name of its own" in refused[0]["advice"]
    assert owner.execute("SELECT speaker FROM node WHERE name = 'mx3'").fetchall() == [("another",)]


def test_it_is_sure_of_what_came_before_its_heartbeat(
    postgres: Postgres, owner: Connection, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of what comes while it is busy with what came before."""
    monkeypatch.setattr(follower, "HEARTBEAT", 0.01)
    half = 200

    def tell(first: int) -> None:
        owner.execute(
            "SELECT pg_notify('bascule_mailbox', 'user' || n || '@lab.test') "
            "FROM generate_series(%s::int, %s::int) AS n",
            (first, first + half - 1),
        )

    async def work(followed: Followed) -> None:
        await followed.until(lambda: len(followed.sure) > 1)
        insert_many(owner, 2 * half)
        tell(1)
        await followed.until(lambda: len(followed.directory.mailboxes) > 0)
        tell(1 + half)  # before any heartbeat after the first half
        await followed.until(lambda: len(followed.directory.mailboxes) == 2 * half)
        after = len(followed.sure)
        await followed.until(lambda: len(followed.sure) > after)

    sure = follow(postgres, path, work).sure
    assert {0, 2 * half} <= set(sure) <= {0, half, 2 * half}, "never in the middle of what was told at once"


def test_it_is_sure_of_all_that_was_told_before_a_heartbeat_was_accepted(
    postgres: Postgres, owner: Connection, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The heartbeat is made to wait while it is told: nothing that came before its end may be missing."""
    monkeypatch.setattr(follower, "HEARTBEAT", 0.01)

    async def work(followed: Followed) -> None:
        await followed.until(lambda: len(followed.sure) > 1)
        with psycopg.connect(postgres.dsn("postgres")) as holder:
            holder.execute("SELECT FROM bascule.node FOR UPDATE")
            await asyncio.to_thread(eventually, "the heartbeat waits", lambda: is_blocked(owner))
            insert_many(owner, 400)
            owner.execute(
                "SELECT pg_notify('bascule_mailbox', 'user' || n || '@lab.test') FROM generate_series(1, 400) n"
            )
            before = len(followed.sure)
        await followed.until(lambda: len(followed.sure) > before + 1)
        assert set(followed.sure[before:]) == {400}

    follow(postgres, path, work)


def is_blocked(owner: Connection) -> bool:
    """Whether a heartbeat waits for a lock."""
    query = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%bascule.beat%'"
    return bool(owner.execute(query).fetchall()[0][0])


def test_a_heartbeat_that_is_refused_makes_nothing_sure(
    postgres: Postgres, owner: Connection, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody waits for a node that is not registered."""
    monkeypatch.setattr(follower, "HEARTBEAT", 0.01)
    owner.execute("INSERT INTO node (name, part, speaker) VALUES ('mx3', 'policy_daemon', 'another')")

    async def work(followed: Followed) -> None:
        await followed.until(lambda: followed.follower.connected)
        for number, name in enumerate("abcdefgh"):
            insert(owner, name, "local")
            owner.execute("SELECT pg_notify('bascule_mailbox', %s)", (f"{name}@lab.test",))
            await followed.until(lambda many=number: len(followed.directory.mailboxes) > many)  # type: ignore[misc]
        await asyncio.to_thread(eventually, "it is refused again", lambda: len(refused()) > 1)

    def refused() -> list[object]:
        return [each for each in logs if each["event"] == "heartbeat refused"]

    with capture_logs() as logs:
        followed = follow(postgres, path, work)
    assert len(refused()) > 1
    assert followed.sure == []


@contextmanager
def pgbouncer(postgres: Postgres, folder: Path, mode: str) -> Iterator[str]:
    """The real one, before ``postgres``; a policy daemon's connection string."""
    port = free_ports(1)[0]
    config = folder / "pgbouncer.ini"
    config.write_text(
        f"""
[databases]
bascule = host={postgres.folder} port={postgres.port} user=bascule_policy_daemon
[pgbouncer]
pool_mode = {mode}
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = any
""",
    )
    process = subprocess.Popen([program("pgbouncer"), "-q", "-u", "postgres", str(config)])
    try:
        dsn = f"host=127.0.0.1 port={port} dbname=bascule user=bascule_policy_daemon"
        eventually("PgBouncer answers", lambda: is_answered(dsn), 20)
        yield dsn
    finally:
        process.terminate()
        process.wait(20)


def is_answered(dsn: str) -> bool:
    try:
        psycopg.connect(dsn, connect_timeout=5).close()
    except psycopg.OperationalError:
        return False
    return True


def test_a_pooler_that_passes_no_notification_on_is_named(
    postgres: Postgres, owner: Connection, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follower, "ARRIVAL", 1.0)
    monkeypatch.setattr(follower, "RELOAD_UNTOLD", 1.0)
    insert(owner, "a", "local")

    async def work(followed: Followed) -> None:
        await followed.until(lambda: Address("a", "lab.test") in followed.directory.mailboxes)
        insert(owner, "b", "local")
        await followed.until(lambda: Address("b", "lab.test") in followed.directory.mailboxes)
        assert not followed.follower.connected

    with pgbouncer(postgres, tmp_path, "transaction") as dsn, capture_logs() as logs:
        follow(postgres, path, work, dsn=dsn)
    told = next(each for each in logs if each["event"] == "changes are not notified")
    assert "pool_mode" in told["advice"]
    # It is not registered: no flip waits for it, and none goes by what it says.
    assert owner.execute("SELECT FROM node WHERE name = 'mx3'").fetchall() == []


def test_a_pooler_in_session_mode_is_as_none(postgres: Postgres, owner: Connection, path: Path, tmp_path: Path) -> None:
    async def work(followed: Followed) -> None:
        await followed.until(lambda: followed.follower.connected)
        insert(owner, "a", "cutover")
        owner.execute("UPDATE mailbox SET state = 'local', cutover_deadline = NULL")
        await followed.until(lambda: Address("a", "lab.test") in followed.directory.mailboxes)

    with pgbouncer(postgres, tmp_path, "session") as dsn:
        follow(postgres, path, work, dsn=dsn)


def test_a_standby_is_named(postgres: Postgres, owner: Connection) -> None:
    """As what libpq finds when the primary is not among the hosts that it knows."""
    settings = Settings(database=postgres.conninfo)
    owner.execute("ALTER ROLE bascule_policy_daemon SET default_transaction_read_only = on")
    try:
        with (
            pytest.raises(DatabaseUnavailable, match="it is a standby, or set to read-only") as named,
            connect(settings.dsn("policy_daemon")),
        ):
            pass
    finally:
        owner.execute("ALTER ROLE bascule_policy_daemon RESET default_transaction_read_only")
    assert "the primary" in named.value.hint
    with connect(settings.dsn("policy_daemon")):
        pass
    chosen = Settings(database=f"{postgres.conninfo} target_session_attrs=any").dsn("policy_daemon")
    assert chosen.count("target_session_attrs") == 1
