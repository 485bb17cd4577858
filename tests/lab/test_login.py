"""Logins on the new server, for users who have not moved and for those who have."""

from __future__ import annotations

import poplib
import smtplib
import subprocess
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
from imapclient.exceptions import LoginError

from bascule.lab.mail import Ledger, copies, send, submit
from bascule.lab.process import VMAIL, LabError
from bascule.lab.sites import DOMAIN, Lab, LegacySite, NewSite, eventually, imap

pytestmark = pytest.mark.lab

Request = Callable[[str], None]
Await = Callable[..., None]


def received(site: LegacySite | NewSite, name: str, password: str, identity: str) -> int:
    """How many messages with this Message-ID are in the user's INBOX."""
    with site.client(name, password) as client:
        return copies(client, identity)


def test_imap_pop3_and_submission_are_proxied(new: NewSite, legacy: LegacySite, ledger: Ledger, random: Random) -> None:
    password = legacy.users["proxied"]
    submit(new.dovecot.ports.submission, "proxied", password, "proxied", "by-submission@test", ledger, random)
    eventually("submitted mail", lambda: received(legacy, "proxied", password, "by-submission@test"))
    assert received(new, "proxied", password, "by-submission@test") == 1
    pop3 = poplib.POP3("127.0.0.1", new.dovecot.ports.pop3, timeout=30)
    pop3.user(f"proxied@{DOMAIN}")
    pop3.pass_(password)
    assert pop3.stat()[0] == 1
    pop3.quit()
    for protocol in ("imap-login", "pop3-login", "submission-login"):
        assert f"{protocol}: Info: proxy(proxied@{DOMAIN}" in new.dovecot.log()
    assert new.state("proxied") is None  # this domain's policy: a login moves nobody


@pytest.mark.parametrize("user", [f"proxied@{DOMAIN}", f"nobody@{DOMAIN}", "proxied@elsewhere.test", "proxied"])
def test_a_wrong_password_is_wrong(new: NewSite, user: str) -> None:
    with pytest.raises(LoginError, match="AUTHENTICATIONFAILED"), imap(new.dovecot.ports.imap, user, "wrong"):
        pass


def test_an_unreachable_legacy_server_is_a_temporary_failure(new: NewSite, legacy: LegacySite) -> None:
    legacy.dovecot.stop()
    try:
        with pytest.raises(LoginError, match="UNAVAILABLE"), new.client("unreachable", legacy.users["unreachable"]):
            pass
        with pytest.raises(LoginError, match="UNAVAILABLE"), new.client("unreachable", "wrong"):
            pass
    finally:
        legacy.dovecot.start()
    with new.client("unreachable", legacy.users["unreachable"]):
        pass


def test_a_moved_user_is_never_tried_at_legacy(
    new: NewSite, legacy: LegacySite, request_move: Request, await_state: Await
) -> None:
    password = legacy.users["moved"]
    request_move("moved")
    await_state("moved")
    with new.client("moved", password):
        pass
    legacy.set_users(legacy.users | {"moved": "another one"}, legacy.aliases)
    try:
        with pytest.raises(LoginError, match="AUTHENTICATIONFAILED"), new.client("moved", "another one"):
            pass
        with new.client("moved", password):
            pass
    finally:
        legacy.set_users(legacy.users | {"moved": password}, legacy.aliases)


def test_without_the_database_logins_and_mail_go_on(
    lab: Lab, new: NewSite, ledger: Ledger, random: Random, request_move: Request, await_state: Await
) -> None:
    legacy = lab.legacy
    request_move("databaseless")
    await_state("databaseless")
    new.postgres.stop("immediate")
    try:
        # Not moved: proxied, relayed.
        with new.client("stayed", legacy.users["stayed"]):
            pass
        send(new.smtp_port, "relayed-without@test", "stayed", ledger, random)
        eventually("relayed mail", lambda: received(legacy, "stayed", legacy.users["stayed"], "relayed-without@test"))
        # Moved: served here, mail and all.
        with new.client("databaseless", legacy.users["databaseless"]):
            pass
        send(new.smtp_port, "local-without@test", "databaseless", ledger, random)
        eventually(
            "mail", lambda: received(new, "databaseless", legacy.users["databaseless"], "local-without@test") == 1
        )
        # A policy daemon that starts now takes up the last known routes.
        new.policy_daemon.stop()
        new.policy_daemon.start()
        assert "last known state taken up" in new.policy_daemon.tail()
        send(new.smtp_port, "after-restart@test", "stayed", ledger, random)
    finally:
        new.postgres.start()
        new.worker.stop()
        new.worker.start()
    assert received(legacy, "databaseless", legacy.users["databaseless"], "local-without@test") == 0
    eventually(
        "mail after the restart", lambda: received(legacy, "stayed", legacy.users["stayed"], "after-restart@test")
    )


def test_programs_of_the_mailboxes_owner_can_be_run(new: NewSite) -> None:
    """Dovecot 2.3 has the text of ssl_ca in their environment: the system's authorities do not fit there."""

    def delivered(config: Path) -> str:
        lda = "/usr/lib/dovecot/dovecot-lda"
        command = ["setpriv", f"--reuid={VMAIL}", f"--regid={VMAIL}", "--clear-groups", lda, "-c", str(config)]
        done = subprocess.run([*command, "-d", "nobody"], stdin=subprocess.DEVNULL, capture_output=True, check=False)
        return done.stderr.decode()

    text = new.dovecot.config.read_text()
    assert f"ssl_ca = <{new.settings.legacy.ca_file}" in text
    bundle = new.dovecot.folder / "bundle.conf"
    bundle.write_text(f"{text}\nssl_ca = </etc/ssl/certs/ca-certificates.crt\n")
    assert "Argument list too long" in delivered(bundle)
    assert "Argument list too long" not in delivered(new.dovecot.config)


def test_postfix_may_have_logins_checked(lab: Lab) -> None:
    """Dovecot SASL for smtpd(8): accepted for users who have not moved, with no proxying."""
    user, password = f"stayed@{DOMAIN}", lab.legacy.users["stayed"]
    accepted = lab.new.dovecot.doveadm("auth", "test", "-x", "service=smtp", user, password)
    assert "auth succeeded" in accepted
    assert "proxy" not in accepted
    with pytest.raises(LabError, match="auth failed"):
        lab.new.dovecot.doveadm("auth", "test", "-x", "service=smtp", user, "wrong")


def test_no_password_is_in_any_log(lab: Lab) -> None:
    with pytest.raises(LoginError), lab.new.client("stayed", "wrong-xyzzy"):
        pass
    logs = [daemon.log.read_text() for daemon in lab.new.daemons]
    logs += [lab.new.dovecot.log(), lab.new.postfix.log(), (lab.new.postgres.folder / "postgres.log").read_text()]
    for secret in ("wrong-xyzzy", *lab.legacy.users.values()):
        assert not any(secret in text for text in logs), secret


def test_a_smtp_client_that_knows_no_password_cannot_submit(new: NewSite) -> None:
    with smtplib.SMTP("127.0.0.1", new.dovecot.ports.submission, timeout=30) as smtp:
        smtp.ehlo()
        code, _ = smtp.mail("x@elsewhere.test")
    assert code >= 500
