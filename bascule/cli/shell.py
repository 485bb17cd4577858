"""The command in the shell, and the way to psql."""

from __future__ import annotations

import os

import click
from click.shell_completion import get_completion_class

from bascule.cli.base import ROLE, main, settings_of
from bascule.errors import BasculeError


@main.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print what has SHELL complete the commands, domains and addresses of bascule.

    \b
    For bash:  bascule completion bash > /etc/bash_completion.d/bascule
    """
    made = get_completion_class(shell)
    if made is None:
        raise BasculeError(f"there is no completion for {shell}")
    click.echo(made(main, {}, "bascule", "_BASCULE_COMPLETE").source())


@main.command("psql", context_settings={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def psql(context: click.Context, arguments: tuple[str, ...]) -> None:
    """Open psql as an administrator of bascule; ARGUMENTS are psql's own.

    \b
    For instance:  bascule psql -c 'SELECT * FROM bascule.domains'
    """
    dsn = settings_of(context).dsn(ROLE)
    try:
        os.execvp("psql", ["psql", *arguments, "--dbname", dsn])  # noqa: S606 (its terminal is ours)
    except OSError as error:
        raise BasculeError(
            f"psql cannot be run: {error.strerror}", hint="Install it: apt install postgresql-client."
        ) from error
