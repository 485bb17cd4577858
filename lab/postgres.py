"""A PostgreSQL cluster of its own, reached by a Unix socket in its own directory."""

from __future__ import annotations

import shutil
from pathlib import Path

import psycopg

from bascule.lab.process import LOCALHOST, Host, LabError, run
from bascule.schema import upgrade


def _bin(name: str) -> str:
    for version in sorted(Path("/usr/lib/postgresql").glob("*"), key=lambda p: int(p.name))[::-1]:
        if (version / "bin" / name).exists():
            return str(version / "bin" / name)
    raise LabError("PostgreSQL is not installed; run lab/setup first")


class Postgres:
    """One cluster. ``dsn(role)`` connects to its database ``bascule``."""

    def __init__(self, folder: Path, host: Host = LOCALHOST, *, port: int | None = None) -> None:
        """With ``port``, it also listens there on loopback."""
        self.folder = folder
        self.host = host
        self.port = port
        self._at_port = "" if port is None else f" port={port}"
        self._data = folder / "data"
        #: libpq's connection string, without the role.
        self.conninfo = f"host={host.address if host.enter else folder} dbname=bascule" + self._at_port

    def create(self) -> None:
        """Make the cluster, start it and install the schema."""
        self.folder.mkdir()
        shutil.chown(self.folder, "postgres", "postgres")
        self.folder.chmod(0o755)
        # No password on this socket: only this run knows its directory.
        self._run(
            _bin("initdb"),
            "-D",
            str(self._data),
            "-A",
            "trust",
            "-U",
            "postgres",
            "--no-sync",
            "--encoding=UTF8",
            "--locale=C.UTF-8",
        )
        if self.host.enter:
            with (self._data / "pg_hba.conf").open("a") as rules:
                rules.write("host all all samenet trust\n")
        self.start()
        with psycopg.connect(self.dsn("postgres", database="postgres"), autocommit=True) as connection:
            connection.execute("CREATE DATABASE bascule")
        upgrade(self.dsn("postgres"))

    def dsn(self, role: str, database: str = "bascule") -> str:
        return f"host={self.folder} dbname={database} user={role}{self._at_port}"

    def tcp_dsn(self, role: str) -> str:
        """As :meth:`dsn`, by TCP; for a cluster that has a port."""
        return f"host=127.0.0.1 dbname=bascule user={role}{self._at_port}"

    def start(self) -> None:
        listen = self.host.address if self.host.enter else ""
        if self.port is not None:
            listen = "127.0.0.1"
        options = f"-c listen_addresses={listen} -c unix_socket_directories={self.folder} -c max_connections=200"
        if self.port is not None:
            options += f" -c port={self.port}"
        self._run(
            _bin("pg_ctl"),
            "-D",
            str(self._data),
            "-w",
            "-l",
            str(self.folder / "postgres.log"),
            "-o",
            options,
            "start",
        )

    def kill(self) -> None:
        """End it without a checkpoint, as a crash would; its sockets are free when this returns."""
        self.stop("immediate")

    def stop(self, mode: str = "fast") -> None:
        if (self._data / "postmaster.pid").exists():
            self._run(
                _bin("pg_ctl"),
                "-D",
                str(self._data),
                "-w",
                "-m",
                mode,
                "stop",
            )

    def _run(self, *command: str) -> None:
        run(*self.host.command(*command, user="postgres"), cwd=self.folder)
