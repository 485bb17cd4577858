"""``bascule status --watch``: one domain on a screen that is drawn anew.

What a server said is text, never markup: a folder may be called ``[/bold]``.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from bascule.cli.progress import Standing
from bascule.words import printable

INTERVAL = 2.0  # seconds between looks
MOST_SHOWN = 20  # of a kind


def keep_showing(look: Callable[[], Standing]) -> None:
    """Until Ctrl-C."""
    with Live(screen(look()), console=Console(), auto_refresh=False) as live:
        try:
            while True:
                time.sleep(INTERVAL)
                live.update(screen(look()), refresh=True)
        except KeyboardInterrupt:
            return


def _text(words: object) -> Text:
    return Text(printable("" if words is None else str(words)))


def screen(standing: Standing) -> RenderableType:
    """Everything of one domain that fits on a screen."""
    summary = standing.summary
    head = Text.assemble(
        (summary["domain"], "bold"),
        f"  {summary['migrated']} of {summary['known']} migrated, {summary['pending']} pending, "
        f"{summary['failed']} with trouble, {summary['forgotten']} forgotten",
    )
    whole = ProgressBar(total=max(summary["known"], 1), completed=summary["migrated"], width=60)
    left = "" if summary["remaining"] is None else f", about {summary['remaining']} for those who are pending"
    rate = Text(f"{summary['moved_last_hour']} moved in the last hour{left}. {summary['readiness']}", style="dim")
    parts: list[RenderableType] = [head, whole, rate]
    parts += [Text(printable("{problem} -> {advice}".format(**row)), style="red") for row in standing.silent]
    moving = Table(box=None, pad_edge=False)
    for title in ("on the move", "state", "", "messages", "a second", "left"):
        moving.add_column(title)
    for row in standing.pending[:MOST_SHOWN]:
        moving.add_row(
            _text(row["address"]),
            _text(row["state"]),
            ProgressBar(total=100, completed=row["percent"], width=20),
            _text(f"{row['messages_copied']}/{row['messages_total']}"),
            _text(row["messages_per_second"]),
            _text(row["remaining"]),
        )
    if standing.pending:
        parts += [Text(), moving]
    trouble = Table(box=None, pad_edge=False)
    for title in ("trouble", "what", "what to do"):
        trouble.add_column(title)
    for row in standing.failed[:MOST_SHOWN]:
        trouble.add_row(_text(row["address"]), _text(row["problem"]), _text(row["advice"]))
    if standing.failed:
        parts += [Text(), trouble]
    if standing.forgotten:
        names = ", ".join(row["address"] for row in standing.forgotten[:MOST_SHOWN])
        parts += [Text(), _text(f"forgotten: {names}")]
    return Group(*parts)
