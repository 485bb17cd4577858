"""What a hook asks the authenticator, and what it is answered.

One request a connection, a netstring of fields between NULs:

``login NUL user NUL password NUL service NUL source``
    May this user log in? ``service`` is Dovecot's name (imap, pop3, submission,
    sieve, smtp), ``source`` the client's IP address, empty where it is not
    known. An empty netstring is sent at once: the authenticator is at work, and
    the legacy server, or a flip, may now take its time. The reply follows.
``passdb NUL user NUL service``
    What does the passdb say of this user, whose password is not at hand?
``userdb NUL user NUL service``
    Where is this user's mailbox?
``users``
    Everybody whose mailbox is in this store.

``user`` is the name with its domain, as the client gave it. The reply is a
netstring of a result and fields: ``result NUL name=value NUL ...``; of
``users``, the names: ``ok NUL user NUL ...``.

The hooks themselves, ``bascule-checkpassword`` and ``passdb.lua``, have this
again in their own way: they import nothing. A login of four fields, without the
first, is that of a hook of version 0.1, which expects no empty netstring.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from bascule import netstring
from bascule.credential import Password
from bascule.serving import BadRequest

Result = Literal["ok", "refused", "unknown", "temporary"]

MAX_FIELD = 1024  # bytes; Dovecot takes no longer names and passwords either
AT_WORK = netstring.encode(b"")


@dataclass(frozen=True, slots=True)
class Login:
    user: str
    password: Password
    service: str
    source: str
    #: Whether the hook waits for AT_WORK.
    wants_sign: bool = False


@dataclass(frozen=True, slots=True)
class Lookup:
    database: Literal["passdb", "userdb"]
    user: str
    service: str


@dataclass(frozen=True, slots=True)
class Users:
    """Everybody, please."""


Request = Login | Lookup | Users


def decode(payload: bytes) -> Request:
    """
    Raises:
        BadRequest: without quoting what was sent, for it may hold a password.
    """
    parts = payload.split(b"\0")
    if any(len(part) > MAX_FIELD for part in parts):
        raise BadRequest(f"a field is of at most {MAX_FIELD} bytes")
    try:
        fields = [part.decode() for part in parts]
    except UnicodeDecodeError:
        raise BadRequest("a request is UTF-8") from None
    match fields:
        case ["login", user, password, service, source]:
            return Login(user, Password(password), service, source, wants_sign=True)
        case [user, password, service, source]:
            return Login(user, Password(password), service, source)
        case ["passdb" | "userdb" as database, user, service]:
            return Lookup(database, user, service)
        case ["users"]:
            return Users()
    raise BadRequest("this is no request")


@dataclass(frozen=True, slots=True)
class Reply:
    """
    ``ok``         with ``fields``: those of a passdb or userdb
    ``refused``    of a login, the password is wrong; of a lookup, there is no such user in a domain of ours
    ``unknown``    not a name in a domain of ours: other passdbs and userdbs may know it
    ``temporary``  cannot say now; never taken for a wrong password
    """

    result: Result
    fields: dict[str, str] = field(default_factory=dict)

    @property
    def text(self) -> str:
        return "\0".join([self.result, *(f"{name}={value}" for name, value in self.fields.items())])

    def encode(self) -> bytes:
        return netstring.encode(self.text.encode())


def encoded(result: Result, words: Iterable[str]) -> bytes:
    """A netstring of these."""
    return netstring.encode("\0".join([result, *words]).encode())
