"""How far a domain is, and what was compared: status, report."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
from imapclient import imap_utf7
from psycopg.rows import dict_row
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from bascule import __version__
from bascule.cli.base import DOMAIN, database, legacy_of, main
from bascule.config_templates import render
from bascule.database import Connection

Row = dict[str, Any]
INTERVAL = 2.0  # seconds between looks of --watch
MOST_SHOWN = 20  # of a kind on the screen of --watch


def _rows(connection: Connection, query: str, *parameters: object) -> list[Row]:
    with connection.cursor(row_factory=dict_row) as cursor:
        return cursor.execute(query.encode(), parameters).fetchall()


def _domains(connection: Connection) -> list[Row]:
    return _rows(
        connection,
        "SELECT domain, mode, known, migrated, pending, failed, forgotten, obstacles, moved_last_hour, remaining, "
        "readiness FROM bascule.domains ORDER BY 1",
    )


class _Standing:
    """What ``status`` shows of one domain; ``migrated`` only on demand, for it may be nearly everybody."""

    def __init__(self, connection: Connection, domain: str, *, with_migrated: bool = False) -> None:
        self.summary = next(row for row in _domains(connection) if row["domain"] == domain)
        self.pending = _rows(
            connection,
            "SELECT address, state, percent, messages_copied, messages_total, messages_per_second, remaining, problem "
            "FROM bascule.pending WHERE domain = %s ORDER BY state DESC, percent DESC, address",
            domain,
        )
        self.failed = _rows(
            connection,
            "SELECT address, state, problem, advice, next_try FROM bascule.failed WHERE domain = %s ORDER BY address",
            domain,
        )
        self.forgotten = _rows(
            connection,
            "SELECT address, messages, last_seen FROM bascule.forgotten WHERE domain = %s "
            "ORDER BY messages DESC, address",
            domain,
        )
        self.migrated = (
            _rows(
                connection,
                "SELECT address, messages_total, migrated_at FROM bascule.migrated WHERE domain = %s ORDER BY address",
                domain,
            )
            if with_migrated
            else []
        )


@main.command()
@click.argument("domain", type=DOMAIN, required=False)
@click.option("--watch", is_flag=True, help="Go on showing it, with progress bars, until Ctrl-C.")
@click.option("--json", "as_json", is_flag=True, help="As JSON, for programs.")
@click.pass_context
def status(context: click.Context, domain: str | None, watch: bool, as_json: bool) -> None:
    """Show the domains, or who of DOMAIN has moved, moves, has trouble, or is forgotten."""
    with database(context) as connection:
        if domain is None:
            _show_domains(_domains(connection), as_json=as_json)
            return
        legacy_of(connection, domain)
        if not watch:
            _show(_Standing(connection, domain, with_migrated=True), as_json=as_json)
            return
        with Live(_screen(_Standing(connection, domain)), console=Console(), auto_refresh=False) as live:
            try:
                while True:
                    time.sleep(INTERVAL)
                    live.update(_screen(_Standing(connection, domain)), refresh=True)
            except KeyboardInterrupt:
                return


def _plain(standing: object) -> str:
    return json.dumps(standing, indent=2, default=str, ensure_ascii=False)


def _show_domains(domains: list[Row], *, as_json: bool) -> None:
    if as_json:
        click.echo(_plain(domains))
        return
    for row in domains:
        click.echo(
            "{domain}: {mode}, {migrated} migrated, {pending} pending, {failed} with trouble, {forgotten} forgotten; "
            "{readiness}".format(**row)
        )


def _show(standing: _Standing, *, as_json: bool) -> None:
    if as_json:
        click.echo(_plain(vars(standing)))
        return
    click.echo("{domain}: {mode}; {readiness}".format(**standing.summary))
    lists = {
        "migrated": [
            f"{row['address']}  {row['messages_total']} messages, since {_minute(row['migrated_at'])}"
            for row in standing.migrated
        ],
        "pending": [f"{row['address']}  {_how_far(row)}" for row in standing.pending],
        "trouble": [f"{row['address']}  {row['problem']} -> {row['advice']}" for row in standing.failed],
        "forgotten": [
            f"{row['address']}  {row['messages']} messages, last {_minute(row['last_seen'])}"
            for row in standing.forgotten
        ],
    }
    for title, lines in lists.items():
        click.echo(f"{title}: {len(lines) or 'nobody'}")
        for line in lines:
            click.echo(f"  {line}")


def _minute(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M}"


def _how_far(row: Row) -> str:
    text = f"{row['state']}, {row['messages_copied']} of {row['messages_total']} messages"
    if row["messages_per_second"] is not None:
        text += f", {row['messages_per_second']} a second"
    if row["remaining"] is not None:
        text += f", about {row['remaining']} left"
    return text


def _screen(standing: _Standing) -> RenderableType:
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
    moving = Table(box=None, pad_edge=False)
    for title in ("on the move", "state", "", "messages", "a second", "left"):
        moving.add_column(title)
    for row in standing.pending[:MOST_SHOWN]:
        moving.add_row(
            row["address"],
            str(row["state"]),
            ProgressBar(total=100, completed=row["percent"], width=20),
            f"{row['messages_copied']}/{row['messages_total']}",
            "" if row["messages_per_second"] is None else str(row["messages_per_second"]),
            "" if row["remaining"] is None else str(row["remaining"]),
        )
    if standing.pending:
        parts += [Text(), moving]
    trouble = Table(box=None, pad_edge=False)
    for title in ("trouble", "what", "what to do"):
        trouble.add_column(title)
    for row in standing.failed[:MOST_SHOWN]:
        trouble.add_row(row["address"], row["problem"], row["advice"])
    if standing.failed:
        parts += [Text(), trouble]
    if standing.forgotten:
        names = ", ".join(row["address"] for row in standing.forgotten[:MOST_SHOWN])
        parts += [Text(), Text(f"forgotten: {names}")]
    return Group(*parts)


@main.command()
@click.argument("domain", type=DOMAIN)
@click.option("--html", type=click.Path(path_type=Path, dir_okay=False), help="Write it there, as one HTML page.")
@click.option("--json", "as_json", is_flag=True, help="As JSON, for programs.")
@click.pass_context
def report(context: click.Context, domain: str, html: Path | None, as_json: bool) -> None:
    """What was compared at the cutover of each user of DOMAIN, and found equal: evidence to be kept."""
    with database(context) as connection:
        legacy = legacy_of(connection, domain)
        moved = _rows(connection, "SELECT * FROM bascule.verifications WHERE domain = %s ORDER BY address", domain)
        waived = _rows(
            connection,
            "SELECT address, at, actor, reason FROM bascule.events AS waiver WHERE domain = %s AND event = 'waived' "
            "AND NOT EXISTS (SELECT FROM bascule.events AS later WHERE later.address = waiver.address "
            "AND later.id > waiver.id AND later.event IN ('waived', 'waiver taken back')) ORDER BY at",
            domain,
        )
    for row in moved:
        for folder in row["folder_list"]:
            folder["name"] = imap_utf7.decode(folder["name"].encode())
    if html is not None:
        page = render(
            "report.html.j2",
            domain=domain,
            legacy_host=legacy.imap_host,
            moved=moved,
            waived=waived,
            written_at=datetime.now(UTC),
            version=__version__,
        )
        html.write_text(page)
        click.echo(f"{html}: {len(moved)} users")
        return
    if as_json:
        click.echo(_plain({"domain": domain, "moved": moved, "waived": waived}))
        return
    for row in moved:
        click.echo(
            "{address}: {messages} messages in {folders} folders ({bytes} bytes) equal on both sides at "
            "{migrated_at:%Y-%m-%d %H:%M:%S}; {stragglers} came late and were brought".format(**row)
        )
        for line in (*row["waived"], *row["notes"]):
            click.echo(f"  {line}")
    click.echo(f"{len(moved)} users, {sum(row['messages'] for row in moved)} messages")
    for row in waived:
        click.echo(f"{row['address']} was given up by {row['actor']} on {_minute(row['at'])}: {row['reason']}")
