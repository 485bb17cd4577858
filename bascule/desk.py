"""Requests that an administrator makes for users whose legacy passwords are known: one, or a whole file.

Each password is tried at the legacy server and then sealed; it is in no SQL text.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import Literal, Protocol, TextIO, TypeVar

from bascule import legacy as legacy_server
from bascule.address import Address
from bascule.check.smtp import recipient_refusal
from bascule.credential import Password, Sealer
from bascule.database import Connection, connect, value
from bascule.errors import (
    BadAddress,
    BasculeError,
    DatabaseUnavailable,
    LegacyRefusedLogin,
    LegacyUnavailable,
    Refused,
)
from bascule.legacy import LegacySettings, Trust
from bascule.settings import Settings

ROLE = "admin"
COLUMNS = ("address", "password", "first_name", "last_name", "login")
MISTAKES_TOLD = 20
MOST_LOGIN = 255  # characters of a login name

#: When a mailbox flips: as soon as it can, at an hour, or not until an administrator names one.
Hour = datetime | Literal["infinity"] | None

Outcome = Literal[
    "moves", "requested", "good", "expected", "on the move already", "refused", "not reached", "not possible"
]
#: What somebody has to look at.
BAD: frozenset[Outcome] = frozenset({"refused", "not reached", "not possible"})


class _WithAddress(Protocol):
    @property
    def address(self) -> Address: ...


#: What is read from a line of a file.
Row = TypeVar("Row", bound=_WithAddress)


@dataclass(frozen=True, slots=True)
class Applicant:
    """A user to be moved; one without a password is only expected."""

    address: Address
    first_name: str = ""
    last_name: str = ""
    password: Password | None = field(default=None, repr=False)
    #: The name by which the legacy server knows the user; empty: as it was told before, or as the domain's form has it.
    login: str = ""


class Desk:
    """Where requests for the users of one domain are made; used by one thread."""

    def __init__(self, connection: Connection, configuration: Settings, legacy: LegacySettings) -> None:
        self._connection = connection
        self._trust = Trust(configuration.legacy.ca_file, configuration.legacy.timeout)
        self._sealer = Sealer(configuration.keys.public)
        self._legacy = legacy

    def insist_that_it_exists(self, address: Address) -> None:
        """
        Raises:
            BasculeError: the legacy server takes no mail for it, or cannot say.
        """
        refusal = recipient_refusal(self._legacy, self._trust.timeout, address)
        if refusal is not None:
            raise BasculeError(f"the legacy server knows no {address}: {refusal}")

    def is_settled(self, address: Address) -> bool:
        """Whether a mailbox moves or has moved, and waits for no password."""
        return bool(
            value(
                self._connection,
                "SELECT state <> 'legacy' AND NOT needs_password FROM bascule.mailboxes WHERE address = %s",
                str(address),
            )
        )

    def expect(self, applicant: Applicant) -> bool:
        """Tell of a mailbox that is to move one day; False: it was known."""
        with self._connection.transaction():
            new = value(
                self._connection,
                "SELECT bascule.expect(%s, %s, %s)",
                str(applicant.address),
                applicant.first_name,
                applicant.last_name,
            )
            self._tell_login(applicant)
        return bool(new)

    def _tell_login(self, applicant: Applicant) -> None:
        if applicant.login:
            value(self._connection, "SELECT bascule.set_login_name(%s, %s)", str(applicant.address), applicant.login)

    def known_as(self, applicant: Applicant) -> LegacySettings:
        """The legacy server as it knows this user."""
        return self._legacy.known_as(applicant.login or login_name_of(self._connection, applicant.address))

    def try_password(self, applicant: Applicant) -> Password:
        """
        Raises:
            LegacyRefusedLogin, LegacyUnavailable
            PasswordNotUsable: it would be of no use here.
        """
        password = applicant.password or Password("")
        password.insist_on_usable()
        legacy_server.authenticate(self.known_as(applicant), self._trust, applicant.address, password)
        return password

    def request(self, applicant: Applicant) -> None:
        """Try the password, seal it and make the request.

        Raises:
            LegacyRefusedLogin, LegacyUnavailable, Refused: nothing was changed.
        """
        password = self.try_password(applicant)
        with self._connection.transaction():
            self._tell_login(applicant)
            value(
                self._connection,
                "SELECT bascule.request_migration(%s, 'administrator', %s, %s, %s)",
                str(applicant.address),
                self._sealer.seal(password),
                applicant.first_name,
                applicant.last_name,
            )

    def is_on_the_move(self, address: Address) -> bool:
        """Whether a mailbox moves or has moved."""
        return bool(
            value(self._connection, "SELECT state <> 'legacy' FROM bascule.mailboxes WHERE address = %s", str(address))
        )

    def move(self, applicant: Applicant, when: Hour, *, without_password: bool) -> None:
        """Have it moved on the administrator's word; see ``move_mailbox()`` in ``schema/functions/requests.sql``.

        Raises:
            Refused: nothing was changed.
        """
        with self._connection.transaction():
            self._tell_login(applicant)
            value(
                self._connection,
                "SELECT bascule.move_mailbox(%s, %s::timestamptz, %s, %s, %s)",
                str(applicant.address),
                None if when is None else str(when),
                without_password,
                applicant.first_name,
                applicant.last_name,
            )


def login_name_of(connection: Connection, address: Address) -> str | None:
    """The name by which the legacy server knows the user of an address, if it was told."""
    found = value(connection, "SELECT legacy_login FROM bascule.mailboxes WHERE address = %s", str(address))
    return None if found is None else str(found)


def read_table(
    file: TextIO, columns: Sequence[str], required: Sequence[str], take: Callable[[dict[str, str]], Row]
) -> list[Row]:
    """What ``take`` makes of each line of a CSV file (RFC 4180) with a head line; an address is there once.

    Raises:
        BasculeError: with the mistakes, by line; those of ``take`` among them. No field is quoted: it may be a secret.
    """
    reader = csv.DictReader(file, strict=True)
    mistakes: list[str] = []
    found: dict[Address, Row] = {}
    try:
        names = [name.strip().lower() for name in reader.fieldnames or ()]
        if set(required) - set(names) or set(names) - set(columns):
            optional = f"; {', '.join(required)} must be there" if len(required) < len(columns) else ""
            raise BasculeError(
                "the first line does not name the columns", hint=f"It must be: {','.join(columns)}{optional}."
            )
        reader.fieldnames = names
        for row in reader:
            try:
                taken = take(_fields(row, columns))
            except BasculeError as error:
                mistakes.append(f"line {reader.line_num}: {error.message}")
                continue
            if taken.address in found:
                mistakes.append(f"line {reader.line_num}: {taken.address} was there before")
            found[taken.address] = taken
    except (csv.Error, UnicodeDecodeError):
        # The error may quote what was read.
        raise BasculeError(f"line {reader.line_num + 1} is not CSV in UTF-8", hint="Nothing was changed.") from None
    insist_on_none(mistakes)
    return list(found.values())


def insist_on_none(mistakes: Sequence[str]) -> None:
    """
    Raises:
        BasculeError: there are mistakes in a file, the first of which are named.
    """
    if mistakes:
        more = len(mistakes) - MISTAKES_TOLD
        told = [*mistakes[:MISTAKES_TOLD], *([f"... and {more} more"] if more > 0 else [])]
        raise BasculeError("\n".join(["nothing was changed, for the file has mistakes:", *told]))


def _fields(row: dict[str, str | list[str] | None], columns: Sequence[str]) -> dict[str, str]:
    if None in row or None in row.values():
        raise BasculeError("it has not as many fields as the first line")
    return {name: str(row.get(name) or "") for name in columns}


def address_of(text: str, domain: str | None) -> Address:
    """An address in a file; of this domain, if one is named.

    Raises:
        BasculeError
    """
    try:
        address = Address.parse(text.strip())
    except BadAddress:
        raise BasculeError("the address is none") from None
    if domain is not None and address.domain != domain:
        raise BasculeError(f"the address is not one of {domain}")
    return address


def read_applicants(file: TextIO, domain: str | None, columns: Sequence[str] = COLUMNS) -> list[Applicant]:
    """The users in a CSV file; of ``domain``, if it is named.

    Raises:
        BasculeError: as :func:`read_table`.
    """

    def take(fields: dict[str, str]) -> Applicant:
        address = address_of(fields["address"], domain)
        password = Password(fields["password"]) if fields.get("password") else None
        login = fields["login"].strip()
        if len(login) > MOST_LOGIN or any(letter < " " or letter == "\x7f" for letter in login):
            raise BasculeError("the login name is too long, or has a control character in it")
        return Applicant(address, fields["first_name"].strip(), fields["last_name"].strip(), password, login)

    return read_table(file, columns, ("address",), take)


Act = Callable[["Desk", Applicant], tuple[Outcome, str]]


def for_all(
    configuration: Settings, legacy: LegacySettings, applicants: Sequence[Applicant], act: Act, *, at_once: int
) -> Iterator[tuple[Applicant, Outcome, str]]:
    """Do ``act`` for all, ``at_once`` at a time; each with what became of it, and why, as it is done.

    Raises:
        DatabaseUnavailable: what was done until then stays.
    """

    def work(share: Sequence[Applicant]) -> list[tuple[Applicant, Outcome, str]]:
        with connect(configuration.dsn(ROLE)) as connection:
            desk = Desk(connection, configuration, legacy)
            return [(applicant, *act(desk, applicant)) for applicant in share]

    with ThreadPoolExecutor(at_once) as pool:
        # Small shares: one slow login does not hold up many.
        shares = [applicants[start : start + 10] for start in range(0, len(applicants), 10)]
        try:
            for done in as_completed([pool.submit(work, share) for share in shares]):
                yield from done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def import_all(
    configuration: Settings, legacy: LegacySettings, applicants: list[Applicant], *, at_once: int, dry_run: bool
) -> Iterator[tuple[Applicant, Outcome, str]]:
    """Request all whose password is there, see :func:`for_all`; the others are only expected."""
    return for_all(configuration, legacy, applicants, partial(_import_one, dry_run=dry_run), at_once=at_once)


def move_one(
    desk: Desk, applicant: Applicant, *, when: Hour, without_password: bool, dry_run: bool
) -> tuple[Outcome, str]:
    """Have one moved on the administrator's word, if the legacy server takes mail for the address."""
    try:
        if not desk.is_on_the_move(applicant.address):
            desk.insist_that_it_exists(applicant.address)
        if dry_run:
            return "good", ""
        desk.move(applicant, when, without_password=without_password)
    except Refused as error:
        return "not possible", f"{error.message}. {error.hint}".rstrip(". ")
    except DatabaseUnavailable:
        raise
    except BasculeError as error:
        return "refused", error.message
    return "moves", ""


def _import_one(desk: Desk, applicant: Applicant, *, dry_run: bool) -> tuple[Outcome, str]:
    if desk.is_settled(applicant.address):
        return "on the move already", ""
    try:
        if applicant.password is None:
            if not dry_run:
                desk.expect(applicant)
            return "expected", ""
        if dry_run:
            desk.try_password(applicant)
            return "good", ""
        desk.request(applicant)
    except LegacyRefusedLogin as error:
        return "refused", error.message
    except LegacyUnavailable as error:
        return "not reached", error.message
    except Refused as error:
        return "not possible", error.message
    return "requested", ""
