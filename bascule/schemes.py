"""Hashes of passwords in the forms that Dovecot knows, as they are brought from the legacy side.

``{SCHEME}text`` as in Dovecot's manual ("Password Schemes"); without a scheme, as
crypt(3) writes them (crypt(5) of libxcrypt), in ``/etc/shadow`` say. What crypt(3)
makes is verified by the C library's crypt, as Dovecot does it, and without
holding up other threads; the rest are digests of the standard library. No error
quotes a hash.
"""

from __future__ import annotations

import base64
import binascii
import ctypes
import functools
import hashlib
import hmac
import re
from collections.abc import Callable

from argon2 import PasswordHasher, extract_parameters
from argon2.exceptions import InvalidHashError, VerifyMismatchError

from bascule.errors import BasculeError

#: A login may take a second or so of a processor, and no more memory than a host can spare for several.
MOST_ROUNDS = 1_000_000
MOST_BCRYPT = 14
MOST_ARGON2_KIB = 256 * 1024
MOST_ARGON2_PASSES = 16
_CRYPT_DATA = 32768  # bytes; sizeof(struct crypt_data), crypt(3) of libxcrypt

_NONE = "it is no hash that is known here"
_hasher = PasswordHasher()
_B64 = "[./0-9A-Za-z]"
#: Dovecot's scheme for what crypt(3) writes, by its form; the first group are the rounds or the cost.
_CRYPTED: dict[str, str] = {
    rf"\$1\$[^$:\s]{{0,8}}\${_B64}{{22}}": "MD5-CRYPT",
    rf"\$5\$(?:rounds=(\d{{1,9}})\$)?[^$:\s]{{0,16}}\${_B64}{{43}}": "SHA256-CRYPT",
    rf"\$6\$(?:rounds=(\d{{1,9}})\$)?[^$:\s]{{0,16}}\${_B64}{{86}}": "SHA512-CRYPT",
    rf"\$2[abxy]\$(\d\d)\${_B64}{{53}}": "BLF-CRYPT",
    # Cost 1 to 9 of yescrypt, as libxcrypt makes them: 2 to 256 MiB.
    rf"\$y\$j[789A-D][5T]\${_B64}{{1,86}}\${_B64}{{43}}": "CRYPT",
    rf"{_B64}{{13}}": "DES-CRYPT",
}
_CRYPT = {"CRYPT", "DES-CRYPT", "MD5-CRYPT", "SHA256-CRYPT", "SHA512-CRYPT", "BLF-CRYPT"}
#: Digests: the algorithm, and whether a salt follows the digest.
_DIGESTS: dict[str, tuple[str, bool]] = {
    "PLAIN-MD5": ("md5", False),
    "LDAP-MD5": ("md5", False),
    "SMD5": ("md5", True),
    "SHA": ("sha1", False),
    "SHA1": ("sha1", False),
    "SSHA": ("sha1", True),
    "SHA256": ("sha256", False),
    "SSHA256": ("sha256", True),
    "SHA512": ("sha512", False),
    "SSHA512": ("sha512", True),
}
_ARGON2 = {"ARGON2I", "ARGON2ID"}
_PBKDF2 = re.compile(r"\$1\$([^$\s]+)\$(\d{1,9})\$([0-9a-f]{40})")
#: With these the server keeps what is as good as the password.
_READABLE = {"PLAIN", "CLEAR", "CLEARTEXT", "PLAIN-TRUNC"}
_ENCODINGS = ("HEX", "B64", "BASE64")
_WITH_SCHEME = re.compile(r"\{([A-Za-z0-9-]+)(?:\.([A-Za-z0-9]+))?\}(.+)", re.DOTALL)


class BadHash(BasculeError):
    """What was given is not a hash that logins here can be checked by."""


def is_locked(text: str) -> bool:
    """Whether shadow(5) has this for an account that is locked, or has no password."""
    return text in {"", "x"} or text[0] in "!*"


def scheme_of(hashed: str) -> str:
    """Dovecot's name of the scheme of what :func:`read` gave, without an encoding."""
    found = _WITH_SCHEME.fullmatch(hashed)
    return "" if found is None else found[1]


def read(text: str) -> str:
    """A hash as it stands in a file, with its scheme before it, in Dovecot's form.

    Raises:
        BadHash: it is none, is of no scheme that is verified here, or costs more than a login may.
    """
    found = _WITH_SCHEME.fullmatch(text)
    if found is None:
        return _read_bare(text)
    scheme, encoding, body = found[1].upper(), (found[2] or "").upper(), found[3]
    if scheme == "MD5":  # Dovecot's name for several
        scheme = "MD5-CRYPT" if body.startswith("$1$") else "LDAP-MD5"
    if scheme in _READABLE:
        raise BadHash(f"{{{scheme}}} is the password itself, not a hash; give it to bascule import")
    if scheme in _CRYPT:
        known = _read_bare(body)
        if not encoding and scheme in {"CRYPT", scheme_of(known)}:
            return f"{{{scheme}}}{body}"
        raise BadHash(f"what follows {{{scheme}}} is of another scheme")
    if scheme in _ARGON2 and not encoding:
        if not body.startswith(f"${scheme.lower()}$"):
            raise BadHash(f"what follows {{{scheme}}} is of another scheme")
        _insist_on_argon2(body)
    elif scheme == "PBKDF2" and not encoding:
        parts = _PBKDF2.fullmatch(body)
        if parts is None:
            raise BadHash("what follows {PBKDF2} is not as Dovecot writes it: $1$salt$rounds$digest")
        _insist_on_rounds(int(parts[2]))
    elif scheme in _DIGESTS and (not encoding or encoding in _ENCODINGS):
        if _digest(scheme, encoding, body) is None:
            raise BadHash(f"what follows {{{scheme}}} is not a digest of its length")
    else:
        raise BadHash(f"{{{found[1]}}} is not a scheme by which logins are checked here")
    return f"{{{scheme}.{encoding}}}{body}" if encoding else f"{{{scheme}}}{body}"


def _read_bare(text: str) -> str:
    """What has no scheme before it: of crypt(3), or Argon2's own form."""
    for argon2 in sorted(_ARGON2):
        if text.startswith(f"${argon2.lower()}$"):
            _insist_on_argon2(text)
            return f"{{{argon2}}}{text}"
    for form, scheme in _CRYPTED.items():
        found = re.fullmatch(form, text)
        if found is None:
            continue
        cost = int(found[1]) if found.re.groups and found[1] else 0
        if scheme != "BLF-CRYPT":
            _insist_on_rounds(cost)
        elif not 4 <= cost <= MOST_BCRYPT:
            raise BadHash(f"its cost is {cost}: here it may be 4 to {MOST_BCRYPT}, or a login would take too long")
        return f"{{{scheme}}}{text}"
    if is_locked(text):
        raise BadHash("the account is locked, or has no password")
    raise BadHash("it is no hash that is known here, whole and unaltered")


def _insist_on_rounds(rounds: int) -> None:
    if rounds > MOST_ROUNDS:
        raise BadHash(f"it has {rounds} rounds: here it may be {MOST_ROUNDS}, or a login would take too long")


def _insist_on_argon2(text: str) -> None:
    try:
        parameters = extract_parameters(text)
    except (InvalidHashError, ValueError):
        raise BadHash("it is no hash of Argon2, whole and unaltered") from None
    if parameters.memory_cost > MOST_ARGON2_KIB or parameters.time_cost > MOST_ARGON2_PASSES:
        raise BadHash(
            f"it takes {parameters.memory_cost} KiB and {parameters.time_cost} passes: here it may be "
            f"{MOST_ARGON2_KIB} and {MOST_ARGON2_PASSES}, or a login would take too long"
        )


def verify(hashed: str, secret: str) -> bool:
    """Whether ``hashed``, which :func:`read` gave, was made from this password. It may take a second.

    Raises:
        VerificationError, InvalidHashError, OSError: it cannot be said: for want of memory, or it is no hash.
    """
    found = _WITH_SCHEME.fullmatch(hashed)
    if found is None:
        raise InvalidHashError(_NONE)
    if "\0" in secret:
        return False
    scheme, encoding, body = found[1], found[2] or "", found[3]
    if scheme in _ARGON2:
        try:
            return _hasher.verify(body, secret)
        except VerifyMismatchError:
            return False
    if scheme in _CRYPT:
        return hmac.compare_digest(_crypt(secret.encode(), body.encode()), body.encode())
    if scheme == "PBKDF2":
        parts = _PBKDF2.fullmatch(body)
        if parts is None:
            raise InvalidHashError(_NONE)
        made = hashlib.pbkdf2_hmac("sha1", secret.encode(), parts[1].encode(), int(parts[2]))
        return hmac.compare_digest(made.hex(), parts[3])
    kept = _digest(scheme, encoding, body) if scheme in _DIGESTS else None
    if kept is None:
        raise InvalidHashError(_NONE)
    digest, salt = kept
    made = hashlib.new(_DIGESTS[scheme][0], secret.encode() + salt, usedforsecurity=False).digest()
    return hmac.compare_digest(made, digest)


def _digest(scheme: str, encoding: str, body: str) -> tuple[bytes, bytes] | None:
    """Digest and salt; None: it is not of that length. Without a named encoding Dovecot goes by the length, too."""
    algorithm, is_salted = _DIGESTS[scheme]
    size = hashlib.new(algorithm, usedforsecurity=False).digest_size
    is_hex = encoding == "HEX" or (not encoding and len(body) == 2 * size and not is_salted)
    try:
        data = bytes.fromhex(body) if is_hex else base64.b64decode(body, validate=True)
    except (ValueError, binascii.Error):
        return None
    if len(data) < size or (len(data) == size) == is_salted:
        return None
    return data[:size], data[size:]


@functools.cache
def _crypt_rn() -> Callable[..., bytes | None]:
    """crypt_rn(3). Debian's essential packages have the library; ctypes lets other threads go on meanwhile."""
    function = ctypes.CDLL("libcrypt.so.1", use_errno=True).crypt_rn
    function.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int]
    function.restype = ctypes.c_char_p
    return function


def _crypt(secret: bytes, setting: bytes) -> bytes:
    """What crypt(3) makes of a password with the salt of ``setting``.

    Raises:
        OSError: it has no memory for it, or does not understand the setting.
    """
    data = ctypes.create_string_buffer(_CRYPT_DATA)
    try:
        made = _crypt_rn()(secret, setting, data, _CRYPT_DATA)
        if made is None:
            raise OSError(ctypes.get_errno(), "crypt(3) cannot verify this hash now")
        return made
    finally:
        ctypes.memset(data, 0, _CRYPT_DATA)
