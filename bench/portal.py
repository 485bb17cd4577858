"""What the users' page costs: requests a second, memory.

    venv/bin/python bench/portal.py [--seconds 10] [--users 400]

The lab's legacy server and database, and the page itself as it is run. The peer
is the same machine's static file of the same page (what the page server does
with no work of ours): the ratio is what our work costs. A form is sent with a
right password by another user each time, so that each is checked at the legacy
server and becomes a request; nobody is moved meanwhile (the domain is paused).
"""

from __future__ import annotations

import statistics
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

from bascule.address import Address
from bascule.credential import Password
from bascule.lab.sites import DOMAIN, Lab, full
from bascule.lab.table import Table, parser
from bascule.lab.visitor import Visitor
from bascule.legacy import LegacySettings, Service, Trust, authenticate

CLIENTS = 8


def resident(pid: int) -> float:
    """MiB of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return 0.0


def hammer(work: Callable[[int], None], seconds: float) -> tuple[float, list[float]]:
    """``work`` by CLIENTS threads at once: calls a second, and how long each took, in milliseconds."""
    taken: list[float] = []
    lock = threading.Lock()
    deadline = time.perf_counter() + seconds

    def client(number: int) -> None:
        while time.perf_counter() < deadline:
            began = time.perf_counter()
            work(number)
            with lock:
                taken.append(1000 * (time.perf_counter() - began))

    began = time.perf_counter()
    threads = [threading.Thread(target=client, args=(number,)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(taken) / (time.perf_counter() - began), taken


def emptied(waiting: list[int], work: Callable[[int], None]) -> tuple[float, list[float]]:
    """``work`` for each that waits, CLIENTS at once; as :func:`hammer`."""
    taken: list[float] = []

    def client() -> None:
        while True:
            try:
                number = waiting.pop()
            except IndexError:
                return
            before = time.perf_counter()
            work(number)
            taken.append(1000 * (time.perf_counter() - before))

    began = time.perf_counter()
    threads = [threading.Thread(target=client) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(taken) / (time.perf_counter() - began), taken


def main() -> None:
    """Print the table."""
    options_of = parser(__doc__)
    options_of.add_argument("--seconds", type=float, default=10)
    options_of.add_argument("--users", type=int, default=400)
    options = options_of.parse_args()
    seconds, users = options.seconds, options.users
    with Lab() as lab:
        lab.create({f"user-{number}": f"password-{number}" for number in range(users)}, {})
        lab.prepare()
        url = lab.new.cli("activate", DOMAIN).stdout.strip()
        lab.new.cli("pause", DOMAIN, "--reason", "so that only requests are measured")
        base = lab.new.settings.portal.public_url
        pid = lab.new.portal.pid
        waiting = list(range(users))

        def get(address: str) -> Callable[[int], None]:
            def work(_: int) -> None:
                with urllib.request.urlopen(address, timeout=60) as answer:  # noqa: S310 (our own)
                    answer.read()

            return work

        asked = Visitor(url)
        asked.request(full("user-0"), "password-0", "X", "Y")
        waiting.remove(0)

        def progress(_: int) -> None:
            asked.open(f"{url}/progress")

        def form(number: int) -> None:
            visitor = Visitor(url)
            visitor.request(full(f"user-{number}"), f"password-{number}", "X", "Y")
            if visitor.status != 200:
                raise RuntimeError(f"the form of user-{number} was answered with {visitor.status}")

        table = Table("", "a second", "ms, half", "ms, 99 %", "of peer", "MiB", markdown=options.markdown)

        def row(what: str, rate: float, taken: list[float]) -> None:
            p99 = statistics.quantiles(taken, n=100)[98] if len(taken) > 1 else taken[0]
            table.row(what, rate, statistics.median(taken), p99, rate / peer, resident(pid))

        peer, taken = hammer(get(f"{base}/static/page.css"), seconds)
        row("peer: a static file", peer, taken)
        for what, work in (("the form, shown", get(url)), ("progress", progress)):
            row(what, *hammer(work, seconds))

        legacy = LegacySettings(
            DOMAIN, "localhost", Service(lab.legacy.ports.imaps, "implicit"), "127.0.0.1", lab.legacy.smtp_port
        )
        trust = Trust(lab.new.settings.legacy.ca_file, 30)

        def login(_: int) -> None:
            authenticate(legacy, trust, Address.parse(full("user-0")), Password("password-0"))

        row("of these, the login at the legacy server", *hammer(login, seconds))
        rate, taken = emptied(waiting, form)
        row("form shown, sent, checked at the legacy server, progress shown", rate, taken)


if __name__ == "__main__":
    main()
