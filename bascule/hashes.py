"""Hashes of passwords from the legacy side, read from a file and handed to the database, all or none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TextIO

from bascule import schemes
from bascule.address import Address
from bascule.check.facts import Commands, NotReadable
from bascule.database import Connection
from bascule.desk import address_of, insist_on_none, read_table
from bascule.errors import BasculeError

COLUMNS = ("address", "hash")
#: What import_passwords() says, in words.
OUTCOMES = {
    "kept": "kept, in force from the flip on",
    "proved": "kept; the password that the legacy server took is in force all the same",
    "in force": "in force now",
    "own": "left as they are: a newer password is in force here",
}


@dataclass(frozen=True, slots=True)
class Hashed:
    """A user, and the hash of the password in Dovecot's form."""

    address: Address
    hash: str = field(repr=False)


def verified_by_dovecot(commands: Commands) -> frozenset[str]:
    """The schemes that this host's Dovecot verifies (doveadm-pw(1)).

    Raises:
        BasculeError: it cannot be asked.
    """
    try:
        done = commands.run("doveadm", "pw", "-l")
    except NotReadable as error:
        raise BasculeError(
            f"which schemes Dovecot verifies cannot be asked here: {error.message}", hint="Run it on a store."
        ) from error
    if done.status != 0:
        raise BasculeError("doveadm pw -l fails here", hint="Run it on a store, where Dovecot's doveadm is.")
    return frozenset(done.text.upper().split())


def read_csv(file: TextIO, domain: str, known: frozenset[str]) -> list[Hashed]:
    """The lines of a CSV file, address and hash.

    Raises:
        BasculeError: with the mistakes, by line; no hash is quoted.
    """

    def take(fields: dict[str, str]) -> Hashed:
        return Hashed(address_of(fields["address"], domain), _read(fields["hash"].strip(), known))

    return read_table(file, COLUMNS, COLUMNS, take)


def read_shadow(file: TextIO, domain: str, known: frozenset[str]) -> tuple[list[Hashed], int]:
    """The lines of a file as shadow(5) has it, ``name:hash:...``; and how many have no password, or are locked.

    Raises:
        BasculeError: with the mistakes, by line; no hash is quoted.
    """
    found: dict[Address, Hashed] = {}
    mistakes: list[str] = []
    without = 0
    try:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            name, _, rest = line.rstrip("\r\n").partition(":")
            text = rest.partition(":")[0]
            if schemes.is_locked(text):
                without += 1
                continue
            try:
                address = address_of(name if "@" in name else f"{name}@{domain}", domain)
                hashed = Hashed(address, _read(text, known))
            except BasculeError as error:
                mistakes.append(f"line {number}: {error.message}")
                continue
            if address in found:
                mistakes.append(f"line {number}: {address} was there before")
            found[address] = hashed
    except UnicodeDecodeError:
        raise BasculeError("the file is not text in UTF-8", hint="Nothing was changed.") from None
    insist_on_none(mistakes)
    return list(found.values()), without


def _read(text: str, known: frozenset[str]) -> str:
    hashed = schemes.read(text)
    if schemes.scheme_of(hashed) not in known:
        raise BasculeError(f"Dovecot here does not verify {{{schemes.scheme_of(hashed)}}}")
    return hashed


def take_over(connection: Connection, domain: str, hashes: Sequence[Hashed]) -> Counter[str]:
    """Keep them, all or none; how many of each outcome.

    Raises:
        Refused: nothing was changed.
    """
    # In one order: two who import at the same time do not wait for each other in a circle.
    ordered = sorted(hashes, key=lambda each: str(each.address))
    rows = connection.execute(
        "SELECT outcome FROM bascule.import_passwords(%s, %s, %s)",
        (domain, [str(each.address) for each in ordered], [each.hash for each in ordered]),
    ).fetchall()
    return Counter(outcome for (outcome,) in rows)
