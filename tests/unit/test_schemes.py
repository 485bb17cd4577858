"""Hashes of the legacy side, judged by Dovecot itself: what its doveadm makes must be right here, and nothing else."""

from __future__ import annotations

import subprocess
import threading
import time

import pytest
from argon2.exceptions import InvalidHashError, VerificationError

from bascule import schemes
from bascule.credential import Password
from bascule.schemes import BadHash, read, scheme_of, verify

SECRET = "Grüße, harbour 7"

MADE_BY_DOVECOT = (
    "MD5-CRYPT", "SHA256-CRYPT", "SHA512-CRYPT", "BLF-CRYPT", "DES-CRYPT", "CRYPT", "PLAIN-MD5", "LDAP-MD5", "SMD5",
    "SHA", "SHA1", "SSHA", "SHA256", "SSHA256", "SHA512", "SSHA512", "PBKDF2", "ARGON2I", "ARGON2ID",
    "SHA512.HEX", "SSHA256.HEX", "SHA.B64", "SMD5.BASE64",
)  # fmt: skip


def made(scheme: str) -> str:
    """A hash of SECRET, by Dovecot."""
    done = subprocess.run(
        ["doveadm", "-c", "/dev/null", "pw", "-s", scheme, "-p", SECRET],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


@pytest.mark.parametrize("scheme", MADE_BY_DOVECOT)
def test_what_dovecot_makes_is_right_here(scheme: str) -> None:
    hashed = read(made(scheme))
    assert hashed.startswith(f"{{{scheme}}}")
    assert Password(SECRET).matches(hashed)
    assert not Password(SECRET[1:]).matches(hashed)
    assert not Password("").matches(hashed)
    assert not Password(SECRET + "\0").matches(hashed)


#: As /etc/shadow and cPanel have them, of SECRET: by crypt(3) of Debian 12 (mkpasswd).
BARE = {"$1$": "MD5-CRYPT", "$5$": "SHA256-CRYPT", "$6$": "SHA512-CRYPT", "$2b$": "BLF-CRYPT", "$y$": "CRYPT"}


@pytest.mark.parametrize("prefix", BARE)
def test_what_crypt_makes_is_known_by_its_form_and_judged_alike_by_dovecot(prefix: str) -> None:
    salts = {
        "$1$": "$1$saltsalt$",
        "$5$": "$5$rounds=6000$saltsaltsaltsalt$",
        "$6$": "$6$saltsalt$",
        "$2b$": "$2b$05$abcdefghijklmnopqrstuu",
        "$y$": "$y$j9T$DuQkPQ8kJMPcmIzXXXXXX.$",
    }
    bare = schemes._crypt(SECRET.encode(), salts[prefix].encode()).decode()
    hashed = read(bare)
    assert hashed == f"{{{BARE[prefix]}}}{bare}"
    assert verify(hashed, SECRET)
    assert not verify(hashed, SECRET + "x")
    for secret, status in ((SECRET, 0), (SECRET + "x", 1)):
        told = subprocess.run(
            ["doveadm", "-c", "/dev/null", "pw", "-t", hashed, "-p", secret], capture_output=True, check=False
        )
        assert bool(told.returncode) == bool(status)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "locked"),
        ("!", "locked"),
        ("*", "locked"),
        ("!!", "locked"),
        ("x", "locked"),
        ("!$6$saltsalt$" + "a" * 86, "locked"),
        ("$6$saltsalt$" + "a" * 85, "no hash that is known"),
        ("$6$rounds=999999999$saltsalt$" + "a" * 86, "999999999 rounds"),
        ("{SHA512-CRYPT}$6$rounds=999999999$saltsalt$" + "a" * 86, "999999999 rounds"),
        ("$2y$31$" + "a" * 53, "its cost is 31"),
        ("$y$jFT$saltsalt$" + "a" * 43, "no hash that is known"),
        ("{SHA512-CRYPT}$5$saltsalt$" + "a" * 43, "of another scheme"),
        ("{CRYPT.HEX}$5$saltsalt$" + "a" * 43, "of another scheme"),
        ("{PLAIN}secret", "the password itself"),
        ("{cleartext}secret", "the password itself"),
        ("{CRAM-MD5}" + "0" * 64, "not a scheme by which logins are checked"),
        ("{SSHA}" + "AAAA", "not a digest of its length"),
        ("{SSHA}not base64!", "not a digest of its length"),
        ("{SHA256.ROT13}aaaa", "not a scheme by which"),
        ("{PBKDF2}$1$salt$99999999$" + "0" * 40, "99999999 rounds"),
        ("{PBKDF2}plain", "as Dovecot writes it"),
        ("{ARGON2ID}$argon2i$v=19$m=65536,t=3,p=4$c2FsdHNhbHQ$c2FsdHNhbHQ", "of another scheme"),
        ("$argon2id$v=19$m=9999999,t=3,p=4$c2FsdHNhbHQ$c2FsdHNhbHQ", "9999999 KiB"),
        ("$argon2id$v=19$nonsense", "no hash of Argon2"),
    ],
)
def test_what_cannot_be_verified_is_refused_and_not_quoted(text: str, words: str) -> None:
    with pytest.raises(BadHash, match=words) as refused:
        read(text)
    assert "secret" not in str(refused.value)
    assert "saltsalt" not in str(refused.value)


def test_a_hash_is_given_back_in_dovecots_form() -> None:
    assert read("{md5}$1$saltsalt$" + "a" * 22).startswith("{MD5-CRYPT}$1$")
    assert read("{ssha.hex}" + "0" * 48) == "{SSHA.HEX}" + "0" * 48
    assert scheme_of("{SSHA.HEX}" + "0" * 48) == "SSHA"
    assert scheme_of("no scheme") == ""


@pytest.mark.parametrize(
    "text", ["no scheme", "{OTP}x", "{PBKDF2}x", "{SSHA}AAAA", "{ARGON2ID}$argon2id$x", "{CRYPT}*"]
)
def test_what_is_no_hash_makes_no_password_wrong(text: str) -> None:
    with pytest.raises((InvalidHashError, VerificationError, OSError)):
        verify(text, "x")


def test_a_slow_hash_does_not_hold_up_other_threads() -> None:
    slow = "$6$rounds=900000$saltsalt$" + "a" * 86
    ended = threading.Event()

    def check() -> None:
        verify(read(slow), SECRET)
        ended.set()

    thread = threading.Thread(target=check)
    thread.start()
    turns = 0
    while not ended.is_set():
        time.sleep(0.002)
        turns += 1
    thread.join()
    assert turns > 2, "this thread stood still"
