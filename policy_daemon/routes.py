"""Where mail goes: the decisions, as pure functions of the directory.

Nothing here waits. What cannot be answered is temporary, never "not found":
a lookup that fails into a default would send a migrated user's mail astray.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from bascule.address import Address
from bascule.directory import Directory
from bascule.errors import BadAddress

#: Recipients of this domain are the barrier's; .invalid is never in the DNS (RFC 6761).
BARRIER_DOMAIN = "barrier.bascule.invalid"
#: The clone of lmtp(8) in master.cf whose next hop defers everything.
HOLD_TRANSPORT = "bascule-hold"
#: The clone of lmtp(8) in master.cf that keeps what a store refuses.
LOCAL_TRANSPORT = "bascule-lmtp"

NOT_LOADED = "bascule: the routes are not loaded yet"


@dataclass(frozen=True, slots=True)
class Reply:
    """A reply of socketmap_table(5)."""

    status: Literal["OK", "NOTFOUND", "TEMP", "PERM"]
    text: str = ""

    def __str__(self) -> str:
        return f"{self.status} {self.text}"


NOT_FOUND = Reply("NOTFOUND")
_TEMPORARY = Reply("TEMP", NOT_LOADED)


def _address(key: str) -> Address | None:
    try:
        return Address.parse(key)
    except BadAddress:
        return None


class Routes:
    """Answers of the socketmaps and of the policy service."""

    def __init__(self, directory: Directory, hold_endpoint: str, on_barrier: Callable[[str], None]) -> None:
        self._directory = directory
        self._hold = f"{HOLD_TRANSPORT}:{hold_endpoint}"
        self._on_barrier = on_barrier
        self.maps: dict[str, Callable[[str], Reply]] = {
            "transport": self.transport,
            "domains": self.domains,
            "aliases": self.aliases,
        }

    def lookup(self, map_name: str, key: str) -> Reply:
        """The reply to one socketmap request."""
        answer = self.maps.get(map_name)
        if answer is None:
            return Reply("PERM", f"bascule has no map {map_name!r}; it has {', '.join(self.maps)}")
        return answer(key)

    def transport(self, key: str) -> Reply:
        """transport(5): the transport and next hop of an address or a domain."""
        address = _address(key)
        if address is not None and address.domain == BARRIER_DOMAIN:
            self._on_barrier(address.local_part)
            return Reply("OK", "discard:bascule barrier")
        if not self._directory.loaded:
            return _TEMPORARY
        domain = self._directory.domains.get(key.lower() if address is None else address.domain)
        if domain is None:
            return NOT_FOUND
        mailbox = None if address is None else self._directory.mailbox(address)
        if mailbox is not None:
            if mailbox.state == "local":
                return Reply("OK", f"{LOCAL_TRANSPORT}:{mailbox.lmtp_next_hop}")
            return Reply("OK", self._hold)
        if domain.mode == "closed":
            return Reply("OK", "error:5.1.1 no such user here")
        return Reply("OK", f"relay:[{domain.legacy.smtp_host}]:{domain.legacy.smtp_port}")

    def domains(self, key: str) -> Reply:
        """relay_domains: the domains that we take mail for."""
        if not self._directory.loaded:
            return _TEMPORARY
        return Reply("OK", key) if key.lower() in self._directory.domains else NOT_FOUND

    def aliases(self, key: str) -> Reply:
        """virtual_alias_maps: the mailbox that an address is another name of."""
        if not self._directory.loaded:
            return _TEMPORARY
        address = _address(key)
        target = None if address is None else self._directory.alias(address)
        return NOT_FOUND if target is None else Reply("OK", str(target))

    def verification(self, recipient: str) -> str:
        """The access(5) action at RCPT TO: verify at the legacy server what is routed there."""
        if not self._directory.loaded:
            return f"DEFER_IF_PERMIT 4.3.0 {NOT_LOADED}"
        address = _address(recipient)
        domain = None if address is None else self._directory.domains.get(address.domain)
        if address is None or domain is None or self._is_here(address):
            return "DUNNO"
        if domain.mode == "closed":
            return "550 5.1.1 no such user here"
        return "reject_unverified_recipient"

    def sighting(self, recipient: str) -> Address | None:
        """The address to be counted when a recipient was accepted: one whose mail goes to the legacy server."""
        address = _address(recipient)
        domain = None if address is None else self._directory.domains.get(address.domain)
        if address is None or domain is None or domain.mode == "closed" or self._is_here(address):
            return None
        return address.without_detail(self._directory.delimiter)

    def _is_here(self, address: Address) -> bool:
        return self._directory.mailbox(address) is not None or self._directory.alias(address) is not None
