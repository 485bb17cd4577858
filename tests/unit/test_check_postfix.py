"""Each check of Postfix's configuration, on real configurations that postconf and postmap read; Postfix need not "
"run."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from bascule.address import Address
from bascule.check import Finding, Subject, User, matching, of_host, postfix, run
from bascule.check.facts import Here as CommandsHere
from bascule.check.facts import NotReadable, PostfixFacts, items
from bascule.credential import Password
from bascule.lab.process import free_ports
from bascule.legacy import LegacySettings, Service, SmtpTls
from bascule.policy_daemon import routes
from bascule.settings import Dovecot, Milter, PolicyDaemon, Postfix, Settings

MAIN = """
compatibility_level = 3.6
queue_directory = {folder}/queue
command_directory = /usr/sbin
daemon_directory = /usr/lib/postfix/sbin
data_directory = {folder}/data
shlib_directory = /usr/lib/postfix
meta_directory = /etc/postfix
myhostname = mx.new.test
mydestination = mx.new.test, localhost
inet_interfaces = 127.0.0.1
"""
PLUGGED = """
bascule_transport_maps = socketmap:unix:bascule/socketmap:transport
transport_maps = $bascule_transport_maps, hash:/etc/postfix/transport
relay_domains = socketmap:unix:bascule/socketmap:domains
virtual_alias_maps = socketmap:unix:bascule/socketmap:aliases
smtpd_recipient_restrictions = check_policy_service {{ unix:bascule/policy, policy_context=recipient }}
smtpd_milters = {{ unix:bascule/milter, default_action=accept }}
recipient_delimiter = +
"""
MASTER = """
smtp      inet  n       -       n       -       -       smtpd
cleanup   unix  n       -       n       -       0       cleanup
rewrite   unix  -       -       n       -       -       trivial-rewrite
"""
LEGACY = LegacySettings("moving.test", "imap.old.test", Service(993, "implicit"), "mx.old.test", 25)

Configured = Callable[..., Subject]


@pytest.fixture
def configured(tmp_path: Path) -> Configured:
    """A host whose Postfix has these lines besides; ``plugged``: bascule is in it."""

    def make(
        main: str = "", master: str = "", *, plugged: bool = True, legacy: LegacySettings | None = LEGACY
    ) -> Subject:
        folder = tmp_path / "postfix"
        folder.mkdir(exist_ok=True)
        text = MAIN + (PLUGGED if plugged else "")
        (folder / "main.cf").write_text(text.format(folder=folder) + main)
        (folder / "master.cf").write_text(MASTER + master)
        sockets = folder / "queue" / "bascule"
        settings = Settings(
            postfix=Postfix(config_directory=folder, smtp=f"127.0.0.1:{free_ports(1)[0]}"),
            dovecot=Dovecot(config_file=tmp_path / "dovecot.conf"),
            policy_daemon=PolicyDaemon(socketmap=f"unix:{sockets}/socketmap", policy=f"unix:{sockets}/policy"),
            milter=Milter(socket=f"unix:{sockets}/milter"),
        )
        return Subject(settings, legacy=LEGACY)

    return make


def found(name: str, subject: Subject) -> list[Finding]:
    return [each for each in run(matching([name]), subject) if not each.name.startswith("dovecot.")]


def levels(name: str, subject: Subject) -> list[str]:
    said = found(name, subject)
    assert {each.name for each in said} <= {name}
    assert all(each.remedy for each in said if each.level == "wrong")
    return [each.level for each in said]


@pytest.mark.parametrize(
    ("name", "main", "master", "expected"),
    [
        ("postfix.wired", "", "", ["good"]),
        # As postconf -e, a panel or a guide would have it: the last line counts.
        ("postfix.wired", "relay_domains = backup.test", "", ["wrong"]),
        ("postfix.wired", "bascule_transport_maps = hash:/x", "", ["wrong"]),
        ("postfix.wired", "smtpd_milters = inet:127.0.0.1:11332", "", ["wrong"]),
        ("postfix.wired", "smtpd_recipient_restrictions = permit_mynetworks, reject", "", ["wrong"]),
        ("postfix.chroot", "", "", ["good"]),
        ("postfix.relay-recipient-maps", "", "", ["good"]),
        ("postfix.relay-recipient-maps", "relay_recipient_maps = hash:/etc/postfix/relay_recipients", "", ["wrong"]),
        ("postfix.smtputf8", "", "", ["good"]),
        ("postfix.smtputf8", "smtputf8_enable = yes", "", ["wrong"]),
        ("postfix.sender-login", "", "", []),
        (
            "postfix.sender-login",
            "smtpd_sender_login_maps = hash:/x\nsmtpd_sender_restrictions = reject_authenticated_sender_login_mismatch",
            "",
            ["wrong"],
        ),
        (
            "postfix.sender-login",
            "smtpd_sender_login_maps = socketmap:unix:bascule/socketmap:senders, hash:/x\n"
            "smtpd_sender_restrictions = reject_sender_login_mismatch",
            "",
            ["good"],
        ),
        # Only where users submit, as Debian's master.cf proposes it.
        (
            "postfix.sender-login",
            "smtpd_sender_login_maps = hash:/x",
            "submission inet n - n - - smtpd\n -o smtpd_sender_restrictions=reject_sender_login_mismatch\n",
            ["wrong"],
        ),
        (
            "postfix.sender-login",
            "smtpd_sender_login_maps = socketmap:unix:bascule/socketmap:senders",
            "submission inet n - n - - smtpd\n -o smtpd_sender_login_maps=hash:/x\n"
            " -o smtpd_recipient_restrictions=reject_sender_login_mismatch,permit\n",
            ["wrong"],
        ),
        (
            "postfix.sender-login",
            "smtpd_sender_login_maps = hash:/x\nsmtpd_restriction_classes = strict\n"
            "strict = reject_unauthenticated_sender_login_mismatch",
            "",
            ["wrong"],
        ),
        ("postfix.sender-not-logged-in", "", "", []),
        (
            "postfix.sender-not-logged-in",
            "smtpd_sender_restrictions = permit_mynetworks, reject_sender_login_mismatch",
            "",
            ["wrong"],
        ),
        (
            "postfix.sender-not-logged-in",
            "smtpd_sender_restrictions = check_client_access cidr:/x, reject_known_sender_login_mismatch",
            "",
            ["good"],
        ),
        (
            "postfix.sender-not-logged-in",
            "smtpd_sender_restrictions = reject_authenticated_sender_login_mismatch",
            "",
            [],
        ),
        # As ISPmail has it: where users submit.
        (
            "postfix.sender-not-logged-in",
            "",
            "submission inet n - n - - smtpd\n -o smtpd_sender_restrictions=reject_sender_login_mismatch\n"
            " -o smtpd_relay_restrictions=permit_sasl_authenticated,reject\n",
            [],
        ),
        ("postfix.recipient-delimiter", "", "", ["good"]),
        ("postfix.recipient-delimiter", "recipient_delimiter = -", "", ["wrong"]),
        # Dovecot would be asked for user-detail, whom nobody has.
        ("postfix.recipient-delimiter", "recipient_delimiter = +-", "", ["wrong"]),
        ("postfix.recipient-delimiter", "recipient_delimiter =", "", []),
        ("postfix.soft-settings", "", "", []),
        ("postfix.soft-settings", "soft_bounce = yes", "", ["note"]),
        ("postfix.soft-settings", "smtpd_data_restrictions = reject_unverified_recipient", "", ["note"]),
        (
            "postfix.soft-settings",
            "smtpd_data_restrictions = reject_unverified_recipient\nunverified_recipient_reject_code = 550",
            "",
            [],
        ),
        ("postfix.soft-settings", "unverified_recipient_tempfail_action = permit", "", ["note"]),
        ("postfix.soft-settings", "address_verify_map =", "", ["note"]),
        ("postfix.copies", "", "", []),
        ("postfix.copies", "always_bcc = archive@shop.test", "", ["note"]),
        ("postfix.copies", "recipient_bcc_maps = hash:/x", "", ["note"]),
        ("postfix.content-filter", "", "", []),
        (
            "postfix.content-filter",
            "content_filter = smtp-amavis:[127.0.0.1]:10024",
            "127.0.0.1:10025 inet n - n - - smtpd\n -o content_filter=\n",
            ["note"],
        ),
        (
            "postfix.content-filter",
            "",
            "25026 inet n - n - - smtpd\n -o content_filter=scan:x\n127.0.0.1:10025 inet n - n - - smtpd\n"
            " -o receive_override_options=no_header_body_checks,no_milters\n",
            ["good"],
        ),
        (
            "postfix.content-filter",
            "content_filter = smtp-amavis:[127.0.0.1]:10024",
            "127.0.0.1:10025 inet n - n - - smtpd\n -o content_filter=\n -o smtpd_milters=\n",
            ["good"],
        ),
        ("postfix.authorized-submit-users", "", "", []),
        ("postfix.authorized-submit-users", "authorized_submit_users = root, www-data", "", ["note"]),
        ("postfix.authorized-submit-users", "authorized_submit_users = !www-data, static:all", "", []),
        (
            "postfix.authorized-submit-users",
            "authorized_submit_users = root",
            "bascule unix n - n - - smtpd\n",
            [],
        ),
        ("postfix.sasl", "", "", []),
        ("postfix.sasl", "smtpd_sasl_auth_enable = yes\nsmtpd_sasl_type = cyrus", "", ["wrong"]),
        ("postfix.sasl", "smtpd_sasl_auth_enable = yes\nsmtpd_sasl_type = dovecot", "", ["good"]),
        (
            "postfix.sasl",
            "smtpd_sasl_type = dovecot",
            "submission inet n - n - - smtpd\n -o smtpd_sasl_auth_enable=yes\n -o smtpd_sasl_type=cyrus\n",
            ["wrong"],
        ),
        ("postfix.service-overrides", "", "", []),
        (
            "postfix.service-overrides",
            "",
            "192.0.2.1:26 inet n - n - - smtpd\n -o smtpd_recipient_restrictions=permit_mynetworks,reject\n"
            " -o smtpd_milters=\n",
            ["note", "note"],
        ),
    ],
)
def test_what_main_cf_and_master_cf_say(
    configured: Configured, name: str, main: str, master: str, expected: list[str]
) -> None:
    assert levels(name, configured(f"{main}\n", master)) == expected


def test_a_chrooted_service_that_cannot_reach_a_socket(configured: Configured, tmp_path: Path) -> None:
    subject = configured(master="127.0.0.1:26 inet n - y - - smtpd\n")
    assert levels("postfix.chroot", subject) == ["good"]
    outside = subject.settings.model_copy(
        update={"policy_daemon": PolicyDaemon(socketmap=f"unix:{tmp_path}/s", policy=f"unix:{tmp_path}/p")}
    )
    assert levels("postfix.chroot", Subject(outside)) == ["wrong"]


def test_a_restriction_before_bascule_is_plugged_in_is_not_yet_wrong(configured: Configured) -> None:
    """The role adds its table; what overrides main.cf it cannot cure."""
    strict = "smtpd_sender_restrictions = reject_sender_login_mismatch\nsmtpd_sender_login_maps = hash:/x\n"
    assert levels("postfix.sender-login", configured(strict, plugged=False)) == ["good"]
    override = "submission inet n - n - - smtpd\n -o smtpd_sender_login_maps=hash:/x\n"
    assert levels("postfix.sender-login", configured(strict, override, plugged=False)) == ["wrong"]


# Address classes -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("main", "where"),
    [
        ("mydestination = $myhostname, moving.test", "mydestination (moving.test)"),
        ("mydestination = Moving.TEST", "mydestination (Moving.TEST)"),
        ("virtual_mailbox_domains = other.test moving.test", "virtual_mailbox_domains (moving.test)"),
        ("virtual_alias_domains = moving.test", "virtual_alias_domains (moving.test)"),
        ("virtual_mailbox_domains = inline:{moving.test=x}", "virtual_mailbox_domains (inline:{moving.test=x})"),
        ("virtual_mailbox_domains = regexp:{{/moving/ OK}}", "virtual_mailbox_domains (regexp:{{/moving/ OK}})"),
        ("mydestination = {folder}/domains", "mydestination ({folder}/domains)"),
        ("virtual_mailbox_domains = texthash:{folder}/map", "virtual_mailbox_domains (texthash:{folder}/map)"),
        # By default the domains are what is in the maps of addresses.
        ("virtual_alias_maps = $virtual_alias_maps texthash:{folder}/map", "virtual_alias_domains (texthash:"),
        ("mydestination = !other.test, static:all", "mydestination (static:all)"),
    ],
)
def test_a_domain_that_is_one_of_postfixs_own(configured: Configured, tmp_path: Path, main: str, where: str) -> None:
    folder = tmp_path / "postfix"
    folder.mkdir()
    (folder / "domains").write_text("# ours\nother.test\nmoving.test\n")
    (folder / "map").write_text("moving.test anything\n")
    main = main.replace("$virtual_alias_maps", "socketmap:unix:bascule/socketmap:aliases")
    said = found("postfix.domain-class", configured(main.replace("{folder}", str(folder)) + "\n"))
    assert [each.level for each in said] == ["wrong"]
    assert f"moving.test is in {where.replace('{folder}', str(folder))}" in said[0].text
    assert "Take it out there" in said[0].remedy


@pytest.mark.parametrize(
    "main",
    [
        "",
        "mydestination = !moving.test, static:all",
        "mydestination = sub.moving.test, test",
        "virtual_mailbox_domains = inline:{other.test=x}",
        "relay_domains = socketmap:unix:bascule/socketmap:domains, moving.test",
    ],
)
def test_a_domain_that_is_none_of_postfixs_own(configured: Configured, main: str) -> None:
    assert levels("postfix.domain-class", configured(main + "\n")) == ["good"]


def test_a_table_that_cannot_be_asked_is_said(configured: Configured) -> None:
    """It may have the domain: that it is not seen there proves nothing."""
    said = found("postfix.domain-class", configured("virtual_mailbox_domains = hash:/nowhere/domains\n"))
    assert [each.level for each in said] == ["note"]
    assert "whether moving.test is in virtual_mailbox_domains cannot be seen" in said[0].text
    assert "/nowhere/domains" in said[0].text


def test_our_own_table_is_not_asked(configured: Configured) -> None:
    """It answers for the domain itself, and is away while bascule is being plugged in."""
    subject = configured()
    assert "socketmap" in subject.postfix.value("virtual_alias_domains")
    assert levels("postfix.domain-class", subject) == ["good"]


# Tables that take mail elsewhere ---------------------------------------------------------


@pytest.mark.parametrize(
    ("main", "level", "words"),
    [
        ("virtual_alias_maps = inline:{ {@moving.test=anna@shop.test} }", "wrong", "has anna@shop.test for every"),
        ("virtual_alias_maps = inline:{ {@Moving.test=@moving.test} }", "good", "no table"),
        ("virtual_alias_maps = regexp:{{/@moving[.]test$$/ anna@shop.test}}", "wrong", "has anna@shop.test for every"),
        ("relocated_maps = texthash:{folder}/all", "wrong", "relocated_maps (texthash:"),
        ("canonical_maps = inline:{ {@moving.test=@new.test} }", "wrong", "has @new.test for every"),
        ("recipient_canonical_maps = static:x@shop.test", "wrong", "has x@shop.test for every"),
        ("virtual_alias_maps = hash:/nowhere/aliases", "note", "cannot be seen"),
        ("virtual_alias_maps = texthash:{folder}/some", "note", "has info@moving.test, sales@moving.test: their mail"),
        ("recipient_canonical_maps = texthash:{folder}/some", "note", "has info@moving.test, sales@moving.test"),
        ("virtual_alias_maps = inline:{ {@other.test=x@y.test}, {a@other.test=b@moving.test} }", "good", "no table"),
        ("virtual_alias_maps = socketmap:unix:bascule/socketmap:aliases", "good", "no table"),
        ("", "good", "no table"),
    ],
)
def test_tables_that_take_mail_elsewhere(
    configured: Configured, tmp_path: Path, main: str, level: str, words: str
) -> None:
    folder = tmp_path / "postfix"
    folder.mkdir()
    (folder / "all").write_text("@moving.test elsewhere\n")
    (folder / "some").write_text(
        "sales@moving.test a@b.test\ninfo@moving.test c@d.test\nme@moving.test me@moving.test\nx@other.test y@z.test\n"
    )
    said = found("postfix.rewritten", configured(main.replace("{folder}", str(folder)) + "\n"))
    assert [each.level for each in said] == [level], said
    assert words in said[0].text


def test_a_user_whom_a_table_of_patterns_has(configured: Configured) -> None:
    subject = configured("virtual_alias_maps = regexp:{{/^a@moving[.]test$$/ anna@shop.test}}\n")
    assert levels("postfix.rewritten", subject) == ["good"]
    user = User(Address("a", "moving.test"), Password("x"))
    assert levels("postfix.rewritten", Subject(subject.settings, legacy=LEGACY, user=user)) == ["note"]


RELAY = "relay unix - - n - - smtp\n"
OWN = "bascule-relay-verify unix - - n - - smtp\n -o smtp_fallback_relay=\n"


@pytest.mark.parametrize(
    ("smtp_tls", "main", "master", "expected"),
    [
        ("may", "", RELAY, ["good"]),
        ("may", "", "", ["wrong"]),
        ("may", "smtp_fallback_relay = [smart.test]", RELAY, ["wrong"]),
        ("may", "smtp_fallback_relay = [smart.test]", f"{RELAY} -o smtp_fallback_relay=\n", ["good"]),
        ("may", "", f"{RELAY} -o smtp_fallback_relay=[smart.test]\n", ["wrong"]),
        ("verify", "smtp_fallback_relay = [smart.test]", OWN, ["good"]),
        ("verify", "", "", []),
        ("may", "defer_transports = smtp, relay", RELAY, ["wrong"]),
        ("may", "defer_transports = smtp", RELAY, ["good"]),
    ],
)
def test_the_way_to_the_legacy_server(
    configured: Configured, smtp_tls: SmtpTls, main: str, master: str, expected: list[str]
) -> None:
    subject = configured(f"{main}\n", master)
    legacy = replace(LEGACY, smtp_tls=smtp_tls)
    assert levels("postfix.relay-transport", Subject(subject.settings, legacy=legacy)) == expected


def test_the_transports_are_those_of_the_routes() -> None:
    assert postfix.RELAY_TRANSPORTS == routes.RELAY_TRANSPORTS


# Dovecot's quota-status -----------------------------------------------------------------


@contextmanager
def policy_server(port: int, action: str) -> Iterator[list[str]]:
    """Answers each request with one action, as quota-status does; the requests, as they come."""
    asked: list[str] = []
    listener = socket.create_server(("127.0.0.1", port))

    def serve() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            with client:
                asked.append(client.recv(4096).decode())
                client.sendall(f"action={action}\n\n".encode())

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield asked
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


@pytest.mark.parametrize(("action", "expected"), [("DUNNO", "good"), ("REJECT Unknown user", "wrong")])
def test_quota_status_is_asked_about_the_user(
    configured: Configured, tmp_path: Path, action: str, expected: str
) -> None:
    port = free_ports(1)[0]
    (tmp_path / "dovecot.conf").write_text(
        "ssl = no\nservice quota-status {\n executable = quota-status -p postfix\n inet_listener {\n"
        f"  port = {port}\n }}\n}}\n"
    )
    restriction = f"smtpd_data_restrictions = check_policy_service inet:127.0.0.1:{port}\n"
    subject = configured(restriction)
    assert levels("postfix.quota-status", subject) == ["note"]
    user = User(Address("a", "moving.test"), Password("x"))
    with policy_server(port, action) as asked:
        assert levels("postfix.quota-status", Subject(subject.settings, legacy=LEGACY, user=user)) == [expected]
    assert "recipient=a@moving.test\n" in asked[0]


def test_quota_status_that_postfix_does_not_ask(configured: Configured, tmp_path: Path) -> None:
    (tmp_path / "dovecot.conf").write_text(
        "ssl = no\nservice quota-status {\n executable = quota-status -p postfix\n inet_listener {\n port = 1\n }\n}\n"
    )
    assert levels("postfix.quota-status", configured()) == []


# What is not there -----------------------------------------------------------------------


def test_a_host_without_postfix_says_so_once(tmp_path: Path) -> None:
    settings = Settings(postfix=Postfix(config_directory=tmp_path), dovecot=Dovecot(config_file=tmp_path / "none"))
    said = list(run(of_host(), Subject(settings)))
    assert sorted((each.name, each.level) for each in said) == [
        ("dovecot.readable", "note"),
        ("postfix.readable", "note"),
    ]


def test_a_command_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    slow = tmp_path / "postconf"
    slow.write_text("#!/bin/sh\nexec sleep 600\n")
    slow.chmod(0o755)
    monkeypatch.setattr("bascule.check.facts._PLACES", str(tmp_path) + ":/usr/bin:/bin")
    monkeypatch.setattr("bascule.check.facts.TIMEOUT", 0.5)
    with pytest.raises(NotReadable, match="did not end within"):
        PostfixFacts(CommandsHere(tmp_path, tmp_path))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a, b\tc", ["a", "b", "c"]),
        (
            "check_policy_service { inet:x:1, timeout=5s }, permit",
            ["check_policy_service", "{ inet:x:1, timeout=5s }", "permit"],
        ),
        ("inline:{ { a=b c } }", ["inline:{ { a=b c } }"]),
        ("", []),
    ],
)
def test_lists_are_taken_apart_as_postfix_does(value: str, expected: list[str]) -> None:
    assert list(items(value)) == expected
