"""Where a mailbox is, in the words of Dovecot 2.3 and 2.4."""

from __future__ import annotations

import pytest

from bascule.location import dovecot_settings


@pytest.mark.parametrize(
    ("location", "version", "settings"),
    [
        ("mdbox:~/mdbox", "2.3.19.1 (9b53102964)", {"mail_location": "mdbox:~/mdbox"}),
        (
            "maildir:~/Maildir:LAYOUT=fs",
            "2.4.1-4 (7d8c0e5759)",
            {
                "mail_driver": "maildir",
                "mail_path": "~/Maildir",
                "mail_inbox_path": "~/Maildir",
                "mailbox_list_layout": "fs",
            },
        ),
        (
            "sdbox:/home/sdbox.returning",
            "2.4",
            {
                "mail_driver": "sdbox",
                "mail_path": "/home/sdbox.returning",
                "mail_inbox_path": "",
                "mailbox_list_layout": "fs",
            },
        ),
    ],
)
def test_every_piece_of_it_is_said(location: str, version: str, settings: dict[str, str]) -> None:
    assert dovecot_settings(location, version) == settings
