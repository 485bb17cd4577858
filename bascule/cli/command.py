"""The command ``bascule`` itself: its name, its help, and where each of its commands is.

A command's module is imported when that command is used, and no earlier: an
administrator types ``bascule status`` often, and alembic, rich and the DNS are
of no use to it.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any, NamedTuple

import click
from click.shell_completion import CompletionItem

from bascule import __version__

DEFAULT_SETTINGS = Path("/etc/bascule/bascule.toml")


class Place(NamedTuple):
    """The module of a command below ``bascule.cli``, and what the command does, in a line."""

    module: str
    summary: str


COMMANDS = {
    "activate": Place("checking", "Open DOMAIN for migration and print the URL for its users."),
    "alias": Place("people", "Make the address ALIAS another name of MAILBOX."),
    "cancel-return": Place("people", "Call off a return; what it wrote there stays."),
    "check": Place("checking", "Try everything that a domain or this host needs; say what is not right."),
    "close": Place("domain", "End the migration of DOMAIN: no relay any more, passwords erased."),
    "completion": Place("shell", "Print what has SHELL complete commands, domains and addresses."),
    "copy-login": Place("domain", "As whom the workers log in to the legacy server of a domain."),
    "db": Place("installing", "The database schema."),
    "domain": Place("domain", "The domains: add, set, remove, show, list."),
    "expect": Place("people", "Record ADDRESS at the legacy server: it has to move or to be waived."),
    "folder-rule": Place("folders", "Which folders of DOMAIN come along, and under which name."),
    "give-up": Place("people", "Stop the migration of ADDRESS before its cutover."),
    "import": Place("people", "Ask for all users of DOMAIN in FILE to be moved (CSV)."),
    "keys": Place("installing", "The keys to which passwords are sealed."),
    "letters": Place("installing", "Show what users are written to, in one language."),
    "move": Place("people", "Move ADDRESSES on your word, without their passwords, now or at an hour."),
    "node": Place("node", "The policy daemons and authenticators for which each flip waits: list, forget."),
    "password": Place("people", "Passwords from the legacy side."),
    "pause": Place("domain", "Have workers leave WHO, an address or a whole domain, alone."),
    "place": Place("people", "Have the mailbox of ADDRESS kept at STORE, not at its domain's."),
    "prepare": Place("domain", "The former name of: domain add, domain set."),
    "psql": Place("shell", "Open psql as an administrator of bascule."),
    "report": Place("progress", "What was compared at the cutover of each user of DOMAIN: evidence."),
    "request": Place("people", "Ask for ADDRESS to be moved, if you know its legacy password."),
    "resume": Place("domain", "Let WHO, an address or a whole domain, go on where it stopped."),
    "retry": Place("people", "Try the migration of ADDRESS again now."),
    "return": Place("people", "Send ADDRESS, who has moved, back to the legacy server."),
    "rotate-url": Place("domain", "Replace the URL of DOMAIN; the former one stops working at once."),
    "status": Place("progress", "Show who has moved, moves, has trouble, or is forgotten."),
    "store": Place("installing", "Record the Dovecot store NAME, reached by LMTP_NEXT_HOP."),
    "survey": Place("surveying", "Say what of DOMAIN's mailboxes will not come along, or look different."),
    "verify": Place("verify", "Compare every message of ADDRESS, which has moved, with what came in."),
    "waive": Place("people", "Give ADDRESS up: it need not move."),
    "waive-last-message": Place("people", "Do without the last message, which is not taken there."),
    "waive-messages": Place("people", "Move ADDRESS without the messages that are not given."),
}


class _Commands(MutableMapping[str, click.Command]):
    """The commands by name; each is imported when it is looked at."""

    def __init__(self) -> None:
        #: Those whose modules are imported.
        self.entered: dict[str, click.Command] = {}

    def __getitem__(self, name: str) -> click.Command:
        if name not in self.entered:
            importlib.import_module(f"bascule.cli.{COMMANDS[name].module}")
        return self.entered[name]

    def __setitem__(self, name: str, command: click.Command) -> None:
        self.entered[name] = command

    def __delitem__(self, name: str) -> None:
        del self.entered[name]

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)

    def __contains__(self, name: object) -> bool:
        return name in COMMANDS  # without importing it


class Cli(click.Group):
    """A group whose commands say our errors in words, with exit status 1."""

    commands: _Commands

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.commands = _Commands()

    def invoke(self, ctx: click.Context) -> Any:
        from bascule.program import spoken  # noqa: PLC0415 (see the module)

        with spoken():
            return super().invoke(ctx)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002 (click's)
        with formatter.section("Commands"):
            formatter.write_dl([(name, place.summary) for name, place in sorted(COMMANDS.items())])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        names = [
            CompletionItem(name, help=place.summary)
            for name, place in sorted(COMMANDS.items())
            if name.startswith(incomplete)
        ]
        return names or click.Command.shell_complete(self, ctx, incomplete)


@click.group(cls=Cli, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--settings",
    "path",
    type=click.Path(path_type=Path),
    default=DEFAULT_SETTINGS,
    show_default=True,
    help="The settings file.",
)
@click.version_option(__version__)
@click.pass_context
def main(context: click.Context, path: Path) -> None:
    """Move a mail domain to Postfix and Dovecot, one user at a time, while nobody notices.

    \b
    The usual way of a domain:
      bascule domain add example.org --imap-host imap.old.example --smtp-host mx.old.example
      bascule check example.org --user alice@example.org
      bascule survey example.org --file users.csv   what will not come along, or look different
      bascule activate example.org        prints the URL for the users
      bascule status example.org --watch  who has moved, who moves, who is forgotten
      bascule report example.org          what was compared, for each who has moved
      bascule close example.org           refused while anybody would be forgotten
    """
    from bascule.program import keep_memory_private  # noqa: PLC0415 (see the module)

    keep_memory_private()
    context.obj = path
