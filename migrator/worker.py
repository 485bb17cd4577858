"""The worker process: takes its store's tasks from the PostgreSQL queue."""

from __future__ import annotations

import asyncio
import errno
import time
from collections.abc import Callable

import procrastinate
import psycopg
from procrastinate.jobs import Status

from bascule import letters, log, program, settings
from bascule.credential import Unsealer
from bascule.database import connect, translated
from bascule.errors import BasculeError, LegacyBusy, LegacyRefusedLogin
from bascule.legacy import Trust
from bascule.metrics import serve
from bascule.migrator import metrics
from bascule.migrator.account import Account
from bascule.migrator.acts import Acts
from bascule.migrator.attempt import Attempt, exclusively
from bascule.migrator.cutover import Paused, migrate
from bascule.migrator.evidence import verify_again
from bascule.migrator.letters import Letters
from bascule.migrator.local import Local
from bascule.migrator.returning import give_back
from bascule.migrator.sessions import Sessions
from bascule.migrator.storage import Storage
from bascule.migrator.sweep import sweep
from bascule.readiness import ready, stay_alive

PART = "worker"
HEARTBEAT = 2.0  # seconds
STALLED = 3 * HEARTBEAT  # seconds of silence after which a worker is taken for dead
LOOK = 2.0  # seconds between looks for due and unattended tasks
WRITE_AGAIN = 60.0  # seconds after which it is tried again to send a message to a user

#: How long a legacy server that says that it cannot is left alone, in seconds, by its response code.
BUSY = {"OVERQUOTA": 900, "THROTTLED": 900, "LIMIT": 30, "INUSE": 30, "UNAVAILABLE": 60}
SHORT = 5  # seconds, after a BYE that gives no code

Work = Callable[[Attempt], None]


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
        self._write_again_at = 0.0
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
            acts = Acts(connection)
            account = acts.account(mailbox_id)
            if account is None:
                return
            home = self._settings.worker.mail_root / account.home
            try:
                with exclusively(home), metrics.AT_WORK.track_inprogress():
                    # Read again under the lock: whoever held it may have changed everything.
                    now = acts.account(mailbox_id)
                    if now is None or (now.paused and now.state not in {"cutover", "returning"}):
                        return
                    account = now
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
            except Paused:
                self._log.info("paused", address=str(account.address))
            except psycopg.OperationalError:
                raise  # nothing can be recorded now; the mailbox is found unattended later
            except psycopg.Error as error:
                self._failed(acts, account, translated(error))
            except LegacyRefusedLogin as error:
                self._failed(acts, account, error, refused=True)
            except LegacyBusy as error:
                wait = BUSY.get(error.code, SHORT)
                said = BasculeError(f"{error.message}; next try in {wait} s or later", hint=error.hint)
                self._failed(acts, account, said, at_least=wait)
            except BasculeError as error:
                self._failed(acts, account, error)
            except OSError as error:
                full = error.errno in {errno.ENOSPC, errno.EDQUOT}
                said = BasculeError(
                    f"this host cannot store the mail: {error.strerror}" + ("" if full else f" ({error.filename})"),
                    hint="Make room; the copy goes on where it stopped."
                    if full
                    else "May the worker's user write there, and its unit (ReadWritePaths)?",
                )
                self._failed(acts, account, said)
            except Exception as error:
                self._log.exception("attempt failed", address=str(account.address))
                said = BasculeError(
                    f"an error of bascule's own: {type(error).__name__}", hint="See the worker's log, and report it."
                )
                self._failed(acts, account, said)
                raise

    def _failed(
        self, acts: Acts, account: Account, error: BasculeError, *, refused: bool = False, at_least: int = 0
    ) -> None:
        metrics.FAILURES.labels("refused" if refused else "temporary").inc()
        self._log.warning("attempt failed", address=str(account.address), reason=error.message)
        acts.attempt_failed(account.id, error.message, refused=refused, at_least=at_least, advice=error.hint)

    def write_to_waiting(self) -> None:
        """Send word to the users whose move waits for their new password, each once."""
        if time.monotonic() < self._write_again_at:
            return
        with connect(self._dsn) as connection:
            acts = Acts(connection)
            for mailbox_id in acts.waiting_for_password(self._settings.worker.store):
                # Recorded once it is sent: whoever dies in between has it sent again, not forgotten.
                with acts.transaction():
                    if acts.trouble_told(mailbox_id):
                        account = acts.account(mailbox_id)
                        if account is not None:
                            self._letters.trouble(account)
                            self._log.info("user asked for the new password", address=str(account.address))

    async def run(self) -> None:
        """Work until SIGTERM; tasks that are under way are finished first."""
        store = self._settings.worker.store
        async with self.app.open_async():
            background = [asyncio.create_task(work) for work in (self._attend(), stay_alive())]
            ready()
            self._log.info("working", store=store)
            try:
                await self.app.run_worker_async(
                    name=self._settings.node,
                    queues=[store],
                    concurrency=self._settings.worker.concurrency,
                    fetch_job_polling_interval=LOOK,
                    update_heartbeat_interval=HEARTBEAT,
                    stalled_worker_timeout=STALLED,
                    delete_jobs="successful",
                )
            finally:
                for task in background:
                    task.cancel()
                await asyncio.gather(*background, return_exceptions=True)

    async def _attend(self) -> None:
        """Take over what dead workers left, and queue work for mailboxes that have none."""
        manager = self.app.job_manager
        while True:
            try:
                for job in await manager.get_stalled_jobs(
                    queue=self._settings.worker.store, seconds_since_heartbeat=STALLED
                ):
                    self._log.warning("task of a dead worker taken over", task=job.task_name, **job.task_kwargs)
                    if job.id is not None:
                        await manager.finish_job_by_id_async(job.id, Status.FAILED, delete_job=True)
                await self.app.connector.execute_query_async("SELECT bascule.requeue_unattended()")
                await asyncio.to_thread(self.write_to_waiting)
            except BasculeError as error:
                self._log.warning("users are not written to now", reason=error.message)
                self._write_again_at = time.monotonic() + WRITE_AGAIN
            except procrastinate.exceptions.ConnectorException as error:
                self._log.warning("cannot look after the queue", reason=str(error))
            await asyncio.sleep(LOOK)


def _run(configuration: settings.Settings) -> None:
    letters.check(configuration.users)
    metrics.watch(configuration.dsn(PART))
    serve(configuration.worker.metrics)
    asyncio.run(Worker(configuration).run())


main = program.command(PART, "Copy, cut over and sweep the mailboxes of this host's store.", _run)
