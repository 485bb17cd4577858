"""Several nodes: two MX, two stores, one PostgreSQL, a legacy server, each in a network namespace.

A login and a mail reach the right store from any node; then one node after the
other loses its power, and so does the database. Ends with a count of every
message, and fails loudly if one is lost or doubled, or if somebody who has
moved is sent to the legacy server.
"""

from __future__ import annotations

import os
import poplib
import shutil
import smtplib
import sys
import tempfile
from collections import Counter
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from itertools import count
from pathlib import Path
from random import Random

import psycopg
from imapclient import IMAPClient
from imapclient.exceptions import LoginError

from bascule.lab.mail import Ledger, copies, fill_mailbox, identities, read_mailbox, send
from bascule.lab.network import Network
from bascule.lab.postgres import Postgres
from bascule.lab.process import Daemon, Host, LabError
from bascule.lab.servers import Certificate
from bascule.lab.sites import DOMAIN, LegacySite, NewSite, eventually, full, imap, make_certificate

USERS = {name: f"password of {name}" for name in ("anna", "bert", "cora", "dora", "emil")}
#: Where each is kept, once moved; who is not here stays at the legacy server.
STORES = {"anna": "store1", "bert": "store2", "dora": "store2", "emil": "store1"}
LMTP_PORT = 24
SMTP_PORT = 25


class Node(NewSite):
    """A host with some of the parts."""

    def __init__(self, folder: Path, certificate: Certificate, host: Host, postgres: Postgres) -> None:
        name = host.name.partition(".")[0]
        super().__init__(folder, certificate, host=host, node=host.name, store=name, postgres=postgres)
        self.smtp_port = self.postfix.port = SMTP_PORT

    def take_keys(self, other: Node) -> None:
        for name in ("seal.pub", "seal.key", "stamp.key", "session.key"):
            source, target = (node.settings_file.parent / name for node in (other, self))
            shutil.copy(source, target)
            shutil.chown(target, source.stat().st_uid, source.stat().st_gid)

    @property
    def parts(self) -> tuple[Daemon, ...]:
        raise NotImplementedError

    def lose_power(self, network: Network) -> None:
        network.kill(self.host)
        network.cut(self.host)

    def come_back(self, network: Network) -> None:
        network.mend(self.host)
        self.start()


class Mx(Node):
    """Postfix, policy daemon, milter."""

    def build(self) -> None:
        self.create_postfix()

    @property
    def parts(self) -> tuple[Daemon, ...]:
        return (self.policy_daemon, self.milter)

    def start(self) -> None:
        for part in self.parts:
            part.start()
        self.postfix.start()


class Store(Node):
    """Dovecot, authenticator, worker."""

    def build(self, mx: Mx) -> None:
        self.create_dovecot(smtp_host=mx.host.address, lmtp_port=LMTP_PORT)

    @property
    def parts(self) -> tuple[Daemon, ...]:
        return (self.authenticator, self.worker)

    def start(self) -> None:
        (self.dovecot.folder / "run" / "master.pid").unlink(missing_ok=True)  # of before the power went
        self.authenticator.start()
        self.dovecot.start()
        self.worker.start()


class Nodes:
    """All of them, and the steps; each prints what it does and insists on what must hold."""

    def __init__(self, folder: Path) -> None:
        self.network = Network(folder)
        names = ("db", "mx1", "mx2", "store1", "store2")
        hosts = {name: self.network.add(f"{name}.lab.test") for name in names}
        certificate = make_certificate(folder, *(host.name for host in (self.network.hub, *hosts.values())))
        self.postgres = Postgres(folder / "postgres", hosts["db"])
        self.legacy = LegacySite(folder / "legacy", certificate, self.network.hub)
        self.mx = [Mx(folder / name, certificate, hosts[name], self.postgres) for name in ("mx1", "mx2")]
        self.stores = {
            name: Store(folder / name, certificate, hosts[name], self.postgres) for name in ("store1", "store2")
        }
        self.admin = self.stores["store1"]
        self.ledger = Ledger()
        self.random = Random(5)  # noqa: S311 (mail, not keys)
        self.numbers = count(1)

    # The nodes ------------------------------------------------------------------

    def start(self) -> None:
        self.legacy.create(USERS, {})
        self.postgres.create()
        first, *others = self.nodes
        for node in self.nodes:
            node.create_files()
        first.create_keys()
        for node in others:
            node.take_keys(first)
        for mx in self.mx:
            mx.build()
        for store in self.stores.values():
            store.build(self.mx[0])
        self.legacy.start()
        for node in self.nodes:
            node.start()

    def stop(self) -> None:
        """Some are dead already: end all of them in one way."""
        with ExitStack() as stack:
            stack.callback(self.network.close)
            stack.callback(self.legacy.stop)
            for host in (self.postgres.host, *(node.host for node in self.nodes)):
                self.network.kill(host)

    @property
    def nodes(self) -> list[Node]:
        return [*self.mx, *self.stores.values()]

    def run(self) -> None:
        for step in (
            self.activate, self.move_two, self.every_way_in, self.every_way_for_mail, self.lose_an_mx,
            self.lose_a_store, self.lose_sight_of_the_database, self.lose_the_database,
            self.nothing_is_left_in_queues, self.count,
        ):  # fmt: skip
            step()

    def tell(self, text: str) -> None:
        print(f"* {text}", flush=True)

    def bascule(self, *arguments: str, stdin: str = "") -> str:
        done = self.admin.cli(*arguments, stdin=stdin)
        if done.returncode != 0:
            raise LabError(f"bascule {' '.join(arguments)}: {done.stdout}")
        return done.stdout

    # The steps ------------------------------------------------------------------

    def activate(self) -> None:
        self.tell("two stores are told, by LMTP with TLS and by the name where logins go; the domain is active")
        for name, store in self.stores.items():
            host = store.host.name
            self.bascule("store", name, f"inet:{host}:{LMTP_PORT}", "--login-host", host)
        ports, legacy = self.legacy.ports, self.legacy.host
        self.bascule(
            "prepare", DOMAIN, "--store", "store1", "--no-first-login", "--imap-host", legacy.name,
            "--imap-port", str(ports.imaps), "--smtp-host", legacy.address, "--smtp-port", str(self.legacy.smtp_port),
            "--pop3-port", str(ports.pop3), "--pop3-tls", "starttls", "--sweep-interval", "2 seconds",
        )  # fmt: skip
        self.bascule("activate", DOMAIN)
        for name in USERS:
            fill_mailbox(self.legacy, name, self.ledger, self.random, messages=20)
        eventually("the domain is known everywhere", lambda: all(self._logs_in("cora", name) for name in self.stores))

    def _logs_in(self, user: str, store: str) -> bool:
        try:
            with self._client(user, store):
                return True
        except LoginError:
            return False

    def _client(self, user: str, store: str) -> AbstractContextManager[IMAPClient]:
        return imap(143, full(user), USERS[user], host=self.stores[store].host.address)

    def move(self, name: str) -> None:
        self.bascule("place", full(name), STORES[name])
        self.bascule("request", full(name), "--password-file", "-", stdin=USERS[name] + "\n")
        eventually(f"{name} has moved", lambda: self.admin.state(name) == "local", 120)
        home = self.stores[STORES[name]].folder / "mail" / DOMAIN / name
        self._insist(home.is_dir(), f"the mailbox of {name} is at {STORES[name]}")

    def move_two(self) -> None:
        self.tell("anna moves to store1, bert to store2; cora and dora stay for now")
        self.move("anna")
        self.move("bert")

    def every_way_in(self) -> None:
        self.tell("everybody logs in at either store: IMAP and POP3, with the right and with a wrong password")
        for name, store in self.stores.items():
            for user, password in USERS.items():
                with self._client(user, name) as client:
                    found = identities(read_mailbox(client))
                self._insist(self._expected(user) <= set(found), f"{user} sees everything at {name}")
                pop3 = poplib.POP3(store.host.address, 110, timeout=30)
                pop3.user(full(user))
                pop3.pass_(password)
                pop3.quit()
                self._refused(user, name)
        self._insist(
            "Login: user=<anna@lab.test>" not in self.stores["store2"].dovecot.log(), "anna is served at store1 only"
        )

    def _expected(self, user: str) -> set[str]:
        return {identity for identity, owner in self.ledger.expected.items() if owner == user}

    def _refused(self, user: str, store: str) -> None:
        try:
            with imap(143, full(user), "wrong", host=self.stores[store].host.address):
                raise LabError(f"{user} is let in with a wrong password")
        except LoginError as error:
            self._insist("AUTHENTICATIONFAILED" in str(error), f"a wrong password is wrong: {error}")

    def every_way_for_mail(self) -> None:
        self.tell("mail to everybody, through either MX, reaches the right store over TLS")
        sent = [self._send(name, mx) for name in USERS for mx in self.mx]
        for name, identity in sent:
            self._await_delivery(name, identity)
        for mx in self.mx:
            for name in ("store1", "store2"):
                wanted = f"Verified TLS connection established to {name}.lab.test"
                self._insist(wanted in mx.postfix.log(), f"{mx.host.name}: {wanted}")

    def _send(self, name: str, mx: Mx) -> tuple[str, str]:
        identity = f"node-{next(self.numbers)}@outside.test"
        send(SMTP_PORT, identity, name, self.ledger, self.random, host=mx.host.address)
        return name, identity

    def _await_delivery(self, name: str, identity: str, timeout: float = 90) -> None:
        eventually(f"{identity} for {name}", partial(self._has, name, identity), timeout)

    def _has(self, name: str, identity: str) -> bool:
        store = STORES.get(name, "store1")
        try:
            with self._client(name, store) as client:
                return bool(copies(client, identity))
        except (LoginError, OSError):
            return False

    def lose_an_mx(self) -> None:
        first, second = self.mx
        self.tell("store2 and mx2 lose their power, with mail for bert in the queue of mx2; mail goes on through mx1")
        self.stores["store2"].lose_power(self.network)
        waiting = self._send("bert", second)
        eventually("it waits at mx2", lambda: "deferred" in second.postfix.log())
        second.lose_power(self.network)
        try:
            with smtplib.SMTP(second.host.address, SMTP_PORT, timeout=3):
                raise LabError("mx2 is not dead")
        except OSError:
            pass
        self._await_delivery(*self._send("anna", first))
        self._await_delivery(*self._send("cora", first))
        self.stores["store2"].come_back(self.network)
        self.tell("dora moves meanwhile: mx2 is waited for until an administrator says that it is dead")
        self._forget(second)
        self.move("dora")
        second.come_back(self.network)
        self._await_delivery(*waiting)
        self._await_delivery(*self._send("dora", second))

    def _forget(self, mx: Mx) -> None:
        """Have moves not wait for an MX that gives no sign of life, once nothing is heard of it."""
        act = "SELECT bascule.forget_node(%s, 'policy_daemon', 'the power is lost')"

        def done() -> bool:
            try:
                self.admin.sql(act, mx.host.name)
            except psycopg.Error as error:
                self._insist("is alive" in str(error), f"only who is silent is forgotten: {error}")
                return False
            return True

        eventually("it is forgotten", done)

    def lose_a_store(self) -> None:
        self.tell("store1 loses its power: anna cannot log in for now, all others can; her mail waits")
        self.stores["store1"].lose_power(self.network)
        waiting = [self._send("anna", mx) for mx in self.mx]
        for name in ("bert", "cora", "dora"):
            with self._client(name, "store2"):
                pass
        self._temporary("anna", "store2")
        self._await_delivery(*self._send("bert", self.mx[1]))
        self.stores["store1"].come_back(self.network)
        for each in waiting:
            self._await_delivery(*each)
        with self._client("anna", "store2"):
            pass

    def _temporary(self, user: str, store: str) -> None:
        try:
            with self._client(user, store):
                raise LabError(f"{user} logs in though her store is dead")
        except LoginError as error:
            self._insist("UNAVAILABLE" in str(error), f"not taken for a wrong password: {error}")

    def lose_sight_of_the_database(self) -> None:
        second = self.mx[1]
        loads = self._loads(second)
        self.tell("mx2 cannot reach the database, and takes mail all the same; emil moves without its knowing")
        self.network.hide(second.host, self.postgres.host)
        stale = "SELECT 1 FROM bascule.node WHERE name = %s AND heartbeat_at < now() - interval '15 seconds'"
        eventually("mx2 is silent", lambda: self.admin.sql(stale, second.host.name))
        self._forget(second)
        self.move("emil")
        name, identity = self._send("emil", second)
        eventually("it went to the legacy server, by the old route", lambda: self._is_at_legacy(name, identity))
        self._await_delivery(name, identity)
        self.tell("that message was swept; mx2 sees the database again")
        self.network.show(second.host, self.postgres.host)
        eventually("mx2 has caught up", lambda: self._loads(second) > loads)

        def goes_straight() -> bool:
            name, identity = self._send("emil", second)
            self._await_delivery(name, identity)
            return not self._is_at_legacy(name, identity)

        # Until the barrier has passed, the queue manager goes by what it remembers; that mail is swept.
        eventually("mail for emil goes to his store again", goes_straight)

    @staticmethod
    def _loads(mx: Mx) -> int:
        """How often its policy daemon has loaded everything."""
        return mx.policy_daemon.log.read_text().count("directory loaded")

    def _is_at_legacy(self, name: str, identity: str) -> bool:
        with self.legacy.client(name) as client:
            return bool(copies(client, identity))

    def lose_the_database(self) -> None:
        self.tell("the database loses its power: mail is taken, everybody logs in, who has not moved gets it at once")
        self.network.kill(self.postgres.host)
        sent = [self._send(name, mx) for name in USERS for mx in self.mx]
        for store in self.stores:
            for name in USERS:
                with self._client(name, store):
                    pass
        for name, identity in sent:
            if name == "cora":
                self._await_delivery(name, identity)
        self.tell("it is back")
        for lock in (self.postgres.folder / "data" / "postmaster.pid", *self.postgres.folder.glob(".s.PGSQL*")):
            lock.unlink()  # as a boot does; another process may have the number of the dead one
        self.postgres.start()
        for name, identity in sent:
            self._await_delivery(name, identity, 180)

    def nothing_is_left_in_queues(self) -> None:
        for postfix in (*(mx.postfix for mx in self.mx), self.legacy.postfix):
            eventually("the queue is empty", postfix.is_empty, 120)

    def count(self) -> None:
        found: dict[str, Counter[str]] = {}
        for name in USERS:
            with self._client(name, "store1") as client:
                found[name] = identities(read_mailbox(client))
        result = self.ledger.compare(found)
        self.tell(f"count: {result}")
        result.insist()
        states = {name: self.admin.state(name) for name in USERS}
        wanted = {name: "local" if name in STORES else None for name in USERS}
        self._insist(states == wanted, f"everybody is in the state that was reached: {states}")

    @staticmethod
    def _insist(holds: bool, what: str) -> None:
        if not holds:
            raise LabError(f"does not hold: {what}")


def main() -> int:
    """Run all steps; exit status 1, with the reason, when anything does not hold."""
    folder = Path(tempfile.mkdtemp(prefix="bascule-lab-"))
    folder.chmod(0o755)
    nodes = Nodes(folder)
    try:
        nodes.start()
        nodes.run()
    except LabError as error:
        for node in nodes.nodes:
            for part in node.parts:
                print(f"--- the log of {part.name} on {node.host.name} ends so:\n{part.tail(8)}", file=sys.stderr)
        print(f"\nTHE NODES FAILED: {error}", file=sys.stderr)
        return 1
    finally:
        nodes.stop()
        if os.environ.get("BASCULE_LAB_KEEP"):
            print(f"kept for you to look at: {folder}", file=sys.stderr)
        else:
            shutil.rmtree(folder, ignore_errors=True)
    print("\nNone lost, none doubled, and nobody who has moved was sent back. Nothing is left running.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
