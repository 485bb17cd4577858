"""E-mail addresses as routing sees them.

Local parts are compared in lower case: RFC 5321 section 2.4 lets the domain's
own server decide, and every server that we move people from, and Dovecot,
ignores case.
"""

from __future__ import annotations

from dataclasses import dataclass

from bascule.errors import BadAddress


@dataclass(frozen=True, slots=True)
class Address:
    """``local_part@domain``, both in lower case."""

    local_part: str
    domain: str

    def __str__(self) -> str:
        return f"{self.local_part}@{self.domain}"

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read ``user@example.org``.

        Raises:
            BadAddress: there is no local part, no domain, or a character that
                no address has (RFC 5321 section 4.1.2 forbids controls and,
                outside of quotes, spaces).
        """
        local_part, at, domain = text.strip().rpartition("@")
        if not at or not local_part or not domain:
            raise BadAddress(f"{text.strip()[:320]!r} is not an e-mail address", hint="Write user@example.org.")
        if any(not c.isprintable() or c.isspace() for c in local_part + domain) or len(text) > 320:
            raise BadAddress(f"{text.strip()[:320]!r} is not an e-mail address", hint="Write user@example.org.")
        return cls(local_part.lower(), domain.lower().rstrip("."))

    def without_detail(self, delimiter: str) -> Address:
        """``user+detail`` as ``user`` (RFC 5233); an address without detail is itself."""
        user, found, _ = self.local_part.partition(delimiter)
        return Address(user, self.domain) if found and user else self
