"""What all commands share: the group, domains and addresses as arguments, passwords, the database."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from bascule import __version__, legacy, settings
from bascule.address import Address, domain_name
from bascule.credential import Password
from bascule.database import Connection, connect
from bascule.errors import BadAddress, BasculeError
from bascule.legacy import LegacySettings
from bascule.program import keep_memory_private, settings_option, spoken

ROLE = "admin"
MOST_COMPLETIONS = 50


class Cli(click.Group):
    """A group whose commands say our errors in words, with exit status 1."""

    def invoke(self, ctx: click.Context) -> Any:
        with spoken():
            return super().invoke(ctx)


def _complete(ctx: click.Context, query: str, incomplete: str) -> list[CompletionItem]:
    """What the database offers; nothing if it cannot be asked: a shell is no place for errors."""
    path = ctx.find_root().params.get("path", settings.DEFAULT_PATH)
    try:
        with connect(settings.load(path).dsn(ROLE)) as connection:
            rows = connection.execute(query.encode(), (incomplete.lower(), MOST_COMPLETIONS)).fetchall()
    except BasculeError:
        return []
    return [CompletionItem(row[0]) for row in rows]


class _DomainName(click.ParamType[str]):
    name = "domain"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            return domain_name(value)
        except BadAddress as error:
            self.fail(error.message, param, ctx)

    def shell_complete(self, ctx: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return _complete(
            ctx, "SELECT domain FROM bascule.domains WHERE starts_with(domain, %s) ORDER BY 1 LIMIT %s", incomplete
        )


class _AddressOfUser(click.types.StringParamType):
    name = "address"

    def shell_complete(self, ctx: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return _complete(
            ctx, "SELECT address FROM bascule.mailboxes WHERE starts_with(address, %s) ORDER BY 1 LIMIT %s", incomplete
        )


#: A domain as a person writes it, in A-labels.
DOMAIN = _DomainName()
#: The address of a user, as a person writes it.
ADDRESS = _AddressOfUser()


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
      bascule status example.org --watch  who has moved, who moves, who is forgotten
      bascule report example.org          what was compared, for each who has moved
      bascule close example.org           refused while anybody would be forgotten
    """
    keep_memory_private()
    context.obj = path


def settings_of(context: click.Context) -> settings.Settings:
    """The settings file that the command was given."""
    loaded: settings.Settings = settings.load(context.obj)
    return loaded


@contextmanager
def database(context: click.Context) -> Iterator[Connection]:
    """The database, as an administrator."""
    with connect(settings_of(context).dsn(ROLE)) as connection:
        yield connection


def parsed(text: str) -> str:
    """An address as it is written in the database.

    Raises:
        BadAddress
    """
    return str(Address.parse(text))


def legacy_of(connection: Connection, domain: str) -> LegacySettings:
    """The legacy server of a domain.

    Raises:
        BasculeError: no such domain is known.
    """
    row = connection.execute(
        f"SELECT {legacy.COLUMNS} FROM bascule.domain WHERE name = %s".encode(),
        (domain,),
    ).fetchone()
    if row is None:
        raise BasculeError(f"no domain {domain} is known here", hint="Tell its legacy server first: bascule prepare.")
    return legacy.from_row(*row)


def password_of(prompt: str, file: Path | None) -> Password:
    """A password from a file (``-``: standard input), or asked for at the terminal."""
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
reason = click.option("--reason", required=True, help="Why; it is kept in the journal.")
