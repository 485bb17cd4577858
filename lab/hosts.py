"""The Ansible roles on real hosts, booted from Debian 12 and 13, and the whole story there.

``build-bookworm`` and ``build-trixie``: one host from nothing with the former
version of bascule, upgraded while mail comes in; ``plug-bookworm`` and
``plug-trixie``: into a Postfix and a Dovecot that somebody runs already, and out
again; ``several``: database, two MX, a store and the page, each on a host of its own.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import ssl
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from random import Random
from typing import Any

import click
from imapclient import IMAPClient

from bascule import __version__
from bascule.lab.dns import NameServer
from bascule.lab.machines import TREES, Key, Machine, own_control_groups
from bascule.lab.mail import Ledger, Traffic, fill_mailbox, identities, read_mailbox, send
from bascule.lab.network import Network
from bascule.lab.process import LabError, program, run
from bascule.lab.servers import TEMPLATES
from bascule.lab.sites import DOMAIN, LegacySite, eventually, make_certificate
from bascule.lab.telling import Telling
from bascule.lab.visitor import Visitor

USERS = {"alice": "correct horse", "bob": "pâte à papier", "carol": "tide-table-9"}
#: The operator's own user, of a domain that was there before bascule and stays.
SHOP = "anna@shop.test"
SHOP_PASSWORD = "sells everything"
#: Configuration that plug may touch, and unplug must restore.
CONFIGURATION = ("/etc/postfix", "/etc/dovecot", "/etc/postgresql", "/etc/nginx")
MESSAGES = 40
#: Where the version of bascule is written.
VERSIONED = "bascule/__init__.py"
#: Each scenario has its own of everything, which ends with its program, and with it whatever that started.
NAMESPACES = (
    *("setpriv", "--pdeathsig", "KILL"),
    *("unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--cgroup"),
    *("--propagation", "private"),
)


def _captured(command: Sequence[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder to its end; standard output and error together."""
    return subprocess.run(
        command,
        cwd=folder,
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1200,
        check=False,
    )


class Hosts(Telling):
    """The legacy site, some machines, and what an administrator does with Ansible."""

    def __init__(self, folder: Path, checkout: Path) -> None:
        super().__init__()
        self.folder = folder
        self._checkout = checkout
        self.network = Network(folder)
        self._key = Key(folder)
        self.ledger = Ledger()
        self.random = Random(42)  # noqa: S311 (mail, not keys)
        self.machines: dict[str, Machine] = {}
        self._stack = ExitStack()
        self.url = ""

    # What is there -------------------------------------------------------------

    def start(self, machines: Mapping[str, str]) -> None:
        """Boot machines, release by name, and start the legacy site with mail in it."""
        names = [f"{name}.lab.test" for name in machines]
        for name, release in machines.items():
            self.machines[name] = Machine(self.folder, release, f"{name}.lab.test", self.network, self._key)
        self.certificate = make_certificate(self.folder, self.network.hub.name, *names)
        mx = [name for name in names if name.startswith(("mx", "mail"))]
        dns = NameServer(self.folder / "dns", self.network.hub.address, 53)
        self._stack.callback(dns.stop)
        dns.start(
            mx={DOMAIN: mx[0], "shop.test": mx[0]},
            spf={DOMAIN: "v=spf1 ip4:10.77.0.0/24 -all"},
            hosts=self.network.names,
        )
        self.legacy = LegacySite(self.folder / "legacy", self.certificate, self.network.hub)
        self.legacy.create(USERS, {"info": "alice"})
        self._stack.callback(self.legacy.stop)
        self.legacy.start()
        for name in USERS:
            fill_mailbox(self.legacy, name, self.ledger, self.random, messages=MESSAGES)
        for machine in self.machines.values():
            machine.create(self.certificate)
            self._stack.callback(machine.stop)
            machine.start()
        self.tell(f"booted: {', '.join(f'{name} ({release})' for name, release in machines.items())}")

    def stop(self) -> None:
        self._stack.close()
        self.network.close()

    # What an administrator does -------------------------------------------------

    def wheel(self, source: Path) -> Path:
        """bascule's own wheel of a source tree."""
        target = self.folder / f"dist-{source.name}"
        copy = self.folder / f"source-{source.name}"
        shutil.copytree(source, copy, symlinks=True, ignore=shutil.ignore_patterns(".git", "build", ".mypy_cache"))
        run(
            *(sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps"),
            *("--wheel-dir", str(target), str(copy)),
            timeout=300,
        )
        return next(target.glob("*.whl"))

    def inventory(self, groups: Mapping[str, Sequence[str]], wheel: Path, **variables: object) -> Path:
        """An inventory of the machines by group, with variables for all of them."""
        common: dict[str, object] = {
            "ansible_user": "root",
            "ansible_ssh_common_args": f"-F {self._key.configuration}",
            "base__wheel": str(wheel),
            "base__settings": {
                "dns": {"resolvers": ["system"]},
                "portal": {"public_url": f"https://{groups['portal'][0]}.lab.test"},
            },
            "base__backup": str(self.folder / "backup"),
        }
        for role in ("dovecot", "postfix", "portal", "database"):
            common[f"{role}__certificate"] = "/etc/ssl/lab/chain.pem"
            common[f"{role}__private_key"] = "/etc/ssl/lab/key.pem"
        children: dict[str, Any] = {
            group: {"hosts": {f"{name}.lab.test": self._of(name) for name in names}} for group, names in groups.items()
        }
        path = self.folder / "inventory.json"
        path.write_text(json.dumps({"bascule": {"vars": common | variables, "children": children}}))
        return path

    def _of(self, name: str) -> dict[str, str]:
        machine = self.machines[name]
        return {"ansible_host": machine.address, "base__wheelhouse": f"{TREES}/host-{machine.release}/wheels.tar"}

    def play(
        self, playbook: str, inventory: Path, *options: str, checkout: Path | None = None, fails: bool = False
    ) -> str:
        """Run one of the playbooks; its output.

        Raises:
            LabError: it failed, or did not if it should.
        """
        top = checkout or self._checkout
        python = Path(sys.executable)
        began = time.monotonic()
        done = _captured(
            [str(python.parent / "ansible-playbook"), "-i", str(inventory), *options, f"playbooks/{playbook}.yml"],
            top / "ansible",
            ANSIBLE_SSH_CONTROL_PATH_DIR=str(self.folder / "ssh"),  # a connection is another run's, too
            ANSIBLE_NOCOLOR="1",
            PATH=f"{python.parent}:{os.environ['PATH']}",
            PYTHONPATH=str(top),
        )
        recap = done.stdout.partition("PLAY RECAP")[2].partition("\n")[2]
        self.tell(f"$ ansible-playbook {playbook}.yml {' '.join(options)}  ({time.monotonic() - began:.0f} s)")
        self.show("\n".join(" ".join(line.split()) for line in recap.splitlines()))
        if (done.returncode != 0) != fails:
            raise LabError(f"{playbook} ended with {done.returncode}:\n{done.stdout[-6000:]}")
        return done.stdout

    def insist_unchanged(self, output: str) -> None:
        """Whether a run of a playbook changed nothing."""
        changed = re.findall(r"changed=(\d+)", output)
        self.insist(
            changed and set(changed) == {"0"},
            "a second run changes nothing:\n" + "\n".join(re.findall(r"TASK.*\n(?:.*\n)*?changed: .*", output)),
        )

    def testinfra(self, groups: Mapping[str, Sequence[str]]) -> None:
        """What must hold on each host, by its groups."""
        for name, machine in self.machines.items():
            here = ",".join(group for group, names in groups.items() if name in names)
            done = _captured(
                [
                    *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/hosts"),
                    *(f"--hosts=ssh://root@{machine.address}", f"--ssh-config={self._key.configuration}"),
                ],
                self._checkout,
                BASCULE_GROUPS=here,
            )
            self.tell(f"testinfra on {name} ({here}): {done.stdout.strip().splitlines()[-1]}")
            if done.returncode != 0:
                raise LabError(done.stdout[-6000:])

    # What people do --------------------------------------------------------------

    def bascule(self, machine: Machine, arguments: str, *, stdin: str = "", quiet: bool = False) -> str:
        output = machine.run(f"bascule {arguments}", stdin=stdin)
        if not quiet:
            print(f"           $ bascule {arguments}", flush=True)
            self.show(output)
        return output

    def has_moved(self, machine: Machine, name: str) -> bool:
        status = json.loads(machine.run(f"bascule status {DOMAIN} --json"))
        return any(user["address"] == f"{name}@{DOMAIN}" for user in status["migrated"])

    def until_moved(self, machine: Machine, name: str) -> None:
        try:
            eventually(f"{name} has moved", lambda: self.has_moved(machine, name), 120)
        except LabError as error:
            raise LabError(f"{error}\n{machine.run('bascule status --json ' + DOMAIN)}") from error
        self.tell(f"{name} has moved")

    @contextmanager
    def client(self, machine: Machine, user: str, password: str) -> Iterator[IMAPClient]:
        """A user's mail client, with TLS."""
        context = ssl.create_default_context(cafile=str(self.certificate.ca))
        context.check_hostname = False  # it goes by the address
        client = IMAPClient(machine.address, 993, ssl_context=context, timeout=60)
        try:
            client.plain_login(user, password)
            yield client
        finally:
            client.shutdown()

    def prepare(self, machine: Machine, next_hop: str) -> None:
        """The administrator gives the legacy settings, has them checked, and opens the domain."""
        ports = self.legacy.ports
        store = next_hop.split(maxsplit=1)[0]
        self.bascule(machine, f"store {next_hop}")
        self.bascule(
            machine,
            f"prepare {DOMAIN} --store {store} --imap-host legacy.lab.test --imap-port {ports.imaps} "
            f"--smtp-host legacy.lab.test "
            f"--smtp-port {self.legacy.smtp_port} --sweep-interval '2 seconds' --quiet-period '3 seconds'",
            quiet=True,
        )
        text = self.bascule(
            machine, f"check {DOMAIN} --user alice@{DOMAIN} --password-file -", stdin=f"{USERS['alice']}\n"
        )
        self.insist("came through to the legacy INBOX" in text, "the probe has arrived")
        self.insist("logs in here and sees the" in text, "the login is proxied")
        self.url = self.bascule(machine, f"activate {DOMAIN}").split()[-1]

    def ask_at_the_url(self, page: Machine, name: str) -> None:
        """A user asks, by https."""
        resolved = f"https://{page.name}"
        self.insist(self.url.startswith(resolved), f"the URL is at {resolved}")
        visitor = Visitor(self.url, ca_file=self.certificate.ca)
        said = visitor.request(f"{name}@{DOMAIN}", USERS[name], "Quay", name.title())
        self.insist("accepted" in said, f"the page takes the request of {name}: {visitor.status} {said}")
        self.tell(f"{name} asked at {self.url.partition('/m/')[0]}/m/...")

    def close(self, machine: Machine) -> None:
        """The last user moves, and the domain is closed."""
        self.bascule(machine, f"request carol@{DOMAIN} --password-file -", stdin=f"{USERS['carol']}\n")
        self.until_moved(machine, "carol")
        eventually(
            "nobody is forgotten any more",
            lambda: (
                machine.try_run(f"bascule alias info@{DOMAIN} alice@{DOMAIN}; bascule close {DOMAIN}").returncode == 0
            ),
            60,
        )
        self.tell(f"{DOMAIN} is closed")

    def count(self, machine: Machine) -> None:
        """Every message that was ever given to either side is in its mailbox here, once."""

        def found() -> dict[str, Counter[str]]:
            inside = {}
            for name, password in USERS.items():
                with self.client(machine, f"{name}@{DOMAIN}", password) as client:
                    inside[name] = identities(read_mailbox(client))
            return inside

        count = self.ledger.compare(found())
        self.tell(f"count: {count}")
        count.insist()


def build(hosts: Hosts, release: str, checkout: Path) -> None:
    """One host from nothing, with the former version; upgraded while mail comes in; and the whole story."""
    hosts.start({"mail": release})
    mail = hosts.machines["mail"]
    groups = {group: ["mail"] for group in ("database", "mx", "store", "portal")}
    present = hosts.wheel(checkout)
    inventory = hosts.inventory(groups, present)

    hosts.tell("check mode on a fresh host tells what would be done, and does nothing")
    before = mail.run("dpkg -l | sha256sum; ls /opt /etc")
    hosts.play("build", inventory, "--check", "--diff")
    hosts.insist(mail.run("dpkg -l | sha256sum; ls /opt /etc") == before, "check mode changes nothing")

    former = former_version(hosts.folder, checkout)
    hosts.tell(f"built with the version that was tagged before: {former.name}")
    old = hosts.inventory(groups, hosts.wheel(former))
    hosts.play("build", old, checkout=former)
    hosts.prepare(mail, "local unix:bascule/lmtp")
    with Traffic(25, USERS, hosts.ledger, host=mail.address) as traffic:
        hosts.ask_at_the_url(mail, "alice")
        with hosts.client(mail, f"bob@{DOMAIN}", USERS["bob"]) as bob:
            hosts.insist(bob.folder_exists("INBOX"), "bob is logged in, proxied")
        hosts.until_moved(mail, "alice")
        sent, put_off = traffic.sent, traffic.put_off

        hosts.tell("upgraded to this version, while mail comes in")
        inventory = hosts.inventory(groups, present)
        hosts.play("build", inventory)
        hosts.tell(f"meanwhile {traffic.sent - sent} messages came; told to come back: {traffic.put_off - put_off}")
        hosts.insist(traffic.put_off == put_off, "an upgrade puts no message off")
        hosts.insist_unchanged(hosts.play("build", inventory))
        hosts.testinfra(groups)
        hosts.until_moved(mail, "bob")

        keeps_what_it_knows(hosts, inventory)
        rejects_what_does_not_start(hosts, inventory, present)
        hosts.close(mail)
    queue_empties(mail)
    hosts.count(mail)
    hosts.tell("what systemd thinks of the units")
    hosts.show(
        mail.run(
            "for part in policy-daemon milter authenticator worker portal; do "
            "systemd-analyze security --no-pager bascule-$part | tail -n 1; done"
        )
    )


def keeps_what_it_knows(hosts: Hosts, inventory: Path) -> None:
    """A change of the key for sealing; a backup, and the database from it."""
    mail = hosts.machines["mail"]
    hosts.tell("the key for sealing is changed")
    public = mail.run("cat /etc/bascule/seal.pub")
    hosts.play("rotate", inventory)
    hosts.insist(mail.run("cat /etc/bascule/seal.pub") != public, "there is a new key")
    hosts.insist(mail.run("wc -l < /etc/bascule/seal.key").strip() == "1", "the former one is forgotten")
    hosts.insist_unchanged(hosts.play("build", inventory))

    hosts.tell("backup; the database is lost; restored")
    hosts.play("backup", inventory)
    rows = mail.run("bascule psql -Atc 'SELECT address, state FROM bascule.mailboxes ORDER BY 1'")
    mail.run("systemctl stop bascule-worker && runuser -u postgres -- dropdb --force bascule")
    hosts.play("restore", inventory)
    hosts.insist(
        mail.run("bascule psql -Atc 'SELECT address, state FROM bascule.mailboxes ORDER BY 1'") == rows,
        "all are again where they were",
    )


def rejects_what_does_not_start(hosts: Hosts, inventory: Path, wheel: Path) -> None:
    """A version whose programs do not start is taken back, and the former one serves."""
    mail = hosts.machines["mail"]
    hosts.tell("a version that does not start is taken back")
    broken = hosts.folder / "broken"
    run(sys.executable, "-m", "zipfile", "-e", str(wheel), str(broken))
    service = broken / "bascule" / "milter" / "service.py"
    service.write_text(service.read_text().replace("def _run(", "def _run_not("))
    bad = hosts.folder / "bad" / wheel.name
    bad.parent.mkdir()
    run(sys.executable, "-c", "import shutil, sys; shutil.make_archive(sys.argv[1], 'zip', sys.argv[2])",
        str(bad), str(broken))  # fmt: skip
    bad.with_name(f"{wheel.name}.zip").rename(bad)
    text = hosts.play("build", inventory, "--extra-vars", f"base__wheel={bad}", fails=True)
    hosts.insist("does not start here" in text and "runs again" in text, "it says what happened")
    hosts.insist("running" in mail.run("systemctl is-system-running || true"), "the former version serves")
    hosts.play("build", inventory)


def former_version(folder: Path, checkout: Path) -> Path:
    """A checkout of the version before this one: its tag, or the last commit that called itself so.

    Raises:
        LabError: the history here does not reach back to it, as in a shallow clone.
    """
    git = (program("git"), "-c", "safe.directory=*", "-C", str(checkout))
    changes = run(*git, "log", "--full-history", "--format=%H", "HEAD", "--", VERSIONED).split()
    tags = run(*git, "tag", "--list", "v*", "--merged", "HEAD", "--sort=-version:refname").split()
    for commit in (*tags, *changes):
        version = run(*git, "show", f"{commit}:{VERSIONED}").split('"')[-2]
        if version != __version__:
            break
    else:
        raise LabError("the history here has no former version; git fetch --unshallow")
    tree = folder / f"v{version}"
    tree.mkdir()
    archive = folder / "former.tar"
    run(*git, "archive", "--output", str(archive), commit)
    run("tar", "-C", str(tree), "-xf", str(archive))
    return tree


def plug(hosts: Hosts, release: str, checkout: Path) -> None:
    """Into a Postfix and Dovecot with settings of their own; out again, byte for byte."""
    hosts.start({"mail": release})
    mail = hosts.machines["mail"]
    the_operators_own(mail)
    groups = {group: ["mail"] for group in ("database", "mx", "store", "portal")}
    wheel = hosts.wheel(checkout)
    probe = {"probe__recipient": SHOP, "probe__password": SHOP_PASSWORD}
    inventory = hosts.inventory(groups, wheel, **probe)
    before = fingerprint(mail)

    hosts.tell("check mode shows what would be changed, and changes nothing")
    shown = hosts.play("plug", inventory, "--check", "--diff")
    hosts.show(
        "\n".join(
            line
            for line in shown.splitlines()
            if re.match(r"[+-](bascule_former|transport_maps|bascule-|.*socketmap)", line)
        )
    )
    hosts.insist(fingerprint(mail) == before, "check mode changes nothing")

    hosts.tell("a wrong password for the probe: nothing is begun")
    text = hosts.play("plug", hosts.inventory(groups, wheel, **(probe | {"probe__password": "wrong"})), fails=True)
    hosts.insist(fingerprint(mail) == before, "nothing was changed")
    hosts.insist("does not let" in text, "it says so")

    hosts.tell("plugged in, but Postfix may not reach a socket: mail does not come through, and all is taken back")
    fault = "etc/systemd/system/bascule-policy-daemon.socket.d/fault.conf"
    mail.write(fault, "[Socket]\nSocketMode=0600\n")
    text = hosts.play("plug", hosts.inventory(groups, wheel, **probe), fails=True)
    mail.run(f"rm /{fault} && systemctl daemon-reload")
    hosts.insist("was not plugged in, and is configured as before" in text, "it says what happened")
    hosts.insist("does not take a message" in text, "it says what the probe said")
    hosts.insist(only(fingerprint(mail), "/etc/postfix") == only(before, "/etc/postfix"), "Postfix is as before")

    inventory = hosts.inventory(groups, wheel, **probe)
    hosts.play("plug", inventory)
    hosts.insist_unchanged(hosts.play("plug", inventory))
    hosts.testinfra(groups)
    hosts.show(mail.run("postconf -n | grep bascule; postfix check 2>&1"))
    hosts.prepare(mail, "local unix:bascule/lmtp")
    with Traffic(25, USERS, hosts.ledger, host=mail.address):
        hosts.ask_at_the_url(mail, "alice")
        with hosts.client(mail, f"bob@{DOMAIN}", USERS["bob"]) as bob:
            hosts.insist(bob.folder_exists("INBOX"), "bob is logged in, proxied")
        hosts.until_moved(mail, "alice")
        hosts.until_moved(mail, "bob")
        mail.run("echo from-the-shop | sendmail -f x@outside.test " + SHOP)
        with hosts.client(mail, SHOP, SHOP_PASSWORD) as anna:
            anna.select_folder("INBOX")
            eventually("the operator's own mail is delivered as before", lambda: anna.noop() and anna.search("ALL"))
        hosts.close(mail)
    queue_empties(mail)
    hosts.count(mail)

    restores_byte_for_byte(hosts, inventory, before)


def restores_byte_for_byte(hosts: Hosts, inventory: Path, before: dict[str, str]) -> None:
    """Out again, after the operator has edited what was plugged into."""
    mail = hosts.machines["mail"]
    hosts.tell("unplugged, after the operator has edited main.cf; everything but that is as it was, byte for byte")
    mail.run("echo 'message_size_limit = 20000000' >> /etc/postfix/main.cf")
    hosts.play("unplug", inventory)
    mail.run("sed -i '$d' /etc/postfix/main.cf")
    after = fingerprint(mail)
    different = sorted(set(before.items()) ^ set(after.items()))
    hosts.insist(not different, f"the configuration is what it was: {different}")
    hosts.tell(f"{len(after)} files under {', '.join(CONFIGURATION)} are the same, byte for byte")
    with hosts.client(mail, SHOP, SHOP_PASSWORD) as anna:
        hosts.insist(anna.folder_exists("INBOX"), "the operator's own users log in as before")
    hosts.insist_unchanged(hosts.play("unplug", inventory))


def the_operators_own(mail: Machine) -> None:
    """A Postfix and a Dovecot that somebody has set up by hand, and nothing of ours."""
    mail.run(
        "DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends postgresql postfix nginx-light "
        "dovecot-core dovecot-imapd dovecot-lmtpd dovecot-pop3d 2>&1"
    )
    mail.write("etc/postfix/main.cf", (TEMPLATES / "shop-main.cf.j2").read_text())
    mail.write("etc/dovecot/shop.users", f"{SHOP}:{{PLAIN}}{SHOP_PASSWORD}::::::\n")
    mail.run("useradd --system --create-home --home-dir /var/shop shop")
    version = "2.3" if mail.release == "bookworm" else "2.4"
    mail.write("etc/dovecot/conf.d/95-shop.conf", (TEMPLATES / f"shop-dovecot-{version}.conf.j2").read_text())
    mail.run("sed -i 's/^!include auth-system/#&/' /etc/dovecot/conf.d/10-auth.conf; systemctl restart dovecot postfix")


def fingerprint(machine: Machine) -> dict[str, str]:
    """Every file of the configuration that bascule may touch: digest, owner and mode, by path."""
    listing = machine.run(
        f"find {' '.join(CONFIGURATION)} -type f ! -name '*.db' -exec sh -c 'for f; do echo \"$f "
        '$(sha256sum < "$f" | cut -c 1-64) $(stat -c %U:%G:%a "$f")"; done\' sh {} +'
    )
    return dict(line.split(" ", 1) for line in listing.splitlines())


def only(files: dict[str, str], below: str) -> dict[str, str]:
    return {path: said for path, said in files.items() if path.startswith(below)}


def several(hosts: Hosts, _release: str, checkout: Path) -> None:
    """Database, two MX, a store and the page, each on a host of its own, of both releases."""
    releases = {"db": "bookworm", "store1": "trixie", "mx1": "bookworm", "mx2": "trixie", "page": "bookworm"}
    hosts.start(releases)
    groups = {"database": ["db"], "store": ["store1"], "mx": ["mx1", "mx2"], "portal": ["page"]}
    there = hosts.network.names
    inventory = hosts.inventory(
        groups,
        hosts.wheel(checkout),
        database__clients=["10.77.0.0/24"],
        base__database_options="{{ '' if inventory_hostname in groups['database'] else "
        "'host=db.lab.test sslmode=verify-full sslrootcert=/etc/ssl/certs/ca-certificates.crt' }}",
        postfix__networks=["127.0.0.0/8", there["store1.lab.test"]],
        dovecot__submission_host="mx1.lab.test",
        store__lmtp_port=24,
        base__settings={
            "dns": {"resolvers": ["system"]},
            "portal": {"public_url": "https://page.lab.test"},
            "worker": {"store": "store1"},
            "dovecot": {"imap": "store1.lab.test:143"},
            "postfix": {"smtp": "mx1.lab.test:25"},
        },
    )
    hosts.play("build", inventory)
    hosts.insist_unchanged(hosts.play("build", inventory))
    hosts.testinfra(groups)
    mx1, store = hosts.machines["mx1"], hosts.machines["store1"]
    hosts.prepare(mx1, "store1 inet:store1.lab.test:24 --login-host store1.lab.test")
    with Traffic(25, USERS, hosts.ledger, host=hosts.machines["mx2"].address):
        hosts.ask_at_the_url(hosts.machines["page"], "alice")
        with hosts.client(store, f"bob@{DOMAIN}", USERS["bob"]) as bob:
            hosts.insist(bob.folder_exists("INBOX"), "bob is logged in, proxied")
        hosts.until_moved(mx1, "alice")
        hosts.until_moved(mx1, "bob")
        send(25, "by-mx1@outside.test", "alice", hosts.ledger, hosts.random, host=mx1.address)
        hosts.play("rotate", inventory)
        hosts.close(mx1)
    for name in ("mx1", "mx2"):
        queue_empties(hosts.machines[name])
    hosts.count(store)


def queue_empties(machine: Machine) -> None:
    """What was put off while the database was away is delivered at the latest now, as an administrator would do it."""
    eventually(
        f"the queue of {machine.name} is empty",
        lambda: "is empty" in machine.run("postqueue -f; sleep 1; postqueue -p"),
    )


SCENARIOS: dict[str, tuple[Callable[[Hosts, str, Path], None], str]] = {
    "build-bookworm": (build, "bookworm"),
    "build-trixie": (build, "trixie"),
    "plug-bookworm": (plug, "bookworm"),
    "plug-trixie": (plug, "trixie"),
    "several": (several, ""),
}


def play_here(scenario: str, checkout: Path) -> None:
    """Play a scenario in the namespaces of this process; its machines' disks are in memory, and gone with its mounts.

    Raises:
        LabError: something does not hold; what the machines' journals say of it was printed.
    """
    own_control_groups()
    folder = Path(tempfile.mkdtemp(prefix="bascule-lab-"))
    run("mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", str(folder))
    hosts = Hosts(folder, checkout)
    play, release = SCENARIOS[scenario]
    try:
        play(hosts, release, checkout)
    except LabError:
        for machine in hosts.machines.values():
            print(
                machine.try_run("journalctl -n 60 --no-pager -o cat -u 'bascule*' -u dovecot").stdout, file=sys.stderr
            )
        raise
    finally:
        hosts.stop()
        run("umount", "--lazy", str(folder))
        folder.rmdir()


@click.command()
@click.option("--checkout", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--here", is_flag=True, hidden=True, help="In the namespaces of this process.")
@click.argument("scenarios", nargs=-1, type=click.Choice(list(SCENARIOS)))
def main(checkout: Path, here: bool, scenarios: tuple[str, ...]) -> None:
    """Play SCENARIOS, or all of them; exit status 1, with the reason, when anything does not hold."""
    if here:
        for scenario in scenarios:
            try:
                play_here(scenario, checkout)
            except LabError as error:
                sys.exit(f"\n{scenario} FAILED: {error}")
        return
    failed = []
    for scenario in scenarios or tuple(SCENARIOS):
        print(f"\n=== {scenario}", flush=True)
        command = [*NAMESPACES, sys.executable, "-m", __spec__.name, "--checkout", str(checkout), "--here", scenario]
        if subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode != 0:
            failed.append(scenario)
    if failed:
        print(f"\nFAILED: {', '.join(failed)}", file=sys.stderr)
        sys.exit(1)
    print("\nAll of it holds. Nothing is left running.")


if __name__ == "__main__":
    main()
