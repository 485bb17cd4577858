"""Users, one by one or many at once: requests, aliases, waivers, and what to do when something is stuck."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import TextIO

import click

from bascule.address import Address
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
    say,
    settings_of,
)
from bascule.database import value
from bascule.desk import BAD, Applicant, Desk, Outcome, import_all, read_applicants
from bascule.errors import BasculeError


@main.command()
@click.argument("address", type=ADDRESS)
@click.option("--first-name", default="")
@click.option("--last-name", default="")
@password_file
@click.pass_context
def request(context: click.Context, address: str, first_name: str, last_name: str, password_file: Path | None) -> None:
    """Ask for ADDRESS to be moved, for users whose legacy password you know, technical accounts among them."""
    loaded = settings_of(context)
    wanted = Address.parse(address)
    with database(context) as connection:
        if connection.execute("SELECT FROM bascule.domain WHERE name = %s", (wanted.domain,)).fetchone() is None:
            raise BasculeError(f"{wanted} is not an address of a domain known here")
        desk = Desk(connection, loaded, legacy_of(connection, wanted.domain))
        desk.insist_that_it_exists(wanted)
        password = password_of(f"Legacy password of {wanted}", password_file)
        desk.request(Applicant(wanted, first_name, last_name, password))
    click.echo(f"{wanted} will be moved")


@main.command()
@click.argument("address", type=ADDRESS)
@click.option("--first-name", default="")
@click.option("--last-name", default="")
@click.pass_context
def expect(context: click.Context, address: str, first_name: str, last_name: str) -> None:
    """Tell of ADDRESS at the legacy server: the domain cannot be closed until it has moved or is waived."""
    with database(context) as connection:
        new = value(connection, "SELECT bascule.expect(%s, %s, %s)", parsed(address), first_name, last_name)
    click.echo(f"{address} is expected" if new else f"{address} was known already")


@main.command("import")
@click.argument("domain", type=DOMAIN)
@click.argument("file", type=click.File("r", encoding="utf-8-sig"))
@click.option("--at-once", type=click.IntRange(1, 64), default=8, show_default=True, help="Logins tried at a time.")
@click.option("--dry-run", is_flag=True, help="Try every login, request nothing.")
@click.pass_context
def import_command(context: click.Context, domain: str, file: TextIO, at_once: int, dry_run: bool) -> None:
    """Ask for all users of DOMAIN in FILE to be moved (CSV; - for standard input).

    The first line names the columns: address, password, and if you like first_name and last_name. A user without a
    password is only expected. A file with a mistake is refused whole; a password that the legacy server refuses is
    told, and the others go on. It can be run again: who is on the move already is left alone.
    """
    applicants = read_applicants(file, domain)
    loaded = settings_of(context)
    with database(context) as connection:
        legacy = legacy_of(connection, domain)
    counts: Counter[Outcome] = Counter()
    with click.progressbar(length=len(applicants), label="users", file=sys.stderr) as bar:
        for applicant, outcome, why in import_all(loaded, legacy, applicants, at_once=at_once, dry_run=dry_run):
            counts[outcome] += 1
            bar.update(1)
            if outcome in BAD:
                say(f"{applicant.address}: {why}")
    for outcome in counts:
        click.echo(f"{counts[outcome]} {outcome}")
    if any(outcome in BAD for outcome in counts):
        sys.exit(1)


@main.command()
@click.argument("address", type=ADDRESS)
@click.argument("store")
@click.pass_context
def place(context: click.Context, address: str, store: str) -> None:
    """Have the mailbox of ADDRESS kept at STORE, not at its domain's; before it moves."""
    with database(context) as connection:
        value(connection, "SELECT bascule.place(%s, %s)", parsed(address), store)
    click.echo(f"{address} will be kept at {store}")


@main.command()
@click.argument("alias")
@click.argument("mailbox", type=ADDRESS, required=False)
@click.option("--remove", is_flag=True, help="Take the alias back.")
@click.pass_context
def alias(context: click.Context, alias: str, mailbox: str | None, remove: bool) -> None:
    """Make the address ALIAS another name of MAILBOX."""
    if remove == (mailbox is not None):
        raise click.UsageError("Give either MAILBOX or --remove.")
    with database(context) as connection:
        if mailbox is None:
            value(connection, "SELECT bascule.remove_alias(%s)", parsed(alias))
        else:
            value(connection, "SELECT bascule.assign_alias(%s, %s)", parsed(alias), parsed(mailbox))
    click.echo(f"{alias} is no alias any more" if mailbox is None else f"{alias} is another name of {mailbox}")


@main.command()
@click.argument("address", type=ADDRESS)
@click.option("--reason", help="Why; it is kept in the journal.")
@click.option("--undo", is_flag=True, help="Take it back.")
@click.pass_context
def waive(context: click.Context, address: str, reason: str | None, undo: bool) -> None:
    """Give ADDRESS up: it need not move, and is refused once the domain is closed."""
    if undo == (reason is not None):
        raise click.UsageError("Give either --reason or --undo.")
    with database(context) as connection:
        if undo:
            value(connection, "SELECT bascule.unwaive_address(%s)", parsed(address))
        else:
            value(connection, "SELECT bascule.waive_address(%s, %s)", parsed(address), reason)
    click.echo(f"{address} is not given up any more" if undo else f"{address} is given up")


@main.command()
@click.argument("address", type=ADDRESS)
@click.pass_context
def retry(context: click.Context, address: str) -> None:
    """Try the migration of ADDRESS again now."""
    with database(context) as connection:
        value(connection, "SELECT bascule.retry(%s)", parsed(address))
    click.echo(f"{address} is tried again")


@main.command("give-up")
@click.argument("address", type=ADDRESS)
@reason
@click.pass_context
def give_up(context: click.Context, address: str, reason: str) -> None:
    """Stop the migration of ADDRESS before its cutover; it stays at the legacy server."""
    with database(context) as connection:
        value(connection, "SELECT bascule.give_up(%s, %s)", parsed(address), reason)
    click.echo(f"{address} stays at the legacy server")


@main.command("return")
@click.argument("address", type=ADDRESS)
@reason
@click.option("--force", is_flag=True, help="Also when most of a folder is gone here, or one was made anew there.")
@click.pass_context
def return_command(context: click.Context, address: str, reason: str, force: bool) -> None:
    """Send ADDRESS, who has moved, back to the legacy server with everything that is new here."""
    with database(context) as connection:
        value(connection, "SELECT bascule.return_mailbox(%s, %s, %s)", parsed(address), reason, force)
    click.echo(f"{address} goes back to the legacy server; see bascule status {Address.parse(address).domain}")


@main.command("cancel-return")
@click.argument("address", type=ADDRESS)
@click.pass_context
def cancel_return(context: click.Context, address: str) -> None:
    """Call off a return; what it has written to the legacy server stays there."""
    with database(context) as connection:
        value(connection, "SELECT bascule.cancel_return(%s)", parsed(address))
    click.echo(f"{address} stays here")


@main.command("waive-messages")
@click.argument("address", type=ADDRESS)
@click.option("--folder", help="Only in this folder, named as in bascule.unreadable.")
@click.option("--uid", type=click.IntRange(1), help="Only the message with this UID.")
@reason
@click.pass_context
def waive_messages(context: click.Context, address: str, folder: str | None, uid: int | None, reason: str) -> None:
    """Move ADDRESS without the messages that the legacy server does not give."""
    with database(context) as connection:
        waived = value(
            connection, "SELECT bascule.waive_messages(%s, %s, %s, %s)", parsed(address), reason, folder, uid
        )
    click.echo(f"{address} moves without {waived} {'message' if waived == 1 else 'messages'}")


@main.command("waive-last-message")
@click.argument("address", type=ADDRESS)
@reason
@click.pass_context
def waive_last_message(context: click.Context, address: str, reason: str) -> None:
    """Do without the last message in the legacy mailbox of ADDRESS, which the legacy server does not take."""
    with database(context) as connection:
        value(connection, "SELECT bascule.waive_last_message(%s, %s)", parsed(address), reason)
    click.echo(f"{address} gets no last message at the legacy server")
