"""The whole story on real servers: from the first check of the legacy settings to the closed domain.

Everything is done as the people concerned do it: the administrator with the
command ``bascule`` and psql, users in a browser and in their mail clients.
Ends with a count of every message, and fails loudly if one is lost or doubled.
"""

from __future__ import annotations

import smtplib
import sys
from collections import Counter
from functools import partial
from random import Random

from imapclient import IMAPClient
from imapclient.exceptions import IMAPClientError, LoginError

from bascule.lab.mail import (
    Ledger,
    Traffic,
    differences,
    fill_mailbox,
    found_in_new,
    message,
    put_large_message,
    read_mailbox,
    send,
    submit,
)
from bascule.lab.process import LabError, free_ports, program, run
from bascule.lab.sites import DOMAIN, Lab, eventually
from bascule.lab.telling import Telling
from bascule.lab.visitor import Visitor, plain

USERS = {
    "alice": "correct horse",  # asks at the URL
    "bob": "pâte à papier",  # merely logs in
    "carol": "tide-table-9",  # comes late
    "scanner": "office-scanner",  # a technical account; no person uses it
}
ALIASES = {"info": "alice"}
MESSAGES = 120  # in each person's mailbox, before traffic


def address(name: str) -> str:
    return f"{name}@{DOMAIN}"


def _has_ended(client: IMAPClient) -> bool:
    try:
        client.noop()
    except (OSError, IMAPClientError):
        return True
    return False


class Story(Telling):
    """The steps, in order; each prints what it does and insists on what must hold."""

    def __init__(self, lab: Lab) -> None:
        super().__init__()
        self.lab = lab
        self.ledger = Ledger()
        self.random = Random(42)  # noqa: S311 (mail, not keys)
        self.url = ""

    def bascule(self, *arguments: str, stdin: str = "", fails: bool = False) -> str:
        """Run the administrator's command and show it."""
        print(f"           $ bascule {' '.join(arguments)}", flush=True)
        done = self.lab.new.cli(*arguments, stdin=stdin)
        self.show(done.stdout)
        self.insist((done.returncode != 0) == fails, f"exit status {done.returncode} of bascule {arguments[0]}")
        return done.stdout

    def psql(self, query: str) -> str:
        """Run a query in psql, as an administrator, and show the table."""
        print(f"           $ psql bascule -c '{query}'", flush=True)
        table = run(program("psql"), "--no-psqlrc", "-d", self.lab.new.postgres.dsn("bascule_admin"), "-c", query)
        self.show(table)
        return table

    def run(self) -> None:
        self.build()
        self.check()
        self.activate()
        with Traffic(self.lab.new.smtp_port, ["alice", "bob", "carol", "scanner"], self.ledger) as traffic:
            self.everything_goes_to_legacy()
            self.alice_asks_at_the_url()
            self.bob_logs_in()
            self.both_have_moved()
            self.a_colleague_writes_inside_legacy()
            self.closing_is_refused()
            self.the_others_move()
            self.tell(f"traffic from outside never stopped: {traffic.sent} messages so far")
        self.nothing_is_left_in_queues()
        self.close()
        self.count()

    # The steps --------------------------------------------------------------------

    def build(self) -> None:
        self.tell(
            "two sites are built on loopback: legacy (Dovecot, Postfix) and new (PostgreSQL, Postfix, Dovecot, bascule)"
        )
        self.tell(f"everything of it is in {self.lab.folder}, and is removed at the end")
        self.lab.create(USERS, ALIASES)
        for name in USERS:
            fill_mailbox(self.lab.legacy, name, self.ledger, self.random, messages=MESSAGES if name != "scanner" else 5)
        put_large_message(self.lab.legacy, "bob", self.ledger, self.random)
        self.tell("mailboxes are filled: folders, flags, keywords, dates since 2004, malformed messages, one of 21 MB")

    def check(self) -> None:
        self.tell("the administrator gives the legacy settings, wrong in every way first; each is said in plain words")
        new, ports = self.lab.new, self.lab.legacy.dovecot.ports
        silent = str(free_ports(1)[0])
        for what, options, words in (
            ("wrong host", ("--imap-host", "no-such-host.invalid"), "no-such-host.invalid"),
            ("wrong port", ("--imap-port", silent), "nothing listens"),
            ("wrong TLS mode", ("--imap-port", str(ports.imap)), "does not speak TLS"),
            ("wrong TLS name", ("--imap-host", "127.0.0.1"), "not made for the name"),
            ("wrong SMTP port", ("--smtp-port", silent), "nothing listens"),
        ):
            self.lab.prepare(*options)
            self.tell(f"{what}: {' '.join(options)}")
            text = self.bascule("check", DOMAIN, fails=True)
            self.insist(words in text, f"{what} is told in plain words")
        self.lab.prepare("--messages")
        self.tell("wrong password, unknown user")
        self.insist(
            "refuses the login"
            in self.bascule(
                "check",
                DOMAIN,
                "--user",
                address("alice"),
                "--password-file",
                "-",
                stdin="not hers\n",
                fails=True,
            ),
            "a wrong password is told",
        )
        self.insist(
            "refuses mail for nobody"
            in self.bascule(
                "check", DOMAIN, "--user", address("nobody"), "--password-file", "-", stdin="x\n", fails=True
            ),
            "an unknown address is told",
        )
        self.tell("all settings right: the DNS is looked at, too, and a probe message goes through both servers")
        new.start_dns(mx="legacy.lab.test", ttl=86400)
        text = self.bascule(
            "check", DOMAIN, "--user", address("alice"), "--password-file", "-", stdin=USERS["alice"] + "\n"
        )
        self.insist("Lower its TTL to 300 first, 86400 s before" in text, "the long TTL is told")
        self.insist("came through to the legacy INBOX" in text and "no loop" in text, "the probe has arrived")
        self.insist("logs in here and sees the" in text, "the login is proxied")
        self.insist(not new.sql("SELECT 1 FROM bascule.mailboxes"), "checking has moved nobody")

    def activate(self) -> None:
        self.tell("the MX points here, migration is activated; this URL goes to the users")
        self.lab.new.start_dns()
        self.url = self.bascule("activate", DOMAIN).strip()
        self.insist("all here" in self.bascule("check", DOMAIN), "the new MX is seen")

    def everything_goes_to_legacy(self) -> None:
        self.tell("mail for the domain enters the new Postfix and is relayed to legacy for everybody")
        port = self.lab.new.smtp_port
        for name in USERS:
            send(port, f"first-{name}@outside.test", name, self.ledger, self.random)
        send(port, "to-info@outside.test", "alice", self.ledger, self.random, recipient=address("info"))
        try:
            with smtplib.SMTP("127.0.0.1", port, timeout=60) as smtp:
                smtp.sendmail("sender@elsewhere.test", [address("nobody")], "Subject: x\r\n\r\n")
            raise LabError("mail for an unknown address was taken")
        except smtplib.SMTPRecipientsRefused as error:
            code, text = error.recipients[address("nobody")]
            self.insist(code == 550, f"an unknown recipient is refused for good, not with {code}")
            self.tell(f"an unknown recipient is refused at once: {code} {text.decode()}")
        for name in USERS:
            eventually(
                f"mail of {name} at legacy",
                partial(self._at_legacy, name, f"first-{name}@outside.test"),
            )
        eventually("mail to the alias at legacy", lambda: self._at_legacy("alice", "to-info@outside.test"))

    def _has_moved(self, name: str) -> bool:
        return self.lab.new.state(name) == "local"

    def _at_legacy(self, name: str, identity: str) -> bool:
        with self.lab.legacy.client(name) as client:
            client.select_folder("INBOX", readonly=True)
            return bool(client.search(["HEADER", "Message-ID", identity]))

    def alice_asks_at_the_url(self) -> None:
        self.tell("alice opens the URL; what she gets wrong is told and changes nothing")
        stranger = Visitor(self.url[:-4] + "AAAA")
        page = plain(stranger.open())
        self.show(f"wrong link: {stranger.status} {page}")
        self.insist(stranger.status == 404, "a wrong link is not found")
        alice = Visitor(self.url)
        for what, fields in (
            ("wrong password", (address("alice"), "not mine", "Quay", "Alice")),
            ("unknown address", (address("nobody"), "x", "Body", "No")),
            ("outside the domain", ("alice@elsewhere.test", USERS["alice"], "Quay", "Alice")),
            ("a field left empty", (address("alice"), USERS["alice"], "", "Alice")),
        ):
            alice.request(*fields)
            self.show(f"{what}: {alice.status} {alice.problem}")
            self.insist(alice.status == 422, f"{what} is refused")
        self.insist(not self.lab.new.sql("SELECT 1 FROM bascule.mailboxes"), "nothing was changed")
        self.show("all right: " + alice.request(address("alice"), USERS["alice"], "Quay", "Alice"))
        self.insist(alice.url in self.url, "she is sent to her progress")
        again = Visitor(self.url)
        again.request(address("alice"), USERS["alice"], "Quay", "Alice")
        self.insist(again.status == 200, "who asks again, on her telephone, sees the same progress")
        self.alice = alice

    def bob_logs_in(self) -> None:
        self.tell("bob merely logs in to the new server with his old password, and is proxied to legacy")
        try:
            with self.lab.new.client("bob", "wrong"):
                raise LabError("a wrong password was accepted")
        except LoginError as error:
            self.show(f"wrong password: {error}")
        with self.lab.new.client("bob", USERS["bob"]) as bob:
            self.tell("while he is copied he goes on working: flags, files, deletes, writes a draft, submits mail")
            bob.select_folder("INBOX")
            first = bob.search(["HEADER", "Message-ID", "first-bob@outside.test"])
            bob.add_flags(first, ["\\Flagged", "urgent"])
            bob.move(first, "Archive")
            doomed = bob.search(["HEADER", "Message-ID", "nul-bob@malformed.test"])
            bob.add_flags(doomed, ["\\Deleted"])
            bob.expunge(doomed)
            self.ledger.take_back("nul-bob@malformed.test")
            bob.append(
                "Sent",
                message(self.ledger.give("draft@bob.test", "bob"), address("carol"), self.random),
                ["\\Draft"],
            )
            submit(
                self.lab.new.dovecot.ports.submission,
                "bob",
                USERS["bob"],
                "carol",
                "submitted@bob.test",
                self.ledger,
                self.random,
            )
            eventually("what he submitted is with carol", lambda: self._at_legacy("carol", "submitted@bob.test"))
            eventually("his session is ended for the cutover", lambda: _has_ended(bob), 120)
            self.tell("his session was ended for the cutover; his client connects again, with the same password")
        with self.lab.new.client("bob", USERS["bob"]) as bob:
            bob.select_folder("Archive")
            self.insist(bob.search(["HEADER", "Message-ID", "first-bob@outside.test"]), "what he filed is filed")
            self.insist(self.lab.new.state("bob") == "local", "his login waited for the flip")

    def both_have_moved(self) -> None:
        last = ""

        def moved() -> bool:
            nonlocal last
            rows = self.lab.new.sql(
                "SELECT address, state, messages_copied, messages_total FROM bascule.mailboxes ORDER BY address"
            )
            text = ", ".join(f"{box}: {state} {copied}/{total}" for box, state, copied, total in rows)
            if text != last:
                self.show(text)
                last = text
            states = {str(row[0]): row[1] for row in rows}
            return states.get(address("alice")) == "local" and states.get(address("bob")) == "local"

        self.tell("both are copied in the background while mail keeps arriving; then the short cutover")
        eventually("alice and bob have moved", moved, 180)
        for name in ("alice", "bob"):
            self._moved_faithfully(name)
        self.show("alice's page: " + self.alice.progress())

    def _moved_faithfully(self, name: str) -> None:
        eventually(
            f"the last message of {name}",
            lambda: self.lab.new.sql(
                "SELECT 1 FROM bascule.mailboxes WHERE address = %s AND last_message_at IS NOT NULL",
                address(name),
            ),
        )
        with self.lab.legacy.client(name) as client:
            legacy = read_mailbox(client)
        last = [uid for uid, seen in legacy["INBOX"].messages.items() if seen.message_id.startswith("bascule-last-")]
        self.insist(len(last) == 1, "exactly one last message is in the legacy mailbox")
        self.insist(last[0] == max(legacy["INBOX"].messages), "it is the very last one")
        del legacy["INBOX"].messages[last[0]]
        # What came late has no UID that a client here ever saw; the count at the end has it.
        for folder, uid in self.lab.new.sql(
            "SELECT folder, uid FROM bascule.stragglers WHERE address = %s", address(name)
        ):
            legacy[folder].messages.pop(uid, None)
        with self.lab.new.client(name, USERS[name]) as client:
            new = read_mailbox(client)
        welcomes = [
            uid for uid, seen in new["INBOX"].messages.items() if seen.message_id.startswith("bascule-welcome-")
        ]
        self.insist(len(welcomes) == 1, "exactly one welcome is in the mailbox here")
        del new["INBOX"].messages[welcomes[0]]
        different = differences(legacy, new)
        self.insist(not different, "\n".join(different[:5]))
        compared = sum(len(folder.messages) for folder in legacy.values())
        self.tell(
            f"{name} has moved, same password; {compared} messages in {len(legacy)} folders are the same: "
            "UIDVALIDITY, UIDs, flags, keywords, dates, bytes"
        )

    def a_colleague_writes_inside_legacy(self) -> None:
        self.tell(
            "new mail for alice is delivered here, for carol relayed; carol writes to alice inside the legacy server"
        )
        send(self.lab.new.smtp_port, "after-alice@outside.test", "alice", self.ledger, self.random)
        eventually("new mail is local", lambda: self._here("alice", "after-alice@outside.test"))
        self.insist(
            not self._at_legacy("alice", "after-alice@outside.test"),
            "mail for alice no longer goes to legacy",
        )
        send(self.lab.new.smtp_port, "after-carol@outside.test", "carol", self.ledger, self.random)
        eventually("carol's mail is relayed", lambda: self._at_legacy("carol", "after-carol@outside.test"))
        send(self.lab.legacy.smtp_port, "colleague@legacy.test", "alice", self.ledger, self.random)
        eventually("the straggler is brought", lambda: self._here("alice", "colleague@legacy.test"))
        self.tell("the message that went to alice's old mailbox was swept into the new one")

    def _here(self, name: str, identity: str) -> bool:
        with self.lab.new.client(name, USERS[name]) as client:
            client.select_folder("INBOX", readonly=True)
            return bool(client.search(["HEADER", "Message-ID", identity]))

    def closing_is_refused(self) -> None:
        eventually(
            "everybody who gets mail is seen",
            lambda: len(self.lab.new.sql("SELECT 1 FROM bascule.forgotten")) >= 3,
        )
        self.tell("who has moved, who is forgotten? In psql: a person who did not come, a technical account, an alias")
        self.psql("SELECT address, state, messages_total, migrated_at FROM bascule.migrated")
        self.psql("SELECT address, messages, last_seen FROM bascule.forgotten")
        self.bascule("status", DOMAIN)
        text = self.bascule("close", DOMAIN, fails=True)
        self.insist(all(address(name) in text for name in ("carol", "scanner", "info")), "the refusal names everybody")

    def the_others_move(self) -> None:
        self.tell("the administrator assigns the alias and asks for the two others, after some mistakes")
        self.bascule("request", address("nobody"), "--password-file", "-", stdin="x\n", fails=True)
        self.bascule("request", "carol@elsewhere.test", "--password-file", "-", stdin="x\n", fails=True)
        self.bascule("request", address("carol"), "--password-file", "-", stdin="wrong\n", fails=True)
        self.bascule("alias", address("info"), address("alice"))
        rows = [f"{address(name)},{USERS[name]},{name.title()},Quay" for name in ("carol", "scanner")]
        head = "address,password,first_name,last_name"
        self.bascule("import", DOMAIN, "-", stdin="\n".join([head, *rows, f"{address('carol')},x,,"]), fails=True)
        self.bascule("import", DOMAIN, "-", stdin="\n".join([head, *rows]))
        for name in ("carol", "scanner"):
            eventually(f"{name} has moved", partial(self._has_moved, name), 180)
            self._moved_faithfully(name)
        send(
            self.lab.new.smtp_port,
            "info-after@outside.test",
            "alice",
            self.ledger,
            self.random,
            recipient=address("info"),
        )
        eventually("mail to the alias is local", lambda: self._here("alice", "info-after@outside.test"))

    def nothing_is_left_in_queues(self) -> None:
        for name, postfix in (("new", self.lab.new.postfix), ("legacy", self.lab.legacy.postfix)):
            eventually(f"the queue of the {name} Postfix is empty", postfix.is_empty, 120)

    def close(self) -> None:
        self.tell("nobody is forgotten: the domain is closed")
        self.insist("(0 rows)" in self.psql("SELECT * FROM bascule.forgotten"), "nobody is forgotten")
        eventually("no obstacle is left", lambda: not self.lab.new.sql("SELECT 1 FROM bascule.closing_obstacles"))
        self.bascule("report", DOMAIN)
        self.bascule("report", DOMAIN, "--html", str(self.lab.folder / "report.html"))
        self.bascule("close", DOMAIN)
        self.bascule("status")
        erased = self.lab.new.sql(
            "SELECT count(*) FROM bascule.mailbox WHERE sealed_credential IS NOT NULL", role="postgres"
        )
        self.insist(erased == [(0,)], "the credentials are erased")
        self.tell("the legacy IMAP server is switched off: everybody goes on; who is not here is refused, not put off")
        self.lab.legacy.dovecot.stop()
        for name, password in USERS.items():
            with self.lab.new.client(name, password) as client:
                client.select_folder("INBOX", readonly=True)
        send(self.lab.new.smtp_port, "after-close@outside.test", "bob", self.ledger, self.random)
        eventually("mail goes on", lambda: self._here("bob", "after-close@outside.test"))
        try:
            with self.lab.new.client("nobody", "x"):
                raise LabError("nobody was let in")
        except LoginError as error:
            self.insist("AUTHENTICATIONFAILED" in str(error), f"refused, not {error}")
        events = self.lab.new.sql("SELECT count(*) FROM bascule.events")[0][0]
        self.tell(f"the journal has {events} events")

    def count(self) -> None:
        found: dict[str, Counter[str]] = found_in_new(self.lab.new, USERS)
        count = self.ledger.compare(found)
        self.tell(f"count: {count}")
        count.insist()


def main() -> int:
    """Run the story; exit status 1, with the reason, when anything does not hold."""
    try:
        with Lab() as lab:
            try:
                Story(lab).run()
            except LabError:
                for daemon in lab.new.daemons:
                    print(f"--- the log of {daemon.name} ends so:\n{daemon.tail(15)}", file=sys.stderr)
                raise
    except LabError as error:
        print(f"\nTHE STORY FAILED: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nThe story was interrupted. Nothing is left running.", file=sys.stderr)
        return 130
    print("\nThe story is told: none lost, none doubled. Nothing is left running.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
