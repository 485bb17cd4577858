"""Where Dovecot keeps a user's mailbox, in the words of either version.

bascule says it as Dovecot 2.3 does, in one setting (``mail_location``); 2.4 has
a setting for each piece of it (Dovecot 2.4 manual, "Upgrading from 2.3 to 2.4",
"Mail location"). Whether by userdb fields or by ``-o``, all of them must be
said: one that is left out is the operator's own, or Debian's.
"""

from __future__ import annotations


def dovecot_settings(location: str, version: str) -> dict[str, str]:
    """The settings that make ``location`` the mailbox, by name.

    ``location`` is ``maildir:PATH:LAYOUT=fs``, ``mdbox:PATH`` or ``sdbox:PATH``; ``version`` is Dovecot's, as
    ``2.3`` or ``2.4.1``.
    """
    if version.startswith("2.3"):
        return {"mail_location": location}
    driver, path, *_ = location.split(":")
    return {
        "mail_driver": driver,
        "mail_path": path,
        # In Maildir INBOX is the root; dbox has it among the others.
        "mail_inbox_path": path if driver == "maildir" else "",
        "mailbox_list_layout": "fs",
    }
