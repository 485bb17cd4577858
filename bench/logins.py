"""Logins of users who have not moved: bascule's hooks against Dovecot's own passdb imap, in one run.

    venv/bin/python bench/logins.py [--users 400] [--rounds 3]

Three Dovecots 2.3 of the lab check the same users at the same legacy Dovecot,
over TLS: with ``passdb imap``, with checkpassword and authenticator, and with
the Lua passdb and authenticator. Logins come on the socket that Dovecot's own
login processes use (auth client protocol), sixteen at a time, with service smtp:
what follows a login, proxying, is the same for all. ``again`` is the same users
within a minute. CPU is that of the Dovecot here, the authenticator and
PostgreSQL; the legacy server's is the same for all and left out.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import threading
import time
from base64 import b64encode
from contextlib import ExitStack
from pathlib import Path

from bascule.lab.fronts import Front
from bascule.lab.process import VMAIL
from bascule.lab.servers import Dovecot
from bascule.lab.sites import DOMAIN, Lab

AT_ONCE = 16
TICK = os.sysconf("SC_CLK_TCK")


class AuthClient:
    """One connection to Dovecot's auth, as a login process has it (Dovecot's "Authentication Protocol" 1.2)."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(path))
        self._lines = self._socket.makefile("rb")
        self._socket.sendall(f"VERSION\t1\t2\nCPID\t{threading.get_ident() % 2**31}\n".encode())
        while self._lines.readline() != b"DONE\n":
            pass

    def log_in(self, number: int, user: str, password: str) -> bool:
        response = b64encode(f"\0{user}\0{password}".encode()).decode()
        self._socket.sendall(f"AUTH\t{number}\tPLAIN\tservice=smtp\tsecured\trip=192.0.2.1\tresp={response}\n".encode())
        return self._lines.readline().startswith(b"OK\t")

    def close(self) -> None:
        self._lines.close()
        self._socket.close()


def log_all_in(socket_path: Path, users: list[str]) -> float:
    """Seconds for all."""
    failed: list[str] = []

    def some(first: int) -> None:
        client = AuthClient(socket_path)
        for number, name in enumerate(users[first::AT_ONCE], 1):
            if not client.log_in(number, f"{name}@{DOMAIN}", "password"):
                failed.append(name)
        client.close()

    threads = [threading.Thread(target=some, args=(first,)) for first in range(AT_ONCE)]
    begin = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed[:3]
    return time.monotonic() - begin


def processor_time(roots: list[int]) -> float:
    """Seconds of these processes and their descendants, those that have ended included."""
    parents, times = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        pid = int(path.parent.name)
        parents[pid] = int(fields[1])
        times[pid] = sum(int(field) for field in fields[11:15])

    def belongs(pid: int) -> bool:
        while pid > 1:
            if pid in roots:
                return True
            pid = parents.get(pid, 0)
        return False

    return sum(each for pid, each in times.items() if belongs(pid)) / TICK


def pid_of(dovecot: Dovecot) -> int:
    return int((dovecot.folder / "run" / "master.pid").read_text())


def peer(lab: Lab, stack: ExitStack) -> Dovecot:
    """A Dovecot with passdb imap, the way its manual shows it."""
    dovecot = Dovecot(lab.folder / "peer", "new")
    dovecot.create(
        lab.new.certificate,
        lab.new.smtp_port,
        passdb_lua_stub="none",
        vmail_uid=VMAIL,
        vmail_gid=VMAIL,
        mail_by_userdb=False,
        own_users=False,
        auth_cache_size="",
        **lab.new.settings.model_dump(),
    )
    text = dovecot.config.read_text()
    begin, end = text.index("# bascule: the authenticator decides"), text.index("# Whom a proxying login")
    port, authority = lab.legacy.ports.imaps, lab.new.certificate.ca
    dovecot.config.write_text(
        text[:begin]
        + f"passdb {{\n driver = imap\n args = host=localhost port={port} ssl=imaps ssl_ca_file={authority}\n}}\n"
        + "userdb {\n driver = static\n args = uid=5000 gid=5000 home=/nonexistent\n}\n"
        + text[end:]
    )
    dovecot.start()
    stack.callback(dovecot.stop)
    return dovecot


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=400, help="in each round")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    names = [f"user{number}" for number in range(options.users * (options.rounds + 1))]
    with Lab() as lab, ExitStack() as stack:
        lab.create(dict.fromkeys(names, "password"), {})
        lab.prepare("--no-first-login")
        lab.new.cli("activate", DOMAIN)
        front = stack.enter_context(Front(lab.new, "2.3"))
        postgres = int((lab.new.postgres.folder / "data" / "postmaster.pid").read_text().splitlines()[0])
        other = peer(lab, stack)
        ways = {
            "passdb imap": (other.folder, [pid_of(other)]),
            "checkpassword": (lab.new.dovecot.folder, [pid_of(lab.new.dovecot), lab.new.authenticator.pid, postgres]),
            "Lua": (front.dovecot.folder, [pid_of(front.dovecot), front.authenticator.pid, postgres]),
        }
        figures: dict[str, list[tuple[float, float]]] = {}
        for number in range(options.rounds + 1):
            users = names[number * options.users : (number + 1) * options.users]
            for way, (folder, roots) in ways.items():
                for label in (way, f"{way}, again"):
                    before = processor_time(roots)
                    took = log_all_in(folder / "run" / "auth-client", users)
                    used = processor_time(roots) - before
                    if number:  # the first round starts worker processes
                        figures.setdefault(label, []).append((options.users / took, used / options.users * 1000))
        base = statistics.median(used for _, used in figures["passdb imap"])
        print(f"{options.users} users a round, {options.rounds} rounds, {AT_ONCE} logins at a time, medians")
        for label, values in figures.items():
            rate, used = (statistics.median(each) for each in zip(*values, strict=True))
            # A few logins may take less than the clock can measure.
            ratio = used / base if base else float("nan")
            print(f"  {label:22} {rate:6.0f} logins/s  {used:6.2f} ms CPU a login  {ratio:5.2f} of passdb imap")


if __name__ == "__main__":
    main()
