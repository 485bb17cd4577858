"""The worker process: takes its store's tasks from the PostgreSQL queue."""

from __future__ import annotations

import asyncio
import errno
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import procrastinate
import psycopg
from procrastinate.jobs import Status

from bascule import letters, log, program, settings
from bascule.credential import Unsealer
from bascule.database import connect, translated
from bascule.errors import (
    BasculeError,
    DatabaseUnavailable,
    LegacyBusy,
    LegacyRefusedLogin,
    LegacyUnavailable,
    LocalUnavailable,
)
from bascule.legacy import Trust
from bascule.metrics import serve
from bascule.migrator import metrics
from bascule.migrator.account import Account
from bascule.migrator.acts import Acts
from bascule.migrator.attempt import Attempt, InUse, exclusively
from bascule.migrator.cutover import Paused, migrate
from bascule.migrator.evidence import verify_again
from bascule.migrator.letters import Letters, NotSent
from bascule.migrator.local import Local
from bascule.migrator.returning import NotClean, give_back
from bascule.migrator.sessions import Sessions
from bascule.migrator.storage import Storage
from bascule.migrator.sweep import sweep
from bascule.migrator.verification import NotEqual
from bascule.readiness import alive, ready, stopping
from bascule.watch import Watch

PART = "worker"
HEARTBEAT = 2.0  # seconds
STALLED = 3 * HEARTBEAT  # seconds of silence after which a worker is taken for dead
LOOK = 2.0  # seconds between looks for due and unattended tasks
PATIENCE = 30.0  # seconds that the database may take for one look; the unit's WatchdogSec is more
WRITE_AGAIN = 60.0  # seconds after which it is tried again to send a message to a user
SPARE_THREADS = 2  # beside those of the tasks: for messages to users, and for closing connections

#: How long a legacy server that says that it cannot is left alone, in seconds, by its response code.
BUSY = {"OVERQUOTA": 900, "THROTTLED": 900, "LIMIT": 30, "INUSE": 30, "UNAVAILABLE": 60}
SHORT = 5  # seconds, after a BYE that gives no code

#: What ends by itself, so that an administrator need not do anything.
PASSES = (LegacyUnavailable, DatabaseUnavailable, InUse)
#: What to do about the other errors that do not say it themselves.
ADVICE: dict[type[BasculeError], str] = {
    LocalUnavailable: "See Dovecot's log at the mailbox's store. It is tried again at next_try",
    NotEqual: "A client may have been at work there: it is tried again at next_try. "
    "If it lasts, see the log of the worker at its store, and report it",
    NotClean: "A client may have been at work there: it is tried again at next_try. "
    "If it lasts, see the log of the worker at its store, and report it",
}

Work = Callable[[Attempt], None]


class WorkerEnded(BasculeError):
    """One of the tasks that make a worker ended, and the worker with it."""


class Worker:
    """The tasks of one store, bound to its settings."""

    def __init__(self, configuration: settings.Settings) -> None:
        self._settings = configuration
        self._log = log.get()
        self._dsn = configuration.dsn(PART)
        self._trust = Trust(configuration.legacy.ca_file, configuration.legacy.timeout)
        self._unsealer = Unsealer(configuration.keys.private)
        self._local = Local(configuration.dovecot.config_file)
        self._storage = Storage(configuration.worker.mail_location, self._local)
        self._letters = Letters(configuration, self._local)
        #: Set when the process is to end.
        self._stopping = threading.Event()
        #: When a message that could not be sent is tried again, by mailbox.
        self._write_again: dict[int, float] = {}
        self.app = procrastinate.App(
            connector=procrastinate.PsycopgConnector(conninfo=self._dsn, kwargs={"options": "-c search_path=queue"})
        )
        self.app.task(name="migrate")(self.migrate)
        self.app.task(name="sweep")(self.sweep)
        self.app.task(name="return")(self.give_back)
        self.app.task(name="verify")(self.verify)

    def migrate(self, mailbox_id: int) -> None:
        """Task: move a mailbox, or take its move up where it stopped."""

        def work(attempt: Attempt) -> None:
            if attempt.account.state in {"requested", "copying", "cutover"} and attempt.account.domain_mode == "active":
                migrate(attempt)

        self._attempt(mailbox_id, work)

    def sweep(self, mailbox_id: int) -> None:
        """Task: bring the stragglers of a mailbox that has moved."""

        def work(attempt: Attempt) -> None:
            account = attempt.account
            if account.state == "local" and account.domain_mode == "active" and not account.return_requested:
                sweep(attempt)

        self._attempt(mailbox_id, work)

    def give_back(self, mailbox_id: int) -> None:
        """Task: send a mailbox that has moved back to the legacy server."""

        def work(attempt: Attempt) -> None:
            if attempt.account.return_requested and attempt.account.domain_mode == "active":
                give_back(attempt)

        self._attempt(mailbox_id, work)

    def verify(self, mailbox_id: int) -> None:
        """Task: compare a mailbox that has moved with what came in."""

        def work(attempt: Attempt) -> None:
            if attempt.account.state == "local" and not attempt.account.return_requested:
                verify_again(attempt)

        self._attempt(mailbox_id, work)

    def _attempt(self, mailbox_id: int, work: Work) -> None:
        """Do ``work``; a failure is kept in the mailbox, with the time of the next attempt."""
        with connect(self._dsn) as connection:
            acts = Acts(connection, self._stopping)
            account = acts.account(mailbox_id)
            if account is None or not _is_due(account):
                return
            home = self._settings.worker.mail_root / account.home
            try:
                has_moved = account.state in {"local", "returning"} and account.domain_mode == "active"
                with exclusively(home, has_moved=has_moved), metrics.AT_WORK.track_inprogress():
                    # Read again under the lock: whoever held it may have changed everything.
                    now = acts.account(mailbox_id)
                    if now is None or not _is_due(now):
                        return
                    account = now
                    self._storage.recover(account.address, home, account.state)
                    work(
                        Attempt(
                            acts=acts,
                            account=account,
                            home=home,
                            storage=self._storage,
                            local=self._local,
                            sessions=Sessions(acts, account, self._trust, self._unsealer),
                            letters=self._letters,
                            trust=self._trust,
                            unsealer=self._unsealer,
                        )
                    )
            except Paused as error:
                self._log.info("paused", address=str(account.address), reason=error.message)
            except psycopg.OperationalError:
                raise  # nothing can be recorded now; the mailbox is found unattended later
            except psycopg.Error as error:
                self._failed(acts, account, translated(error))
            except LegacyRefusedLogin as error:
                self._failed(acts, account, error, refused=True)
            except LegacyBusy as error:
                wait = max(BUSY.get(error.code, SHORT), getattr(error, "wait", 0))
                busy = LegacyBusy(f"{error.message}; next try in {wait:.0f} s or later", hint=error.hint)
                self._failed(acts, account, busy, at_least=wait)
            except BasculeError as error:
                self._failed(acts, account, error)
            except OSError as error:
                self._failed(acts, account, of_this_host(error))
            except Exception as error:
                self._log.exception("attempt failed", address=str(account.address))
                said = BasculeError(
                    f"an error of bascule's own: {type(error).__name__}", hint="See the worker's log, and report it."
                )
                self._failed(acts, account, said)
                raise

    def _failed(
        self, acts: Acts, account: Account, error: BasculeError, *, refused: bool = False, at_least: float = 0
    ) -> None:
        metrics.FAILURES.labels("refused" if refused else "temporary").inc()
        self._log.warning("attempt failed", address=str(account.address), reason=error.message)
        acts.attempt_failed(
            account.id,
            error.message,
            refused=refused,
            at_least=at_least,
            advice=error.hint or ADVICE.get(type(error), ""),
            passes=isinstance(error, PASSES),
        )

    def write_to_waiting(self) -> None:
        """Write to the users whose move waits for their new password, or was set off by a login; each once.

        A message that cannot be sent holds up no other, and is tried again after ``WRITE_AGAIN`` seconds.

        Raises:
            DatabaseUnavailable, BasculeError: nobody is written to now.
        """
        with connect(self._dsn) as connection:
            acts = Acts(connection)
            store = self._settings.worker.store
            notices = (
                (
                    "password",
                    acts.waiting_for_password,
                    acts.waits_for_password,
                    self._letters.trouble,
                    acts.trouble_told,
                ),
                (
                    "login",
                    acts.waiting_for_notice,
                    acts.waits_for_notice,
                    self._letters.first_login,
                    acts.first_login_told,
                ),
            )
            for reason, waiting, waits, send, told in notices:
                for mailbox_id in waiting(store):
                    if self._stopping.is_set():
                        return
                    if self._write_again.get(mailbox_id, 0) > time.monotonic():
                        continue
                    with acts.only_writer(mailbox_id) as mine:
                        account = acts.account(mailbox_id)
                        if not mine or account is None or not waits(mailbox_id):
                            continue
                        if self._written(account, reason, send):
                            # Recorded once it is sent: whoever dies in between has it sent again, not forgotten.
                            told(mailbox_id)

    def _written(self, account: Account, reason: str, send: Callable[[Account], None]) -> bool:
        address = str(account.address)
        try:
            send(account)
        except NotSent as error:
            self._log.warning("a user is not written to now", address=address, reason=error.message)
        except Exception:  # noqa: BLE001 (an operator's template, for one; it holds up this user only)
            self._log.exception("a user cannot be written to", address=address)
        else:
            words = "user asked for the new password" if reason == "password" else "user notified of the first login"
            self._log.info(words, address=address)
            self._write_again.pop(account.id, None)
            return True
        self._write_again[account.id] = time.monotonic() + WRITE_AGAIN
        return False

    async def run(self) -> None:
        """Work until SIGTERM or SIGINT; a second one ends the process at once.

        What is being copied stops at the next message; what is held is finished first.

        Raises:
            WorkerEnded: one of the tasks that make a worker ended. Without it, the others are of no use.
        """
        loop = asyncio.get_running_loop()
        # asyncio's own has a size that depends on the host, and tasks that are more than its threads wait unseen.
        loop.set_default_executor(ThreadPoolExecutor(self._settings.worker.concurrency + SPARE_THREADS))
        told = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, told.set)
        async with self.app.open_async():
            tasks = [
                asyncio.create_task(work, name=name)
                for name, work in (
                    ("tasks", self._take_tasks()),
                    ("look-out", self._look_out()),
                    ("messages to users", self._write()),
                    ("checks", Watch(self._settings, PART).run()),
                )
            ]
            waiting = asyncio.create_task(told.wait())
            ready()
            self._log.info("working", store=self._settings.worker.store)
            try:
                ended, _ = await asyncio.wait([*tasks, waiting], return_when=asyncio.FIRST_COMPLETED)
            finally:
                stopping()
                self._stopping.set()
                for number in (signal.SIGTERM, signal.SIGINT):
                    loop.remove_signal_handler(number)
                for task in (*tasks, waiting):
                    task.cancel()  # the first of them ends when the tasks that are under way have
                await asyncio.gather(*tasks, waiting, return_exceptions=True)
        for task in tasks:
            if task in ended:
                raise WorkerEnded(
                    f"a part of the worker ended: {task.get_name()}", hint="It is started anew. See its log."
                ) from task.exception()

    async def _take_tasks(self) -> None:
        await self.app.run_worker_async(
            name=self._settings.node,
            queues=[self._settings.worker.store],
            concurrency=self._settings.worker.concurrency,
            fetch_job_polling_interval=LOOK,
            update_heartbeat_interval=HEARTBEAT,
            stalled_worker_timeout=STALLED,
            delete_jobs="successful",
            install_signal_handlers=False,
        )

    async def _look_out(self) -> None:
        """Attend again and again; say to the service manager that this goes on."""
        while True:
            try:
                async with asyncio.timeout(PATIENCE):
                    await self._attend()
            except TimeoutError:
                self._log.warning("cannot look after the queue", reason=f"no answer for {PATIENCE:.0f} s")
            except procrastinate.exceptions.ConnectorException as error:
                self._log.warning("cannot look after the queue", reason=str(error))
            alive()
            await asyncio.sleep(LOOK)

    async def _attend(self) -> None:
        """Take over what dead workers left, and queue work for mailboxes that have none."""
        manager = self.app.job_manager
        for job in await manager.get_stalled_jobs(queue=self._settings.worker.store, seconds_since_heartbeat=STALLED):
            self._log.warning("task of a dead worker taken over", task=job.task_name, **job.task_kwargs)
            if job.id is not None:
                await manager.finish_job_by_id_async(job.id, Status.FAILED, delete_job=True)
        await self.app.connector.execute_query_async("SELECT bascule.requeue_unattended()")

    async def _write(self) -> None:
        """Write to those who wait, apart from all else: a mail server may take a minute to answer."""
        while True:
            try:
                await asyncio.to_thread(self.write_to_waiting)
            except BasculeError as error:
                self._log.warning("users are not written to now", reason=error.message)
            await asyncio.sleep(LOOK)


def _is_due(account: Account) -> bool:
    """Whether a worker has anything to do at a mailbox; a cutover and a return that have begun are always ended."""
    if account.state in {"cutover", "returning"}:
        return True
    return not account.paused and not account.needs_credential


def of_this_host(error: OSError) -> BasculeError:
    """What an error of this host's means to an operator. Errors of the network are others' and come as theirs."""
    where = "" if error.filename is None else f" ({error.filename})"
    words = f"{error.strerror or type(error).__name__}{where}"
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return BasculeError(
            f"this host cannot store the mail: {words}", hint="Make room; the copy goes on where it stopped."
        )
    if error.errno in {errno.EACCES, errno.EPERM, errno.EROFS}:
        return BasculeError(
            f"this host cannot store the mail: {words}",
            hint="May the worker's user write there, and its unit (ReadWritePaths)?",
        )
    return BasculeError(
        f"the operating system of this host refuses: {words}",
        hint="See the worker's log and the system's; what was copied is kept.",
    )


def _run(configuration: settings.Settings) -> None:
    letters.check(configuration.users)
    metrics.watch(configuration.dsn(PART))
    serve(configuration.worker.metrics)
    asyncio.run(Worker(configuration).run())


main = program.command(PART, "Copy, cut over and sweep the mailboxes of this host's store.", _run)
