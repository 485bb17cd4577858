"""What users are written to: the last message, the welcome, that a move waits for a password, that a login began one.

The texts are templates, one for each kind and language, in
``config_templates/messages``; a file of the same name in the operator's folder
(``[users] templates``) takes the place of ours. The first line is the subject.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email import message_from_bytes
from email.headerregistry import Address as Mailbox
from email.message import EmailMessage
from email.policy import SMTP
from email.utils import format_datetime
from typing import Literal, get_args

from jinja2 import TemplateError

from bascule.address import Address
from bascule.config_templates import environment
from bascule.endpoint import host_and_port
from bascule.errors import BadSettings
from bascule.language import LANGUAGES, Language
from bascule.settings import Users

Kind = Literal["last", "welcome", "trouble", "first-login"]
KINDS: tuple[Kind, ...] = get_args(Kind)

#: Ports whose TLS is implicit (RFC 8314); at others it is STARTTLS.
IMPLICIT_TLS = {993, 995, 465}


#: For servers without 8BITMIME (RFC 6152), too.
ANY_SERVER = SMTP.clone(cte_type="7bit")


@dataclass(frozen=True, slots=True)
class ClientServer:
    """A server as users must tell it to their mail programs."""

    service: Literal["imap", "pop3", "submission"]
    host: str
    port: int

    @property
    def security(self) -> str:
        """As mail programs name it."""
        return "SSL/TLS" if self.port in IMPLICIT_TLS else "STARTTLS"


def client_servers(users: Users) -> tuple[ClientServer, ...]:
    """The servers that the settings name for mail programs."""
    named: Mapping[Literal["imap", "pop3", "submission"], str | None] = {
        "imap": users.imap,
        "pop3": users.pop3,
        "submission": users.submission,
    }
    return tuple(ClientServer(service, *host_and_port(where)) for service, where in named.items() if where)


def compose(
    kind: Kind, language: Language, users: Users, *, address: Address, message_id: str, url: str | None = None
) -> bytes:
    """A message to ``address``, ready to be sent or appended (CRLF).

    Raises:
        BadSettings: the operator's template cannot be used.
    """
    name = f"messages/{kind}.{language}.txt.j2"
    folders = () if users.templates is None else (users.templates,)
    try:
        text = (
            environment(*folders)
            .get_template(name)
            .render(
                address=str(address),
                domain=address.domain,
                organisation=users.organisation,
                contact=users.contact,
                servers=client_servers(users),
                url=url or "",
            )
        )
    except TemplateError as error:
        raise BadSettings(f"the template {name} in {users.templates} cannot be used: {error}") from error
    subject, separator, body = text.partition("\n\n")
    if not separator or "\n" in subject or not subject.startswith("Subject: "):
        raise BadSettings(
            f"the template {name} in {users.templates} does not begin with a line 'Subject: ...' and an empty one"
        )
    message = EmailMessage(policy=ANY_SERVER)
    message["From"] = Mailbox(users.organisation or "Postmaster", "postmaster", address.domain)
    message["To"] = str(address)
    message["Subject"] = subject.removeprefix("Subject: ")
    message["Date"] = format_datetime(datetime.now(UTC))
    message["Message-ID"] = message_id
    message["Auto-Submitted"] = "auto-generated"  # RFC 3834: nobody's vacation answers it
    message["Content-Language"] = language
    message.set_content(body.strip("\n") + "\n")
    return message.as_bytes()


def check(users: Users) -> None:
    """Compose every message once.

    Raises:
        BadSettings: with the first template that cannot be used.
    """
    for kind in KINDS:
        for language in LANGUAGES:
            nobody = Address("nobody", "example.org")
            compose(kind, language, users, address=nobody, message_id="<x@example.org>", url="https://example.org/m/x")


def readable(text: bytes) -> str:
    """A message as a mail program shows it."""
    message = message_from_bytes(text, policy=SMTP)
    head = "\n".join(f"{name}: {message[name]}" for name in ("From", "To", "Subject"))
    return f"{head}\n\n{message.get_content()}".replace("\r\n", "\n")
