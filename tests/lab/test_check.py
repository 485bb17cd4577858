"""``bascule check`` on real servers: what is right is found right, and each thing that is wrong is told."""

from __future__ import annotations

import json
import os
import re
import shutil
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from bascule import check as checks
from bascule.address import Address
from bascule.check import Finding, Subject, User
from bascule.check.dns import Resolver, check_client_names, check_mx, check_spf
from bascule.check.finding import Said
from bascule.credential import Password
from bascule.directory import Mode
from bascule.lab.dns import NameServer
from bascule.lab.process import VMAIL, Daemon, LabError, free_ports
from bascule.lab.servers import settings_once
from bascule.lab.sites import DOMAIN, MASTER, Lab, eventually, full
from bascule.legacy import LegacySettings, Service

pytestmark = pytest.mark.lab

JUNK = 'require ["fileinto", "mailbox"];\nfileinto :create "Junk";\n'


@pytest.fixture(autouse=True, scope="module")
def dns(lab: Lab) -> Iterator[None]:
    lab.new.start_dns()
    yield
    lab.new.dns.stop()


def check(lab: Lab, name: str, *options: str, only: str = "*") -> tuple[int, list[Finding]]:
    """Exit status and findings of a check with a user; ``options`` of the command itself."""
    done = lab.new.cli(
        *options,
        "check",
        DOMAIN,
        "--user",
        full(name),
        "--password-file",
        "-",
        "--json",
        "--only",
        only,
        stdin=lab.legacy.users[name] + "\n",
    )
    assert done.stdout.startswith("["), done.stdout
    return done.returncode, [Finding(**each) for each in json.loads(done.stdout)]


def wrong(findings: list[Finding]) -> list[str]:
    return [f"{each.area}: {each.text}" for each in findings if each.level == "wrong"]


def test_all_is_right_and_nobody_is_moved(lab: Lab) -> None:
    status, findings = check(lab, "checked")
    assert wrong(findings) == []
    assert status == 0
    text = "\n".join(finding.text for finding in findings)
    for words in (
        "TLSv1.3 with a good certificate",
        "checked@lab.test logs in, as 'checked@lab.test'",
        "refuses an address that does not exist",
        "MX of lab.test: new.lab.test, TTL 300 s",
        "SPF of lab.test for mail from new.lab.test (127.0.0.1): pass",
        "worker runs on",
        "main.cf asks bascule",
        "a probe message came through to the legacy INBOX",
        "no loop",
        "checked@lab.test logs in here and sees",
    ):
        assert words in text, words
    assert lab.new.state("checked") is None
    with lab.legacy.client("checked") as client:
        client.select_folder("INBOX", readonly=True)
        assert client.search() == []  # the probe is gone


def test_a_legacy_server_that_sends_the_mail_back(lab: Lab) -> None:
    lab.legacy.send_back({"checked-loop": lab.new.smtp_port})
    lab.legacy.postfix.reload()
    try:
        status, findings = check(lab, "checked-loop")
    finally:
        lab.legacy.send_back({})
        lab.legacy.postfix.reload()
    assert wrong(findings) == ["Postfix: the legacy server sent the probe back here, and the loop guard refused it"]
    assert status == 1


def test_a_legacy_server_that_takes_our_mail_for_spam(lab: Lab) -> None:
    home = lab.legacy.dovecot.folder / "mail" / "checked-junk"
    home.mkdir(parents=True, exist_ok=True)
    (home / ".dovecot.sieve").write_text(JUNK)
    for path in (home, home / ".dovecot.sieve"):
        os.chown(path, VMAIL, VMAIL)
    status, findings = check(lab, "checked-junk")
    assert status == 1
    assert wrong(findings) == [
        "Postfix: the legacy server files mail from here into 'Junk': it does not say why",
    ]
    with lab.legacy.client("checked-junk") as client:
        client.select_folder("Junk", readonly=True)
        assert client.search() == []


@contextmanager
def stopped(daemon: Daemon) -> Iterator[None]:
    daemon.stop()
    try:
        yield
    finally:
        daemon.start()


def test_a_milter_that_does_not_run(lab: Lab) -> None:
    with stopped(lab.new.milter):
        _, findings = check(lab, "checked")
    assert wrong(findings) == ["Postfix: the milter did not see it: loops would go unnoticed"]


def test_an_authenticator_that_does_not_run(lab: Lab) -> None:
    with stopped(lab.new.authenticator):
        status, findings = check(lab, "checked")
    assert status == 1
    told = wrong(findings)
    assert "bascule: no authenticator runs anywhere" in told
    assert not any(each.startswith("Dovecot: ") for each in told), "logins go on without it"


def test_a_policy_daemon_that_does_not_run(lab: Lab) -> None:
    with stopped(lab.new.policy_daemon):
        status, findings = check(lab, "checked")
    assert status == 1
    told = wrong(findings)
    assert "bascule: no policy_daemon runs anywhere" in told
    assert any(each.startswith("Postfix: ") for each in told)


def test_a_postfix_that_does_not_ask(lab: Lab, tmp_path: Path) -> None:
    """By a configuration beside the running one's: any process of Postfix that starts reads that."""
    running = lab.new.postfix.folder
    shutil.copy(running / "master.cf", tmp_path)
    unplugged = (
        (running / "main.cf").read_text().replace("transport_maps = socketmap", "transport_maps = static:error #")
    )
    (tmp_path / "main.cf").write_text(unplugged)
    settings = tmp_path / "bascule.toml"
    settings.write_text(lab.new.settings_file.read_text().replace(f'"{running}"', f'"{tmp_path}"'))
    _, findings = check(lab, "checked", "--settings", str(settings))
    assert f"Postfix: transport_maps does not name socketmap:{lab.new.settings.policy_daemon.socketmap}:transport" in (
        wrong(findings)
    )


def test_restrictions_and_tables_of_the_operators_are_told_by_their_names(lab: Lab) -> None:
    """Not for faults of the legacy server's, and each as what it is."""
    postfix = lab.new.postfix
    main = postfix.folder / "main.cf"

    def told(text: str, only: str) -> dict[str, tuple[str, str]]:
        with added(main, text, postfix.reload):
            return {each.name: (each.level, each.text) for each in check(lab, "checked", only=only)[1]}

    found = told("smtpd_client_restrictions = check_client_access inline:{ 127.0.0.1=REJECT }", "postfix.*")
    assert [found[f"postfix.{name}"][0] for name in ("recipient", "unknown-recipient")] == ["note", "note"]
    assert "takes no mail from this host itself" in found["postfix.recipient"][1]
    assert "postfix.probe" not in found
    found = told("soft_bounce = yes", "postfix.*")
    assert found["postfix.soft-settings"][0] == "note"
    assert {level for name, (level, _) in found.items() if name != "postfix.soft-settings"} == {"good"}
    aliases = re.search(r"^virtual_alias_maps = (.*)$", main.read_text(), re.MULTILINE)
    assert aliases is not None
    found = told(f"virtual_alias_maps = {aliases[1]}, inline:{{ {{@{DOMAIN}=anna@shop.test}} }}", "postfix.*")
    assert found["postfix.rewritten"][0] == "wrong"
    assert "postfix.probe" not in found


# What activate refuses, and nodes see by themselves ------------------------------------


def prepared(lab: Lab, name: str, *options: str) -> None:
    done = lab.new.cli(
        "domain", "add", name, "--imap-host", "localhost", "--imap-port", str(lab.legacy.ports.imaps), "--smtp-host",
        "127.0.0.1", "--smtp-port", str(lab.legacy.smtp_port), *options,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


def mode(lab: Lab, name: str) -> str:
    return str(lab.new.sql("SELECT mode FROM bascule.domain WHERE name = %s", name)[0][0])


@contextmanager
def added(path: Path, text: str, apply: Callable[[], object]) -> Iterator[None]:
    """Settings of main.cf, instead of what it says of them."""
    before = path.read_text()
    path.write_text(settings_once(f"{before}\n{text}\n"))
    apply()
    try:
        yield
    finally:
        path.write_text(before)
        apply()


def test_a_domain_of_postfixs_own_is_not_activated_and_a_node_sees_it(lab: Lab) -> None:
    prepared(lab, "wrong.test")
    daemon, main_cf = lab.new.policy_daemon, lab.new.postfix.folder / "main.cf"
    query = "SELECT name, level, text FROM bascule.findings WHERE domain = 'wrong.test'"
    with added(main_cf, "mydestination = wrong.test", lab.new.postfix.reload):
        refused = lab.new.cli("activate", "wrong.test")
        assert refused.returncode == 1
        assert "wrong.test is not activated:\nwrong.test is in mydestination (wrong.test)" in refused.stdout
        assert "Take it out there" in refused.stdout
        assert mode(lab, "wrong.test") == "prepared"
        with stopped(daemon):  # it looks soon after it is started
            pass
        seen = eventually("the node sees it", lambda: lab.new.sql(query))
        assert [row[:2] for row in seen] == [("postfix.domain-class", "wrong")]
        metrics = f"http://{lab.new.settings.policy_daemon.metrics}/metrics"
        sample = 'bascule_findings{domain="wrong.test",level="wrong",name="postfix.domain-class"} 1.0'
        eventually("and counts it", lambda: sample in urllib.request.urlopen(metrics).read().decode())
    # It is right now: what the node said holds until it looks again.
    assert "new.lab.test says: wrong.test is in mydestination" in lab.new.cli("activate", "wrong.test").stdout
    with stopped(daemon):
        pass
    eventually("the node sees it no more", lambda: not lab.new.sql(query))
    assert lab.new.cli("activate", "wrong.test").returncode == 0
    assert mode(lab, "wrong.test") == "active"


def test_who_knows_better_says_why(lab: Lab) -> None:
    prepared(lab, "forced.test")
    main_cf = lab.new.postfix.folder / "main.cf"
    with added(main_cf, "virtual_alias_domains = forced.test", lab.new.postfix.reload):
        without = lab.new.cli("activate", "forced.test", "--force")
        assert (without.returncode, mode(lab, "forced.test")) == (1, "prepared")
        assert "needs a reason" in without.stdout
        forced = lab.new.cli("activate", "forced.test", "--force", "--reason", "it is taken out tonight")
        assert (forced.returncode, mode(lab, "forced.test")) == (0, "active")
    ((reason,),) = lab.new.sql(
        "SELECT reason FROM bascule.events WHERE domain = 'forced.test' AND event = 'activated by force'"
    )
    assert reason.startswith("it is taken out tonight\npostfix.domain-class: forced.test is in virtual_alias_domains")


@pytest.mark.parametrize("which", ["imap", "smtp"])
def test_a_legacy_server_that_is_this_one(lab: Lab, which: str) -> None:
    """As after the name of the old server was pointed here."""
    name = f"self-{which}.test"
    port = lab.new.dovecot.ports.imap if which == "imap" else lab.new.smtp_port
    prepared(lab, name, f"--{which}-port", str(port))
    refused = lab.new.cli("activate", name)
    who = "the Dovecot of this host" if which == "imap" else "the Postfix of this host"
    assert (refused.returncode, mode(lab, name)) == (1, "prepared")
    assert f":{port}, and that is {who}: bascule would ask itself" in refused.stdout
    corrected = lab.legacy.ports.imaps if which == "imap" else lab.legacy.smtp_port
    assert lab.new.cli("domain", "set", name, f"--{which}-port", str(corrected)).returncode == 0
    assert lab.new.cli("activate", name).returncode == 0


def test_a_legacy_server_that_is_a_store(lab: Lab) -> None:
    prepared(lab, "store-self.test", "--imap-host", "store9.new.test")
    lab.new.cli("store", "store9", "inet:store9.new.test:24", "--login-host", "Store9.new.test")
    refused = lab.new.cli("activate", "store-self.test")
    assert refused.returncode == 1
    assert "that is the store store9 (Store9.new.test)" in refused.stdout


OWN = """
passdb {{
  driver = passwd-file
  args = scheme=PLAIN username_format=%u {users}
}}
userdb {{
  driver = passwd-file
  args = username_format=%u {users}
}}
"""


def test_a_user_of_the_operators_own_with_an_address_of_the_domain(lab: Lab) -> None:
    """The natural preparation in a panel: it would hide the mailbox that is copied."""
    dovecot = lab.new.dovecot
    users, before = dovecot.folder / "own-users", dovecot.config.read_text()
    home = dovecot.folder / "own" / "checked-own"
    home.mkdir(parents=True)
    os.chown(home, VMAIL, VMAIL)
    password = lab.legacy.users["checked-own"]
    users.write_text(f"{full('checked-own')}:{{PLAIN}}{password}:{VMAIL}:{VMAIL}::{home}::\n")
    users.chmod(0o644)
    with lab.legacy.client("checked-own") as client:
        client.append("INBOX", b"Subject: there\r\n\r\n")
    prepared(lab, "shadowed.test")
    try:
        # The operator's stand before ours.
        at = before.index("passdb {")
        dovecot.config.write_text(before[:at] + OWN.format(users=users) + before[at:])
        dovecot.doveadm("reload")
        status, findings = check(lab, "checked-own")
        told = {each.name: each.text for each in findings if each.level == "wrong"}
        assert status == 1
        assert "logs in here and sees another mailbox: 0 messages" in told["dovecot.login"]
        lab.new.cli("domain", "remove", "shadowed.test")
    finally:
        dovecot.config.write_text(before)
        dovecot.doveadm("reload")
    eventually("it is right again", lambda: wrong(check(lab, "checked-own")[1]) == [])


def test_the_operators_userdb_is_asked_though_ours_stands_before_it(lab: Lab) -> None:
    """As bascule is plugged in: ours answers for every address of a domain of ours, and what is behind it is hidden."""
    dovecot, name = lab.new.dovecot, "behind.test"
    users, before = dovecot.folder / "users-behind", dovecot.config.read_text()
    users.write_text(f"known@{name}::{VMAIL}:{VMAIL}::{dovecot.folder}/own/known::\n")
    users.chmod(0o644)
    prepared(lab, name)
    dovecot.config.write_text(before + OWN.format(users=users))
    dovecot.doveadm("reload")
    words = f"a userdb of this Dovecot knows known@{name} ({dovecot.folder}/own/known)"
    try:
        refused = lab.new.cli("activate", name)
        assert (refused.returncode, mode(lab, name)) == (1, "prepared"), refused.stdout
        assert words in refused.stdout
        users.write_text("")
        assert lab.new.cli("activate", name).returncode == 0
        known = "SELECT true FROM bascule.domains WHERE domain = %s AND mode = 'active'"
        eventually("it is active", lambda: lab.new.sql(known, name))
        only = ("check", name, "--only", "dovecot.userdb")
        eventually("nobody is known", lambda: "but bascule's knows an address" in lab.new.cli(*only).stdout)
        # The account is made in a panel when the domain moves already; LMTP and logins ask ours.
        users.write_text(f"known@{name}::{VMAIL}:{VMAIL}::{dovecot.folder}/own/known::\n")
        eventually("it is found", lambda: words in lab.new.cli(*only).stdout)
        assert lab.new.cli(*only).returncode == 1
        with pytest.raises(LabError, match="lookup failed"):
            dovecot.doveadm("user", "-x", "service=lmtp", f"known@{name}")
    finally:
        dovecot.config.write_text(before)
        dovecot.doveadm("reload")


NAMESPACE = """
namespace public {{
  prefix = {prefix}
  separator = {separator}
  list = {listed}
  location = maildir:{folder}/public:LAYOUT=fs
}}
"""


@pytest.mark.parametrize(
    ("prefix", "separator", "listed", "why"),
    [
        ("Public.", ".", "yes", "is listed with separator '.', and the legacy server has '/'"),
        ("Public", "/", "yes", "is listed with the prefix 'Public', which does not end in its separator '/'"),
        ("Public/", "/", "yes", ""),
        ("Public.", ".", "no", ""),
    ],
)
def test_a_namespace_of_the_operators(lab: Lab, prefix: str, separator: str, listed: str, why: str) -> None:
    dovecot = lab.new.dovecot
    text = NAMESPACE.format(prefix=prefix, separator=separator, listed=listed, folder=dovecot.folder)
    before = dovecot.config.read_text()
    dovecot.config.write_text(before + text)
    try:
        status, findings = check(lab, "checked", only="dovecot.namespaces")
    finally:
        dovecot.config.write_text(before)
    assert [each.level for each in findings] == (["wrong"] if why else ["good"]), findings
    assert (status, why in findings[0].text) == (1 if why else 0, True)


# Senders, and what the copy's own reader sees ---------------------------------------------

UNKNOWN_SENDERS = "smtpd_sender_restrictions = check_sender_access regexp:{{/[.]invalid$$/ 550 5.1.8 no such domain}}"


def test_a_legacy_server_that_verifies_senders(lab: Lab) -> None:
    """Mail that is refused there would be returned from here, to a sender that may be forged."""
    legacy, new = lab.legacy.postfix, lab.new.postfix
    with added(legacy.folder / "main.cf", UNKNOWN_SENDERS, legacy.reload):
        _, findings = check(lab, "checked", only="legacy.smtp.*")
        (said,) = [each for each in findings if each.name == "legacy.smtp.sender-verification"]
        assert said.level == "wrong"
        assert "550 5.1.8" in said.text
        assert "reject_unknown_sender_domain" in said.remedy
        with added(new.folder / "main.cf", UNKNOWN_SENDERS, new.reload):
            _, findings = check(lab, "checked", only="legacy.smtp.sender-verification")
            assert [each.level for each in findings] == ["good"]


def test_a_legacy_server_that_greylists(lab: Lab) -> None:
    legacy = lab.legacy.postfix
    grey = "smtpd_recipient_restrictions = check_sender_access regexp:{{/^bascule-/ 450 4.2.0 Greylisted, come again}}"
    with added(legacy.folder / "main.cf", f"{grey}, permit_mynetworks, reject", legacy.reload):
        _, findings = check(lab, "checked", only="legacy.smtp.*")
    said = {each.name: each for each in findings if each.level == "wrong"}
    assert "It greylists this host" in said["legacy.smtp.greylisting"].remedy


def test_a_mailbox_that_cannot_be_moved_as_it_is(lab: Lab) -> None:
    """Folders that are not opened, or have a name that cannot be one here; more keywords than a Maildir keeps."""
    with lab.legacy.client("checked-odd") as client:
        for folder in ("new", "Closed", "Kept"):
            client.create_folder(folder)
        keywords = [f"label{number}" for number in range(30)]
        client.append("Kept", b"Subject: marked\r\n\r\n", flags=keywords)
        client.append("INBOX", b"Subject: old\r\n\r\n")
    closed = lab.legacy.dovecot.folder / "mail" / "checked-odd" / "Maildir" / ".Closed"
    for part in (closed, *closed.iterdir()):
        part.chmod(0)
    try:
        status, findings = check(lab, "checked-odd", only="legacy.imap.*")
    finally:
        closed.chmod(0o700)
        for part in closed.iterdir():
            part.chmod(0o700)
    assert status == 1
    told = {(each.level, each.name, each.text.split("'")[1]) for each in findings if each.text.count("'") > 1}
    assert {
        ("note", "legacy.imap.folder-names", "new"),
        ("wrong", "legacy.imap.folders", "Closed"),
        ("note", "legacy.imap.keywords", "Kept"),
    } <= told
    # The good case is that of the first test of this file.


def test_a_survey_of_real_mailboxes(lab: Lab, tmp_path: Path) -> None:
    """As the master user, of two: one comes along as it is, of the other it is said what does not."""
    with lab.legacy.client("checked-odd") as client:
        for folder in ("tmp", "Labels"):
            client.create_folder(folder)
        client.append("Labels", b"Subject: marked\r\n\r\n", flags=[f"label{number}" for number in range(30)])
    file = tmp_path / "addresses.csv"
    file.write_text(f"address\n{full('checked')}\n{full('checked-odd')}\n")
    survey = ("survey", DOMAIN, "--master", MASTER, "--file", str(file), "--password-file", "-")
    done = lab.new.cli(*survey, stdin=f"{lab.legacy.master_password}\n")
    assert done.returncode == 0, done.stdout
    for words in ("the folder 'tmp' will be 'tmp_' here", "the folder 'Labels' has 30 keywords; 26 are kept"):
        assert words in done.stdout
    rows = lab.new.sql("SELECT address, level FROM bascule.surveys WHERE domain = %s", DOMAIN)
    assert dict(rows) == {full("checked"): "good", full("checked-odd"): "note"}, done.stdout
    assert (lab.new.state("checked"), lab.new.state("checked-odd")) == (None, None)
    # What Dovecot here makes of them is looked at, too.
    dovecot = lab.new.dovecot
    before = dovecot.config.read_text()
    public = NAMESPACE.format(prefix="P.", separator=".", listed="yes", folder="/x")
    limited = "mail_plugins = quota\nplugin {\n  quota_max_mail_size = 10\n}\n"
    dovecot.config.write_text(before + public + limited)
    try:
        done = lab.new.cli(*survey, stdin=f"{lab.legacy.master_password}\n")
    finally:
        dovecot.config.write_text(before)
    assert done.returncode == 1
    assert "the namespace public is listed with separator '.'" in done.stdout
    assert "the folder 'Labels' has a message of 0.0 MiB, and a user may store 0.0 MiB here" in done.stdout
    assert "2 cannot be moved as they are" in done.stdout


def test_the_password_goes_over_tls_where_it_is_offered(lab: Lab) -> None:
    log = lab.new.dovecot.log
    before = len(log())
    _, findings = check(lab, "checked", only="dovecot.login")
    assert [each.level for each in findings] == ["good"]
    logins = [line for line in log()[before:].splitlines() if "checked@lab.test" in line and "proxy" in line.lower()]
    assert logins
    assert all("TLS" in line for line in logins)


def test_the_small_file_of_authorities(lab: Lab, tmp_path: Path) -> None:
    """It is enough to trust the legacy server, and nothing else is in it."""
    bundle = tmp_path / "bundle.pem"
    others = Path("/etc/ssl/certs/ca-certificates.crt").read_text()
    bundle.write_text(others + lab.new.settings.legacy.ca_file.read_text())  # type: ignore[union-attr]
    text, path = lab.new.settings_file.read_text(), tmp_path / "bascule.toml"
    path.write_text(text.replace(str(lab.new.settings.legacy.ca_file), str(bundle)))
    small = tmp_path / "legacy-ca.pem"
    done = lab.new.cli("--settings", str(path), "check", DOMAIN, "--write-ca", str(small))
    assert (done.returncode, "1 authorities" in done.stdout) == (0, True), done.stdout
    assert small.read_text().strip() == lab.new.settings.legacy.ca_file.read_text().strip()  # type: ignore[union-attr]
    path.write_text(text.replace(str(lab.new.settings.legacy.ca_file), str(small)))
    _, findings = check(lab, "checked", "--settings", str(path), only="legacy.imap.reach")
    assert [each.level for each in findings] == ["good"]


def legacy_of(lab: Lab) -> LegacySettings:
    ports = lab.legacy.ports
    imaps = Service(ports.imaps, "implicit")
    return LegacySettings(DOMAIN, "localhost", imaps, "127.0.0.1", lab.legacy.smtp_port)


def findings_at_legacy(lab: Lab, legacy: LegacySettings, password: str = "") -> list[Finding]:
    user = User(Address.parse(full("checked")), Password(password or lab.legacy.users["checked"]))
    subject = Subject(lab.new.settings, legacy=legacy, user=user, legacy_only=True)
    return list(checks.run(checks.matching(["legacy.*"]), subject))


def test_the_wrong_login_form(lab: Lab) -> None:
    findings = findings_at_legacy(lab, replace(legacy_of(lab), login_form="local_part"))
    said = [each for each in findings if each.level == "wrong"]
    assert [each.text for each in said] == ["the server knows checked@lab.test as 'checked@lab.test', not as 'checked'"]
    assert said[0].remedy == "Prepare the domain with --login-form address."


def test_no_tls_is_noted(lab: Lab) -> None:
    findings = findings_at_legacy(lab, replace(legacy_of(lab), imap=Service(lab.legacy.ports.imap, "none")))
    assert any(each.level == "note" and "every password goes there in clear text" in each.text for each in findings)


def test_smtp_at_a_port_that_speaks_something_else(lab: Lab) -> None:
    findings = findings_at_legacy(lab, replace(legacy_of(lab), smtp_port=lab.legacy.ports.imap))
    assert [each.area for each in findings if each.level == "wrong"] == ["SMTP"]


def test_no_password_is_in_any_finding(lab: Lab) -> None:
    findings = findings_at_legacy(lab, legacy_of(lab), "a very secret guess")
    assert [each.level for each in findings if each.area == "IMAP"][-1] == "wrong"
    assert "secret guess" not in repr(findings)


# The DNS --------------------------------------------------------------------------

NODES, CLIENT_NAMES = ("mx.new.test",), ("imap.new.test",)
HOSTS = {"mx.new.test": "192.0.2.1", "mx.old.test": "192.0.2.9", "imap.new.test": "192.0.2.2"}


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[tuple[NameServer, NameServer]]:
    both = NameServer(tmp_path / "first"), NameServer(tmp_path / "second")
    yield both
    for server in both:
        server.stop()


def serve(server: NameServer, mx: str = "mx.new.test", spf: str = "v=spf1 mx -all", ttl: int = 300) -> None:
    server.start(mx={"x.test": mx}, spf={"x.test": spf}, hosts=HOSTS, ttl=ttl)


Servers = tuple[NameServer, ...]


def found(servers: Servers, mode: Mode = "active") -> list[Said]:
    return list(check_mx("x.test", mode, NODES, [server.name for server in servers]))


def asked(servers: Servers, client_names: tuple[str, ...] = CLIENT_NAMES) -> dict[str, str]:
    """Level by text."""
    resolver = Resolver(servers[0].name)
    said = [*found(servers), *check_spf("x.test", NODES, resolver), *check_client_names(client_names, resolver)]
    return {each.text: each.level for each in said}


def test_the_mx_is_here(servers: Servers) -> None:
    for server in servers:
        serve(server)
    seen = f"seen by {servers[0].name}, {servers[1].name}"
    assert asked(servers) == {
        f"MX of x.test: mx.new.test, TTL 300 s ({seen}): all here": "good",
        "SPF of x.test for mail from mx.new.test (192.0.2.1): pass": "good",
        "users are told imap.new.test, and it has an address": "good",
    }


@pytest.mark.parametrize(("mode", "level"), [("prepared", "note"), ("active", "wrong")])
def test_the_mx_is_elsewhere(servers: Servers, mode: Mode, level: str) -> None:
    for server in servers:
        serve(server, "mx.old.test", ttl=86400)
    findings = found(servers[:1], mode)
    assert findings[0].level == level
    assert "TTL 86400 s" in findings[0].text
    if mode == "prepared":
        assert "Lower its TTL to 300 first, 86400 s before at least" in findings[0].remedy


def test_resolvers_that_do_not_agree(servers: Servers) -> None:
    serve(servers[0])
    serve(servers[1], "mx.old.test", ttl=3600)
    findings = found(servers)
    assert [each.level for each in findings[:3]] == ["good", "wrong", "note"]
    assert findings[2].text == "not all resolvers see the same MX of x.test"
    assert findings[2].remedy == "Wait for the TTL: 3600 s at most."


def test_a_resolver_that_is_away(servers: Servers) -> None:
    serve(servers[0])
    away = f"127.0.0.1:{free_ports(1)[0]}"
    findings = list(check_mx("x.test", "active", NODES, [away, servers[0].name]))
    assert findings[0].level == "note"
    assert f"the resolver {away} does not say" in findings[0].text
    assert findings[1].level == "good"


@pytest.mark.parametrize(
    ("policy", "result", "level"),
    [
        ("v=spf1 ip4:192.0.2.0/29 -all", "pass", "good"),
        ("v=spf1 a:mx.new.test -all", "pass", "good"),
        ("v=spf1 ip4:192.0.2.9 -all", "fail", "wrong"),
        ("v=spf1 ip4:192.0.2.9 ~all", "softfail", "wrong"),
        ("v=spf1 include:nowhere.test -all", "permerror", "wrong"),
        ("not spf", "none", "note"),
    ],
)
def test_spf(servers: Servers, policy: str, result: str, level: str) -> None:
    serve(servers[0], spf=policy)
    text = f"SPF of x.test for mail from mx.new.test (192.0.2.1): {result}"
    assert asked(servers[:1])[text] == level


def test_a_name_for_users_that_does_not_exist(servers: Servers) -> None:
    serve(servers[0])
    told = asked(servers[:1], ("imap.typo.test",))
    assert told["users are told imap.typo.test, and it has no address"] == "wrong"
