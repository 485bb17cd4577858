"""Requests that an administrator makes for users whose legacy passwords are known: one, or a whole file.

Each password is tried at the legacy server and then sealed; it is in no SQL text.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Literal, TextIO

from bascule import legacy as legacy_server
from bascule.address import Address
from bascule.check.smtp import recipient_refusal
from bascule.credential import Password, Sealer
from bascule.database import Connection, connect, value
from bascule.errors import BadAddress, BasculeError, LegacyRefusedLogin, LegacyUnavailable, Refused
from bascule.legacy import LegacySettings, Trust
from bascule.settings import Settings

ROLE = "admin"
COLUMNS = ("address", "password", "first_name", "last_name")
MISTAKES_TOLD = 20

Outcome = Literal["requested", "good", "expected", "on the move already", "refused", "not reached", "not possible"]
#: What somebody has to look at.
BAD: frozenset[Outcome] = frozenset({"refused", "not reached", "not possible"})


@dataclass(frozen=True, slots=True)
class Applicant:
    """A user to be moved; one without a password is only expected."""

    address: Address
    first_name: str
    last_name: str
    password: Password | None = field(repr=False)


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

    def expect(self, applicant: Applicant) -> None:
        """Tell of a mailbox that is to move one day."""
        value(
            self._connection,
            "SELECT bascule.expect(%s, %s, %s)",
            str(applicant.address),
            applicant.first_name,
            applicant.last_name,
        )

    def try_password(self, applicant: Applicant) -> Password:
        """
        Raises:
            LegacyRefusedLogin, LegacyUnavailable
            PasswordNotUsable: it would be of no use here.
        """
        password = applicant.password or Password("")
        password.insist_on_usable()
        legacy_server.authenticate(self._legacy, self._trust, applicant.address, password)
        return password

    def request(self, applicant: Applicant) -> None:
        """Try the password, seal it and make the request.

        Raises:
            LegacyRefusedLogin, LegacyUnavailable, Refused: nothing was changed.
        """
        password = self.try_password(applicant)
        value(
            self._connection,
            "SELECT bascule.request_migration(%s, 'administrator', %s, %s, %s)",
            str(applicant.address),
            self._sealer.seal(password),
            applicant.first_name,
            applicant.last_name,
        )


def read_applicants(file: TextIO, domain: str) -> list[Applicant]:
    """The users in a CSV file (RFC 4180) with a head line, see COLUMNS.

    Raises:
        BasculeError: with the mistakes, by line. No field is quoted: it may be a password.
    """
    reader = csv.DictReader(file, strict=True)
    mistakes: list[str] = []
    found: dict[Address, Applicant] = {}
    try:
        names = [name.strip().lower() for name in reader.fieldnames or ()]
        if "address" not in names or set(names) - set(COLUMNS):
            raise BasculeError(
                "the first line does not name the columns",
                hint="It must be: address,password,first_name,last_name; the names may be left out.",
            )
        reader.fieldnames = names
        for row in reader:
            try:
                applicant = _applicant(row, domain)
            except BasculeError as error:
                mistakes.append(f"line {reader.line_num}: {error.message}")
                continue
            if applicant.address in found:
                mistakes.append(f"line {reader.line_num}: {applicant.address} was there before")
            found[applicant.address] = applicant
    except (csv.Error, UnicodeDecodeError):
        # The error may quote what was read.
        raise BasculeError(f"line {reader.line_num + 1} is not CSV in UTF-8", hint="Nothing was changed.") from None
    if mistakes:
        more = len(mistakes) - MISTAKES_TOLD
        told = mistakes[:MISTAKES_TOLD] + ([f"... and {more} more"] if more > 0 else [])
        raise BasculeError("\n".join(["nothing was changed, for the file has mistakes:", *told]))
    return list(found.values())


def _applicant(row: dict[str, str | list[str] | None], domain: str) -> Applicant:
    if None in row or None in row.values():
        raise BasculeError("it has not as many fields as the first line")
    fields = {name: str(row.get(name) or "") for name in COLUMNS}
    try:
        address = Address.parse(fields["address"].strip())
    except BadAddress:
        raise BasculeError("the address is none") from None
    if address.domain != domain:
        raise BasculeError(f"the address is not one of {domain}")
    password = Password(fields["password"]) if fields["password"] else None
    return Applicant(address, fields["first_name"].strip(), fields["last_name"].strip(), password)


def import_all(
    configuration: Settings, legacy: LegacySettings, applicants: list[Applicant], *, at_once: int, dry_run: bool
) -> Iterator[tuple[Applicant, Outcome, str]]:
    """Request all, ``at_once`` at a time; each with what became of it, and why, as it is done.

    Raises:
        DatabaseUnavailable: what was requested until then stays.
    """

    def work(share: list[Applicant]) -> list[tuple[Applicant, Outcome, str]]:
        with connect(configuration.dsn(ROLE)) as connection:
            desk = Desk(connection, configuration, legacy)
            return [(applicant, *_import_one(desk, applicant, dry_run=dry_run)) for applicant in share]

    with ThreadPoolExecutor(at_once) as pool:
        # Small shares: one slow login does not hold up many.
        shares = [applicants[start : start + 10] for start in range(0, len(applicants), 10)]
        try:
            for done in as_completed([pool.submit(work, share) for share in shares]):
                yield from done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


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
