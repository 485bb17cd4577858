"""Passwords: in memory, sealed at rest, and as the hash that Dovecot checks.

Sealing is libsodium's sealed box (``crypto_box_seal``): who has the public key
can seal, only the holder of the private key can open. Front-ends have the
public key only.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from argon2 import PasswordHasher
from nacl.encoding import Base64Encoder
from nacl.exceptions import CryptoError
from nacl.public import PrivateKey, PublicKey, SealedBox

from bascule import schemes
from bascule.errors import BadSettings, BasculeError, CannotUnseal

#: Dovecot's scheme prefix (Dovecot 2.3 manual, "Password Schemes").
_SCHEME = "{ARGON2ID}"
_hasher = PasswordHasher()
#: Of a password that a client can log in with (tried with Dovecot 2.3 and 2.4).
MOST_BYTES = 500


class PasswordNotUsable(BasculeError):
    """A password with which nobody could log in here."""


@dataclass(frozen=True, slots=True)
class Password:
    """A password in memory. It does not show itself in logs, tracebacks or representations."""

    secret: str = field(repr=False)

    def __str__(self) -> str:
        return "Password(…)"

    def insist_on_usable(self) -> None:
        """
        Raises:
            PasswordNotUsable: Dovecot would not let its owner in with it.
        """
        if any(letter < " " or letter == "\x7f" for letter in self.secret):
            raise PasswordNotUsable(
                "the password has a control character in it, a tab say, which Dovecot does not take",
                hint="Have another one set at the legacy server, and ask again.",
            )
        if len(self.secret.encode()) > MOST_BYTES:
            raise PasswordNotUsable(
                f"the password has more than {MOST_BYTES} bytes, which Dovecot does not take",
                hint="Have another one set at the legacy server, and ask again.",
            )

    def hashed(self) -> str:
        """Dovecot's ``{ARGON2ID}$argon2id$…`` (RFC 9106, the library's second recommended parameters)."""
        return _SCHEME + _hasher.hash(self.secret)

    def matches(self, hashed: str) -> bool:
        """Whether ``hashed`` was made from this password: by :meth:`hashed`, or elsewhere (:mod:`bascule.schemes`).

        Raises:
            VerificationError, InvalidHashError, OSError: it cannot be said: for want of memory, or it is no hash.
        """
        return schemes.verify(hashed, self.secret)


class Sealer:
    """Seals passwords to the workers' public key, a file with one line of base64."""

    def __init__(self, public_key: Path) -> None:
        self._box = SealedBox(PublicKey(_read(public_key), Base64Encoder))

    def seal(self, password: Password) -> bytes:
        return self._box.encrypt(password.secret.encode())


class Unsealer:
    """Opens what a :class:`Sealer` sealed; needs the private key, a file with one line of base64.

    While keys are changed, the file has the new key in its first line and former ones below.
    """

    def __init__(self, private_key: Path) -> None:
        self._path = private_key
        self._keys = [PrivateKey(line, Base64Encoder) for line in _read(private_key).split()]
        if not self._keys:
            raise BadSettings(f"the key {private_key} is empty", hint="Make the keys with: bascule keys create.")

    def unseal(self, sealed: bytes) -> Password:
        """
        Raises:
            CannotUnseal: it was sealed to another key.
        """
        return Password(self._open(sealed).decode())

    def reseal(self, sealed: bytes) -> bytes | None:
        """The same, sealed to the newest key; None: it is already.

        Raises:
            CannotUnseal: it was sealed to another key.
        """
        newest = SealedBox(self._keys[0])
        try:
            newest.decrypt(sealed)
        except CryptoError:
            return SealedBox(self._keys[0].public_key).encrypt(self._open(sealed))
        return None

    def _open(self, sealed: bytes) -> bytes:
        for key in self._keys:
            try:
                return SealedBox(key).decrypt(sealed)
            except CryptoError:
                continue
        raise CannotUnseal(
            f"the stored password was sealed to a key that is not in {self._path}",
            hint="Give the worker the private key that belongs to keys.public, or ask for the password again.",
        )


def create_keys(public_key: Path, private_key: Path) -> None:
    """Make a key pair; the private key is readable by its owner only.

    Raises:
        BadSettings: one of the files exists. A key is never overwritten:
            passwords may be sealed to it.
    """
    for path in (public_key, private_key):
        if path.exists():
            raise BadSettings(f"{path} exists already; it was left as it is")
    key = PrivateKey.generate()
    _write(private_key, key.encode(Base64Encoder), 0o400)
    _write(public_key, key.public_key.encode(Base64Encoder), 0o444)


def rotate_keys(public_key: Path, private_key: Path) -> None:
    """Make a new pair; former private keys stay below the new one. Done again before they are forgotten, it ends what
    was begun.

    Raises:
        BadSettings: the private key cannot be read.
    """
    lines = _read(private_key).split()
    if len(lines) == 1:
        lines.insert(0, PrivateKey.generate().encode(Base64Encoder))
        _replace(private_key, b"\n".join(lines), 0o400)
    _replace(public_key, PrivateKey(lines[0], Base64Encoder).public_key.encode(Base64Encoder), 0o444)


def forget_former_keys(private_key: Path) -> None:
    """Keep the first key of the file; what is sealed to another one is lost.

    Raises:
        BadSettings: it cannot be read.
    """
    _replace(private_key, _read(private_key).split()[0], 0o400)


def _replace(path: Path, content: bytes, mode: int) -> None:
    """Write a file anew, or leave it as it was."""
    new = path.with_name(f".{path.name}.new")
    new.unlink(missing_ok=True)
    _write(new, content, mode)
    new.replace(path)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes().strip()
    except OSError as error:
        raise BadSettings(
            f"the key {path} cannot be read: {error.strerror}",
            hint="Make the keys with: bascule keys create.",
        ) from error


def _write(path: Path, content: bytes, mode: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content + b"\n")
