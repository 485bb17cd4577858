"""A package index like PyPI's, for hosts that reach nothing else."""

from __future__ import annotations

import re
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

from bascule.lab.process import Host, run
from bascule.lab.servers import listens
from bascule.lab.sites import eventually

PORT = 8080
#: What pip builds pymilter with; bascule does not ask for it.
BUILDERS = ("setuptools", "wheel")


class PackageIndex:
    """The wheels of a tree of ``lab/trees.sh``, by name (PEP 503); pymilter as source only, as PyPI has it."""

    def __init__(self, folder: Path, host: Host) -> None:
        self._folder = folder
        self._host = host
        self._process: subprocess.Popen[bytes] | None = None
        #: The version and the digest of each package that bascule asks for.
        self.requirements = folder / "requirements.txt"

    @property
    def configuration(self) -> str:
        """What a machine's /etc/pip.conf says of it."""
        where = self._host.address
        return f"[global]\nindex-url = http://{where}:{PORT}/simple\ntrusted-host = {where}\n"

    def start(self, wheels: Path) -> None:
        """Serve what is in a tar archive."""
        unpacked = self._folder / "wheels"
        unpacked.mkdir()
        run("tar", "-C", str(unpacked), "-xf", str(wheels))
        held = []
        for file in sorted(unpacked.iterdir()):
            name, _, rest = file.name.partition("-")
            if name == "pymilter" and rest.endswith(".whl"):
                continue
            if name not in BUILDERS:
                version = rest.removesuffix(".tar.gz").partition("-")[0]
                held.append(f"{name}=={version} --hash=sha256:{sha256(file.read_bytes()).hexdigest()}\n")
            project = self._folder / "simple" / re.sub(r"[-_.]+", "-", name).lower()
            project.mkdir(parents=True, exist_ok=True)
            file.rename(project / file.name)
        self.requirements.write_text("".join(held))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "http.server", "--bind", self._host.address, str(PORT)],
            cwd=self._folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        eventually("the package index answers", lambda: listens(self._host.address, PORT))

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
