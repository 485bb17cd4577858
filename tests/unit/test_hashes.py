"""Files of hashes: what is read of them, and how a mistake is told without quoting one."""

from __future__ import annotations

import io

import pytest

from bascule.check.facts import Kept, NotReadable, Output
from bascule.desk import COLUMNS, read_applicants
from bascule.errors import BasculeError
from bascule.hashes import Hashed, read_csv, read_shadow, verified_by_dovecot

KNOWN = frozenset({"SHA512-CRYPT", "SSHA", "MD5-CRYPT"})
SHA512 = "$6$saltsalt$" + "a" * 86
MD5 = "$1$saltsalt$" + "b" * 22


def test_a_csv_file_is_read() -> None:
    text = f"Address, HASH\nAnna@Old.Test,{{SHA512-CRYPT}}{SHA512}\nbert@old.test,{MD5}\n"
    found = read_csv(io.StringIO(text), "old.test", KNOWN)
    assert [(str(each.address), each.hash) for each in found] == [
        ("anna@old.test", "{SHA512-CRYPT}" + SHA512),
        ("bert@old.test", "{MD5-CRYPT}" + MD5),
    ]
    assert "aaa" not in repr(found)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("address\nanna@old.test\n", "does not name the columns"),
        ("address,hash,login\nanna@old.test,x,y\n", "does not name the columns"),
        (f"address,hash\nanna@elsewhere.test,{SHA512}\n", "line 2: the address is not one of old.test"),
        (f"address,hash\nno address,{SHA512}\n", "line 2: the address is none"),
        (f"address,hash\nanna@old.test,{SHA512}\nanna@old.test,{MD5}\n", "line 3: anna@old.test was there before"),
        ("address,hash\nanna@old.test,seKret\n", "line 2: it is no hash that is known here"),
        ("address,hash\nanna@old.test,{PLAIN}seKret\n", "line 2: {PLAIN} is the password itself"),
        ("address,hash\nanna@old.test,$y$j9T$seKretseKret$" + "a" * 43, "line 2: Dovecot here does not verify {CRYPT}"),
        (f"address,hash\nanna@old.test,{SHA512},more\n", "line 2: it has not as many fields"),
        ('address,hash\nanna@old.test,"seKret\n', "is not CSV"),
    ],
)
def test_a_mistake_is_told_by_its_line_and_not_quoted(text: str, words: str) -> None:
    with pytest.raises(BasculeError) as refused:
        read_csv(io.StringIO(text), "old.test", KNOWN)
    assert words in refused.value.message
    assert "seKret" not in str(refused.value)
    assert "saltsalt" not in str(refused.value)


def test_many_mistakes_are_counted() -> None:
    lines = "".join(f"user{number}@old.test,x\n" for number in range(30))
    with pytest.raises(BasculeError, match="and 10 more"):
        read_csv(io.StringIO("address,hash\n" + lines), "old.test", KNOWN)


def test_a_shadow_file_is_read() -> None:
    text = f"root:*:1::::::\nanna:{SHA512}:19000:0:99999:7:::\nbert:!{SHA512}:1::::::\nx:x:\n\ncarl@old.test:{MD5}\n"
    found, without = read_shadow(io.StringIO(text), "old.test", KNOWN)
    assert [str(each.address) for each in found] == ["anna@old.test", "carl@old.test"]
    assert without == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f"anna:{SHA512}:\nanna:{MD5}:\n", "line 2: anna@old.test was there before"),
        ("anna:seKret:\n", "line 1: it is no hash that is known here"),
        (f"anna@elsewhere.test:{SHA512}:\n", "line 1: the address is not one of old.test"),
        (f"an na:{SHA512}:\n", "line 1: the address is none"),
    ],
)
def test_a_mistake_in_a_shadow_file_is_told_by_its_line(text: str, words: str) -> None:
    with pytest.raises(BasculeError) as refused:
        read_shadow(io.StringIO(text), "old.test", KNOWN)
    assert words in refused.value.message
    assert "seKret" not in str(refused.value)


def test_bytes_that_are_no_text_are_told() -> None:
    with pytest.raises(BasculeError, match="not text in UTF-8"):
        read_shadow(io.TextIOWrapper(io.BytesIO(b"anna:\xff:\n"), "utf-8"), "old.test", KNOWN)


def test_dovecot_is_asked_which_schemes_it_verifies() -> None:
    assert verified_by_dovecot(Kept({"doveadm pw -l": "SSHA ssha512 \nCRYPT\n"})) == {"SSHA", "SSHA512", "CRYPT"}
    with pytest.raises(BasculeError, match="cannot be asked here") as refused:
        verified_by_dovecot(Kept({}))
    assert "on a store" in refused.value.hint
    assert isinstance(refused.value.__cause__, NotReadable)


def test_a_doveadm_that_fails_is_told() -> None:
    class Fails:
        def run(self, *_: str) -> Output:
            return Output(64, "", "no configuration")

    with pytest.raises(BasculeError, match="doveadm pw -l fails here"):
        verified_by_dovecot(Fails())


def test_a_hash_does_not_show_itself() -> None:
    (one,) = read_csv(io.StringIO(f"address,hash\nanna@old.test,{MD5}\n"), "old.test", KNOWN)
    assert isinstance(one, Hashed)
    assert MD5 not in repr(one)


def test_users_have_a_name_of_their_own_there() -> None:
    text = "address,login\nanna@old.test,OLD\\anna\nbert@old.test,\n"
    found = read_applicants(io.StringIO(text), "old.test")
    assert [(each.login, each.password) for each in found] == [("OLD\\anna", None), ("", None)]
    with pytest.raises(BasculeError, match="line 2: the login name is too long, or has a control character"):
        read_applicants(io.StringIO("address,login\nanna@old.test,a\tb\n"), "old.test")
    with pytest.raises(BasculeError, match="does not name the columns"):
        read_applicants(
            io.StringIO("address,password\nanna@old.test,x\n"), None, [each for each in COLUMNS if each != "password"]
        )
