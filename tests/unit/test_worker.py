"""The worker process: what ends it, what it says of a failure, and that nothing holds up anything else."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import procrastinate
import pytest
from nacl.public import PrivateKey
from structlog.testing import capture_logs

from bascule import errors
from bascule.address import Address
from bascule.errors import BasculeError, LegacyBusy, LegacyRefusedLogin, LegacyUnavailable
from bascule.legacy import LegacySettings, Service
from bascule.migrator import worker as module
from bascule.migrator.account import Account, Limits
from bascule.migrator.attempt import InUse
from bascule.migrator.cutover import Paused
from bascule.migrator.letters import NotSent
from bascule.migrator.worker import Worker, WorkerEnded, of_this_host
from bascule.settings import Keys, Settings
from bascule.settings import Worker as WorkerSettings

NOW = datetime(2026, 11, 25)  # noqa: DTZ001 (never looked at)


def account(number: int = 1, **changes: Any) -> Account:
    values: dict[str, Any] = {
        "id": number,
        "address": Address(f"user{number}", "lab.test"),
        "home": f"lab.test/user{number}",
        "state": "copying",
        "epoch": 3,
        "domain_mode": "active",
        "legacy": LegacySettings("lab.test", "imap.old.test", Service(993, "implicit"), "mx.old.test", 25),
        "sealed_credential": b"sealed",
        "needs_credential": False,
        "domain_id": 1,
        "limits": Limits(20, 2, None),
        "copy_login": "user",
        "sealed_copy_login": None,
        "return_requested": False,
        "migrated_at": None,
        "last_message_at": None,
        "paused": False,
        "language": "en",
        "to_be_welcomed": True,
        "url_token": "token",
        "waits_on_difference": False,
    }
    return Account(**values | changes)


class FakeActs:
    """What the database would say; keeps what it was told."""

    def __init__(self) -> None:
        self.accounts = {1: account()}
        self.failures: list[dict[str, Any]] = []
        self.told: list[int] = []
        self.waiting: list[int] = []
        self.logged_in: list[int] = []
        self.notified: list[int] = []

    def account(self, mailbox_id: int) -> Account | None:
        return self.accounts.get(mailbox_id)

    def attempt_failed(self, mailbox_id: int, message: str, **rest: object) -> None:
        self.failures.append({"id": mailbox_id, "message": message, **rest})

    def waiting_for_password(self, _store: str) -> list[int]:
        return [each for each in self.waiting if each not in self.told]

    def waiting_for_notice(self, _store: str) -> list[int]:
        return [each for each in self.logged_in if each not in self.notified]

    def waits_for_notice(self, mailbox_id: int) -> bool:
        return mailbox_id in self.logged_in and mailbox_id not in self.notified

    def first_login_told(self, mailbox_id: int) -> None:
        self.notified.append(mailbox_id)

    def waits_for_password(self, mailbox_id: int) -> bool:
        return mailbox_id in self.waiting and mailbox_id not in self.told

    @contextmanager
    def only_writer(self, _mailbox_id: int) -> Iterator[bool]:
        yield True

    def trouble_told(self, mailbox_id: int) -> None:
        self.told.append(mailbox_id)


class FakeApp:
    """Procrastinate's, without a database. ``attend`` and ``work`` are what happens in it."""

    def __init__(self) -> None:
        self.attend: Callable[[], None] = lambda: None
        self.attended = 0
        self.stopped = asyncio.Event()
        self.job_manager = SimpleNamespace(get_stalled_jobs=self._stalled)
        self.connector = SimpleNamespace(execute_query_async=self._query)
        self.ends_by_itself = False

    def open_async(self) -> FakeApp:
        return self

    async def __aenter__(self) -> FakeApp:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def run_worker_async(self, **options: object) -> None:
        assert options["install_signal_handlers"] is False
        if self.ends_by_itself:
            return
        try:
            await asyncio.Event().wait()
        finally:
            self.stopped.set()

    async def _stalled(self, **_: object) -> list[object]:
        self.attended += 1
        self.attend()
        return []

    async def _query(self, _query: str) -> None:
        pass


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Worker:
    key = tmp_path / "seal.key"
    key.write_bytes(bytes(PrivateKey.generate()))
    key.chmod(0o600)

    acts = FakeActs()

    @contextmanager
    def connect(_dsn: str) -> Iterator[None]:
        yield

    monkeypatch.setattr(module, "Acts", lambda *_: acts)
    monkeypatch.setattr(module, "connect", connect)
    monkeypatch.setattr(module, "LOOK", 0.01)
    monkeypatch.setattr(module, "Unsealer", lambda _path: None)
    configuration = Settings(keys=Keys(private=key), worker=WorkerSettings(mail_root=tmp_path / "mail", concurrency=3))
    made = Worker(configuration)
    made.app = FakeApp()  # type: ignore[assignment]
    return made


def acts_of(_worker: Worker) -> FakeActs:
    acts: FakeActs = vars(module)["Acts"]()
    return acts


def app_of(worker: Worker) -> FakeApp:
    return worker.app  # type: ignore[return-value]


def run(worker: Worker) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(20):
            await worker.run()

    asyncio.run(bounded())


# The process ----------------------------------------------------------------------------


def test_a_look_out_that_fails_ends_the_worker(worker: Worker) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    app_of(worker).attend = fail
    with pytest.raises(WorkerEnded, match="look-out") as ended:
        run(worker)
    assert isinstance(ended.value.__cause__, ZeroDivisionError)
    assert app_of(worker).stopped.is_set(), "the tasks that were under way were told to stop"


def test_tasks_that_are_taken_no_more_end_the_worker(worker: Worker) -> None:
    app_of(worker).ends_by_itself = True
    with pytest.raises(WorkerEnded, match="tasks"):
        run(worker)


def test_messages_to_users_that_fail_altogether_end_the_worker(worker: Worker) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    worker.write_to_waiting = fail  # type: ignore[method-assign]
    with pytest.raises(WorkerEnded, match="messages to users"):
        run(worker)


@pytest.mark.parametrize("error", [procrastinate.exceptions.ConnectorException(), TimeoutError()])
def test_a_database_that_is_away_does_not(worker: Worker, error: Exception) -> None:
    app = app_of(worker)

    def fail() -> None:
        if app.attended < 3:
            raise error
        os.kill(os.getpid(), signal.SIGTERM)

    app.attend = fail
    run(worker)
    assert app.attended >= 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_in_good_order(worker: Worker, number: int) -> None:
    app = app_of(worker)
    app.attend = lambda: os.kill(os.getpid(), number)
    run(worker)
    assert app.stopped.is_set()
    assert worker._stopping.is_set()
    # From then on the signal is the system's again: another one ends the process at once.
    assert signal.getsignal(number) in {signal.SIG_DFL, signal.default_int_handler}


def test_the_watchdog_hears_of_the_look_out_only(
    worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "notify"
    app = app_of(worker)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(path))
        manager.settimeout(20)
        monkeypatch.setenv("NOTIFY_SOCKET", str(path))

        def attend() -> None:
            if app.attended == 3:
                os.kill(os.getpid(), signal.SIGTERM)

        app.attend = attend
        run(worker)
        heard: list[bytes] = []
        while not heard or heard[-1] != b"STOPPING=1":
            heard.append(manager.recv(100))
    assert heard[0] == b"READY=1"
    assert heard[1:-1] == [b"WATCHDOG=1"] * (len(heard) - 2)
    assert 2 <= len(heard) - 2 <= app.attended


def test_a_mail_server_that_hangs_holds_nothing_up(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    app = app_of(worker)
    hang, hanging = threading.Event(), threading.Event()

    def trouble(_account: Account) -> None:
        hanging.set()
        hang.wait(20)

    monkeypatch.setattr(worker._letters, "trouble", trouble)
    acts_of(worker).waiting = [1]

    def attend() -> None:
        if hanging.is_set() and app.attended > 20:
            hang.set()
            os.kill(os.getpid(), signal.SIGTERM)

    app.attend = attend
    run(worker)
    assert app.attended > 20


# Messages to users ------------------------------------------------------------------------


def test_who_is_moved_by_a_login_is_notified_once(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    acts = acts_of(worker)
    acts.logged_in = [1, 2]
    acts.accounts = {number: account(number) for number in acts.logged_in}
    notified: list[int] = []
    monkeypatch.setattr(worker._letters, "first_login", lambda each: notified.append(each.id))
    worker.write_to_waiting()
    worker.write_to_waiting()
    assert notified == acts.notified == [1, 2]


@pytest.mark.parametrize("error", [NotSent("refused"), ValueError("a template of the operator's")])
def test_one_message_that_cannot_be_sent_stops_no_other(
    worker: Worker, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    acts = acts_of(worker)
    acts.waiting = [1, 2, 3]
    acts.accounts = {number: account(number) for number in acts.waiting}
    tried: list[int] = []

    def trouble(each: Account) -> None:
        tried.append(each.id)
        if each.id == 2:
            raise error

    monkeypatch.setattr(worker._letters, "trouble", trouble)
    with capture_logs() as logs:
        worker.write_to_waiting()
        worker.write_to_waiting()
    assert acts.told == [1, 3]
    assert tried == [1, 2, 3], "it is not tried again at once"
    assert any(each["log_level"] in {"warning", "error"} and "user2" in each["address"] for each in logs)
    worker._write_again.clear()
    worker.write_to_waiting()
    assert tried == [1, 2, 3, 2]


def test_an_address_that_is_not_ascii_is_not_sent_to(worker: Worker) -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()

        def greet() -> None:
            client, _ = listening.accept()
            with client, client.makefile("rwb", buffering=0) as lines:
                lines.write(b"220 mx.test\r\n")
                while line := lines.readline():
                    lines.write(b"221 bye\r\n" if line.upper().startswith(b"QUIT") else b"250 ok\r\n")

        thread = threading.Thread(target=greet)
        thread.start()
        worker._letters._smtp = listening.getsockname()
        with pytest.raises(NotSent, match="does not take the message"):
            worker._letters.trouble(account(address=Address("josé", "lab.test")))
        thread.join(20)


# Attempts ---------------------------------------------------------------------------------


def attempted(worker: Worker, error: BaseException | None = None) -> list[dict[str, Any]]:
    """The failures that are recorded of an attempt that ends with ``error``."""

    def work(_attempt: object) -> None:
        if error is not None:
            raise error

    worker._attempt(1, work)
    return acts_of(worker).failures


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (LegacyUnavailable("away"), True),
        (LegacyBusy("busy", code="LIMIT"), True),
        (InUse("another"), True),
        (BasculeError("something lasting"), False),
        (LegacyRefusedLogin("refused"), False),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (errors.Refused("not now", code="BA002"), False),
    ],
)
def test_only_what_ends_by_itself_is_said_to(worker: Worker, error: Exception, passes: bool) -> None:
    (failure,) = attempted(worker, error)
    assert failure["passes"] is passes


def test_a_legacy_server_that_names_a_time_is_given_it(worker: Worker) -> None:
    busy = LegacyBusy("backoff", code="THROTTLED")
    busy.wait = 3600.0  # type: ignore[attr-defined,unused-ignore]
    (failure,) = attempted(worker, busy)
    assert failure["at_least"] == 3600
    assert "next try in 3600 s" in failure["message"]


def test_an_attempt_that_is_stopped_leaves_no_error(worker: Worker) -> None:
    assert attempted(worker, Paused("its worker ends")) == []


@pytest.mark.parametrize(
    "changes", [{"needs_credential": True}, {"paused": True}, {"state": "local", "needs_credential": True}]
)
def test_who_waits_is_left_alone(worker: Worker, changes: dict[str, Any]) -> None:
    acts_of(worker).accounts = {1: account(**changes)}
    assert attempted(worker, ZeroDivisionError()) == []


@pytest.mark.parametrize("state", ["cutover", "returning"])
def test_what_is_held_is_ended(worker: Worker, state: str) -> None:
    acts_of(worker).accounts = {1: account(state=state, paused=True, needs_credential=True)}
    assert len(attempted(worker, LegacyUnavailable("away"))) == 1


@pytest.mark.parametrize("mode", ["prepared", "closed"])
@pytest.mark.parametrize("task", ["migrate", "sweep", "give_back"])
def test_nothing_is_done_for_a_domain_that_is_not_active(
    worker: Worker, monkeypatch: pytest.MonkeyPatch, mode: str, task: str
) -> None:
    def never(_attempt: object) -> None:
        raise AssertionError

    for name in ("migrate", "sweep", "give_back"):
        monkeypatch.setattr(module, name, never)
    state = "copying" if task == "migrate" else "local"
    acts_of(worker).accounts = {
        1: account(domain_mode=mode, state=state, return_requested=task == "give_back", migrated_at=NOW)
    }
    getattr(worker, task)(1)
    assert acts_of(worker).failures == []


@pytest.mark.parametrize(
    ("number", "name", "said", "hint"),
    [
        (errno.ENOSPC, "/var/vmail/x", "cannot store the mail: No space left on device (/var/vmail/x)", "Make room"),
        (errno.EDQUOT, None, "cannot store the mail: Disk quota exceeded", "Make room"),
        (errno.EACCES, "/var/vmail/x", "cannot store the mail: Permission denied (/var/vmail/x)", "ReadWritePaths"),
        (errno.EROFS, None, "cannot store the mail: Read-only file system", "ReadWritePaths"),
        (errno.ECONNRESET, None, "refuses: Connection reset by peer", "See the worker's log"),
        (errno.ENAMETOOLONG, "x" * 300, "refuses: File name too long (xxx", "See the worker's log"),
        (errno.EMFILE, None, "refuses: Too many open files", "See the worker's log"),
    ],
)
def test_an_error_of_this_host_is_named_for_what_it_is(number: int, name: str | None, said: str, hint: str) -> None:
    error = OSError(number, os.strerror(number), name) if name else OSError(number, os.strerror(number))
    words = of_this_host(error)
    assert said in words.message
    assert hint in words.hint
    assert "None" not in words.message
