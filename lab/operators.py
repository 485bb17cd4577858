"""Operators who had a Postfix and a Dovecot before bascule, each set up as the documentation of these has it.

``lab/roles.py`` plugs bascule into them, and takes it out again.
"""

from __future__ import annotations

import secrets
import smtplib
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from imapclient import IMAPClient

from bascule.lab import content_filter
from bascule.lab.machines import Machine
from bascule.lab.process import LabError
from bascule.lab.servers import TEMPLATES
from bascule.lab.sites import LegacySite, PrefixedSite, eventually

#: The operator's own user, of a domain that was there before bascule and stays.
OWN = "anna@shop.test"
PASSWORD = "sells everything"
#: One of the same domain, whose address OWN may not send with.
OTHER = "boss@shop.test"
#: Of the same domain, who has a copy of all mail.
ARCHIVE = "archive@shop.test"
MAIL_ROOT = "/var/vmail"


def nothing_more(_: Machine) -> None:
    """Mail and logins are tried for every operator."""


@dataclass(frozen=True, slots=True)
class Operator:
    """An operator's own Postfix and Dovecot, and how bascule is plugged into them."""

    release: str
    #: How it is set up.
    set_up: Callable[[Machine], None]
    #: Packages besides Postfix and Dovecot, the web server among them.
    packages: str = ""
    #: How OWN logs in.
    login: str = OWN
    #: What must work as before besides mail and logins, plugged in and taken out again; raises LabError.
    works: Callable[[Machine], None] = nothing_more
    #: What else is said in the inventory.
    variables: Mapping[str, object] = field(default_factory=dict)
    #: Settings of bascule's.
    settings: Mapping[str, object] = field(default_factory=dict)
    #: Where the Python packages come from: an index, not a wheelhouse.
    index: bool = False
    #: From where users move.
    legacy: type[LegacySite] = LegacySite
    #: A folder of the operator's that all users see.
    public: str = ""

    def create(self, mail: Machine) -> None:
        """Install and configure it; nothing of bascule is there."""
        mail.run(
            "DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends postgresql postfix "
            f"dovecot-core dovecot-imapd dovecot-lmtpd dovecot-pop3d {self.packages} 2>&1"
        )
        self.set_up(mail)
        mail.run("systemctl restart dovecot postfix")


def owner_of_mailboxes(mail: Machine, owner: str, mode: str) -> None:
    """One user who owns all mailboxes, and their root."""
    mail.run(
        f"useradd --system --no-create-home --home-dir {MAIL_ROOT} {owner} && "
        f"install -d -o {owner} -g {owner} -m {mode} {MAIL_ROOT}"
    )


def without_system_users(mail: Machine) -> None:
    mail.run("sed -i 's/^!include auth-system/#&/' /etc/dovecot/conf.d/10-auth.conf")


def password_file(mail: Machine, *, dovecot: str, owner: str, mode: str) -> None:
    """Virtual users in a password file; ``dovecot`` is a template of the lab's."""
    mail.write("etc/postfix/main.cf", (TEMPLATES / "shop-main.cf.j2").read_text())
    mail.write("etc/dovecot/shop.users", f"{OWN}:{{PLAIN}}{PASSWORD}::::::\n")
    owner_of_mailboxes(mail, owner, mode)
    mail.write("etc/dovecot/conf.d/95-shop.conf", (TEMPLATES / dovecot).read_text())
    without_system_users(mail)


def system_users(mail: Machine) -> None:
    """As Debian installs Dovecot: people of the system's own, PAM, an mbox for each; Postfix delivers there."""
    mail.write("etc/postfix/main.cf", (TEMPLATES / "system-main.cf.j2").read_text())
    name = OWN.partition("@")[0]
    mail.run(
        f"useradd --create-home --shell /bin/bash {name}; install -o {name} -g mail -m 660 /dev/null /var/mail/{name}; "
        f"chpasswd; echo 'sales: {name}' >> /etc/aliases; newaliases",
        stdin=f"{name}:{PASSWORD}\n",
    )
    if mail.run("dovecot --version").startswith("2.4"):
        certificate = "ssl_server_cert_file = /etc/ssl/lab/chain.pem\nssl_server_key_file = /etc/ssl/lab/key.pem\n"
    else:
        certificate = "ssl_cert = </etc/ssl/lab/chain.pem\nssl_key = </etc/ssl/lab/key.pem\n"
    mail.write("etc/dovecot/conf.d/95-shop.conf", certificate)


def mariadb(mail: Machine) -> None:
    """Domains, users, quotas and aliases in MariaDB: mysql_table(5), MYSQL_README; Dovecot's "SQL" and "Quota"."""
    folder = TEMPLATES / "mariadb"
    mail.run("mariadb", stdin=(folder / "tables.sql").read_text())
    rows = ", ".join(f"(1, '{address}', '{{PLAIN}}{PASSWORD}', 100000000)" for address in (OWN, OTHER))
    mail.run("mariadb mailserver", stdin=f"INSERT INTO users (domain, address, password, quota) VALUES {rows};")
    for name, query in {
        "domains": "SELECT 1 FROM domains WHERE name='%s'",
        "mailboxes": "SELECT 1 FROM users WHERE address='%s'",
        "aliases": "SELECT destination FROM aliases WHERE source='%s'",
        "senders": "SELECT address FROM users WHERE address='%s'",
    }.items():
        mail.write(
            f"etc/postfix/mysql-{name}.cf",
            f"user = mailserver\npassword = of-the-lab\nhosts = 127.0.0.1\ndbname = mailserver\nquery = {query}\n",
        )
        mail.run(f"chgrp postfix /etc/postfix/mysql-{name}.cf && chmod 640 /etc/postfix/mysql-{name}.cf")
    mail.write("etc/postfix/main.cf", (folder / "main.cf.j2").read_text())
    mail.run(f"cat >> /etc/postfix/master.cf <<'END'\n{(folder / 'master.cf.j2').read_text()}END")
    owner_of_mailboxes(mail, "vmail", "2770")
    mail.write("etc/dovecot/mysql.conf.ext", (folder / "dovecot-sql.conf.j2").read_text())
    mail.run("chmod 600 /etc/dovecot/mysql.conf.ext")
    mail.write("usr/local/bin/quota-warning.sh", (folder / "quota-warning.sh.j2").read_text())
    mail.run("chmod 755 /usr/local/bin/quota-warning.sh")
    mail.write("etc/dovecot/conf.d/95-shop.conf", (folder / "dovecot.conf.j2").read_text())
    without_system_users(mail)


def senders_are_known(mail: Machine) -> None:
    """Whoever submits does so with an address of their own, and with no other."""
    with smtplib.SMTP(mail.address, 587, timeout=60) as smtp:
        smtp.starttls(context=unverified())
        smtp.login(OWN, PASSWORD)
        smtp.sendmail(OWN, [OTHER], f"From: {OWN}\r\nTo: {OTHER}\r\nSubject: mine\r\n\r\nMine.\r\n")
        try:
            smtp.sendmail(OTHER, [OTHER], f"From: {OTHER}\r\nTo: {OTHER}\r\nSubject: not mine\r\n\r\nNot mine.\r\n")
        except smtplib.SMTPRecipientsRefused as error:
            if b"not owned by user" in next(iter(error.recipients.values()))[1]:
                return
    raise LabError(f"{OWN} may send as {OTHER}")


def filtered(mail: Machine) -> None:
    """A password file, folders named as Courier does, public ones; postscreen, a content filter, an archive.

    Dovecot's "Namespaces" (with "Hidden subscription namespace"), "Public shared mailboxes" and "Passwd-file";
    Postfix's POSTSCREEN_README; README.postfix of amavisd-new, whose place a filter of the lab's takes.
    """
    folder = TEMPLATES / "filtered"
    owner_of_mailboxes(mail, "vmail", "2770")
    mail.write("etc/dovecot/users", "".join(f"{user}:{PASSWORD}::::::\n" for user in (OWN, ARCHIVE)))
    mail.write("etc/dovecot/conf.d/95-shop.conf", (folder / "dovecot.conf.j2").read_text())
    without_system_users(mail)
    mail.run(
        "install -d -o vmail -g vmail -m 2770 /var/mail/public && cd /var/mail/public && "
        "install -d -o vmail -g vmail -m 2770 .News .News/cur .News/new .News/tmp && "
        "echo 'anyone lrs' | install -o vmail -g vmail -m 660 /dev/stdin .News/dovecot-acl && "
        "echo 'Subject: Welcome' | install -o vmail -g vmail -m 660 /dev/stdin .News/new/1.news.shop"
    )
    mail.write("usr/local/lib/shop/filter.py", Path(content_filter.__file__).read_text())
    mail.write(
        "etc/systemd/system/shop-filter.service",
        "[Service]\nExecStart=/usr/bin/python3 /usr/local/lib/shop/filter.py\nDynamicUser=yes\nRestart=always\n"
        "[Install]\nWantedBy=multi-user.target\n",
    )
    mail.write("etc/postfix/main.cf", (folder / "main.cf.j2").read_text())
    mail.write("etc/postfix/mailboxes", f"{OWN} x\n{ARCHIVE} x\n")
    mail.write("etc/postfix/aliases", f"sales@shop.test {OWN}\n")
    mail.run(
        "systemctl daemon-reload && systemctl enable --now shop-filter 2>&1 && cd /etc/postfix && "
        "postmap mailboxes aliases && newaliases && sed -i -e 's/^smtp  *inet .* smtpd$/#&/' "
        "-e '/^#smtp  *inet .* postscreen$/s/^#//' -e '/^#smtpd  *pass /s/^#//' -e '/^#dnsblog /s/^#//' "
        f"-e '/^#tlsproxy /s/^#//' master.cf && cat >> master.cf <<'END'\n{(folder / 'master.cf.j2').read_text()}END"
    )


def passes_the_filter(mail: Machine) -> None:
    """Mail from outside comes through postscreen and, once, the filter; it is archived, and all see what is public."""
    identity = f"<{secrets.token_hex(8)}@outside.test>"
    with smtplib.SMTP(mail.address, 25, timeout=60) as smtp:
        smtp.sendmail("x@outside.test", ["sales@shop.test"], f"Message-ID: {identity}\r\nSubject: a\r\n\r\nA.\r\n")
    for user in (OWN, ARCHIVE):
        with IMAPClient(mail.address, 993, ssl_context=unverified(), timeout=60) as client:
            client.login(user, PASSWORD)
            client.select_folder("INBOX")

            def arrived(client: IMAPClient = client) -> list[int]:
                client.noop()
                return list(client.search(["HEADER", "Message-ID", identity]))

            (number,) = eventually(f"{identity} is there for {user}", arrived)
            header = client.fetch([number], ["BODY.PEEK[HEADER]"])[number][b"BODY[HEADER]"]
            if header.count(b"X-Filtered: ") != 1:
                raise LabError(f"the filter has seen it {header.count(b'X-Filtered: ')} times: {header.decode()}")
            client.delete_messages([number])
            client.expunge()
            folders = {name for _, _, name in client.list_folders()}
            if not {"INBOX", "Public.News"} <= folders or client.select_folder("Public.News")[b"EXISTS"] != 1:
                raise LabError(f"{user} does not see what is public: {sorted(folders)}")


def unverified() -> ssl.SSLContext:
    """For machines that are called by their address, and told nothing secret."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


OPERATORS: dict[str, Operator] = {
    # A userdb that takes every name, and a hook that is not the usual one; Apache has the ports.
    "plug-bookworm": Operator(
        "bookworm",
        partial(password_file, dovecot="shop-dovecot-2.3.conf.j2", owner="vmail", mode="2770"),
        packages="apache2",
        variables={"store__hook": "checkpassword"},
    ),
    # Moved mailboxes in another format than the operator's own, and pymilter built on the host.
    "plug-trixie": Operator(
        "trixie",
        partial(password_file, dovecot="shop-dovecot-2.4.conf.j2", owner="virtual", mode="0755"),
        packages="nginx-light",
        settings={"worker": {"mail_location": "mdbox:~/mdbox"}},
        index=True,
    ),
    # No web server before.
    "system-bookworm": Operator(
        "bookworm", system_users, login="anna", settings={"worker": {"mail_root": "/var/bascule-mail"}}
    ),
    # And mailboxes that move to below /home.
    "system-trixie": Operator(
        "trixie", system_users, login="anna", settings={"worker": {"mail_root": "/home/bascule"}}
    ),
    "mariadb-bookworm": Operator(
        "bookworm",
        mariadb,
        packages="apache2 mariadb-server postfix-mysql dovecot-mysql dovecot-sieve",
        works=senders_are_known,
    ),
    # Everything that stands between Postfix and itself, and folders that are named otherwise.
    "filtered-bookworm": Operator(
        "bookworm", filtered, packages="nginx-light", works=passes_the_filter, legacy=PrefixedSite, public="Public.News"
    ),
}
