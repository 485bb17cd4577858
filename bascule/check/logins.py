"""Logins at the Dovecot here: one that must be refused, and the user's own if that moves nobody."""

from __future__ import annotations

import ipaddress
import secrets
import ssl
from collections.abc import Iterator

from imapclient import IMAPClient
from imapclient.exceptions import IMAPClientError, LoginError

from bascule.check.finding import Said, good, note, wrong
from bascule.check.registry import check
from bascule.check.subject import Subject, invented
from bascule.credential import Password
from bascule.endpoint import host_and_port
from bascule.errors import BasculeError

TIMEOUT = 60  # seconds; a login that waits for a flip is answered within them

#: UIDVALIDITY and number of messages of each folder.
_Folders = dict[bytes, tuple[int, int]]


@check("dovecot.refusal", "Dovecot", needs=("domain", "database"), after=("legacy.imap.reach",))
def refusal(subject: Subject) -> Iterator[Said]:
    """Whether Dovecot here refuses a user who does not exist."""
    where = subject.settings.dovecot.imap
    try:
        _folders(subject, str(invented(subject.domain)), Password(secrets.token_hex(8)))
    except LoginError as error:
        if "[UNAVAILABLE]" not in str(error).upper():
            yield good(f"{where} refuses a user who does not exist")
        else:
            yield wrong(
                f"{where} cannot check logins: {error}",
                "Does bascule-authenticator run, and does the legacy server answer? See their logs.",
            )
    except BasculeError:
        raise
    except (OSError, IMAPClientError) as error:
        yield wrong(f"{where} does not answer: {type(error).__name__}", "Is Dovecot running? See [dovecot] imap.")
    else:
        yield wrong(f"{where} lets anybody in", "Look at its passdbs at once.")


@check("dovecot.login", "Dovecot", needs=("domain", "user", "database"), after=("legacy.imap.login", "dovecot.refusal"))
def login(subject: Subject) -> Iterator[Said]:
    """Whether the user logs in here and sees the legacy mailbox."""
    address = subject.account.address
    if subject.login_is_a_request:
        yield note(
            f"no login of {address} was tried here: a first login is a request to be moved",
            "Check before the activation, or with a user who is to be moved.",
        )
        return
    if subject.has_moved:
        yield note(f"{address} has moved, and is served here: the login was not compared with the legacy server")
        return
    try:
        here = _folders(subject, str(address), subject.account.password)
        with subject.fresh_session() as session:
            there = _listed(session)
    except LoginError as error:
        yield wrong(
            f"{subject.settings.dovecot.imap} refuses {address}, whom the legacy server takes: {error}",
            "Is auth.conf.ext included, and no other passdb before it? Does auth_username_format keep the domain? "
            "See Dovecot's and the authenticator's logs.",
        )
    except BasculeError:
        raise
    except (OSError, IMAPClientError) as error:
        yield wrong(f"the login of {address} broke off: {type(error).__name__}", "See Dovecot's log.")
    else:
        # A mailbox of the same folders that is another one has other UIDVALIDITYs.
        if {name: uidvalidity for name, (uidvalidity, _) in here.items()} == {
            name: uidvalidity for name, (uidvalidity, _) in there.items()
        }:
            yield good(f"{address} logs in here and sees the {len(there)} folders of the legacy server")
        elif _messages(here) == _messages(there) == 0 and here.keys() <= there.keys():
            yield note(
                f"{address} logs in here, and both mailboxes are empty: whether the session is the legacy server's is "
                "not seen",
                "Check with a user who has mail.",
            )
        else:
            yield wrong(
                f"{address} logs in here and sees another mailbox: {_messages(here)} messages in {len(here)} folders, "
                f"at the legacy server {_messages(there)} in {len(there)}",
                "The session does not go to the legacy server: a passdb or userdb of your own knows the address. "
                "Take it out there.",
            )


def _messages(folders: _Folders) -> int:
    return sum(messages for _, messages in folders.values())


def _folders(subject: Subject, user: str, password: Password) -> _Folders:
    """The folders that a user sees here. A password goes in clear to this host only, and only where TLS is not "
    "offered."""
    host, port = host_and_port(subject.settings.dovecot.imap)
    client = IMAPClient(host, port, ssl=False, timeout=TIMEOUT)
    try:
        if client.has_capability("STARTTLS"):
            client.starttls(_context(subject, host))
        elif not _is_this_host(host):
            raise BasculeError(
                f"{host}:{port} offers no TLS: no password is sent there",
                hint="Let that Dovecot offer STARTTLS, or name one of this host in [dovecot] imap.",
            )
        client.folder_encode = False
        client.normalise_times = False
        client.plain_login(user, password.secret)
        return _listed(client)
    except ssl.SSLError as error:
        raise BasculeError(
            f"the certificate of {host}:{port} is not good for that name: {error.reason or error}",
            hint="Name the store as its certificate does in [dovecot] imap, and its authority in [legacy] ca_file.",
        ) from error
    finally:
        client.shutdown()


def _listed(client: IMAPClient) -> _Folders:
    found: _Folders = {}
    for flags, _, name in client.list_folders():
        if b"\\Noselect" in flags or b"\\NonExistent" in flags:
            continue
        try:
            status = client.folder_status(name, ["UIDVALIDITY", "MESSAGES"])
        except IMAPClientError:
            continue  # it is listed and not opened: legacy.imap.folders says so
        found[name] = (int(status[b"UIDVALIDITY"]), int(status[b"MESSAGES"]))
    return found


def _context(subject: Subject, host: str) -> ssl.SSLContext:
    """Another host must prove its name; on this one nobody is in between, and it is asked by an address."""
    if not _is_this_host(host):
        return subject.trust.context()
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def _is_this_host(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
