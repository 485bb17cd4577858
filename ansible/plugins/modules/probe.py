#!/usr/bin/python
"""A message through Postfix and a login to Dovecot, as a user would do it."""

from __future__ import annotations

DOCUMENTATION = """
module: probe
author: The bascule developers
version_added: "0.2.0"
short_description: Sends a message to a mailbox of this server, logs in and looks for it
description:
  - Logs in by IMAP as O(user), sends one message to O(recipient) by SMTP, waits until the message is there, and
    removes it. Fails in words if any of that fails.
options:
  recipient:
    description: An address that this server delivers itself.
    type: str
    required: true
  user:
    description: Who logs in; the recipient if empty.
    type: str
    default: ""
  password:
    description: Of the user.
    type: str
    required: true
  smtp:
    description: Where Postfix listens.
    type: str
    default: 127.0.0.1:25
  imap:
    description: Where Dovecot listens; STARTTLS is used if it is offered.
    type: str
    default: 127.0.0.1:143
  patience:
    description: Seconds for the message to arrive.
    type: int
    default: 60
attributes:
  check_mode:
    support: full
    description: Nothing is sent.
"""

EXAMPLES = """
- name: Mail and logins of our own users
  bascule.mail.probe:
    recipient: probe@example.com
    password: "{{ probe__password }}"
"""

RETURN = """
seconds:
  description: How long the message took.
  returned: success
  type: float
"""

import imaplib
import secrets
import smtplib
import ssl
import time

from ansible.module_utils.basic import AnsibleModule

PAUSE = 0.3  # seconds between looks


def main() -> None:
    """Run as an Ansible module."""
    module = AnsibleModule(
        argument_spec={
            "recipient": {"type": "str", "required": True},
            "user": {"type": "str", "default": ""},
            "password": {"type": "str", "required": True, "no_log": True},
            "smtp": {"type": "str", "default": "127.0.0.1:25"},
            "imap": {"type": "str", "default": "127.0.0.1:143"},
            "patience": {"type": "int", "default": 60},
        },
        supports_check_mode=True,
    )
    if module.check_mode:
        module.exit_json(changed=False, seconds=0.0)
        return
    options = module.params
    identity = f"<bascule-probe-{secrets.token_hex(8)}@localhost>"
    began = time.monotonic()
    user = options["user"] or options["recipient"]
    # First of all: who cannot get in could not take the message away again.
    step = f"Dovecot at {options['imap']} does not let {user} in"
    try:
        session = _login(options["imap"], user, options["password"])
        step = f"Postfix at {options['smtp']} does not take a message for {options['recipient']}"
        _send(options["smtp"], options["recipient"], identity)
        step = f"the INBOX of {user} cannot be read"
        while not _take_away(session, identity):
            if time.monotonic() - began > options["patience"]:
                module.fail_json(msg=f"a message for {options['recipient']} was taken, and did not arrive in time")
                return
            time.sleep(PAUSE)
        session.logout()
    except (OSError, smtplib.SMTPException, imaplib.IMAP4.error) as error:
        module.fail_json(msg=f"{step}: {error}")
        return
    module.exit_json(changed=False, seconds=round(time.monotonic() - began, 2))


def _where(listen: str) -> tuple[str, int]:
    host, _, port = listen.rpartition(":")
    return host, int(port)


def _send(listen: str, recipient: str, identity: str) -> None:
    text = (
        f"From: {recipient}\r\nTo: {recipient}\r\nSubject: bascule probe, removed in a moment\r\n"
        f"Message-ID: {identity}\r\nAuto-Submitted: auto-generated\r\n\r\nA probe.\r\n"
    )
    with smtplib.SMTP(*_where(listen), timeout=60) as smtp:
        smtp.sendmail("", [recipient], text)


def _login(listen: str, user: str, password: str) -> imaplib.IMAP4:
    session = imaplib.IMAP4(*_where(listen), timeout=60)
    if "STARTTLS" in session.capabilities:
        # This host itself; the name in its certificate is another one.
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        session.starttls(context)
    session.login(user, password)
    return session


def _take_away(session: imaplib.IMAP4, identity: str) -> bool:
    session.select("INBOX")
    _, found = session.search(None, "HEADER", "Message-ID", identity)
    numbers = (found[0] or b"").decode().split()
    for number in numbers:
        session.store(number, "+FLAGS", "(\\Deleted)")
    if numbers:
        session.expunge()
    return bool(numbers)


if __name__ == "__main__":
    main()
