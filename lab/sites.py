"""The two sides of a migration, and the lab that holds both."""

from __future__ import annotations

import grp
import hmac
import json
import os
import pwd
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from base64 import b64encode, urlsafe_b64encode
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import psycopg
import trustme
from imapclient import IMAPClient
from psycopg.rows import TupleRow

from bascule import hooks
from bascule.config_templates import render
from bascule.credential import create_keys
from bascule.lab.courier import Courier
from bascule.lab.cyrus import Cyrus
from bascule.lab.dns import NameServer
from bascule.lab.postgres import Postgres
from bascule.lab.process import LOCALHOST, VMAIL, Daemon, Host, LabError, free_ports, title
from bascule.lab.servers import Certificate, Dovecot, Ports, Postfix, dovecot_version, write
from bascule.settings import (
    Authenticator,
    Dns,
    Keys,
    Legacy,
    Milter,
    PolicyDaemon,
    Portal,
    Settings,
    Users,
    Worker,
)
from bascule.settings import Dovecot as DovecotSettings
from bascule.settings import Postfix as PostfixSettings

DOMAIN = "lab.test"
#: bücher.test; its users are named with it.
IDN_DOMAIN = "xn--bcher-kva.test"
#: Whose mail the legacy server takes for any recipient, and gives to one.
CATCH_ALL_DOMAIN = "catchall.test"
#: The owner of the parts that neither store mail nor touch Postfix's queue.
SERVICE = 5001
#: The master user of the legacy Dovecot.
MASTER = "master"

T = TypeVar("T")


def full(name: str) -> str:
    """The address of a user, who is of DOMAIN if the name does not say another one."""
    return name if "@" in name else f"{name}@{DOMAIN}"


def eventually(what: str, probe: Callable[[], T | None], timeout: float = 60) -> T:
    """Ask ``probe`` until it gives something true; for servers that offer no event to wait on.

    Raises:
        LabError: ``what`` did not come about in time.
    """
    deadline = time.monotonic() + timeout
    while not (found := probe()):
        if time.monotonic() > deadline:
            raise LabError(f"not in {timeout} s: {what}")
        time.sleep(0.05)
    return found


def executable(name: str) -> str:
    """A program of ours, as installed beside the interpreter that runs the lab."""
    path = Path(sys.executable).parent / name
    if not path.exists():
        raise LabError(f"{path} is not there; run lab/setup first")
    return str(path)


@contextmanager
def imap(port: int, user: str, password: str, *, host: str = "127.0.0.1") -> Iterator[IMAPClient]:
    """A mail client, logged in."""
    client = IMAPClient(host, port, ssl=False, timeout=30)
    try:
        client.plain_login(user, password)
        yield client
    finally:
        client.shutdown()


def make_certificate(folder: Path, *names: str) -> Certificate:
    """One for servers of these names, from an authority of this lab's own."""
    authority = trustme.CA()
    issued = authority.issue_cert(*names)
    chain, key, ca = (folder / each for each in ("chain.pem", "key.pem", "ca.pem"))
    chain.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    issued.private_key_pem.write_to_path(str(key))
    authority.cert_pem.write_to_path(str(ca))
    return Certificate(chain, key, ca)


class LegacySite:
    """The old mail server: Postfix and Dovecot with plain Maildir++ and a password file."""

    #: Which of the optional services it offers.
    services: tuple[str, ...] = ("pop3", "submission", "sieve")
    #: What every folder but INBOX has before its name, and what stands between the parts of a name.
    prefix = ""
    separator = "/"

    def __init__(self, folder: Path, certificate: Certificate, host: Host = LOCALHOST) -> None:
        self.folder = folder
        self.host = host
        self.smtp_port = free_ports(1)[0]
        self.postfix = Postfix(folder / "postfix", self.smtp_port, "legacy", host)
        self.dovecot = Dovecot(folder / "dovecot", "legacy", host=host)
        self._certificate = certificate
        self.master_password = secrets.token_hex(8)
        self.token_key = secrets.token_bytes(32)
        self.users: dict[str, str] = {}
        self.aliases: dict[str, str] = {}
        #: Of some users: what is kept in place of the password, and the name with which they log in.
        self.hashes: dict[str, str] = {}
        self.login_names: dict[str, str] = {}

    def create(self, users: dict[str, str], aliases: dict[str, str]) -> None:
        """Users and aliases by local part."""
        self.folder.mkdir()
        self.folder.chmod(0o755)
        self.dovecot.create(self._certificate, self.smtp_port, prefix=self.prefix, separator=self.separator)
        self._create_other_logins()
        self._create_postfix(self.dovecot.lmtp_socket)
        self.set_users(users, aliases)

    def _create_postfix(self, lmtp_socket: Path | None, maildirs: Path | None = None) -> None:
        """It delivers by LMTP, or itself into the Maildirs below a folder."""
        self.postfix.create(
            hostname="legacy.lab.test",
            domains=f"{DOMAIN}, {IDN_DOMAIN}",
            lmtp_socket=lmtp_socket,
            maildirs=maildirs,
            vmail=VMAIL,
        )
        self.send_back({})

    def set_users(self, users: dict[str, str], aliases: dict[str, str]) -> None:
        self.users, self.aliases = dict(users), dict(aliases)
        self._set_passwords()
        self.postfix.map("mailboxes", {full(name): f"{name}/Maildir/" for name in users})
        self.postfix.map("aliases", {full(name): full(to) for name, to in aliases.items()})

    def send_back(self, users: dict[str, int]) -> None:
        """Have the mail of some users forwarded to another SMTP port, unchanged."""
        self.postfix.map("transport", {full(name): f"smtp:[127.0.0.1]:{port}" for name, port in users.items()})

    def _create_other_logins(self) -> None:
        """A master user, and a key that access tokens are signed with."""
        folder = self.dovecot.folder
        (folder / "masters").write_text(f"{MASTER}:{{PLAIN}}{self.master_password}\n")
        write(folder / "oauth2.conf.ext", "legacy-oauth2.conf.ext.j2", folder=folder)
        key = folder / "jwt" / "default" / "HS256" / "default"
        key.parent.mkdir(parents=True)
        key.write_bytes(b64encode(self.token_key))

    def access_token(self, name: str, lifetime: int = 300) -> str:
        """An access token for a user, as a provider would give it (RFC 7519, HS256)."""

        def encoded(data: bytes) -> str:
            return urlsafe_b64encode(data).decode().rstrip("=")

        now = int(time.time())
        claims = {"sub": f"{name}@{DOMAIN}", "iat": now, "exp": now + lifetime, "scope": "imap"}
        signed = (
            f"{encoded(json.dumps({'alg': 'HS256', 'typ': 'JWT'}).encode())}.{encoded(json.dumps(claims).encode())}"
        )
        return f"{signed}.{encoded(hmac.digest(self.token_key, signed.encode(), 'sha256'))}"

    def _set_passwords(self) -> None:
        # Dovecot takes names in lower case (auth_username_format), and a backslash in a passwd-file for an escape.
        names = {name: self.login_names.get(name, full(name)).lower().replace("\\", "\\\\") for name in self.users}
        lines = [
            f"{names[name]}:{self.hashes.get(name, f'{{PLAIN}}{password}')}::::::user={full(name)}\n"
            for name, password in self.users.items()
        ]
        (self.dovecot.folder / "users").write_text("".join(lines))

    def start(self) -> None:
        self.dovecot.start()
        self.postfix.start()

    def stop(self) -> None:
        self.postfix.stop()
        self.dovecot.stop()

    def start_store(self) -> None:
        """Start what holds the mailboxes, without Postfix."""
        self.dovecot.start()

    def stop_store(self) -> None:
        self.dovecot.stop()

    def processes(self) -> list[int]:
        """Those of the store."""
        return self.dovecot.processes()

    def sessions(self) -> list[int]:
        """Those of them that serve a client each."""
        return [pid for pid in self.processes() if title(pid).startswith("dovecot/imap")]

    @property
    def ports(self) -> Ports:
        return self.dovecot.ports

    def folder_name(self, path: str) -> str:
        """How clients call a folder, whose parts are told with ``/`` between them."""
        return self.prefix + path.replace("/", self.separator)

    def maildir(self, name: str) -> Path:
        """Where the INBOX of a user is, as a Maildir."""
        return self.dovecot.folder / "mail" / name / "Maildir"

    def client(self, name: str, password: str | None = None) -> AbstractContextManager[IMAPClient]:
        user = self.login_names.get(name, full(name))
        return imap(self.ports.imap, user, password or self.users[name], host=self.host.address)


class PrefixedSite(LegacySite):
    """A Dovecot as many who came from Courier have it: INBOX. before every folder, dots between them."""

    prefix = "INBOX."
    separator = "."


class CyrusSite(LegacySite):
    """An old mail server with Cyrus in Dovecot's place."""

    prefix = "INBOX."
    separator = "."

    def __init__(self, folder: Path, certificate: Certificate, host: Host = LOCALHOST) -> None:
        super().__init__(folder, certificate, host)
        self.cyrus = Cyrus(folder / "cyrus", DOMAIN)

    def create(self, users: dict[str, str], aliases: dict[str, str]) -> None:
        self.folder.mkdir()
        self.folder.chmod(0o755)
        self.cyrus.create(self._certificate)
        self._create_postfix(self.cyrus.lmtp_socket)
        self.set_users(users, aliases)

    def start(self) -> None:
        self.cyrus.start()
        for name, password in self.users.items():
            self.cyrus.add_user(name, password)
        self.postfix.start()

    def stop(self) -> None:
        self.postfix.stop()
        self.cyrus.stop()

    def _set_passwords(self) -> None:
        """They are set with the mailboxes, once the server runs."""

    @property
    def ports(self) -> Ports:
        return self.cyrus.ports


class CourierSite(LegacySite):
    """An old mail server with Courier in Dovecot's place; Postfix writes into its Maildirs."""

    services = ("pop3",)
    prefix = "INBOX."
    separator = "."

    def __init__(self, folder: Path, certificate: Certificate, host: Host = LOCALHOST) -> None:
        super().__init__(folder, certificate, host)
        self.courier = Courier(folder / "courier", DOMAIN)

    def create(self, users: dict[str, str], aliases: dict[str, str]) -> None:
        self.folder.mkdir()
        self.folder.chmod(0o755)
        self.courier.create(self._certificate)
        self._create_postfix(None, self.courier.folder / "mail")
        self.set_users(users, aliases)

    def start(self) -> None:
        self.courier.start()
        self.postfix.start()

    def stop(self) -> None:
        self.postfix.stop()
        self.courier.stop()

    def start_store(self) -> None:
        self.courier.start()

    def stop_store(self) -> None:
        self.courier.stop()

    def processes(self) -> list[int]:
        return self.courier.processes()

    def sessions(self) -> list[int]:
        return self.courier.sessions()

    def _set_passwords(self) -> None:
        """With the Maildirs, which Courier does not make."""
        self.courier.set_users(self.users)
        for name in self.users:
            maildir = self.maildir(name)
            for folder in (maildir.parent, maildir, maildir / "cur", maildir / "new", maildir / "tmp"):
                folder.mkdir(exist_ok=True)
                os.chown(folder, VMAIL, VMAIL)

    @property
    def ports(self) -> Ports:
        return self.courier.ports

    def maildir(self, name: str) -> Path:
        return self.courier.folder / "mail" / name / "Maildir"


class NewSite:
    """The new server: PostgreSQL, Postfix, Dovecot, and every part of bascule, plugged in by its own templates."""

    def __init__(
        self,
        folder: Path,
        certificate: Certificate,
        *,
        host: Host = LOCALHOST,
        node: str = "new.lab.test",
        store: str = "local",
        postgres: Postgres | None = None,
    ) -> None:
        self.folder = folder
        self.host = host
        self.smtp_port, self.portal_port = free_ports(2)
        self.postgres = postgres or Postgres(folder / "postgres")
        self.postfix = Postfix(folder / "postfix", self.smtp_port, "new", host)
        self.dovecot = Dovecot(folder / "dovecot", "new", host=host)
        self.certificate = certificate
        run_folder, etc = folder / "run", folder / "etc"
        metrics = [f"127.0.0.1:{port}" for port in free_ports(5)]
        self.dns = NameServer(folder / "dns")
        self.settings_file = etc / "bascule.toml"
        self.settings = Settings(
            database=self.postgres.conninfo,
            node=node,
            keys=Keys(public=etc / "seal.pub", private=etc / "seal.key"),
            legacy=Legacy(ca_file=certificate.ca, timeout=10),
            postfix=PostfixSettings(
                config_directory=self.postfix.folder,
                smtp=f"{host.address}:{self.smtp_port}",
                listener=f"unix:{self.postfix.folder}/queue/public/bascule",
            ),
            dovecot=DovecotSettings(config_file=self.dovecot.config, imap=f"{host.address}:{self.dovecot.ports.imap}"),
            policy_daemon=PolicyDaemon(
                socketmap=f"unix:{run_folder}/socketmap",
                policy=f"unix:{run_folder}/policy",
                hold=f"unix:{run_folder}/hold",
                snapshot=folder / "state" / "routes.sqlite",
                metrics=metrics[0],
            ),
            authenticator=Authenticator(
                socket=run_folder / "authenticator",
                snapshot=folder / "state" / "logins.sqlite",
                domains=folder / "state" / "domains",
                deputy=folder / "state" / "deputy",
                deputy_until=run_folder / "deputy-until",
                metrics=metrics[1],
            ),
            milter=Milter(socket=f"unix:{run_folder}/milter", stamp_key=etc / "stamp.key", metrics=metrics[2]),
            worker=Worker(mail_root=folder / "mail", store=store, metrics=metrics[3]),
            portal=Portal(
                listen=f"127.0.0.1:{self.portal_port}",
                public_url=f"http://127.0.0.1:{self.portal_port}",
                session_key=etc / "session.key",
                metrics=metrics[4],
            ),
            users=Users(
                organisation="Lab of Example",
                contact="Help desk, telephone 4711",
                imap=f"{node}:993",
                submission=f"{node}:587",
            ),
            dns=Dns(resolvers=(self.dns.name,)),
        )
        postdrop = grp.getgrnam("postdrop").gr_gid
        self.policy_daemon = self._daemon("policy-daemon", SERVICE, postdrop)
        self.authenticator = self._daemon("authenticator", SERVICE, SERVICE)
        self.milter = self._daemon("milter", SERVICE, SERVICE)
        self.portal = self._daemon("portal", SERVICE, SERVICE)
        self.worker = self._daemon("worker", VMAIL, VMAIL)

    @property
    def daemons(self) -> tuple[Daemon, ...]:
        return (self.policy_daemon, self.authenticator, self.milter, self.portal, self.worker)

    def _daemon(self, name: str, uid: int, gid: int) -> Daemon:
        command = [executable(f"bascule-{name}"), "--settings", str(self.settings_file)]
        return Daemon(command, folder=self.folder / "log", name=name, uid=uid, gid=gid, host=self.host)

    def another_worker(self) -> Daemon:
        """One more worker at this store; Prometheus asks the first."""
        settings = self.settings.model_copy(
            update={"worker": self.settings.worker.model_copy(update={"metrics": None})}
        )
        path = self.folder / "etc" / "worker-2.toml"
        path.write_text(render("bascule.toml.j2", **settings.model_dump()))
        command = [*self.worker.command[:-1], str(path)]
        return Daemon(command, folder=self.folder / "log", name="worker-2", uid=VMAIL, gid=VMAIL, host=self.host)

    def create(self) -> None:
        self.create_files()
        self.create_keys()
        self.postgres.create()
        self.create_dovecot()
        self.create_postfix(sasl_socket=self.dovecot.folder / "sasl")

    def create_files(self) -> None:
        """The directories, and the settings."""
        self.folder.mkdir()
        self.folder.chmod(0o755)
        for part, owner in (("run", SERVICE), ("state", SERVICE), ("mail", VMAIL), ("log", 0), ("etc", 0)):
            (self.folder / part).mkdir()
            (self.folder / part).chmod(0o755)
            os.chown(self.folder / part, owner, owner)
        make_deputy_folder(self.settings.authenticator.deputy, SERVICE)
        self.settings_file.write_text(render("bascule.toml.j2", **self.settings.model_dump()))

    def create_keys(self) -> None:
        create_keys(self.settings.keys.public, self.settings.keys.private)
        os.chown(self.settings.keys.private, VMAIL, VMAIL)
        for key in (self.settings.milter.stamp_key, self.settings.portal.session_key):
            key.write_text(secrets.token_hex(32))
            key.chmod(0o400)
            os.chown(key, SERVICE, SERVICE)

    def create_dovecot(self, *, smtp_host: str | None = None, **variables: object) -> None:
        """``variables`` are for the lab's own templates."""
        values = self.settings.model_dump() | {"before_static": False, "mail_by_userdb": False}
        self.dovecot.create(
            self.certificate,
            self.smtp_port,
            smtp_host=smtp_host,
            vmail_uid=VMAIL,
            vmail_gid=VMAIL,
            own_users=False,
            auth_cache_size="",
            python=sys.executable,
            checkpassword=executable("bascule-checkpassword"),
            **(values | self._for_dovecot_2_4() | variables),
        )

    def _for_dovecot_2_4(self) -> dict[str, object]:
        """What its template wants besides: it knows Lua only."""
        if dovecot_version() != "2.4":
            return {}
        stub = self.folder / "etc" / "passdb.lua"
        passdb = Path(hooks.__file__).parent / "passdb.lua"
        stub.write_text(render("dovecot/passdb.lua.j2", passdb_lua=passdb, **self.settings.model_dump()))
        return {"passdb_lua_stub": stub}

    def create_postfix(self, **variables: object) -> None:
        """``variables`` are for the lab's own templates."""
        self.postfix.create(
            hostname=self.settings.node,
            postfix_queue=self.postfix.folder / "queue",
            extends=False,
            **self.settings.model_dump(),
            **variables,
        )

    def start_dns(self, *, mx: str | None = None, ttl: int = 300) -> None:
        """What the world sees of DOMAIN: its MX, by default here, and that we may send for it."""
        self.dns.start(
            mx={DOMAIN: mx or self.settings.node},
            spf={DOMAIN: "v=spf1 ip4:127.0.0.0/8 -all"},
            hosts={self.settings.node: self.host.address, "legacy.lab.test": "127.0.0.2"},
            ttl=ttl,
        )

    def start(self) -> None:
        for daemon in self.daemons[:-1]:
            daemon.start()
        self.dovecot.start()
        self.postfix.start()
        self.worker.start()

    def stop(self) -> None:
        """Stop all; the first failure is raised after everything was tried."""
        with ExitStack() as stack:
            stack.callback(self.postgres.stop, "immediate")
            stack.callback(self.dns.stop)
            for daemon in self.daemons:
                stack.callback(daemon.stop)
            stack.callback(self.dovecot.stop)
            stack.callback(self.postfix.stop)

    def cli(self, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Run the command ``bascule`` as an administrator does; standard output and error together."""
        return subprocess.run(
            [executable("bascule"), "--settings", str(self.settings_file), *arguments],
            input=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
            check=False,
        )

    def sql(self, query: str, *parameters: object, role: str = "bascule_admin") -> list[TupleRow]:
        with psycopg.connect(self.postgres.dsn(role), autocommit=True) as connection:
            cursor = connection.execute(query.encode(), parameters)
            return cursor.fetchall() if cursor.description else []

    def forget_node(self, name: str, part: str) -> None:
        """Do not wait any more for a part that was stopped, if it was known."""
        known = "SELECT 1 FROM bascule.parts WHERE name = %s AND part = %s"
        if self.sql(known, name, part):
            eventually(f"{part} on {name} is silent", lambda: not self.sql(f"{known} AND alive", name, part) or None)
            self.sql("SELECT bascule.forget_node(%s, %s, 'it was stopped for good', true)", name, part)

    def state(self, name: str) -> str | None:
        rows = self.sql("SELECT state FROM bascule.mailboxes WHERE address = %s", full(name))
        return str(rows[0][0]) if rows else None

    def client(self, name: str, password: str) -> AbstractContextManager[IMAPClient]:
        return imap(self.dovecot.ports.imap, full(name), password, host=self.host.address)


def make_deputy_folder(path: Path, owner: int) -> None:
    """As config_templates/systemd/bascule-authenticator.service.j2 has it made."""
    path.mkdir()
    os.chown(path, owner, grp.getgrnam("dovecot").gr_gid)
    path.chmod(0o2750)


class Lab:
    """A legacy site and a new site in one private directory; use it in a ``with`` statement."""

    def __init__(self, legacy: type[LegacySite] = LegacySite) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="bascule-lab-"))
        self.folder.chmod(0o755)
        certificate = make_certificate(self.folder, "localhost")
        self.legacy = legacy(self.folder / "legacy", certificate)
        self.new = NewSite(self.folder / "new", certificate)
        self.url = ""  # of the users, once the domain is active

    def create(self, users: dict[str, str], aliases: dict[str, str]) -> None:
        """Make both sides and start them."""
        self.legacy.create(users, aliases)
        self.new.create()
        self.legacy.start()
        self.new.start()

    def prepare(self, *options: str) -> None:
        """Tell bascule of the store and of the legacy server, rightly."""
        ports = self.legacy.ports
        optional = []
        for service in self.legacy.services:
            optional += [f"--{service}-port", str(getattr(ports, service)), f"--{service}-tls", "starttls"]
        for arguments in (
            ("store", "local", f"unix:{self.new.dovecot.lmtp_socket}"),
            (
                "prepare",
                DOMAIN,
                "--imap-host",
                "localhost",
                "--imap-port",
                str(ports.imaps),
                "--smtp-host",
                "127.0.0.1",
                "--smtp-port",
                str(self.legacy.smtp_port),
                *optional,
                "--sweep-interval",
                "2 seconds",
                "--quiet-period",
                "3 seconds",
                "--no-messages",
                *options,
            ),
        ):
            done = self.new.cli(*arguments)
            if done.returncode != 0:
                raise LabError(done.stdout)

    def __enter__(self) -> Lab:
        if os.geteuid() != 0:
            raise LabError("the lab needs root: Postfix and Dovecot change to users of their own")
        pwd.getpwnam("postfix")
        # Ended from outside, the servers are stopped all the same.
        self._before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            with ExitStack() as stack:
                stack.callback(self.legacy.stop)
                stack.callback(self.new.stop)
        finally:
            signal.signal(signal.SIGTERM, self._before)
            if os.environ.get("BASCULE_LAB_KEEP"):
                print(f"kept for you to look at: {self.folder}", file=sys.stderr)
            else:
                shutil.rmtree(self.folder, ignore_errors=True)
