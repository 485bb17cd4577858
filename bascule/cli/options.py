"""The options of a domain: each is one line of a table, and is asked for by ``domain add`` and ``domain set`` alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import click

from bascule.language import LANGUAGES

TLS = click.Choice(["implicit", "starttls", "none"])
#: Ports at which TLS begins at once (RFC 8314); at the others by STARTTLS.
IMPLICIT_PORTS = {993, 995, 465}

Command = Callable[..., Any]


class PortOrOff(click.ParamType[int]):
    """A port, or ``off`` for a service that the legacy server has not."""

    name = "port|off"
    OFF = 0

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if str(value).lower() in {"off", "0"}:
            return self.OFF
        return click.IntRange(1, 65535).convert(value, param, ctx)


class NumberOrOff(click.ParamType[int]):
    """A positive number, or ``off`` for no limit."""

    name = "number|off"
    OFF = 0

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if str(value).lower() in {"off", "0"}:
            return self.OFF
        return click.IntRange(1).convert(value, param, ctx)


@dataclass(frozen=True, slots=True)
class Setting:
    """An option of a domain, and the column that keeps it."""

    option: str
    column: str
    help: str
    type: Any = str
    #: What it is when a domain is added without it; None: the database's own default.
    default: Any = None
    #: What ``--help`` says the default is.
    shown: str = ""
    is_required: bool = False
    #: Whether ``off`` is null in the column.
    off_is_null: bool = False


SETTINGS = (
    Setting("--imap-host", "imap_host", "The legacy IMAP server; also its POP3 and submission, if given.",
            is_required=True),
    Setting("--imap-port", "imap_port", "Its port.", click.IntRange(1, 65535), 993, "993"),
    Setting("--imap-tls", "imap_tls", "How it is secured.", TLS, "implicit", "implicit"),
    Setting("--smtp-host", "smtp_host", "Next hop for mail of users who have not moved.", is_required=True),
    Setting("--smtp-port", "smtp_port", "Its port.", click.IntRange(1, 65535), 25, "25"),
    Setting("--pop3-port", "pop3_port", "Give it if users read their mail by POP3.", PortOrOff(), off_is_null=True),
    Setting("--pop3-tls", "pop3_tls", "How it is secured; by default as is usual at the port.", TLS),
    Setting("--submission-port", "submission_port", "Give it if users submit mail there.", PortOrOff(),
            off_is_null=True),
    Setting("--submission-tls", "submission_tls", "How it is secured; by default as is usual at the port.", TLS),
    Setting("--sieve-port", "sieve_port", "ManageSieve: give it if users have Sieve scripts.", PortOrOff(),
            off_is_null=True),
    Setting("--sieve-tls", "sieve_tls", "How it is secured; by default as is usual at the port.", TLS),
    Setting("--login-form", "login_form", "What the legacy server takes as user name.",
            click.Choice(["address", "local_part"]), shown="address"),
    Setting("--store", "store", "Where mailboxes of the domain will be kept.", str, "local", "local"),
    Setting("--sweep-interval", "sweep_interval", "How often late messages are looked for.", shown="5 minutes"),
    Setting("--cutover-budget", "cutover_budget", "How long a user's mail may be held.", shown="60 seconds"),
    Setting("--connections", "connections", "The most IMAP sessions that workers have there.", click.IntRange(1),
            shown="20"),
    Setting("--connections-per-mailbox", "connections_per_mailbox",
            "The most IMAP sessions for one mailbox at a time.", click.IntRange(1), shown="2"),
    Setting("--quiet-period", "quiet_period", "No late message for so long before closing.", shown="1 day"),
    Setting("--language", "language", "Of users who chose none.", click.Choice(LANGUAGES), shown="en"),
    Setting("--messages/--no-messages", "writes_to_users",
            "Whether users get a welcome, and a message when their move waits for their password.", shown="messages"),
    Setting("--bytes-per-second", "bytes_per_second", "The most that workers read there.", NumberOrOff(),
            shown="off", off_is_null=True),
    Setting("--first-login/--no-first-login", "first_login_migrates",
            "Whether a first login on the new server is a request to be moved.", shown="first-login"),
    Setting("--first-login-delay", "first_login_delay",
            "How long after the first login the request is made: the user is notified, and may object.", shown="0"),
    Setting("--smtp-tls", "smtp_tls", "How mail to the legacy server is secured: if it offers TLS, or only with a "
            "certificate that is good for --smtp-host.", click.Choice(["may", "encrypt", "verify"]), shown="may"),
    Setting("--on-difference", "on_difference", "Where a folder's name or a keyword cannot be kept as it is: move and "
            "note it, or wait for an administrator.", click.Choice(["note", "wait"]), shown="note"),
)  # fmt: skip
SERVICES = ("pop3", "submission", "sieve")


def of_a_domain(*, required: bool) -> Callable[[Command], Command]:
    """Give a command all options of a domain; ``required``: those without which a new one cannot be."""

    def decorate(command: Command) -> Command:
        for each in reversed(SETTINGS):
            shown = f" [default: {each.shown}]" if each.shown else ""
            command = click.option(
                each.option,
                each.column,
                type=None if "/" in each.option else each.type,
                default=None,
                required=required and each.is_required,
                help=each.help + (shown if required else ""),
            )(command)
        return command

    return decorate


def named(values: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of the options that were given, ``off`` as null; the security of a port as is usual there."""
    found: dict[str, Any] = {}
    for each in SETTINGS:
        value = values[each.column]
        if value is not None:
            found[each.column] = None if each.off_is_null and value == PortOrOff.OFF else value
    for service in SERVICES:
        port, tls = f"{service}_port", f"{service}_tls"
        if port in found and found[port] is None:
            found[tls] = None
        elif port in found and tls not in found:
            found[tls] = "implicit" if found[port] in IMPLICIT_PORTS else "starttls"
    return found


def of_new(values: Mapping[str, Any]) -> dict[str, Any]:
    """:func:`named`, with the defaults of a domain that is added."""
    return {each.column: each.default for each in SETTINGS if each.default is not None} | named(values)


def missing(values: Mapping[str, Any]) -> list[str]:
    """The options without which a domain cannot be added."""
    return [each.option for each in SETTINGS if each.is_required and not values[each.column]]
