"""One pass: bring the mailbox here into line with the legacy one.

Passes are repeated; each asks only for what it finds to differ. A pass that
dies leaves whole messages, and the next one goes on from there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from bascule.migrator import maildir
from bascule.migrator.source import Layout, Source

#: UIDs given here begin this far above the legacy server's next one, so that no
#: client takes a message that came late there for one that came here.
UID_GAP = 1000


@dataclass(slots=True)
class Progress:
    """Counts of one pass: messages there, messages in the folders looked at, messages here, bytes copied."""

    total: int = 0
    seen: int = 0
    copied: int = 0
    bytes: int = 0


@dataclass(frozen=True, slots=True)
class FolderState:
    """What a pass saw of a folder of the legacy server."""

    name: str
    uidvalidity: int
    uidnext: int
    messages: int


@dataclass(slots=True)
class Pass:
    """What a pass did: how many messages it added, expunged or flagged anew."""

    layout: Layout
    changes: int = 0
    folders: list[FolderState] = field(default_factory=list)


def run_pass(source: Source, root: Path, report: Callable[[Progress], None], *, count: bool = False) -> Pass:
    """Copy everything that differs.

    ``root`` is the Maildir; nobody else has it open. ``count``: ask for the
    number of messages first, so that the first progress reported has the total;
    costs a round trip a folder.

    Raises:
        LegacyUnavailable, MessageNotReadable, FolderNameNotStorable,
        TooManyKeywords, OSError: what was copied until then is kept.
    """
    layout = source.layout()
    done = Pass(layout)
    progress = Progress()
    paths = {
        folder.name: maildir.folder_path(root, folder.name, layout.separator, layout.prefix)
        for folder in layout.folders
    }
    if count:
        progress.total = sum(source.count(folder.name) for folder in layout.folders if folder.selectable)
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    for folder in layout.folders:
        if folder.selectable:
            _copy_folder(source, folder.name, paths[folder.name], done, progress, report)
        else:
            paths[folder.name].mkdir(mode=0o700, parents=True, exist_ok=True)
    maildir.remove_other_folders(root, {f.name: paths[f.name] for f in layout.folders if f.selectable})
    maildir.write_subscriptions(root, layout.subscribed, layout.separator, layout.prefix)
    report(progress)
    return done


def _copy_folder(
    source: Source, name: str, path: Path, done: Pass, progress: Progress, report: Callable[[Progress], None]
) -> None:
    selected = source.examine(name)
    here = maildir.Folder(path, selected.uidvalidity)
    here.open()
    there = source.uids()
    progress.seen += len(there)
    progress.total = max(progress.total, progress.seen)
    known = [uid for uid in there if uid in here.messages]
    progress.copied += len(known)

    for uid in here.messages.keys() - set(there):
        here.expunge(uid)
        done.changes += 1
    for uid, flags in source.flags(known):
        if flags != here.messages[uid].flags:
            here.set_flags(uid, flags)
            done.changes += 1
    missing = [uid for uid in there if uid not in here.messages]
    for message, body in source.bodies(list(source.messages(missing))):
        progress.bytes += here.add(message.uid, message.internaldate, message.flags, body)
        progress.copied += 1
        done.changes += 1
        report(progress)
    uidnext = max(selected.uidnext, max(here.messages, default=0) + 1)
    here.write_index(uidnext + UID_GAP)
    done.folders.append(FolderState(name, selected.uidvalidity, uidnext, len(here.messages)))
