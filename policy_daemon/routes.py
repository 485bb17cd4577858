"""Where mail goes, and who may send as whom: the decisions, as pure functions of the directory.

Nothing here waits. What cannot be answered is temporary, never "not found":
a lookup that fails into a default would send a migrated user's mail astray.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from bascule.address import Address, domain_name, quoted
from bascule.directory import Directory, Domain, Mailbox
from bascule.errors import BadAddress
from bascule.legacy import LegacySettings

#: Recipients of this domain are the barrier's; .invalid is never in the DNS (RFC 6761).
BARRIER_DOMAIN = "barrier.bascule.invalid"
#: The clone of lmtp(8) in master.cf whose next hop is ours: it defers everything but barriers.
HOLD_TRANSPORT = "bascule-hold"
#: How mail goes to the legacy server, by the domain's smtp_tls: by Postfix's own transport, or one of ours.
RELAY_TRANSPORTS = {"may": "relay", "encrypt": "bascule-relay-encrypt", "verify": "bascule-relay-verify"}
#: The clones of lmtp(8) in master.cf that deliver here, by how the store is reached.
LOCAL_TRANSPORTS = {"unix": "bascule-lmtp", "inet": "bascule-lmtp-tls"}

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


@dataclass(frozen=True, slots=True)
class _Key:
    """What a key says: a recipient of a domain, or a domain. ``address`` is None for a domain, and for a local part
    that no mailbox can have."""

    domain: str
    address: Address | None

    @classmethod
    def parse(cls, key: str) -> _Key | None:
        """None: no address and no domain. Postfix's policy requests have local parts without their quotes."""
        local_part, at, domain = key.rpartition("@")
        for spelling in (key, f"{quoted(local_part)}@{domain}") if at else ():
            with suppress(BadAddress):
                address = Address.parse(spelling)
                if spelling == spelling.strip():  # what quotes would keep is part of the name
                    return cls(address.domain, address)
        with suppress(BadAddress):
            return cls(domain_name(key.rpartition("@")[2]), None)
        return None


class Routes:
    """Answers of the socketmaps and of the policy service."""

    def __init__(self, directory: Directory, hold_endpoint: str, on_accepted: Callable[[Address], None]) -> None:
        self._directory = directory
        self._hold = f"{HOLD_TRANSPORT}:{hold_endpoint}"
        self._on_accepted = on_accepted
        self.maps: dict[str, Callable[[str], Reply]] = {
            "transport": self.transport,
            "domains": self.domains,
            "aliases": self.aliases,
            "senders": self.senders,
            "route": self.route,
            "accepted": self.accepted,
        }

    def lookup(self, map_name: str, key: str) -> Reply:
        """The reply to one socketmap request."""
        answer = self.maps.get(map_name)
        if answer is None:
            return Reply("PERM", f"bascule has no map {map_name!r}; it has {', '.join(self.maps)}")
        return answer(key)

    def transport(self, key: str) -> Reply:
        """transport(5): the transport and next hop of an address or a domain."""
        asked = _Key.parse(key)
        if asked is not None and asked.domain == BARRIER_DOMAIN:
            return Reply("OK", self._hold)
        if not self._directory.loaded:
            return _TEMPORARY
        domain, mailbox = self._find(asked)
        if domain is None:
            return NOT_FOUND
        if mailbox is not None:
            if mailbox.state == "local":
                transport = LOCAL_TRANSPORTS[mailbox.lmtp_next_hop.partition(":")[0]]
                return Reply("OK", f"{transport}:{mailbox.lmtp_next_hop}")
            return Reply("OK", self._hold)
        if domain.mode == "closed":
            return Reply("OK", "error:5.1.1 no such user here")
        transport = RELAY_TRANSPORTS[domain.legacy.smtp_tls]
        return Reply("OK", f"{transport}:[{domain.legacy.smtp_host.strip('[]')}]:{domain.legacy.smtp_port}")

    def domains(self, key: str) -> Reply:
        """relay_domains: the domains that we take mail for."""
        if not self._directory.loaded:
            return _TEMPORARY
        domain, _ = self._find(_Key.parse(key))
        return NOT_FOUND if domain is None or "@" in key else Reply("OK", key)

    def aliases(self, key: str) -> Reply:
        """virtual_alias_maps: the mailbox that an address is another name of.

        An address whose domain is written in U-labels is another name of itself in
        A-labels: a server without SMTPUTF8 (RFC 6531) can take that.
        """
        if not self._directory.loaded:
            return _TEMPORARY
        asked = _Key.parse(key)
        domain, _ = self._find(asked)
        if domain is None or asked is None or asked.address is None:
            return NOT_FOUND
        target = self._directory.alias(asked.address)
        if target is not None:
            return Reply("OK", str(target))
        local_part, _, name = key.rpartition("@")
        return NOT_FOUND if name.isascii() else Reply("OK", f"{local_part}@{asked.domain}")

    def senders(self, key: str) -> Reply:
        """smtpd_sender_login_maps: who may send as an address of ours: its owner, by the name used to log in.

        The owner of another name is the mailbox that it stands for, whether that
        has moved or not. With a detail it is the same person's.
        """
        if not self._directory.loaded:
            return _TEMPORARY
        asked = _Key.parse(key)
        domain, mailbox = self._find(asked)
        if domain is None or asked is None or asked.address is None or not key.partition("@")[0]:
            return NOT_FOUND
        target = self._directory.alias(asked.address)
        if target is not None:
            return Reply("OK", str(self._directory.base(target)))
        if mailbox is not None:
            return Reply("OK", str(mailbox.address))
        return NOT_FOUND if domain.mode == "closed" else Reply("OK", str(self._directory.base(asked.address)))

    def accepted(self, key: str) -> Reply:
        """From the milter: a message for this recipient was accepted. Counted if it goes to the legacy server."""
        seen = self.sighting(key)
        if seen is None:
            return NOT_FOUND
        self._on_accepted(seen)
        return Reply("OK", "counted")

    def route(self, key: str) -> Reply:
        """For the milter: where mail for a recipient goes now: local, legacy or held."""
        if not self._directory.loaded:
            return _TEMPORARY
        asked = _Key.parse(key)
        domain, mailbox = self._find(asked)
        if domain is None:
            return NOT_FOUND
        if mailbox is None and asked is not None and asked.address is not None:
            target = self._directory.alias(asked.address)
            mailbox = None if target is None else self._directory.mailbox(target)
        if mailbox is None:
            return Reply("OK", "legacy")
        return Reply("OK", "local" if mailbox.state == "local" else "held")

    def verification(self, recipient: str) -> str | tuple[LegacySettings, Address]:
        """At RCPT TO: the access(5) action, or the legacy server that must be asked whether it takes this recipient."""
        if not self._directory.loaded:
            return f"DEFER_IF_PERMIT 4.3.0 {NOT_LOADED}"
        asked = _Key.parse(recipient)
        domain, mailbox = self._find(asked)
        if domain is None or asked is None or mailbox is not None or self._is_alias(asked):
            return "DUNNO"
        if domain.mode == "closed":
            return "550 5.1.1 no such user here"
        if asked.address is None:
            return "550 5.1.3 no mailbox can have this name"
        return domain.legacy, asked.address

    def sighting(self, recipient: str) -> Address | None:
        """The address to be counted when a recipient was accepted: one whose mail goes to the legacy server."""
        asked = _Key.parse(recipient)
        domain, mailbox = self._find(asked)
        if domain is None or domain.mode == "closed" or mailbox is not None or self._is_alias(asked):
            return None
        return None if asked is None or asked.address is None else self._directory.base(asked.address)

    def _find(self, asked: _Key | None) -> tuple[Domain | None, Mailbox | None]:
        """The domain of a key, and its mailbox if that is one of the exceptions."""
        if asked is None:
            return None, None
        domain = self._directory.domains.get(asked.domain)
        if domain is None or asked.address is None:
            return domain, None
        return domain, self._directory.mailbox(asked.address)

    def _is_alias(self, asked: _Key | None) -> bool:
        return asked is not None and asked.address is not None and self._directory.alias(asked.address) is not None
