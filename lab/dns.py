"""A DNS server of the lab's own: what a resolver in the world answers."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

import dns.exception
import dns.resolver

from bascule.lab.process import LabError, free_ports, program

PATIENCE = 10.0  # seconds


class NameServer:
    """dnsmasq, by default on a free port of 127.0.0.1, authoritative for what it is told, asking nobody."""

    def __init__(self, folder: Path, address: str = "127.0.0.1", port: int | None = None) -> None:
        self.folder = folder
        self.address = address
        self.port = port or free_ports(1)[0]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def name(self) -> str:
        """As in ``[dns] resolvers``."""
        return f"{self.address}:{self.port}"

    def start(self, *, mx: Mapping[str, str], spf: Mapping[str, str], hosts: Mapping[str, str], ttl: int = 300) -> None:
        """Serve MX (exchange by domain), SPF (policy by domain) and addresses (by name); whatever ran before ends."""
        self.stop()
        self.folder.mkdir(exist_ok=True)
        lines = [
            f"port={self.port}",
            f"listen-address={self.address}",
            "bind-interfaces",
            "no-resolv",
            "no-hosts",
            "no-daemon",
            "user=root",
            f"pid-file={self.folder}/pid",
            f"local-ttl={ttl}",
            "local=/test/",
            *(f"mx-host={domain},{exchange},10" for domain, exchange in mx.items()),
            *(f'txt-record={domain},"{policy}"' for domain, policy in spf.items()),
            *(f"host-record={name},{address}" for name, address in hosts.items()),
        ]
        configuration = self.folder / "dnsmasq.conf"
        configuration.write_text("\n".join(lines) + "\n")
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [program("dnsmasq"), f"--conf-file={configuration}"], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self._await()

    def _await(self) -> None:
        resolver = dns.resolver.Resolver(configure=False)
        resolver.nameservers, resolver.port, resolver.lifetime = [self.address], self.port, 0.5
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                resolver.resolve("lab.test", "SOA", raise_on_no_answer=False)
            except dns.resolver.NXDOMAIN:
                return
            except dns.exception.DNSException:
                if time.monotonic() > deadline:
                    raise LabError(f"dnsmasq does not answer:\n{(self.folder / 'log').read_text()}") from None
                time.sleep(0.05)
            else:
                return

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(PATIENCE)
            self._process = None
