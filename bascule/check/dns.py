"""What the DNS says of a domain, as several resolvers see it: MX, its TTL, SPF, the names that users are told."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import dns.exception
import dns.resolver
import spf

from bascule.check.finding import Finding
from bascule.directory import Mode

SYSTEM = "system"
TIMEOUT = 5.0  # seconds that a resolver may take
SHORT_TTL = 3600  # seconds; a change of a record with a longer one takes long to be seen
#: What pyspf asks for: types and the form in which it wants the data.
_SPF_TYPES = ("A", "AAAA", "MX", "PTR", "TXT", "SPF", "CNAME")


class Resolver:
    """A resolver by its name in the settings: ``system``, an address, or ``address:port``."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._resolver = dns.resolver.Resolver(configure=name == SYSTEM)
        if name != SYSTEM:
            address, _, port = name.partition(":") if name.count(":") == 1 else (name, "", "")
            self._resolver.nameservers = [address]
            self._resolver.port = int(port or 53)
        self._resolver.lifetime = TIMEOUT

    def ask(self, name: str, kind: str) -> dns.resolver.Answer | None:
        """The answer, or None if there is none.

        Raises:
            dns.exception.DNSException: the resolver does not say.
        """
        try:
            return self._resolver.resolve(name, kind, search=False)
        except (dns.resolver.NXDOMAIN, dns.resolver.NoAnswer):
            return None

    def addresses(self, name: str) -> set[str]:
        """The A and AAAA records of a name."""
        return {str(record) for kind in ("A", "AAAA") for record in self.ask(name, kind) or ()}

    def spf_result(self, domain: str, address: str, helo: str) -> str:
        """What SPF (RFC 7208) says of mail of the domain from an address: pass, fail, softfail, none, ..."""

        def lookup(name: str, kind: str, *_: object) -> list[tuple[tuple[str, str], object]]:
            if kind not in _SPF_TYPES:
                return []
            try:
                answer = self.ask(name, kind)
            except dns.exception.DNSException as error:
                raise spf.TempError(f"DNS: {error}") from error
            return [((name, kind), _as_spf_wants(record, kind)) for record in answer or ()]

        before, spf.DNSLookup = spf.DNSLookup, lookup
        try:
            return str(spf.check2(i=address, s=f"postmaster@{domain}", h=helo)[0])
        finally:
            spf.DNSLookup = before


def _as_spf_wants(record: object, kind: str) -> object:
    match kind:
        case "MX":
            return record.preference, record.exchange.to_text(omit_final_dot=True)  # type: ignore[attr-defined]
        case "TXT" | "SPF":
            return record.strings  # type: ignore[attr-defined]
        case "A" | "AAAA":
            return record.address  # type: ignore[attr-defined]
        case _:
            return record.target.to_text(omit_final_dot=True)  # type: ignore[attr-defined]


@dataclass(frozen=True, slots=True)
class Here:
    """Our side: the names of its MX nodes, and the names that users are told."""

    nodes: tuple[str, ...]
    client_names: tuple[str, ...]


def check_dns(domain: str, mode: Mode, here: Here, resolvers: Sequence[str]) -> Iterator[Finding]:
    """Ask every resolver; what they agree on is said once."""
    seen: dict[tuple[str, ...], list[tuple[Resolver, int]]] = {}
    for name in resolvers:
        resolver = Resolver(name)
        try:
            answer = resolver.ask(domain, "MX")
        except dns.exception.DNSException as error:
            yield Finding("note", "DNS", f"the resolver {name} does not say: {type(error).__name__}")
            continue
        ttl = 0 if answer is None or answer.rrset is None else answer.rrset.ttl
        hosts = tuple(sorted(str(each.exchange).rstrip(".").lower() for each in answer or ()))
        seen.setdefault(hosts, []).append((resolver, ttl))
    for hosts, who in seen.items():
        yield _mx(domain, mode, here, hosts, who)
    if len(seen) > 1:
        longest = max(ttl for who in seen.values() for _, ttl in who)
        yield Finding(
            "note", "DNS", f"not all resolvers see the same MX of {domain}", f"Wait for the TTL: {longest} s at most."
        )
    for who in list(seen.values())[:1]:
        resolver = who[0][0]
        yield from _spf(domain, here, resolver)
        yield from _client_names(here, resolver)


def _mx(domain: str, mode: Mode, here: Here, hosts: tuple[str, ...], who: list[tuple[Resolver, int]]) -> Finding:
    resolver = who[0][0]
    ttl = max(ttl for _, ttl in who)
    by = ", ".join(each.name for each, _ in who)
    text = f"MX of {domain}: {', '.join(hosts) or 'none'}, TTL {ttl} s (seen by {by})"
    ours = {name.lower() for name in here.nodes}
    ours_addresses = {address for name in ours for address in resolver.addresses(name)}
    is_here = [host for host in hosts if host in ours or resolver.addresses(host) & ours_addresses]
    if hosts and len(is_here) == len(hosts):
        return Finding("good", "DNS", f"{text}: all here")
    if is_here:
        elsewhere = ", ".join(host for host in hosts if host not in is_here)
        return Finding(
            "wrong",
            "DNS",
            f"{text}: {elsewhere} is not one of {', '.join(sorted(ours))}",
            "Remove it: mail that enters there reaches users who have moved late, as stragglers.",
        )
    if mode == "active":
        return Finding(
            "wrong",
            "DNS",
            f"{text}: not here, though the migration is active",
            f"Point the MX at {', '.join(sorted(ours))}: mail for users who have moved reaches them late until then.",
        )
    remedy = f"Point it at {', '.join(sorted(ours))} when you activate the migration."
    if ttl > SHORT_TTL:
        remedy += f" Lower its TTL to 300 first, {ttl} s before at least, so that you can go back quickly."
    return Finding("note", "DNS", text, remedy)


def _spf(domain: str, here: Here, resolver: Resolver) -> Iterator[Finding]:
    """Whether mail that users send from here passes."""
    for name in here.nodes:
        addresses = sorted(resolver.addresses(name))
        if not addresses:
            yield Finding(
                "note", "DNS", f"{name} has no address in the DNS", "Is [node] in bascule.toml the name of this host?"
            )
        for address in addresses:
            result = resolver.spf_result(domain, address, name)
            text = f"SPF of {domain} for mail from {name} ({address}): {result}"
            if result == "pass":
                yield Finding("good", "DNS", text)
            elif result == "none":
                yield Finding("note", "DNS", text, "There is no SPF record; many receivers want one.")
            elif result in {"permerror", "temperror"}:
                yield Finding("wrong", "DNS", text, "The record cannot be used: two of them, or a mistake in it.")
            else:
                yield Finding(
                    "wrong",
                    "DNS",
                    text,
                    f"Add {'ip6' if ':' in address else 'ip4'}:{address} to it: users who have moved send from here.",
                )


def _client_names(here: Here, resolver: Resolver) -> Iterator[Finding]:
    for name in here.client_names:
        if resolver.addresses(name):
            yield Finding("good", "DNS", f"users are told {name}, and it has an address")
        else:
            yield Finding(
                "wrong", "DNS", f"users are told {name}, and it has no address", "See [users] in bascule.toml."
            )
