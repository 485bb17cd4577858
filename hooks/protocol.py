"""What a hook asks the authenticator, and what it is answered.

One request a connection: a netstring of ``user NUL password NUL service NUL
source``. ``service`` is Dovecot's name (imap, pop3, submission, sieve, smtp),
``source`` the client's IP address, empty where it is not known. The reply is a
netstring of a result and passdb fields: ``result NUL name=value NUL ...``.

The hooks themselves, ``bascule-checkpassword`` and ``passdb.lua``, have this
again in their own way: they import nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from bascule import netstring
from bascule.credential import Password
from bascule.serving import BadRequest

Result = Literal["ok", "refused", "unknown", "temporary"]

MAX_FIELD = 1024  # bytes; Dovecot takes no longer names and passwords either
_FIELDS = 4


@dataclass(frozen=True, slots=True)
class Request:
    user: str
    password: Password
    service: str
    source: str

    @classmethod
    def decode(cls, payload: bytes) -> Request:
        """
        Raises:
            BadRequest: without quoting what was sent, for it may hold a password.
        """
        parts = payload.split(b"\0")
        if len(parts) != _FIELDS or any(len(part) > MAX_FIELD for part in parts):
            raise BadRequest(f"a request is {_FIELDS} fields of at most {MAX_FIELD} bytes")
        try:
            user, password, service, source = (part.decode() for part in parts)
        except UnicodeDecodeError:
            raise BadRequest("a request is UTF-8") from None
        return cls(user, Password(password), service, source)


@dataclass(frozen=True, slots=True)
class Reply:
    """
    ``ok``         with ``fields``: passdb fields, those of a proxy to the legacy
                   server, or none for a user who is served here
    ``refused``    the password is wrong
    ``unknown``    not a user of a domain in migration; other passdbs may know them
    ``temporary``  cannot say now; never taken for a wrong password
    """

    result: Result
    fields: dict[str, str] = field(default_factory=dict)

    def encode(self) -> bytes:
        return netstring.encode(
            "\0".join([self.result, *(f"{name}={value}" for name, value in self.fields.items())]).encode()
        )
