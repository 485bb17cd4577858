"""A domain from its settings to its end: add, set, remove, copy-login, pause, close."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import psycopg

from bascule import settings
from bascule.address import domain_name
from bascule.cli.base import (
    DOMAIN,
    database,
    legacy_of,
    main,
    parsed,
    password_file,
    password_of,
    reason,
    say,
    settings_of,
)
from bascule.cli.options import SETTINGS, missing, named, of_a_domain, of_new
from bascule.credential import Password, Sealer
from bascule.database import Connection, value
from bascule.errors import BasculeError

Values = dict[str, Any]


@main.group()
def domain() -> None:
    """The domains: add, set, remove, show, list."""


@domain.command("add")
@click.argument("name", type=DOMAIN)
@of_a_domain(required=True)
@click.pass_context
def domain_add(context: click.Context, /, name: str, **values: Any) -> None:
    """Record the domain NAME and how its legacy server is reached. Nobody moves yet."""
    _add(context, name, values)
    click.echo(f"{name} is prepared. Next: bascule check {name}")


@domain.command("set")
@click.argument("name", type=DOMAIN)
@of_a_domain(required=False)
@click.pass_context
def domain_set(context: click.Context, /, name: str, **values: Any) -> None:
    """Change what is named of the domain NAME, and nothing else."""
    changes = _set(context, name, values)
    if not changes:
        raise click.UsageError("Name what is to be changed: bascule domain set --help.")


@main.command(deprecated="say: bascule domain add, bascule domain set")
@click.argument("name", metavar="DOMAIN", type=DOMAIN)
@of_a_domain(required=False)
@click.pass_context
def prepare(context: click.Context, /, name: str, **values: Any) -> None:
    """Record how the legacy server of DOMAIN is reached; change only what is named. Nobody moves yet."""
    if _is_known(context, name):
        _set(context, name, values)
        return
    lacking = missing(values)
    if lacking:
        raise click.UsageError(f"Missing option '{lacking[0]}'.")
    _add(context, name, values)
    click.echo(f"{name} is prepared. Next: bascule check {name}")


def _is_known(context: click.Context, name: str) -> bool:
    with database(context) as connection:
        return bool(value(connection, "SELECT true FROM bascule.domain WHERE name = %s", name))


def _add(context: click.Context, name: str, values: Values) -> None:
    columns = of_new(values)
    places = ", ".join(["%s"] * len(columns))
    with _written(context, name, columns) as connection:
        connection.execute(
            f"INSERT INTO bascule.domain (name, {', '.join(columns)}) VALUES (%s, {places})".encode(),
            (name, *columns.values()),
        )


def _set(context: click.Context, name: str, values: Values) -> Values:
    """Change the columns that are named; say which of them became another."""
    columns = named(values)
    if not columns:
        return columns
    names = ", ".join(columns)
    with _written(context, name, columns) as connection:
        connection.add_notice_handler(_pass_on)
        with connection.transaction():
            before = _row(connection, name, names)
            assignments = ", ".join(f"{column} = %s" for column in columns)
            connection.execute(
                f"UPDATE bascule.domain SET {assignments} WHERE name = %s".encode(), (*columns.values(), name)
            )
            after = _row(connection, name, names)
    became = zip(columns, before, after, strict=True)
    changed = [f"{column} {_shown(old)} -> {_shown(new)}" for column, old, new in became if old != new]
    say(f"{name}: {', '.join(changed) or 'it was so already'}; all else is as it was")
    return columns


def _row(connection: Connection, name: str, columns: str) -> tuple[Any, ...]:
    found = connection.execute(f"SELECT {columns} FROM bascule.domain WHERE name = %s".encode(), (name,)).fetchone()
    if found is None:
        raise BasculeError(
            f"no domain {name} is known here", hint="Record its legacy server first: bascule domain add."
        )
    return found


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "off" if value is None else str(value)


def _pass_on(notice: psycopg.errors.Diagnostic) -> None:
    """What the database says besides, on what was erased because of a change, for instance."""
    say(f"{notice.message_primary or ''}" + (f"\n{notice.message_hint}" if notice.message_hint else ""))


@contextmanager
def _written(context: click.Context, name: str, columns: Values) -> Iterator[Connection]:
    """A connection on which a domain is written; its refusals in the words of the command line."""
    try:
        with database(context) as connection:
            yield connection
    except BasculeError as error:
        cause = error.__cause__
        if isinstance(cause, psycopg.errors.UniqueViolation):
            raise BasculeError(
                f"{name} is known here already", hint=f"Change it by: bascule domain set {name}."
            ) from error
        if isinstance(cause, psycopg.errors.ForeignKeyViolation):
            raise BasculeError(
                f"no store {columns['store']!r} is known", hint="Record it first: bascule store."
            ) from error
        if isinstance(cause, psycopg.errors.CheckViolation) and cause.diag.constraint_name == "domain_name_check":
            raise BasculeError(f"{name!r} is not a domain name") from error
        raise


@domain.command("remove")
@click.argument("name", type=DOMAIN)
@click.option("--reason", default="", help="Why; required if users had moved and were sent back.")
@click.pass_context
def domain_remove(context: click.Context, name: str, reason: str) -> None:
    """Take the domain NAME out again: a mistake, or nobody moves. Refused while anybody has moved or moves."""
    with database(context) as connection:
        value(connection, "SELECT bascule.remove_domain(%s, %s)", name, reason)
    click.echo(f"{name} is known here no more; the journal keeps what was done")


@domain.command("show")
@click.argument("name", type=DOMAIN)
@click.option("--json", "as_json", is_flag=True, help="As JSON, for programs.")
@click.pass_context
def domain_show(context: click.Context, name: str, as_json: bool) -> None:
    """Show what is set for the domain NAME."""
    columns = ["mode", *(each.column for each in SETTINGS)]
    with database(context) as connection:
        row = _row(connection, name, ", ".join(columns))
    if as_json:
        plain = (found if isinstance(found, int | None) else str(found) for found in row)
        shown = dict(zip(columns, plain, strict=True))
        click.echo(json.dumps({"domain": name} | shown, indent=2))
        return
    say(f"{name}: {row[0]}")
    for setting, found in zip(SETTINGS, row[1:], strict=True):
        say(f"  {setting.option.partition('/')[0]:<26} {_shown(found)}")


@domain.command("list")
@click.pass_context
def domain_list(context: click.Context) -> None:
    """List the domains, with their legacy servers."""
    with database(context) as connection:
        rows = connection.execute("SELECT name, mode, imap_host FROM bascule.domain ORDER BY 1").fetchall()
    for name, mode, imap_host in rows:
        say(f"{name}: {mode}, legacy server {imap_host}")


days = click.option(
    "--days", type=click.IntRange(1, 3650), default=90, show_default=True, help="How long the URL works."
)


def new_url(loaded: settings.Settings) -> tuple[str, str]:
    token = secrets.token_urlsafe(24)
    return token, loaded.portal.url(token)


@main.command("rotate-url")
@click.argument("domain", type=DOMAIN)
@days
@click.pass_context
def rotate_url(context: click.Context, domain: str, days: int) -> None:
    """Replace the URL of DOMAIN; the former one stops working at once."""
    loaded = settings_of(context)
    token, url = new_url(loaded)
    with database(context) as connection:
        value(connection, "SELECT bascule.rotate_url(%s, %s, make_interval(days => %s))", domain, token, days)
    click.echo(url)


@main.command()
@click.argument("who")
@reason
@click.pass_context
def pause(context: click.Context, who: str, reason: str) -> None:
    """Have workers leave WHO, an address or a whole domain, alone until it is resumed. Mail and logins go on."""
    with database(context) as connection:
        if "@" in who:
            value(connection, "SELECT bascule.pause(%s, %s)", parsed(who), reason)
        else:
            value(connection, "SELECT bascule.pause_domain(%s, %s)", domain_name(who), reason)
    click.echo(f"{who} waits until: bascule resume {who}")


@main.command()
@click.argument("who")
@click.pass_context
def resume(context: click.Context, who: str) -> None:
    """Let WHO, an address or a whole domain, go on where it stopped."""
    with database(context) as connection:
        if "@" in who:
            value(connection, "SELECT bascule.resume(%s)", parsed(who))
        else:
            value(connection, "SELECT bascule.resume_domain(%s)", domain_name(who))
    click.echo(f"{who} goes on")


@main.group("copy-login")
def copy_login() -> None:
    """As whom the workers log in to the legacy server of a domain."""


def _set_copy_login(context: click.Context, domain: str, method: str, secrets: dict[str, str] | None) -> None:
    sealed = None if secrets is None else Sealer(settings_of(context).keys.public).seal(Password(json.dumps(secrets)))
    with database(context) as connection:
        legacy_of(connection, domain)
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
    _set_copy_login(context, domain, "user", None)


@copy_login.command("master")
@click.argument("domain", type=DOMAIN)
@click.argument("name")
@password_file
@click.pass_context
def copy_login_master(context: click.Context, domain: str, name: str, password_file: Path | None) -> None:
    """As a master user NAME, who may act as any user (SASL PLAIN with an authorization identity)."""
    password = password_of(f"Password of {name}", password_file)
    _set_copy_login(context, domain, "master", {"name": name, "password": password.secret})


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
        raise BasculeError("the token endpoint must be https: the client's secret is sent there")
    secrets = {"token_url": token_url, "client_id": client_id, "scope": scope}
    secrets["client_secret"] = password_of(f"Client secret of {client_id}", password_file).secret
    if refresh_token_file is not None:
        secrets["refresh_token"] = refresh_token_file.read_text().strip()
    _set_copy_login(context, domain, "xoauth2", secrets)


@main.command()
@click.argument("domain", type=DOMAIN)
@click.option(
    "--force", is_flag=True, help="Close though something is in the way; it is named, and kept in the journal."
)
@click.option("--reason", default="", help="Why; required with --force.")
@click.option("--yes", is_flag=True, help="With --force: do not ask.")
@click.pass_context
def close(context: click.Context, domain: str, force: bool, reason: str, yes: bool) -> None:
    """End the migration of DOMAIN: no relay any more, passwords erased. Refused while anybody would be forgotten."""
    with database(context) as connection:
        if force:
            _name_consequences(context, domain, ask=not yes)
        value(connection, "SELECT bascule.close_domain(%s, %s, %s)", domain, force, reason)
    click.echo(f"{domain} is closed: the legacy server is no longer used")


def _name_consequences(context: click.Context, domain: str, *, ask: bool) -> None:
    """What closing by force will do, to whom."""
    with database(context) as connection:
        rows = connection.execute(
            "SELECT address, why, consequence FROM bascule.closing_obstacles WHERE domain = %s ORDER BY 1", (domain,)
        ).fetchall()
    if not rows:
        click.echo("nothing is in the way")
        return
    click.echo("this will happen:")
    for address, why, consequence in rows:
        click.echo(f"  {address} ({why}): {consequence}")
    if ask:
        click.confirm(f"close {domain} all the same?", abort=True)
