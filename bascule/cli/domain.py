"""A domain from its settings to its end: prepare, check, activate, close."""

from __future__ import annotations

import json
import secrets
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import click
import psycopg

from bascule import check, settings
from bascule.address import Address, domain_name
from bascule.check import Finding
from bascule.cli.base import (
    ADDRESS,
    DOMAIN,
    database,
    legacy_of,
    main,
    parsed,
    password_file,
    password_of,
    reason,
    settings_of,
)
from bascule.credential import Password, Sealer
from bascule.database import value
from bascule.errors import BasculeError
from bascule.language import LANGUAGES
from bascule.legacy import Trust

MARKS = {
    "good": click.style("  good ", fg="green"),
    "note": click.style("  note ", fg="yellow"),
    "wrong": click.style(" WRONG ", fg="red", bold=True),
}

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
@click.option("--quiet-period", default="1 day", show_default=True, help="No late message for so long before closing.")
@click.option(
    "--language",
    type=click.Choice(LANGUAGES),
    default="en",
    show_default=True,
    help="Of users who chose none.",
)
@click.option(
    "--messages/--no-messages",
    "writes_to_users",
    default=True,
    show_default=True,
    help="Whether users get a welcome, and a message when their move waits for their password.",
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
        with database(context) as connection:
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
@click.option(
    "--user",
    type=ADDRESS,
    help="An address whose legacy password you know: logs in, looks around, and sends it a probe message.",
)
@password_file
@click.option("--legacy-only", is_flag=True, help="Only the legacy server; not the DNS, nor Postfix and Dovecot here.")
@click.option("--json", "as_json", is_flag=True, help="The findings as JSON, for programs.")
@click.pass_context
def check_command(
    context: click.Context,
    domain: str,
    user: str | None,
    password_file: Path | None,
    legacy_only: bool,
    as_json: bool,
) -> None:
    """Try everything that DOMAIN needs and say what is right and what is not. Exit status 1 if anything is wrong."""
    loaded = settings_of(context)
    with database(context) as connection:
        legacy = legacy_of(connection, domain)
        address = None if user is None else Address.parse(user)
        if address is not None and address.domain != legacy.domain:
            raise BasculeError(f"{address} is not an address of {legacy.domain}")
        password = None if address is None else password_of(f"Legacy password of {address}", password_file)
        trust = Trust(loaded.legacy.ca_file, loaded.legacy.timeout)
        findings = list(_told(check.check_legacy(legacy, trust, address, password), as_json=as_json))
        wrong = any(finding.level == "wrong" for finding in findings)
        if wrong and not legacy_only:
            rest = Finding(
                "note", "bascule", "DNS, Postfix and Dovecot here were not tried", "Correct the above first."
            )
            findings += _told(iter([rest]), as_json=as_json)
        elif not legacy_only:
            site = check.check_site(connection, loaded, legacy, trust, address, password)
            findings += _told(site, as_json=as_json)
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in findings], indent=2, ensure_ascii=False))
    if any(finding.level == "wrong" for finding in findings):
        sys.exit(1)


def _told(findings: Iterator[Finding], *, as_json: bool) -> Iterator[Finding]:
    """Each as it comes: some take a while."""
    for finding in findings:
        if not as_json:
            click.echo(f"{MARKS[finding.level]} {finding.area}: {finding.text}")
            if finding.remedy:
                click.echo(f"        -> {finding.remedy}")
        yield finding


days = click.option(
    "--days", type=click.IntRange(1, 3650), default=90, show_default=True, help="How long the URL works."
)


def _new_url(loaded: settings.Settings) -> tuple[str, str]:
    token = secrets.token_urlsafe(24)
    return token, loaded.portal.url(token)


@main.command()
@click.argument("domain", type=DOMAIN)
@days
@click.pass_context
def activate(context: click.Context, domain: str, days: int) -> None:
    """Open DOMAIN for migration and print the URL for its users."""
    loaded = settings_of(context)
    token, url = _new_url(loaded)
    with database(context) as connection:
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
@days
@click.pass_context
def rotate_url(context: click.Context, domain: str, days: int) -> None:
    """Replace the URL of DOMAIN; the former one stops working at once."""
    loaded = settings_of(context)
    token, url = _new_url(loaded)
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


def _set_copy_login(context: click.Context, domain: str, method: str, told: dict[str, str] | None) -> None:
    sealed = None if told is None else Sealer(settings_of(context).keys.public).seal(Password(json.dumps(told)))
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
        raise BasculeError("the token endpoint must be https: it is told the client's secret")
    told = {"token_url": token_url, "client_id": client_id, "scope": scope}
    told["client_secret"] = password_of(f"Client secret of {client_id}", password_file).secret
    if refresh_token_file is not None:
        told["refresh_token"] = refresh_token_file.read_text().strip()
    _set_copy_login(context, domain, "xoauth2", told)


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
