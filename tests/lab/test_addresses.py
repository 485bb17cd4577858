"""Every form of address, and messages that are for several people, through real Postfixes."""

from __future__ import annotations

import smtplib
from collections.abc import Callable, Iterator
from functools import partial
from random import Random

import pytest
from imapclient.exceptions import LoginError

from bascule.lab.ghost import ghost
from bascule.lab.mail import copies, message
from bascule.lab.sites import (
    CATCH_ALL_DOMAIN,
    DOMAIN,
    IDN_DOMAIN,
    Lab,
    LegacySite,
    NewSite,
    eventually,
    full,
)

pytestmark = pytest.mark.lab

Request = Callable[[str], None]
Await = Callable[..., None]


def count(site: LegacySite | NewSite, name: str, password: str, identity: str) -> int:
    with site.client(name, password) as client:
        return copies(client, identity)


def arrived(site: LegacySite | NewSite, name: str, password: str, identity: str) -> bool:
    return count(site, name, password, identity) == 1


def deliver(
    lab: Lab, recipients: list[str], identity: str, random: Random, sender: str = "sender@elsewhere.test"
) -> dict[str, tuple[int, bytes]]:
    """Send one message; the recipients that were refused. Addresses are sent in UTF-8."""
    with smtplib.SMTP("127.0.0.1", lab.new.smtp_port, timeout=30) as smtp:
        smtp.command_encoding = "utf-8"
        return smtp.sendmail(sender, recipients, message(identity, "x@elsewhere.test", random))


def test_one_message_for_people_here_there_and_on_the_move(
    lab: Lab, random: Random, request_move: Request, await_state: Await
) -> None:
    request_move("shared-here")
    await_state("shared-here")
    names = ["shared-here", "shared-there", "shared-moving"]
    with ghost(lab.new):
        request_move("shared-moving")
        await_state("shared-moving", "cutover")
        refused = deliver(lab, [full(each) for each in (*names, "nobody-at-all")], "shared@several.test", random)
        assert list(refused) == [full("nobody-at-all")]
        assert refused[full("nobody-at-all")][0] == 550
    await_state("shared-moving")
    sites: dict[str, LegacySite | NewSite] = {
        "shared-here": lab.new,
        "shared-there": lab.legacy,
        "shared-moving": lab.new,
    }
    for name, site in sites.items():
        eventually(f"mail of {name}", partial(arrived, site, name, lab.legacy.users[name], "shared@several.test"))
    eventually("nothing is left", lambda: lab.new.postfix.is_empty() and lab.legacy.postfix.is_empty())
    for name, site in sites.items():
        other = lab.legacy if site is lab.new else lab.new
        if (name, other) != ("shared-there", lab.new):  # who is proxied to the other side sees the same mailbox
            assert count(other, name, lab.legacy.users[name], "shared@several.test") == 0
        assert count(site, name, lab.legacy.users[name], "shared@several.test") == 1


def test_a_bounce_is_mail_like_any_other(lab: Lab, random: Random, request_move: Request, await_state: Await) -> None:
    """The null reverse-path (RFC 5321 section 4.5.5), for both sides."""
    request_move("relaying-here")
    await_state("relaying-here")
    assert deliver(lab, [full("relaying-here"), full("relaying-there")], "null@sender.test", random, sender="") == {}
    for name, site in (("relaying-here", lab.new), ("relaying-there", lab.legacy)):
        eventually(f"mail of {name}", partial(arrived, site, name, lab.legacy.users[name], "null@sender.test"))


@pytest.mark.parametrize(
    ("local_part", "accepted"),
    [
        ("RELAYING-There", True),
        ('"relaying-there"', True),
        ('"no such person"', False),
        ('"relaying there"', False),
    ],
)
def test_forms_of_a_local_part(lab: Lab, random: Random, local_part: str, accepted: bool) -> None:
    identity = f"form-{random.random()}-{len(local_part)}@forms.test"
    recipient = f"{local_part}@{DOMAIN}"
    if not accepted:
        with pytest.raises(smtplib.SMTPRecipientsRefused) as error:
            deliver(lab, [recipient], identity, random)
        assert [code for code, _ in error.value.recipients.values()] == [550]
        return
    assert deliver(lab, [recipient], identity, random) == {}
    password = lab.legacy.users["relaying-there"]
    eventually("delivered", partial(arrived, lab.legacy, "relaying-there", password, identity))


def prepare(lab: Lab, domain: str) -> None:
    ports = lab.legacy.ports
    done = lab.new.cli(
        "prepare", domain, "--imap-host", "localhost", "--imap-port", str(ports.imaps), "--smtp-host", "127.0.0.1",
        "--smtp-port", str(lab.legacy.smtp_port), "--sweep-interval", "2 seconds", "--no-first-login", "--no-messages",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    done = lab.new.cli("activate", domain)
    assert done.returncode == 0, done.stdout
    known = "SELECT 1 FROM bascule.domains WHERE domain = %s AND mode = 'active'"
    assert lab.new.sql(known, domain if domain.isascii() else IDN_DOMAIN)


@pytest.fixture(scope="module")
def idn(lab: Lab) -> Iterator[str]:
    """The domain bücher.test, prepared as a person writes it."""
    prepare(lab, "Bücher.test")
    yield "bücher.test"


def test_a_domain_with_other_than_ascii_letters(
    lab: Lab, idn: str, random: Random, request_move: Request, await_state: Await
) -> None:
    """In A-labels: Postfix does not offer SMTPUTF8 here, and Dovecot takes no other names of users."""
    name, password = f"buch@{IDN_DOMAIN}", lab.legacy.users[f"buch@{IDN_DOMAIN}"]
    forms = [name, f"Buch@{IDN_DOMAIN.upper()}"]
    eventually("the domain is known", partial(_taken, lab, name))
    with pytest.raises(smtplib.SMTPRecipientsRefused, match="501"):
        deliver(lab, [f"buch@{idn}"], "never@idn.test", random)
    for number, form in enumerate(forms):
        assert deliver(lab, [form], f"before-{number}@idn.test", random) == {}
        eventually(f"mail to {form}", partial(arrived, lab.legacy, name, password, f"before-{number}@idn.test"))
    with lab.new.client(name, password) as client:
        assert client.select_folder("INBOX")[b"EXISTS"] == len(forms)
    request_move(name)
    await_state(name)
    for number, form in enumerate(forms):
        assert deliver(lab, [form], f"after-{number}@idn.test", random) == {}
        eventually(f"mail to {form}", partial(arrived, lab.new, name, password, f"after-{number}@idn.test"))
    with lab.new.client(name, password) as client:
        assert client.select_folder("INBOX")[b"EXISTS"] == 2 * len(forms)
    with pytest.raises(LoginError, match="AUTHENTICATIONFAILED"), lab.new.client(name, "wrong"):
        pass


def _taken(lab: Lab, recipient: str) -> bool:
    with smtplib.SMTP("127.0.0.1", lab.new.smtp_port, timeout=30) as smtp:
        smtp.ehlo()
        smtp.command_encoding = "utf-8"
        smtp.docmd("MAIL FROM:<>")
        code, _ = smtp.docmd(f"RCPT TO:<{recipient}>")
        return code == 250


def test_a_catch_all_at_the_legacy_server(lab: Lab, random: Random) -> None:
    """Whoever is written to is taken, relayed and counted: only its own server knows who is real."""
    prepare(lab, CATCH_ALL_DOMAIN)
    recipient = f"anything-at-all@{CATCH_ALL_DOMAIN}"
    eventually("the domain is known", lambda: _taken(lab, recipient))
    assert deliver(lab, [recipient], "caught@all.test", random) == {}
    password = lab.legacy.users["relaying-there"]
    eventually("caught", partial(arrived, lab.legacy, "relaying-there", password, "caught@all.test"))
    seen = "SELECT 1 FROM bascule.forgotten WHERE address = %s"
    eventually("counted", lambda: lab.new.sql(seen, recipient))
