"""The settings file: one TOML file a host, one table a part.

Read once at the start of each program from the path in ``--settings``,
else ``/etc/bascule/bascule.toml``. It holds no secret: keys are files of their
own, and the database is reached by the operating system's authentication or a
``~/.pgpass`` (libpq, "The Password File").
"""

from __future__ import annotations

import tomllib
from ipaddress import ip_network
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, IPvAnyNetwork, ValidationError

from bascule.errors import BadSettings

DEFAULT_PATH = Path("/etc/bascule/bascule.toml")

#: ``unix:/path`` or ``inet:host:port``, as Postfix writes them.
Endpoint = Annotated[str, Field(pattern=r"^(unix:/.+|inet:[^:]+:\d+)$")]

#: ``host:port``. Metrics are for Prometheus, without authentication: on a loopback or inner address only.
Listen = Annotated[str, Field(pattern=r"^[^:]+:\d+$")]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Keys(_Table):
    public: Path = Path("/etc/bascule/seal.pub")
    #: Only on hosts that run workers.
    private: Path = Path("/etc/bascule/seal.key")


class Legacy(_Table):
    #: Trust anchors for legacy servers; none: the system's.
    ca_file: Path | None = None
    #: For Dovecot 2.3, without ca_file: the few authorities that the legacy servers' certificates need; bascule check
    #: writes it. It must be short, for its text is in the environment of all that Dovecot runs.
    authorities: Path = Path("/etc/bascule/authorities.pem")
    #: Seconds that a legacy server may take for one answer.
    timeout: float = Field(default=20, gt=0)


class Postfix(_Table):
    config_directory: Path = Path("/etc/postfix")
    #: Where the Postfix of an MX takes mail: for messages to users, and for ``bascule check``.
    smtp: Listen = "127.0.0.1:25"
    #: Where it takes barriers, see config_templates/postfix/master.cf.j2.
    listener: Endpoint = "unix:/var/spool/postfix/public/bascule"


class Dovecot(_Table):
    config_file: Path = Path("/etc/dovecot/dovecot.conf")
    #: Any of these characters separates a detail (RFC 5233), where Postfix's own recipient_delimiter is empty.
    recipient_delimiter: str = Field(default="+", min_length=1)
    #: Where a Dovecot of ours takes logins, with STARTTLS where it insists: for ``bascule check``.
    imap: Listen = "127.0.0.1:143"


class PolicyDaemon(_Table):
    # Within Postfix's queue directory, into which Debian's Postfix chroots most of its services.
    socketmap: Endpoint = "unix:/var/spool/postfix/bascule/socketmap"
    policy: Endpoint = "unix:/var/spool/postfix/bascule/policy"
    #: The next hop of held mail: it always answers 421, so that Postfix keeps the mail.
    hold: Endpoint = "unix:/var/spool/postfix/bascule/hold"
    #: The last known routes, for a start while the database is away.
    snapshot: Path = Path("/var/lib/bascule/policy-daemon/routes.sqlite")
    metrics: Listen | None = None


class Authenticator(_Table):
    socket: Path = Path("/run/bascule/authenticator")
    #: Seconds that a login waits for the flip of its mailbox.
    cutover_wait: float = Field(default=15, ge=0)
    #: The last known state, for a start while the database is away.
    snapshot: Path = Path("/var/lib/bascule/authenticator/logins.sqlite")
    #: The list of our domains: Dovecot sees there which names are not ours, and does not wait for us.
    domains: Path = Path("/var/lib/bascule/authenticator/domains")
    #: What Dovecot goes by while the authenticator does not answer, for its group only; see hooks/deputy.py.
    deputy: Path = Path("/var/lib/bascule/authenticator/deputy")
    #: Until when that is good. A new start of the host must remove it.
    deputy_until: Path = Path("/run/bascule/deputy/until")
    metrics: Listen | None = None


class Arc(_Table):
    """Sealing of relayed mail (RFC 8617): who seals, and the name of the Authentication-Results to be sealed."""

    domain: str
    selector: str
    #: RSA, in PEM.
    key: Path
    #: The authserv-id (RFC 8601) that the milter before us writes.
    authserv_id: str


class Milter(_Table):
    socket: Endpoint = "unix:/var/spool/postfix/bascule/milter/socket"
    #: Key of the stamps; the same on every MX.
    stamp_key: Path = Path("/etc/bascule/stamp.key")
    metrics: Listen | None = None
    arc: Arc | None = None


class Worker(_Table):
    #: This host's name in bascule.store: the queue whose tasks are done here.
    store: str = "local"
    #: Homes are <mail_root>/<domain>/<local part>.
    mail_root: Path = Path("/var/vmail")
    #: As Dovecot's own mail_location: Maildir with LAYOUT=fs, mdbox or sdbox, below the home.
    mail_location: Annotated[str, Field(pattern=r"^(maildir:~/[^:]+:LAYOUT=fs|[ms]dbox:~/[^:]+)$")] = (
        "maildir:~/Maildir:LAYOUT=fs"
    )
    #: Mailboxes that are copied at the same time.
    concurrency: int = Field(default=4, ge=1)
    metrics: Listen | None = None


class Portal(_Table):
    listen: Listen = "127.0.0.1:8025"
    #: What users see before /m/<token>.
    public_url: str = "https://localhost"
    session_key: Path = Path("/etc/bascule/session.key")
    #: Pages that are answered at the same time, beside forms that wait for a legacy server.
    threads: int = Field(default=8, ge=1)
    #: An SVG or PNG image that stands above the page.
    logo: Path | None = None
    metrics: Listen | None = None

    def url(self, token: str) -> str:
        """The users' URL of a domain; ``token`` is its secret part."""
        return f"{self.public_url.rstrip('/')}/m/{token}"


class Users(_Table):
    """What users are told, on the page and in messages."""

    #: Who speaks to them.
    organisation: str = ""
    #: Whom they may ask: a telephone number, an address.
    contact: str = ""
    #: What they must tell their mail programs; TLS is implicit at 993, 995 and 465, else STARTTLS.
    imap: Listen | None = None
    pop3: Listen | None = None
    submission: Listen | None = None
    #: Templates of the operator's own; see ``config_templates/messages``.
    templates: Path | None = None


class Dns(_Table):
    """Whom ``bascule check`` asks besides the system's own resolver: the world does not see what we see."""

    #: ``system``, an address, or ``address:port``. The public ones learn the name of the domain.
    resolvers: tuple[str, ...] = ("system", "1.1.1.1", "8.8.8.8", "9.9.9.9")


class Settings(_Table):
    """Everything in the file; each table has defaults for a host that the Ansible roles made."""

    #: libpq connection string, without password.
    database: str = "dbname=bascule"
    #: The name under which this host signs its heartbeats.
    node: str = "localhost"
    #: Networks whose logins and requests come from many people (webmail, an office): no limit for the source.
    trusted_sources: tuple[IPvAnyNetwork, ...] = (ip_network("127.0.0.0/8"), ip_network("::1"))
    keys: Keys = Keys()
    legacy: Legacy = Legacy()
    postfix: Postfix = Postfix()
    dovecot: Dovecot = Dovecot()
    policy_daemon: PolicyDaemon = PolicyDaemon()
    authenticator: Authenticator = Authenticator()
    milter: Milter = Milter()
    worker: Worker = Worker()
    portal: Portal = Portal()
    users: Users = Users()
    dns: Dns = Dns()

    def dsn(self, role: str) -> str:
        """The connection string for one of the roles of ``schema/roles.sql``."""
        # A database host that vanishes is noticed within seconds, not after TCP's own quarter of an hour.
        patience = "tcp_user_timeout=10000 keepalives_idle=10 keepalives_interval=5"
        # Of several hosts, the one that takes changes; a standby takes none, and notifies of none.
        primary = "" if "target_session_attrs" in self.database else "target_session_attrs=read-write"
        return f"{self.database} user=bascule_{role} application_name=bascule_{role} {primary} {patience}"


def load(path: Path = DEFAULT_PATH) -> Settings:
    """Read the settings file.

    Raises:
        BadSettings: it cannot be read, is not TOML, or a value is wrong; every
            wrong value is named.
    """
    try:
        values = tomllib.loads(path.read_text())
    except OSError as error:
        raise BadSettings(
            f"the settings file {path} cannot be read: {error.strerror}",
            hint="Name it with --settings, or make /etc/bascule/bascule.toml.",
        ) from error
    except ValueError as error:
        raise BadSettings(f"the settings file {path} is not TOML: {error}") from error
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        wrong = "\n".join(f"  {'.'.join(str(part) for part in each['loc'])}: {each['msg']}" for each in error.errors())
        raise BadSettings(f"in the settings file {path}:\n{wrong}") from error
