"""What is remembered of logins: right passwords, guesses, and who is kept out."""

from __future__ import annotations

from ipaddress import ip_network

import pytest

from bascule.address import Address
from bascule.attempts import PER_ACCOUNT, PER_SOURCE, Attempts
from bascule.credential import Password

ALICE, BOB = Address("alice", "a.test"), Address("bob", "a.test")
RIGHT = Password("right")


@pytest.fixture
def attempts() -> Attempts:
    return Attempts([ip_network("127.0.0.0/8"), ip_network("2001:db8:1::/48")])


def guess(attempts: Attempts, address: Address, source: str, times: int) -> None:
    for number in range(times):
        attempts.failed(address, Password(f"guess {number} from {source}"), source)


def test_an_answer_is_remembered_for_this_name_and_password_only(attempts: Attempts) -> None:
    attempts.succeeded(ALICE, RIGHT, "192.0.2.1")
    attempts.failed(ALICE, Password("wrong"), "192.0.2.1")
    assert attempts.answer(ALICE, RIGHT) is True
    assert attempts.answer(ALICE, Password("wrong")) is False
    assert attempts.answer(ALICE, Password("other")) is None
    assert attempts.answer(BOB, RIGHT) is None


def test_name_and_password_are_not_mixed_up(attempts: Attempts) -> None:
    attempts.succeeded(Address("a", "b.test"), Password("c"), "")
    assert attempts.answer(Address("a", "b.tes"), Password("tc")) is None


def test_a_source_that_guesses_is_kept_out(attempts: Attempts) -> None:
    for number in range(PER_SOURCE.amount):
        guess(attempts, Address(f"user{number}", "a.test"), "192.0.2.1", 1)
    assert attempts.barred(ALICE, "192.0.2.1") == "too many wrong passwords from 192.0.2.1"
    assert attempts.barred(ALICE, "192.0.2.2") is None


def test_an_account_that_is_guessed_at_stays_open_to_its_owner(attempts: Attempts) -> None:
    attempts.succeeded(ALICE, RIGHT, "192.0.2.9")
    for number in range(PER_ACCOUNT.amount):
        guess(attempts, ALICE, f"198.51.100.{number}", 1)
    assert attempts.barred(ALICE, "203.0.113.1") == "too many wrong passwords for alice@a.test"
    assert attempts.barred(ALICE, "192.0.2.9") is None
    assert attempts.barred(BOB, "203.0.113.1") is None


@pytest.mark.parametrize("source", ["127.0.0.1", "::ffff:127.0.0.1", "2001:db8:1::25", "", "not an address"])
def test_who_stands_for_many_people_is_not_counted(attempts: Attempts, source: str) -> None:
    for number in range(PER_SOURCE.amount * 2):
        guess(attempts, Address(f"user{number}", "a.test"), source, 1)
    assert attempts.barred(ALICE, source) is None


def test_a_site_of_ipv6_is_one_source(attempts: Attempts) -> None:
    for number in range(PER_SOURCE.amount):
        guess(attempts, Address(f"user{number}", "a.test"), f"2001:db8:2:3::{number:x}", 1)
    assert attempts.barred(ALICE, "2001:db8:2:3:ffff::1") == "too many wrong passwords from 2001:db8:2:3::/64"
    assert attempts.barred(ALICE, "2001:db8:2:4::1") is None


def test_no_password_is_kept(attempts: Attempts) -> None:
    attempts.succeeded(ALICE, Password("s3cret-xyzzy"), "192.0.2.1")
    attempts.failed(ALICE, Password("wr0ng-xyzzy"), "192.0.2.1")
    assert "xyzzy" not in repr({name: repr(value) for name, value in vars(attempts).items()})
