"""The nodes: who has to put a hold into force before a mailbox flips, and who is not waited for any more."""

from __future__ import annotations

import json

import click

from bascule.cli.base import database, main, reason, say
from bascule.database import value


@main.group()
def node() -> None:
    """The policy daemons and authenticators for which each flip waits: list, forget."""


@node.command("list")
@click.option("--json", "as_json", is_flag=True, help="As JSON, for programs.")
@click.pass_context
def node_list(context: click.Context, as_json: bool) -> None:
    """List the parts that run, and those that give no sign of life."""
    with database(context) as connection:
        rows = connection.execute("SELECT part, name, heartbeat_at, alive FROM bascule.parts ORDER BY 1, 2").fetchall()
        silent = connection.execute("SELECT part, node, problem, advice FROM bascule.silent ORDER BY 1, 2").fetchall()
    if as_json:
        parts = [dict(zip(("part", "name", "heartbeat_at", "alive"), row, strict=True)) for row in rows]
        click.echo(json.dumps(parts, indent=2, default=str, ensure_ascii=False))
        return
    for part, name, heartbeat_at, alive in rows:
        if alive:
            say(f"{part} on {name}: alive, {heartbeat_at:%Y-%m-%d %H:%M:%S}")
    for _, _, problem, advice in silent:
        say(f"{problem}\n  -> {advice}")


@node.command("forget")
@click.argument("name")
@click.argument("part", type=click.Choice(["policy_daemon", "authenticator"]))
@reason
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.pass_context
def node_forget(context: click.Context, name: str, part: str, reason: str, yes: bool) -> None:
    """Do not wait for PART on the host NAME any more: the host is gone for good, or can do no harm.

    Refused while it gives signs of life. It is waited for again as soon as it is back.
    """
    if part == "authenticator" and not yes:
        say(
            f"Dovecot on {name} goes on with logins for a day by what its authenticator left, also of users who move "
            "meanwhile; and what sessions that it proxies change at the legacy server after a flip is lost. Forget its "
            "authenticator only if no Dovecot runs there, and none will before the authenticator is back."
        )
        click.confirm(f"Does no Dovecot run on {name}?", abort=True)
    with database(context) as connection:
        # Who goes on has said so above.
        serves_nobody = part == "authenticator"
        value(connection, "SELECT bascule.forget_node(%s, %s, %s, %s)", name, part, reason, serves_nobody)
    click.echo(f"{part} on {name} is not waited for until it is back")
