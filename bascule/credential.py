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
from argon2.exceptions import InvalidHashError, VerificationError
from nacl.encoding import Base64Encoder
from nacl.exceptions import CryptoError
from nacl.public import PrivateKey, PublicKey, SealedBox

from bascule.errors import BadSettings, CannotUnseal

#: Dovecot's scheme prefix (Dovecot 2.3 manual, "Password Schemes").
_SCHEME = "{ARGON2ID}"
_hasher = PasswordHasher()


@dataclass(frozen=True, slots=True)
class Password:
    """A password in memory. It does not show itself in logs, tracebacks or representations."""

    secret: str = field(repr=False)

    def __str__(self) -> str:
        return "Password(…)"

    def hashed(self) -> str:
        """Dovecot's ``{ARGON2ID}$argon2id$…`` (RFC 9106, the library's second recommended parameters)."""
        return _SCHEME + _hasher.hash(self.secret)

    def matches(self, hashed: str) -> bool:
        """Whether ``hashed`` was made by :meth:`hashed` from this password."""
        try:
            return _hasher.verify(hashed.removeprefix(_SCHEME), self.secret)
        except (VerificationError, InvalidHashError):
            return False


class Sealer:
    """Seals passwords to the workers' public key, a file with one line of base64."""

    def __init__(self, public_key: Path) -> None:
        self._box = SealedBox(PublicKey(_read(public_key), Base64Encoder))

    def seal(self, password: Password) -> bytes:
        return self._box.encrypt(password.secret.encode())


class Unsealer:
    """Opens what a :class:`Sealer` sealed; needs the private key, a file with one line of base64."""

    def __init__(self, private_key: Path) -> None:
        self._box = SealedBox(PrivateKey(_read(private_key), Base64Encoder))

    def unseal(self, sealed: bytes) -> Password:
        """
        Raises:
            CannotUnseal: it was sealed to another key.
        """
        try:
            return Password(self._box.decrypt(sealed).decode())
        except CryptoError as error:
            raise CannotUnseal(
                "the stored password was sealed to another key than this worker's",
                hint="Give the worker the private key that belongs to keys.public, or ask for the password again.",
            ) from error


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
