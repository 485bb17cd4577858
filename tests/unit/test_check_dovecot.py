"""Each check of Dovecot's configuration, on real configurations that doveconf reads; users are asked of a Dovecot "
"that runs."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bascule.address import Address
from bascule.authorities import too_long
from bascule.check import Finding, Subject, User, matching, run
from bascule.check.dovecot import ASIDE, default_quota, foreign_homes, home_of, keeps_the_domain
from bascule.check.facts import Kept, NotReadable, parsed
from bascule.check.imap import FolderRead, Survey
from bascule.credential import Password
from bascule.lab.servers import dovecot_version
from bascule.legacy import LegacySettings, Service
from bascule.settings import Dovecot, Legacy, Postfix, Settings, Worker

LEGACY = LegacySettings(
    "moving.test", "imap.old.test", Service(993, "implicit"), "mx.old.test", 25, sieve=Service(4190, "starttls")
)
BASE = """
ssl = no
protocols = imap lmtp sieve
namespace inbox {
  inbox = yes
}
"""
BUNDLE = Path("/etc/ssl/certs/ca-certificates.crt")

Configured = Callable[..., Subject]


@pytest.fixture
def configured(tmp_path: Path) -> Configured:
    """A host whose Dovecot has this configuration; ``survey``: what the user's legacy mailbox is like."""

    def make(text: str, survey: Survey | None = None, *, base: str = BASE, **worker: object) -> Subject:
        path = tmp_path / "dovecot.conf"
        path.write_text(base + text)
        settings = Settings(
            postfix=Postfix(config_directory=tmp_path),
            dovecot=Dovecot(config_file=path),
            worker=Worker(mail_root=tmp_path / "mail").model_copy(update=worker),
        )
        user = None if survey is None else User(Address("a", "moving.test"), Password("x"))
        subject = Subject(settings, legacy=LEGACY, user=user)
        if survey is not None:
            subject.survey = survey
        return subject

    return make


def found(name: str, subject: Subject) -> list[Finding]:
    return [each for each in run(matching([name]), subject) if not each.name.endswith(".readable")]


def levels(name: str, subject: Subject) -> list[str]:
    said = found(name, subject)
    assert {each.name for each in said} <= {name}
    assert all(each.remedy for each in said if each.level == "wrong")
    return [each.level for each in said]


DOTTED = Survey(separator=".")
#: Whose folders would all get the operator's prefix.
WRONG_ON_2_3 = ["wrong" if dovecot_version() == "2.3" else "good"]
LARGE = FolderRead("x", 1, 1, frozenset(), 0, 3 * 1024**2)
PUBLIC = "namespace {\n type = public\n separator = /\n prefix = Public/\n location = maildir:/x\n list = %s\n}\n"
USERDB = "userdb {\n driver = lua\n args = file=/etc/dovecot/bascule.lua blocking=yes cache_key=%s\n}\n"
LUA = "passdb {\n driver = lua\n args = file=/etc/dovecot/bascule.lua blocking=yes%s\n}\n"


@pytest.mark.parametrize(
    ("name", "text", "survey", "expected"),
    [
        ("dovecot.username-format", "", None, ["good"]),
        ("dovecot.protocols", "", None, ["good"]),
        ("dovecot.protocols", "protocols = imap pop3\n", None, ["wrong"]),
        ("dovecot.mechanisms", "", None, ["good"]),
        ("dovecot.mechanisms", "auth_mechanisms = plain login\n", None, ["good"]),
        ("dovecot.mechanisms", "auth_mechanisms = plain cram-md5\n", None, ["note"]),
        ("dovecot.mechanisms", "auth_mechanisms = cram-md5 scram-sha-256\n", None, ["wrong"]),
        ("dovecot.auth-cache", LUA % "", None, []),
        ("dovecot.auth-cache", "auth_cache_size = 10M\n" + LUA % "", None, ["wrong"]),
        ("dovecot.auth-cache", "auth_cache_size = 10M\n" + LUA % " cache_key=%u%{session}", None, ["good"]),
        ("dovecot.auth-cache", "auth_cache_size = 10M\n" + USERDB % "%u", None, ["note", "good"]),
        ("dovecot.auth-cache", "auth_cache_size = 10M\n" + USERDB % "%u%{rip}", None, ["good"]),
        ("dovecot.namespaces", "", Survey(separator="."), ["good"]),
        ("dovecot.namespaces", PUBLIC % "yes", Survey(separator="."), ["wrong"]),
        ("dovecot.namespaces", PUBLIC % "children", Survey(separator="."), ["wrong"]),
        ("dovecot.namespaces", PUBLIC % "no", Survey(separator="."), ["good"]),
        ("dovecot.namespaces", PUBLIC % "yes", Survey(separator="/"), ["good"]),
        ("dovecot.namespaces", PUBLIC % "yes", None, ["note"]),
        ("dovecot.namespaces", "namespace inbox {\n prefix = INBOX.\n separator = .\n}\n", None, ["note"]),
        ("dovecot.namespaces", "namespace inbox {\n prefix = INBOX.\n separator = .\n}\n", Survey(), ["wrong"]),
        (
            "dovecot.namespaces",
            "namespace inbox {\n prefix = INBOX.\n separator = .\n}\n",
            Survey(separator=".", prefix="INBOX."),
            ["good"],
        ),
        ("dovecot.namespaces", "namespace inbox {\n prefix = INBOX.\n separator = .\n}\n", DOTTED, WRONG_ON_2_3),
        ("dovecot.quota", "", Survey(size=10**9), []),
        ("dovecot.quota", "plugin {\n quota_rule = *:storage=1M\n}\n", None, ["note"]),
        ("dovecot.quota", "plugin {\n quota_rule = *:storage=1M\n}\n", Survey(size=2 * 1024**2), ["wrong"]),
        ("dovecot.quota", "plugin {\n quota_rule = *:storage=3M\n}\n", Survey(size=2 * 1024**2), ["good"]),
        (
            "dovecot.quota",
            "plugin {\n quota_rule = *:storage=3M\n}\n",
            Survey(size=5, quotas=[("STORAGE", 4096, 9000)]),
            ["wrong"],
        ),
        ("dovecot.message-size", "", Survey(read=[LARGE]), []),
        ("dovecot.message-size", "plugin {\n quota_max_mail_size = 2M\n}\n", Survey(read=[LARGE]), ["note"]),
        ("dovecot.message-size", "plugin {\n quota_max_mail_size = 4M\n}\n", Survey(read=[LARGE]), []),
        ("dovecot.autoexpunge", "", None, []),
        ("dovecot.autoexpunge", "namespace inbox {\n mailbox Trash {\n autoexpunge = 30d\n }\n}\n", None, ["note"]),
        ("dovecot.sieve", "", None, []),
        ("dovecot.sieve", "plugin {\n sieve = file:~/sieve;active=~/.dovecot.sieve\n}\n", None, []),
        ("dovecot.sieve", "plugin {\n sieve = file:/var/sieve/%u;active=/var/sieve/%u.sieve\n}\n", None, ["note"]),
        ("dovecot.sieve", "plugin {\n sieve_after = /etc/dovecot/after\n}\n", None, ["note"]),
        ("dovecot.recipient-delimiter", "", None, []),
        ("dovecot.recipient-delimiter", "recipient_delimiter = -\n", None, ["wrong"]),
        ("dovecot.recipient-delimiter", "recipient_delimiter = +-\n", None, []),
        ("dovecot.ssl-ca", "", None, []),
        ("dovecot.ssl-ca", f"ssl_ca = <{BUNDLE}\n", None, ["wrong"]),
        ("dovecot.ssl-ca", "ssl_ca = </etc/hosts\n", None, ["good"]),
        ("dovecot.ssl-ca", "ssl_ca = </nowhere.pem\n", None, ["note"]),
        ("dovecot.ssl-ca", f"ssl_ca = {'A' * 100_001}\n", None, ["wrong"]),
        (
            "dovecot.userdb-order",
            "userdb {\n driver = static\n args = uid=1 home=/x\n}\nuserdb {\n driver = sql\n args = /etc/bascule\n}\n",
            None,
            ["note"],
        ),
        (
            "dovecot.userdb-order",
            "userdb {\n driver = sql\n args = /etc/bascule\n}\nuserdb {\n driver = static\n args = uid=1 home=/x\n}\n",
            None,
            [],
        ),
        ("dovecot.conf-d", "", None, ["wrong"]),
        ("dovecot.conf-d", "!include_try conf.d/99-bascule.conf\n", None, ["good"]),
        ("dovecot.conf-d", "!include_try conf.d/*.conf\n", None, ["good"]),
        ("dovecot.conf-d", LUA % "", None, ["good"]),
    ],
)
def test_what_the_configuration_says(
    configured: Configured, name: str, text: str, survey: Survey | None, expected: list[str]
) -> None:
    assert levels(name, configured(text, survey)) == expected


def test_a_bundle_is_really_too_long_for_an_environment(configured: Configured) -> None:
    """What the check warns of: a program of Dovecot that starts without its master ends."""
    subject = configured(f"ssl_ca = <{BUNDLE}\n")
    (said,) = found("dovecot.ssl-ca", subject)
    assert (said.level, said.text) == ("wrong", f"{BUNDLE} is too long: {too_long(BUNDLE.stat().st_size)}")
    command = ["doveadm", "-c", str(subject.settings.dovecot.config_file), "help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={"PATH": "/usr/bin"})
    lda = ["/usr/lib/dovecot/dovecot-lda", "-c", str(subject.settings.dovecot.config_file), "-d", "x"]
    failed = subprocess.run(lda, capture_output=True, text=True, check=False, input="", env={"PATH": "/usr/bin"})
    assert "Argument list too long" in done.stderr + failed.stderr


def test_an_inbox_in_a_namespace_without_a_name(configured: Configured) -> None:
    subject = configured("", base="ssl = no\nnamespace {\n inbox = yes\n separator = /\n}\n")
    assert levels("dovecot.namespaces", subject) == ["wrong"]
    assert "is not named" in found("dovecot.namespaces", subject)[0].text


# Namespaces: what Dovecot itself says of the same --------------------------------------------

COURIER = "namespace inbox {\n inbox = yes\n prefix = INBOX.\n separator = .\n}\n"


def other(separator: str, prefix: str, listed: str = "yes", more: str = "") -> str:
    return (
        f"namespace public {{\n list = {listed}\n prefix = {prefix}\n separator = {separator}\n"
        f" location = maildir:~/public:LAYOUT=fs\n{more}}}\n"
    )


NAMESPACES = [
    ("", "/", "", ""),
    ("", ".", "INBOX.", ""),
    (COURIER, ".", "INBOX.", ""),
    (COURIER, "/", "mail/", ""),
    (COURIER, ".", "", "cannot be told of no prefix"),
    (COURIER, "/", "", "cannot be told of no prefix"),
    (other("/", "Public/"), "/", "", ""),
    (other("", "Public/"), "/", "", ""),
    (other("/", "Public/", "children"), "/", "", ""),
    (other(".", "Public."), "/", "", "is listed with separator '.'"),
    (other(".", "Public.", "children"), "/", "", "is listed with separator '.'"),
    (other("", "Public/"), ".", "INBOX.", "is listed with separator '/'"),
    (other("/", "Public/", more=" hidden = yes\n"), ".", "", "is listed with separator '/'"),
    (other(".", "Public.", "no"), "/", "", ""),
    (other("/", "Public"), "/", "", "'Public', which does not end in its separator"),
    (other("/", "/Public/"), "/", "", "or begins with it"),
    (other("/", "Public", "no"), "/", "", ""),
    (other(".", "INBOX."), ".", "INBOX.", "which a user's own folders have"),
    (other(".", "INBOX.", "no"), ".", "INBOX.", "which a user's own folders have"),
    ("", ".", "INBOX", "the legacy server's prefix 'INBOX' does not end in its separator"),
    ("", ".", ".INBOX.", "or begins with it"),
]


@pytest.mark.parametrize(("text", "separator", "prefix", "problem"), NAMESPACES)
def test_namespaces_are_judged_as_dovecot_judges_them(
    configured: Configured, running: Running, text: str, separator: str, prefix: str, problem: str
) -> None:
    """A real Dovecot opens the mailbox of a user who has these fields, or, where the check says WRONG, does not."""
    subject = configured(text, Survey(separator=separator, prefix=prefix))
    said = found("dovecot.namespaces", subject)
    assert [each.level for each in said] == (["wrong"] if problem else ["good"]), said
    assert problem in said[0].text
    settings = running(last=text)
    folder = settings.dovecot.config_file.parent
    (folder / "home").mkdir()
    os.chown(folder / "home", 5000, 5000)
    fields = f"userdb_namespace/inbox/separator={separator}"
    if prefix:  # 2.3 has no word for none
        fields += f" userdb_namespace/inbox/prefix={prefix}"
    (folder / "users").write_text(f"a@moving.test::5000:5000::{folder}/home::{fields}\n")
    doveadm = ["doveadm", "-c", str(settings.dovecot.config_file), "mailbox"]
    listed = subprocess.run([*doveadm, "list", "-u", "a@moving.test"], capture_output=True, text=True, check=False)
    if not problem:
        assert listed.returncode == 0, listed.stderr
    elif "cannot be told" not in problem:
        assert "Namespace" in listed.stderr or "namespace" in listed.stderr, listed
    else:  # it opens, or not; but never with the names that the legacy server has
        assert "INBOX.Sub" in _made(doveadm, "INBOX.Sub") or listed.returncode != 0


def _made(doveadm: list[str], name: str) -> str:
    subprocess.run([*doveadm, "create", "-u", "a@moving.test", name], check=False, capture_output=True)
    return subprocess.run([*doveadm, "list", "-u", "a@moving.test"], check=False, capture_output=True, text=True).stdout


@pytest.mark.parametrize("root", ["/home/mail", "/root/mail", "/run/user/5000/mail"])
def test_mailboxes_where_systemd_hides_them(configured: Configured, root: str) -> None:
    assert levels("dovecot.mail-root", configured("", mail_root=Path(root))) == ["wrong"]


@pytest.mark.parametrize(
    ("text", "expected"), [("", []), ("first_valid_uid = 6000\n", ["wrong"]), ("last_valid_uid = 4000\n", ["wrong"])]
)
def test_an_owner_whom_dovecot_does_not_serve(
    configured: Configured, tmp_path: Path, text: str, expected: list[str]
) -> None:
    (tmp_path / "mail").mkdir()
    os.chown(tmp_path / "mail", 5000, 5000)
    assert levels("dovecot.mail-root", configured(text)) == expected


@pytest.mark.parametrize(
    ("username_format", "kept"),
    [
        ("%Lu", True), ("%u", True), ("%{user}", True), ("%{user | lower}", True), ("%Ln@%Ld", True), ("", True),
        ("%{user | username | lower}@%{user | domain}", True), ("%{orig_user}", True),
        ("%n", False), ("%Ln", False), ("%{username}", False), ("%{user | username | lower}", False), ("fixed", False),
    ],
)  # fmt: skip
def test_which_formats_keep_the_domain(username_format: str, kept: bool) -> None:
    assert keeps_the_domain(username_format) is kept


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("plugin {\n  quota_rule = *:storage=1G\n}", 1024**3),
        ("plugin {\n  quota_rule = *:storage=300K:messages=5\n}", 300 * 1024),
        ("plugin {\n  quota_rule = *:bytes=5000\n  quota2_rule = *:storage=1\n}", 1024),
        ("plugin {\n  quota_rule2 = Trash:storage=+10%%\n}", None),
        ('quota "User quota" {\n  storage_size = 2G\n}', 2 * 1024**3),
        ("quota user {\n  quota_storage_size = 10M\n}", 10 * 1024**2),
        ("", None),
    ],
)
def test_quotas_of_both_versions(text: str, limit: int | None) -> None:
    """As doveconf of 2.3 and of 2.4 prints them."""

    class Facts:
        root = parsed(text)

        @classmethod
        def blocks(cls, kind: str) -> list[object]:
            return list(cls.root.all(kind))

    assert default_quota(Facts) == limit  # type: ignore[arg-type]


# Users: a Dovecot that runs ----------------------------------------------------------------

RUNNING = """
base_dir = {folder}/run
state_dir = {folder}/state
log_path = {folder}/log
protocols = imap lmtp
listen = 127.0.0.1
ssl = no
first_valid_uid = 1000
mail_location = maildir:~/Maildir:LAYOUT=fs
{more}
passdb {{
  driver = pam
}}
userdb {{
  driver = passwd-file
  args = username_format=%u {folder}/users
}}
{last}
namespace inbox {{
  inbox = yes
}}
service imap-login {{
  inet_listener imap {{
    port = 0
  }}
  inet_listener imaps {{
    port = 0
  }}
}}
service stats {{
  unix_listener stats-writer {{
    mode = 0666
  }}
}}
"""

Running = Callable[..., Settings]


def _ours(folder: Path, key: str) -> str:
    """Our userdb, with ``key`` in its args. No authenticator is there: it cannot be said who of the domain is here."""
    (folder / "domains").write_text("\nmoving.test\n")
    (folder / "passdb.lua").write_text((Path(__file__).parents[2] / "hooks" / "passdb.lua").read_text())
    stub = folder / "bascule.lua"
    stub.write_text(
        f'bascule_socket = "{folder}/nobody"\nbascule_domains = "{folder}/domains"\ndofile("{folder}/passdb.lua")\n'
    )
    return f"""
userdb {{
  driver = lua
  args = file={stub} blocking=yes{key}
  result_internalfail = return-fail
}}
"""


@pytest.fixture
def running() -> Iterator[Running]:
    """A Dovecot with these users (lines of a passwd-file), in a short path, for its sockets."""
    if os.geteuid() != 0:
        pytest.fail("Dovecot runs as root")
    folder = Path(tempfile.mkdtemp(prefix="bascule-check-"))
    folder.chmod(0o755)
    config = folder / "dovecot.conf"

    def start(*users: str, more: str = "", last: str = "", ours: str | None = None) -> Settings:
        if ours is not None:
            more += _ours(folder, ours)
        (folder / "users").write_text("".join(f"{line}\n" for line in users))
        config.write_text(RUNNING.format(folder=folder, more=more, last=last))
        subprocess.run(["dovecot", "-c", str(config)], check=True, stdin=subprocess.DEVNULL)
        return Settings(dovecot=Dovecot(config_file=config), worker=Worker(mail_root=folder / "mail"))

    try:
        yield start
    finally:
        subprocess.run(["doveadm", "-c", str(config), "stop"], check=False, capture_output=True)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def public() -> Iterator[Path]:
    """A directory that Dovecot's own users may read."""
    with tempfile.TemporaryDirectory(prefix="bascule-check-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def looked(settings: Settings, *addresses: str, name: str = "dovecot.userdb") -> list[Finding]:
    known = [Address.parse(each) for each in addresses]
    return found(name, Subject(settings, legacy=LEGACY, addresses=known))


def test_nobody_of_the_domain_is_known(running: Running) -> None:
    settings = running("john@shop.test::5000:5000::/srv/john")
    assert [each.level for each in looked(settings, "a@moving.test", "b@moving.test")] == ["good"]


def test_a_user_of_the_operators(running: Running) -> None:
    settings = running("b@moving.test::5000:5000::/srv/b")
    (said,) = looked(settings, "a@moving.test", "b@moving.test")
    assert (said.level, "b@moving.test (/srv/b)" in said.text, "a@moving.test" in said.text) == ("wrong", True, False)


def test_a_user_of_the_operators_is_found_without_being_asked_about(running: Running) -> None:
    """By Dovecot's own list: before anybody is known to bascule."""
    settings = running("b@moving.test::5000:5000::/srv/b")
    (said,) = found("dovecot.userdb", Subject(settings, legacy=LEGACY))
    assert (said.level, "b@moving.test (/srv/b)" in said.text) == ("wrong", True)


def test_one_whose_home_is_ours_and_whose_mail_is_not(running: Running) -> None:
    """As PostfixAdmin has it: /var/vmail/domain/user, with the mail in the home itself."""
    settings = running()
    home = settings.worker.mail_root / "moving.test" / "b"
    (settings.dovecot.config_file.parent / "users").write_text(
        f"a@moving.test::5000:5000::{home.parent}/a\nb@moving.test::5000:5000::{home}::userdb_mail=maildir:{home}/\n"
    )
    (said,) = looked(settings, "a@moving.test", "b@moving.test")
    assert (said.level, f"b@moving.test (maildir:{home}/)" in said.text) == ("wrong", True)
    assert "a@moving.test" not in said.text


def test_ours_are_ours(running: Running) -> None:
    settings = running()
    lines = [f"{name}@moving.test::5000:5000::{settings.worker.mail_root}/moving.test/{name}/\n" for name in "abc"]
    (settings.dovecot.config_file.parent / "users").write_text("".join(lines))
    names = [f"{name}@moving.test" for name in "abc"]
    assert foreign_homes(Subject(settings).dovecot, settings, [Address.parse(name) for name in names]) == {}


@pytest.mark.parametrize(
    ("more", "key", "expected"),
    [
        ("", "", "wrong"),
        ("auth_cache_size = 1M", " cache_key=%{orig_user}%{session}%{rip}", "wrong"),
        # The answer would be kept for LMTP: ours is asked as LMTP asks, and nothing is seen.
        ("auth_cache_size = 1M", " cache_key=%{orig_user}%{session}", "note"),
    ],
)
def test_a_user_of_the_operators_behind_our_userdb(running: Running, more: str, key: str, expected: str) -> None:
    """Ours stands first and answers for all addresses of the domain; it steps aside for this check only."""
    settings = running("b@moving.test::5000:5000::/srv/b", more=more, ours=key)
    config = settings.dovecot.config_file
    asked = subprocess.run(
        ["doveadm", "-c", str(config), "user", "b@moving.test"], check=False, capture_output=True, text=True
    )
    assert "home" not in asked.stdout, "ours answers, not the operator's"
    (said,) = looked(settings, "a@moving.test", "b@moving.test")
    assert (said.level, "b@moving.test (/srv/b)" in said.text) == (expected, expected == "wrong"), said
    assert "a@moving.test" not in said.text or expected != "wrong"


def test_one_whom_dovecot_may_not_serve_is_known_all_the_same(running: Running) -> None:
    """Mail for such a user would be put off for ever."""
    settings = running("b@moving.test::34:34::/srv/b", last="last_valid_uid = 60000")
    (said,) = looked(settings, "b@moving.test")
    assert said.level == "wrong", said.text


def test_a_userdb_that_takes_every_name_for_its_own(running: Running) -> None:
    settings = running(
        last="userdb {\n  driver = static\n  args = uid=5000 gid=5000 home=/srv/%u allow_all_users=yes\n}\n"
    )
    (said,) = looked(settings)
    assert (said.level, "takes every name for its own" in said.text) == ("wrong", True)


@pytest.mark.parametrize(
    ("elsewhere", "users", "levels"),
    [
        (3, [], ["good"]),
        (3, ["b@moving.test::5000:5000::/srv/b"], ["wrong"]),
        # A userdb that is away: nothing is known.
        (111, [], ["note"]),
    ],
)
def test_a_domain_that_is_active(
    running: Running, public: Path, elsewhere: int, users: list[str], levels: list[str]
) -> None:
    """Its userdb, ours, fails for all who have not moved, so that no mail for them is refused, but for the check."""
    script = public / "userdb"
    script.write_text(
        "#!/bin/sh\nread -r name <&3\n"
        f'[ "$TCPREMOTEIP" = {ASIDE} ] && exit {elsewhere}\n'
        f'case "$name" in *@moving.test*) exit 111;; *) exit {elsewhere};; esac\n'
    )
    script.chmod(0o755)
    settings = running(*users, last=f"userdb {{\n  driver = checkpassword\n  args = {script}\n}}\n")
    said = looked(settings, "a@moving.test", "b@moving.test")
    assert [each.level for each in said] == levels, said
    assert ("b@moving.test (/srv/b)" in said[0].text) == bool(users)


@pytest.mark.parametrize("more", ["auth_username_format = %Ln", "protocol lmtp {\n  auth_username_format = %Ln\n}"])
def test_a_user_of_this_host_who_would_get_the_mail(running: Running, more: str) -> None:
    """As on Debian 13, where LMTP looks users up without their domain."""
    settings = running(more=more, last="userdb {\n  driver = passwd\n}\n")
    (said,) = looked(settings, name="dovecot.username-format")
    assert said.level == "wrong", said.text
    assert "would be given to the user of this host with that local part" in said.text
    # Dovecot asked as LMTP asks, not by reading what it is told:
    nobody = Address("nobody", "moving.test")
    assert nobody in foreign_homes(Subject(settings).dovecot, settings, [nobody])


def test_a_format_that_drops_the_domain_and_reaches_nobody(running: Running) -> None:
    more = "protocol lmtp {\n  auth_username_format = %Ln\n}"
    settings = running("john@shop.test::5000:5000::/srv/john", more=more)
    (said,) = looked(settings, name="dovecot.username-format")
    assert (said.level, "gets mail of moving.test by it" in said.text) == ("good", True)


def test_a_format_that_is_seen_before_there_is_a_domain(configured: Configured) -> None:
    subject = configured("protocol lmtp {\n  auth_username_format = %Ln\n}\n")
    assert levels("dovecot.username-format", Subject(subject.settings)) == ["note"]


def test_a_dovecot_that_does_not_run_is_not_taken_for_one_that_knows_nobody(running: Running) -> None:
    settings = running()
    subprocess.run(["doveadm", "-c", str(settings.dovecot.config_file), "stop"], check=True)
    (said,) = looked(settings, "a@moving.test")
    assert (said.level, "Dovecot does not say" in said.text) == ("note", True)


@pytest.mark.parametrize(
    ("local_part", "home"), [("a.b", "x.test/a.b"), (".hidden", "x.test/%2Ehidden"), ("a/b", "x.test/a%2Fb")]
)
def test_homes_are_named_as_the_database_names_them(local_part: str, home: str) -> None:
    """See home_of() in schema/functions/addresses.sql; tests/database compares the two."""
    assert home_of(Address(local_part, "x.test")) == home


# Facts of another host ----------------------------------------------------------------------


def test_facts_that_were_kept(tmp_path: Path) -> None:
    """From Debian 13: an Ansible role hands over what doveconf printed there."""
    text = (
        "# 2.4.1-4 (7d8c0e5759): /etc/dovecot/dovecot.conf\nprotocols {\n  imap = yes\n  lmtp = yes\n}\n"
        "namespace inbox {\n  inbox = yes\n  mailbox Trash {\n    autoexpunge = 30 days\n  }\n}\n"
        "protocol lmtp {\n  auth_username_format = %{user | username | lower}\n}\n"
    )
    settings = Settings(legacy=Legacy(), dovecot=Dovecot(config_file=tmp_path / "none"))
    subject = Subject(settings, commands=Kept({"doveconf -n": text}))
    assert levels("dovecot.protocols", subject) == ["good"]
    assert levels("dovecot.username-format", subject) == ["note"]
    assert levels("dovecot.autoexpunge", subject) == ["note"]


def test_facts_that_were_not_kept_are_not_guessed() -> None:
    with pytest.raises(NotReadable, match="was not kept"):
        Kept({}).run("postconf", "-x")
