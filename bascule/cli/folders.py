"""Which folders of a domain's mailboxes come along, and under which name: folder-rule add, list, remove."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import click
from psycopg.rows import dict_row

from bascule.cli.base import DOMAIN, database, insist_on_known, main, say
from bascule.database import value

#: What a folder is known by, in the words of the command line and in those of the database.
KINDS = {
    "name": "name",
    "pattern": "pattern",
    "special_use": "special-use",
    "exchange_items": "exchange-items",
    "map_special_use": "common-names",
}

Command = Callable[..., Any]


def _of_folders(command: Command) -> Command:
    """The options that say which folders."""
    for option in reversed(
        (
            click.option("--name", metavar="NAME", help="The folder of this name, and none below it."),
            click.option("--pattern", metavar="PATTERN", help="All folders that fit, as 'Public/*'; * is anything."),
            click.option("--special-use", metavar="USE", help=r"What the server shows as this, as '\Junk' (RFC 6154)."),
            click.option(
                "--exchange-items",
                is_flag=True,
                help="Calendars, contacts, journals, notes and tasks, where the server is an Exchange.",
            ),
            click.option(
                "--map-special-use",
                is_flag=True,
                help="Sent, Drafts, Trash, Junk and Archive by their names in common languages, where the server "
                "does not say which they are.",
            ),
        )
    ):
        command = option(command)
    return command


def _which(folders: dict[str, Any]) -> tuple[str, str]:
    """Kind and folder of a rule."""
    named = {kind: said for kind, said in folders.items() if said not in {None, False}}
    if len(named) != 1:
        options = ", ".join(f"--{kind.replace('_', '-')}" for kind in KINDS)
        raise click.UsageError(f"Say which folders, in one way: {options}.")
    ((kind, said),) = named.items()
    return KINDS[kind], said if isinstance(said, str) else ""


@main.group("folder-rule")
def folder_rule() -> None:
    """Which folders of a domain's mailboxes come along, and under which name: add, list, remove.

    Names are written as bascule check shows them, with the separator and the prefix of the legacy server.
    One rule decides a folder: the one for its name, else the longest pattern that fits, else the one for its
    special use. INBOX always comes along. Who has moved keeps what held then.
    """


@folder_rule.command("add")
@click.argument("domain", type=DOMAIN)
@_of_folders
@click.option(
    "--leave-out", "action", flag_value="leave-out", help="Leave them at the legacy server; the report names them."
)
@click.option("--copy", "action", flag_value="copy", help="Have them come along, whatever another rule says of more.")
@click.option(
    "--once",
    "action",
    flag_value="once",
    help="Only the messages that are in no other folder that comes along (Gmail).",
)
@click.option(
    "--rename", "name_here", default="", metavar="NAME", help="What they are called here; clients load them again."
)
@click.option("--as", "use_here", default="", metavar="USE", help=r"As what it is shown here: '\Sent', '\Trash' ...")
@click.pass_context
def add(
    context: click.Context, /, domain: str, action: str | None, name_here: str, use_here: str, **folders: Any
) -> None:
    """Leave folders of DOMAIN out, or have them otherwise here. It holds from the next pass on."""
    kind, folder = _which(folders)
    if action is None and kind == "exchange-items":
        action = "leave-out"
    elif action is None and (kind == "common-names" or name_here or use_here):
        action = "copy"
    if action is None:
        raise click.UsageError("Say what is done with them: --leave-out, --copy, --once, --rename or --as.")
    with database(context) as connection:
        value(
            connection,
            "SELECT bascule.add_folder_rule(%s, %s, %s, %s, %s, %s)",
            domain, kind, folder, action, name_here, use_here,
        )  # fmt: skip
    say(f"{domain}: {_in_words(kind, folder, action, name_here, use_here)}; with a user's password, bascule check "
        f"{domain} --user says what that is")  # fmt: skip


@folder_rule.command("remove")
@click.argument("domain", type=DOMAIN)
@_of_folders
@click.pass_context
def remove(context: click.Context, /, domain: str, **folders: Any) -> None:
    """Take a rule of DOMAIN back. It holds from the next pass on; who has moved keeps what held then."""
    kind, folder = _which(folders)
    with database(context) as connection:
        value(connection, "SELECT bascule.remove_folder_rule(%s, %s, %s)", domain, kind, folder)
    say(f"{domain}: no rule for {_called(kind, folder)} any more")


@folder_rule.command("list")
@click.argument("domain", type=DOMAIN)
@click.option("--json", "as_json", is_flag=True, help="As JSON, for programs.")
@click.pass_context
def list_(context: click.Context, domain: str, as_json: bool) -> None:
    """List the rules of DOMAIN, and what is built in."""
    with database(context) as connection:
        insist_on_known(connection, domain)
        with connection.cursor(row_factory=dict_row) as cursor:
            rows = cursor.execute(
                "SELECT kind, folder, action, name_here, special_use_here FROM bascule.folder_rules "
                "WHERE domain = %s ORDER BY kind, folder",
                (domain,),
            ).fetchall()
    if as_json:
        click.echo(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    for row in rows:
        say(_in_words(*row.values()))
    say(
        "built in, where the server is Gmail: " + "; ".join(_in_words(*rule.as_json().values()) for rule in _built_in())
    )


def _built_in() -> Any:
    from bascule.imap.folder_rules import GMAIL  # noqa: PLC0415 (imapclient is slow to start)

    return GMAIL


def _called(kind: str, folder: str) -> str:
    return {
        "exchange-items": "Exchange's calendars, contacts, journals, notes and tasks",
        "common-names": "special uses by common names",
    }.get(kind, f"the {kind.replace('-', ' ')} {folder}")


def _in_words(kind: str, folder: str, action: str, name_here: str, use_here: str) -> str:
    if kind == "common-names":
        return "folders are shown as Sent, Drafts, Trash, Junk and Archive by common names, where the server says none"
    done = {"leave-out": "left out", "copy": "comes along", "once": "only what is in no other folder comes along"}
    words = f"{_called(kind, folder)}: {done[action]}"
    if name_here:
        words += f", as {name_here}"
    if use_here:
        words += f", shown as {use_here}"
    return words
