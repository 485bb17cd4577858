"""The Postfix and Dovecot of this host: does bascule take part, and does mail really come through?

A probe message is sent as mail from outside is, through Postfix here, to an
account whose password is known; it is looked for at the legacy server, and
removed there. Nothing else is sent, and nobody is moved.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import smtplib
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from email.message import EmailMessage
from email.parser import BytesHeaderParser
from email.utils import format_datetime, localtime

from imapclient import IMAPClient
from imapclient.exceptions import IMAPClientError, LoginError

from bascule.address import Address
from bascule.check.finding import Finding
from bascule.check.smtp import known_recipient, unknown_recipient
from bascule.credential import Password
from bascule.endpoint import host_and_port
from bascule.errors import BasculeError
from bascule.legacy import LegacySettings, Trust, UserLogin, imap_session
from bascule.settings import Settings

PATIENCE = 60.0  # seconds for the probe to arrive
LOOK = 0.5  # seconds between looks into the legacy mailbox
VERIFICATION = 20.0  # seconds that Postfix may take to verify a recipient at the legacy server
TRACE = "Bascule-Trace"  # written by the milter
#: Which of the policy daemon's maps the parameters of main.cf must ask.
WIRED = {
    "transport_maps": "transport",
    "relay_domains": "domains",
    "virtual_alias_maps": "aliases",
}


@dataclass(frozen=True, slots=True)
class Probe:
    """An account at the legacy server, and whether a login of it here would set its migration off."""

    address: Address
    password: Password
    has_moved: bool
    login_is_a_request: bool


def check_postfix(
    configuration: Settings, legacy: LegacySettings, trust: Trust, probe: Probe | None
) -> Iterator[Finding]:
    """main.cf, recipients, and the probe message."""
    try:
        yield from _main_cf(configuration)
    except (OSError, subprocess.SubprocessError) as error:
        yield Finding(
            "note",
            "Postfix",
            f"main.cf cannot be read here: {error}",
            "Run the check on an MX, as root, to have it checked.",
        )
    host, port = host_and_port(configuration.postfix.smtp)
    try:
        with smtplib.SMTP(host, port, timeout=VERIFICATION + 10) as smtp:
            smtp.ehlo()
            smtp.mail("")
            yield from _recipients(smtp, legacy, probe, f"{host}:{port}")
    except (OSError, smtplib.SMTPException) as error:
        yield Finding(
            "wrong",
            "Postfix",
            f"{host}:{port} does not take mail: {type(error).__name__}",
            "Is Postfix running? See [postfix] smtp.",
        )
        return
    if probe is not None and not probe.has_moved:
        yield from _probe_message(configuration, legacy, trust, probe)


def _postfix(configuration: Settings, *command: str) -> str:
    done = subprocess.run(
        command,
        env=os.environ | {"MAIL_CONFIG": str(configuration.postfix.config_directory)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    return done.stdout


def _main_cf(configuration: Settings) -> Iterator[Finding]:
    names = [*WIRED, "smtpd_recipient_restrictions", "smtpd_milters", "queue_directory"]
    lines = _postfix(configuration, "postconf", "-x", *names).splitlines()
    values = {name.strip(): value.strip() for name, _, value in (line.partition("=") for line in lines)}

    def seen(endpoint: str) -> str:
        """As it is written for services that are chrooted into the queue directory."""
        return endpoint.replace(f"unix:{values['queue_directory']}/", "unix:")

    wanted = {
        parameter: f"socketmap:{seen(configuration.policy_daemon.socketmap)}:{table}"
        for parameter, table in WIRED.items()
    }
    wanted["smtpd_recipient_restrictions"] = seen(configuration.policy_daemon.policy)
    wanted["smtpd_milters"] = seen(configuration.milter.socket)
    missing = [parameter for parameter, endpoint in wanted.items() if endpoint not in values.get(parameter, "")]
    for parameter in missing:
        yield Finding(
            "wrong",
            "Postfix",
            f"{parameter} does not name {wanted[parameter]}",
            "Add it to main.cf: see config_templates/postfix/main.cf.j2; then postfix reload.",
        )
    if not missing:
        yield Finding("good", "Postfix", "main.cf asks bascule for domains, aliases and transports, and has its milter")


def _recipients(smtp: smtplib.SMTP, legacy: LegacySettings, probe: Probe | None, where: str) -> Iterator[Finding]:
    if probe is not None:
        code, text = _rcpt(smtp, probe.address)
        yield known_recipient("Postfix", code, text, probe.address, where)
    unknown = unknown_recipient(legacy.domain)
    code, text = _rcpt(smtp, unknown)
    if code >= 500:
        yield Finding("good", "Postfix", f"{where} refuses an address that the legacy server refuses: {code} {text}")
    elif code >= 400:
        yield Finding(
            "wrong",
            "Postfix",
            f"{where} cannot say whether an address exists: {code} {text}",
            "Does the policy daemon run, and does the legacy server answer this host? See Postfix's log.",
        )
    else:
        yield Finding(
            "note",
            "Postfix",
            f"{where} takes mail for an address that does not exist",
            "So it is if the legacy server takes it, too (above). If that one refuses it, the policy daemon is not "
            "asked: see smtpd_recipient_restrictions.",
        )


def _rcpt(smtp: smtplib.SMTP, address: Address) -> tuple[int, str]:
    """The reply to RCPT TO; Postfix says "come back" while it verifies at the legacy server."""
    deadline = time.monotonic() + VERIFICATION
    while True:
        code, reply = smtp.rcpt(str(address))
        if code != 450 or time.monotonic() > deadline:
            return code, reply.decode(errors="replace")
        time.sleep(LOOK)


def _probe_message(configuration: Settings, legacy: LegacySettings, trust: Trust, probe: Probe) -> Iterator[Finding]:
    identity = f"<bascule-check-{secrets.token_hex(8)}@{configuration.node}>"
    loops_before = _loops(configuration)
    host, port = host_and_port(configuration.postfix.smtp)
    began = time.monotonic()
    try:
        with smtplib.SMTP(host, port, timeout=VERIFICATION + 10) as smtp:
            smtp.sendmail("", [str(probe.address)], _message(configuration, probe.address, identity))
    except (OSError, smtplib.SMTPException) as error:
        yield Finding(
            "wrong", "Postfix", f"the probe message is not taken: {type(error).__name__}", "See the findings above."
        )
        return
    try:
        with imap_session(legacy, trust, UserLogin(probe.address, probe.password)) as session:
            while time.monotonic() - began < PATIENCE:
                found = _find(session, identity)
                if found is not None:
                    yield from _arrived(*found, time.monotonic() - began)
                    return
                if _loops(configuration) > loops_before:
                    break
                time.sleep(LOOK)
    except BasculeError as error:
        yield Finding("wrong", "Postfix", f"the probe cannot be looked for: {error.message}", error.hint)
        return
    yield _lost(configuration, probe.address, looped=_loops(configuration) > loops_before)


def _message(configuration: Settings, address: Address, identity: str) -> bytes:
    message = EmailMessage()
    message["From"] = f"postmaster@{address.domain}"
    message["To"] = str(address)
    message["Subject"] = "bascule check: a probe, removed in a moment"
    message["Date"] = format_datetime(localtime())
    message["Message-ID"] = identity
    message["Auto-Submitted"] = "auto-generated"
    message.set_content(f"Sent by bascule check on {configuration.node} to see that mail comes through.\n")
    return message.as_bytes()


def _find(session: IMAPClient, identity: str) -> tuple[str, bytes] | None:
    """The folder and the header of the probe, which is removed."""
    folders = session.list_folders()
    first = [name for _, _, name in folders if name.upper() == b"INBOX"]
    junk = [name for flags, _, name in folders if b"\\Junk" in flags or re.search(b"junk|spam", name, re.IGNORECASE)]
    for name in dict.fromkeys([*first, *junk]):
        session.select_folder(name)
        uids = session.search(["HEADER", "Message-ID", identity])
        if uids:
            header = session.fetch(uids, ["BODY.PEEK[HEADER]"])[uids[0]][b"BODY[HEADER]"]
            session.add_flags(uids, [b"\\Deleted"])
            if session.has_capability("UIDPLUS"):
                session.uid_expunge(uids)
            return name.decode(errors="replace"), header
    return None


def _arrived(folder: str, raw: bytes, seconds: float) -> Iterator[Finding]:
    header = BytesHeaderParser().parsebytes(raw)
    if folder.upper() == "INBOX":
        yield Finding(
            "good", "Postfix", f"a probe message came through to the legacy INBOX in {seconds:.1f} s, and is removed"
        )
    else:
        verdict = header.get("Authentication-Results") or header.get("X-Spam-Status") or "it does not say why"
        yield Finding(
            "wrong",
            "Postfix",
            f"the legacy server files mail from here into {folder!r}: {' '.join(str(verdict).split())}",
            "It judges relayed mail by this host's address: have it allowed there, or seal it (ARC).",
        )
    traces = header.get_all(TRACE, [])
    if len(traces) == 1:
        yield Finding("good", "Postfix", "it passed this host once, and the milter traced it: no loop")
    elif not traces:
        yield Finding(
            "wrong",
            "Postfix",
            "the milter did not see it: loops would go unnoticed",
            "Does bascule-milter run? See smtpd_milters.",
        )
    else:
        yield Finding(
            "wrong",
            "Postfix",
            f"it passed this host {len(traces)} times: the legacy server sends mail of the domain back to the MX",
            "Have the legacy server deliver the domain itself.",
        )


def _lost(configuration: Settings, address: Address, *, looped: bool) -> Finding:
    if looped:
        return Finding(
            "wrong",
            "Postfix",
            "the legacy server sent the probe back here, and the loop guard refused it",
            f"Have the legacy server deliver mail for {address.domain} itself; it looks the MX up, or forwards.",
        )
    try:
        listing = _postfix(configuration, "postqueue", "-j")
    except (OSError, subprocess.SubprocessError):
        listing = ""
    for line in listing.splitlines():
        for recipient in json.loads(line)["recipients"]:
            if recipient["address"] == str(address) and recipient.get("delay_reason"):
                return Finding(
                    "wrong",
                    "Postfix",
                    f"mail for {address} waits in the queue here: {recipient['delay_reason']}",
                    "It is kept and tried again; correct the reason.",
                )
    return Finding(
        "wrong",
        "Postfix",
        f"the legacy server took the probe message, and it is in neither INBOX nor Junk after {PATIENCE:.0f} s",
        "Look at the legacy server's log: a quarantine, a forward, or a slow filter.",
    )


def _loops(configuration: Settings) -> float:
    """How many loops the milter has refused; 0 if it does not say."""
    if configuration.milter.metrics is None:
        return 0
    try:
        with urllib.request.urlopen(f"http://{configuration.milter.metrics}/metrics", timeout=5) as answer:
            text = answer.read().decode()
    except OSError:
        return 0
    found = re.search(r"^bascule_loops_refused_total (\S+)", text, re.MULTILINE)
    return float(found[1]) if found else 0


def check_dovecot(
    configuration: Settings, legacy: LegacySettings, trust: Trust, probe: Probe | None
) -> Iterator[Finding]:
    """Logins here: one that must be refused, and the probe's own if that moves nobody."""
    host, port = host_and_port(configuration.dovecot.imap)
    where = f"{host}:{port}"
    refused = _login_of_nobody(host, port, trust, legacy.domain)
    yield refused
    if refused.level == "wrong" or probe is None:
        return
    if probe.login_is_a_request:
        yield Finding(
            "note",
            "Dovecot",
            f"no login of {probe.address} was tried here: a first login is a request to be moved",
            "Check before the activation, or with a user who is to be moved.",
        )
        return
    try:
        here = _folders(host, port, trust, str(probe.address), probe.password)
        with imap_session(legacy, trust, UserLogin(probe.address, probe.password)) as session:
            there = {name for _, _, name in session.list_folders()}
    except LoginError as error:
        yield Finding(
            "wrong",
            "Dovecot",
            f"{where} refuses {probe.address}, whom the legacy server takes: {error}",
            "Is auth.conf.ext included, and no other passdb before it? See Dovecot's and the authenticator's logs.",
        )
    except (OSError, IMAPClientError, BasculeError) as error:
        text = f"the login of {probe.address} broke off: {type(error).__name__}"
        yield Finding("wrong", "Dovecot", text, "See Dovecot's log.")
    else:
        if here == there:
            text = f"{probe.address} logs in here and sees the {len(there)} folders of the legacy server"
            yield Finding("good", "Dovecot", text)
        else:
            text = f"{probe.address} logs in here and sees {len(here)} folders, at the legacy server {len(there)}"
            yield Finding("note", "Dovecot", text, "Has the user moved meanwhile?")


def _login_of_nobody(host: str, port: int, trust: Trust, domain: str) -> Finding:
    """A login that the legacy server refuses, and Dovecot here with it."""
    where = f"{host}:{port}"
    try:
        _folders(host, port, trust, str(unknown_recipient(domain)), Password(secrets.token_hex(8)))
    except LoginError as error:
        if "[UNAVAILABLE]" not in str(error).upper():
            return Finding("good", "Dovecot", f"{where} refuses a user who does not exist")
        return Finding(
            "wrong",
            "Dovecot",
            f"{where} cannot check logins: {error}",
            "Does bascule-authenticator run, and does the legacy server answer? See their logs.",
        )
    except (OSError, IMAPClientError) as error:
        text = f"{where} does not answer: {type(error).__name__}"
        return Finding("wrong", "Dovecot", text, "Is Dovecot running? See [dovecot] imap.")
    return Finding("wrong", "Dovecot", f"{where} lets anybody in", "Look at its passdbs at once.")


def _folders(host: str, port: int, trust: Trust, user: str, password: Password) -> set[bytes]:
    client = IMAPClient(host, port, ssl=False, timeout=60)
    try:
        if client.has_capability("LOGINDISABLED"):  # as Dovecot says to another host
            client.starttls(trust.context())
        client.folder_encode = False
        client.plain_login(user, password.secret)
        return {name for _, _, name in client.list_folders()}
    finally:
        client.shutdown()


def check_parts(parts: Sequence[tuple[str, str, bool]]) -> Iterator[Finding]:
    """``parts``: name of a part, its node, whether it gave a sign of life lately."""
    a_worker_lives = any(part == "worker" and alive for part, _, alive in parts)
    for part, node, alive in parts:
        if alive:
            continue
        if part == "worker" and a_worker_lives:
            # It has another number when it is started again.
            yield Finding("note", "bascule", f"{node} ended suddenly; others work", "See the workers' logs.")
        else:
            yield Finding(
                "wrong",
                "bascule",
                f"{part} on {node} gave no sign of life lately",
                "Start it, or see its log; nobody waits for it.",
            )
    for part in ("policy_daemon", "authenticator", "worker"):
        running = [node for name, node, alive in parts if name == part and alive]
        if running:
            yield Finding("good", "bascule", f"{part} runs on {', '.join(sorted(running))}")
        else:
            yield Finding("wrong", "bascule", f"no {part} runs anywhere", f"Start bascule-{part.replace('_', '-')}.")
