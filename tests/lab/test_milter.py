"""The milter with real Postfixes: loops, DKIM signatures, ARC seals."""

from __future__ import annotations

import smtplib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from random import Random

import dkim
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from bascule.config_templates import render
from bascule.lab.mail import message
from bascule.lab.process import Daemon
from bascule.lab.sites import DOMAIN, SERVICE, Lab, LegacySite, NewSite, eventually
from bascule.settings import Arc

pytestmark = pytest.mark.lab

Request = Callable[[str], None]
Await = Callable[..., None]
SIGNER = "signer.test"


class Key:
    """An RSA key, and the DNS that tells its public half."""

    def __init__(self) -> None:
        key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        self.private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        public = key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        self._record = b"v=DKIM1; k=rsa; p=" + b"".join(public.splitlines()[1:-1])

    def dns(self, _name: bytes, **_: object) -> bytes:
        return self._record


@pytest.fixture(scope="module")
def key() -> Key:
    return Key()


def deliver(port: int, name: str, body: bytes, sender: str = "sender@signer.test") -> None:
    with smtplib.SMTP("127.0.0.1", port, timeout=30) as smtp:
        smtp.sendmail(sender, [f"{name}@{DOMAIN}"], body)


def received(site: LegacySite | NewSite, name: str, password: str, identity: str) -> bytes | None:
    """The message with this Message-ID, as the mailbox has it."""
    with site.client(name, password) as client:
        client.select_folder("INBOX", readonly=True)
        found = client.search(["HEADER", "Message-ID", identity])
        return bytes(client.fetch(found, ["BODY.PEEK[]"])[found[0]][b"BODY[]"]) if found else None


def signed(key: Key, name: str, identity: str, random: Random, extra: bytes = b"") -> bytes:
    """A message with a DKIM signature that allows for no change at all (simple/simple)."""
    body = extra + message(identity, f"{name}@{DOMAIN}", random, size=20_000)
    headers = [b"from", b"to", b"subject", b"date", b"message-id", b"mime-version", b"content-type"]
    signature = dkim.sign(
        body, b"s1", SIGNER.encode(), key.private, canonicalize=(b"simple", b"simple"), include_headers=headers
    )
    return bytes(signature) + body


def test_a_signature_still_verifies_on_either_side(
    lab: Lab, key: Key, random: Random, request_move: Request, await_state: Await
) -> None:
    for name in ("signed-here", "signed-there"):
        body = signed(key, name, f"signed@{name}.test", random)
        assert dkim.verify(body, dnsfunc=key.dns)
        if name == "signed-here":
            request_move(name)
            await_state(name)
        deliver(lab.new.smtp_port, name, body)
        site = lab.new if name == "signed-here" else lab.legacy
        found = eventually(
            f"mail of {name}", partial(received, site, name, lab.legacy.users[name], f"signed@{name}.test")
        )
        assert dkim.verify(found, dnsfunc=key.dns), "changed on the way"
        assert found.endswith(body.partition(b"\r\n\r\n")[2])
        route = b"local" if site is lab.new else b"legacy"
        assert b"Bascule-Trace: by new.lab.test; domain=lab.test; route=" + route in found


@contextmanager
def sealing(lab: Lab, key: Key) -> Iterator[None]:
    """The milter with a key for ARC, in the place of the one without."""
    folder = lab.new.folder / "etc"
    secret = folder / "arc.pem"
    secret.write_bytes(key.private)
    secret.chmod(0o444)
    arc = Arc(domain=SIGNER, selector="arc", key=secret, authserv_id="mx.lab.test")
    settings = lab.new.settings.model_copy(update={"milter": lab.new.settings.milter.model_copy(update={"arc": arc})})
    path = folder / "sealing.toml"
    path.write_text(render("bascule.toml.j2", **settings.model_dump()))
    command = [*lab.new.milter.command[:-1], str(path)]
    lab.new.milter.stop()
    milter = Daemon(command, folder=lab.new.folder / "log", name="sealing-milter", uid=SERVICE, gid=SERVICE)
    try:
        milter.start()
        yield
    finally:
        milter.stop()
        lab.new.milter.start()


RESULTS = b"Authentication-Results: %s; spf=pass smtp.mailfrom=sender@signer.test; dkim=pass header.d=signer.test\r\n"


def test_relayed_mail_is_sealed_if_that_is_wanted(lab: Lab, key: Key, random: Random) -> None:
    password = lab.legacy.users["sealed"]
    with sealing(lab, key):
        for identity, results in (("vouched", b"mx.lab.test"), ("not-vouched", b"somebody.else.test")):
            deliver(
                lab.new.smtp_port, "sealed", signed(key, "sealed", f"{identity}@sealed.test", random, RESULTS % results)
            )
        found = {
            identity: eventually(identity, partial(received, lab.legacy, "sealed", password, f"{identity}@sealed.test"))
            for identity in ("vouched", "not-vouched")
        }
    verdict, _, reason = dkim.arc_verify(found["vouched"], dnsfunc=key.dns)
    assert (verdict, reason) == (dkim.CV_Pass, "success")
    assert b"ARC-Authentication-Results: i=1; mx.lab.test;" in found["vouched"]
    assert dkim.verify(found["vouched"], dnsfunc=key.dns)
    assert b"ARC-Seal" not in found["not-vouched"]


def test_without_a_key_nothing_is_sealed(lab: Lab, key: Key, random: Random) -> None:
    deliver(lab.new.smtp_port, "sealed", signed(key, "sealed", "plain@sealed.test", random, RESULTS % b"mx.lab.test"))
    found = eventually("mail", partial(received, lab.legacy, "sealed", lab.legacy.users["sealed"], "plain@sealed.test"))
    assert b"ARC-" not in found


@pytest.fixture
def sent_back(lab: Lab) -> Iterator[str]:
    """A user whose mail the legacy server forwards to the new one."""
    lab.legacy.send_back({"circled": lab.new.smtp_port})
    lab.legacy.postfix.reload()
    yield "circled"
    lab.legacy.send_back({})
    lab.legacy.postfix.reload()


def test_a_message_that_legacy_forwards_back_is_refused_once(lab: Lab, sent_back: str, random: Random) -> None:
    """It went round once; the legacy server, which began it, tells the sender."""
    deliver(lab.new.smtp_port, sent_back, message("circle@circled.test", "x", random), f"stayed@{DOMAIN}")

    def bounced() -> bytes | None:
        with lab.legacy.client("stayed") as client:
            client.select_folder("INBOX", readonly=True)
            for uid, data in client.fetch(client.search(["FROM", "MAILER-DAEMON"]), ["BODY.PEEK[]"]).items():
                if b"circle@circled.test" in data[b"BODY[]"]:
                    assert uid
                    return bytes(data[b"BODY[]"])
        return None

    assert b"5.4.6" in eventually("the sender is told", bounced)
    assert received(lab.legacy, sent_back, lab.legacy.users[sent_back], "circle@circled.test") is None
    assert "loop refused" in lab.new.milter.tail(200)


def test_a_message_sent_back_to_somebody_who_moved_meanwhile_ends_here(
    lab: Lab, random: Random, request_move: Request, await_state: Await
) -> None:
    name, password = "overtaken", lab.legacy.users["overtaken"]
    deliver(lab.new.smtp_port, name, message("late@overtaken.test", "x", random))
    stamped = eventually("relayed", partial(received, lab.legacy, name, password, "late@overtaken.test"))
    with pytest.raises(smtplib.SMTPDataError, match=r"5\.4\.6"):
        deliver(lab.new.smtp_port, name, stamped)
    request_move(name)
    await_state(name)
    deliver(lab.new.smtp_port, name, stamped.replace(b"late@overtaken", b"later@overtaken"))
    eventually("delivered here", partial(received, lab.new, name, password, "later@overtaken.test"))
