"""How fast a mailbox is copied, beside a bare FETCH and doveadm backup, in one run.

    /var/cache/bascule/venv-*/bin/python bench/mailbox_copy.py [--messages 2000] [--round-trip 0 20]

Each reads the same mailbox from the same legacy Dovecot through the same delay
(milliseconds), without TLS, into an empty Maildir; then again with nothing
changed. Ratios are to the bare FETCH: one connection, one command a folder,
bytes thrown away.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bascule.address import Address
from bascule.credential import Password
from bascule.lab.delay import Delay
from bascule.lab.mail import message
from bascule.lab.process import VMAIL
from bascule.lab.sites import DOMAIN, Lab
from bascule.legacy import LegacySettings, Service, Trust, UserLogin, imap_session
from bascule.migrator.copying import Copy
from bascule.migrator.source import Source

NAME, PASSWORD = "bench", "bench-password"
FOLDERS = 20
SEED = 1


@dataclass(frozen=True)
class Way:
    """A way to copy; ``run`` copies from the port into the folder, and can be run again."""

    name: str
    run: Callable[[int, Path], None]


def fill(lab: Lab, count: int) -> int:
    """Write the mailbox on the legacy side; its size in bytes. Sizes are realistic: most small, some large."""
    source = random.Random(SEED)  # noqa: S311 (mail, not keys)
    home = lab.legacy.dovecot.folder / "mail" / NAME / "Maildir"
    total = 0
    for number in range(count):
        folder = home if number % FOLDERS == 0 else home / f".Folder{number % FOLDERS}"
        for part in ("cur", "new", "tmp"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        size = source.choices([2_000, 20_000, 80_000, 500_000], [60, 25, 12, 3])[0]
        body = message(f"{number}@bench.test", f"{NAME}@{DOMAIN}", source, size=size)
        (folder / "cur" / f"{1_200_000_000 + number}.{number}.lab,S={len(body)},W={len(body)}:2,S").write_bytes(body)
        total += len(body)
    for path in [home.parent, home, *home.rglob("*")]:
        os.chown(path, VMAIL, VMAIL)
    return total


def bare_fetch(port: int, _: Path) -> None:
    """The limit: every body of every folder over one connection, pipelined, thrown away."""
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(f'a LOGIN "{NAME}@{DOMAIN}" "{PASSWORD}"\r\n'.encode())
        while b"a OK" not in connection.recv(65_536):
            pass
        commands = []
        for name in ["INBOX", *(f"Folder{number}" for number in range(1, FOLDERS))]:
            commands += [f"b EXAMINE {name}", "c UID FETCH 1:* (UID FLAGS INTERNALDATE BODY.PEEK[])"]
        commands.append("z NOOP")
        connection.sendall("".join(f"{command}\r\n" for command in commands).encode())
        end = b""
        while b"\r\nz OK" not in end:
            end = end[-200:] + connection.recv(1 << 20)


def bascule(port: int, into: Path) -> None:
    legacy = LegacySettings(DOMAIN, "127.0.0.1", Service(port, "none"), "127.0.0.1", 25)

    @contextlib.contextmanager
    def open_source() -> Iterator[Source]:
        with imap_session(legacy, Trust(), UserLogin(Address(NAME, DOMAIN), Password(PASSWORD))) as client:
            yield Source.of(client)

    into.mkdir(exist_ok=True)
    with Copy(open_source, into, into / "Maildir", lambda _: None, sessions=int(os.environ.get("S", "4"))) as copy:
        copy.run()


def doveadm_backup(port: int, into: Path) -> None:
    """doveadm backup -R over imapc, with prefetching."""
    into.mkdir(exist_ok=True)
    os.chown(into, VMAIL, VMAIL)
    settings = into / "dovecot.conf"
    settings.write_text(
        f"base_dir = {into}/run\nlog_path = {into}/log\nssl = no\nmail_home = {into}\nmail_uid = {VMAIL}\n"
        f"mail_location = maildir:{into}/Maildir\nmail_prefetch_count = 50\nmail_fsync = always\n"
        f"imapc_host = 127.0.0.1\nimapc_port = {port}\n"
        f"imapc_user = {NAME}@{DOMAIN}\nimapc_password = {PASSWORD}\n"
        "imapc_features = rfc822.size fetch-headers\nnamespace inbox {\n  inbox = yes\n  separator = /\n}\n"
    )
    subprocess.run(
        ["doveadm", "-c", str(settings), "backup", "-R", "imapc:"],
        check=True, user=VMAIL, group=VMAIL, extra_groups=[],
        env={"HOME": str(into), "USER": NAME, "PATH": os.environ["PATH"]},
    )  # fmt: skip


def ways() -> list[Way]:
    known = [Way("bare FETCH", bare_fetch), Way("bascule", bascule)]
    if shutil.which("doveadm"):
        known.append(Way("doveadm backup -R", doveadm_backup))
    return known


def stored(folder: Path) -> int:
    return sum(1 for path in folder.rglob("*") if path.parent.name in {"cur", "new"} and path.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, default=2000)
    parser.add_argument("--round-trip", type=float, nargs="+", default=[0, 20], help="milliseconds")
    options = parser.parse_args()
    with Lab() as lab:
        lab.legacy.create({NAME: PASSWORD}, {})
        lab.legacy.start()
        size = fill(lab, options.messages)
        print(f"{options.messages} messages, {size / 1e6:.0f} MB, {FOLDERS} folders, seed {SEED}")  # noqa: T201
        bare_fetch(lab.legacy.ports.imap, Path())  # the legacy server makes its indexes
        print(f"{'round trip':>10}  {'way':<18} {'copy':>8} {'of bare':>8} {'again':>8} {'messages':>9}")  # noqa: T201
        for round_trip in options.round_trip:
            with Delay(lab.legacy.ports.imap, round_trip / 1000) as delay:
                bare = 0.0
                for way in ways():
                    into = lab.folder / f"{way.name.split()[0]}-{round_trip}"
                    times = []
                    for _ in range(2):
                        began = time.monotonic()
                        with contextlib.chdir(lab.folder):
                            way.run(delay.port, into)
                        times.append(time.monotonic() - began)
                    bare = bare or times[0]
                    count = stored(into) if into.exists() else 0
                    columns = f"{times[0]:>6.1f} s {bare / times[0]:>8.2f} {times[1]:>6.1f} s {count:>9}"
                    print(f"{round_trip:>7.0f} ms  {way.name:<18} {columns}", flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
