"""Users, one by one or many at once: requests, aliases, waivers, and what to do when something is stuck."""

from __future__ import annotations

import sys
from collections import Counter
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, TextIO

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
from bascule.database import Connection, value
from bascule.desk import (
    BAD,
    COLUMNS,
    Applicant,
    Desk,
    Outcome,
    for_all,
    import_all,
    move_one,
    read_applicants,
)
from bascule.errors import BasculeError

NAMED = 20  # addresses of a kind that are named; all are counted


login_name = click.option(
    "--login", default="", help="By which name the legacy server knows the user, if --login-form does not say."
)


@main.command()
@click.argument("address", type=ADDRESS)
@click.option("--first-name", default="")
@click.option("--last-name", default="")
@login_name
@password_file
@click.pass_context
def request(
    context: click.Context, address: str, first_name: str, last_name: str, login: str, password_file: Path | None
) -> None:
    """Ask for ADDRESS to be moved, for users whose legacy password you know, technical accounts among them."""
    loaded = settings_of(context)
    wanted = Address.parse(address)
    with database(context) as connection:
        if connection.execute("SELECT FROM bascule.domain WHERE name = %s", (wanted.domain,)).fetchone() is None:
            raise BasculeError(f"{wanted} is not an address of a domain known here")
        desk = Desk(connection, loaded, legacy_of(connection, wanted.domain))
        desk.insist_that_it_exists(wanted)
        password = password_of(f"Legacy password of {wanted}", password_file)
        desk.request(Applicant(wanted, first_name, last_name, password, login))
    click.echo(f"{wanted} will be moved")


@main.command()
@click.argument("address", type=ADDRESS)
@click.option("--first-name", default="")
@click.option("--last-name", default="")
@login_name
@click.pass_context
def expect(context: click.Context, address: str, first_name: str, last_name: str, login: str) -> None:
    """Record ADDRESS at the legacy server: the domain cannot be closed until it has moved or is waived."""
    with database(context) as connection, connection.transaction():
        new = value(connection, "SELECT bascule.expect(%s, %s, %s)", parsed(address), first_name, last_name)
        if login:
            value(connection, "SELECT bascule.set_login_name(%s, %s)", parsed(address), login)
    click.echo(f"{address} is expected" if new else f"{address} was known already")


@main.command("import")
@click.argument("domain", type=DOMAIN)
@click.argument("file", type=click.File("r", encoding="utf-8-sig"))
@click.option("--at-once", type=click.IntRange(1, 64), default=8, show_default=True, help="Logins tried at a time.")
@click.option("--dry-run", is_flag=True, help="Try every login, request nothing.")
@click.pass_context
def import_command(context: click.Context, domain: str, file: TextIO, at_once: int, dry_run: bool) -> None:
    """Ask for all users of DOMAIN in FILE to be moved (CSV; - for standard input).

    The first line names the columns: address, password, and if you like first_name, last_name and login, the name by
    which the legacy server knows the user. A user without a password is only expected. A file with a mistake is refused
    whole; a password that the legacy server refuses is reported, and the others go on. It can be run again: who is on
    the move already is left alone.
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


class _When(click.ParamType[datetime]):
    name = "hour"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        try:
            hour = datetime.fromisoformat(str(value)).astimezone()
        except ValueError:
            self.fail("write it as 2026-11-28T22:00, in this host's time, or with an offset: +01:00", param, ctx)
        if hour <= datetime.now().astimezone():
            self.fail("it is past", param, ctx)
        return hour


@main.command()
@click.argument("addresses", nargs=-1, type=ADDRESS)
@click.option(
    "--from",
    "file",
    type=click.File("r", encoding="utf-8-sig"),
    help="The users in this CSV file, - for standard input; columns: address, and if you like first_name, last_name, "
    "login.",
)
@click.option("--at", "when", type=_When(), help="Copy now, flip at this hour: 2026-11-28T22:00.")
@click.option("--later", is_flag=True, help="Copy now, flip when this command is given again.")
@click.option(
    "--without-password",
    is_flag=True,
    help="Flip also whose password is neither proved nor imported; the first login here is then asked about at the "
    "legacy server.",
)
@click.option("--at-once", type=click.IntRange(1, 64), default=8, show_default=True, help="Addresses tried at a time.")
@click.option("--dry-run", is_flag=True, help="Ask the legacy server whether it takes mail for each, move nobody.")
@click.pass_context
def move(
    context: click.Context,
    addresses: tuple[str, ...],
    file: TextIO | None,
    when: datetime | None,
    later: bool,
    without_password: bool,
    at_once: int,
    dry_run: bool,
) -> None:
    """Move ADDRESSES on your word, without their passwords, read with the domain's copy login.

    They are copied at once, and flip as soon as that is done, or --at an hour; until then what comes there is copied
    now and then. Given again for who is copied, it sets the hour anew: without --at and --later they flip now. Who has
    moved already is reported, and the others go on.
    """
    if when is not None and later:
        raise click.UsageError("Give either --at or --later.")
    applicants = [Applicant(Address.parse(each)) for each in addresses]
    if file is not None:
        applicants += read_applicants(file, None, [each for each in COLUMNS if each != "password"])
    if not applicants:
        raise click.UsageError("Name whom to move: ADDRESSES, or --from.")
    loaded = settings_of(context)
    by_domain: dict[str, dict[Address, Applicant]] = {}
    for each in applicants:
        by_domain.setdefault(each.address.domain, {})[each.address] = each
    with database(context) as connection:
        servers = {name: legacy_of(connection, name) for name in by_domain}
    act = partial(move_one, when="infinity" if later else when, without_password=without_password, dry_run=dry_run)
    counts: Counter[Outcome] = Counter()
    done: list[str] = []
    with click.progressbar(length=sum(map(len, by_domain.values())), label="users", file=sys.stderr) as bar:
        for name, users in by_domain.items():
            for applicant, outcome, why in for_all(loaded, servers[name], [*users.values()], act, at_once=at_once):
                counts[outcome] += 1
                bar.update(1)
                if outcome in BAD:
                    say(f"{applicant.address}: {why}")
                else:
                    done.append(str(applicant.address))
    for outcome in counts:
        click.echo(f"{counts[outcome]} {outcome}")
    with database(context) as connection:
        _name_without_password(connection, done, is_wanted=without_password)
    if any(outcome in BAD for outcome in counts):
        sys.exit(1)


def _name_without_password(connection: Connection, addresses: list[str], *, is_wanted: bool) -> None:
    """Who could not log in here after the flip."""
    known = connection.execute(
        "SELECT address FROM bascule.mailboxes WHERE address = ANY (%s) AND password <> 'none'", (addresses,)
    ).fetchall()
    without = sorted({*addresses} - {address for (address,) in known})
    if not without:
        return
    click.echo(
        f"{len(without)} of them have no password here yet, proved or imported; "
        + (
            "their first login here is asked about at the legacy server:"
            if is_wanted
            else "they are copied, and flip only when they have one, or with --without-password:"
        )
    )
    for address in without[:NAMED]:
        click.echo(f"  {address}")
    if len(without) > NAMED:
        click.echo(f"  ... and {len(without) - NAMED} more: bascule.mailboxes, column password")


@main.group()
def password() -> None:
    """Passwords from the legacy side."""


@password.command("import")
@click.argument("domain", type=DOMAIN)
@click.option(
    "--from",
    "file",
    required=True,
    type=click.File("r", encoding="utf-8-sig"),
    help="A CSV file with the columns address and hash, - for standard input.",
)
@click.option("--shadow", is_flag=True, help="The file is as /etc/shadow and cPanel's shadow are: name:hash:...")
@click.option("--dry-run", is_flag=True, help="Read the file and say what is wrong with it, keep nothing.")
@click.pass_context
def password_import(context: click.Context, domain: str, file: TextIO, shadow: bool, dry_run: bool) -> None:
    """Take hashes of passwords over for users of DOMAIN, all or none.

    A hash is in Dovecot's form, {SCHEME}..., or as crypt writes it ($6$, $5$, $2y$, $y$, $1$). It is in force from the
    flip on, if the user's password is not proved by then, and renewed to ARGON2ID by the first login. It can be run
    again with a newer file: a password that was proved or renewed here stays.
    """
    from bascule import hashes  # noqa: PLC0415 (needed here only)
    from bascule.check.facts import Here  # noqa: PLC0415

    loaded = settings_of(context)
    known = hashes.verified_by_dovecot(Here(loaded.postfix.config_directory, loaded.dovecot.config_file))
    without = 0
    if shadow:
        found, without = hashes.read_shadow(file, domain, known)
    else:
        found = hashes.read_csv(file, domain, known)
    with database(context) as connection:
        legacy_of(connection, domain)
        counts = Counter({"good": len(found)}) if dry_run else hashes.take_over(connection, domain, found)
    for outcome, number in counts.items():
        click.echo(f"{number} {hashes.OUTCOMES.get(outcome, outcome)}")
    if without:
        click.echo(f"{without} left out: locked, or without a password")


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
