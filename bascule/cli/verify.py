"""Verifying a mailbox again, after it has moved."""

from __future__ import annotations

import json
import time
from typing import Any

import click

from bascule.cli.base import ADDRESS, database, main, parsed, say
from bascule.database import Connection, value
from bascule.errors import BasculeError

LOOK = 1.0  # seconds between looks for the result

#: What is counted, in the order in which it is reported, with its words.
_COUNTS = (
    ("compared", "are where they were put, byte for byte as they came in"),
    ("moved", "were moved by their owner, and are as they came in"),
    ("gone", "are not here any more: their owner removed them, or they are lost"),
    ("different", "differ from what came in"),
    ("never_brought", "are at the legacy server since before the move, and were never brought"),
)
_BAD = ("different", "never_brought")


class NotYetVerified(BasculeError):
    """A worker has not verified the mailbox in time."""


@main.command()
@click.argument("address", type=ADDRESS)
@click.option("--patience", default=3600.0, show_default=True, help="Seconds to wait for the result.")
@click.option("--json", "as_json", is_flag=True, help="The result as JSON.")
@click.pass_context
def verify(context: click.Context, address: str, patience: float, as_json: bool) -> None:
    """Compare every message of ADDRESS, which has moved, with what came in when it moved.

    A worker reads them all as a client does. Exit status 1: a message differs, or was never brought.
    """
    with database(context) as connection:
        result = _verified(connection, parsed(address), patience)
    if as_json:
        click.echo(json.dumps(result))
    else:
        for kind, words in _COUNTS:
            if result[kind]:
                click.echo(f"{result[kind]} messages {words}")
            for name in result["named"].get(kind, ()):
                say(f"    {name}")
        for note in result["notes"]:
            say(note)
    if any(result[kind] for kind in _BAD):
        context.exit(1)


def _verified(connection: Connection, address: str, patience: float) -> dict[str, Any]:
    """
    Raises:
        NotYetVerified
    """
    asked = value(connection, "SELECT bascule.verify_mailbox(%s)", address)
    query = "SELECT again FROM bascule.verifications WHERE address = %s AND verified_again_at >= %s"
    end = time.monotonic() + patience
    while (found := value(connection, query, address, asked)) is None:
        if time.monotonic() > end:
            raise NotYetVerified(
                f"{address} has not been verified within {patience:.0f} s; it is done as soon as a worker is free",
                hint="The result will be in bascule.verifications. Is a worker running? See bascule check.",
            )
        time.sleep(LOOK)
    return dict(found)
