"""The fault campaign: users move, and some go back, while anything is killed and mail comes from all sides.

    python -m bascule.lab.campaign --rounds 100 --seed 1

Each round moves a few users while mail comes from outside, from a colleague
inside the legacy server and from each user's own client, which appends, flags,
moves and expunges; meanwhile a schedule of faults, made from the round's seed,
kills processes with -9, stops PostgreSQL and the legacy server, cuts sessions,
fills the disk, freezes the worker until another takes its mailbox over, starts
a second worker. Then everything that was sent is compared with what is stored:
each message once, in the right mailbox, with its bytes.

``--seed S --rounds 1`` replays the round with seed S. Where a process died
between doing and saying so, IMAP itself leaves open whether it was done: what
a client asked for in such a moment is counted as *unsure* and may be found or not.

Not killed are the processes that hand a message over (smtpd, smtp, lmtp on
either side): between taking a message and saying so, SMTP itself doubles it
(RFC 1047).
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random

import psycopg
from imapclient import IMAPClient
from imapclient.exceptions import IMAPClientError

from bascule.lab.mail import Ledger, legacy_maildir, message, read_mailbox, send
from bascule.lab.process import VMAIL, Daemon, LabError, program, run
from bascule.lab.sites import DOMAIN, Lab, eventually

USERS = 3  # that move at the same time
ROUNDS_A_LAB = 8  # before a fresh one is made: every user who has moved is swept until the end
DISK = "192m"  # the size of the file system that holds the mail here
FROZEN = 9.0  # seconds: longer than a worker may be silent


@dataclass
class Tally:
    """What the rounds did and found."""

    rounds: int = 0
    messages: int = 0
    unsure: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    failed: list[str] = field(default_factory=list)


class Everything:
    """What was given to whom, with the bytes where they are stored as given, and what nobody can be sure of."""

    def __init__(self) -> None:
        self.ledger = Ledger()
        self._digests: dict[str, str] = {}
        self._unsure: set[str] = set()
        self._lock = threading.Lock()

    def give(self, identity: str, name: str, body: bytes) -> None:
        """Note a message that will be stored as it is."""
        self.ledger.give(identity, name)
        with self._lock:
            self._digests[identity] = hashlib.sha256(body).hexdigest()

    def doubt(self, identity: str) -> None:
        """Note that a client was cut off while it did something with this message."""
        with self._lock:
            self._unsure.add(identity)

    @property
    def unsure(self) -> int:
        return len(self._unsure)

    def complaints(self, found: dict[str, list[tuple[str, str]]]) -> list[str]:
        """What is lost, doubled, changed or in the wrong mailbox; ``found``: Message-ID and digest by mailbox."""
        expected = self.ledger.expected
        where: dict[str, list[str]] = {}
        said = []
        for name, messages in found.items():
            for identity, digest in messages:
                where.setdefault(identity, []).append(name)
                if self._digests.get(identity, digest) != digest:
                    said.append(f"changed: {identity} of {name}")
        for identity, name in expected.items():
            if identity in self._unsure:
                continue
            places = where.get(identity, [])
            if name not in places:
                said.append(f"lost: {identity} of {name}")
            elif len(places) > 1:
                said.append(f"doubled: {identity} of {name}, in {places}")
        said += [
            f"unknown: {identity} in {places}"
            for identity, places in where.items()
            if identity not in expected and identity not in self._unsure and not identity.startswith("bascule-last-")
        ]
        return said


class Client(threading.Thread):
    """A user's mail client: logs in to the new server, works, and comes back when it is thrown out."""

    def __init__(self, port: int, name: str, password: str, everything: Everything, seed: int) -> None:
        super().__init__(daemon=True)
        self._port, self._name, self._password = port, name, password
        self._everything = everything
        self._random = Random(seed)  # noqa: S311 (mail, not keys)
        self.ended = threading.Event()
        self._number = 0
        self.failure: BaseException | None = None

    def run(self) -> None:
        try:
            while not self.ended.is_set():
                try:
                    client = IMAPClient("127.0.0.1", self._port, ssl=False, timeout=20)
                except (OSError, IMAPClientError):
                    self.ended.wait(0.2)
                    continue
                try:
                    client.plain_login(f"{self._name}@{DOMAIN}", self._password)
                    while not self.ended.wait(self._random.uniform(0.02, 0.3)):
                        self._work(client)
                except (OSError, IMAPClientError):
                    self.ended.wait(0.2)
                finally:
                    _shut(client)
        except BaseException as error:
            self.failure = error
            raise

    def _work(self, client: IMAPClient) -> None:
        act = self._random.choice(["append", "append", "flag", "move", "expunge"])
        folder = self._random.choice(["INBOX", "Sent", "Archive"])
        if act == "append":
            self._number += 1
            identity = f"client-{self._number}-{self._name}@client.test"
            body = message(identity, f"{self._name}@{DOMAIN}", self._random, size=self._random.choice([0, 30_000]))
            self._everything.give(identity, self._name, body)
            with self._doubtful(identity):
                client.append(folder, body, ["\\Seen"])
            return
        client.select_folder(folder)
        uids = client.search()
        if not uids:
            return
        uid = self._random.choice(uids)
        if act == "flag":
            client.add_flags([uid], [self._random.choice(["\\Flagged", "\\Answered", "$Label1", "todo"])])
            return
        envelope = client.fetch([uid], ["ENVELOPE"]).get(uid, {}).get(b"ENVELOPE")
        if envelope is None or envelope.message_id is None:
            return
        identity = envelope.message_id.decode().strip("<>")
        if identity.startswith("bascule-last-"):
            return
        with self._doubtful(identity):
            if act == "move":
                client.move([uid], "Archive" if folder != "Archive" else "Sent")
            else:
                client.delete_messages([uid])
                client.uid_expunge([uid])
                self._everything.ledger.take_back(identity)

    @contextmanager
    def _doubtful(self, identity: str) -> Iterator[None]:
        try:
            yield
        except (OSError, IMAPClientError):
            self._everything.doubt(identity)
            raise


def _shut(client: IMAPClient) -> None:
    try:
        client.shutdown()
    except OSError:
        return


class Senders:
    """Mail from outside, and from a colleague inside the legacy server."""

    def __init__(self, lab: Lab, names: list[str], everything: Everything, seed: int) -> None:
        self._lab, self._names, self._everything = lab, names, everything
        self.ended = threading.Event()
        self._threads = [
            threading.Thread(target=self._send, args=(port, kind, pause, Random(seed + number)), daemon=True)  # noqa: S311
            for number, (port, kind, pause) in enumerate(
                [(lab.new.smtp_port, "outside", 0.08), (lab.legacy.smtp_port, "colleague", 0.4)]
            )
        ]
        self.failure: BaseException | None = None

    def _send(self, port: int, kind: str, pause: float, random: Random) -> None:
        number = 0
        try:
            while not self.ended.wait(random.uniform(0, 2 * pause)):
                name = random.choice(self._names)
                identity = f"{kind}-{number}-{name}@{kind}.test"
                number += 1
                while True:
                    try:
                        send(port, identity, name, self._everything.ledger, random)
                        break
                    except OSError:
                        # Refused before anything was handed over: smtpd is not killed.
                        time.sleep(0.3)
        except BaseException as error:
            self.failure = error
            raise

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self.ended.set()
        for thread in self._threads:
            thread.join(150)
        if self.failure is not None:
            raise LabError("mail was not taken") from self.failure


class Faults:
    """The things that go wrong, each by its name."""

    def __init__(self, lab: Lab, random: Random) -> None:
        self._lab, self._random = lab, random
        self.acts: dict[str, Callable[[], None]] = {
            "kill policy daemon": lambda: self._restart(lab.new.policy_daemon),
            "kill authenticator": lambda: self._restart(lab.new.authenticator),
            "kill milter": lambda: self._restart(lab.new.milter),
            "kill worker": lambda: self._restart(lab.new.worker),
            "kill worker again": lambda: self._restart(lab.new.worker),
            "freeze worker": self._freeze_worker,
            "second worker": self._second_worker,
            "kill PostgreSQL": self._kill_postgres,
            "kill a PostgreSQL backend": lambda: self._kill_one(r"bascule_worker"),
            "kill Dovecot's imap": lambda: self._kill_one(r"^dovecot/imap( |$)"),
            "kill the new Dovecot": self._kill_dovecot,
            "kill the queue manager": self._kill_queue_manager,
            "stop the legacy server": self._stop_legacy,
            "cut legacy sessions": self._cut_sessions,
            "fill the disk": self._fill_disk,
        }

    def one(self) -> str:
        """Let something go wrong; its name."""
        name = self._random.choice(list(self.acts))
        self.acts[name]()
        return name

    def _restart(self, daemon: Daemon) -> None:
        daemon.kill()
        time.sleep(self._random.uniform(0, 1.5))
        daemon.start()

    def _freeze_worker(self) -> None:
        second = self._lab.new.another_worker()
        pid = self._lab.new.worker.pid
        os.kill(pid, signal.SIGSTOP)
        try:
            second.start()
            time.sleep(FROZEN)
        finally:
            os.kill(pid, signal.SIGCONT)
        time.sleep(1)
        second.stop()

    def _second_worker(self) -> None:
        second = self._lab.new.another_worker()
        second.start()
        time.sleep(self._random.uniform(0.5, 3))
        second.kill()

    def _kill_postgres(self) -> None:
        self._lab.new.postgres.kill()
        time.sleep(self._random.uniform(0, 2))
        self._lab.new.postgres.start()
        self._lab.new.worker.stop()  # the service manager would do it
        self._lab.new.worker.start()

    def _kill_dovecot(self) -> None:
        self._lab.new.dovecot.kill()
        time.sleep(self._random.uniform(0, 1))
        self._lab.new.dovecot.start()

    def _kill_queue_manager(self) -> None:
        queue = self._lab.new.postfix.folder / "queue"
        for pid in _processes_in(str(queue), "qmgr"):
            os.kill(pid, signal.SIGKILL)

    def _kill_one(self, pattern: str) -> None:
        ours = _descendants(self._lab)
        victims = [pid for pid, title in ours.items() if re.search(pattern, title)]
        if victims:
            os.kill(self._random.choice(victims), signal.SIGKILL)

    def _stop_legacy(self) -> None:
        legacy = self._lab.legacy
        legacy.postfix.stop()  # first, so that it hands nothing over while Dovecot goes
        legacy.dovecot.stop()
        time.sleep(self._random.uniform(0.2, 3))
        legacy.start()

    def _cut_sessions(self) -> None:
        for pid, title in _descendants(self._lab).items():
            if title.startswith("dovecot/imap-login") and self._random.random() < 0.5:
                os.kill(pid, signal.SIGKILL)

    def _fill_disk(self) -> None:
        ballast = self._lab.new.folder / "mail" / "ballast"
        try:
            with ballast.open("wb") as file:
                while True:
                    file.write(b"\0" * (1 << 20))
                    file.flush()
        except OSError:
            time.sleep(self._random.uniform(0.5, 3))
        finally:
            ballast.unlink(missing_ok=True)


def _processes_in(directory: str, name: str) -> list[int]:
    """Processes of that name whose working directory is below ``directory``."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            if (entry / "comm").read_text().strip() == name and os.readlink(entry / "cwd").startswith(directory):  # noqa: PTH115
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def _descendants(lab: Lab) -> dict[int, str]:
    """Title of the lab's Dovecot and PostgreSQL processes by id; others' are left out."""
    masters = set()
    for path in (lab.new.dovecot.folder / "run" / "master.pid", lab.new.postgres.folder / "data" / "postmaster.pid"):
        if path.exists():
            masters.add(int(path.read_text().split()[0]))
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if parent in masters:
                found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
    return found


def fill(lab: Lab, name: str, everything: Everything, random: Random) -> None:
    """An old mailbox with a few hundred messages, written into the legacy Maildir at once."""
    inbox = legacy_maildir(lab.legacy, name)
    for folder in ("", ".Sent", ".Archive"):
        for part in ("cur", "new", "tmp"):
            (inbox / folder / part).mkdir(parents=True, exist_ok=True)
    for number in range(random.randint(30, 400)):
        identity = f"old-{number}-{name}@old.test"
        body = message(identity, f"{name}@{DOMAIN}", random, size=random.choice([0, 0, 4_000, 60_000]))
        everything.give(identity, name, body)
        folder = random.choice(["", ".Sent", ".Archive"])
        flags = random.choice(["", "S", "RS", "F"])
        (inbox / folder / "cur" / f"{1_200_000_000 + number}.{number}.lab:2,{flags}").write_bytes(body)
    run(program("chown"), "-R", f"{VMAIL}:{VMAIL}", str(inbox))


def play(lab: Lab, seed: int, tally: Tally) -> list[str]:
    """One round; what is wrong at its end."""
    random = Random(seed)  # noqa: S311 (a schedule, not keys)
    everything = Everything()
    names = [f"u{seed}-{number}" for number in range(USERS)]
    lab.legacy.set_users({**lab.legacy.users, **{name: f"pw {name}" for name in names}}, lab.legacy.aliases)
    for name in names:
        fill(lab, name, everything, random)
        eventually(f"{name} can log in", partial(_can_log_in, lab, name), 30)
    clients = [
        Client(lab.new.dovecot.ports.imap, name, lab.legacy.users[name], everything, seed * 10 + number)
        for number, name in enumerate(names)
    ]
    senders = Senders(lab, names, everything, seed)
    faults = Faults(lab, random)
    senders.start()
    for client in clients:
        client.start()
    for name in names:
        done = lab.new.cli("request", f"{name}@{DOMAIN}", "--password-file", "-", stdin=lab.legacy.users[name] + "\n")
        if done.returncode != 0:
            raise LabError(done.stdout)
    for _ in range(random.randint(2, 5)):
        time.sleep(random.uniform(0, 1.2))
        tally.faults[faults.one()] += 1
    _arrive(lab, names, "local")
    back = [name for name in names if random.random() < 0.25]
    for name in back:
        eventually(
            f"{name} is asked to return",
            partial(_ask_to_return, lab, name),
        )
    if back:
        time.sleep(random.uniform(0, 1))
        tally.faults[faults.one()] += 1
        _arrive(lab, back, "legacy")
    for client in clients:
        client.ended.set()
    for client in clients:
        client.join(60)
        if client.failure is not None:
            raise LabError(f"the client failed: {client.failure!r}") from client.failure
    senders.stop()
    eventually("no mail is under way", lambda: lab.new.postfix.is_empty() and lab.legacy.postfix.is_empty(), 180)
    # Late messages are swept within the interval; what is still missing then is lost.
    said: list[str] = []

    def complete() -> bool:
        said[:] = everything.complaints({name: _content(lab, name, here=name not in back) for name in names})
        return not said

    with suppress(LabError):  # what is wrong is in ``said``
        eventually("all is found", complete, 45)
    tally.messages += len(everything.ledger.expected)
    tally.unsure += everything.unsure
    return said


def _arrive(lab: Lab, names: list[str], state: str) -> None:
    """Wait until all are in a state, without waiting out the pauses between attempts."""
    deadline = time.monotonic() + 240
    while waiting := [name for name in names if _state(lab, name) != state]:
        if time.monotonic() > deadline:
            raise LabError(f"{waiting} do not come to {state}:\n{lab.new.worker.tail(60)}")
        for name in waiting:
            if state == "local":
                lab.new.cli("retry", f"{name}@{DOMAIN}")
        time.sleep(1)


def _ask_to_return(lab: Lab, name: str) -> bool:
    return lab.new.cli("return", f"{name}@{DOMAIN}", "--reason", "the campaign").returncode == 0


def _state(lab: Lab, name: str) -> str | None:
    try:
        return lab.new.state(name)
    except psycopg.OperationalError:  # it may still recover from the last fault
        return None


def _can_log_in(lab: Lab, name: str) -> bool:
    try:
        with lab.legacy.client(name):
            return True
    except (OSError, IMAPClientError):
        return False


def _content(lab: Lab, name: str, *, here: bool) -> list[tuple[str, str]]:
    client = lab.new.client(name, lab.legacy.users[name]) if here else lab.legacy.client(name)
    with client as session:
        return [
            (each.message_id, each.digest)
            for folder in read_mailbox(session).values()
            for each in folder.messages.values()
        ]


@contextmanager
def small_disk(lab: Lab) -> Iterator[None]:
    """Keep the mail here on a small file system of its own, in a mount namespace that is the process's own."""
    mail = lab.new.folder / "mail"
    options = f"size={DISK},mode=755,uid={VMAIL},gid={VMAIL}"
    subprocess.run([program("mount"), "-t", "tmpfs", "-o", options, "tmpfs", str(mail)], check=True)
    try:
        yield
    finally:
        subprocess.run([program("umount"), "-l", str(mail)], check=True)


@contextmanager
def running_lab() -> Iterator[Lab]:
    """Both sites, the domain active, the mail here on its small disk."""
    with Lab() as lab:
        lab.create({"nobody": "x"}, {})
        lab.prepare("--no-first-login", "--cutover-budget", "20 seconds")
        activated = lab.new.cli("activate", DOMAIN)
        if activated.returncode != 0:
            raise LabError(activated.stdout)
        lab.new.worker.stop()
        with small_disk(lab):
            lab.new.worker.start()
            yield lab
            lab.new.worker.stop()


def campaign(rounds: int, seed: int, show: Callable[[str], None]) -> Tally:
    """Play rounds with the seeds from ``seed`` on, until one fails; its seed replays it."""
    tally = Tally()
    seeds = range(seed, seed + rounds)
    for start in range(0, rounds, ROUNDS_A_LAB):
        with running_lab() as lab:
            for each in seeds[start : start + ROUNDS_A_LAB]:
                began = time.monotonic()
                try:
                    said = play(lab, each, tally)
                except LabError as error:
                    said = [str(error)]
                tally.rounds += 1
                if said:
                    tally.failed.append(f"seed {each}:\n  " + "\n  ".join(said[:20]))
                    show(tally.failed[-1])
                    return tally
                show(
                    f"seed {each}: {tally.messages} messages so far, none lost, doubled or changed; "
                    f"{tally.unsure} unsure; {sum(tally.faults.values())} faults; {time.monotonic() - began:.0f} s"
                )
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    tally = campaign(options.rounds, options.seed, lambda text: print(text, flush=True))
    for name, times in sorted(tally.faults.items()):
        print(f"{times:6} x {name}")
    print(f"{tally.rounds} rounds, {tally.rounds * USERS} users, {tally.messages} messages, {len(tally.failed)} failed")
    sys.exit(1 if tally.failed else 0)


if __name__ == "__main__":
    main()
