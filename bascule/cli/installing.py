"""Before any domain: the schema, the keys, the stores."""

from __future__ import annotations

from pathlib import Path

import click
import psycopg
from psycopg import sql

from bascule import letters, schema
from bascule.address import Address
from bascule.cli.base import database, main, password_file, password_of, settings_of
from bascule.credential import Unsealer, create_keys, forget_former_keys, rotate_keys
from bascule.database import connect, value
from bascule.errors import BasculeError, CannotUnseal
from bascule.language import LANGUAGES

OUTDATED, LATER = 3, 4  # exit status
LOGIN_ROLES = [f"bascule_{part}" for part in ("admin", "worker", "portal", "authenticator", "policy_daemon", "dovecot")]
#: What is sealed, by the function that seals it anew.
SEALED = {
    "reseal_mailbox": "SELECT id, full_address, sealed_credential FROM bascule.mailbox "
    "WHERE sealed_credential IS NOT NULL ORDER BY id",
    "reseal_domain": "SELECT id, name, sealed_copy_login FROM bascule.domain "
    "WHERE sealed_copy_login IS NOT NULL ORDER BY id",
}


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


@db.command("status")
@click.option("--dsn", required=True, help="libpq connection string of a role that may see the schema.")
def db_status(dsn: str) -> None:
    """Say whether the schema is this version's; exit status 3 if it is not, 4 if it is a later one's."""
    if schema.is_current(dsn):
        click.echo(f"the schema is this version's: {schema.head()}")
        return
    if schema.is_later(dsn):
        click.echo(f"the schema is a later version's: {schema.current(dsn)}; this one's is {schema.head()}")
        click.get_current_context().exit(LATER)
    click.echo(f"the schema is not this version's: {schema.current(dsn) or 'none'}, to become {schema.head()}")
    click.get_current_context().exit(OUTDATED)


@db.command("password")
@click.argument("role", type=click.Choice(LOGIN_ROLES))
@click.option("--dsn", required=True, help="libpq connection string of a role that may alter it.")
@password_file
def db_password(role: str, dsn: str, password_file: Path | None) -> None:
    """Set the password with which ROLE comes from another host; PostgreSQL gets a SCRAM verifier only."""
    password = password_of(f"Password of {role}", password_file)
    with connect(dsn) as connection:
        verifier = connection.pgconn.encrypt_password(password.secret.encode(), role.encode(), b"scram-sha-256")
        statement = sql.SQL("ALTER ROLE {} PASSWORD {}").format(sql.Identifier(role), sql.Literal(verifier.decode()))
        connection.execute(statement)
    click.echo(f"{role}: password set")


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


@keys.command("rotate")
@click.argument("public", type=click.Path(path_type=Path))
@click.argument("private", type=click.Path(path_type=Path))
def keys_rotate(public: Path, private: Path) -> None:
    """Put a new pair into PUBLIC and PRIVATE, the former private key below the new one.

    Then give PRIVATE to every host with workers and restart them, after that
    PUBLIC to every host; run `bascule keys reseal`, and `bascule keys forget`.
    """
    rotate_keys(public, private)
    click.echo(f"{private} first goes to every host with workers, then {public} to every host; then: keys reseal.")


@keys.command("forget")
@click.argument("private", type=click.Path(path_type=Path))
def keys_forget(private: Path) -> None:
    """Take the former keys out of PRIVATE, after `bascule keys reseal`."""
    forget_former_keys(private)
    click.echo(f"{private} holds one key")


@keys.command("reseal")
@click.pass_context
def keys_reseal(context: click.Context) -> None:
    """Seal every stored password anew, to the first key in the private key's file.

    To be run as the workers' user, on a host with a worker, after all hosts
    have the new public key. Then nothing needs the former key any more.
    """
    configuration = settings_of(context)
    unsealer = Unsealer(configuration.keys.private)
    done = 0
    lost: list[str] = []
    with connect(configuration.dsn("worker")) as connection:
        for function, query in SEALED.items():
            for row_id, name, sealed in connection.execute(query.encode()).fetchall():
                try:
                    anew = unsealer.reseal(sealed)
                except CannotUnseal:
                    lost.append(name)
                    continue
                if anew is not None and value(
                    connection, f"SELECT bascule.{function}(%s, %s, %s)", row_id, sealed, anew
                ):
                    done += 1
    click.echo(f"{done} sealed anew, to the first key in {configuration.keys.private}")
    if lost:
        raise BasculeError(
            f"sealed to a key that is not in that file: {', '.join(lost)}",
            hint="Keep the former key until they are: add it to the file as a line of its own, or ask for the "
            "passwords again.",
        )


@main.command()
@click.argument("name")
@click.argument("lmtp_next_hop")
@click.option(
    "--login-host", help="Where Dovecot on other hosts proxies its users to; needed if there are several stores."
)
@click.pass_context
def store(context: click.Context, name: str, lmtp_next_hop: str, login_host: str | None) -> None:
    """Record the Dovecot store NAME, reached by LMTP_NEXT_HOP (unix:private/dovecot-lmtp, inet:host:24)."""
    with database(context) as connection:
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


@main.command("letters")
@click.option("--language", type=click.Choice(LANGUAGES), default="en", show_default=True)
@click.pass_context
def letters_command(context: click.Context, language: str) -> None:
    """Show what users are written to, in one language; every template is tried in all of them."""
    users = settings_of(context).users
    letters.check(users)
    somebody = Address("alice", "example.org")
    for kind in letters.KINDS:
        for each in LANGUAGES:
            if each == language:
                text = letters.compose(
                    kind,
                    each,
                    users,
                    address=somebody,
                    message_id="<x@example.org>",
                    url="https://move.example.org/m/...",
                )
                click.echo(f"--- {kind}\n{letters.readable(text)}")
