"""E-mail addresses as routing sees them.

Local parts are compared in lower case: RFC 5321 section 2.4 lets the domain's
own server decide, and every server that we move people from, and Dovecot,
ignores case. Domains are compared as they are in the DNS, in A-labels (RFC 5890):
``exämple.test`` is ``xn--exmple-cua.test``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import idna

from bascule.errors import BadAddress

MAX_LENGTH = 320  # characters; RFC 3696 section 3
_QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"')
_DOT_ATOM = re.compile(r"[^\s\"\\(),:;<>@\[\].]+(?:\.[^\s\"\\(),:;<>@\[\].]+)*")


def domain_name(text: str) -> str:
    """The name of a domain in A-labels and lower case.

    Raises:
        BadAddress: it can be no domain (RFC 5891).
    """
    name = text.lower().rstrip(".")
    if name.isascii():
        return name
    try:
        return idna.encode(name, uts46=True).decode()
    except idna.IDNAError as error:
        raise BadAddress(f"{text[:MAX_LENGTH]!r} is not a domain name") from error


def quoted(local_part: str) -> str:
    """A local part in quotes (RFC 5321 section 4.1.2)."""
    return '"' + re.sub(r'(["\\])', r"\\\1", local_part) + '"'


@dataclass(frozen=True, slots=True)
class Address:
    """``local_part@domain``, both in lower case.

    A local part that must be quoted (RFC 5321 section 4.1.2) keeps its quotes;
    one that need not loses them.
    """

    local_part: str
    domain: str

    def __str__(self) -> str:
        return f"{self.local_part}@{self.domain}"

    @property
    def is_dot_atom(self) -> bool:
        """Whether the local part needs no quotes (RFC 5321 section 4.1.2)."""
        return bool(_DOT_ATOM.fullmatch(self.local_part))

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read ``user@example.org``.

        Raises:
            BadAddress: there is no local part, no domain, or a character that
                no address has (RFC 5321 section 4.1.2 forbids controls and,
                outside of quotes, spaces).
        """
        local_part, at, domain = text.strip().rpartition("@")
        if not at or not local_part or not domain or len(text) > MAX_LENGTH:
            raise _bad(text)
        if local_part.startswith('"') and (quoted := _QUOTED.fullmatch(local_part)):
            content = re.sub(r"\\(.)", r"\1", quoted[1])
            local_part = content if _DOT_ATOM.fullmatch(content) else local_part
            visible = content.replace(" ", "")
        else:
            visible = local_part
        if any(not c.isprintable() or c.isspace() for c in visible + domain):
            raise _bad(text)
        return cls(local_part.lower(), domain_name(domain))

    def without_detail(self, delimiter: str) -> Address:
        """``user+detail`` as ``user`` (RFC 5233); an address without detail is itself.

        ``delimiter`` is as Postfix's recipient_delimiter: any of its characters
        separates, the first in the address counts; none: there are no details.
        """
        for position, character in enumerate(self.local_part):
            if character in delimiter:
                return Address(self.local_part[:position], self.domain) if position else self
        return self


def _bad(text: str) -> BadAddress:
    return BadAddress(f"{text.strip()[:MAX_LENGTH]!r} is not an e-mail address", hint="Write user@example.org.")
