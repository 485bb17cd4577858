"""How fast a mailbox is copied, beside its peers, in one run.

    venv/bin/python bench/mailbox_copy.py [--messages 10000] [--round-trip 0 20]

Each way reads the same mailbox from the same legacy Dovecot through the same
delay (milliseconds), without TLS, into an empty Maildir; then again with
nothing changed. Ratios are to the bare FETCH: one session, every command sent
at once, bytes thrown away, which is the limit of one session. TMPDIR says on
which file system both sides are: on a disk the copy waits for the disk, and
bascule and doveadm put every message on it (fsync) before they are done.
``trips`` is what nothing changed costs in round trips: the second pass's time
at this delay less its time at the first one, by the delay.
"""

from __future__ import annotations

import contextlib
import os
import platform
import random
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from imapclient import IMAPClient

from bascule.address import Address
from bascule.credential import Password
from bascule.imap.reader import Reader
from bascule.lab.delay import Delay
from bascule.lab.mail import message
from bascule.lab.process import VMAIL
from bascule.lab.sites import DOMAIN, Lab
from bascule.lab.table import Table, parser
from bascule.legacy import LegacySettings, Service, Trust, UserLogin, session
from bascule.migrator import maildir
from bascule.migrator.copying import Copy

NAME, PASSWORD = "bench", "bench-password"
FOLDERS = 20
SEED = 1
SIZES, WEIGHTS = [2_000, 20_000, 80_000, 800_000], [58, 24, 14, 4]  # bytes of a message, and how many of a hundred


@dataclass(frozen=True)
class Way:
    """A way to copy; ``run`` copies from the port into the folder, and can be run again."""

    name: str
    run: Callable[[int, Path], None]


def fill(lab: Lab, count: int) -> int:
    """Write the mailbox on the legacy side; its size in bytes."""
    source = random.Random(SEED)  # noqa: S311 (mail, not keys)
    home = lab.legacy.dovecot.folder / "mail" / NAME / "Maildir"
    total = 0
    for number in range(count):
        folder = home if number % FOLDERS == 0 else home / f".Folder{number % FOLDERS}"
        for part in ("cur", "new", "tmp"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        size = source.choices(SIZES, WEIGHTS)[0]
        body = message(f"{number}@bench.test", f"{NAME}@{DOMAIN}", source, size=size)
        (folder / "cur" / f"{1_200_000_000 + number}.{number}.lab,S={len(body)},W={len(body)}:2,S").write_bytes(body)
        total += len(body)
    for path in [home.parent, home, *home.rglob("*")]:
        os.chown(path, VMAIL, VMAIL)
    return total


def bare_fetch(port: int, _: Path) -> None:
    """The limit of one session: every body of every folder, pipelined, thrown away."""
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


def bascule(sessions: int) -> Callable[[int, Path], None]:
    def run(port: int, into: Path) -> None:
        legacy = LegacySettings(DOMAIN, "127.0.0.1", Service(port, "none"), "127.0.0.1", 25)

        @contextlib.contextmanager
        def open_source() -> Iterator[Reader]:
            with session(legacy, Trust(), UserLogin(Address(NAME, DOMAIN), Password(PASSWORD))) as connection:
                yield Reader.of(connection)

        into.mkdir(exist_ok=True)
        maildir.take_over(into, into / "Maildir")
        with Copy(open_source, into / "Maildir", lambda _: None, sessions=sessions) as copy:
            copy.run()

    return run


def with_imapclient(port: int, into: Path) -> None:
    """Our own writer on imapclient: a FETCH for a hundred messages, then the next."""
    client = IMAPClient("127.0.0.1", port, ssl=False)
    client.login(f"{NAME}@{DOMAIN}", PASSWORD)
    for _, _, name in client.list_folders():
        selected = client.select_folder(name, readonly=True)
        folder = maildir.Folder(into / "Maildir" / name, name, int(selected[b"UIDVALIDITY"]))
        folder.open()
        missing = [uid for uid in client.search() if uid not in folder.messages]
        for start in range(0, len(missing), 100):
            wanted = missing[start : start + 100]
            for uid, data in client.fetch(wanted, ["FLAGS", "INTERNALDATE", "BODY.PEEK[]"]).items():
                body = data[b"BODY[]"]
                flags = frozenset(flag.decode() for flag in data[b"FLAGS"]) - {"\\Recent"}
                received = folder.receive(len(body), [body])
                folder.keep(uid, int(data[b"INTERNALDATE"].timestamp()), flags, received)
        folder.write_index(int(selected[b"UIDNEXT"]))
    client.logout()


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
        check=True, user=VMAIL, group=VMAIL, extra_groups=[], stderr=subprocess.DEVNULL,
        env={"HOME": str(into), "USER": NAME, "PATH": os.environ["PATH"]},
    )  # fmt: skip


def mbsync(port: int, into: Path) -> None:
    """mbsync; its files have UIDs of its own, and it does not fsync here (its fastest)."""
    into.mkdir(exist_ok=True)
    (into / "mail").mkdir(exist_ok=True)
    settings = into / "mbsyncrc"
    settings.write_text(
        "FSync no\n"
        f"IMAPStore far\nHost 127.0.0.1\nPort {port}\nUser {NAME}@{DOMAIN}\nPass {PASSWORD}\nSSLType None\n"
        "PipelineDepth 50\n\n"
        f"MaildirStore near\nPath {into}/mail/\nInbox {into}/mail/INBOX\nSubFolders Verbatim\n\n"
        "Channel all\nFar :far:\nNear :near:\nPatterns *\nCreate Near\nSync Pull\nSyncState *\n"
    )
    subprocess.run(["mbsync", "-q", "-c", str(settings), "all"], check=True)


def offlineimap(port: int, into: Path) -> None:
    """OfflineIMAP 3, with as many sessions as it may have."""
    into.mkdir(exist_ok=True)
    settings = into / "offlineimaprc"
    settings.write_text(
        f"[general]\naccounts = bench\nmetadata = {into}/state\nfsync = False\n"
        "[Account bench]\nlocalrepository = near\nremoterepository = far\n"
        f"[Repository near]\ntype = Maildir\nlocalfolders = {into}/mail\n"
        f"[Repository far]\ntype = IMAP\nremotehost = 127.0.0.1\nremoteport = {port}\nremoteuser = {NAME}@{DOMAIN}\n"
        f"remotepass = {PASSWORD}\nssl = no\nstarttls = no\nmaxconnections = 3\nreadonly = True\n"
    )
    subprocess.run(
        ["offlineimap", "-c", str(settings), "-o", "-u", "quiet"], check=True, env=os.environ | {"HOME": str(into)}
    )


def ways(wanted: list[str]) -> list[Way]:
    known = [
        Way("bare FETCH", bare_fetch),
        Way("bascule, 1 session", bascule(1)),
        Way("bascule, 3 sessions", bascule(3)),
        Way("imapclient", with_imapclient),
    ]
    for name, program, run in (
        ("doveadm backup -R", "doveadm", doveadm_backup),
        ("mbsync", "mbsync", mbsync),
        ("offlineimap", "offlineimap", offlineimap),
    ):
        if shutil.which(program):
            known.append(Way(name, run))
    return [way for way in known if not wanted or any(way.name.startswith(each) for each in ["bare", *wanted])]


def version(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()[0]
    except (FileNotFoundError, IndexError):
        return f"no {command[0]}"


def stored(folder: Path) -> int:
    return sum(1 for path in folder.rglob("*") if path.parent.name in {"cur", "new"} and path.is_file())


def say(text: str) -> None:
    print(text, flush=True)


def main() -> None:
    options_of = parser(__doc__)
    options_of.add_argument("--messages", type=int, default=10_000)
    options_of.add_argument("--round-trip", type=float, nargs="+", default=[0, 20], help="milliseconds")
    options_of.add_argument(
        "--ways", nargs="*", default=[], help="only these (beginnings of names), and the bare FETCH"
    )
    options = options_of.parse_args()
    with Lab() as lab:
        lab.legacy.create({NAME: PASSWORD}, {})
        lab.legacy.start()
        size = fill(lab, options.messages)
        file_system = version("stat", "-f", "-c", "%T", str(lab.folder))
        say(f"{options.messages} messages, {size / 1e6:.0f} MB, {FOLDERS} folders, seed {SEED}, on {file_system}")
        peers = [version("dovecot", "--version"), version("mbsync", "--version"), version("offlineimap", "--version")]
        say(f"Python {platform.python_version()}; Dovecot {'; '.join(peers)}; {os.cpu_count()} processors")
        bare_fetch(lab.legacy.ports.imap, Path())  # the legacy server makes its indexes
        table = Table(
            "way", "ms of delay", "copy, s", "of bare", "again, s", "trips", "messages", markdown=options.markdown
        )
        again_without: dict[str, tuple[float, float]] = {}
        for round_trip in options.round_trip:
            with Delay(lab.legacy.ports.imap, round_trip / 1000) as delay:
                bare = 0.0
                for way in ways(options.ways):
                    into = lab.folder / f"{way.name.replace(' ', '-').replace(',', '')}-{round_trip}"
                    times = []
                    for _ in range(2):
                        began = time.monotonic()
                        with contextlib.chdir(lab.folder):
                            way.run(delay.port, into)
                        times.append(time.monotonic() - began)
                    bare = bare or times[0]
                    delay_0, again_0 = again_without.setdefault(way.name, (round_trip, times[1]))
                    trips = (
                        f"{(times[1] - again_0) / (round_trip - delay_0) * 1000:.0f}" if round_trip > delay_0 else ""
                    )
                    count = stored(into) if into.exists() else 0
                    table.row(way.name, round_trip, times[0], bare / times[0], times[1], trips, count)
                    shutil.rmtree(into, ignore_errors=True)


if __name__ == "__main__":
    main()
