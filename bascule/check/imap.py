"""The legacy IMAP server: TLS and certificate, login form, capabilities, quota, folders.

Nothing is changed there: it is logged in to and asked.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Iterator
from dataclasses import replace

from imapclient import IMAPClient
from imapclient.exceptions import IMAPClientError

from bascule.address import Address
from bascule.check.finding import Finding
from bascule.credential import Password
from bascule.errors import LegacyRefusedLogin, LegacyUnavailable
from bascule.legacy import LegacySettings, Trust, UserLogin, connect_imap, imap_session, plainly

#: What a capability is good for, and what is without it.
CAPABILITIES = {
    "CONDSTORE": ("later passes ask for changes only", "each pass compares all flags; large mailboxes take longer"),
    "UIDPLUS": ("a return writes quickly", "a return has to search for what it wrote"),
    "NAMESPACE": ("prefix and separator are known", "prefix and separator are guessed from the folder list"),
    "SPECIAL-USE": ("Sent, Drafts and the like are known", "clients have to find Sent, Drafts and the like by name"),
}
EXPIRES_SOON = 30  # days
NEARLY_FULL = 0.98  # of the quota


def check_imap(
    legacy: LegacySettings, trust: Trust, address: Address | None, password: Password | None
) -> Iterator[Finding]:
    """Reach the server and, if an account is given, log in and look around."""
    try:
        client = connect_imap(legacy, trust)
    except LegacyUnavailable as error:
        yield Finding("wrong", "IMAP", error.message, "Correct --imap-host, --imap-port or --imap-tls.")
        return
    try:
        capabilities = {capability.decode() for capability in client.capabilities()}
        yield from _security(legacy, client)
    except (OSError, IMAPClientError) as error:
        text = plainly(error, legacy.imap_host, legacy.imap.port)
        yield Finding("wrong", "IMAP", text, "Is this an IMAP port?")
        return
    finally:
        client.shutdown()
    if "LOGINDISABLED" in capabilities and "AUTH=PLAIN" not in capabilities:
        yield Finding(
            "wrong",
            "IMAP",
            "the server takes no password on this connection (LOGINDISABLED)",
            "It wants TLS: --imap-tls starttls, or implicit at its other port.",
        )
        return
    if address is None or password is None:
        yield Finding("note", "IMAP", "no login was tried", "Give --user: an address whose password you know.")
        return
    yield from _account(legacy, trust, address, password)


def _security(legacy: LegacySettings, client: IMAPClient) -> Iterator[Finding]:
    where = f"{legacy.imap_host}:{legacy.imap.port}"
    socket = client.socket()
    if not isinstance(socket, ssl.SSLSocket):
        yield Finding(
            "note",
            "IMAP",
            f"{where} answers, without TLS: every password goes there in clear text",
            "Use --imap-tls implicit or starttls, unless the way there is your own.",
        )
        return
    certificate = socket.getpeercert() or {}
    expires = ssl.cert_time_to_seconds(str(certificate.get("notAfter", "Jan  1 00:00:00 2099 GMT")))
    days = int((expires - time.time()) / 86400)
    text = f"{where} answers, {socket.version()} with a good certificate ({days} days left)"
    if days < EXPIRES_SOON:
        yield Finding("note", "IMAP", text, "Have it renewed in time: without it nobody can log in there or be moved.")
    else:
        yield Finding("good", "IMAP", text)


def _account(legacy: LegacySettings, trust: Trust, address: Address, password: Password) -> Iterator[Finding]:
    try:
        with imap_session(legacy, trust, UserLogin(address, password)) as session:
            yield Finding("good", "IMAP", f"{address} logs in, as {legacy.login_name(address)!r}")
            yield from _capabilities(session)
            yield from _quota(session)
            yield from _folders(session, address)
    except LegacyRefusedLogin as error:
        other = replace(legacy, login_form="address" if legacy.login_form == "local_part" else "local_part")
        try:
            with imap_session(other, trust, UserLogin(address, password)):
                name = other.login_name(address)
                yield Finding(
                    "wrong",
                    "IMAP",
                    f"the server knows {address} as {name!r}, not as {legacy.login_name(address)!r}",
                    f"Prepare the domain with --login-form {other.login_form}.",
                )
        except (LegacyRefusedLogin, LegacyUnavailable):
            yield Finding("wrong", "IMAP", error.message, "Check address and password; both login forms were tried.")
    except LegacyUnavailable as error:
        yield Finding(
            "wrong", "IMAP", error.message, error.hint or "The server has trouble of its own; try again later."
        )


def _capabilities(session: IMAPClient) -> Iterator[Finding]:
    for capability, (with_it, without) in CAPABILITIES.items():
        if session.has_capability(capability):
            yield Finding("good", "IMAP", f"{capability}: {with_it}")
        else:
            yield Finding("note", "IMAP", f"no {capability}: {without}")


def _quota(session: IMAPClient) -> Iterator[Finding]:
    if not session.has_capability("QUOTA"):
        return
    try:
        _, quotas = session.get_quota_root("INBOX")
    except IMAPClientError:
        return  # some servers offer it and have none
    for quota in quotas:
        if quota.limit and quota.usage > NEARLY_FULL * quota.limit:
            yield Finding(
                "note",
                "IMAP",
                f"the mailbox is full there: {quota.usage} of {quota.limit} ({quota.resource})",
                "The last message may not fit, and new mail may be refused there; give it some more room.",
            )
        elif quota.limit:
            yield Finding("good", "IMAP", f"quota: {quota.usage} of {quota.limit} ({quota.resource})")


def _folders(session: IMAPClient, address: Address) -> Iterator[Finding]:
    folders = session.list_folders()
    names = [name for flags, _, name in folders if b"\\Noselect" not in flags and b"\\NonExistent" not in flags]
    messages = 0
    for name in names:
        messages += session.folder_status(name, ["MESSAGES"])[b"MESSAGES"]
    separator = folders[0][1].decode() if folders and folders[0][1] else "none"
    yield Finding("good", "IMAP", f"{address} has {messages} messages in {len(names)} folders, separator {separator!r}")
