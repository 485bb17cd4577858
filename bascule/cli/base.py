"""What all commands share: domains and addresses as arguments, passwords, the database, words for the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from bascule import settings
from bascule.address import Address, domain_name
from bascule.cli.command import main
from bascule.database import Connection, connect
from bascule.errors import BadAddress, BasculeError
from bascule.words import printable_lines

if TYPE_CHECKING:
    from bascule.credential import Password
    from bascule.legacy import LegacySettings

__all__ = [
    "ADDRESS", "DOMAIN", "ROLE", "database", "insist_on_known", "legacy_of", "main", "parsed", "password_file",
    "password_of", "reason", "say", "settings_of",
]  # fmt: skip

ROLE = "admin"
MOST_COMPLETIONS = 50


def _complete(ctx: click.Context, query: str, incomplete: str) -> list[CompletionItem]:
    """What the database offers; nothing if it cannot be asked: a shell is no place for errors."""
    path = ctx.find_root().params.get("path") or settings.DEFAULT_PATH
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


def settings_of(context: click.Context) -> settings.Settings:
    """The settings file that the command was given."""
    loaded: settings.Settings = settings.load(context.obj)
    return loaded


@contextmanager
def database(context: click.Context) -> Iterator[Connection]:
    """The database, as an administrator."""
    with connect(settings_of(context).dsn(ROLE)) as connection:
        yield connection


def say(text: str) -> None:
    """Print what may quote a server or a folder's name: nothing in it moves the cursor or hides a word."""
    click.echo(printable_lines(text))


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
    from bascule import legacy  # noqa: PLC0415 (imapclient is slow to start, and most commands ask no server)

    row = connection.execute(
        f"SELECT {legacy.COLUMNS} FROM bascule.domain WHERE name = %s".encode(), (domain,)
    ).fetchone()
    if row is None:
        raise _unknown(domain)
    return legacy.from_row(*row)


def insist_on_known(connection: Connection, domain: str) -> str:
    """The name of the domain's legacy IMAP server.

    Raises:
        BasculeError: no such domain is known.
    """
    row = connection.execute("SELECT imap_host FROM bascule.domain WHERE name = %s", (domain,)).fetchone()
    if row is None:
        raise _unknown(domain)
    return str(row[0])


def _unknown(domain: str) -> BasculeError:
    return BasculeError(f"no domain {domain} is known here", hint="Record its legacy server first: bascule domain add.")


def password_of(prompt: str, file: Path | None) -> Password:
    """A password from a file (``-``: standard input), or asked for at the terminal."""
    from bascule.credential import Password  # noqa: PLC0415 (most commands ask for none)

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
