"""Mail for the lab: mailboxes as people have them, traffic, and a ledger of every message."""

from __future__ import annotations

import hashlib
import os
import poplib
import smtplib
import threading
import time
from base64 import b64encode
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.message import EmailMessage
from email.utils import format_datetime
from pathlib import Path
from random import Random

from imapclient import IMAPClient

from bascule.lab.process import VMAIL, LabError
from bascule.lab.sites import DOMAIN, LegacySite, NewSite, imap

WORDS = ["bridge", "ferry", "harbour", "ledger", "quay", "rudder", "sluice", "tide", "vessel", "wharf"]
LARGE = 21 * 1024 * 1024  # bytes

#: What real servers hold that no standard allows: whole messages, as bytes in a file.
MALFORMED = {
    "nul": b"Subject: NUL\r\nMessage-ID: <nul@malformed.test>\r\n\r\nbefore\x00after\r\n",
    "bare-cr": b"Subject: bare CR\r\nMessage-ID: <bare-cr@malformed.test>\r\n\r\none\rtwo\r\n",
    "8-bit-header": b"Subject: caf\xe9 \xff\xfe\r\nMessage-ID: <8bit@malformed.test>\r\n\r\nbody\r\n",
    "long-line": b"Subject: long\r\nMessage-ID: <long-line@malformed.test>\r\n\r\n" + b"x" * 200_000 + b"\r\n",
    "no-blank-line": b"Subject: header only\r\nMessage-ID: <header-only@malformed.test>\r\n",
    "broken-mime": b"Subject: broken\r\nMessage-ID: <broken-mime@malformed.test>\r\n"
    b"Content-Type: multipart/mixed; boundary=never\r\n\r\n--other\r\nrest\r\n",
}


def message(identity: str, recipient: str, random: Random, *, size: int = 0, date: datetime | None = None) -> bytes:
    """A message with this Message-ID and about ``size`` bytes of body, CRLF throughout."""
    mail = EmailMessage()
    mail["From"] = "sender@elsewhere.test"
    mail["To"] = recipient
    mail["Subject"] = " ".join(random.choices(WORDS, k=4))
    mail["Date"] = format_datetime(date or datetime.now(UTC))
    mail["Message-ID"] = f"<{identity}>"
    text = "\n".join(" ".join(random.choices(WORDS, k=10)) for _ in range(random.randint(1, 40)))
    mail.set_content(text)
    if size > len(text):
        mail.add_attachment(random.randbytes(size * 3 // 4), maintype="application", subtype="octet-stream")
    return bytes(mail).replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")


class Ledger:
    """Every message that was given to somebody: it must be found exactly once, in that user's mailbox."""

    def __init__(self) -> None:
        self._owner: dict[str, str] = {}
        self._expunged: set[str] = set()
        self._lock = threading.Lock()

    def give(self, identity: str, name: str) -> str:
        """Note that ``identity`` is for the mailbox ``name``; before it is sent, so that a loss is seen."""
        with self._lock:
            self._owner[identity] = name
        return identity

    def take_back(self, identity: str) -> None:
        """It was refused or expunged: it must be found nowhere."""
        with self._lock:
            self._expunged.add(identity)

    @property
    def expected(self) -> dict[str, str]:
        with self._lock:
            return {each: name for each, name in self._owner.items() if each not in self._expunged}

    def compare(self, found: dict[str, Counter[str]]) -> Count:
        """Compare with the Message-IDs found in each mailbox."""
        expected = self.expected
        count = Count(sent=len(expected))
        for identity, name in expected.items():
            times = sum(mailbox[identity] for mailbox in found.values())
            if found.get(name, Counter())[identity] == 0:
                count.lost.append(f"{identity} of {name}")
            elif times > 1:
                count.doubled.append(f"{identity} of {name}, {times} times")
            else:
                count.found += 1
        count.revived = [each for each in self._expunged if any(mailbox[each] for mailbox in found.values())]
        return count


@dataclass(slots=True)
class Count:
    """What a comparison found; ``revived`` are messages that were expunged and are back."""

    sent: int
    found: int = 0
    lost: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    revived: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.sent} messages sent, {self.found} found, {len(self.lost)} lost, "
            f"{len(self.doubled)} doubled, {len(self.revived)} came back from the dead"
        )

    def insist(self) -> None:
        """
        Raises:
            LabError: a message is lost, doubled, or back.
        """
        if self.lost or self.doubled or self.revived:
            details = "\n".join(
                [
                    *(f"lost: {each}" for each in self.lost),
                    *(f"doubled: {each}" for each in self.doubled),
                    *(f"back: {each}" for each in self.revived),
                ]
            )
            raise LabError(f"{self}\n{details}")


# Reading mailboxes -----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Seen:
    """A message as a client sees it."""

    message_id: str
    flags: frozenset[str]
    internaldate: datetime
    digest: str


@dataclass(frozen=True, slots=True)
class SeenFolder:
    uidvalidity: int
    messages: dict[int, Seen]


def read_mailbox(client: IMAPClient, *, readonly: bool = True) -> dict[str, SeenFolder]:
    """Everything in a mailbox, by folder."""
    client.normalise_times = False
    folders = {}
    for flags, _, name in client.list_folders():
        if b"\\Noselect" in flags or b"\\NonExistent" in flags:
            continue
        selected = client.select_folder(name, readonly=readonly)
        uids = client.search()
        messages = {}
        for start in range(0, len(uids), 50):
            for uid, data in client.fetch(uids[start : start + 50], ["FLAGS", "INTERNALDATE", "BODY.PEEK[]"]).items():
                body = data[b"BODY[]"]
                messages[uid] = Seen(
                    _message_id(body),
                    frozenset(flag.decode() for flag in data[b"FLAGS"]) - {"\\Recent"},
                    data[b"INTERNALDATE"].astimezone(UTC),
                    hashlib.sha256(body).hexdigest(),
                )
        folders[name] = SeenFolder(int(selected[b"UIDVALIDITY"]), messages)
    return folders


def _message_id(body: bytes) -> str:
    for line in body.partition(b"\r\n\r\n")[0].splitlines():
        if line.lower().startswith(b"message-id:"):
            return line.partition(b":")[2].strip().decode(errors="replace").strip("<>")
    return ""


def identities(folders: dict[str, SeenFolder]) -> Counter[str]:
    return Counter(each.message_id for folder in folders.values() for each in folder.messages.values())


def copies(client: IMAPClient, identity: str) -> int:
    """How many messages with this Message-ID are in the INBOX."""
    client.select_folder("INBOX", readonly=True)
    return len(client.search(["HEADER", "Message-ID", identity]))


def uidls(port: int, name: str, password: str) -> dict[str, str]:
    """POP3 UIDL of each message by its Message-ID."""
    session = poplib.POP3("127.0.0.1", port, timeout=30)
    session.user(f"{name}@{DOMAIN}")
    session.pass_(password)
    found = {}
    for line in session.uidl()[1]:
        number, uidl = line.decode().split()
        headers = b"\n".join(session.top(int(number), 0)[1]).decode(errors="replace")
        identity = next(line.partition("<")[2].rstrip(">") for line in headers.splitlines() if "Message-ID" in line)
        found[identity] = uidl
    session.rset()
    session.quit()
    return found


def differences(before: dict[str, SeenFolder], after: dict[str, SeenFolder]) -> list[str]:
    """What a client that knew ``before`` would have to fetch or forget to know ``after``; in words."""
    found = []
    for name, folder in before.items():
        other = after.get(name)
        if other is None:
            found.append(f"the folder {name!r} is missing")
            continue
        if folder.uidvalidity != other.uidvalidity:
            found.append(f"{name!r}: UIDVALIDITY {folder.uidvalidity} became {other.uidvalidity}")
        for uid, seen in folder.messages.items():
            if other.messages.get(uid) != seen:
                found.append(f"{name!r}: UID {uid} was {seen} and is {other.messages.get(uid)}")
    return found


# Filling and sending ---------------------------------------------------------------


def fill_mailbox(legacy: LegacySite, name: str, ledger: Ledger, random: Random, *, messages: int) -> None:
    """A mailbox with folders, flags, keywords and old dates, written by a client; INBOX gets malformed ones as well."""
    _put_malformed(legacy, name, ledger)
    folders = ["INBOX", *map(legacy.folder_name, ("Sent", "Archive", "Archive/2019", "Projets/Été & Co", "Trash"))]
    flags: list[tuple[str, ...]] = [
        (),
        ("\\Seen",),
        ("\\Seen", "\\Answered"),
        ("\\Flagged", "$Label1"),
        ("\\Draft",),
        ("\\Seen", "$Forwarded", "todo"),
    ]
    with legacy.client(name) as client:
        for folder in folders[1:]:
            client.create_folder(folder)
            client.subscribe_folder(folder)
        client.create_folder(legacy.folder_name("Empty"))
        for number in range(messages):
            identity = ledger.give(f"old-{number}-{name}@filled.test", name)
            date = datetime(2004, 2, 29, 23, 59, 58, tzinfo=UTC) + timedelta(hours=number * 997)
            body = message(identity, f"{name}@{DOMAIN}", random, size=random.choice([0, 0, 3000, 40_000]), date=date)
            client.append(random.choice(folders), body, random.choice(flags), date)


def put_large_message(legacy: LegacySite, name: str, ledger: Ledger, random: Random) -> None:
    """One message of more than 20 MB in the Archive."""
    identity = ledger.give(f"large-{name}@filled.test", name)
    with legacy.client(name) as client:
        client.append("Archive", message(identity, f"{name}@{DOMAIN}", random, size=LARGE), ("\\Seen",))


def legacy_maildir(legacy: LegacySite, name: str) -> Path:
    """The INBOX of a user on the legacy side, made if need be, for files that no client could put there."""
    maildir = legacy.maildir(name)
    for folder in (maildir.parent, maildir, maildir / "cur", maildir / "new", maildir / "tmp"):
        folder.mkdir(exist_ok=True)
        os.chown(folder, VMAIL, VMAIL)
    return maildir


def _put_malformed(legacy: LegacySite, name: str, ledger: Ledger) -> None:
    maildir = legacy_maildir(legacy, name)
    for number, (kind, body) in enumerate(MALFORMED.items()):
        path = maildir / "new" / f"{1_200_000_000 + number}.{kind}.lab"
        owned = body.replace(b"@malformed.test", f"-{name}@malformed.test".encode())
        path.write_bytes(owned)
        os.chown(path, VMAIL, VMAIL)
        os.utime(path, (1_200_000_000 + number,) * 2)
        ledger.give(_message_id(owned), name)


class Traffic:
    """Steady mail from outside, to everybody in turn, until stopped; every message is in the ledger."""

    def __init__(
        self, smtp_port: int, names: Iterable[str], ledger: Ledger, *, pause: float = 0.15, host: str = "127.0.0.1"
    ) -> None:
        self._port = smtp_port
        self._host = host
        self._names = list(names)
        self._ledger = ledger
        self._pause = pause
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.sent = 0
        #: How often a server said "come back later".
        self.put_off = 0
        self.failure: BaseException | None = None

    def _run(self) -> None:
        random = Random(7)  # noqa: S311 (mail, not keys)
        try:
            while not self._stop.wait(self._pause):
                name = self._names[self.sent % len(self._names)]
                self.put_off += send(
                    self._port, f"traffic-{self.sent}@outside.test", name, self._ledger, random, host=self._host
                )
                self.sent += 1
        except BaseException as error:
            self.failure = error
            raise

    def __enter__(self) -> Traffic:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """
        Raises:
            LabError: a message could not be sent.
        """
        self._stop.set()
        self._thread.join(60)
        if self.failure is not None:
            raise LabError("traffic from outside was not taken") from self.failure


def send(
    port: int,
    identity: str,
    name: str,
    ledger: Ledger,
    random: Random,
    *,
    recipient: str | None = None,
    host: str = "127.0.0.1",
) -> int:
    """Send a message to ``recipient`` (default: the user's address), for the mailbox of ``name``.

    A 4xx reply, or no greeting, is answered as every mail server answers it, by
    another attempt (RFC 5321 section 4.5.4.1); how many there were is returned.

    Raises:
        smtplib.SMTPException: a 5xx reply, or nothing better for two minutes; a connection that is lost later.
    """
    to = recipient or f"{name}@{DOMAIN}"
    body = message(ledger.give(identity, name), to, random)
    deadline = time.monotonic() + 120
    put_off = 0
    while True:
        greeted = False
        try:
            with smtplib.SMTP(host, port, timeout=60) as smtp:
                greeted = True
                smtp.sendmail("sender@elsewhere.test", [to], body)
                return put_off
        except smtplib.SMTPException as error:
            again = _is_temporary(error) if greeted else isinstance(error, smtplib.SMTPServerDisconnected)
            if not again or time.monotonic() > deadline:
                raise
            put_off += 1
            time.sleep(0.5)


def _is_temporary(error: smtplib.SMTPException) -> bool:
    if isinstance(error, smtplib.SMTPRecipientsRefused):
        return all(400 <= code < 500 for code, _ in error.recipients.values())
    return isinstance(error, smtplib.SMTPResponseException) and 400 <= error.smtp_code < 500


def submit(port: int, name: str, password: str, recipient: str, identity: str, ledger: Ledger, random: Random) -> None:
    """Have the user ``name`` submit a message to a colleague (RFC 6409), as a mail client does."""
    ledger.give(identity, recipient)
    secret = b64encode(f"\0{name}@{DOMAIN}\0{password}".encode()).decode()  # smtplib's own AUTH is ASCII only
    with smtplib.SMTP("127.0.0.1", port, timeout=60) as smtp:
        smtp.ehlo()
        code, text = smtp.docmd("AUTH", f"PLAIN {secret}")
        if code != 235:
            raise LabError(f"{name} cannot submit mail: {code} {text.decode()}")
        smtp.sendmail(f"{name}@{DOMAIN}", [f"{recipient}@{DOMAIN}"], message(identity, f"{recipient}@{DOMAIN}", random))


def found_in_new(new: NewSite, passwords: dict[str, str]) -> dict[str, Counter[str]]:
    """The Message-IDs in every mailbox here, each read with its owner's password."""
    found = {}
    for name, password in passwords.items():
        with imap(new.dovecot.ports.imap, f"{name}@{DOMAIN}", password) as client:
            found[name] = identities(read_mailbox(client))
    return found


def delivered_files(folder: Path) -> Iterator[Path]:
    """Every message file of a Maildir, in all of its folders."""
    for part in ("cur", "new"):
        yield from (path for path in folder.rglob(f"{part}/*") if path.is_file())
