"""What the users' page costs: requests a second, memory.

    venv/bin/python bench/portal.py [--seconds 10]

The lab's legacy server and database, and the page itself as it is run. The peer
is the same machine's static file of the same page (what the page server does
with no work of ours): the ratio is what our work costs. A form is sent with a
right password by another user each time, so that each is checked at the legacy
server and becomes a request; nobody is moved meanwhile (the domain is paused).
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

from bascule.lab.sites import DOMAIN, Lab, full
from bascule.lab.visitor import Visitor

CLIENTS = 8
USERS = 400


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


def told(what: str, rate: float, taken: list[float], peer: float, memory: float) -> None:
    p99 = statistics.quantiles(taken, n=100)[98] if len(taken) > 1 else taken[0]
    print(
        f"{what:34} {rate:8.0f} {statistics.median(taken):8.1f} {p99:8.1f} {rate / peer:8.2f} {memory:8.0f}", flush=True
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=10)
    seconds = parser.parse_args().seconds
    with Lab() as lab:
        lab.create({f"user-{number}": f"password-{number}" for number in range(USERS)}, {})
        lab.prepare()
        url = lab.new.cli("activate", DOMAIN).stdout.strip()
        lab.new.cli("pause", DOMAIN, "--reason", "so that only requests are measured")
        base = lab.new.settings.portal.public_url
        pid = lab.new.portal.pid
        waiting = list(range(USERS))

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

        def form(_: int) -> None:
            if waiting:
                number = waiting.pop()
                visitor = Visitor(url)
                visitor.request(full(f"user-{number}"), f"password-{number}", "X", "Y")
                if visitor.status != 200:
                    raise RuntimeError(f"the form of user-{number} was answered with {visitor.status}")

        print(f"{'':34} {'a second':>8} {'ms, half':>8} {'ms, 99 %':>8} {'of peer':>8} {'MiB':>8}")
        peer, taken = hammer(get(f"{base}/static/page.css"), seconds)
        told("peer: a static file", peer, taken, peer, resident(pid))
        for what, work in (("the form, shown", get(url)), ("progress", progress)):
            rate, taken = hammer(work, seconds)
            told(what, rate, taken, peer, resident(pid))
        began = time.perf_counter()
        sent = len(waiting)
        threads = [threading.Thread(target=lambda: [form(0) for _ in range(USERS) if waiting]) for _ in range(CLIENTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        rate = sent / (time.perf_counter() - began)
        told("forms shown, sent, become requests", rate, [1000 * CLIENTS / rate], peer, resident(pid))


if __name__ == "__main__":
    main()
