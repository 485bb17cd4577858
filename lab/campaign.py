"""The fault campaign: users move, and some go back, while anything is killed or frozen and mail comes from all sides.

    python -m bascule.lab.campaign --rounds 100 --seed 1

Each round moves a few users while mail comes from outside, from a colleague
inside the legacy server and from each user's own client, which appends, flags,
moves, expunges, renames folders and makes them anew; meanwhile a schedule of
faults, made from the round's seed, kills processes with -9, freezes them, stops
PostgreSQL and the legacy server, cuts sessions, fills the disk, starts a second
worker. Some messages end every session that asks for them, until the
administrator mends or waives them. Then everything that was sent is compared
with what is stored: each message once, in the right mailbox, with its bytes.

The seed also says between which servers (:data:`FIELDS`). ``--seed S --rounds 1``
replays the round with seed S. A round that fails is reported, with its seed, and
the next one is played in a fresh lab. Where a process died between doing and
saying so, IMAP itself leaves open whether it was done: what a client asked for
in such a moment is counted as *unsure* and may be found or not.

Not killed are the processes that hand a message over (smtpd, smtp, lmtp on
either side): between taking a message and saying so, SMTP itself doubles it
(RFC 1047).
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random

import psycopg
from imapclient import IMAPClient
from imapclient.exceptions import IMAPClientError

from bascule.lab.mail import Ledger, legacy_maildir, message, read_mailbox, send
from bascule.lab.process import VMAIL, Daemon, LabError, children, program, run, title
from bascule.lab.sites import DOMAIN, CourierSite, Lab, LegacySite, PrefixedSite, eventually


@dataclass(frozen=True, slots=True)
class Field:
    """Between which servers a round is played."""

    name: str
    legacy: type[LegacySite]
    mail_location: str


MAILDIR = "maildir:~/Maildir:LAYOUT=fs"
FIELDS = (
    Field("Dovecot to Maildir", LegacySite, MAILDIR),
    Field("Dovecot with INBOX. to sdbox", PrefixedSite, "sdbox:~/sdbox"),
    Field("Courier to Maildir", CourierSite, MAILDIR),
    Field("Dovecot to mdbox", LegacySite, "mdbox:~/mdbox"),
    Field("Dovecot with INBOX. to Maildir", PrefixedSite, MAILDIR),
    Field("Courier to mdbox", CourierSite, "mdbox:~/mdbox"),
)
USERS = 3  # that move at the same time
ROUNDS_A_LAB = 8  # before a fresh one is made: every user who has moved is swept until the end
DISK = "192m"  # the size of the file system that holds the mail here
FROZEN = 9.0  # seconds: longer than a worker may be silent
MAX_RENAMED = 5  # folders of one user
UNREADABLE = 0.3  # how often a mailbox has messages that the legacy server cannot read


@dataclass
class Tally:
    """What the rounds did and found."""

    rounds: int = 0
    messages: int = 0
    unsure: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    #: Rounds by field.
    fields: Counter[str] = field(default_factory=Counter)
    failed: list[str] = field(default_factory=list)

    def report(self) -> str:
        """All of it, for people."""
        lines = [*(f"{times:6} rounds, {name}" for name, times in sorted(self.fields.items()))]
        lines += [f"{times:6} x {name}" for name, times in sorted(self.faults.items())]
        lines += self.failed
        lines.append(
            f"{self.rounds} rounds, {self.rounds * USERS} users, {self.messages} messages, {self.unsure} unsure, "
            f"{sum(self.faults.values())} faults, {len(self.failed)} failed"
        )
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Found:
    """A message at the end of a round."""

    identity: str
    digest: str
    mailbox: str
    folder: str
    uid: int

    def __str__(self) -> str:
        return f"{self.mailbox}:{self.folder}:{self.uid}"


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

    def complaints(self, found: Mapping[str, Sequence[Found]]) -> list[str]:
        """What is lost, doubled, changed or in the wrong mailbox; ``found``: what each mailbox has."""
        expected = self.ledger.expected
        where: dict[str, list[Found]] = {}
        said = []
        for name, messages in found.items():
            for each in messages:
                where.setdefault(each.identity, []).append(each)
                if self._digests.get(each.identity, each.digest) != each.digest:
                    said.append(f"changed: {each.identity} of {name}, {each}")
        for identity, name in expected.items():
            if identity in self._unsure:
                continue
            places = where.get(identity, [])
            if name not in {place.mailbox for place in places}:
                said.append(f"lost: {identity} of {name}")
            elif len(places) > 1:
                said.append(f"doubled: {identity} of {name}, {' and '.join(map(str, places))}")
        said += [
            f"unknown: {identity}, {' and '.join(map(str, places))}"
            for identity, places in where.items()
            if identity not in expected and identity not in self._unsure and not identity.startswith("bascule-last-")
        ]
        return said


class Client(threading.Thread):
    """A user's mail client: logs in to the new server, works, and comes back when it is thrown out."""

    def __init__(self, port: int, name: str, password: str, prefix: str, everything: Everything, seed: int) -> None:
        super().__init__(daemon=True)
        self._port, self._name, self._password, self._prefix = port, name, password, prefix
        self._everything = everything
        self._random = Random(seed)  # noqa: S311 (mail, not keys)
        self.ended = threading.Event()
        self._number = self._renamed = 0
        self._in_project = ""
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
        act = self._random.choice(["append"] * 6 + ["flag"] * 3 + ["move"] * 3 + ["expunge"] * 3 + ["rename", "anew"])
        folder = self._random.choice(["INBOX", f"{self._prefix}Sent", f"{self._prefix}Archive"])
        if act == "append":
            self._append(client, folder)
            return
        if act == "rename":
            self._rename(client)
            return
        if act == "anew":
            self._make_anew(client)
            return
        client.select_folder(folder)
        uids = client.search()
        if not uids:
            return
        uid = self._random.choice(uids)
        if act == "flag":
            client.add_flags([uid], [self._random.choice(["\\Flagged", "\\Answered", "$Label1", "todo"])])
            return
        identity = self._identity(client, uid)
        if not identity or identity.startswith("bascule-last-"):
            return
        with self._doubtful(identity):
            if act == "move":
                self._move(client, uid, f"{self._prefix}{'Archive' if not folder.endswith('Archive') else 'Sent'}")
            else:
                client.delete_messages([uid])
                client.uid_expunge([uid])
                self._everything.ledger.take_back(identity)

    def _append(self, client: IMAPClient, folder: str) -> str:
        """Put a message into a folder; its Message-ID."""
        self._number += 1
        identity = f"client-{self._number}-{self._name}@client.test"
        body = message(identity, f"{self._name}@{DOMAIN}", self._random, size=self._random.choice([0, 30_000]))
        self._everything.give(identity, self._name, body)
        with self._doubtful(identity):
            client.append(folder, body, ["\\Seen"])
        return identity

    def _move(self, client: IMAPClient, uid: int, to: str) -> None:
        if client.has_capability("MOVE"):
            client.move([uid], to)
            return
        client.copy([uid], to)
        client.delete_messages([uid])
        client.uid_expunge([uid])

    def _rename(self, client: IMAPClient) -> None:
        """A folder with a message in it gets another name; the old name is free for the next one."""
        project = f"{self._prefix}Project"
        if not client.folder_exists(project):
            client.create_folder(project)
            self._in_project = self._append(client, project)
            return
        if self._renamed == MAX_RENAMED:
            return
        self._renamed += 1
        with self._doubtful(self._in_project):
            client.rename_folder(project, f"{self._prefix}Done {self._renamed}-{self._random.randrange(10**6)}")

    def _make_anew(self, client: IMAPClient) -> None:
        """A folder is emptied as webmail does it: deleted and made again, with another UIDVALIDITY."""
        folder = f"{self._prefix}Fleeting"
        if client.folder_exists(folder):
            client.select_folder(folder)
            gone = [identity for uid in client.search() if (identity := self._identity(client, uid))]
            client.select_folder("INBOX")
            with self._doubtful(*gone):
                client.delete_folder(folder)
                for identity in gone:
                    self._everything.ledger.take_back(identity)
        client.create_folder(folder)
        self._append(client, folder)

    def _identity(self, client: IMAPClient, uid: int) -> str:
        """A message's Message-ID; nothing if it is gone."""
        envelope = client.fetch([uid], ["ENVELOPE"]).get(uid, {}).get(b"ENVELOPE")
        return envelope.message_id.decode().strip("<>") if envelope and envelope.message_id else ""

    @contextmanager
    def _doubtful(self, *identities: str) -> Iterator[None]:
        try:
            yield
        except (OSError, IMAPClientError):
            for identity in identities:
                self._everything.doubt(identity)
            raise


def _shut(client: IMAPClient) -> None:
    try:
        client.shutdown()
    except OSError:
        return


class Senders:
    """Mail from outside, and from a colleague inside the legacy server.

    Where the legacy server orders messages by the names of their files (Courier), also from a program
    that delivers each of them before those that are there.
    """

    def __init__(self, lab: Lab, names: list[str], everything: Everything, seed: int) -> None:
        self._lab, self._names, self._everything = lab, names, everything
        self.ended = threading.Event()
        self._threads = [
            threading.Thread(target=self._send, args=(port, kind, pause, Random(seed + number)), daemon=True)  # noqa: S311
            for number, (port, kind, pause) in enumerate(
                [(lab.new.smtp_port, "outside", 0.08), (lab.legacy.smtp_port, "colleague", 0.4)]
            )
        ]
        if isinstance(lab.legacy, CourierSite):
            self._threads.append(threading.Thread(target=self._file, args=(Random(seed + 9),), daemon=True))  # noqa: S311
        self.failure: BaseException | None = None

    def _file(self, random: Random) -> None:
        number = 0
        try:
            while not self.ended.wait(random.uniform(0, 1)):
                name = random.choice(self._names)
                identity = f"filed-{number}-{name}@colleague.test"
                number += 1
                body = message(identity, f"{name}@{DOMAIN}", random)
                self._everything.give(identity, name, body)
                maildir = self._lab.legacy.maildir(name)
                file = maildir / "tmp" / f"1600000000.M{999_999 - number}P{number}.behind"
                file.write_bytes(_as_file(body))
                os.chown(file, VMAIL, VMAIL)
                file.rename(maildir / "new" / file.name)
        except BaseException as error:
            self.failure = error
            raise

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
            "freeze policy daemon": lambda: self._freeze([lab.new.policy_daemon.pid]),
            "freeze authenticator": lambda: self._freeze([lab.new.authenticator.pid]),
            "freeze milter": lambda: self._freeze([lab.new.milter.pid]),
            "freeze PostgreSQL": lambda: self._freeze(_postgres(lab)),
            "freeze the new Dovecot": lambda: self._freeze(lab.new.dovecot.processes()),
            "freeze the legacy server": lambda: self._freeze(lab.legacy.processes()),
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

    def _freeze(self, pids: list[int]) -> None:
        """Have them stand still and go on, as when the host of a virtual machine is busy."""
        try:
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGSTOP)
            time.sleep(self._random.uniform(1, FROZEN))
        finally:
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

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
        ours = [*self._lab.new.dovecot.processes(), *_postgres(self._lab)]
        victims = [pid for pid in ours if re.search(pattern, title(pid))]
        if victims:
            with suppress(ProcessLookupError):
                os.kill(self._random.choice(victims), signal.SIGKILL)

    def _stop_legacy(self) -> None:
        legacy = self._lab.legacy
        legacy.postfix.stop()  # first, so that it hands nothing over while the store goes
        legacy.stop_store()
        time.sleep(self._random.uniform(0.2, 3))
        legacy.start()

    def _cut_sessions(self) -> None:
        proxied = [pid for pid in self._lab.new.dovecot.processes() if title(pid).startswith("dovecot/imap-login")]
        for pid in [*proxied, *self._lab.legacy.sessions()]:
            if self._random.random() < 0.5:
                with suppress(ProcessLookupError):
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


def _postgres(lab: Lab) -> list[int]:
    """PostgreSQL's processes."""
    try:
        postmaster = int((lab.new.postgres.folder / "data" / "postmaster.pid").read_text().split()[0])
    except (FileNotFoundError, ValueError, IndexError):
        return []
    return [postmaster, *children(postmaster)]


def _as_file(body: bytes) -> bytes:
    """A message as delivering programs write it; Courier makes every LF of a file CRLF, also one after a CR."""
    return body.replace(b"\r\n", b"\n")


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
        (inbox / folder / "cur" / f"{1_200_000_000 + number}.{number}.lab:2,{flags}").write_bytes(_as_file(body))
    run(program("chown"), "-R", f"{VMAIL}:{VMAIL}", str(inbox))


class Unreadable:
    """Messages of one mailbox that the legacy server may not read: Dovecot ends every session that asks for one.

    They are not in the ledger before they are mended.
    """

    def __init__(self, lab: Lab, name: str, everything: Everything, random: Random) -> None:
        self._lab, self._name, self._everything, self._random = lab, name, everything, random
        self._files: dict[str, Path] = {}
        self._attended = False
        if random.random() >= UNREADABLE or isinstance(lab.legacy, CourierSite):
            return
        inbox = lab.legacy.maildir(name)
        for number in range(random.randint(1, 3)):
            identity = f"unreadable-{number}-{name}@old.test"
            body = message(identity, f"{name}@{DOMAIN}", random)
            stamp = 1_200_000_000 + random.randrange(400)
            path = inbox / random.choice(["", ".Sent", ".Archive"]) / "cur" / f"{stamp}.unreadable{number}.lab:2,S"
            path.write_bytes(_as_file(body))
            path.chmod(0)  # root's: Dovecot's process is not root
            self._files[identity] = path

    def attend(self) -> list[str]:
        """Mend or waive what is named, as an administrator does; what is wrong with it."""
        rows = self._lab.new.sql(
            "SELECT folder, uid FROM bascule.unreadable WHERE address = %s AND waived_at IS NULL",
            f"{self._name}@{DOMAIN}",
        )
        if self._attended or len(rows) < len(self._files) or not rows:
            return []
        self._attended = True
        said = []
        if len(rows) > len(self._files):
            said = [f"named as unreadable: {rows} of {self._name}, who has {len(self._files)} such messages"]
        if self._random.random() < 0.5:
            for identity, path in self._files.items():
                body = path.read_bytes()  # as root
                self._everything.give(identity, self._name, body.replace(b"\n", b"\r\n"))
                path.chmod(0o600)
                os.chown(path, VMAIL, VMAIL)
        else:
            self._lab.new.cli("waive-messages", f"{self._name}@{DOMAIN}", "--reason", "the campaign")
        return said

    def remove(self) -> None:
        """Have the legacy server forget those that are still unreadable, or nobody could read its mailbox whole."""
        for path in self._lab.legacy.maildir(self._name).rglob("*.unreadable*"):
            if path.is_file() and path.stat().st_uid == 0:
                path.unlink()


def play(lab: Lab, seed: int, tally: Tally) -> list[str]:
    """One round; what is wrong at its end."""
    random = Random(seed)  # noqa: S311 (a schedule, not keys)
    everything = Everything()
    names = [f"u{seed}-{number}" for number in range(USERS)]
    lab.legacy.set_users({**lab.legacy.users, **{name: f"pw {name}" for name in names}}, lab.legacy.aliases)
    unreadable = {}
    for name in names:
        fill(lab, name, everything, random)
        unreadable[name] = Unreadable(lab, name, everything, random)
        eventually(f"{name} can log in", partial(_can_log_in, lab, name), 30)
    clients = [
        Client(
            lab.new.dovecot.ports.imap,
            name,
            lab.legacy.users[name],
            lab.legacy.prefix,
            everything,
            seed * 10 + number,
        )
        for number, name in enumerate(names)
    ]
    senders = Senders(lab, names, everything, seed)
    faults = Faults(lab, random)
    said: list[str] = []
    try:
        senders.start()
        for client in clients:
            client.start()
        for name in names:
            user = f"{name}@{DOMAIN}"
            done = lab.new.cli("request", user, "--password-file", "-", stdin=lab.legacy.users[name] + "\n")
            if done.returncode != 0:
                raise LabError(done.stdout)
        for _ in range(random.randint(2, 5)):
            time.sleep(random.uniform(0, 1.2))
            tally.faults[faults.one()] += 1
        said += _arrive(lab, names, "local", unreadable)
        back = [name for name in names if random.random() < 0.25]
        for name in back:
            eventually(f"{name} is asked to return", partial(_ask_to_return, lab, name))
        if back:
            time.sleep(random.uniform(0, 1))
            tally.faults[faults.one()] += 1
            said += _arrive(lab, back, "legacy", {})
    finally:
        for client in clients:
            client.ended.set()
        senders.ended.set()
    for client in clients:
        client.join(60)
        if client.failure is not None:
            raise LabError(f"the client failed: {client.failure!r}") from client.failure
    senders.stop()
    eventually("no mail is under way", lambda: lab.new.postfix.is_empty() and lab.legacy.postfix.is_empty(), 180)
    for name in back:
        unreadable[name].remove()
    # Late messages are swept within the interval; what is still missing then is lost.
    missing: list[str] = []

    def complete() -> bool:
        missing[:] = everything.complaints({name: _content(lab, name, here=name not in back) for name in names})
        return not missing

    with suppress(LabError):  # what is wrong is in ``missing``
        eventually("all is found", complete, 45)
    tally.messages += len(everything.ledger.expected)
    tally.unsure += everything.unsure
    return said + missing


def _arrive(lab: Lab, names: list[str], state: str, unreadable: Mapping[str, Unreadable]) -> list[str]:
    """Wait until all are in a state, without waiting out the pauses between attempts; what was wrong on the way."""
    said: list[str] = []
    deadline = time.monotonic() + 240
    while waiting := [name for name in names if _state(lab, name) != state]:
        if time.monotonic() > deadline:
            raise LabError(f"{waiting} do not come to {state}: {_problems(lab)}\n{lab.new.worker.tail(30)}")
        for name in waiting:
            if state == "local":
                with suppress(psycopg.OperationalError):
                    said += unreadable[name].attend()
                lab.new.cli("retry", f"{name}@{DOMAIN}")
        time.sleep(1)
    return said


def _problems(lab: Lab) -> list[tuple[object, ...]]:
    try:
        return list(lab.new.sql("SELECT address, state, problem FROM bascule.mailboxes WHERE problem IS NOT NULL"))
    except psycopg.Error as error:
        return [(str(error),)]


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


def _content(lab: Lab, name: str, *, here: bool) -> list[Found]:
    client = lab.new.client(name, lab.legacy.users[name]) if here else lab.legacy.client(name)
    with client as session:
        return [
            Found(each.message_id, each.digest, name, folder, uid)
            for folder, seen in read_mailbox(session).items()
            for uid, each in seen.messages.items()
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
def running_lab(played: Field) -> Iterator[Lab]:
    """Both sites, the domain active, the mail here on its small disk."""
    with Lab(played.legacy) as lab:
        settings = lab.new.settings
        worker = settings.worker.model_copy(update={"mail_location": played.mail_location})
        lab.new.settings = settings.model_copy(update={"worker": worker})
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


def field_of(seed: int) -> Field:
    """The field that a round is played on; the rounds of one lab have the same."""
    return FIELDS[seed // ROUNDS_A_LAB % len(FIELDS)]


def campaign(
    seeds: Sequence[int], show: Callable[[str], None], tally: Tally, *, logs: Path | None = None, minutes: float = 1e9
) -> None:
    """Play the rounds with these seeds, in ``tally``; a round that fails ends its lab and not the campaign.

    No lab is made when ``minutes`` have passed. ``logs`` is where those of a lab with a round that failed are kept.
    """
    ends = time.monotonic() + 60 * minutes
    waiting = list(seeds)
    while waiting and time.monotonic() < ends:
        played = field_of(waiting[0])
        seed = waiting.pop(0)
        try:
            with running_lab(played) as lab:
                while _round(lab, seed, played, tally, show):
                    if not waiting or waiting[0] // ROUNDS_A_LAB != seed // ROUNDS_A_LAB or time.monotonic() > ends:
                        break
                    seed = waiting.pop(0)
                else:
                    _keep_logs(lab, logs, seed)
        except (LabError, OSError, subprocess.SubprocessError, psycopg.Error) as error:
            tally.failed.append(f"seed {seed} ({played.name}): the lab itself: {error!r}"[:2000])
            show(tally.failed[-1])


def _round(lab: Lab, seed: int, played: Field, tally: Tally, show: Callable[[str], None]) -> bool:
    """Play one and report it; False if the lab is not to be trusted any more."""
    began = time.monotonic()
    try:
        said = play(lab, seed, tally)
    except Exception as error:  # noqa: BLE001 (whatever it is, it is reported and the next round played)
        said = [str(error) if isinstance(error, LabError) else repr(error)]
    tally.rounds += 1
    tally.fields[played.name] += 1
    if said:
        head = f"seed {seed} ({played.name}) after {time.monotonic() - began:.0f} s:\n  "
        show(head + "\n  ".join(said[:20]))
        tally.failed.append(head + "\n  ".join(each.partition("\n")[0][:400] for each in said[:5]))
        return False
    show(
        f"seed {seed} ({played.name}): {tally.messages} messages so far, none of this round lost, doubled or changed; "
        f"{tally.unsure} unsure; {sum(tally.faults.values())} faults; {time.monotonic() - began:.0f} s"
    )
    return True


def _keep_logs(lab: Lab, where: Path | None, seed: int) -> None:
    if where is None:
        return
    kept = where / f"seed-{seed}"
    kept.mkdir(parents=True, exist_ok=True)
    logs = (
        "new/log/*.log",
        "*/dovecot/dovecot.log",
        "*/courier/courier.log",
        "*/postfix/log/mail.log",
        "*/*/postgres.log",
    )
    for path in [path for pattern in logs for path in lab.folder.glob(pattern)]:
        shutil.copy(path, kept / str(path.relative_to(lab.folder)).replace("/", "-"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no round after so long")
    parser.add_argument("--logs", type=Path, help="keep the logs of rounds that fail in this directory")
    options = parser.parse_args()
    tally = Tally()
    try:
        seeds = range(options.seed, options.seed + options.rounds)
        campaign(seeds, partial(print, flush=True), tally, logs=options.logs, minutes=options.minutes)
    except KeyboardInterrupt:
        print("ended from outside", flush=True)
    print(tally.report(), flush=True)
    sys.exit(1 if tally.failed or not tally.rounds else 0)


if __name__ == "__main__":
    main()
