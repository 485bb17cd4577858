"""How the policy daemon answers with a million mailboxes in memory.

    venv/bin/python bench/lookups.py [--mailboxes 1000000] [--rate 5000] [--seconds 20]

A real PostgreSQL, the real daemon, clients of four processes over its Unix
socket as Postfix's are. Load: from the start of the process to the moment that
the directory equals the database. Latency: from the request to the reply, as
the client sees it.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import re
import signal
import socket
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg

from bascule.config_templates import render
from bascule.lab.postgres import Postgres
from bascule.lab.process import Daemon
from bascule.lab.sites import eventually, executable
from bascule.lab.table import Table, parser
from bascule.settings import PolicyDaemon, Settings

CLIENTS = 4


def fill(postgres: Postgres, mailboxes: int) -> None:
    """One domain with so many users who have moved."""
    with psycopg.connect(postgres.dsn("postgres"), autocommit=True) as connection:
        connection.execute("SET search_path = bascule, queue")
        connection.execute("INSERT INTO store VALUES ('local', 'unix:/run/dovecot/lmtp')")
        connection.execute(
            "INSERT INTO domain (name, mode, store, imap_host, imap_port, imap_tls, smtp_host, smtp_port, url_token, "
            "url_expires_at) VALUES ('bench.test', 'active', 'local', 'old.test', 993, 'implicit', 'old.test', 25, "
            "'x', now())"
        )
        connection.execute("SET session_replication_role = replica")  # no journal of a million moves
        connection.execute(
            "INSERT INTO mailbox (domain_id, local_part, full_address, store, state, password_hash) SELECT domain.id, "
            "'first.last-' || number, "
            "'first.last-' || number || '@bench.test', 'local', 'local', '{ARGON2ID}x' "
            "FROM domain, generate_series(1, %s) AS number",
            (mailboxes,),
        )
        connection.execute("ANALYZE mailbox")


def client(path: str, mailboxes: int, rate: float, seconds: float, seed: int, results: multiprocessing.Queue) -> None:  # type: ignore[type-arg]
    """Lookups at an even rate; ``rate`` 0 is as fast as the answers come. Latencies in seconds."""
    chance = random.Random(seed)  # noqa: S311 (keys of a map, not secrets)
    latencies = []
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        begin = time.perf_counter()
        number = 0
        while (now := time.perf_counter()) < begin + seconds:
            due = begin + number / rate if rate else now
            if due > now:
                time.sleep(due - now)
            number += 1
            # Half of them have moved, as asked about by Postfix: address, then its domain for the others.
            key = f"transport first.last-{chance.randrange(mailboxes * 2)}@bench.test".encode()
            sent = time.perf_counter()
            connection.sendall(b"%d:%b," % (len(key), key))
            connection.recv(4096)
            latencies.append(time.perf_counter() - sent)
    results.put(latencies)


def ask(path: Path, mailboxes: int, rate: float, seconds: float) -> list[float]:
    results: multiprocessing.Queue = multiprocessing.Queue()  # type: ignore[type-arg]
    processes = [
        multiprocessing.Process(target=client, args=(str(path), mailboxes, rate / CLIENTS, seconds, seed, results))
        for seed in range(CLIENTS)
    ]
    for process in processes:
        process.start()
    latencies = sorted(latency for _ in processes for latency in results.get(timeout=seconds + 60))
    for process in processes:
        process.join()
    return latencies


def memory(pid: int) -> float:
    """Resident, in MiB."""
    found = re.search(r"^VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return int(found[1]) / 1024 if found else 0.0


def processor_time(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def running(daemon: Daemon, loaded: int) -> Iterator[float]:
    """The daemon, loaded; how long that took."""
    before = daemon.tail(10_000).count("directory loaded")
    begin = time.monotonic()
    daemon.start(120)
    ready = time.monotonic() - begin
    eventually("loaded", lambda: daemon.tail(10_000).count("directory loaded") > before, 300)
    took = time.monotonic() - begin
    print(f"  answers after {ready:.1f} s, equal to the database after {took:.1f} s, {memory(daemon.pid):.0f} MiB")
    assert f"mailboxes={loaded}" in daemon.tail()
    try:
        yield took
    finally:
        daemon.stop()


def report(table: Table, what: str, latencies: list[float], seconds: float, used: float) -> None:
    def at(share: float) -> float:
        return latencies[min(len(latencies) - 1, int(len(latencies) * share))] * 1000

    table.row(
        what, len(latencies) / seconds, statistics.median(latencies) * 1000, at(0.99), at(0.999), latencies[-1] * 1000,
        100 * used / seconds,
    )  # fmt: skip


def main() -> None:
    options_of = parser(__doc__)
    options_of.add_argument("--mailboxes", type=int, default=1_000_000)
    options_of.add_argument("--rate", type=float, default=5000, help="lookups a second")
    options_of.add_argument("--seconds", type=float, default=20)
    options = options_of.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ended from outside, it ends what it started
    with tempfile.TemporaryDirectory(prefix="bascule-bench-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        postgres = Postgres(folder / "postgres")
        postgres.create()
        try:
            fill(postgres, options.mailboxes)
            sockets = {part: f"unix:{folder / part}" for part in ("socketmap", "policy", "hold")}
            settings = Settings(
                database=postgres.conninfo,
                policy_daemon=PolicyDaemon(**sockets, snapshot=folder / "routes.sqlite"),
            )
            path = folder / "bascule.toml"
            path.write_text(render("bascule.toml.j2", **settings.model_dump()))
            daemon = Daemon(
                [executable("bascule-policy-daemon"), "--settings", str(path)], folder=folder, name="policy-daemon"
            )
            print(f"{options.mailboxes} mailboxes; a first start, and one with the snapshot of the first:")
            with running(daemon, options.mailboxes):
                eventually("saved", lambda: _saved(folder / "routes.sqlite", options.mailboxes), 300)
            with running(daemon, options.mailboxes):
                columns = ("a second", "ms, half", "ms, 99 %", "ms, 99.9 %", "ms, most", "% of a processor")
                table = Table("lookups", *columns, markdown=options.markdown)
                for what, rate in ((f"{options.rate:.0f} a second", options.rate), ("as fast as it can", 0.0)):
                    before = processor_time(daemon.pid)
                    latencies = ask(folder / "socketmap", options.mailboxes, rate, options.seconds)
                    report(table, what, latencies, options.seconds, processor_time(daemon.pid) - before)
                print(f"  afterwards {memory(daemon.pid):.0f} MiB")
        finally:
            postgres.stop("immediate")


def _saved(path: Path, mailboxes: int) -> bool:
    with sqlite3.connect(path, timeout=60) as database:
        try:
            return bool(database.execute("SELECT count(*) FROM mailbox").fetchone()[0] == mailboxes)
        except sqlite3.Error:
            return False


if __name__ == "__main__":
    main()
