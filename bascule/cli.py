"""The command ``bascule``: what an administrator does.

Exit status: 0 done, 1 refused or failed (nothing was changed), 2 wrong usage.
Passwords are asked for at the terminal or read from a file or standard input,
never taken from the command line.
"""

from __future__ import annotations

import json
import secrets
import sys
from pathlib import Path
from typing import Any

import click
import psycopg

from bascule import __version__, check, legacy, schema, settings
from bascule.address import Address, domain_name
from bascule.credential import Password, Sealer, create_keys
from bascule.database import Connection, connect, value
from bascule.errors import BadAddress, BasculeError
from bascule.legacy import LegacySettings, Trust
from bascule.program import keep_memory_private, settings_option, spoken

ROLE = "admin"


class Cli(click.Group):
    """A group whose commands say our errors in words, with exit status 1."""

    def invoke(self, ctx: click.Context) -> Any:
        with spoken():
            return super().invoke(ctx)


class _DomainName(click.ParamType[str]):
    name = "domain"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            return domain_name(value)
        except BadAddress as error:
            self.fail(error.message, param, ctx)


#: A domain as a person writes it, in A-labels.
DOMAIN = _DomainName()


@click.group(cls=Cli, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@settings_option
@click.version_option(__version__)
@click.pass_context
def main(context: click.Context, path: Path) -> None:
    """Move a mail domain to Postfix and Dovecot, one user at a time, while nobody notices.

    \b
    The usual way of a domain:
      bascule prepare example.org --imap-host imap.old.example --smtp-host mx.old.example
      bascule check example.org --user alice@example.org
      bascule activate example.org        prints the URL for the users
      bascule status example.org          who has moved, who moves, who is forgotten
      bascule close example.org           refused while anybody would be forgotten
    """
    keep_memory_private()
    context.obj = path


def _settings(context: click.Context) -> settings.Settings:
    loaded: settings.Settings = settings.load(context.obj)
    return loaded


def _address(text: str) -> Address:
    return Address.parse(text)


def _legacy_of(connection: Connection, domain: str) -> LegacySettings:
    row = connection.execute(
        f"SELECT {legacy.COLUMNS} FROM bascule.domain WHERE name = %s".encode(),
        (domain,),
    ).fetchone()
    if row is None:
        raise BasculeError(f"no domain {domain} is known here", hint="Tell its legacy server first: bascule prepare.")
    return legacy.from_row(*row)


def _password(prompt: str, file: Path | None) -> Password:
    if file is None:
        return Password(click.prompt(prompt, hide_input=True))
    try:
        text = sys.stdin.readline() if str(file) == "-" else file.read_text()
    except UnicodeDecodeError:
        # The error holds what was read, so it is not passed on.
        raise BasculeError(f"the password in {file} is not UTF-8 text") from None
    return Password(text.rstrip("\r\n"))


password_file = click.option(
    "--password-file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False, allow_dash=True),
    help="Read the password from this file, - for standard input; without it, it is asked for.",
)


@main.group()
def db() -> None:
    """The database schema."""


@db.command("upgrade")
@click.option("--dsn", required=True, help="libpq connection string of a role that may create schemas and roles.")
def db_upgrade(dsn: str) -> None:
    """Install the schema, or bring it to this version, in one transaction."""
    before = schema.current(dsn)
    schema.upgrade(dsn)
    click.echo(f"schema: {before or 'none'} -> {schema.head()}")


@main.group()
def keys() -> None:
    """The keys to which passwords are sealed."""


@keys.command("create")
@click.argument("public", type=click.Path(path_type=Path))
@click.argument("private", type=click.Path(path_type=Path))
def keys_create(public: Path, private: Path) -> None:
    """Make the pair PUBLIC (every host) and PRIVATE (hosts with workers only)."""
    create_keys(public, private)
    click.echo(
        f"{public} goes to every host, {private} only to hosts with workers. Keep a copy of it: without it, "
        "stored passwords cannot be opened."
    )


@main.command()
@click.argument("name")
@click.argument("lmtp_next_hop")
@click.option(
    "--login-host", help="Where Dovecot on other hosts proxies its users to; needed if there are several stores."
)
@click.pass_context
def store(context: click.Context, name: str, lmtp_next_hop: str, login_host: str | None) -> None:
    """Tell the Dovecot store NAME, reached by LMTP_NEXT_HOP (unix:private/dovecot-lmtp, inet:host:24)."""
    with connect(_settings(context).dsn(ROLE)) as connection:
        try:
            connection.execute(
                "INSERT INTO bascule.store (name, lmtp_next_hop, login_host) VALUES (%s, %s, %s) "
                "ON CONFLICT (name) DO UPDATE SET lmtp_next_hop = excluded.lmtp_next_hop, "
                "login_host = excluded.login_host",
                (name, lmtp_next_hop, login_host),
            )
        except psycopg.errors.CheckViolation as error:
            raise BasculeError(f"{lmtp_next_hop!r} is not unix:path or inet:host:port") from error
    click.echo(f"{name}: lmtp:{lmtp_next_hop}")


TLS = click.Choice(["implicit", "starttls", "none"])


@main.command()
@click.argument("domain", type=DOMAIN)
@click.option("--imap-host", required=True, help="The legacy IMAP server; also its POP3 and submission, if given.")
@click.option("--imap-port", type=click.IntRange(1, 65535), default=993, show_default=True)
@click.option("--imap-tls", type=TLS, default="implicit", show_default=True)
@click.option("--smtp-host", required=True, help="Next hop for mail of users who have not moved.")
@click.option("--smtp-port", type=click.IntRange(1, 65535), default=25, show_default=True)
@click.option("--pop3-port", type=click.IntRange(1, 65535), help="Give it if users read their mail by POP3.")
@click.option("--pop3-tls", type=TLS)
@click.option("--submission-port", type=click.IntRange(1, 65535), help="Give it if users submit mail there.")
@click.option("--submission-tls", type=TLS)
@click.option("--sieve-port", type=click.IntRange(1, 65535), help="ManageSieve: give it if users have Sieve scripts.")
@click.option("--sieve-tls", type=TLS)
@click.option(
    "--login-form",
    type=click.Choice(["address", "local_part"]),
    default="address",
    show_default=True,
    help="What the legacy server takes as user name.",
)
@click.option(
    "--first-login/--no-first-login",
    "first_login_migrates",
    default=True,
    show_default=True,
    help="Whether a first login on the new server is a request to be moved.",
)
@click.option("--store", default="local", show_default=True, help="Where mailboxes of the domain will be kept.")
@click.option(
    "--sweep-interval", default="5 minutes", show_default=True, help="How often late messages are looked for."
)
@click.option("--cutover-budget", default="60 seconds", show_default=True, help="How long a user's mail may be held.")
@click.option(
    "--connections",
    type=click.IntRange(1),
    default=20,
    show_default=True,
    help="The most IMAP sessions that workers have there.",
)
@click.option(
    "--connections-per-mailbox",
    type=click.IntRange(1),
    default=2,
    show_default=True,
    help="The most IMAP sessions for one mailbox at a time.",
)
@click.option("--bytes-per-second", type=click.IntRange(1), help="The most that workers read there; default: no limit.")
@click.pass_context
def prepare(context: click.Context, /, domain: str, **values: object) -> None:
    """Tell how the legacy server of DOMAIN is reached, or correct it. Nobody moves yet."""
    for service in ("pop3", "submission", "sieve"):
        if values[f"{service}_port"] and not values[f"{service}_tls"]:
            values[f"{service}_tls"] = "implicit" if values[f"{service}_port"] in {995, 465} else "starttls"
        if not values[f"{service}_port"]:
            values[f"{service}_tls"] = None
    columns = ", ".join(values)
    updates = ", ".join(f"{column} = excluded.{column}" for column in values)
    places = ", ".join(["%s"] * len(values))
    try:
        with connect(_settings(context).dsn(ROLE)) as connection:
            connection.execute(
                f"INSERT INTO bascule.domain (name, {columns}) VALUES (%s, {places}) "
                f"ON CONFLICT (name) DO UPDATE SET {updates}".encode(),
                (domain, *values.values()),
            )
    except BasculeError as error:
        cause = error.__cause__
        if isinstance(cause, psycopg.errors.ForeignKeyViolation):
            raise BasculeError(
                f"no store {values['store']!r} is known", hint="Tell it first: bascule store."
            ) from error
        if isinstance(cause, psycopg.errors.CheckViolation) and cause.diag.constraint_name == "domain_name_check":
            raise BasculeError(f"{domain!r} is not a domain name") from error
        raise
    click.echo(f"{domain} is prepared. Next: bascule check {domain}")


@main.command("check")
@click.argument("domain", type=DOMAIN)
@click.option("--user", help="An address whose legacy password you know: logs in and lists its folders.")
@password_file
@click.pass_context
def check_command(context: click.Context, domain: str, user: str | None, password_file: Path | None) -> None:
    """Try the legacy servers of DOMAIN and say what is right and what is not. Exit status 1 if anything is wrong."""
    loaded = _settings(context)
    with connect(loaded.dsn(ROLE)) as connection:
        legacy_settings = _legacy_of(connection, domain)
    address = None if user is None else _address(user)
    if address is not None and address.domain != legacy_settings.domain:
        raise BasculeError(f"{address} is not an address of {legacy_settings.domain}")
    password = None if address is None else _password(f"Legacy password of {address}", password_file)
    findings = check.check_legacy(
        legacy_settings, Trust(loaded.legacy.ca_file, loaded.legacy.timeout), address, password
    )
    for finding in findings:
        click.echo(f"{'  good ' if finding.good else ' WRONG '} {finding.text}")
        if finding.remedy:
            click.echo(f"        -> {finding.remedy}")
    if not all(finding.good for finding in findings):
        sys.exit(1)


def _new_url(loaded: settings.Settings) -> tuple[str, str]:
    token = secrets.token_urlsafe(24)
    return token, f"{loaded.portal.public_url.rstrip('/')}/m/{token}"


@main.command()
@click.argument("domain", type=DOMAIN)
@click.option("--days", type=click.IntRange(1, 3650), default=90, show_default=True, help="How long the URL works.")
@click.pass_context
def activate(context: click.Context, domain: str, days: int) -> None:
    """Open DOMAIN for migration and print the URL for its users."""
    loaded = _settings(context)
    token, url = _new_url(loaded)
    with connect(loaded.dsn(ROLE)) as connection:
        value(
            connection,
            "SELECT bascule.activate_domain(%s, %s, make_interval(days => %s))",
            domain,
            token,
            days,
        )
    click.echo(url)


@main.command("rotate-url")
@click.argument("domain", type=DOMAIN)
@click.option("--days", type=click.IntRange(1, 3650), default=90, show_default=True, help="How long the URL works.")
@click.pass_context
def rotate_url(context: click.Context, domain: str, days: int) -> None:
    """Replace the URL of DOMAIN; the former one stops working at once."""
    loaded = _settings(context)
    token, url = _new_url(loaded)
    with connect(loaded.dsn(ROLE)) as connection:
        value(connection, "SELECT bascule.rotate_url(%s, %s, make_interval(days => %s))", domain, token, days)
    click.echo(url)


@main.command()
@click.argument("address")
@click.option("--first-name", default="")
@click.option("--last-name", default="")
@password_file
@click.pass_context
def request(context: click.Context, address: str, first_name: str, last_name: str, password_file: Path | None) -> None:
    """Ask for ADDRESS to be moved, for users whose legacy password you know, technical accounts among them."""
    loaded = _settings(context)
    wanted = _address(address)
    trust = Trust(loaded.legacy.ca_file, loaded.legacy.timeout)
    with connect(loaded.dsn(ROLE)) as connection:
        if connection.execute("SELECT FROM bascule.domain WHERE name = %s", (wanted.domain,)).fetchone() is None:
            raise BasculeError(f"{wanted} is not an address of a domain known here")
        legacy_settings = _legacy_of(connection, wanted.domain)
        refusal = check.recipient_refusal(legacy_settings, trust.timeout, wanted)
        if refusal is not None:
            raise BasculeError(f"the legacy server knows no {wanted}: {refusal}")
        password = _password(f"Legacy password of {wanted}", password_file)
        legacy.authenticate(legacy_settings, trust, wanted, password)
        sealed = Sealer(loaded.keys.public).seal(password)
        value(
            connection,
            "SELECT bascule.request_migration(%s, 'administrator', %s, %s, %s)",
            str(wanted),
            sealed,
            first_name,
            last_name,
        )
    click.echo(f"{wanted} will be moved")


@main.command()
@click.argument("address")
@click.argument("store")
@click.pass_context
def place(context: click.Context, address: str, store: str) -> None:
    """Have the mailbox of ADDRESS kept at STORE, not at its domain's; before it moves."""
    with connect(_settings(context).dsn(ROLE)) as connection:
        value(connection, "SELECT bascule.place(%s, %s)", str(_address(address)), store)
    click.echo(f"{address} will be kept at {store}")


@main.command()
@click.argument("alias")
@click.argument("mailbox")
@click.pass_context
def alias(context: click.Context, alias: str, mailbox: str) -> None:
    """Make the address ALIAS another name of MAILBOX."""
    with connect(_settings(context).dsn(ROLE)) as connection:
        value(connection, "SELECT bascule.assign_alias(%s, %s)", str(_address(alias)), str(_address(mailbox)))
    click.echo(f"{alias} is another name of {mailbox}")


@main.command()
@click.argument("address")
@click.option("--reason", required=True)
@click.pass_context
def waive(context: click.Context, address: str, reason: str) -> None:
    """Give ADDRESS up: it need not move, and is refused once the domain is closed."""
    with connect(_settings(context).dsn(ROLE)) as connection:
        value(connection, "SELECT bascule.waive_address(%s, %s)", str(_address(address)), reason)
    click.echo(f"{address} is given up")


@main.command()
@click.argument("address")
@click.pass_context
def retry(context: click.Context, address: str) -> None:
    """Try the migration of ADDRESS again now."""
    with connect(_settings(context).dsn(ROLE)) as connection:
        value(connection, "SELECT bascule.retry(%s)", str(_address(address)))
    click.echo(f"{address} is tried again")


@main.command("give-up")
@click.argument("address")
@click.option("--reason", required=True)
@click.pass_context
def give_up(context: click.Context, address: str, reason: str) -> None:
    """Stop the migration of ADDRESS before its cutover; it stays at the legacy server."""
    with connect(_settings(context).dsn(ROLE)) as connection:
        value(connection, "SELECT bascule.give_up(%s, %s)", str(_address(address)), reason)
    click.echo(f"{address} stays at the legacy server")


@main.command("return")
@click.argument("address")
@click.option("--reason", required=True)
@click.pass_context
def return_command(context: click.Context, address: str, reason: str) -> None:
    """Send ADDRESS, who has moved, back to the legacy server with everything that is new here."""
    with connect(_settings(context).dsn(ROLE)) as connection:
        value(connection, "SELECT bascule.return_mailbox(%s, %s)", str(_address(address)), reason)
    click.echo(f"{address} goes back to the legacy server; see bascule status {_address(address).domain}")


@main.command("cancel-return")
@click.argument("address")
@click.pass_context
def cancel_return(context: click.Context, address: str) -> None:
    """Call off a return that has not yet appended anything at the legacy server."""
    with connect(_settings(context).dsn(ROLE)) as connection:
        value(connection, "SELECT bascule.cancel_return(%s)", str(_address(address)))
    click.echo(f"{address} stays here")


@main.command("waive-messages")
@click.argument("address")
@click.option("--folder", help="Only in this folder, named as in bascule.unreadable.")
@click.option("--uid", type=click.IntRange(1), help="Only the message with this UID.")
@click.option("--reason", required=True)
@click.pass_context
def waive_messages(context: click.Context, address: str, folder: str | None, uid: int | None, reason: str) -> None:
    """Move ADDRESS without the messages that the legacy server does not give."""
    with connect(_settings(context).dsn(ROLE)) as connection:
        waived = value(
            connection, "SELECT bascule.waive_messages(%s, %s, %s, %s)", str(_address(address)), reason, folder, uid
        )
    click.echo(f"{address} moves without {waived} {'message' if waived == 1 else 'messages'}")


@main.group("copy-login")
def copy_login() -> None:
    """As whom the workers log in to the legacy server of a domain."""


def _set_copy_login(loaded: settings.Settings, domain: str, method: str, told: dict[str, str] | None) -> None:
    sealed = None if told is None else Sealer(loaded.keys.public).seal(Password(json.dumps(told)))
    with connect(loaded.dsn(ROLE)) as connection:
        _legacy_of(connection, domain)
        connection.execute(
            "UPDATE bascule.domain SET copy_login = %s, sealed_copy_login = %s WHERE name = %s",
            (method, sealed, domain),
        )
    click.echo(f"the mailboxes of {domain} are copied by: {method}")


@copy_login.command("user")
@click.argument("domain", type=DOMAIN)
@click.pass_context
def copy_login_user(context: click.Context, domain: str) -> None:
    """As each user, with the user's own password; this is how it begins."""
    _set_copy_login(_settings(context), domain, "user", None)


@copy_login.command("master")
@click.argument("domain", type=DOMAIN)
@click.argument("name")
@password_file
@click.pass_context
def copy_login_master(context: click.Context, domain: str, name: str, password_file: Path | None) -> None:
    """As a master user NAME, who may act as any user (SASL PLAIN with an authorization identity)."""
    password = _password(f"Password of {name}", password_file)
    _set_copy_login(_settings(context), domain, "master", {"name": name, "password": password.secret})


@copy_login.command("xoauth2")
@click.argument("domain", type=DOMAIN)
@click.option("--token-url", required=True, help="The token endpoint; it must be https.")
@click.option("--client-id", required=True)
@click.option("--scope", default="", help="As the provider wants it.")
@click.option(
    "--refresh-token-file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Of an offline consent; without one, the client's own credentials are used.",
)
@password_file
@click.pass_context
def copy_login_xoauth2(
    context: click.Context,
    domain: str,
    token_url: str,
    client_id: str,
    scope: str,
    refresh_token_file: Path | None,
    password_file: Path | None,
) -> None:
    """With access tokens of an OAuth 2.0 client. The client secret is asked for, or read from the password file."""
    if not token_url.startswith("https://"):
        raise BasculeError("the token endpoint must be https: it is told the client's secret")
    told = {"token_url": token_url, "client_id": client_id, "scope": scope}
    told["client_secret"] = _password(f"Client secret of {client_id}", password_file).secret
    if refresh_token_file is not None:
        told["refresh_token"] = refresh_token_file.read_text().strip()
    _set_copy_login(_settings(context), domain, "xoauth2", told)


@main.command()
@click.argument("domain", type=DOMAIN, required=False)
@click.pass_context
def status(context: click.Context, domain: str | None) -> None:
    """Show the domains, or who of DOMAIN has moved, moves, or is forgotten."""
    with connect(_settings(context).dsn(ROLE)) as connection:
        if domain is None:
            for row in connection.execute(
                "SELECT domain, mode, migrated, pending, forgotten FROM bascule.domains ORDER BY 1"
            ):
                click.echo("{}: {}, {} migrated, {} pending, {} forgotten".format(*row))
            return
        _legacy_of(connection, domain)
        for title, query in (
            (
                "migrated",
                "SELECT address, messages_total || ' messages, since ' || to_char(migrated_at, 'YYYY-MM-DD HH24:MI') "
                "FROM bascule.migrated WHERE domain = %s ORDER BY 1",
            ),
            (
                "pending",
                "SELECT address, state || ', ' || messages_copied || ' of ' || messages_total || ' messages' "
                "|| coalesce(': ' || problem, '') FROM bascule.pending WHERE domain = %s ORDER BY 1",
            ),
            (
                "forgotten",
                "SELECT address, messages || ' messages, last ' || to_char(last_seen, 'YYYY-MM-DD HH24:MI') "
                "FROM bascule.forgotten WHERE domain = %s ORDER BY 1",
            ),
        ):
            rows = connection.execute(query.encode(), (domain,)).fetchall()
            click.echo(f"{title}: {len(rows) or 'nobody'}")
            for address, text in rows:
                click.echo(f"  {address}  {text}")


@main.command()
@click.argument("domain", type=DOMAIN)
@click.option("--force", is_flag=True, help="Close though somebody is forgotten; they are named in the journal.")
@click.option("--reason", default="", help="Why; required with --force.")
@click.pass_context
def close(context: click.Context, domain: str, force: bool, reason: str) -> None:
    """End the migration of DOMAIN: no relay any more, passwords erased. Refused while anybody would be forgotten."""
    with connect(_settings(context).dsn(ROLE)) as connection:
        value(connection, "SELECT bascule.close_domain(%s, %s, %s)", domain, force, reason)
    click.echo(f"{domain} is closed: the legacy server is no longer used")


if __name__ == "__main__":
    main()
