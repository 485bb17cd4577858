"""The legacy IMAP server, and POP3, submission and ManageSieve beside it. Nothing is changed there.

With a user's password, one session is looked at by the same reader that copies
mailboxes: what it cannot read is known before anybody moves.
"""

from __future__ import annotations

import imaplib
import re
import smtplib
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from imapclient import IMAPClient
from imapclient.exceptions import IMAPClientError

from bascule.check.finding import Said, first, good, note, wrong
from bascule.check.registry import check
from bascule.check.subject import Subject
from bascule.errors import LegacyRefusedLogin, LegacyUnavailable
from bascule.imap.folder_rules import Arranged, Traits
from bascule.imap.names import places, readable
from bascule.imap.reader import FolderRefused, Reader
from bascule.legacy import Service, connect_imap, imap_session, plainly

#: What a capability is good for, and what is without it.
CAPABILITIES = {
    "CONDSTORE": ("later passes ask for changes only", "each pass compares all flags; large mailboxes take longer"),
    "UIDPLUS": ("a return writes quickly", "a return has to search for what it wrote"),
    "NAMESPACE": ("prefix and separator are known", "prefix and separator are guessed from the folder list"),
    "SPECIAL-USE": ("Sent, Drafts and the like are known", "clients have to find Sent, Drafts and the like by name"),
}
EXPIRES_SOON = 30  # days
NEARLY_FULL = 0.98  # of the quota
MOST_READ = 100_000  # messages whose flags and dates are read
MOST_KEYWORDS = 26  # that a folder in Maildir format keeps (Dovecot manual, "Maildir", dovecot-keywords)
MOST_BYTES = 255  # of a file name (Linux, NAME_MAX)
AT_ONCE = 20  # folders that are named together where all are named
#: Servers that show a client the newest messages only, or may be told to: by a capability, or by the end of a name.
NEWEST_ONLY = {
    "X-GM-EXT-1": "Gmail can be told to show the newest messages of a folder only (Settings, Forwarding and POP/IMAP, "
    "Folder size limits), and shows each message in All Mail once more",
    "XYMHIGHESTMODSEQ": "Yahoo and AOL show the newest messages of a folder only",
    "yahoo.com": "Yahoo shows the newest messages of a folder only",
    "aol.com": "AOL shows the newest messages of a folder only",
}


# The reader of the copy ----------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FolderRead:
    """What the reader gave of one folder."""

    name: str
    exists: int
    given: int
    keywords: frozenset[str]
    odd_dates: int
    #: Bytes of the largest message.
    largest: int = 0


@dataclass(slots=True)
class Survey:
    """What a session of the user's saw."""

    capabilities: frozenset[str] = frozenset()
    quotas: list[tuple[str, int, int]] = field(default_factory=list)
    rights: dict[str, str] = field(default_factory=dict)
    separator: str = "/"
    prefix: str = ""
    #: What the server was recognised as, or empty.
    profile: str = ""
    profile_note: str = ""
    delimiters: dict[str, str] = field(default_factory=dict)
    folders: tuple[str, ...] = ()
    #: Folders that others share with the user.
    foreign: tuple[str, ...] = ()
    messages: dict[str, int] = field(default_factory=dict)
    unopened: dict[str, str] = field(default_factory=dict)
    unread: dict[str, str] = field(default_factory=dict)
    read: list[FolderRead] = field(default_factory=list)
    #: Bytes of the messages that were read.
    size: int = 0
    #: What the domain's rules make of the folders.
    arranged: Arranged | None = None
    #: The messages of each folder that is left out; None: the server does not say.
    left_out: dict[str, int | None] = field(default_factory=dict)

    @property
    def largest(self) -> int:
        """Bytes of the largest message that was seen."""
        return max((folder.largest for folder in self.read), default=0)

    @property
    def quota_used(self) -> int | None:
        """Bytes, as the server counts them; None: it does not say (RFC 9208: STORAGE is in units of 1024)."""
        return max((usage * 1024 for resource, usage, _ in self.quotas if resource == "STORAGE"), default=None)


def look_around(subject: Subject) -> Survey:
    """Log in and look at everything.

    Raises:
        LegacyRefusedLogin, LegacyUnavailable: also if nothing can be done after the login.
    """
    survey = Survey()
    with subject.fresh_session() as session:
        try:
            session.folder_status("INBOX", ["MESSAGES"])
        except (IMAPClientError, imaplib.IMAP4.error) as error:
            raise LegacyUnavailable(
                f"the server takes the login of {subject.account.address} and then opens nothing: {error}",
                hint="Its mail is elsewhere, or the account may not use IMAP. A login alone is no proof.",
            ) from error
        survey.capabilities = _capabilities(session)
        survey.quotas = _quotas(session)
    with subject.reader() as reader:
        survey.profile, survey.profile_note = reader.profile.name, reader.profile.note
        survey.arranged = arranged = subject.folder_rules.arrange(reader.layout(), Traits.of(reader))
        layout = arranged.layout
        survey.separator, survey.prefix = layout.separator, layout.prefix
        survey.delimiters = {folder.name: folder.delimiter for folder in layout.folders}
        survey.folders = tuple(folder.name for folder in layout.folders if folder.selectable)
        survey.foreign = layout.foreign
        for name, status in reader.statuses(survey.folders).items():
            if isinstance(status, FolderRefused):
                survey.unopened[name] = status.reason
            else:
                survey.messages[name] = status.messages
        _read_largest(reader, survey)
        survey.left_out = _counted(reader, list(arranged.left_out))
    if "ACL" in survey.capabilities:
        with subject.fresh_session() as session:
            survey.rights = _rights(session, survey)
    return survey


def _capabilities(session: IMAPClient) -> frozenset[str]:
    try:
        said = session.capabilities()
    except (AttributeError, UnicodeError) as error:  # imapclient's, of an answer that is none
        raise LegacyUnavailable("the server does not say what it can do (CAPABILITY)") from error
    return frozenset(each.decode(errors="replace").upper() for each in said)


def _read_largest(reader: Reader, survey: Survey) -> None:
    left = MOST_READ
    for name, announced in sorted(survey.messages.items(), key=lambda item: (-item[1], item[0])):
        if announced > left:
            continue
        left -= announced
        for changes in reader.changes([(name, None)]):
            if isinstance(changes, FolderRefused):
                survey.unread[name] = changes.reason
                continue
            given = changes.new
            survey.size += sum(message.size for message in given)
            keywords = {flag for message in given for flag in message.flags if not flag.startswith("\\")}
            odd = sum(
                bool(message.remarks) or not 0 <= message.internaldate <= time.time() + 86400 for message in given
            )
            largest = max((message.size for message in given), default=0)
            survey.read.append(FolderRead(name, changes.exists, len(given), frozenset(keywords), odd, largest))


def _counted(reader: Reader, folders: list[str]) -> dict[str, int | None]:
    """How many messages each folder has. The last that is asked: the server may end the session at one of them."""
    try:
        found = reader.statuses(folders)
    except LegacyUnavailable:
        return dict.fromkeys(folders)
    return {name: None if isinstance(each, FolderRefused) else each.messages for name, each in found.items()}


def _quotas(session: IMAPClient) -> list[tuple[str, int, int]]:
    if not session.has_capability("QUOTA"):
        return []
    try:
        _, quotas = session.get_quota_root("INBOX")
    except IMAPClientError:
        return []  # some servers offer it and have none
    return [(str(quota.resource).upper(), int(quota.usage), int(quota.limit)) for quota in quotas]


def _rights(session: IMAPClient, survey: Survey) -> dict[str, str]:
    """What the user may do with each folder (RFC 4314, MYRIGHTS)."""
    found = {}
    for name in survey.messages:
        try:
            found[name] = session.my_rights(name).decode(errors="replace").split()[-1]
        except (IMAPClientError, IndexError, AttributeError):
            continue  # it offers ACL and does not say for this one
    return found


# Reaching it ------------------------------------------------------------------------


@check("legacy.imap.reach", "IMAP", needs=("domain",))
def reach(subject: Subject) -> Iterator[Said]:
    """Whether the legacy IMAP server is reached, over TLS, with a good certificate."""
    legacy, trust = subject.legacy, subject.trust
    try:
        client = connect_imap(legacy, trust)
    except LegacyUnavailable as error:
        yield wrong(error.message, "Correct --imap-host, --imap-port or --imap-tls.")
        return
    where = f"{legacy.imap_host}:{legacy.imap.port}"
    try:
        capabilities = {capability.decode(errors="replace") for capability in client.capabilities()}
        yield _security(where, client.socket())
    except (OSError, IMAPClientError, UnicodeError) as error:
        yield wrong(plainly(error, legacy.imap_host, legacy.imap.port), "Is this an IMAP port?")
        return
    finally:
        client.shutdown()
    if "LOGINDISABLED" in capabilities and "AUTH=PLAIN" not in capabilities:
        yield wrong(
            "the server takes no password on this connection (LOGINDISABLED)",
            "It wants TLS: --imap-tls starttls, or implicit at its other port.",
        )


def _security(where: str, connection: socket.socket) -> Said:
    if not isinstance(connection, ssl.SSLSocket):
        return note(
            f"{where} answers, without TLS: every password goes there in clear text",
            "Use TLS, unless the way there is your own.",
        )
    certificate = connection.getpeercert() or {}
    expires = ssl.cert_time_to_seconds(str(certificate.get("notAfter", "Jan  1 00:00:00 2099 GMT")))
    days = int((expires - time.time()) / 86400)
    text = f"{where} answers, {connection.version()} with a good certificate ({days} days left)"
    if days < EXPIRES_SOON:
        return note(text, "Have it renewed in time: without it nobody can log in there or be moved.")
    return good(text)


def _service(subject: Subject, service: Service | None, start: Callable[[socket.socket], None]) -> Iterator[Said]:
    """Another service of the legacy host; ``start`` brings a connection to the point where TLS begins."""
    if service is None:
        return
    host = subject.legacy.imap_host
    try:
        with socket.create_connection((host, service.port), timeout=subject.trust.timeout) as plain:
            if service.tls == "starttls":
                start(plain)
            if service.tls == "none":
                yield _security(f"{host}:{service.port}", plain)
                return
            with subject.trust.context().wrap_socket(plain, server_hostname=host) as secured:
                yield _security(f"{host}:{service.port}", secured)
    except OSError as error:
        yield wrong(plainly(error, host, service.port), "Correct the port, or how it is secured: bascule domain set.")


def _exchange(command: bytes, good_answer: bytes, greeting: bytes) -> Callable[[socket.socket], None]:
    """What begins TLS: wait for the greeting, send the command, wait for the answer."""

    def start(connection: socket.socket) -> None:
        _await(connection, greeting)
        connection.sendall(command)
        _await(connection, good_answer)

    return start


def _await(connection: socket.socket, wanted: bytes) -> None:
    heard = b""
    while not re.search(wanted, heard, re.MULTILINE):
        piece = connection.recv(4096)
        if not piece or len(heard) > 65_536:
            raise OSError(0, f"it does not say what was waited for, but {heard[:100]!r}")
        heard += piece


@check("legacy.pop3", "IMAP", needs=("domain",))
def pop3(subject: Subject) -> Iterator[Said]:
    """Whether the legacy POP3 server is reached, if the domain has one."""
    yield from _service(
        subject, subject.legacy.pop3, _exchange(b"STLS\r\n", rb"^\+OK.*\n.*^\+OK.*\n|^\+OK.*\n", rb"^\+OK.*\n")
    )


@check("legacy.sieve", "IMAP", needs=("domain",))
def managesieve(subject: Subject) -> Iterator[Said]:
    """Whether the legacy ManageSieve server is reached, if the domain has one."""
    yield from _service(subject, subject.legacy.sieve, _exchange(b"STARTTLS\r\n", rb"^OK.*\n", rb"^OK.*\n"))


@check("legacy.submission", "IMAP", needs=("domain",))
def submission(subject: Subject) -> Iterator[Said]:
    """Whether the legacy submission server is reached, if the domain has one."""
    service = subject.legacy.submission
    if service is None:
        return
    host = subject.legacy.imap_host
    timeout = subject.trust.timeout
    try:
        if service.tls == "implicit":
            client: smtplib.SMTP = smtplib.SMTP_SSL(
                host, service.port, timeout=timeout, context=subject.trust.context()
            )
        else:
            client = smtplib.SMTP(host, service.port, timeout=timeout)
        with client:
            if service.tls == "starttls":
                client.starttls(context=subject.trust.context())
            if client.sock is not None:
                yield _security(f"{host}:{service.port}", client.sock)
    except (OSError, smtplib.SMTPException) as error:
        yield wrong(plainly(error, host, service.port), "Correct the port, or how it is secured: bascule domain set.")


# With a user -------------------------------------------------------------------------


@check("legacy.imap.login", "IMAP", needs=("domain",), after=("legacy.imap.reach",))
def login(subject: Subject) -> Iterator[Said]:
    """Whether the user's password is right there, and the session is good for anything."""
    if subject.user is None:
        yield note("no login was tried", "Give --user: an address whose password you know.")
        return
    legacy, address = subject.legacy, subject.user.address
    try:
        _ = subject.survey
        yield good(f"{address} logs in, as {legacy.login_name(address)!r}")
    except LegacyRefusedLogin as error:
        if legacy.user_name is not None:
            yield wrong(
                error.message,
                f"Check the password, and the name that was told: {legacy.user_name!r} (bascule expect --login).",
            )
            return
        other = replace(legacy, login_form="address" if legacy.login_form == "local_part" else "local_part")
        try:
            with imap_session(other, subject.trust, subject.user.login):
                yield wrong(
                    f"the server knows {address} as {other.login_name(address)!r}, not as "
                    f"{legacy.login_name(address)!r}",
                    f"Prepare the domain with --login-form {other.login_form}.",
                )
        except (LegacyRefusedLogin, LegacyUnavailable):
            yield wrong(error.message, "Check address and password; both login forms were tried.")
    except LegacyUnavailable as error:
        yield wrong(error.message, error.hint or "The server has trouble of its own; try again later.")


@check("legacy.imap.capabilities", "IMAP", needs=("domain", "user"), after=("legacy.imap.login",))
def capabilities(subject: Subject) -> Iterator[Said]:
    """What the server can do beyond IMAP4rev1, and what is without it."""
    for capability, (with_it, without) in CAPABILITIES.items():
        if capability in subject.survey.capabilities:
            yield good(f"{capability}: {with_it}")
        else:
            yield note(f"no {capability}: {without}")


@check("legacy.imap.quota", "IMAP", needs=("domain", "user"), after=("legacy.imap.login",))
def legacy_quota(subject: Subject) -> Iterator[Said]:
    """Whether the legacy mailbox has room for the last message."""
    for resource, usage, limit in subject.survey.quotas:
        if limit and usage > NEARLY_FULL * limit:
            yield note(
                f"the mailbox is full there: {usage} of {limit} ({resource})",
                "The last message may not fit, and new mail may be refused there; give it some more room.",
            )
        elif limit:
            yield good(f"quota: {usage} of {limit} ({resource})")


@check("legacy.imap.permissions", "IMAP", needs=("domain", "user"), after=("legacy.imap.login",))
def permissions(subject: Subject) -> Iterator[Said]:
    """Whether the user may read every folder there, and write where bascule writes."""
    rights = subject.survey.rights
    unread = [name for name, may in rights.items() if "r" not in may]
    if unread:
        yield wrong(
            f"{subject.account.address} may not read {_names(unread, subject.named)} there: it cannot be copied",
            "Give the right r (SETACL), or leave the folder out when it is named in bascule.unreadable.",
        )
    inbox = next((may for name, may in rights.items() if name.upper() == "INBOX"), "i")
    if "i" not in inbox:
        yield wrong(
            "the user may not add to the INBOX there: the last message, which tells them of the move, cannot be "
            "written",
            "Give the right i (SETACL): without that message the domain cannot be closed.",
        )
    short = [name for name, may in rights.items() if not {"i", "w"} <= set(may) and name not in unread]
    if short and "i" in inbox:
        yield note(
            f"the user may not write to {_names(short, subject.named)} there",
            "A return could not bring back what is new in it.",
        )


@check("legacy.imap.folders", "IMAP", needs=("domain", "user"), after=("legacy.imap.login",))
def folders(subject: Subject) -> Iterator[Said]:
    """Whether every folder that is listed is opened."""
    survey, address = subject.survey, subject.account.address
    if not any(name.upper() == "INBOX" for name in survey.folders):
        yield wrong("the server does not list the INBOX: it would be left behind", "Every mailbox has one (RFC 3501).")
    for name, why in list(survey.unopened.items())[: subject.named]:
        yield wrong(
            f"the folder {name!r} is listed and cannot be opened: {why}",
            "Have it mended there; or leave it out when it is named in bascule.unreadable.",
        )
    total = sum(survey.messages.values())
    yield good(f"{address} has {total} messages in {len(survey.messages)} folders, separator {survey.separator!r}")


@check("legacy.imap.folder-rules", "IMAP", needs=("domain", "user"), after=("legacy.imap.login",))
def folder_rules(subject: Subject) -> Iterator[Said]:
    """Which folders rules leave at the legacy server, with their messages, and which they have otherwise here."""
    survey = subject.survey
    if (arranged := survey.arranged) is None:
        return
    for reason in dict.fromkeys(arranged.left_out.values()):
        left = [name for name, why in arranged.left_out.items() if why == reason]
        # All are named, in findings that can be read.
        for start in range(0, len(left), AT_ONCE):
            some = ", ".join(_with_messages(name, survey.left_out) for name in left[start : start + AT_ONCE])
            yield note(
                f"left at the legacy server: {some}: {reason}",
                f"The report names them, too. To have them come along: bascule folder-rule add {subject.domain} "
                "--name ... --copy, or bascule folder-rule remove.",
            )
    kept = places(survey.delimiters.items(), survey.separator, survey.prefix, arranged.renamed)
    for words in arranged.in_words(kept):
        yield note(words)


@check("legacy.imap.unused-rules", "IMAP", needs=("domain", "user"), after=("legacy.imap.login",))
def unused_rules(subject: Subject) -> Iterator[Said]:
    """Whether each rule for folders fits one of this user."""
    arranged = subject.survey.arranged
    for rule in arranged.unused if arranged is not None else ():
        yield note(
            f"{rule} fits no folder of this user",
            "Names are written as they are here, with the separator and the prefix of the legacy server.",
        )


def _with_messages(name: str, messages: dict[str, int | None]) -> str:
    number = messages.get(name)
    return f"{readable(name)!r} ({'not counted' if number is None else number})"


@check("legacy.imap.folder-names", "IMAP", needs=("domain", "user"), after=("legacy.imap.login",))
def folder_names(subject: Subject) -> Iterator[Said]:
    """Whether every folder keeps its name here."""
    survey = subject.survey
    by_rule = survey.arranged.renamed if survey.arranged is not None else {}
    kept = places(survey.delimiters.items(), survey.separator, survey.prefix, by_rule)
    renamed = {place.text: place for name, place in kept.items() if place.is_renamed and name not in by_rule}
    for text, place in list(renamed.items())[: subject.named]:
        yield note(
            f"the folder {text!r} will be {readable(place.name(survey.separator, survey.prefix))!r} here: "
            "Dovecot cannot open its name",
            "Rename it on the legacy server, or leave it: the report of the move names it. "
            "With bascule domain set --on-difference wait, the user is not moved before you decide.",
        )
    if (more := len(renamed) - subject.named) > 0:
        yield note(f"{more} more folders will have other names here", "See bascule survey, or the report of the move.")
    if "UTF8=ACCEPT" in survey.capabilities or "UTF8=ONLY" in survey.capabilities:
        named = [name for name in survey.folders if "&" in name or not name.isascii()]
        if named:
            yield note(
                f"the server offers UTF8=ACCEPT, and {len(named)} folders have other names with it",
                "Clients that use it (Thunderbird) take these for new folders after the move, for Dovecot here does "
                "not offer it: their messages are downloaded again.",
            )


@check("legacy.imap.messages", "IMAP", needs=("domain", "user"), after=("legacy.imap.login",))
def messages(subject: Subject) -> Iterator[Said]:
    """Whether the server gives every message that it says it has, with a date."""
    survey = subject.survey
    clean = True
    for name, why in survey.unread.items():
        clean = False
        yield wrong(f"the folder {name!r} cannot be read as the copy reads it: {why}", "The user cannot be moved so.")
    for folder in survey.read:
        if folder.given < folder.exists:
            clean = False
            yield wrong(
                f"the folder {folder.name!r} has {folder.exists} messages, and the server lists {folder.given}",
                "What is not listed is not copied: have the folder mended there (a rebuilt index often does).",
            )
        if folder.odd_dates:
            yield note(
                f"{folder.odd_dates} messages in {folder.name!r} have a date before 1970 or in the future",
                "They are copied; a file system cannot keep each of these dates.",
            )
    if clean:
        given = sum(folder.given for folder in survey.read)
        left = len(survey.messages) - len(survey.read)
        rest = f"; {left} folders were too large to look at here" if left else ""
        yield good(f"the server lists all {given} messages that it says it has{rest}")


@check("legacy.imap.keywords", "IMAP", needs=("domain", "user"), after=("legacy.imap.login",))
def keywords(subject: Subject) -> Iterator[Said]:
    """Whether a folder has more keywords than Maildir keeps."""
    if not subject.settings.worker.mail_location.startswith("maildir:"):
        return
    for folder in subject.survey.read:
        if len(folder.keywords) > MOST_KEYWORDS:
            yield note(
                f"the folder {folder.name!r} has {len(folder.keywords)} keywords; {MOST_KEYWORDS} are kept",
                "Have the user remove some labels there, or leave it: the report of the move names what is lost.",
            )


@check("legacy.imap.shared", "IMAP", needs=("domain", "user"), after=("legacy.imap.login",))
def shared(subject: Subject) -> Iterator[Said]:
    """Whether others share folders with the user: they are not the mailbox's, and stay where they are."""
    foreign = subject.survey.foreign
    if foreign:
        yield note(
            f"{len(foreign)} folders that others share with the user do not come along: "
            f"{_names(foreign, subject.named)}",
            "They move with their owners' mailboxes; share them anew here, or have the user copy what is needed.",
        )


@check("legacy.imap.newest-only", "IMAP", needs=("domain", "user"), after=("legacy.imap.login",))
def newest_only(subject: Subject) -> Iterator[Said]:
    """Whether this is a server that shows the newest messages only."""
    host = subject.legacy.imap_host.lower()
    for sign, words in NEWEST_ONLY.items():
        if sign in subject.survey.capabilities or host.endswith(sign):
            yield note(
                f"{words}: what it does not show is not copied",
                "Compare the number of messages with what the webmail there says.",
            )
            return


def _names(names: Sequence[str], most: int) -> str:
    return first([repr(readable(name)) for name in names], most)
