"""Children that hang, and what waits for them; main.cf that has lost ours."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest
import uvloop

from bascule import child, plugged
from bascule.address import Address
from bascule.child import ChildFailed, output_of
from bascule.policy_daemon import queue, servers
from bascule.policy_daemon.queue import PostfixQueue, QueueError
from bascule.serving import Server
from bascule.shared import Shared

T = TypeVar("T")
LISTING = (
    '{"queue_name": "%s", "queue_id": "ABC", "recipients": [{"address": "alice+x@lab.test", "delay_reason": ""}]}\\n'
)


def run(work: Coroutine[Any, Any, T]) -> T:
    async def limited() -> T:
        async with asyncio.timeout(30):
            return await work

    return uvloop.run(limited())


@pytest.fixture
def bin_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def script(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_a_child_that_hangs_is_killed_with_what_it_started(tmp_path: Path) -> None:
    """postqueue(1) starts showq(8)'s client, sendmail(1) starts postdrop(1)."""
    pids = tmp_path / "pids"
    hanging = f"sleep 1000 & echo $! $$ > {pids}; kill -STOP $$"
    with pytest.raises(ChildFailed, match=r"did not end within 0\.5 s and was killed"):
        run(output_of("sh", "-c", hanging, timeout=0.5))
    for pid in pids.read_text().split():
        assert _is_gone(int(pid))


def _is_gone(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    return False


def test_a_child_of_one_who_gives_up_is_killed(tmp_path: Path) -> None:
    pids = tmp_path / "pids"

    async def give_up() -> None:
        task = asyncio.create_task(output_of("sh", "-c", f"echo $$ > {pids}; exec sleep 1000", timeout=100))
        while not (pids.exists() and pids.read_text()):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(give_up())
    assert _is_gone(int(pids.read_text()))


def test_what_a_child_says_is_reported() -> None:
    assert run(output_of("echo", "text", timeout=20)) == b"text\n"

    async def many() -> None:
        for _ in range(200):  # one that ends before it is looked at
            await output_of("true", timeout=20)

    run(many())
    with pytest.raises(ChildFailed, match="sh ended with 3: no way"):
        run(output_of("sh", "-c", "echo no way >&2; exit 3", timeout=20))
    with pytest.raises(ChildFailed, match="nonexistent cannot be started: No such file"):
        run(output_of("/nonexistent", timeout=20))


def test_one_postqueue_that_hangs_holds_no_later_one_up(
    tmp_path: Path, bin_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue, "COMMAND_TIMEOUT", 1.0)
    once = tmp_path / "hung"
    listing = LISTING.replace("\\n", "") % "deferred"
    script(bin_folder, "postqueue", f"[ -e {once} ] || {{ touch {once}; kill -STOP $$; }}\necho '{listing}'")
    there = PostfixQueue(tmp_path, "unix:/nonexistent", "+")

    async def drain() -> None:
        first = asyncio.create_task(there.drain(Address.parse("alice@lab.test")))
        while not once.exists():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        second = asyncio.create_task(there.drain(Address.parse("bob@lab.test")))
        with pytest.raises(QueueError, match="postqueue did not end within 1 s"):
            await first
        await second
        await there.drain(Address.parse("alice@lab.test"))

    run(drain())


def test_an_action_that_heeds_nothing_blocks_no_other() -> None:
    async def runs() -> None:
        stubborn = True

        async def action() -> str:
            nonlocal stubborn
            while stubborn:
                stubborn = False
                try:
                    await asyncio.sleep(1000)
                except asyncio.CancelledError:
                    await asyncio.sleep(3)
                    raise
            return "done"

        shared = Shared(action, 0.1)
        first = asyncio.create_task(shared())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert await shared() == "done"
        with pytest.raises(TimeoutError):
            await first

    run(runs())


def test_a_barrier_is_known_by_its_arrival_and_has_a_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A listener that takes it and hands it on, then one that takes it only, then none."""
    taken: list[str] = []

    async def barriers() -> None:
        there = PostfixQueue(tmp_path, f"unix:{tmp_path / 'listener'}", "+")
        with pytest.raises(QueueError, match="does not take the barrier"):
            await there.barrier()

        def arrived(recipient: str) -> None:
            taken.append(recipient)
            there.barrier_arrived(recipient)

        lmtp = servers.Lmtp(lambda _: True, arrived)
        listener = Server(f"unix:{tmp_path / 'listener'}", lmtp.serve)
        await listener.start()
        await there.barrier()
        monkeypatch.setattr(queue, "BARRIER_TIMEOUT", 0.3)
        monkeypatch.setattr(there, "barrier_arrived", lambda _: None)
        with pytest.raises(QueueError, match="did not deliver the barrier in time"):
            await there.barrier()
        await listener.stop()

    run(barriers())
    assert [each.rpartition("@")[2] for each in taken] == ["barrier.bascule.invalid"] * 2


VALUES = """transport_maps = socketmap:unix:x:transport, hash:/y
bascule_transport_maps = socketmap:unix:x:transport
relay_domains = backup.test
bascule_relay_domains = socketmap:unix:x:domains
virtual_alias_maps = socketmap:unix:x:aliases
bascule_virtual_alias_maps = socketmap:unix:x:aliases
smtpd_sender_login_maps = socketmap:unix:x:senders
bascule_smtpd_sender_login_maps = socketmap:unix:x:senders
smtpd_recipient_restrictions = reject_x,   check_policy_service { unix:y, a=b }
bascule_smtpd_recipient_restrictions = check_policy_service { unix:y, a=b }
smtpd_milters =
"""


def test_what_main_cf_and_master_cf_have_lost_is_named() -> None:
    services = "".join(f"{name} unix - - n - - lmtp\n" for name in plugged.SERVICES if name != "bascule-hold")
    assert plugged.missing_of(VALUES, services) == ["relay_domains", "smtpd_milters", "bascule-hold/unix"]


def test_postconf_that_hangs_is_reported(bin_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(bin_folder, "postconf", "kill -STOP $$")
    monkeypatch.setattr(plugged, "TIMEOUT", 0.3)
    monkeypatch.setattr(child, "_PARTING", 1.0)
    with pytest.raises(ChildFailed, match="postconf did not end"):
        run(plugged.missing(Path("/etc/postfix")))
