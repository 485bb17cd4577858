"""Before any domain: the schema, the keys, the stores."""

from __future__ import annotations

from pathlib import Path

import click
import psycopg

from bascule import letters, schema
from bascule.address import Address
from bascule.cli.base import database, main, settings_of
from bascule.credential import create_keys
from bascule.errors import BasculeError
from bascule.language import LANGUAGES


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
