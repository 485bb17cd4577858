"""The collection: it is lint-free, and main.cf is given back byte for byte."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path, PurePosixPath
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bascule.check.facts import COMMANDS

ANSIBLE = Path(__file__).parents[2] / "ansible"
PLAYBOOKS = sorted((ANSIBLE / "playbooks").glob("*.yml"))
INVENTORIES = sorted((ANSIBLE / "inventories").glob("*/hosts.yml"))


def _module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ANSIBLE / "plugins" / "modules" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


main_cf = _module("main_cf")
dovecot_includes = _module("dovecot_includes")

BLOCK = """# bascule: ours
bascule_transport_maps = socketmap:unix:bascule/socketmap:transport
transport_maps = $bascule_transport_maps, ...
bascule_first = check_policy_service { unix:bascule/policy, { policy_context = trusted $mynetworks } }
bascule_smtpd_recipient_restrictions = check_policy_service unix:bascule/policy
smtpd_recipient_restrictions = $bascule_first, ..., $bascule_smtpd_recipient_restrictions
bascule_smtpd_milters = { unix:bascule/milter, default_action=accept }
smtpd_milters = ..., $bascule_smtpd_milters
bascule_smtputf8_enable = no
smtputf8_enable = $bascule_smtputf8_enable
bascule_authorized_mailq_users = bascule
authorized_mailq_users = $bascule_authorized_mailq_users, ...
"""
#: What the first release wrote.
FORMER_BLOCK = """# bascule: the settings that it adds to Postfix's main.cf.

transport_maps = socketmap:unix:bascule/socketmap:transport $bascule_former_transport_maps
relay_domains = socketmap:unix:bascule/socketmap:domains

smtpd_recipient_restrictions =
    check_policy_service { unix:bascule/policy, policy_context=verification },
    check_policy_service { unix:bascule/policy, policy_context=accepted } $bascule_former_smtpd_recipient_restrictions
unverified_recipient_reject_code = 550
address_verify_sender =
recipient_delimiter = +
"""
LINES = st.sampled_from(
    [
        "transport_maps = hash:/etc/postfix/transport",
        "transport_maps=",
        "  hash:/etc/postfix/more",
        "# transport_maps = a comment",
        "# bascule is what we try next",
        "   # a comment inside",
        "smtpd_recipient_restrictions =",
        "\treject_unauth_destination,",
        "\tpermit_mynetworks permit",
        "smtpd_recipient_restrictions = permit_auth_destination,reject",
        "smtpd_milters=inet:127.0.0.1:11332",
        "smtpd_milters = { unix:x, default_action=accept },",
        "smtputf8_enable = no",
        "authorized_mailq_users = root",
        "my_transport_maps = x",
        "bascule-lmtp_destination_recipient_limit = 1",
        "relayhost =",
        "",
        "caf\udce9 = not UTF-8",
        "# one page\x0ctransport_maps = a comment",
        "smtpd_milters",
        " = inet:127.0.0.1:1\r",
    ]
)


@given(st.lists(LINES), st.sampled_from(["\n", "", "\n\n"]))
def test_main_cf_is_given_back_byte_for_byte(lines: list[str], end: str) -> None:
    former = "\n".join(lines) + end
    plugged, _, _ = main_cf.with_block(former, BLOCK)
    assert main_cf.without_block(plugged) == former
    # A second run finds nothing to do.
    assert main_cf.with_block(main_cf.without_block(plugged), BLOCK)[0] == plugged


@given(st.lists(LINES))
def test_what_was_edited_meanwhile_stays(lines: list[str]) -> None:
    former = "\n".join(lines) + "\n"
    plugged, _, _ = main_cf.with_block(former, BLOCK)
    edited = f"first = 1\n{plugged}last = 1\n"
    assert main_cf.without_block(edited) == f"first = 1\n{former}last = 1\n"


def test_the_owner_s_lines_stay_where_and_as_they_are() -> None:
    plugged, extended, kept = main_cf.with_block(
        "transport_maps = hash:/x\n  # why\n  hash:/y\nsmtputf8_enable = no\nsmtpd_milters=inet:a:1\n", BLOCK
    )
    assert plugged.startswith(
        "transport_maps = $bascule_transport_maps, hash:/x\n  # why\n  hash:/y\nsmtputf8_enable = no\n"
        f"smtpd_milters=inet:a:1, $bascule_smtpd_milters\n{main_cf.BEGIN}\n"
    )
    assert extended == ["transport_maps", "smtpd_milters"]
    assert kept == ["smtputf8_enable"]
    assert "bascule_smtputf8_enable" not in plugged
    assert "authorized_mailq_users" not in plugged  # nobody has said who may


def test_lines_are_postfix_s() -> None:
    """Only a newline ends one, and the name may stand in a line of its own."""
    text = "# said\x0ctransport_maps = by a guide\nrelay = a\u2028transport_maps = b\ntransport_maps\n  = hash:/x\n"
    plugged, extended, _ = main_cf.with_block(text, BLOCK)
    assert extended == ["transport_maps"]
    assert plugged.startswith(text.replace("= hash:", "= $bascule_transport_maps, hash:"))
    assert main_cf.without_block(plugged) == text


def test_the_block_defines_nothing_of_the_owner_s() -> None:
    """But for references to ours, where nothing is set."""
    plugged, _, _ = main_cf.with_block("", BLOCK, {"transport_maps": "$virtual", "relay_domains": "x"})
    for line in plugged.splitlines():
        assert line.startswith(("#", "bascule_")) or "= $bascule_" in line
    assert "bascule_transport_maps = socketmap:unix:bascule/socketmap:transport, $virtual\n" in plugged
    assert "smtpd_recipient_restrictions = $bascule_first, $bascule_smtpd_recipient_restrictions\n" in plugged


@pytest.mark.parametrize(
    ("former", "plugged"),
    [
        ("permit_mynetworks, reject_rbl_client a.b", "$1, permit_mynetworks, reject_rbl_client a.b, $2"),
        ("reject_a,\n  # why\n  reject_x,\n  permit", "$1, reject_a,\n  # why\n  reject_x,\n  $2, permit"),
        ("reject_x permit_auth_destination reject", "$1, reject_x $2, permit_auth_destination reject"),
        ("check_policy_service { x, a=permit }, reject", "$1, check_policy_service { x, a=permit }, reject, $2"),
        ("\n  reject_x,\n# permit\n  reject_y", "$1, \n  reject_x,\n# permit\n  reject_y, $2"),
        ("", "$1, , $2"),
    ],
)  # fmt: skip
def test_ours_stand_before_what_would_accept_anybody(former: str, plugged: str) -> None:
    text, _, _ = main_cf.with_block(f"smtpd_recipient_restrictions = {former}\nlast = 1\n", BLOCK)
    expected = plugged.replace("$1", "$bascule_first").replace("$2", "$bascule_smtpd_recipient_restrictions")
    assert text.startswith(f"smtpd_recipient_restrictions = {expected}\nlast = 1\n")


def _postconf_e(text: str, name: str, value: str) -> str:
    """What ``postconf -e`` does: one line in the place of the first, its continuation lines gone."""
    found = [entry for entry in main_cf.entries(text) if entry.name == name]
    assert found
    return text.replace(found[0].text, f"{name} = {value}\n")


@pytest.mark.parametrize("former", ["transport_maps = hash:/x\n  hash:/y\n", ""])
def test_a_panel_s_edit_loses_neither_side(former: str) -> None:
    """Ours are gone until the next run, whatever is then set of the owner's stays."""
    plugged, _, _ = main_cf.with_block(former, BLOCK)
    edited = _postconf_e(plugged, "transport_maps", "hash:/new")
    assert main_cf.without_block(edited) == "transport_maps = hash:/new\n"
    again, _, _ = main_cf.with_block(main_cf.without_block(edited), BLOCK)
    assert "transport_maps = $bascule_transport_maps, hash:/new\n" in again
    # One who goes by what is set now keeps ours, too.
    polite = _postconf_e(plugged, "transport_maps", "$bascule_transport_maps, hash:/new")
    assert main_cf.without_block(polite) == "transport_maps = hash:/new\n"


def test_a_line_that_is_put_out_is_cleaned_as_well() -> None:
    """``postconf -#`` makes comments of its lines."""
    plugged, _, _ = main_cf.with_block("transport_maps = hash:/x\n# about transport_maps\n", BLOCK)
    put_out = plugged.replace("transport_maps = $", "#transport_maps = $", 1)
    assert main_cf.without_block(put_out) == "#transport_maps = hash:/x\n# about transport_maps\n"
    # Ours may stand in its last line.
    owner = "smtpd_milters =\n  inet:a:1,\n\tinet:b:1\nlast = 1\n# see $bascule_smtpd_milters\n"
    plugged, _, _ = main_cf.with_block(owner, BLOCK)
    put_out = re.sub(r"^(smtpd_milters|\s+inet)", r"#\1", plugged, flags=re.MULTILINE)
    assert "#\tinet:b:1, $bascule_smtpd_milters\n" in put_out
    assert main_cf.without_block(put_out).startswith("#smtpd_milters =\n#  inet:a:1,\n#\tinet:b:1\nlast = 1\n# see $")


def _former(text: str) -> str:
    """As the first release plugged in."""
    for name in ("transport_maps", "smtpd_recipient_restrictions"):
        text = re.sub(rf"^{name}(?=\s*=)", f"bascule_former_{name}", text, flags=re.MULTILINE)
    begin = main_cf.FORMER_BEGIN
    if not text.endswith("\n"):
        text, begin = f"{text}\n", f"{begin} "
    return f"{text}{begin}\n{FORMER_BLOCK}{main_cf.END}\n"


@pytest.mark.parametrize("end", ["\n", ""])
def test_the_former_way_is_taken_out_as_well(end: str) -> None:
    owner = f"transport_maps = hash:/x\n  hash:/y\nsmtpd_recipient_restrictions = reject_x{end}"
    assert main_cf.without_block(_former(owner)) == owner
    # A line of that block that somebody has written anew is that one's.
    edited = _postconf_e(_former(owner), "relay_domains", "backup.test, second.test")
    assert "relay_domains = backup.test, second.test\n" in main_cf.without_block(edited)


@pytest.mark.parametrize(
    ("text", "included"),
    [
        ("!include conf.d/*.conf\n", True),
        ("  !include_try conf.d/99-bascule.conf # ours\n", True),
        ("!include {folder}/conf.d/*.conf\n", True),
        ("!include ./conf.d/../conf.d/9*.conf\n", True),
        ("!include_try other.conf\n", True),  # which includes it
        ("#!include conf.d/*.conf\n", False),
        ("!include conf.d/*.ext\n", False),
        ("!include conf.d\n", False),
        ("!include *.conf\n", True),  # other.conf is among them
        ("!include_try local.conf\n!include absent/*.conf\n", False),
        ("protocols = imap\n", False),
    ],
)
def test_it_is_seen_whether_dovecot_reads_a_file(tmp_path: Path, text: str, included: bool) -> None:
    main = tmp_path / "dovecot.conf"
    main.write_text(text.format(folder=tmp_path))
    # Includes itself, and what is asked about.
    (tmp_path / "other.conf").write_text("!include other.conf\n!include conf.d/*.conf\n")
    (tmp_path / "local.conf").write_text("mail_debug = yes\n")
    (tmp_path / "conf.d").mkdir()
    asked = PurePosixPath(tmp_path / "conf.d" / "99-bascule.conf")
    assert dovecot_includes.includes(main, asked) is included


def test_the_roles_ask_for_all_that_the_checks_look_at() -> None:
    variables = (ANSIBLE / "roles" / "plug" / "vars" / "main.yml").read_text()
    assert variables.endswith("".join(["plug__facts:\n", *(f"  - {command}\n" for command in COMMANDS)]))


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    folder = Path(sys.executable).parent
    return subprocess.run(
        [str(folder / command[0]), *command[1:]],
        cwd=ANSIBLE,
        env=os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "ANSIBLE_NOCOLOR": "1", "NO_COLOR": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_the_collection_passes_ansible_lint_at_the_production_profile() -> None:
    done = _run("ansible-lint")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("inventory", INVENTORIES, ids=lambda path: path.parent.name)
def test_the_playbooks_can_be_run_with_the_example_inventories(inventory: Path) -> None:
    done = _run("ansible-playbook", "-i", str(inventory), "--syntax-check", *map(str, PLAYBOOKS))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stderr
