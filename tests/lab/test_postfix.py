"""A Postfix that somebody else runs, with bascule plugged in by the role's own module: both sides' settings hold."""

from __future__ import annotations

import asyncio
import grp
import os
import re
import signal
import smtplib
import socketserver
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from random import Random

import pytest

from bascule import plugged
from bascule.config_templates import environment, render
from bascule.lab.activated import Activated
from bascule.lab.mail import message
from bascule.lab.main_cf import main_cf
from bascule.lab.process import VMAIL, free_ports, program, run
from bascule.lab.servers import TEMPLATES, settings_once
from bascule.lab.sites import DOMAIN, SERVICE, Lab, LegacySite, NewSite, eventually, full

pytestmark = pytest.mark.lab

Request = Callable[[str], None]
Await = Callable[..., None]
SHOP = "shop.test"
UNIT = {"restart_backs_off": False, "database_password": False, "bin": "/opt", "postfix_queue": "/var/spool/postfix"}
#: A client that is not of the operator's networks; all of 127/8 is this machine.
OUTSIDE = "127.0.0.9"


class Operator:
    """The Postfix of the new site as an operator runs it, and bascule in it."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.postfix = lab.new.postfix
        self.main, self.master = self.postfix.folder / "main.cf", self.postfix.folder / "master.cf"
        self.before = {path: path.read_text() for path in (self.main, self.master)}
        self.ports = free_ports(2)
        self.own = ""

    @property
    def block(self) -> str:
        queue = self.postfix.folder / "queue"
        return render("postfix/main.cf.j2", extends=True, postfix_queue=queue, **self.lab.new.settings.model_dump())

    def set_up(self, settings: str = "", services: str = "") -> None:
        base = environment(TEMPLATES).get_template("postfix-main.cf.j2")
        self.own = settings_once(
            base.render(folder=self.postfix.folder, address="127.0.0.1", hostname="new.lab.test")
            + f"virtual_mailbox_domains = {SHOP}\n"
            f"virtual_mailbox_maps = inline:{{ anna@{SHOP}=anna/, archive@{SHOP}=archive/ }}\n"
            f"virtual_mailbox_base = {self.lab.folder}/shop\n"
            f"virtual_uid_maps = static:{VMAIL}\nvirtual_gid_maps = static:{VMAIL}\nvirtual_transport = virtual\n"
            "virtual_mailbox_limit = 0\n"
            f"{settings}"
        )
        self.plug()
        self.master.write_text(self.before[self.master] + services)
        self.reload()

    def plug(self) -> None:
        text = main_cf.without_block(self.main.read_text() if "bascule: begin" in self.main.read_text() else self.own)
        self.main.write_text(main_cf.with_block(text, self.block)[0])

    def reload(self) -> None:
        """New services are there when master(8) has read its file; what it began with before is ended."""
        self.postfix.stop()
        self.postfix.start()

    def postconf(self, *arguments: str) -> str:
        return run(program("postconf"), "-c", str(self.postfix.folder), *arguments)

    def restore(self) -> None:
        for path, text in self.before.items():
            path.write_text(text)
        self.reload()

    def mail(self, name: str) -> list[str]:
        """The operator's own messages of a user."""
        return [path.read_text(errors="replace") for path in (self.lab.folder / "shop" / name / "new").glob("*")]


@pytest.fixture
def operator(lab: Lab) -> Iterator[Operator]:
    shop = lab.folder / "shop"
    shop.mkdir(exist_ok=True)
    os.chown(shop, VMAIL, VMAIL)
    made = Operator(lab)
    try:
        yield made
    finally:
        made.restore()


def send(
    lab: Lab, recipient: str, identity: str, random: Random, *, client: str = "127.0.0.1", port: int | None = None
) -> dict[str, tuple[int, bytes]]:
    """One message; what was said of a recipient that was refused."""
    with smtplib.SMTP("127.0.0.1", port or lab.new.smtp_port, timeout=120, source_address=(client, 0)) as smtp:
        try:
            return smtp.sendmail("sender@elsewhere.test", [recipient], message(identity, "x@elsewhere.test", random))
        except smtplib.SMTPRecipientsRefused as refused:
            return refused.recipients


def received(site: LegacySite | NewSite, lab: Lab, name: str, identity: str) -> bytes | None:
    with site.client(name, lab.legacy.users[name]) as client:
        client.select_folder("INBOX", readonly=True)
        found = client.search(["HEADER", "Message-ID", identity])
        return bytes(client.fetch(found, ["BODY.PEEK[]"])[found[0]][b"BODY[]"]) if found else None


def questions(lab: Lab) -> float:
    """How many recipients the policy daemon has asked the legacy server about."""
    with urllib.request.urlopen(f"http://{lab.new.settings.policy_daemon.metrics}/metrics", timeout=5) as answer:
        return sum(map(float, re.findall(r"^bascule_legacy_probes_total\S* (\S+)", answer.read().decode(), re.M)))


def sightings(lab: Lab, name: str) -> int:
    rows = lab.new.sql("SELECT messages FROM bascule.forgotten WHERE address = %s", full(name))
    return int(rows[0][0]) if rows else 0


def missing(operator: Operator) -> list[str]:
    return asyncio.run(plugged.missing(operator.postfix.folder))


def test_both_sides_hold_whoever_edits(operator: Operator, random: Random) -> None:
    lab = operator.lab
    operator.set_up(
        "relay_domains = backup.test\ntransport_maps =\n    # old customers\n    inline:{ old.test=discard: }\n"
    )
    assert missing(operator) == []
    assert send(lab, f"anna@{SHOP}", "own@both.test", random) == {}
    assert send(lab, full("postfix-there"), "there@both.test", random) == {}
    assert send(lab, full("nobody-at-all"), "nobody@both.test", random)[full("nobody-at-all")][0] == 550
    eventually("own mail", lambda: any("own@both.test" in text for text in operator.mail("anna")))
    eventually("relayed", partial(received, lab.legacy, lab, "postfix-there", "there@both.test"))
    assert main_cf.without_block(operator.main.read_text()) == operator.own
    # A panel.
    operator.postconf("-e", "relay_domains = backup.test, second.test")
    assert missing(operator) == ["relay_domains"]
    operator.plug()
    assert missing(operator) == []
    assert operator.postconf("-h", "relay_domains").strip() == "$bascule_relay_domains, backup.test, second.test"
    operator.postconf("-e", "virtual_alias_maps = inline:{ info@shop.test=anna@shop.test }", "mydestination = x.test")
    operator.postconf("-#", "transport_maps")
    operator.plug()
    assert missing(operator) == []
    text = main_cf.without_block(operator.main.read_text())
    assert "relay_domains = backup.test, second.test\n" in text
    assert "virtual_alias_maps = inline:{ info@shop.test=anna@shop.test }\n" in text
    assert "$bascule" not in text
    operator.master.write_text(operator.master.read_text().replace("bascule-hold unix", "other-hold unix"))
    assert missing(operator) == ["bascule-hold/unix"]


def test_nothing_of_the_operator_s_own_verification_changes(operator: Operator) -> None:
    operator.set_up()
    names = [line.split(" ")[0] for line in operator.postconf("-d").splitlines()]
    settings = [each for each in names if "verif" in each or each == "recipient_delimiter"]
    assert operator.postconf(*settings) == operator.postconf("-d", *settings)


def test_the_legacy_server_is_asked_behind_what_rejects_and_counts_what_came_in(
    operator: Operator, random: Random
) -> None:
    lab = operator.lab
    operator.set_up(
        "mynetworks = 127.0.0.1/32\n"
        "smtpd_recipient_restrictions = permit_mynetworks, reject_unauth_destination,\n"
        f"    check_client_access inline:{{ {OUTSIDE}=REJECT }},\n"
        "    check_sender_access inline:{ sender@elsewhere.test=DUNNO }, permit\n"
        "smtpd_end_of_data_restrictions = check_client_access inline:{ 127.0.0.8=REJECT }\n"
    )
    before = questions(lab)
    for recipient in ("postfix-asked", "nobody-is-here"):
        assert send(lab, full(recipient), "x@rbl.test", random, client=OUTSIDE)[full(recipient)][0] == 554
    assert questions(lab) == before
    # Others, and those who are permitted before anything is rejected.
    for client in ("127.0.0.7", "127.0.0.1"):
        refused = send(lab, full(f"nobody-{client}"), "x@rbl.test", random, client=client)
        assert refused[full(f"nobody-{client}")][0] == 550
    with pytest.raises(smtplib.SMTPDataError):
        send(lab, full("postfix-asked"), "refused@counted.test", random, client="127.0.0.8")
    assert send(lab, full("postfix-asked"), "one@counted.test", random, client="127.0.0.7") == {}
    eventually("counted", lambda: sightings(lab, "postfix-asked") == 1)


def test_people_send_as_themselves_and_as_their_aliases(
    operator: Operator, random: Random, request_move: Request, await_state: Await
) -> None:
    lab = operator.lab
    if lab.new.state("postfix-here") != "local":
        request_move("postfix-here")
    await_state("postfix-here")
    for alias, owner in (("desk", "postfix-here"), ("door", "postfix-there")):
        done = lab.new.cli("expect", full(owner)) if owner == "postfix-there" else None
        assert done is None or done.returncode == 0, done.stdout
        done = lab.new.cli("alias", full(alias), full(owner))
        assert done.returncode == 0, done.stdout
    operator.set_up(
        f"smtpd_sasl_auth_enable = yes\nsmtpd_sasl_type = dovecot\nsmtpd_sasl_path = {lab.new.dovecot.folder}/sasl\n"
        f"smtpd_sender_login_maps = inline:{{ anna@{SHOP}=anna@{SHOP} }}\n"
        "smtpd_sender_restrictions = reject_sender_login_mismatch\n"
    )

    def may(user: str, sender: str) -> bool:
        with smtplib.SMTP("127.0.0.1", lab.new.smtp_port, timeout=60) as smtp:
            smtp.login(full(user), lab.legacy.users[user])
            smtp.mail(sender)
            code, text = smtp.rcpt(full("postfix-there"))
            assert code == 250 or b"not owned by user" in text
            return code == 250

    eventually("the alias is known", partial(may, "postfix-here", full("desk")))
    for user, alias, other in (("postfix-here", "desk", "postfix-there"), ("postfix-there", "door", "postfix-here")):
        assert may(user, full(user))
        assert may(user, full(f"{user}+tag"))
        assert may(user, full(alias))
        assert not may(user, full(other))
        assert not may(user, f"anna@{SHOP}")
        assert not may(user, full("desk" if alias == "door" else "door"))


def test_filters_archives_and_submit_lists_do_not_see_barriers(
    operator: Operator, request_move: Request, await_state: Await
) -> None:
    """With a filter that is dead, a move goes on: only mail waits for it."""
    operator.set_up(
        f"always_bcc = archive@{SHOP}\nauthorized_submit_users = root\n"
        f"content_filter = smtp:[127.0.0.1]:{operator.ports[0]}\n"
    )
    archived = len(operator.mail("archive"))
    request_move("postfix-filtered")
    await_state("postfix-filtered")
    eventually("the last barrier is through", operator.postfix.is_empty)
    assert len(operator.mail("archive")) == archived
    assert "barrier" in operator.postfix.log()


@contextmanager
def filtering(operator: Operator) -> Iterator[None]:
    """A content filter after the queue, as FILTER_README has it: in by one port, back by another; here a Postfix of
    its own kind, which does nothing but take and give."""
    there, back = operator.ports
    operator.set_up(
        f"content_filter = smtp:[127.0.0.1]:{there}\n",
        f"127.0.0.1:{there} inet n - n - - smtpd\n"
        f"  -o content_filter=smtp:[127.0.0.1]:{back} -o smtpd_milters= -o smtpd_recipient_restrictions=\n"
        f"127.0.0.1:{back} inet n - n - - smtpd\n"
        "  -o content_filter= -o receive_override_options=no_address_mappings,no_unknown_recipient_checks\n"
        "  -o smtpd_recipient_restrictions=permit_mynetworks,reject\n",
    )
    yield


def test_a_content_filter_is_no_loop_and_a_loop_behind_it_is_one(
    operator: Operator, random: Random, request_move: Request, await_state: Await
) -> None:
    lab = operator.lab
    if lab.new.state("postfix-here") != "local":
        request_move("postfix-here")
    await_state("postfix-here")
    lab.legacy.send_back({"circled": lab.new.smtp_port})
    lab.legacy.postfix.reload()
    try:
        with filtering(operator):
            for name, site in (("postfix-here", lab.new), ("postfix-seen", lab.legacy)):
                identity = f"{name}@filtered.test"
                assert send(lab, full(name), identity, random) == {}
                found = eventually(identity, partial(received, site, lab, name, identity))
                assert found.count(b"Bascule-Stamp: ") == 2
                assert found.count(b"Bascule-Trace: ") == 1
            eventually("counted", lambda: sightings(lab, "postfix-seen"))
            assert sightings(lab, "postfix-seen") == 1
            refused = lab.new.milter.tail(10_000).count("loop refused")
            assert send(lab, full("circled"), "circle@filtered.test", random) == {}
            eventually("refused", lambda: lab.new.milter.tail(10_000).count("loop refused") == refused + 1)
            assert received(lab.legacy, lab, "circled", "circle@filtered.test") is None
            eventually("nothing circles", operator.postfix.is_empty)
    finally:
        lab.legacy.send_back({})
        lab.legacy.postfix.reload()


def test_what_else_an_operator_has_stays_as_it_is(operator: Operator, random: Random) -> None:
    """postscreen before smtpd, a relayhost, addresses rewritten, copies of some."""
    lab = operator.lab
    door = operator.ports[0]
    operator.set_up(
        f"relayhost = [127.0.0.1]:{operator.ports[1]}\n"
        f"recipient_bcc_maps = inline:{{ {full('postfix-there')}=archive@{SHOP} }}\n"
        "sender_canonical_maps = inline:{ sender@elsewhere.test=SRS0=x@new.lab.test }\n"
        "sender_canonical_classes = envelope_sender\npostscreen_greet_wait = 1s\n",
        f"127.0.0.1:{door} inet n - n - 1 postscreen\nsmtpd pass - - n - - smtpd\n"
        "dnsblog unix - - n - 0 dnsblog\ntlsproxy unix - - n - 0 tlsproxy\n",
    )  # fmt: skip
    assert send(lab, full("postfix-there"), "screened@stays.test", random, port=door) == {}
    found = eventually("relayed", partial(received, lab.legacy, lab, "postfix-there", "screened@stays.test"))
    assert b"Return-Path: <SRS0=x@new.lab.test>" in found
    assert found.count(b"Bascule-Trace: ") == 1
    eventually("the copy", lambda: any("screened@stays.test" in text for text in operator.mail("archive")))


def test_greylisting_is_not_remembered_and_not_called_unknown(lab: Lab, random: Random) -> None:
    recipient = full("postfix-grey")
    conf = (program("postconf"), "-c", str(lab.legacy.postfix.folder))
    restrictions = run(*conf, "-h", "smtpd_recipient_restrictions").strip()
    try:
        grey = f"check_recipient_access inline:{{ {{{recipient}=451 4.7.1 greylisted}} }}"
        run(*conf, "-e", f"smtpd_recipient_restrictions = {grey}, {restrictions}")
        lab.legacy.postfix.reload()
        code, text = eventually("put off", lambda: send(lab, recipient, "x@grey.test", random).get(recipient))
        assert code == 450
        assert b"greylisted" in text
        assert b"no such user" not in text
    finally:
        run(*conf, "-e", f"smtpd_recipient_restrictions = {restrictions}")
        lab.legacy.postfix.reload()
    eventually("let in", lambda: send(lab, recipient, "in@grey.test", random) == {}, 120)
    eventually("relayed", partial(received, lab.legacy, lab, "postfix-grey", "in@grey.test"))


def test_mail_to_the_legacy_server_waits_for_a_good_certificate(lab: Lab, random: Random) -> None:
    recipient = full("postfix-tls")
    certificate = lab.new.certificate
    conf = (program("postconf"), "-c", str(lab.legacy.postfix.folder))
    run(
        *conf, "-e", f"smtpd_tls_cert_file = {certificate.chain}", f"smtpd_tls_key_file = {certificate.key}",
        "smtpd_tls_security_level = may", "smtpd_tls_received_header = yes",
    )  # fmt: skip
    lab.legacy.postfix.reload()
    assert send(lab, recipient, "may@tls.test", random) == {}  # known from now on
    eventually("relayed", partial(received, lab.legacy, lab, "postfix-tls", "may@tls.test"))
    change = "UPDATE bascule.domain SET smtp_tls = %s, smtp_host = %s WHERE name = %s"
    try:
        lab.new.sql(change, "verify", "127.0.0.1", DOMAIN)  # it has a certificate for localhost only

        socketmap = f"socketmap:{lab.new.settings.policy_daemon.socketmap}:transport"
        ask = (program("postmap"), "-c", str(lab.new.postfix.folder), "-q", recipient, socketmap)
        eventually("the route", lambda: run(*ask).startswith("bascule-relay-verify:"))
        # The queue manager keeps the last recipient's route for half a minute.
        for each in (full("postfix-there"), recipient):
            assert send(lab, each, "verify@tls.test", random) == {}
        words = "Server certificate not verified"
        eventually("not sent without a good certificate", lambda: words in str(lab.new.postfix.queue()))
        assert received(lab.legacy, lab, "postfix-tls", "verify@tls.test") is None
        lab.new.sql(change, "verify", "localhost", DOMAIN)
        found = eventually("sent with one", partial(received, lab.legacy, lab, "postfix-tls", "verify@tls.test"))
        assert b"using TLSv1" in found
    finally:
        lab.new.sql(change, "may", "127.0.0.1", DOMAIN)
    eventually("nothing is left", lab.new.postfix.is_empty)


def test_a_policy_daemon_that_hangs_costs_others_seconds(
    operator: Operator, random: Random, record_property: Callable[[str, object], None]
) -> None:
    """Its service manager ends it, with the limit that its unit names; until then Postfix waits at its socket. Mail of
    the operator's own comes in, mail of ours is put off at most, and nothing is refused for good."""
    lab = operator.lab
    operator.set_up()
    assert send(lab, full("postfix-there"), "before@hangs.test", random) == {}
    unit = render("systemd/bascule-policy-daemon.service.j2", **UNIT)
    limit = re.search(r"^WatchdogSec=(\d+)s$", unit, re.MULTILINE)
    assert limit is not None
    assert "WatchdogSignal=SIGKILL" in unit  # another one does not reach a process that is stopped
    mine = lab.new.settings.policy_daemon
    paths = [Path(each.removeprefix("unix:")) for each in (mine.socketmap, mine.policy, mine.hold)]
    postdrop = grp.getgrnam("postdrop").gr_gid
    lab.new.policy_daemon.stop()
    try:
        part = Activated(
            lab.new.policy_daemon.command, paths, lab.folder, uid=SERVICE, gid=postdrop, watchdog=int(limit[1])
        )
        with part.running():
            assert send(lab, f"anna@{SHOP}", "serves@hangs.test", random) == {}
            os.kill(part.pid, signal.SIGSTOP)
            began = time.monotonic()
            assert send(lab, f"anna@{SHOP}", "own@hangs.test", random) == {}
            record_property("seconds", round(time.monotonic() - began, 1))
            assert part.killed == 1
            os.kill(part.pid, signal.SIGSTOP)
            said = send(lab, full("postfix-there"), "ours@hangs.test", random)
            assert all(code < 500 for code, _ in said.values())
            eventually("own mail", lambda: any("own@hangs.test" in text for text in operator.mail("anna")), 120)
            eventually("ours", lambda: send(lab, full("postfix-there"), "later@hangs.test", random) == {}, 120)
            eventually("relayed", partial(received, lab.legacy, lab, "postfix-there", "later@hangs.test"), 120)
            eventually("nothing is left", operator.postfix.is_empty, 120)
            assert "status=bounced" not in operator.postfix.log().rpartition("serves@hangs.test")[2]
    finally:
        lab.new.policy_daemon.start()


def test_a_milter_that_hangs_costs_a_message_seconds(operator: Operator, random: Random) -> None:
    lab = operator.lab
    operator.set_up()
    os.kill(lab.new.milter.pid, signal.SIGSTOP)
    try:
        for recipient, identity in ((f"anna@{SHOP}", "own@milter.test"), (full("postfix-there"), "ours@milter.test")):
            assert send(lab, recipient, identity, random) == {}
    finally:
        os.kill(lab.new.milter.pid, signal.SIGCONT)
    eventually("relayed", partial(received, lab.legacy, lab, "postfix-there", "ours@milter.test"))
    eventually("own mail", lambda: any("own@milter.test" in text for text in operator.mail("anna")))


class Store(socketserver.ThreadingUnixStreamServer):
    """An LMTP server that refuses each recipient with words of ours: a real one says them when its database dies."""

    def __init__(self, path: Path) -> None:
        self.refusals: dict[str, str] = {}
        super().__init__(str(path), Session)
        path.chmod(0o666)
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()

    def server_close(self) -> None:
        self.shutdown()
        self._thread.join()
        super().server_close()


class Session(socketserver.StreamRequestHandler):
    server: Store
    timeout = 30  # seconds that Postfix may be silent

    def handle(self) -> None:
        self.wfile.write(b"220 store\r\n")
        for line in map(bytes.decode, self.rfile):
            recipient = line.partition("<")[2].partition(">")[0]
            self.wfile.write(f"{self.server.refusals.get(recipient, '250 2.0.0 ok')}\r\n".encode())
            if line.startswith("QUIT"):
                break


def test_an_unknown_user_is_not_believed_and_the_rest_is_the_operator_s(operator: Operator, random: Random) -> None:
    """A message that is too big, over quota, or refused by a user's Sieve script is returned at once, as elsewhere."""
    lab = operator.lab
    path = lab.folder / "refusing"
    operator.set_up(
        f"virtual_mailbox_maps = inline:{{ gone@{SHOP}=x, full@{SHOP}=x, anna@{SHOP}=anna/ }}\n"
        f"transport_maps = inline:{{ gone@{SHOP}=bascule-lmtp:unix:{path}, full@{SHOP}=bascule-lmtp:unix:{path} }}\n"
    )
    with Store(path) as store:
        store.refusals = {
            f"gone@{SHOP}": f"550 5.1.1 <gone@{SHOP}> User doesn't exist: gone@{SHOP}",
            f"full@{SHOP}": f"552 5.2.2 <full@{SHOP}> Quota exceeded (mailbox for user is full)",
        }
        for name in ("gone", "full"):
            assert send(lab, f"{name}@{SHOP}", f"{name}@store.test", random) == {}
        eventually("returned", lambda: re.search(rf"to=<full@{SHOP}>.*status=bounced.*552", operator.postfix.log()))
        eventually("kept", lambda: re.search(rf"to=<gone@{SHOP}>.*status=deferred.*450", operator.postfix.log()))
        store.refusals = {}
        # It is there again.
        store.refusals[f"gone@{SHOP}"] = "550 5.2.2 enough of this test"
        operator.postfix.flush()
        eventually("tried again", lambda: re.search(rf"to=<gone@{SHOP}>.*status=bounced", operator.postfix.log()))
    run(program("postsuper"), "-c", str(operator.postfix.folder), "-d", "ALL")


def test_the_operator_s_delimiters_are_taken_and_a_name_of_its_own_wins(
    operator: Operator, request_move: Request, await_state: Await
) -> None:
    lab = operator.lab
    if lab.new.state("postfix-here") != "local":
        request_move("postfix-here")
    await_state("postfix-here")
    operator.set_up("recipient_delimiter = =+\n")
    lab.new.policy_daemon.stop()
    lab.new.policy_daemon.start()
    socketmap = f"socketmap:{lab.new.settings.policy_daemon.socketmap}:transport"

    def route(name: str) -> str:
        where = (program("postmap"), "-c", str(operator.postfix.folder), "-q")
        return run(*where, full(name), socketmap).partition(":")[0].strip()

    assert {route(f"postfix-here{detail}") for detail in ("", "=tag", "+tag", "+own")} == {"bascule-lmtp"}
    done = lab.new.cli("expect", full("postfix-here+own"))
    assert done.returncode == 0, done.stdout
    eventually("a mailbox of its own", lambda: route("postfix-here+own") == "relay")
    assert route("postfix-here+tag") == "bascule-lmtp"
    done = lab.new.cli("waive", full("postfix-here+own"), "--reason", "made for this test")
    assert done.returncode == 0, done.stdout
