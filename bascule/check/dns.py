"""What the DNS says of a domain, as several resolvers see it: MX, its TTL, SPF, the names that users are told.

And whether the legacy server that the settings name is this one.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence

import dns.exception
import dns.resolver
import spf

from bascule.check.facts import NotReadable
from bascule.check.finding import Said, good, note, wrong
from bascule.check.registry import check
from bascule.check.subject import Subject
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


def check_mx(domain: str, mode: Mode, nodes: Sequence[str], resolvers: Sequence[str]) -> Iterator[Said]:
    """Ask every resolver where mail of the domain goes; what they agree on is said once. ``nodes``: our MX."""
    seen: dict[tuple[str, ...], list[tuple[Resolver, int]]] = {}
    for name in resolvers:
        resolver = Resolver(name)
        try:
            answer = resolver.ask(domain, "MX")
        except dns.exception.DNSException as error:
            yield note(f"the resolver {name} does not say: {type(error).__name__}")
            continue
        ttl = 0 if answer is None or answer.rrset is None else answer.rrset.ttl
        hosts = tuple(sorted(str(each.exchange).rstrip(".").lower() for each in answer or ()))
        seen.setdefault(hosts, []).append((resolver, ttl))
    for hosts, who in seen.items():
        yield _mx(domain, mode, nodes, hosts, who)
    if len(seen) > 1:
        longest = max(ttl for who in seen.values() for _, ttl in who)
        yield note(f"not all resolvers see the same MX of {domain}", f"Wait for the TTL: {longest} s at most.")


def _mx(domain: str, mode: Mode, nodes: Sequence[str], hosts: tuple[str, ...], who: list[tuple[Resolver, int]]) -> Said:
    resolver = who[0][0]
    ttl = max(ttl for _, ttl in who)
    by = ", ".join(each.name for each, _ in who)
    text = f"MX of {domain}: {', '.join(hosts) or 'none'}, TTL {ttl} s (seen by {by})"
    ours = {name.lower() for name in nodes}
    ours_addresses = {address for name in ours for address in resolver.addresses(name)}
    is_here = [host for host in hosts if host in ours or resolver.addresses(host) & ours_addresses]
    if hosts and len(is_here) == len(hosts):
        return good(f"{text}: all here")
    if is_here:
        elsewhere = ", ".join(host for host in hosts if host not in is_here)
        return wrong(
            f"{text}: {elsewhere} is not one of {', '.join(sorted(ours))}",
            "Remove it: mail that enters there reaches users who have moved late, as stragglers.",
        )
    if mode == "active":
        return wrong(
            f"{text}: not here, though the migration is active",
            f"Point the MX at {', '.join(sorted(ours))}: mail for users who have moved reaches them late until then.",
        )
    remedy = f"Point it at {', '.join(sorted(ours))} when you activate the migration."
    if ttl > SHORT_TTL:
        remedy += f" Lower its TTL to 300 first, {ttl} s before at least, so that you can go back quickly."
    return note(text, remedy)


def check_spf(domain: str, nodes: Sequence[str], resolver: Resolver) -> Iterator[Said]:
    """Whether mail that users send from here passes."""
    for name in nodes:
        addresses = sorted(resolver.addresses(name))
        if not addresses:
            yield note(f"{name} has no address in the DNS", "Is [node] in bascule.toml the name of this host?")
        for address in addresses:
            result = resolver.spf_result(domain, address, name)
            text = f"SPF of {domain} for mail from {name} ({address}): {result}"
            if result == "pass":
                yield good(text)
            elif result == "none":
                yield note(text, "There is no SPF record; many receivers want one.")
            elif result in {"permerror", "temperror"}:
                yield wrong(text, "The record cannot be used: two of them, or a mistake in it.")
            else:
                yield wrong(
                    text,
                    f"Add {'ip6' if ':' in address else 'ip4'}:{address} to it: users who have moved send from here.",
                )


def check_client_names(names: Sequence[str], resolver: Resolver) -> Iterator[Said]:
    """Whether the names that users are told have an address."""
    for name in names:
        if resolver.addresses(name):
            yield good(f"users are told {name}, and it has an address")
        else:
            yield wrong(f"users are told {name}, and it has no address", "See [users] in bascule.toml.")


def answering(domain: str, resolvers: Sequence[str]) -> Resolver | None:
    """The first resolver that says something of the domain."""
    for resolver in map(Resolver, resolvers):
        try:
            resolver.ask(domain, "MX")
        except dns.exception.DNSException:
            continue
        return resolver
    return None


@check("dns.mx", "DNS", needs=("domain", "database"))
def mx(subject: Subject) -> Iterator[Said]:
    """Where mail of the domain goes, and for how long that is remembered"""
    yield from check_mx(subject.domain, subject.mode, subject.nodes, subject.settings.dns.resolvers)


@check("dns.spf", "DNS", needs=("domain", "database"))
def spf_of_domain(subject: Subject) -> Iterator[Said]:
    """Whether mail that users send from here passes the domain's SPF."""
    resolver = answering(subject.domain, subject.settings.dns.resolvers)
    if resolver is not None:
        yield from check_spf(subject.domain, subject.nodes, resolver)


@check("dns.client-names", "DNS", needs=("domain", "database"))
def client_names(subject: Subject) -> Iterator[Said]:
    """Whether the names that users are told have an address."""
    resolver = answering(subject.domain, subject.settings.dns.resolvers)
    if resolver is not None:
        yield from check_client_names(subject.client_names, resolver)
    legacy = subject.legacy
    same = sorted(
        {legacy.imap_host.lower(), legacy.smtp_host.lower()} & {name.lower() for name in subject.client_names}
    )
    if same:
        yield note(
            f"users are told {same[0]}, and the legacy server is known by that name, too",
            "When it is pointed here, bascule would ask itself. First give the legacy server a name of its own, or its "
            "address: bascule domain set --imap-host, --smtp-host.",
        )


# Is the legacy server this one? ---------------------------------------------------


@check("dns.legacy-host", "DNS", needs=("domain",), stops=True)
def legacy_host(subject: Subject) -> Iterator[Said]:
    """Whether the legacy server that is named is this host, or one of our stores."""
    legacy = subject.legacy
    hosts = {(legacy.imap_host, service.port) for service in (legacy.imap, legacy.pop3, legacy.sieve) if service}
    if legacy.submission is not None:
        hosts.add((legacy.imap_host, legacy.submission.port))
    hosts.add((legacy.smtp_host, legacy.smtp_port))
    clean = True
    for host, port in sorted(hosts):
        who = _ours(subject, host, port)
        if who:
            clean = False
            yield wrong(
                f"the legacy server is said to be at {host}:{port}, and that is {who}: bascule would ask itself",
                "Name the old server by a name or an address that stays its own: bascule domain set --imap-host, "
                "--smtp-host.",
            )
    if clean:
        yield good("the legacy server is not one of ours")


def _ours(subject: Subject, host: str, port: int) -> str:
    """Who of us listens there, in words; empty: nobody."""
    there = _addresses(host)
    for store in subject.stores:
        name = store.login_host
        if name and (name.lower() == host.lower() or (there & _public(_addresses(name)))):
            return f"the store {store.name} ({name})"
    here = {address for address in there if _is_local(address)}
    if not here:
        return ""
    try:
        listening = _dovecot_ports(subject)
        if port in listening and _listens(listening[port], here):
            return "the Dovecot of this host"
    except NotReadable:
        pass  # there is none here
    try:
        for service in subject.postfix.smtp_servers():
            address, _, number = service.name.rpartition(":")
            if (
                service.kind == "inet"
                and _number(number) == port
                and (_listens(address.strip("[]"), here) and _interfaces(subject, here))
            ):
                return "the Postfix of this host"
    except NotReadable:
        pass
    return ""


def _addresses(host: str) -> set[str]:
    try:
        return {str(found[4][0]) for found in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except OSError:
        return set()


def _public(addresses: set[str]) -> set[str]:
    return {address for address in addresses if not address.startswith("127.") and address != "::1"}


def _is_local(address: str) -> bool:
    """Whether a server of this host can listen there."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def _number(service: str) -> int:
    try:
        return int(service) if service.isdigit() else socket.getservbyname(service, "tcp")
    except OSError:
        return 0


def _listens(address: str, here: set[str]) -> bool:
    """Whether a listener at ``address`` (several, or all) is reached at one of ``here``."""
    listened = address.replace(",", " ").split()
    return not listened or bool({"*", "::", "0.0.0.0", *here} & set(listened))  # noqa: S104 (nothing is bound)


def _interfaces(subject: Subject, here: set[str]) -> bool:
    said = subject.postfix.value("inet_interfaces").replace(",", " ").split()
    loopback = {address for address in here if address.startswith("127.") or address == "::1"}
    return not said or "all" in said or bool(here & set(said)) or ("loopback-only" in said and bool(loopback))


#: Where Dovecot listens if its listeners do not say otherwise.
_STANDARD = {
    "imap": 143, "imaps": 993, "pop3": 110, "pop3s": 995, "submission": 587, "submissions": 465, "sieve": 4190,
}  # fmt: skip


def _dovecot_ports(subject: Subject) -> dict[int, str]:
    """The ports of this host's Dovecot, each with the addresses."""
    facts = subject.dovecot
    everywhere = facts.value("listen")
    named: dict[str, tuple[int, str]] = {
        name: (port, everywhere)
        for name, port in _STANDARD.items()
        if name.rstrip("s") in facts.protocols or name == "sieve"
    }
    for service in facts.blocks("service"):
        for listener in service.all("inet_listener") if service.name.endswith("-login") else ():
            port = int(listener.get("port") or _STANDARD.get(listener.name, 0))
            named[listener.name] = (port, listener.get("address") or listener.get("listen") or everywhere)
    return {port: address for port, address in named.values() if port}
