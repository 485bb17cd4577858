"""How far a domain is, and what was compared: status, report."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
from psycopg.rows import dict_row

from bascule import __version__
from bascule.cli.base import DOMAIN, database, insist_on_known, main, say
from bascule.database import Connection

Row = dict[str, Any]


def _rows(connection: Connection, query: str, *parameters: object) -> list[Row]:
    with connection.cursor(row_factory=dict_row) as cursor:
        return cursor.execute(query.encode(), parameters).fetchall()


def _domains(connection: Connection) -> list[Row]:
    return _rows(
        connection,
        "SELECT domain, mode, known, migrated, pending, failed, forgotten, obstacles, moved_last_hour, remaining, "
        "readiness FROM bascule.domains ORDER BY 1",
    )


def _silent(connection: Connection) -> list[Row]:
    return _rows(connection, "SELECT part, node, last_sign, problem, advice FROM bascule.silent ORDER BY part, node")


class Standing:
    """What ``status`` shows of one domain; ``migrated`` only on demand, for it may be nearly everybody."""

    def __init__(self, connection: Connection, domain: str, *, with_migrated: bool = False) -> None:
        self.summary = next(row for row in _domains(connection) if row["domain"] == domain)
        self.pending = _rows(
            connection,
            "SELECT address, state, percent, messages_copied, messages_total, messages_per_second, remaining, problem, "
            "CASE WHEN flip_at = 'infinity' THEN 'later' ELSE to_char(flip_at, 'YYYY-MM-DD HH24:MI') END AS flips, "
            "staged_at, password = 'none' AND state <> 'returning' AS without_password "
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
        #: For whom each flip waits.
        self.silent = _silent(connection)
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
            _show_domains(_domains(connection), _silent(connection), as_json=as_json)
            return
        insist_on_known(connection, domain)
        if not watch:
            _show(Standing(connection, domain, with_migrated=True), as_json=as_json)
            return
        from bascule.cli.screen import keep_showing  # noqa: PLC0415 (rich is slow to start, and of use here only)

        keep_showing(lambda: Standing(connection, domain))


def _plain(standing: object) -> str:
    return json.dumps(standing, indent=2, default=str, ensure_ascii=False)


def _show_domains(domains: list[Row], silent: list[Row], *, as_json: bool) -> None:
    if as_json:
        click.echo(_plain(domains))
        return
    for row in domains:
        click.echo(
            "{domain}: {mode}, {migrated} migrated, {pending} pending, {failed} with trouble, {forgotten} forgotten; "
            "{readiness}".format(**row)
        )
    _show_silent(silent)


def _show_silent(silent: list[Row]) -> None:
    for row in silent:
        say("{problem} -> {advice}".format(**row))


def _show(standing: Standing, *, as_json: bool) -> None:
    if as_json:
        click.echo(_plain(vars(standing)))
        return
    click.echo("{domain}: {mode}; {readiness}".format(**standing.summary))
    _show_silent(standing.silent)
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
            say(f"  {line}")


def _minute(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M}"


def _left_out(name: str, folder: Row) -> str:
    """A folder that stayed at the legacy server, in words."""
    number = folder["messages"]
    counted = "not counted there" if number is None else f"{number} message{'' if number == 1 else 's'}"
    return f"left out: the folder {name!r} ({counted}): {folder['reason']}"


def _how_far(row: Row) -> str:
    text = f"{row['state']}, {row['messages_copied']} of {row['messages_total']} messages"
    if row["messages_per_second"] is not None:
        text += f", {row['messages_per_second']} a second"
    if row["remaining"] is not None:
        text += f", about {row['remaining']} left"
    if row["flips"] is not None:
        text += (
            f"; {'copied, ' if row['staged_at'] else ''}flips {'at ' if row['flips'] != 'later' else ''}{row['flips']}"
        )
    if row["without_password"]:
        text += "; no password here yet"
    return text


@main.command()
@click.argument("domain", type=DOMAIN)
@click.option("--html", type=click.Path(path_type=Path, dir_okay=False), help="Write it there, as one HTML page.")
@click.option("--json", "as_json", is_flag=True, help="As JSON, for programs.")
@click.pass_context
def report(context: click.Context, domain: str, html: Path | None, as_json: bool) -> None:
    """What was compared at the cutover of each user of DOMAIN, and found equal: evidence to be kept."""
    with database(context) as connection:
        legacy_host = insist_on_known(connection, domain)
        moved = _rows(connection, "SELECT * FROM bascule.verifications WHERE domain = %s ORDER BY address", domain)
        waived = _rows(
            connection,
            "SELECT address, at, actor, reason FROM bascule.events AS waiver WHERE domain = %s AND event = 'waived' "
            "AND NOT EXISTS (SELECT FROM bascule.events AS later WHERE later.address = waiver.address "
            "AND later.id > waiver.id AND later.event IN ('waived', 'waiver taken back')) ORDER BY at",
            domain,
        )
    from imapclient import imap_utf7  # noqa: PLC0415 (the report's only)

    from bascule.imap.names import readable  # noqa: PLC0415 (likewise)

    for row in moved:
        for folder in row["folder_list"]:
            folder["name"] = imap_utf7.decode(folder["name"].encode())
        row["left_out_in_words"] = [_left_out(readable(each["name"]), each) for each in row["left_out"]]
    if html is not None:
        from bascule.config_templates import render  # noqa: PLC0415 (the page's only)

        page = render(
            "report.html.j2",
            domain=domain,
            legacy_host=legacy_host,
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
        say(
            "{address}: {messages} messages in {folders} folders ({bytes} bytes) equal on both sides at "
            "{migrated_at:%Y-%m-%d %H:%M:%S}; {stragglers} came late and were brought".format(**row)
        )
        for line in (*row["waived"], *row["left_out_in_words"], *row["notes"]):
            say(f"  {line}")
    click.echo(f"{len(moved)} users, {sum(row['messages'] for row in moved)} messages")
    for row in waived:
        say(f"{row['address']} was given up by {row['actor']} on {_minute(row['at'])}: {row['reason']}")
