"""A mailbox as it was read last, so that only what changed since is asked for (RFC 7162)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from bascule.imap.reader import Changes, Message, Reader, Status, insist, insisted, unlisted
from bascule.migrator.return_plan import Folder


class Mirror:
    """What the folders of one side have. ``with_guids``: with Dovecot's names of messages, where it is Dovecot."""

    def __init__(self, *, with_guids: bool = False) -> None:
        self._with_guids = with_guids
        self._statuses: dict[str, Status] = {}
        #: What was read of each folder.
        self.folders: dict[str, Folder] = {}

    def read(self, reader: Reader, names: Sequence[str]) -> dict[str, Folder]:
        """The folders of these names, now.

        Raises:
            FolderNotReadable: the server does not show one of them, or not all that is in it.
            ServerUnavailable
        """
        now = insist(reader.statuses(names))
        asked: dict[str, Status | None] = {}
        for name, status in now.items():
            before = self._statuses.get(name)
            if not status.messages:  # some servers refuse to FETCH 1:* from an empty folder
                self.folders[name] = Folder(status.uidvalidity)
            elif before != status or not status.highestmodseq:
                is_comparable = before is not None and before.uidvalidity == status.uidvalidity and before.messages > 0
                asked[name] = before if is_comparable and before is not None and before.highestmodseq else None
        doubtful = [
            changes.folder
            for changes in insisted(reader.changes(list(asked.items())))
            if not self._apply(changes, is_whole=asked[changes.folder] is None)
        ]
        for changes in insisted(reader.changes([(name, None) for name in doubtful])):
            if not self._apply(changes, is_whole=True):
                raise unlisted(changes)
        if self._with_guids:
            for name in asked:
                folder = self.folders[name]
                if folder.messages.keys() - folder.guids.keys():
                    self.folders[name] = replace(folder, guids=reader.guids(name))
        self._statuses = now
        return {name: self.folders[name] for name in names}

    def _apply(self, changes: Changes, *, is_whole: bool) -> bool:
        """Bring a folder up to date; whether it is whole then."""
        before = None if is_whole else self.folders[changes.folder]
        messages: dict[int, Message] = {} if before is None else dict(before.messages)
        if changes.complete and not is_whole:
            messages = {uid: message for uid, message in messages.items() if uid in changes.flags}
        for first, last in changes.vanished:
            for uid in [uid for uid in messages if first <= uid <= last]:
                del messages[uid]
        for uid, flags in changes.flags.items():
            if uid in messages:
                messages[uid] = replace(messages[uid], flags=flags)
        messages |= {message.uid: message for message in changes.new}
        guids = {} if before is None else before.guids
        self.folders[changes.folder] = Folder(changes.uidvalidity, messages, guids)
        # More may have come while it was listed.
        return len(messages) >= changes.exists if is_whole else len(messages) == changes.exists
