"""A network of namespaces, each with an address of its own on one bridge.

Made in the network namespace of this process, which ``unshare --net --mount``
has made for it: nothing of it is seen outside, and nothing is left when the
processes in it are gone.
"""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

from bascule.lab.process import Host, LabError, run

_SUBNET = "10.77.0"
BRIDGE = "bridge"


class Network:
    """``hub`` is this process's own place in it."""

    def __init__(self, folder: Path) -> None:
        if "lo " in run("ip", "-br", "-4", "address"):
            raise LabError("this is not a network namespace of its own; use lab/nodes.sh")
        self._hosts = folder / "hosts"
        self._holders: dict[str, subprocess.Popen[bytes]] = {}
        run("ip", "link", "set", "lo", "up")
        run("ip", "link", "add", BRIDGE, "type", "bridge")
        run("ip", "address", "add", f"{_SUBNET}.1/24", "dev", BRIDGE)
        run("ip", "link", "set", BRIDGE, "up")
        self.hub = Host("legacy.lab.test", f"{_SUBNET}.1")
        #: Every host's address by its name.
        self.names = {self.hub.name: self.hub.address}
        self._hosts.write_text(f"127.0.0.1 localhost\n{self.hub.address} {self.hub.name}\n")
        run("mount", "--bind", str(self._hosts), "/etc/hosts")

    def name(self, name: str) -> str:
        """The address of a host of this name, by which all the others know it."""
        address = f"{_SUBNET}.{len(self.names) + 1}"
        self.names[name] = address
        with self._hosts.open("a") as hosts:
            hosts.write(f"{address} {name}\n")
        return address

    def add(self, name: str) -> Host:
        """A host of this name: a network namespace."""
        address = self.name(name)
        holder = subprocess.Popen(
            ["unshare", "--net", "sh", "-c", "echo there; exec sleep infinity"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
        )
        self._holders[name] = holder
        if holder.stdout is None or holder.stdout.readline() != b"there\n":
            raise LabError(f"no network namespace for {name}")
        link = self._link(name)
        run("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", str(holder.pid))
        run("ip", "link", "set", link, "master", BRIDGE, "up")
        host = Host(name, address, ("nsenter", f"--net=/proc/{holder.pid}/ns/net"))
        run(*host.command("ip", "link", "set", "lo", "up"))
        run(*host.command("ip", "address", "add", f"{address}/24", "dev", "eth0"))
        run(*host.command("ip", "link", "set", "eth0", "up"))
        return host

    def _link(self, name: str) -> str:
        return f"v-{name.partition('.')[0]}"

    def cut(self, host: Host) -> None:
        """Pull its cable."""
        run("ip", "link", "set", self._link(host.name), "down")

    def mend(self, host: Host) -> None:
        run("ip", "link", "set", self._link(host.name), "up")

    def hide(self, host: Host, other: Host) -> None:
        """Let nothing of what ``host`` sends reach ``other``."""
        run(*host.command("ip", "route", "add", "blackhole", f"{other.address}/32"))

    def show(self, host: Host, other: Host) -> None:
        run(*host.command("ip", "route", "del", "blackhole", f"{other.address}/32"))

    def kill(self, host: Host) -> None:
        """End every process there at once, as when the power goes."""
        holder = self._holders[host.name].pid
        there = _namespace(holder)
        while found := [pid for pid in _processes() if pid != holder and _namespace(pid) == there]:
            for pid in found:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue

    def close(self) -> None:
        for holder in self._holders.values():
            holder.kill()
            holder.wait()


def _processes() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def _namespace(pid: int) -> str:
    """Empty for a process that is gone, or about to be."""
    try:
        return "" if " Z " in Path(f"/proc/{pid}/stat").read_text() else str(Path(f"/proc/{pid}/ns/net").readlink())
    except OSError:
        return ""
