"""What is to be known before anybody moves: survey."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

import click
from psycopg.rows import dict_row

from bascule.address import Address
from bascule.check import User
from bascule.cli.base import (
    ADDRESS,
    DOMAIN,
    database,
    legacy_of,
    main,
    password_file,
    password_of,
    say,
    settings_of,
)
from bascule.cli.checking import MARKS
from bascule.database import Connection
from bascule.desk import read_applicants
from bascule.errors import BasculeError
from bascule.survey import Surveyor, unmoved

Row = dict[str, Any]

HOW_THEY_MOVE = {
    "good": "move as they are",
    "note": "move with the differences that are named",
    "wrong": "cannot be moved as they are",
}


@main.command("survey")
@click.argument("domain", type=DOMAIN)
@click.option("--user", type=ADDRESS, help="One mailbox; its legacy password is asked for.")
@click.option("--file", type=click.File("r", encoding="utf-8-sig"), help="Those in a CSV file, as for bascule import.")
@click.option("--master", metavar="NAME", help="Log in as this master user; without --user and --file: for all known.")
@password_file
@click.option("--at-once", type=click.IntRange(1, 64), default=4, show_default=True, help="Mailboxes at a time.")
@click.option("--legacy-only", is_flag=True, help="Not what Dovecot here makes of them: this is no store.")
@click.option("--json", "as_json", is_flag=True, help="As JSON, for programs.")
@click.pass_context
def survey_command(
    context: click.Context,
    domain: str,
    user: str | None,
    file: TextIO | None,
    master: str | None,
    password_file: Path | None,
    at_once: int,
    legacy_only: bool,
    as_json: bool,
) -> None:
    """Look at mailboxes of DOMAIN, and say what will not come along or look different. Nothing is copied or changed.

    What is found is kept, in the view surveys; without --user, --file and --master that is shown. The exit status is 1
    if a mailbox cannot be moved as it is.
    """
    if user is not None and file is not None:
        raise click.UsageError("Give either --user or --file.")
    loaded = settings_of(context)
    with database(context) as connection:
        legacy = legacy_of(connection, domain)
        if user is None and file is None and master is None:
            rows = _kept(connection, domain)
        else:
            users = _users(connection, domain, user, file, master, password_file)
            surveyor = Surveyor(loaded, legacy, connection, legacy_only=legacy_only)
            seen = []
            with click.progressbar(length=len(users), label="mailboxes", file=sys.stderr) as bar:
                for each in surveyor.survey_all(users, at_once=at_once):
                    seen.append(str(each.address))
                    bar.update(1)
            rows = [row for row in _kept(connection, domain) if row["address"] in set(seen)]
    if as_json:
        click.echo(json.dumps(rows, indent=2, default=str, ensure_ascii=False))
    else:
        _show(domain, rows)
    if any(row["level"] == "wrong" for row in rows):
        sys.exit(1)


def _users(
    connection: Connection,
    domain: str,
    user: str | None,
    file: TextIO | None,
    master: str | None,
    password_file: Path | None,
) -> list[User]:
    """Whom to look at, and with which password.

    Raises:
        BasculeError: an address is not one of the domain, or there is no password for it.
    """
    if user is not None:
        addresses: Iterable[Address] = [Address.parse(user)]
        if any(each.domain != domain for each in addresses):
            raise BasculeError(f"{user} is not an address of {domain}")
    elif file is not None:
        applicants = read_applicants(file, domain)
        if master is None:
            if lacking := [each.address for each in applicants if each.password is None]:
                raise BasculeError(
                    f"there is no password of {lacking[0]} in the file",
                    hint="Only who can log in is looked at; or name a master user: --master.",
                )
            return [User(each.address, each.password) for each in applicants if each.password is not None]
        addresses = [each.address for each in applicants]
    else:
        addresses = unmoved(connection, domain)
        if not addresses:
            raise BasculeError(
                f"no mailbox of {domain} is known that has not moved",
                hint="Name them in a file (--file), or record them first: bascule expect, bascule import.",
            )
    whose = f"master user {master}" if master is not None else user
    password = password_of(f"Legacy password of {whose}", password_file)
    return [User(each, password, master or "") for each in addresses]


def _kept(connection: Connection, domain: str) -> list[Row]:
    with connection.cursor(row_factory=dict_row) as cursor:
        return cursor.execute(
            "SELECT address, surveyed_at, messages, folders, bytes, largest, level, findings FROM bascule.surveys "
            "WHERE domain = %s ORDER BY address",
            (domain,),
        ).fetchall()


def _show(domain: str, rows: list[Row]) -> None:
    for row in rows:
        say(
            "{address}: {messages} messages in {folders} folders, {mebibytes:.1f} MiB, the largest {largest:.1f} MiB "
            "(seen {surveyed_at:%Y-%m-%d %H:%M})".format(
                **row | {"mebibytes": row["bytes"] / 1024**2, "largest": row["largest"] / 1024**2}
            )
        )
        for each in row["findings"]:
            click.echo(MARKS[each["level"]], nl=False)
            say(f" {each['text']} ({each['name']})")
            if each["remedy"]:
                say(f"        -> {each['remedy']}")
    levels = Counter(row["level"] for row in rows)
    total, size = sum(row["messages"] for row in rows), sum(row["bytes"] for row in rows) / 1024**2
    click.echo(f"{domain}: {len(rows)} mailboxes, {total} messages, {size:.1f} MiB")
    for level, how in HOW_THEY_MOVE.items():
        if levels[level]:
            click.echo(f"  {levels[level]} {how}")
