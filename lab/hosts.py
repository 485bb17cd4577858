"""Hosts that boot, a legacy site, and what an administrator and people do there: what ``lab/roles.py`` plays with."""

from __future__ import annotations

import json
import os
import re
import shutil
import ssl
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from random import Random
from typing import Any

from imapclient import IMAPClient

from bascule import __version__
from bascule.lab.dns import NameServer
from bascule.lab.index import PackageIndex
from bascule.lab.machines import Key, Machine
from bascule.lab.mail import Ledger, fill_mailbox, identities, message, read_mailbox
from bascule.lab.network import Network
from bascule.lab.process import LabError, program, run
from bascule.lab.sites import DOMAIN, LegacySite, eventually, make_certificate
from bascule.lab.telling import Telling
from bascule.lab.visitor import Visitor

USERS = {"alice": "correct horse", "bob": "pâte à papier", "carol": "tide-table-9"}
MESSAGES = 40
#: Where the version of bascule is written.
VERSIONED = "bascule/__init__.py"


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


def _selectable(client: IMAPClient) -> set[str]:
    return {name for flags, _, name in client.list_folders() if not {b"\\Noselect", b"\\NonExistent"} & set(flags)}


class Hosts(Telling):
    """The legacy site, some machines, and what an administrator does with Ansible."""

    def __init__(self, folder: Path, checkout: Path) -> None:
        super().__init__()
        self.folder = folder
        self.checkout = checkout
        self.network = Network(folder)
        self._key = Key(folder)
        self.ledger = Ledger()
        self.random = Random(42)  # noqa: S311 (mail, not keys)
        self.machines: dict[str, Machine] = {}
        self._stack = ExitStack()
        self._index: PackageIndex | None = None
        self.url = ""

    # What is there -------------------------------------------------------------

    def start(self, machines: Mapping[str, str], site: type[LegacySite] = LegacySite) -> None:
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
        self.legacy = site(self.folder / "legacy", self.certificate, self.network.hub)
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

    def serve_packages(self, machine: Machine) -> Path:
        """Have a machine install Python packages from an index, not from a wheelhouse; the digests to hold it to."""
        folder = self.folder / "index"
        folder.mkdir()
        self._index = PackageIndex(folder, self.network.hub)
        self._stack.callback(self._index.stop)
        self._index.start(machine.wheels)
        machine.write("etc/pip.conf", self._index.configuration)
        return self._index.requirements

    # What an administrator does -------------------------------------------------

    def wheel(self, source: Path | None = None) -> Path:
        """bascule's own wheel of a source tree, by default of this checkout's."""
        source = source or self.checkout
        target = self.folder / f"dist-{source.name}"
        copy = self.folder / f"source-{source.name}"
        shutil.copytree(source, copy, symlinks=True, ignore=shutil.ignore_patterns(".git", "build", ".mypy_cache"))
        run(
            *(sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps"),
            # Nothing outside can be reached: with the setuptools that is here.
            *("--no-build-isolation", "--wheel-dir", str(target), str(copy)),
            timeout=300,
        )
        return next(target.glob("*.whl"))

    def altered(self, wheel: Path, name: str, alter: Callable[[Path], None]) -> Path:
        """A wheel as another version of bascule might be: ``alter`` is given the folder of its files."""
        files = self.folder / f"files-{name}"
        run(sys.executable, "-m", "zipfile", "-e", str(wheel), str(files))
        alter(files)
        (self.folder / name).mkdir()
        packed = shutil.make_archive(str(self.folder / name / "wheel"), "zip", files)
        return Path(packed).rename(self.folder / name / wheel.name)

    def former_version(self) -> Path:
        """A checkout of the version before this one: its tag, or the last commit that called itself so.

        Raises:
            LabError: the history here does not reach back to it, as in a shallow clone.
        """
        git = (program("git"), "-c", "safe.directory=*", "-C", str(self.checkout))
        changes = run(*git, "log", "--full-history", "--format=%H", "HEAD", "--", VERSIONED).split()
        tags = run(*git, "tag", "--list", "v*", "--merged", "HEAD", "--sort=-version:refname").split()
        for commit in (*tags, *changes):
            version = run(*git, "show", f"{commit}:{VERSIONED}").split('"')[-2]
            if version != __version__:
                break
        else:
            raise LabError("the history here has no former version; git fetch --unshallow")
        tree = self.folder / f"v{version}"
        tree.mkdir()
        archive = self.folder / "former.tar"
        run(*git, "archive", "--output", str(archive), commit)
        run("tar", "-C", str(tree), "-xf", str(archive))
        return tree

    def inventory(
        self,
        groups: Mapping[str, Sequence[str]],
        wheel: Path,
        settings: Mapping[str, object] | None = None,
        **variables: object,
    ) -> Path:
        """An inventory of the machines by group, with settings of bascule's and variables for all of them."""
        common: dict[str, object] = {
            "ansible_user": "root",
            "ansible_ssh_common_args": f"-F {self._key.configuration}",
            "base__wheel": str(wheel),
            "base__settings": {
                "dns": {"resolvers": ["system"]},
                "portal": {"public_url": f"https://{groups['portal'][0]}.lab.test"},
                **(settings or {}),
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
        return {"ansible_host": machine.address, "base__wheelhouse": "" if self._index else str(machine.wheels)}

    def play(
        self, playbook: str, inventory: Path, *options: str, checkout: Path | None = None, fails: bool = False
    ) -> str:
        """Run one of the playbooks; its output.

        Raises:
            LabError: it failed, or did not if it should.
        """
        top = checkout or self.checkout
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

    def insist_said(self, output: str, *words: str) -> None:
        """Whether a playbook said this; if not, all that it said is kept in the error."""
        spaced = " ".join(output.split())
        for each in words:
            self.insist(each in spaced, f"the playbook says {each!r}; it said:\n{output[-20000:]}")

    def insist_unchanged(self, output: str) -> None:
        """Whether a run of a playbook changed nothing."""
        changed = re.findall(r"changed=(\d+)", output)
        self.insist(
            changed and set(changed) == {"0"},
            "a second run changes nothing:\n" + "\n".join(re.findall(r"TASK.*\n(?:.*\n)*?changed: .*", output)),
        )

    def insist_current(self, machine: Machine) -> None:
        """Whether every part there runs the version that is the current one."""
        current, *running = machine.run(
            "readlink /opt/bascule/current; for unit in $(systemctl list-units --plain --no-legend 'bascule-*.service' "
            "| cut -d ' ' -f 1); do tr '\\0' ' ' < /proc/$(systemctl show --value -p MainPID $unit)/cmdline; echo; done"
        ).splitlines()
        others = [command for command in running if not command.startswith(f"{current}/")]
        self.insist(running and not others, f"every part is of {current}: {others}")

    def testinfra(self, groups: Mapping[str, Sequence[str]]) -> None:
        """What must hold on each host, by its groups."""
        for name, machine in self.machines.items():
            here = ",".join(group for group, names in groups.items() if name in names)
            done = _captured(
                [
                    *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/hosts"),
                    *(f"--hosts=ssh://root@{machine.address}", f"--ssh-config={self._key.configuration}"),
                ],
                self.checkout,
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

    def state(self, machine: Machine, name: str) -> str:
        query = f"SELECT state FROM bascule.mailboxes WHERE address = '{name}@{DOMAIN}'"
        return machine.run(f'bascule psql -Atc "{query}"').strip()

    def until_moved(self, machine: Machine, name: str) -> None:
        try:
            eventually(f"{name} has moved", lambda: self.state(machine, name) == "local", 120)
        except LabError as error:
            raise LabError(f"{error}\n{machine.run('bascule status --json ' + DOMAIN)}") from error
        self.tell(f"{name} has moved")

    def sees_the_same_folders(self, machine: Machine, name: str, *others: str) -> None:
        """A user who has moved sees the folders of the legacy server, under the same names, and the operator's."""
        with self.legacy.client(name) as client:
            expected = _selectable(client) | set(others)
        with self.client(machine, f"{name}@{DOMAIN}", USERS[name]) as client:
            seen = _selectable(client)
        self.insist(seen == expected, f"{name} sees {sorted(expected)}; it is {sorted(seen)}")

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
            f"prepare {DOMAIN} --store {store} --imap-host legacy.lab.test --imap-port {ports.imaps} --smtp-host "
            f"legacy.lab.test --smtp-port {self.legacy.smtp_port} --sweep-interval '2 seconds' --quiet-period '3 "
            "seconds'",
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

    def goes_back_and_moves_again(self, machine: Machine, store: Machine, name: str) -> None:
        """A user who has moved, and works here, is sent back with what came here; and moves once more."""
        address, password = f"{name}@{DOMAIN}", USERS[name]
        identity, folder = self.ledger.give(f"made-here@{name}.test", name), self.legacy.folder_name("Made here")
        with self.client(store, address, password) as client:
            client.create_folder(folder)
            client.append(folder, message(identity, address, self.random))
        self.bascule(machine, f"return {address} --reason 'a try'")
        eventually(f"{name} is back at the legacy server", lambda: self.state(machine, name) == "legacy", 120)
        with self.legacy.client(name) as client:
            client.select_folder(folder, readonly=True)
            self.insist(client.search(["HEADER", "Message-ID", identity]), "what was made here is there")
        self.tell(f"{name} went back, with what came here")
        self.bascule(machine, f"request {address} --password-file -", stdin=f"{password}\n")
        self.until_moved(machine, name)

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
