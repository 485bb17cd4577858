"""Check, and what follows from it: the activation of a domain."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

import click

from bascule import check, settings
from bascule.address import Address
from bascule.check import Check, Finding, Subject, User
from bascule.check.authority import write_authority
from bascule.check.facts import Commands, Kept
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
from bascule.cli.command import DEFAULT_SETTINGS
from bascule.cli.domain import days, new_url
from bascule.database import value
from bascule.desk import login_name_of
from bascule.errors import BadSettings, BasculeError
from bascule.legacy import Trust

MARKS = {
    "good": click.style("  good ", fg="green"),
    "note": click.style("  note ", fg="yellow"),
    "wrong": click.style(" WRONG ", fg="red", bold=True),
}


@main.command("check")
@click.argument("domain", type=DOMAIN, required=False)
@click.option(
    "--user",
    type=ADDRESS,
    help="An address whose legacy password you know: logs in, looks around, and sends it a probe message.",
)
@password_file
@click.option("--only", multiple=True, metavar="NAME", help="Only the checks of this name; it may have * in it.")
@click.option("--legacy-only", is_flag=True, help="Only the legacy server; not the DNS, nor Postfix and Dovecot here.")
@click.option("--host", is_flag=True, help="Only Postfix and Dovecot here, before any domain or bascule is there.")
@click.option(
    "--facts",
    type=click.File("r"),
    help="With --host: a JSON object of the output of Postfix's and Dovecot's commands on another host, - for standard "
    "input.",
)
@click.option("--list", "as_list", is_flag=True, help="List the checks, and what each looks at and needs.")
@click.option(
    "--write-ca",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the authorities that the legacy server's certificates need into this file, for [legacy] ca_file.",
)
@click.option("--json", "as_json", is_flag=True, help="The findings as JSON, for programs.")
@click.pass_context
def check_command(
    context: click.Context,
    /,
    domain: str | None,
    user: str | None,
    password_file: Path | None,
    only: tuple[str, ...],
    legacy_only: bool,
    host: bool,
    facts: TextIO | None,
    as_list: bool,
    write_ca: Path | None,
    as_json: bool,
) -> None:
    """Try everything that DOMAIN needs and say what is right and what is not. Exit status 1 if anything is wrong."""
    if as_list:
        _list(as_json=as_json)
        return
    if host == (domain is not None):
        raise click.UsageError("Give either DOMAIN or --host.")
    if facts is not None and not host:
        raise click.UsageError("--facts goes with --host.")
    loaded = _host_settings(context) if host else settings_of(context)
    with nullcontext(None) if domain is None else database(context) as connection:
        if domain is None or connection is None:
            subject = Subject(loaded, commands=_kept(facts))
            checks = _wanted(check.of_host(), only)
        else:
            legacy = legacy_of(connection, domain)
            if write_ca is not None:
                trust = Trust(loaded.legacy.ca_file, loaded.legacy.timeout)
                say(write_authority(legacy, trust, write_ca))
                return
            address = None if user is None else Address.parse(user)
            if address is not None and address.domain != legacy.domain:
                raise BasculeError(f"{address} is not an address of {legacy.domain}")
            account = None
            if address is not None:
                account = User(address, password_of(f"Legacy password of {address}", password_file))
                legacy = legacy.known_as(login_name_of(connection, address))
            subject = Subject(loaded, legacy=legacy, user=account, connection=connection, legacy_only=legacy_only)
            everything = [each for each in check.CHECKS.values() if not legacy_only or each.name.startswith("legacy.")]
            checks = _wanted(everything, only)
        findings = list(_told(check.run(checks, subject), as_json=as_json))
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in findings], indent=2, ensure_ascii=False))
    if any(finding.level == "wrong" for finding in findings):
        sys.exit(1)


def _host_settings(context: click.Context) -> settings.Settings:
    """Those of the file; before there is one, the defaults, with which the roles begin."""
    try:
        return settings_of(context)
    except BadSettings:
        if context.obj == DEFAULT_SETTINGS and not DEFAULT_SETTINGS.exists():
            return settings.Settings()
        raise


def _kept(facts: TextIO | None) -> Commands | None:
    if facts is None:
        return None
    try:
        said = json.load(facts)
    except ValueError as error:
        raise BasculeError(f"the facts are not JSON: {error}") from error
    if not isinstance(said, dict) or not all(isinstance(each, str) for each in said.values()):
        raise BasculeError('the facts are not an object of texts by command: {"postconf -n": "..."}')
    return Kept(said)


def _wanted(checks: list[Check], only: Iterable[str]) -> list[Check]:
    chosen = list(only)
    if not chosen:
        return checks
    return [each for each in check.matching(chosen) if each in checks]


def _list(*, as_json: bool) -> None:
    rows = [
        {
            "name": each.name,
            "area": each.area,
            "needs": sorted(each.needs),
            "stops": each.stops,
            "looks_at": each.summary,
        }
        for each in check.CHECKS.values()
    ]
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    for row in rows:
        needs = ", ".join(row["needs"]) if isinstance(row["needs"], list) else ""
        stops = "; activate refuses" if row["stops"] else ""
        click.echo(f"{row['name']}\n    {row['looks_at']} (needs: {needs or 'nothing'}{stops})")


def _told(findings: Iterator[Finding], *, as_json: bool) -> Iterator[Finding]:
    """Each as it comes: some take a while."""
    for finding in findings:
        if not as_json:
            _say(finding)
        yield finding


def _say(finding: Finding) -> None:
    click.echo(f"{MARKS[finding.level]} {finding.area}: {finding.text} ({finding.name})")
    if finding.remedy:
        click.echo(f"        -> {finding.remedy}")


@main.command()
@click.argument("domain", type=DOMAIN)
@days
@click.option("--force", is_flag=True, help="Activate against what check found; it is kept in the journal.")
@click.option("--reason", default="", help="Why; required with --force.")
@click.pass_context
def activate(context: click.Context, domain: str, days: int, force: bool, reason: str) -> None:
    """Open DOMAIN for migration and print the URL for its users. Refused if check finds what would lose mail."""
    loaded = settings_of(context)
    token, url = new_url(loaded)
    with database(context) as connection:
        legacy = legacy_of(connection, domain)
        subject = Subject(loaded, legacy=legacy, connection=connection)
        found = list(check.run(check.stopping(), subject)) if subject.mode == "prepared" else []
        wrong = [each for each in found if each.level == "wrong"]
        for each in found:
            if each.level == "note":
                click.echo(f"note: {each.text} ({each.name})", err=True)
        if wrong and not force:
            said = "\n".join(f"{each.text} ({each.name})\n  -> {each.remedy}" for each in wrong)
            raise BasculeError(
                f"{domain} is not activated:\n{said}",
                hint="Nothing was changed. If you know better: --force --reason ..., which the journal keeps.",
            )
        if wrong:
            value(
                connection,
                "SELECT bascule.activate_domain_regardless(%s, %s, make_interval(days => %s), %s, %s)",
                domain,
                token,
                days,
                reason,
                "\n".join(f"{each.name}: {each.text}" for each in wrong),
            )
        else:
            value(connection, "SELECT bascule.activate_domain(%s, %s, make_interval(days => %s))", domain, token, days)
    click.echo(url)
