"""After the flip: the last message in the legacy mailbox, and stragglers brought here.

A straggler is brought exactly once. Its file is completed in a staging
directory under a name made of its legacy identity, then the database is told
(*staged*), then the file is renamed into the mailbox, then the database is
told (*delivered*). When a worker dies in between, the next one sees: staged
and the file still there means not yet renamed; staged and no file means
renamed already, wherever the user has put the message since.
"""

from __future__ import annotations

from datetime import UTC, datetime
from email.utils import format_datetime
from hashlib import sha256
from pathlib import Path

from bascule import log
from bascule.config_templates import render
from bascule.credential import Unsealer
from bascule.database import Connection, value
from bascule.errors import BasculeError
from bascule.legacy import Trust, imap_session
from bascule.migrator import maildir
from bascule.migrator.account import Account
from bascule.migrator.source import Layout, Message, Source


class UidvalidityChanged(BasculeError):
    """A legacy folder has new UIDs: which of its messages came late cannot be told any more."""


def last_message_id(account: Account) -> str:
    """The Message-ID of the last message: the same in every attempt, so that it is written once."""
    moved = account.migrated_at.isoformat() if account.migrated_at else ""
    return f"<bascule-last-{sha256(f'{account.address} {moved}'.encode()).hexdigest()[:24]}@{account.address.domain}>"


def sweep(connection: Connection, account: Account, home: Path, root: Path, trust: Trust, unsealer: Unsealer) -> None:
    """Write the last message if it is not there yet, and bring what came late.

    Raises:
        BasculeError, OSError: what was brought until then is kept.
    """
    began = value(connection, "SELECT clock_timestamp()")
    with imap_session(account.legacy, trust, account.address, account.password(unsealer)) as client:
        source = Source(client)
        layout = source.layout()
        if account.last_message_at is None:
            client.select_folder("INBOX", readonly=True)
            if not client.search(["HEADER", "Message-ID", last_message_id(account)]):
                client.append("INBOX", _last_message(account))
            log.get().info("last message written", address=str(account.address))
        known = {
            name: (uidvalidity, uidnext)
            for name, uidvalidity, uidnext in connection.execute(
                "SELECT name, uidvalidity, uidnext FROM bascule.mailbox_folder WHERE mailbox_id = %s",
                (account.id,),
            )
        }
        for folder in layout.folders:
            if folder.selectable:
                _sweep_folder(connection, account, source, layout, folder.name, known.get(folder.name), home, root)
    connection.execute("SELECT bascule.sweep_done(%s, %s)", (account.id, began))


def _last_message(account: Account) -> bytes:
    text = render(
        "messages/last_message.txt.j2",
        domain=account.address.domain,
        address=str(account.address),
        date=format_datetime(datetime.now(UTC)),
        message_id=last_message_id(account),
    )
    return text.replace("\n", "\r\n").encode()


def _sweep_folder(
    connection: Connection,
    account: Account,
    source: Source,
    layout: Layout,
    name: str,
    known: tuple[int, int] | None,
    home: Path,
    root: Path,
) -> None:
    selected = source.examine(name)
    uidvalidity, uidnext = known or (selected.uidvalidity, 1)  # a folder made after the flip is all new
    if selected.uidvalidity != uidvalidity:
        raise UidvalidityChanged(
            f"the folder {name!r} of {account.address} has a new UIDVALIDITY on the legacy server",
            hint="Look there for messages that came after the move, and copy them by hand.",
        )
    brought = {
        uid: delivered is not None
        for uid, delivered in connection.execute(
            "SELECT uid, delivered_at FROM bascule.straggler "
            "WHERE mailbox_id = %s AND folder = %s AND uidvalidity = %s",
            (account.id, name, uidvalidity),
        )
    }
    late = [uid for uid in source.uids(uidnext) if not brought.get(uid, False)]
    for message, body in source.bodies(list(source.messages(late))):
        if name.upper() == "INBOX" and source.header(message.uid, "Message-ID") == last_message_id(account):
            continue
        identity = (account.id, name, uidvalidity, message.uid)
        staged = home / ".bascule-staged" / f"{message.uid}.{uidvalidity}.{sha256(name.encode()).hexdigest()[:16]}"
        if message.uid not in brought:
            staged.parent.mkdir(mode=0o700, exist_ok=True)
            maildir.write_durably(staged, body, int(message.internaldate.timestamp()))
            connection.execute("SELECT bascule.stage_straggler(%s, %s, %s, %s)", identity)
        if staged.exists():
            _into_mailbox(staged, maildir.folder_path(root, name, layout.separator, layout.prefix), root, message)
        connection.execute("SELECT bascule.straggler_delivered(%s, %s, %s, %s)", identity)
        log.get().info("straggler brought", address=str(account.address), folder=name, uid=message.uid)


def _into_mailbox(staged: Path, folder: Path, inbox: Path, message: Message) -> None:
    """Rename the file into the folder, or into INBOX if the user has no such folder any more."""
    target = folder if (folder / "cur").is_dir() else inbox
    letters = "".join(sorted(maildir.FLAG_LETTERS[flag] for flag in message.flags if flag in maildir.FLAG_LETTERS))
    stamp = int(message.internaldate.timestamp())
    name = f"{stamp}.L{staged.name}.bascule,S={staged.stat().st_size}"
    staged.rename(target / "cur" / f"{name}:2,{letters}" if letters else target / "new" / name)
