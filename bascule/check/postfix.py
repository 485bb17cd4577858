"""How the Postfix of this host is configured, and what of it would hurt a domain that moves.

Sources: postconf(5), master(5), ADDRESS_CLASS_README, SMTPD_POLICY_README,
ADDRESS_VERIFICATION_README, and Postfix's ``match_list`` for the lists of domains.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from bascule.check.facts import NotReadable, PostfixFacts, Service, items
from bascule.check.finding import Said, first, good, note, wrong
from bascule.check.registry import check
from bascule.check.smtp import largest_message
from bascule.check.subject import Subject, invented
from bascule.endpoint import connected

#: Which of the policy daemon's maps the parameters of main.cf must ask.
WIRED = {"transport_maps": "transport", "relay_domains": "domains", "virtual_alias_maps": "aliases"}
#: The parameters that put a domain into an address class before relay_domains is looked at (ADDRESS_CLASS_README).
CLASSES = ("mydestination", "virtual_alias_domains", "virtual_mailbox_domains")
RESTRICTIONS = tuple(
    f"smtpd_{stage}_restrictions"
    for stage in ("client", "helo", "sender", "relay", "recipient", "data", "end_of_data", "etrn")
)
SENDER_CHECKS = re.compile(
    r"\breject_(?:authenticated_)?(?:sender_login_mismatch|unauthenticated_sender_login_mismatch)"
)
#: How mail goes to the legacy server, by the domain's smtp_tls; as policy_daemon/routes.py has it.
RELAY_TRANSPORTS = {"may": "relay", "encrypt": "bascule-relay-encrypt", "verify": "bascule-relay-verify"}
#: Restrictions that refuse a sender with an owner to who has not logged in (postconf(5)).
NOT_LOGGED_IN = {
    "reject_sender_login_mismatch",
    "reject_unauthenticated_sender_login_mismatch",
    "reject_known_sender_login_mismatch",
}
#: Services that ask our sockets, by their command in master.cf.
_ASKING = {"smtpd", "trivial-rewrite", "cleanup", "qmgr"}


# Is bascule in it? -----------------------------------------------------------------


@check("postfix.wired", "Postfix", needs=("Postfix", "plugged"))
def wired(subject: Subject) -> Iterator[Said]:
    """Whether main.cf still asks bascule, whoever has edited it."""
    facts, settings = subject.postfix, subject.settings
    wanted = {
        parameter: f"socketmap:{subject.socket(settings.policy_daemon.socketmap)}:{table}"
        for parameter, table in WIRED.items()
    }
    wanted["smtpd_milters"] = subject.socket(settings.milter.socket)
    missing = {name: endpoint for name, endpoint in wanted.items() if endpoint not in facts.value(name)}
    policy = subject.socket(settings.policy_daemon.policy)
    if not any(policy in facts.value(name) for name in RESTRICTIONS):
        missing["smtpd_recipient_restrictions"] = policy
    for parameter, endpoint in missing.items():
        yield wrong(
            f"{parameter} does not name {endpoint}",
            "Add it to main.cf: see config_templates/postfix/main.cf.j2, or run the role again; then postfix reload. "
            "postconf -e, a panel or an upgrade may have taken it out.",
        )
    if not missing:
        yield good("main.cf asks bascule for domains, aliases and transports, and has its milter")


@check("postfix.service-overrides", "Postfix", needs=("Postfix", "plugged"))
def service_overrides(subject: Subject) -> Iterator[Said]:
    """Whether a service in master.cf has settings of its own in place of those that name bascule."""
    policy = subject.socket(subject.settings.policy_daemon.policy)
    milter = subject.socket(subject.settings.milter.socket)
    for service in subject.postfix.smtp_servers():
        mine = service.options
        if policy not in mine.get("smtpd_recipient_restrictions", policy) and not _is_inner(service):
            yield note(
                f"{service.line} has smtpd_recipient_restrictions of its own, which do not ask bascule",
                "Recipients that enter there are not verified at the legacy server: what it refuses is returned to "
                "senders, not refused. Add the check_policy_service of main.cf to them.",
            )
        if milter not in mine.get("smtpd_milters", milter) and not _is_inner(service):
            yield note(
                f"{service.line} has smtpd_milters of its own, without bascule's",
                "What enters there is not traced: a loop of it is found by Postfix only, after 50 hops.",
            )


def _is_inner(service: Service) -> bool:
    """Whether it takes mail from this host only: of a content filter, for instance."""
    return service.name.startswith(("127.", "[::1]", "localhost:")) or service.kind == "unix"


@check("postfix.chroot", "Postfix", needs=("Postfix",))
def chroot(subject: Subject) -> Iterator[Said]:
    """Whether services that are chrooted reach bascule's sockets."""
    queue = subject.postfix.value("queue_directory")
    mine = subject.settings.policy_daemon
    outside = [
        endpoint
        for endpoint in (mine.socketmap, mine.policy, subject.settings.milter.socket)
        if endpoint.startswith("unix:") and not endpoint.startswith(f"unix:{queue}/")
    ]
    confined = [each for each in subject.postfix.services if each.chrooted and each.command in _ASKING]
    if outside and confined:
        yield wrong(
            f"{outside[0]} is outside of {queue}, into which {confined[0].line} is chrooted",
            f"Let the sockets in bascule.toml be below {queue}, or say n for chroot in master.cf.",
        )
    else:
        yield good("Postfix reaches bascule's sockets")


@check("postfix.relay-recipient-maps", "Postfix", needs=("Postfix",))
def relay_recipient_maps(subject: Subject) -> Iterator[Said]:
    """Whether relay_recipient_maps would refuse the users of the domains that move."""
    maps = subject.postfix.value("relay_recipient_maps")
    if maps:
        yield wrong(
            f"relay_recipient_maps is {maps}: it refuses every recipient of a domain that moves who is not in it",
            "Say what is in it by check_recipient_access instead, or leave those domains to another host.",
        )
    else:
        yield good("relay_recipient_maps is empty, as bascule needs it")


@check("postfix.smtputf8", "Postfix", needs=("Postfix",))
def smtputf8(subject: Subject) -> Iterator[Said]:
    """Whether SMTPUTF8 is offered, which Dovecot's LMTP does not take."""
    if subject.postfix.is_own("smtputf8_enable") and subject.postfix.value("smtputf8_enable") == "yes":
        yield wrong(
            "smtputf8_enable is yes: mail that needs SMTPUTF8 would be taken, and returned to its sender later",
            "Dovecot's LMTP does not take it: say smtputf8_enable = no, or leave it out before bascule is plugged in.",
        )
    else:
        yield good("SMTPUTF8 is not offered, or will not be once bascule is plugged in")


# Address classes -------------------------------------------------------------------


@check("postfix.domain-class", "Postfix", needs=("Postfix", "domain"), stops=True)
def domain_class(subject: Subject) -> Iterator[Said]:
    """Whether the domain is one of Postfix's own: local, virtual alias or virtual mailbox domain."""
    clean = True
    for parameter in CLASSES:
        try:
            where = listed_in(subject.postfix, parameter, subject.domain, subject.settings.policy_daemon.socketmap)
        except NotReadable as error:
            clean = False
            yield note(
                f"whether {subject.domain} is in {parameter} cannot be seen: {error.message}",
                "Run bascule check as root on this host.",
            )
            continue
        if where:
            clean = False
            yield wrong(
                f"{subject.domain} is in {parameter} ({where}): Postfix refuses or delivers its mail itself, "
                "and does not ask bascule",
                "Take it out there, with its mailboxes and aliases, and reload Postfix: a domain that moves is in "
                "relay_domains only.",
            )
    if clean:
        yield good(f"{subject.domain} is none of Postfix's own domains here")


def listed_in(facts: PostfixFacts, parameter: str, domain: str, ours: str) -> str:
    """Which item of a list of domains has the domain; empty if none. A table of ``ours`` is not asked.

    Raises:
        NotReadable: a file or a table cannot be read.
    """
    return _first_match(facts, facts.value(parameter), domain, ours.rpartition("/")[2], depth=0)


def _first_match(facts: PostfixFacts, value: str, domain: str, ours: str, depth: int) -> str:
    unread: NotReadable | None = None
    for each in items(value):
        item = each.lstrip("!")
        negated = (len(each) - len(item)) % 2 == 1
        if item.startswith("/"):
            if depth > 0:
                continue  # Postfix reads one level only
            try:
                inside = Path(item).read_text()
            except OSError as error:
                unread = NotReadable(f"{item}: {error.strerror}")
                continue
            lines = " ".join(line for line in inside.splitlines() if not line.startswith("#"))
            hit = _first_match(facts, lines, domain, ours, depth + 1) and item
        elif ":" in item and not item.startswith("["):
            if item.startswith("socketmap:") and f"/{ours}:" in item:
                continue
            try:
                hit = item if facts.lookup(item, domain) is not None else ""
            except NotReadable as error:
                unread = NotReadable(f"{item}: {error.message}")
                continue
        else:
            hit = item if item.lower() == domain else ""
        if hit:
            return "" if negated else hit
    if unread is not None:
        raise unread
    return ""


#: The tables by which cleanup(8) gives a recipient another address, and smtpd(8) says that one has moved away.
REWRITING = ("virtual_alias_maps", "canonical_maps", "recipient_canonical_maps", "relocated_maps")
#: Tables of patterns: Postfix asks them about whole addresses only (regexp_table(5), "TABLE SEARCH ORDER").
_PATTERNS = {"regexp", "pcre", "cidr", "static", "tcp", "socketmap"}
NAMED = 5  # addresses that one finding names


@check("postfix.rewritten", "Postfix", needs=("Postfix", "domain"), stops=True)
def rewritten(subject: Subject) -> Iterator[Said]:
    """Whether tables of the operator's take mail for addresses of the domain elsewhere."""
    facts, domain = subject.postfix, subject.domain
    ours = subject.settings.policy_daemon.socketmap.rpartition("/")[2]
    clean = True
    for parameter in REWRITING:
        for table in items(facts.value(parameter)):
            if ":" not in table or (table.startswith("socketmap:") and f"/{ours}:" in table):
                continue
            try:
                caught = _caught(facts, table, domain)
                named = _named(subject, table)
            except NotReadable as error:
                clean = False
                yield note(
                    f"whether {parameter} has addresses of {domain} cannot be seen: {table}: {error.message}",
                    "Run bascule check as root on this host.",
                )
                continue
            if caught:
                clean = False
                yield wrong(
                    f"{parameter} ({table}) has {caught} for every address of {domain}: mail of users who have moved "
                    "goes there, too",
                    f"Take it out there: while the domain moves, bascule knows where mail for @{domain} goes.",
                )
            elif named:
                clean = False
                yield note(
                    f"{parameter} ({table}) has {first(named, NAMED)}: their mail follows that table, "
                    "once the legacy server has said that it takes them",
                    "Take them out, and say bascule alias for what is to be another name of a mailbox. What the legacy "
                    "server does not know is refused here.",
                )
    if clean:
        yield good(f"no table of Postfix's here takes mail for {domain} elsewhere")


def _caught(facts: PostfixFacts, table: str, domain: str) -> str:
    """What a table has for whatever address of a domain; empty: nothing, or the address itself."""
    kind = table.removeprefix("proxy:").partition(":")[0]
    for key in [str(invented(domain))] if kind in _PATTERNS else [f"@{domain}", str(invented(domain))]:
        found = facts.lookup(table, key)
        if found and found.lower() not in {key, f"@{domain}"}:
            return found
    return ""


def _named(subject: Subject, table: str) -> list[str]:
    """The addresses of the domain that a table has, and does not map to themselves, as far as it lists what it has."""
    found = {
        key: where
        for key, where in subject.postfix.listing(table)
        if key.lower().endswith(f"@{subject.domain}") and not key.startswith("@")
    }
    if subject.user is not None and (where := subject.postfix.lookup(table, str(subject.user.address))):
        found[str(subject.user.address)] = where
    return sorted(key for key, where in found.items() if where.lower() != key.lower())


@check("postfix.relay-transport", "Postfix", needs=("Postfix", "domain"))
def relay_transport(subject: Subject) -> Iterator[Said]:
    """Whether mail gets to the legacy server by the transport that it takes, and nowhere else."""
    facts = subject.postfix
    name = RELAY_TRANSPORTS[subject.legacy.smtp_tls]
    service = next((each for each in facts.services if (each.name, each.kind) == (name, "unix")), None)
    clean = True
    if service is None:
        if name != "relay":
            return  # one of ours: postfix.wired and the roles look after it
        clean = False
        yield wrong(
            "master.cf has no service relay: mail for users who have not moved cannot be sent to the legacy server",
            "Put it back: relay unix - - n - - smtp (master.cf of a fresh Postfix has it), then postfix reload.",
        )
    elif fallback := facts.of_service(service, "smtp_fallback_relay"):
        clean = False
        yield wrong(
            f"smtp_fallback_relay is {fallback}: while the legacy server is away, mail for it goes there, comes back "
            "by the MX, is refused as a loop, and is returned to its sender",
            f"Add -o smtp_fallback_relay= to {service.line} in master.cf.",
        )
    if name in items(facts.value("defer_transports")):
        clean = False
        yield wrong(
            f"defer_transports has {name}: mail for users who have not moved waits until somebody flushes the queue",
            "Take it out of defer_transports.",
        )
    if clean:
        yield good(f"mail for the legacy server goes by {name}")


# Senders, limits, soft settings ------------------------------------------------------


@check("postfix.sender-login", "Postfix", needs=("Postfix",))
def sender_login(subject: Subject) -> Iterator[Said]:
    """Whether users of the domain may send under their own addresses, where senders are held to their logins."""
    facts = subject.postfix
    ours = subject.socket(subject.settings.policy_daemon.socketmap)
    services: list[Service | None] = [None, *facts.smtp_servers()]
    held = False
    for service in services:
        if not _holds_senders(facts, service):
            continue
        held = True
        maps = _of(facts, service, "smtpd_sender_login_maps")
        named = service is not None and "smtpd_sender_login_maps" in service.options
        if ours in maps or (not subject.is_plugged_into_postfix and not named):
            continue
        where = "main.cf" if service is None else service.line
        yield wrong(
            f"{where} rejects senders that do not belong to the login, and smtpd_sender_login_maps there does not ask "
            "bascule: nobody of a domain that moves can send",
            f"Put socketmap:{ours}:senders before the other tables of smtpd_sender_login_maps"
            + (" in master.cf." if named else "."),
        )
        return
    if held:
        yield good("senders are held to their logins, and bascule is asked whose an address is")


def _of(facts: PostfixFacts, service: Service | None, parameter: str) -> str:
    return facts.value(parameter) if service is None else facts.of_service(service, parameter)


def _restrictions(facts: PostfixFacts, service: Service | None) -> Iterator[tuple[str, str]]:
    """Each list of restrictions of a service, those of its classes among them (RESTRICTION_CLASS_README)."""
    for name in (*RESTRICTIONS, *items(facts.value("smtpd_restriction_classes"))):
        yield name, _of(facts, service, name)


def _holds_senders(facts: PostfixFacts, service: Service | None) -> bool:
    if service is not None and not any(name in service.options for name in (*RESTRICTIONS, "smtpd_sender_login_maps")):
        return False  # as main.cf says
    return any(SENDER_CHECKS.search(value) for _, value in _restrictions(facts, service))


@check("postfix.sender-not-logged-in", "Postfix", needs=("Postfix", "domain"))
def sender_not_logged_in(subject: Subject) -> Iterator[Said]:
    """Whether the legacy server may send mail of its users here, who do not log in for it."""
    facts = subject.postfix
    held = False
    for service in facts.smtp_servers():
        if _is_inner(service) or _is_for_logins(facts, service):
            continue
        for name, value in _restrictions(facts, service):
            words = list(items(value))
            place = next((number for number, word in enumerate(words) if word in NOT_LOGGED_IN), None)
            if place is None:
                continue
            held = True
            if "check_client_access" not in words[:place]:
                yield wrong(
                    f"{service.line} has {words[place]} in {name}: bascule says whose the addresses of "
                    f"{subject.domain} are, and mail with them is refused there to who does not log in, the legacy "
                    "server among them",
                    "Say check_client_access before it, with a table that permits the addresses from which "
                    f"{subject.legacy.smtp_host} sends, or reject_authenticated_sender_login_mismatch in its place.",
                )
                return
    if held:
        yield good(
            "senders are held to their logins behind a check_client_access, which may let the legacy server pass"
        )


def _is_for_logins(facts: PostfixFacts, service: Service) -> bool:
    """Whether a service, as submission is, takes nothing from who has not logged in."""
    for _, value in _restrictions(facts, service):
        words = list(items(value))
        accepting = {"permit", "permit_auth_destination", "reject_unauth_destination"}
        if "permit_sasl_authenticated" in words and words[-1] == "reject" and not accepting.intersection(words):
            return True
    return False


@check("postfix.recipient-delimiter", "Postfix", needs=("Postfix",))
def recipient_delimiter(subject: Subject) -> Iterator[Said]:
    """Whether Postfix and bascule separate user+detail in the same way."""
    here, ours = subject.postfix.value("recipient_delimiter"), subject.settings.dovecot.recipient_delimiter
    if not here:
        return  # Postfix separates nothing; bascule's tables and Dovecot do it themselves
    if here == ours:
        yield good(f"recipient_delimiter is {here!r} for Postfix and for bascule")
    elif lacking := [each for each in here if each not in ours]:
        yield wrong(
            f"recipient_delimiter of Postfix is {here!r}, bascule's for Dovecot is {ours!r}: mail to "
            f"user{lacking[0]}detail of users who have moved waits in the queue, and is returned after days: Dovecot "
            "does not know such a user",
            "Say the same in [dovecot] recipient_delimiter of bascule.toml and in Dovecot, which takes several, too.",
        )
    else:
        yield good(f"recipient_delimiter of Postfix, {here!r}, is taken here")


@check("postfix.soft-settings", "Postfix", needs=("Postfix",))
def soft_settings(subject: Subject) -> Iterator[Said]:
    """Settings by which Postfix defers what it should refuse, or takes what it should not."""
    facts = subject.postfix
    if facts.value("soft_bounce") == "yes":
        yield note(
            "soft_bounce is yes: every refusal becomes a deferral",
            "Senders to wrong addresses are told after days only, and what the legacy server refuses waits here. Say "
            "no.",
        )
    code = facts.value("unverified_recipient_reject_code")
    verifies = any("reject_unverified_recipient" in value for _, value in _restrictions(facts, None))
    if verifies and code and not code.startswith("5"):
        yield note(
            f"recipients are verified (reject_unverified_recipient), and unverified_recipient_reject_code is {code}: "
            "an address that the legacy server refuses is deferred here",
            "Senders are told after days only. Say 550.",
        )
    if facts.value("unverified_recipient_tempfail_action").startswith("permit"):
        yield note(
            "unverified_recipient_tempfail_action permits: while the legacy server is away, mail for any address is "
            "taken",
            "What it refuses later is returned to senders that may be forged. Say defer_if_permit.",
        )
    if facts.is_own("address_verify_map") and not facts.value("address_verify_map"):
        yield note(
            "address_verify_map is empty: what was learnt about recipients is forgotten at each restart",
            "The legacy server is asked anew for each of them. Leave the setting out.",
        )


@check("postfix.copies", "Postfix", needs=("Postfix",))
def copies(subject: Subject) -> Iterator[Said]:
    """Whether all mail is copied to an archive."""
    for parameter in ("always_bcc", "recipient_bcc_maps", "sender_bcc_maps"):
        where = subject.postfix.value(parameter)
        if where:
            yield note(
                f"{parameter} is {where}: a copy of mail that passes here is sent there",
                "The probe of bascule check comes there, too. An archive in a domain that moves must be moved like "
                "any mailbox, or it is forgotten.",
            )


@check("postfix.content-filter", "Postfix", needs=("Postfix",))
def content_filter(subject: Subject) -> Iterator[Said]:
    """Whether mail passes the milters a second time when a content filter gives it back."""
    facts = subject.postfix
    servers = list(facts.smtp_servers())
    filters = {_of(facts, each, "content_filter") for each in (None, *servers)} - {""}
    if not filters:
        return
    inner = [
        each
        for each in servers
        if _is_inner(each) and each.name != "bascule" and not facts.of_service(each, "content_filter")
    ]
    for service in inner:
        without = {
            option.strip() for option in facts.of_service(service, "receive_override_options").replace(",", " ").split()
        }
        if "no_milters" in without:
            continue
        milters = facts.of_service(service, "smtpd_milters")
        if milters or not subject.is_plugged_into_postfix:
            yield note(
                f"mail comes back from {sorted(filters)[0]} to {service.line}, which has milters: "
                "each message passes them twice on this host",
                "Add -o receive_override_options=no_milters to that service in master.cf.",
            )
            return
    yield good(f"mail comes back from {sorted(filters)[0]} without passing the milters again")


@check("postfix.authorized-submit-users", "Postfix", needs=("Postfix",))
def authorized_submit_users(subject: Subject) -> Iterator[Said]:
    """Whether programs of this host may send mail with sendmail(1)."""
    allowed = subject.postfix.value("authorized_submit_users")
    user = "bascule-policy-daemon"
    if allowed in {"", "static:anyone"} or any(each.name == "bascule" for each in subject.postfix.smtp_servers()):
        return  # barriers and messages enter by a service of ours
    names = list(items(allowed))
    if user in names or (f"!{user}" not in names and "static:all" in names):
        return
    yield note(
        f"authorized_submit_users is {allowed}, without {user}",
        f"Add {user} to it: without its messages no mailbox is cut over.",
    )


@check("postfix.sasl", "Postfix", needs=("Postfix",))
def sasl(subject: Subject) -> Iterator[Said]:
    """Whether users who have not moved can log in where they submit mail."""
    facts = subject.postfix
    asking = [each for each in facts.smtp_servers() if facts.of_service(each, "smtpd_sasl_auth_enable") == "yes"]
    foreign = [each for each in asking if facts.of_service(each, "smtpd_sasl_type") != "dovecot"]
    for service in foreign[:1]:
        yield wrong(
            f"{service.line} checks logins by smtpd_sasl_type {facts.of_service(service, 'smtpd_sasl_type')}, which "
            "does not know users of a domain that moves: they cannot send from here",
            "Let Dovecot check them: smtpd_sasl_type = dovecot, smtpd_sasl_path = private/auth.",
        )
    if asking and not foreign:
        yield good("Postfix asks Dovecot about logins")


@check("postfix.message-size", "Postfix", needs=("Postfix", "domain"), after=("legacy.smtp.reach",))
def message_size(subject: Subject) -> Iterator[Said]:
    """Whether a message that the legacy server takes is too large here."""
    here = int(subject.postfix.value("message_size_limit") or 0)
    there = largest_message(subject)
    if here and (there == 0 or (there is not None and there > here)):
        size = "any size" if there == 0 else f"{there} bytes"
        yield note(
            f"message_size_limit is {here} bytes; the legacy server takes {size}",
            "Senders of larger messages are refused from the day on which the MX points here.",
        )
    elif there is not None:
        yield good(f"messages of {here or 'any'} bytes are taken, as large as at the legacy server")


@check("postfix.quota-status", "Postfix", needs=("Postfix", "Dovecot"))
def quota_status(subject: Subject) -> Iterator[Said]:
    """Whether Dovecot's quota-status refuses users who have not moved."""
    asked = _quota_status_endpoint(subject)
    if asked is None:
        return
    endpoint, said = asked
    action = _ask_policy(subject, said) if subject.user is not None and not subject.has_moved else None
    if action is not None:
        verdict = action.partition(" ")[0].upper()
        if verdict in {"DUNNO", "OK", "PERMIT"}:
            yield good(f"Dovecot's quota-status ({endpoint}) lets mail for users who have not moved pass")
        else:
            yield wrong(
                f"Dovecot's quota-status ({endpoint}) says {action!r} of a user who has not moved: Postfix refuses "
                "all mail for them",
                "Say quota_status_nouser = DUNNO in Dovecot.",
            )
    elif not (subject.dovecot.plugin("quota_status_nouser") or subject.dovecot.value("quota_status_nouser")).startswith(
        "DUNNO"
    ):
        yield note(
            f"Postfix asks Dovecot's quota-status ({endpoint}), whose quota_status_nouser is not DUNNO",
            "It would refuse mail for users who have not moved: say quota_status_nouser = DUNNO in Dovecot.",
        )


def _quota_status_endpoint(subject: Subject) -> tuple[str, str] | None:
    """How Postfix's restrictions name a listener of quota-status, and the same for a client; None: they do not."""
    queue = subject.postfix.value("queue_directory")
    spoken: dict[str, str] = {}
    for service in subject.dovecot.blocks("service"):
        if "quota-status" not in service.get("executable") and service.name != "quota-status":
            continue
        for listener in service.blocks:
            if listener.kind == "inet_listener" and listener.get("port"):
                host = listener.get("address") or listener.get("listen") or "127.0.0.1"
                for name in (host, "localhost", ""):
                    spoken[f"inet:{name}:{listener.get('port')}"] = f"inet:{host}:{listener.get('port')}"
            elif listener.kind == "unix_listener":
                path = listener.get("path") or listener.name
                spoken[f"unix:{path.removeprefix(f'{queue}/')}"] = f"unix:{path}"
                spoken[f"unix:{path}"] = f"unix:{path}"
    text = " ".join(
        value
        for service in (None, *subject.postfix.smtp_servers())
        for _, value in _restrictions(subject.postfix, service)
    )
    return next(((named, at) for named, at in spoken.items() if named in text), None)


def _ask_policy(subject: Subject, endpoint: str) -> str | None:
    """What a policy service says of mail for the user, who has not moved (SMTPD_POLICY_README); None: nothing."""
    request = (
        "request=smtpd_access_policy\nprotocol_state=RCPT\nprotocol_name=ESMTP\nsender=\nsize=1000\n"
        f"recipient={subject.account.address}\n\n"
    )
    try:
        with connected(endpoint, 10) as policy:
            policy.sendall(request.encode())
            answer = b""
            while b"\n\n" not in answer and len(answer) < 4096:
                piece = policy.recv(4096)
                if not piece:
                    break
                answer += piece
    except OSError:
        return None
    found = re.search(rb"^action=(.*)$", answer, re.MULTILINE)
    return found[1].decode(errors="replace").strip() if found else None
