"""The collection: it is lint-free, and main.cf is given back byte for byte."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path, PurePosixPath
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

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

BLOCK = """# ours
transport_maps = socketmap:unix:bascule/socketmap:transport $bascule_former_transport_maps
smtpd_recipient_restrictions =
    check_policy_service unix:bascule/policy, $bascule_former_smtpd_recipient_restrictions
address_verify_poll_delay = 1s
"""
LINES = st.sampled_from(
    [
        "transport_maps = hash:/etc/postfix/transport",
        "transport_maps=",
        "  hash:/etc/postfix/more",
        "# transport_maps = a comment",
        "smtpd_recipient_restrictions =",
        "\treject_unauth_destination",
        "address_verify_poll_delay = 3s",
        "my_transport_maps = x",
        "relayhost =",
        "",
        "caf\udce9 = not UTF-8",
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


def test_a_former_value_goes_on_under_its_other_name() -> None:
    plugged, extended, kept = main_cf.with_block(
        "transport_maps = hash:/x\n  hash:/y\naddress_verify_poll_delay = 3s\n", BLOCK
    )
    assert plugged.startswith("bascule_former_transport_maps = hash:/x\n  hash:/y\n")
    assert extended == ["transport_maps"]
    assert kept == ["address_verify_poll_delay"]
    assert "address_verify_poll_delay = 1s" not in plugged
    assert "$bascule_former_smtpd_recipient_restrictions" not in plugged


def test_half_a_block_is_not_guessed_at() -> None:
    plugged, _, _ = main_cf.with_block("x = 1\n", BLOCK)
    with pytest.raises(ValueError, match="is missing"):
        main_cf.without_block(plugged.replace(main_cf.END, ""))


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
