"""What rules left at the legacy server, once a mailbox has moved: it stays as it was at the flip."""

from __future__ import annotations

from bascule.imap.folder_rules import FolderRules, Traits
from bascule.imap.reader import Layout, Reader
from bascule.migrator.acts import recorded
from bascule.migrator.attempt import Attempt


def left_out(attempt: Attempt, there: Reader, layout: Layout) -> frozenset[str]:
    """The legacy folders, as they are recorded, that are not brought and not written to.

    Those that were left out at the flip; and those made since that the rules of
    the flip leave out, which are recorded, for nothing is left out without a name.
    """
    acts, mailbox_id = attempt.acts, attempt.account.id
    came, known = acts.flipped_folders(mailbox_id), acts.left_out_folders(mailbox_id)
    arranged = FolderRules(acts.rules_at_flip(mailbox_id)).arrange(layout, Traits.of(there))
    new = {recorded(name): reason for name, reason in arranged.left_out.items()}
    new = {name: reason for name, reason in new.items() if name not in came and name not in known}
    if new:
        acts.set_left_out(
            mailbox_id, [{"name": name, "reason": reason, "messages": None} for name, reason in new.items()],
            complete=False,
        )  # fmt: skip
    return frozenset(known | new.keys())
