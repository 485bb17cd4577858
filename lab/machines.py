"""Hosts that boot: Debian with its own systemd, by systemd-nspawn.

Made from the trees of ``lab/trees.sh``, which stay as they are: each machine
writes to a layer of its own. To be used in namespaces of the run's own (mounts,
network, processes, control groups); ``lab/hosts.sh`` makes them.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

from bascule.lab.network import BRIDGE, Network
from bascule.lab.process import LabError, run
from bascule.lab.servers import Certificate

TREES = Path("/var/cache/bascule")
CGROUPS = Path("/sys/fs/cgroup")
PATIENCE = 60.0  # seconds for a machine to boot, or to shut down


def own_control_groups() -> None:
    """Mount cgroup2, which systemd wants, in this mount namespace."""
    run("umount", "--lazy", str(CGROUPS))
    run("mount", "-t", "cgroup2", "cgroup2", str(CGROUPS))


class Key:
    """An SSH key of this run's own, and how ssh reaches machines that nobody has seen before."""

    def __init__(self, folder: Path) -> None:
        self.private = folder / "ssh.key"
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.private))
        self.public = self.private.with_suffix(".key.pub").read_text()
        #: ssh_config(5).
        self.configuration = folder / "ssh.config"
        self.configuration.write_text(
            f"Host *\n  User root\n  IdentityFile {self.private}\n  StrictHostKeyChecking no\n"
            "  UserKnownHostsFile /dev/null\n  LogLevel ERROR\n  ConnectTimeout 2\n  BatchMode yes\n"
        )


class Machine:
    """One host: ``release`` is bookworm or trixie."""

    def __init__(self, folder: Path, release: str, name: str, network: Network, key: Key) -> None:
        self.name = name
        self.release = release
        self.address = network.name(name)
        self._network = network
        self._key = key
        self._tree = TREES / f"host-{release}"
        self.folder = folder / name.partition(".")[0]
        self.root = self.folder / "root"
        self._process: subprocess.Popen[bytes] | None = None
        #: A tar archive with the wheels of all that bascule needs.
        self.wheels = self._tree / "wheels.tar"
        if not (self._tree / "made-by").exists():
            raise LabError(f"{self._tree} is not there; run lab/trees.sh first")

    def create(self, certificate: Certificate) -> None:
        """Lay its disk out: an address, a resolver, an SSH key, a certificate for its name."""
        for part in ("upper", "work", "root"):
            (self.folder / part).mkdir(parents=True)
        layers = f"lowerdir={self._tree},upperdir={self.folder}/upper,workdir={self.folder}/work"
        run("mount", "-t", "overlay", "overlay", "-o", layers, str(self.root))
        self.write("etc/hostname", f"{self.name}\n")
        self.write("etc/hosts", f"127.0.0.1 localhost\n{self.address} {self.name} {self.name.partition('.')[0]}\n")
        (self.root / "etc/resolv.conf").unlink(missing_ok=True)
        self.write("etc/resolv.conf", f"nameserver {self._network.hub.address}\n")
        self.write(
            "etc/systemd/network/10-host0.network",
            f"[Match]\nName=host0\n[Network]\nAddress={self.address}/24\nGateway={self._network.hub.address}\n",
        )
        wanted = self.root / "etc/systemd/system/multi-user.target.wants"
        wanted.mkdir(parents=True, exist_ok=True)
        link = wanted / "systemd-networkd.service"
        if not link.is_symlink():
            link.symlink_to("/lib/systemd/system/systemd-networkd.service")
        self.write("root/.ssh/authorized_keys", self._key.public)
        # apt's lists are as old as the tree, and nothing outside can be reached.
        (self.root / "var/lib/apt/lists").touch()
        authority = certificate.ca.read_text()
        self.write("usr/local/share/ca-certificates/lab.crt", authority)
        with (self.root / "etc/ssl/certs/ca-certificates.crt").open("a") as trusted:
            trusted.write(authority)
        self.write("etc/ssl/lab/chain.pem", certificate.chain.read_text())
        self.write("etc/ssl/lab/key.pem", certificate.key.read_text())
        (self.root / "etc/ssl/lab/key.pem").chmod(0o640)
        groups = (self.root / "etc/group").read_text().splitlines()
        ssl_cert = next(int(line.split(":")[2]) for line in groups if line.startswith("ssl-cert:"))
        shutil.chown(self.root / "etc/ssl/lab/key.pem", 0, ssl_cert)

    def write(self, path: str, text: str) -> None:
        """A file on its disk, readable by all."""
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(0o644)

    def start(self) -> None:
        """Boot it; when this returns all its units run.

        Raises:
            LabError: it does not come up.
        """
        with (self.folder / "console.log").open("ab") as console:
            self._process = subprocess.Popen(
                [
                    *("systemd-nspawn", f"--directory={self.root}", "--boot", "--register=no", "--keep-unit"),
                    *(f"--machine={self.name.partition('.')[0]}", f"--network-bridge={BRIDGE}", "--console=pipe"),
                    *("--hostname", self.name, "--resolv-conf=off", "--timezone=off", "--link-journal=no"),
                ],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
            )
        deadline = time.monotonic() + PATIENCE
        while self.try_run("systemctl is-system-running --wait").stdout.strip() not in {"running", "degraded"}:
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise LabError(f"{self.name} does not boot:\n{(self.folder / 'console.log').read_text()[-3000:]}")
            time.sleep(0.2)
        state = self.try_run("systemctl is-system-running; systemctl --failed --no-legend").stdout
        if not state.startswith("running"):
            raise LabError(f"{self.name} has failed units: {state}")

    def try_run(self, command: str, *, stdin: str = "", timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """Run a shell's command line there, as root; standard output and error together."""
        return subprocess.run(
            ["ssh", "-F", str(self._key.configuration), self.address, command],
            input=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )

    def run(self, command: str, *, stdin: str = "") -> str:
        """The same, to its end.

        Raises:
            LabError: it failed; with what it printed.
        """
        done = self.try_run(command, stdin=stdin)
        if done.returncode != 0:
            raise LabError(f"on {self.name}, {command!r} ended with {done.returncode}:\n{done.stdout}")
        return done.stdout

    def stop(self) -> None:
        """Shut it down in good order."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        if self.root.is_mount():
            run("umount", "--lazy", str(self.root))
