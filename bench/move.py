"""How long a user's mail is held, and what a worker takes of memory, for a large mailbox.

    venv/bin/python bench/move.py [--messages 10000] [--size 2000] [--round-trip 20]

The whole way of a real move on real servers: request, copy, cutover, with the
legacy IMAP server (TLS) behind a delay of so many milliseconds. ``held`` is
from the moment the state is cutover to the flip, as the worker measures it.
"""

from __future__ import annotations

import os
import random
import re
import time
from pathlib import Path

from bascule.lab.delay import Delay
from bascule.lab.mail import legacy_maildir, message
from bascule.lab.process import VMAIL
from bascule.lab.sites import DOMAIN, Lab, eventually
from bascule.lab.table import Table, parser

NAME, PASSWORD = "bench", "bench-password"
FOLDERS = 20


def fill(lab: Lab, count: int, size: int, largest: int) -> int:
    """Write the mailbox on the legacy side; its size in bytes. One message is of ``largest`` bytes."""
    source = random.Random(1)  # noqa: S311 (mail, not keys)
    inbox = legacy_maildir(lab.legacy, NAME)
    total = 0
    for number in range(count):
        folder = inbox if number % FOLDERS == 0 else inbox / f".Folder{number % FOLDERS}"
        for part in ("cur", "new", "tmp"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        body = message(f"{number}@bench.test", f"{NAME}@{DOMAIN}", source, size=largest if number == 7 else size)
        name = (
            f"{1_200_000_000 + number}.{number}.lab,S={len(body)},W={len(body)}:2,{source.choice(['', 'S', 'RS', 'F'])}"
        )
        (folder / "cur" / name).write_bytes(body)
        total += len(body)
    for path in [inbox.parent, inbox, *inbox.rglob("*")]:
        os.chown(path, VMAIL, VMAIL)
    return total


def memory(pid: int, field: str) -> float:
    """A figure of /proc/PID/status, in MiB."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return int(found[1]) / 1024 if found else 0.0


def main() -> None:
    options_of = parser(__doc__)
    options_of.add_argument("--messages", type=int, default=10_000)
    options_of.add_argument("--size", type=int, default=2_000, help="bytes of a message")
    options_of.add_argument("--largest", type=int, default=50_000_000, help="bytes of one message")
    options_of.add_argument("--round-trip", type=float, default=20, help="milliseconds")
    options = options_of.parse_args()
    with Lab() as lab:
        lab.create({NAME: PASSWORD}, {})
        size = fill(lab, options.messages, options.size, options.largest)
        with Delay(lab.legacy.ports.imaps, options.round_trip / 1000) as delay:
            lab.prepare("--no-first-login", "--imap-port", str(delay.port))
            lab.new.cli("activate", DOMAIN)
            time.sleep(1)
            idle = memory(lab.new.worker.pid, "VmRSS")
            began = time.monotonic()
            done = lab.new.cli("request", f"{NAME}@{DOMAIN}", "--password-file", "-", stdin=PASSWORD + "\n")
            if done.returncode != 0:
                raise SystemExit(done.stdout)
            eventually("moved", lambda: lab.new.state(NAME) == "local", 1200)
            took = time.monotonic() - began
            peak = memory(lab.new.worker.pid, "VmHWM")
            eventually("it is logged", lambda: "held_ms=" in lab.new.worker.log.read_text())
            held = re.findall(r"held_ms=(\d+)", lab.new.worker.log.read_text())[-1]
            passes = re.findall(r"pass done.*?changes=(\d+)", lab.new.worker.log.read_text())
        table = Table(
            "", "messages", "MB", "ms of delay", "s", "held, s", "MiB idle", "MiB at most", markdown=options.markdown
        )
        figures = (options.messages, size / 1e6, options.round_trip, took, int(held) / 1000, idle, peak)
        table.row(f"moved; passes of {', '.join(passes)} changes", *figures)


if __name__ == "__main__":
    main()
