"""What must hold on a host that the roles have made, whatever its groups are."""

from __future__ import annotations

import json

import pytest
from testinfra.host import Host

PARTS = {
    "policy-daemon": "mx",
    "milter": "mx",
    "authenticator": "store",
    "worker": "store",
    "portal": "portal",
}
#: Who may read a key, by the group that needs it.
KEYS = {
    "seal.key": ("store", ""),  # the owner of the mailboxes
    "stamp.key": ("mx", "bascule-milter"),
    "session.key": ("portal", "bascule-portal"),
}
MOST_EXPOSED = 1.7  # of 10, as systemd-analyze security counts


@pytest.fixture(params=list(PARTS))
def part(request: pytest.FixtureRequest, groups: set[str]) -> str:
    name = str(request.param)
    if PARTS[name] not in groups:
        pytest.skip("not on this host")
    return name


def _shown(host: Host, unit: str, name: str) -> str:
    return str(host.check_output("systemctl show --value --property %s %s", name, unit))


def test_it_runs_and_comes_back_after_a_boot(host: Host, part: str) -> None:
    service = host.service(f"bascule-{part}")
    assert service.is_running
    assert service.is_enabled


def test_it_is_of_the_current_version(host: Host, part: str) -> None:
    command = host.check_output("cat /proc/%s/cmdline", _shown(host, f"bascule-{part}", "MainPID"))
    assert command.startswith(f"{host.file('/opt/bascule/current').linked_to}/")


def test_it_does_not_run_as_root_and_has_no_capability(host: Host, part: str) -> None:
    pid = _shown(host, f"bascule-{part}", "MainPID")
    status = host.check_output("cat /proc/%s/status", pid)
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert "0" not in fields["Uid"].split()
    assert int(fields["CapEff"], 16) == 0
    assert fields["NoNewPrivs"] == "1"


def test_no_two_parts_share_a_user(host: Host, groups: set[str]) -> None:
    here = [name for name, group in PARTS.items() if group in groups]
    users = [_shown(host, f"bascule-{name}", "User") for name in here]
    assert len(set(users)) == len(users)


def test_its_unit_is_as_tight_as_the_documentation_says(host: Host, part: str) -> None:
    table = host.check_output("systemd-analyze security --no-pager bascule-%s | tail -n 1", part)
    assert float(table.split(":")[1].split()[0]) <= MOST_EXPOSED, table


def test_it_is_watched_and_started_again(host: Host, part: str) -> None:
    assert _shown(host, f"bascule-{part}", "WatchdogUSec") not in {"", "0", "infinity"}
    assert _shown(host, f"bascule-{part}", "Restart") == "always"


def test_it_comes_back_when_it_is_killed(host: Host, part: str) -> None:
    unit = f"bascule-{part}"
    before = _shown(host, unit, "MainPID")
    host.check_output("kill -9 %s", before)
    host.check_output(
        "for i in $(seq 100); do [ \"$(systemctl show --value --property MainPID %s)\" != %s ] && "
        "systemctl is-active --quiet %s && exit 0; sleep 0.2; done; exit 1",
        unit, before, unit,
    )  # fmt: skip


def test_it_logs_to_the_journal(host: Host, part: str) -> None:
    assert host.check_output("journalctl --unit bascule-%s --lines 1 --output cat --no-pager", part)


@pytest.mark.parametrize("key", list(KEYS))
def test_keys_are_where_they_are_needed_and_nowhere_else(host: Host, groups: set[str], key: str) -> None:
    group, owner = KEYS[key]
    file = host.file(f"/etc/bascule/{key}")
    if group not in groups:
        assert not file.exists
        return
    assert file.user == (owner or _shown(host, "bascule-worker", "User"))
    assert file.mode == 0o400


def test_front_ends_cannot_open_what_is_sealed(host: Host, groups: set[str]) -> None:
    if "store" not in groups:
        assert not host.file("/etc/bascule/keys").exists
        return
    for user in ("bascule-authenticator", "dovecot"):
        assert host.run("runuser -u %s -- cat /etc/bascule/seal.key /etc/bascule/keys/seal.key", user).rc != 0


def test_sockets_are_open_to_those_who_need_them(host: Host, groups: set[str]) -> None:
    expected: dict[str, tuple[str, int]] = {}
    if "mx" in groups:
        expected |= dict.fromkeys(
            (f"/var/spool/postfix/bascule/{name}" for name in ("socketmap", "policy", "hold")), ("postfix", 0o660)
        )
        assert host.file("/var/spool/postfix/bascule/milter").mode == 0o750
    if "store" in groups:
        expected["/run/bascule/authenticator"] = ("dovecot", 0o660)
    for path, (group, mode) in expected.items():
        assert (host.file(path).group, host.file(path).mode) == (group, mode)


def test_what_dovecot_goes_by_without_the_authenticator_is_for_dovecot_only(host: Host, groups: set[str]) -> None:
    """It has hashes in it; and it is there, for the authenticator has run."""
    if "store" not in groups:
        return
    folder, until = "/var/lib/bascule/authenticator/deputy", host.file("/run/bascule/deputy/until")
    assert (host.file(folder).user, host.file(folder).group) == ("bascule-authenticator", "dovecot")
    assert host.file(folder).mode == 0o2750
    for name in host.check_output("ls %s", folder).split():
        file = host.file(f"{folder}/{name}")
        assert (file.user, file.group, file.mode) == ("bascule-authenticator", "dovecot", 0o640)
    assert float(until.content_string) > float(host.check_output("date +%s"))
    assert host.run("runuser -u dovecot -- ls %s", folder).rc == 0
    assert host.run("runuser -u nobody -- ls %s", folder).rc != 0


def test_nothing_of_the_system_failed(host: Host) -> None:
    failed = json.loads(host.check_output("systemctl list-units --failed --output json"))
    assert not [unit["unit"] for unit in failed if not unit["unit"].startswith("user@")]


def test_postfix_and_dovecot_are_content(host: Host, groups: set[str]) -> None:
    if "mx" in groups:
        assert "bascule" not in host.run("postfix check").stderr
    if "store" in groups:
        assert host.run("doveconf -n").rc == 0
