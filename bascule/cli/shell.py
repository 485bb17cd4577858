"""Completion in the shell."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from bascule.cli.base import main
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
