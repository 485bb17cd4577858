"""How the Dovecot of this host is configured, and what of it would hurt a domain that moves.

Sources: the manuals of Dovecot 2.3 and 2.4 (Namespaces, Authentication, Quota,
Variables), Pigeonhole's on script locations.
"""

from __future__ import annotations

import os
import pwd
import re
import ssl
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from bascule import authorities
from bascule.address import Address
from bascule.check import namespaces as rules
from bascule.check.facts import Block, DovecotFacts, NotReadable, Output
from bascule.check.finding import Said, first, good, note, wrong
from bascule.check.registry import check
from bascule.check.subject import Subject, invented
from bascule.errors import LegacyUnavailable
from bascule.legacy import connect_imap
from bascule.settings import Settings

BATCH = 100  # addresses that one doveadm is asked about
NO_USER = 67  # exit status of doveadm if one of those it was asked about does not exist (sysexits.h, EX_NOUSER)
#: A domain that is nobody's (RFC 6761): bascule is not asked about it.
NO_DOMAIN = "check.bascule.invalid"
NAMED = 5  # addresses that one finding names
#: Directories that systemd hides from our units (systemd.exec(5), ProtectHome).
HIDDEN = ("/home", "/root", "/run/user")
#: Asked from here, bascule's own userdb knows nobody, and those behind it are asked; see hooks/passdb.lua.
ASIDE = "100::ba5c"
_UNITS = {"": 1024, "B": 1, "K": 1024, "M": 1024**2, "G": 1024**3, "T": 1024**4}
_NO_SUCH_USER = re.compile(r"user (\S+) doesn't exist")


# Users ------------------------------------------------------------------------------


def keeps_the_domain(username_format: str) -> bool:
    """Whether a user name made by an auth_username_format has its domain: ``%Lu`` and ``%{user | lower}`` do, ``%n`` "
    "not."""
    for found in re.finditer(r"%\{([^}]*)\}|%[0-9.\-]*[A-Z]*([a-z])", username_format):
        if found[2] is not None:
            if found[2] in "ud":
                return True
            continue
        variable, *filters = (part.strip() for part in found[1].split("|"))
        if variable in {"domain", "orig_domain"} or (
            variable in {"user", "orig_user", "original_user"} and "username" not in filters
        ):
            return True
    return not username_format.strip()


@check("dovecot.username-format", "Dovecot", needs=("Dovecot",), stops=True)
def username_format(subject: Subject) -> Iterator[Said]:
    """Whether mail for a domain that moves could come to a user of the same local part."""
    facts = subject.dovecot
    dropping = [
        f"{'protocol lmtp: ' if protocol else ''}auth_username_format = {value}"
        for protocol, value in (("", facts.value("auth_username_format")), ("lmtp", _lmtp_format(facts)))
        if value and not keeps_the_domain(value)
    ]
    if not dropping:
        yield good("Dovecot keeps the domain of a user name")
        return
    text = f"Dovecot drops the domain of a user name ({dropping[-1]})"
    remedy = (
        "Say %Lu (2.3) or %{user | lower} (2.4) there; users of this host are then known by their full address only."
    )
    if not subject.has(("domain",)) or subject.legacy_only:
        yield note(f"{text}: users of a domain that moves must not be taken for those of this host", remedy)
        return
    names = _users_of_this_host(facts)
    shadows = _foreign(subject, [Address(name, subject.domain) for name in names])
    if shadows:
        named = ", ".join(str(address) for address in list(shadows)[:NAMED])
        yield wrong(f"{text}: mail for {named} would be given to the user of this host with that local part", remedy)
    else:
        yield good(f"{text}, and no user of this host gets mail of {subject.domain} by it")


def _lmtp_format(facts: DovecotFacts) -> str:
    block = facts.root.named("protocol", "lmtp")
    return block.get("auth_username_format") if block else ""


def _users_of_this_host(facts: DovecotFacts) -> list[str]:
    """User names without a domain: the system's, and those that Dovecot lists."""
    listed = facts.user("*")
    names = {entry.pw_name for entry in pwd.getpwall()}
    names.update(name for name in listed.text.split() if "@" not in name)
    return sorted(name.lower() for name in names)[:500]


@check("dovecot.userdb", "Dovecot", needs=("Dovecot", "domain"), stops=True)
def userdb(subject: Subject) -> Iterator[Said]:
    """Whether a user database of the operator's knows addresses of the domain, also one behind bascule's."""
    nobody = invented(subject.domain)
    if _operators(subject, [nobody]):
        yield wrong(
            f"a userdb of this Dovecot knows {nobody}, who does not exist: it takes every name for its own, and mail "
            "of users who have moved would go to the homes that it names",
            "Let it say no to what it does not know (a userdb static needs allow_all_users = no), or have bascule's "
            "stand before it.",
        )
        return
    foreign = known_elsewhere(subject)
    if not foreign:
        yield good(f"no userdb of this Dovecot but bascule's knows an address of {subject.domain}")
        return
    named = first([f"{address} ({home})" if home else str(address) for address, home in foreign.items()], NAMED)
    yield wrong(
        f"a userdb of this Dovecot knows {named}: when they have moved, Dovecot would show that mailbox, "
        "and not the one that was copied",
        "Take them out of your own user database first (if there is mail, import it at the legacy server).",
    )


def known_elsewhere(subject: Subject) -> dict[Address, str]:
    """The addresses of the domain that the operator's userdb knows, each with the home that it names."""
    if subject.addresses is not None:
        return _operators(subject, subject.addresses)
    listed = [
        Address.parse(name)
        for name in subject.dovecot.user(f"*@{subject.domain}").text.split()
        if _is_of(name, subject)
    ]
    known: list[Address] = [subject.user.address] if subject.user is not None else []
    if subject.connection is not None:
        rows = subject.connection.execute(
            "SELECT address FROM bascule.mailboxes WHERE domain = %s ORDER BY 1", (subject.domain,)
        ).fetchall()
        known += [Address.parse(address) for (address,) in rows]
    return _operators(subject, list(dict.fromkeys([*listed, *known])))


def _is_of(name: str, subject: Subject) -> bool:
    return name.lower().endswith(f"@{subject.domain}")


def home_of(address: Address) -> str:
    """The home of a mailbox below mail_root; as the function of that name in the database has it."""
    local_part = address.local_part.replace("/", "%2F")
    return f"{address.domain}/{'%2E' + local_part[1:] if local_part.startswith('.') else local_part}"


def _foreign(subject: Subject, addresses: Sequence[Address]) -> dict[Address, str]:
    """Those for whom Dovecot has a home, or a place of the mail, that is not bascule's."""
    return foreign_homes(subject.dovecot, subject.settings, addresses)


def _operators(subject: Subject, addresses: Sequence[Address]) -> dict[Address, str]:
    """As :func:`_foreign`, but of the operator's userdbs alone: bascule's, which stands before them, is passed over."""
    asking = () if _is_kept_for_others(subject.dovecot) else ("-x", f"rip={ASIDE}")
    return foreign_homes(subject.dovecot, subject.settings, addresses, asking, ours_counts=False)


def _is_kept_for_others(facts: DovecotFacts) -> bool:
    """Whether Dovecot's cache would give what bascule's userdb says to the check to LMTP as well: "unknown"."""
    if not facts.version.startswith("2.3") or not _has_auth_cache(facts):
        return False
    return any(
        each.get("driver") == "lua" and _is_ours(each) and "%{rip}" not in each.get("args")
        for each in facts.whole("userdb")
    )


def _has_auth_cache(facts: DovecotFacts) -> bool:
    return facts.value("auth_cache_size").split()[:1] not in ([], ["0"], ["0B"])


def foreign_homes(
    facts: DovecotFacts,
    settings: Settings,
    addresses: Sequence[Address],
    asking: Sequence[str] = (),
    *,
    ours_counts: bool = True,
) -> dict[Address, str]:
    """As LMTP looks them up: the addresses whose home or mail is not bascule's, with that home.

    ``asking``: more options of ``doveadm user``. ``ours_counts``: that bascule's own userdb puts a name off is an
    answer, too: it says so of everybody who has not moved.

    Raises:
        NotReadable: Dovecot does not say.
    """
    found: dict[Address, str] = {}
    asking = ("-x", "service=lmtp", *asking)
    nobody = _Nobody(facts, asking)
    for start in range(0, len(addresses), BATCH):
        batch = addresses[start : start + BATCH]
        said = facts.user(*asking, "-f", "home", *map(str, batch))
        unknown = _unknown(said)
        there = [address for address in batch if str(address) not in unknown]
        ours = {_ours(settings, address) for address in there}
        mails = set(facts.user(*asking, "-f", "mail", *map(str, there)).text.split("\n")) - {""} if there else set()
        homes = {os.path.normpath(line) for line in said.text.splitlines() if line.strip()}
        if said.status in {0, NO_USER} and homes == ours and mails <= {settings.worker.mail_location}:
            continue
        for address in there:
            home = _home_elsewhere(facts, settings, address, asking, nobody, ours_counts=ours_counts)
            if home is not None:
                found[address] = home
    return found


def _unknown(said: Output) -> set[str]:
    """Who does not exist; doveadm prints it with the fields if it is asked for all of them, else as an error."""
    return set(_NO_SUCH_USER.findall(said.text + said.errors))


def _ours(settings: Settings, address: Address) -> str:
    return os.path.normpath(settings.worker.mail_root / home_of(address))


class _Nobody:
    """What Dovecot says of names that nobody has; each is asked about once."""

    def __init__(self, facts: DovecotFacts, asking: Sequence[str]) -> None:
        self._facts = facts
        self._asking = asking
        self._known: dict[str, bool] = {}

    def is_unknown_in(self, domain: str) -> bool:
        """Whether an address of a domain that exists nowhere is said to be nobody's, not put off."""
        if domain not in self._known:
            self._known[domain] = bool(_unknown(self._facts.user(*self._asking, str(invented(domain)))))
        return self._known[domain]


def _home_elsewhere(
    facts: DovecotFacts,
    settings: Settings,
    address: Address,
    asking: Sequence[str],
    nobody: _Nobody,
    *,
    ours_counts: bool,
) -> str | None:
    """The home of an address if it is not bascule's; None if it is, or if there is no such user."""
    said = facts.user(*asking, str(address))
    if _unknown(said):
        return None
    fields = dict(line.split("\t", 1) for line in said.text.splitlines() if "\t" in line)
    if not fields.get("home") and not fields.get("uid"):
        # It fails for a user whom a userdb knows and Dovecot may not serve (another uid, for instance), and for
        # everybody while a userdb is away.
        if nobody.is_unknown_in(address.domain):
            return ""
        # In a domain that is active it fails for all who have not moved: bascule's own userdb says so, to nobody else.
        if ours_counts and nobody.is_unknown_in(NO_DOMAIN):
            return None
        last = (said.errors.strip().splitlines() or ["no answer"])[-1]
        raise NotReadable(f"Dovecot does not say whether it knows {address}: {last}")
    home = fields.get("home", "")
    ours = home and os.path.normpath(home) == _ours(settings, address)
    mail = fields.get("mail", "")
    if ours and mail in {"", settings.worker.mail_location}:
        return None
    return home if not ours else mail


@check("dovecot.userdb-order", "Dovecot", needs=("Dovecot",))
def userdb_order(subject: Subject) -> Iterator[Said]:
    """Whether a userdb that takes every name for its own stands before bascule's."""
    for block in subject.dovecot.blocks("userdb"):
        if _is_ours(block):
            return
        driver = block.get("driver") or block.get("userdb_driver") or block.name
        if driver in {"static", "prefetch"} and driver == "static" and "allow_all_users=yes" not in block.get("args"):
            yield note(
                "a userdb static stands before bascule's: if no passdb is asked first, it takes every name for its own",
                "See store__before_static of the role, or use another userdb.",
            )


def _is_ours(block: Block) -> bool:
    return any("bascule" in value for value in (*block.settings.values(), block.name))


# Logins ------------------------------------------------------------------------------


@check("dovecot.protocols", "Dovecot", needs=("Dovecot",))
def protocols(subject: Subject) -> Iterator[Said]:
    """Whether this Dovecot keeps mailboxes: IMAP and LMTP."""
    lacking = sorted({"imap", "lmtp"} - subject.dovecot.protocols)
    if lacking:
        yield wrong(
            f"Dovecot here does not speak {' nor '.join(lacking)}",
            "bascule needs both: install dovecot-imapd and dovecot-lmtpd. A director or a pure proxy cannot be a "
            "store.",
        )
    else:
        yield good("Dovecot speaks IMAP and LMTP")


@check("dovecot.mechanisms", "Dovecot", needs=("Dovecot",))
def mechanisms(subject: Subject) -> Iterator[Said]:
    """Whether clients log in with their password, which the legacy server must be asked about."""
    offered = set(subject.dovecot.value("auth_mechanisms").lower().split())
    hiding = sorted(
        offered - {"plain", "login", "external", "oauthbearer", "xoauth2", "anonymous", "gssapi", "gss-spnego"}
    )
    if offered and not offered & {"plain", "login"}:
        yield wrong(
            f"auth_mechanisms is {' '.join(sorted(offered))}: no user who has not moved can log in",
            "Add plain: the legacy server must be shown the password.",
        )
    elif hiding:
        yield note(
            f"auth_mechanisms offers {' '.join(hiding)}, with which the legacy server cannot be asked",
            "Clients that choose it are refused until their user has moved, and after it: take it out.",
        )
    else:
        yield good("clients log in with their password")


@check("dovecot.auth-cache", "Dovecot", needs=("Dovecot", "plugged"))
def auth_cache(subject: Subject) -> Iterator[Said]:
    """Whether Dovecot keeps answers of bascule's in its cache, across the flip."""
    if not _has_auth_cache(subject.dovecot):
        return
    size = subject.dovecot.value("auth_cache_size")
    if _is_kept_for_others(subject.dovecot):
        yield note(
            f"auth_cache_size is {size}, and the cache_key of bascule's userdb has no %{{rip}}: the check "
            "dovecot.userdb cannot ask the userdbs behind it",
            "Plug bascule in again.",
        )
    for block in (*subject.dovecot.blocks("passdb"), *subject.dovecot.blocks("userdb")):
        text = " ".join((*block.settings.values(), *block.settings))
        lua = "lua" in {block.get("driver"), block.name, block.get(f"{block.kind}_driver")}
        if lua and "bascule" in text and "cache_key" not in text:
            yield wrong(
                f"auth_cache_size is {size}, and bascule's passdb says no cache_key: logins would go on to the legacy "
                "server after the flip",
                "Plug bascule in again; or say auth_cache_size = 0.",
            )
            return
    yield good(f"auth_cache_size is {size}, and no answer of bascule's is cached")


# Mailboxes ----------------------------------------------------------------------------


@check("dovecot.namespaces", "Dovecot", needs=("Dovecot",), after=("legacy.imap.login",))
def namespaces(subject: Subject) -> Iterator[Said]:
    """Whether the operator's namespaces agree with the separator and prefix of the legacy server."""
    if (unnamed := rules.inbox_problem(subject.dovecot)) is not None:
        yield wrong(unnamed.text, unnamed.remedy)
    if not subject.has(("user",)):
        yield from _told_of_namespaces(subject.dovecot)
        return
    if subject.legacy_only:
        return
    separator, prefix = subject.survey.separator, subject.survey.prefix
    found = list(rules.problems(subject.dovecot, separator, prefix))
    yield from (wrong(each.text, each.remedy) for each in found)
    if not found and unnamed is None:
        yield good(f"the namespaces here go with the legacy server's separator {separator!r}")


def _told_of_namespaces(facts: DovecotFacts) -> Iterator[Said]:
    """What may matter, while nobody knows what the legacy server has."""
    for each in rules.namespaces(facts):
        if each.is_inbox:
            if each.prefix:
                yield note(
                    f"the prefix of the INBOX's namespace is {each.prefix!r}",
                    "Fine if the legacy server has a prefix, or with Dovecot 2.4: bascule check DOMAIN --user says.",
                )
        elif each.is_listed:
            yield note(
                f"{each} is listed beside the INBOX's, with separator {each.separator!r}",
                "A user can only be moved if the legacy server has the same separator: bascule check DOMAIN --user "
                "says.",
            )


@check("dovecot.quota", "Dovecot", needs=("Dovecot",), after=("legacy.imap.login",))
def quota(subject: Subject) -> Iterator[Said]:
    """Whether the default quota here is smaller than the mailbox at the legacy server."""
    limit = default_quota(subject.dovecot)
    if limit is None:
        return
    if not subject.has(("user",)) or subject.legacy_only:
        yield note(
            f"every user has a quota of {_megabytes(limit)} here",
            "A mailbox that is larger at the legacy server would be full from the flip on, and get no mail.",
        )
        return
    used = max(subject.survey.size, subject.survey.quota_used or 0)
    address = subject.account.address
    if used >= limit:
        yield wrong(
            f"the default quota here is {_megabytes(limit)}, and {address} has {_megabytes(used)} at the legacy "
            "server: after the move all mail for them would be refused",
            "Raise quota_rule (2.3) or quota_storage_size (2.4) above the largest mailbox that is to move.",
        )
    else:
        yield good(f"{address} has {_megabytes(used)} at the legacy server, and a quota of {_megabytes(limit)} here")


@check("dovecot.message-size", "Dovecot", needs=("Dovecot", "user"), after=("legacy.imap.login",))
def message_size(subject: Subject) -> Iterator[Said]:
    """Whether the legacy mailbox has messages larger than a user may store here."""
    limit = largest_message(subject.dovecot)
    if limit is None or subject.legacy_only:
        return
    folders = [folder for folder in subject.survey.read if folder.largest > limit]
    for folder in folders[: subject.named]:
        yield note(
            f"the folder {folder.name!r} has a message of {_megabytes(folder.largest)}, and a user may store "
            f"{_megabytes(limit)} here (quota_max_mail_size, quota_mail_size)",
            "It comes along; but a client cannot put it into another folder afterwards.",
        )


def largest_message(facts: DovecotFacts) -> int | None:
    """What a client may store at most in one message, in bytes; None: there is no limit."""
    found = [_bytes(facts.plugin("quota_max_mail_size"))]  # 2.3
    for block in (facts.root, *facts.blocks("quota")):  # 2.4
        found += [_bytes(block.get(name)) for name in ("quota_mail_size", "mail_size")]
    return min((limit for limit in found if limit), default=None)


def default_quota(facts: DovecotFacts) -> int | None:
    """The smallest limit for storage that every user has, in bytes; None: there is none."""
    limits = []
    for block in facts.blocks("plugin"):  # 2.3
        for name, value in block.settings.items():
            if re.fullmatch(r"quota\d*_rule\d*", name):
                limits += [found for found in (_storage(rule) for rule in value.splitlines()) if found]
    for block in (facts.root, *facts.blocks("quota")):  # 2.4
        for name, value in block.settings.items():
            if name in {"quota_storage_size", "storage_size"} and (found := _bytes(value)):
                limits.append(found)
    return min(limits, default=None)


def _storage(rule: str) -> int | None:
    """Of ``*:storage=1G:messages=10000``; a rule for one folder is not of all."""
    folder, *limits = rule.strip().split(":")
    for each in limits if folder == "*" else ():
        name, _, value = each.partition("=")
        if name in {"storage", "bytes"}:
            return _bytes(value, otherwise="" if name == "storage" else "B")
    return None


def _bytes(text: str, otherwise: str = "B") -> int | None:
    found = re.fullmatch(r"\s*(\d+)\s*([KMGTB]?)I?B?\s*", text.upper())
    return int(found[1]) * _UNITS[found[2] or otherwise] or None if found else None


def _megabytes(size: int) -> str:
    return f"{size / 1024**2:.1f} MiB"


@check("dovecot.autoexpunge", "Dovecot", needs=("Dovecot",))
def autoexpunge(subject: Subject) -> Iterator[Said]:
    """Folders from which Dovecot removes old mail by itself."""
    for namespace in subject.dovecot.blocks("namespace"):
        for folder in namespace.all("mailbox"):
            after = folder.get("autoexpunge", "0")
            if after.split()[0] != "0":
                yield note(
                    f"Dovecot removes mail from {folder.name} after {after} (autoexpunge)",
                    "It does so with moved mail, too, at the user's first login here; before the close a return "
                    "would remove it at the legacy server as well. Say so to the users, or take the setting out "
                    "meanwhile.",
                )


@check("dovecot.sieve", "Dovecot", needs=("Dovecot",))
def sieve(subject: Subject) -> Iterator[Said]:
    """Whether Sieve scripts are looked for where bascule writes them."""
    if subject.has(("domain",)) and subject.legacy.sieve is None:
        return
    facts = subject.dovecot
    if "sieve" not in facts.protocols and "sieve" not in facts.text:
        return
    where = facts.plugin("sieve") or facts.plugin("sieve_dir")
    for block in facts.blocks("sieve_script"):  # 2.4
        kind = block.get("type") or block.get("sieve_script_type") or "personal"
        if kind == "personal":
            where = block.get("active_path") or block.get("sieve_script_active_path") or block.get("path")
    if where and "~/.dovecot.sieve" not in where and "%h/.dovecot.sieve" not in where:
        yield note(
            f"Dovecot looks for a user's Sieve script at {where}; bascule writes it to ~/sieve, active by "
            "~/.dovecot.sieve",
            "Scripts of users who move would be there and not run: say sieve = file:~/sieve;active=~/.dovecot.sieve.",
        )
    for setting in ("sieve_before", "sieve_after", "imapsieve_mailbox1_name", "imapsieve_mailbox2_name"):
        if facts.plugin(setting):
            yield note(
                f"{setting} is {facts.plugin(setting)}",
                "A folder that it names (INBOX.Junk, for instance) is named with the legacy server's separator for "
                "users who have moved: see that it exists for them.",
            )


@check("dovecot.recipient-delimiter", "Dovecot", needs=("Dovecot",))
def dovecot_delimiter(subject: Subject) -> Iterator[Said]:
    """Whether Dovecot and bascule separate user+detail in the same way."""
    here, ours = subject.dovecot.value("recipient_delimiter"), subject.settings.dovecot.recipient_delimiter
    if here and ours not in here:
        yield wrong(
            f"recipient_delimiter of Dovecot is {here!r}, bascule's is {ours!r}: mail with a detail is refused by LMTP",
            "Say the same in Dovecot, in Postfix and in [dovecot] recipient_delimiter of bascule.toml.",
        )


# Trust, places, owners --------------------------------------------------------------


@check("dovecot.ssl-ca", "Dovecot", needs=("Dovecot",))
def ssl_ca(subject: Subject) -> Iterator[Said]:
    """Whether ssl_ca is too long for programs that read Dovecot's configuration by themselves."""
    value = subject.dovecot.value("ssl_ca")
    if not value or not subject.dovecot.version.startswith("2.3"):
        return
    path = Path(value.removeprefix("<").strip())
    if not value.startswith("<"):
        size = len(value)
    else:
        try:
            size = path.stat().st_size
        except OSError as error:
            yield note(f"ssl_ca is {path}, which cannot be looked at: {error.strerror}", "Run bascule check as root.")
            return
    if why := authorities.too_long(size):
        yield wrong(
            f"{path if value.startswith('<') else 'the text in dovecot.conf'} is too long: {why}",
            "Name a file with the legacy server's authority only in ssl_ca, and in [legacy] ca_file of bascule.toml: "
            "bascule check DOMAIN --write-ca FILE makes it.",
        )
    else:
        yield good(f"ssl_ca has {size} bytes, and fits into an environment")


@check("dovecot.authorities", "Dovecot", needs=("Dovecot", "domain"), after=("legacy.imap.reach",), stops=True)
def legacy_authorities(subject: Subject) -> Iterator[Said]:
    """Whether Dovecot 2.3 trusts the legacy server's certificate; the file with its authority is made here."""
    legacy, settings = subject.legacy, subject.settings.legacy
    if settings.ca_file is not None or legacy.imap.tls == "none" or not subject.dovecot.version.startswith("2.3"):
        return
    path, host = settings.authorities, legacy.imap_host
    try:
        client = connect_imap(legacy, subject.trust)
    except LegacyUnavailable as error:
        if host not in authorities.read(path):
            yield wrong(
                f"Dovecot here does not trust the certificate of {host}: {path} has no authority for it, and it "
                f"cannot be asked: {error.message}",
                "Run this again when it answers. Without it nobody who has not moved can log in here.",
            )
        return
    try:
        connection = client.socket()
        chain = authorities.verified_chain(connection) if isinstance(connection, ssl.SSLSocket) else []
    finally:
        client.shutdown()
    if not chain:
        return
    try:
        changed = authorities.write(path, {host: chain})
    except OSError as error:
        yield wrong(
            f"Dovecot here may not trust the certificate of {host}: {path} cannot be written: {error.strerror}",
            "Run this on each host with Dovecot, as root: bascule check DOMAIN --only dovecot.authorities. Without it "
            "nobody who has not moved can log in here.",
        )
        return
    if not changed:
        yield good(f"{path} has the authority that the certificate of {host} needs")
        return
    try:
        subject.dovecot.reload()
    except NotReadable as error:
        yield wrong(
            f"{path} has now the authority that the certificate of {host} needs, and Dovecot does not take it up: "
            f"{error.message}",
            "doveadm reload, as root. Until then nobody who has not moved can log in here.",
        )
    else:
        yield note(
            f"{path} has now the authority that the certificate of {host} needs, and Dovecot has been reloaded",
            "Do the same on each other host with Dovecot: bascule check DOMAIN --only dovecot.authorities.",
        )


@check("dovecot.mail-root", "Dovecot", needs=("Dovecot",))
def mail_root(subject: Subject) -> Iterator[Said]:
    """Whether the workers reach the place of the mailboxes."""
    root = subject.settings.worker.mail_root
    hidden = next((each for each in HIDDEN if _is_below(root, each)), None)
    if hidden is not None:
        yield wrong(
            f"mail_root is {root}, below {hidden}, which systemd hides from bascule's units (ProtectHome): nothing "
            "could be stored",
            "systemctl edit bascule-worker: ProtectHome=no; or keep mailboxes elsewhere ([worker] mail_root).",
        )
        return
    try:
        owner = root.stat().st_uid
    except OSError:
        return  # it is made when bascule is plugged in
    first = int(subject.dovecot.value("first_valid_uid") or 0)
    last = int(subject.dovecot.value("last_valid_uid") or 0)
    if owner and (owner < first or (last and owner > last)):
        yield wrong(
            f"{root} belongs to the uid {owner}, and Dovecot serves mailboxes of uids from {first} to {last or 'any'} "
            "only",
            "Correct first_valid_uid or last_valid_uid in Dovecot.",
        )


def _is_below(path: Path, folder: str) -> bool:
    real = Path(os.path.realpath(path))
    return real.is_relative_to(folder) or path.is_relative_to(folder)


@check("dovecot.conf-d", "Dovecot", needs=("Dovecot",))
def conf_d(subject: Subject) -> Iterator[Said]:
    """Whether Dovecot reads the file by which bascule is plugged in."""
    if _names_bascule(subject.dovecot.blocks("passdb")):
        yield good("Dovecot asks bascule about logins")
        return
    path = subject.settings.dovecot.config_file
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return
    if re.search(r"^\s*!include(_try)?\s+\S*(conf\.d/\*|conf\.d/99-bascule)", text, re.MULTILINE):
        yield good(f"{path} includes conf.d")
    else:
        yield wrong(
            f"{path} is a single file: what bascule puts beside it is not read",
            "Add this line at its end, and nothing else of conf.d: !include_try conf.d/99-bascule.conf",
        )


def _names_bascule(blocks: Iterable[Block]) -> bool:
    return any(_is_ours(each) for each in blocks)
