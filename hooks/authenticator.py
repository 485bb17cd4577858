"""The one decision about a name in a domain of ours: who may log in where, and where the mailbox is.

Everything is answered from memory. PostgreSQL is asked for the mailboxes that
are being copied only, whose worker needs it as well, and is told of logins
afterwards.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cachetools import TTLCache

from bascule import log
from bascule.address import Address
from bascule.attempts import Attempts
from bascule.credential import Password, Sealer
from bascule.directory import NOT_AT_LEGACY, Account, Directory, Domain, Mailbox
from bascule.errors import BadAddress, DatabaseUnavailable, LegacyRefusedLogin, LegacyUnavailable
from bascule.follower import account_of
from bascule.hooks import metrics
from bascule.hooks.database import Database
from bascule.hooks.deputy import ANY, EVERYBODY, Answer, Left
from bascule.hooks.legacy_logins import LegacyLogins
from bascule.hooks.pace import Turns
from bascule.hooks.protocol import Login, Lookup, Reply
from bascule.legacy import LegacySettings, Service

LOOK_AGAIN = 1.0  # seconds between looks at the state while a login waits for the flip
MOST_HASHING = 128  # logins that wait for a password to be compared with its hash
RECORDED = 600.0  # seconds in which a login that is recorded is not recorded again
MOST_RECORDING = 64  # logins that are being recorded; of more at once, the next login of the user is

#: Services by which a first login sets a move off.
READING = ("imap", "pop3")
#: Services whose sessions Dovecot can proxy to the legacy server, by its own names.
PROXIED = ("imap", "pop3", "submission", "sieve")
#: States in which the legacy server has no say.


def legacy_of(domain: Domain, mailbox: Mailbox | None) -> LegacySettings:
    """The legacy server as one user is known to it."""
    account = None if mailbox is None else mailbox.account
    return domain.legacy.known_as(None if account is None else account.legacy_login)


def proxy_fields(legacy: LegacySettings, service_name: str, address: Address) -> dict[str, str] | None:
    """The passdb fields that have Dovecot proxy a session to the legacy server; None: it has no such service.

    Postfix asks Dovecot to check a login (service smtp, its SASL) and keeps the
    session to itself: there is nothing to proxy.
    """
    if service_name == "smtp":
        return {}
    services: dict[str, Service | None] = {
        "imap": legacy.imap,
        "pop3": legacy.pop3,
        "submission": legacy.submission,
        "sieve": legacy.sieve,
    }
    service = services.get(service_name)
    if service is None:
        return None
    fields = {"proxy": "y", "host": legacy.imap_host, "port": str(service.port)}
    if service.tls == "implicit":
        fields["ssl"] = "yes"
    elif service.tls == "starttls":
        fields["starttls"] = "yes"
    if legacy.login_name(address) != str(address):
        fields["destuser"] = legacy.login_name(address)
    return fields


def store_fields(account: Account, service_name: str, here: str) -> dict[str, str]:
    """The passdb fields that have Dovecot proxy a session to the store of a mailbox; none if that is ``here``."""
    served = account.served
    if served.store == here or served.login_host is None or service_name == "smtp":
        return {}
    return {"proxy": "y", "host": served.login_host, "starttls": "yes"}


def userdb_fields(account: Account, mail_root: Path) -> dict[str, str]:
    """The userdb fields of a mailbox that is here; what is the same for all is in Dovecot's configuration."""
    served = account.served
    fields = {
        "home": f"{mail_root}/{account.home}",
        "namespace/inbox/separator": served.separator,
        # Also if it is empty, for the operator's own may be another. 2.3 has no word for that: hooks leave it out.
        "namespace/inbox/prefix": served.prefix,
    }
    if served.special_uses:
        fields["namespace/inbox/mailbox"] = ",".join(f"bascule_{use}" for use, _ in served.special_uses)
    for use, folder in served.special_uses:
        fields[f"namespace/inbox/mailbox/bascule_{use}/name"] = folder
        fields[f"namespace/inbox/mailbox/bascule_{use}/special_use"] = f"\\{use.capitalize()}"
    return fields


def userdb_reply(mailbox: Address, account: Account, store: str, mail_root: Path) -> Reply:
    if account.served.store != store:
        return Reply("refused")
    return Reply("ok", {"user": str(mailbox)} | userdb_fields(account, mail_root))


def left_for_mailbox(mailbox: Mailbox, domain: Domain, store: str, mail_root: Path) -> Left | None:
    """What hooks find of a mailbox while nobody answers; None: the same as of everybody else in its domain."""
    account, address = mailbox.account, mailbox.address
    if mailbox.state not in NOT_AT_LEGACY:
        has_own_name = account is not None and account.legacy_login is not None
        return _left_at_legacy(domain, legacy_of(domain, mailbox), address) if has_own_name else None
    if account is None:  # a snapshot of an older version
        return Left(())
    userdb = Answer("userdb", ANY, userdb_reply(address, account, store, mail_root))
    if mailbox.state != "local" or account.password_hash is None:
        return Left((userdb,))
    passdb = {
        service: Reply("ok", {"user": str(address)} | store_fields(account, service, store))
        for service in ("smtp", ANY)
    }
    answers = [Answer(kind, service, reply) for kind in ("login", "passdb") for service, reply in passdb.items()]
    return Left((*answers, userdb), account.password_hash)


def left_for_domain(domain: Domain) -> Left:
    """What hooks find of everybody else in a domain."""
    return _left_at_legacy(domain, domain.legacy, Address(EVERYBODY, domain.legacy.domain))


def _left_at_legacy(domain: Domain, legacy: LegacySettings, address: Address) -> Left:
    if domain.mode == "prepared":  # who may be the operator's: then nobody knows whose password it would be
        return Left((Answer("passdb", ANY, Reply("unknown")), Answer("userdb", ANY, Reply("unknown"))))
    if domain.mode == "closed":
        return Left(())
    # Dovecot must proxy the session, so that the legacy server sees the password. Postfix (smtp) would take a reply for
    # the proof.
    fields = {service: proxy_fields(legacy, service, address) for service in PROXIED}
    return Left(
        tuple(
            Answer("login", service, Reply("ok", {"user": str(address)} | each))
            for service, each in fields.items()
            if each is not None
        )
    )


class Authenticator:
    """The decisions. ``directory`` is the last known state."""

    def __init__(
        self,
        directory: Directory,
        database: Database,
        *,
        sealer: Sealer,
        legacy_logins: LegacyLogins,
        attempts: Attempts,
        store: str,
        mail_root: Path,
        cutover_wait: float,
    ) -> None:
        self._directory = directory
        self._database = database
        self._sealer = sealer
        self._legacy_logins = legacy_logins
        self._attempts = attempts
        self._turns = Turns()
        self._store = store
        self._mail_root = mail_root
        self._cutover_wait = cutover_wait
        self._state_changed = asyncio.Condition()
        # A hash takes 64 MiB and a tenth of a second of a processor.
        self._hashing = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="hash")
        self._hashes = 0
        self._recorded: TTLCache[tuple[Address, bool], bool] = TTLCache(100_000, RECORDED)
        self._recording: dict[Address, asyncio.Task[None]] = {}
        self._log = log.get()

    async def state_changed(self) -> None:
        """Wake the logins that wait for a flip."""
        async with self._state_changed:
            self._state_changed.notify_all()

    # Lookups ---------------------------------------------------------------------

    async def look_up(self, lookup: Lookup) -> Reply:
        """What passdb or userdb say of a user, without a password."""
        place = self._place(lookup.user)
        if isinstance(place, Reply):
            return place
        domain, address = place
        mailbox = self._directory.mailboxes.get(address)
        if mailbox is None or mailbox.state == "legacy":
            return self._no("refused", domain)
        if lookup.database == "passdb":
            return self._passdb(mailbox, lookup.service)
        account = mailbox.account
        if mailbox.state in {"requested", "copying"}:
            account = await self._account_now(domain, address)
        if account is None:
            return Reply("temporary")
        return userdb_reply(address, account, self._store, self._mail_root)

    def users(self) -> Iterator[str]:
        """All whose mailbox has moved to this store."""
        for address, mailbox in self._directory.mailboxes.items():
            account = mailbox.account
            if mailbox.state == "local" and account is not None and account.served.store == self._store:
                yield str(address)

    def _passdb(self, mailbox: Mailbox, service: str) -> Reply:
        if mailbox.state in {"requested", "copying"}:
            return Reply("refused")  # the legacy server knows no master user of ours
        if mailbox.state != "local" or mailbox.account is None:
            return Reply("temporary")
        # Dovecot wants a password here, which is compared with nothing but what a mechanism other than PLAIN was sent.
        fields = {"user": str(mailbox.address), "password": f"{{PLAIN}}{secrets.token_urlsafe(32)}"}
        return Reply("ok", fields | store_fields(mailbox.account, service, self._store))

    async def _account_now(self, domain: Domain, address: Address) -> Account | None:
        """Of a mailbox that is being copied: its worker may just have learnt how the legacy server names folders."""
        try:
            rows = await self._database.ask(
                "SELECT password_hash, needs_credential, home, store, login_host, hierarchy_separator, "
                "namespace_prefix, special_uses FROM bascule.login_mailbox WHERE domain_id = %s AND local_part = %s",
                domain.id,
                address.local_part,
            )
        except DatabaseUnavailable as error:
            self._log.warning("mailbox on the move cannot be looked up", address=str(address), reason=error.message)
            return None
        return account_of(*rows[0]) if rows else None

    def _place(self, user: str) -> tuple[Domain, Address] | Reply:
        """The domain and the address that a name means, or the reply if it means none of ours."""
        if not self._directory.loaded:
            return Reply("temporary")
        try:
            address = Address.parse(user)
        except BadAddress:
            # A name that no address has is nobody's; if it ends in a domain of ours it is not for others to take.
            return Reply("refused" if user.rpartition("@")[2].lower() in self._directory.domains else "unknown")
        domain = self._directory.domains.get(address.domain)
        return Reply("unknown") if domain is None else (domain, address)

    @staticmethod
    def _no(result: str, domain: Domain) -> Reply:
        """Until a domain is active, who is not known here may still be a user of the operator's."""
        return Reply("unknown" if domain.mode == "prepared" or result == "unknown" else "refused")

    # Logins ----------------------------------------------------------------------

    async def log_in(self, login: Login) -> Reply:
        """The reply to one login."""
        place = self._place(login.user)
        if isinstance(place, Reply):
            return place
        domain, address = place
        reply = await self._decide(domain, address, login)
        if reply.result == "ok" and "user" not in reply.fields:
            return Reply("ok", reply.fields | {"user": str(address)})
        return reply

    async def _decide(self, domain: Domain, address: Address, login: Login) -> Reply:
        deadline = asyncio.get_running_loop().time() + self._cutover_wait
        while True:
            mailbox = self._directory.of_login(address)
            if mailbox is not None and mailbox.state == "local":
                reply = await self._check_here(domain, mailbox, login)
                if self._directory.of_login(address) == mailbox or reply.result != "ok":
                    return reply
                continue  # it changed meanwhile: another password, or sent back
            if mailbox is None or mailbox.state not in NOT_AT_LEGACY:
                if domain.mode == "closed":  # the legacy server is not asked any more
                    return Reply("refused")
                reply = await self._check_at_legacy(domain, mailbox, address, login)
                now = self._directory.of_login(address)
                if reply.result != "ok" or now is None or now.state not in NOT_AT_LEGACY:
                    return reply
                # The cutover began while the legacy server was asked: then look again.
            if not await self._wait_for_change(deadline):
                return Reply("temporary")

    async def _check_here(self, domain: Domain, mailbox: Mailbox, login: Login) -> Reply:
        account, address = mailbox.account, mailbox.address
        if account is None:  # a snapshot of an older version
            return Reply("temporary")
        hashed = account.password_hash
        fields = {"user": str(address)} | store_fields(account, login.service, self._store)
        if hashed is None:
            return await self._check_first(domain, mailbox, login, fields)
        answer = self._attempts.answer(address, login.password, now_held_by=hashed)
        if answer is not None:
            metrics.REMEMBERED.inc()
            return Reply("ok", fields) if answer else Reply("refused")
        if not await self._admitted(address, login.source) or self._hashes >= MOST_HASHING:
            return Reply("temporary")
        self._hashes += 1
        try:
            with self._attempts.trying(address, login.source):
                loop = asyncio.get_running_loop()
                matches = await loop.run_in_executor(self._hashing, login.password.matches, hashed)
        finally:
            self._hashes -= 1
        if not matches:
            self._attempts.failed(address, login.password, login.source, now_held_by=hashed)
            return Reply("refused")
        self._attempts.succeeded(address, login.password, login.source, now_held_by=hashed)
        if account.imported:
            self._keep_hash("renew_password", address, login.password, hashed)
        return Reply("ok", fields)

    async def _check_first(self, domain: Domain, mailbox: Mailbox, login: Login, fields: dict[str, str]) -> Reply:
        """It moved without a password: the legacy server is asked once more, and what it takes is the password here."""
        if domain.mode == "closed":
            return Reply("refused")
        refusal = await self._refusal_there(domain, mailbox, mailbox.address, login)
        if refusal is not None:
            return refusal
        self._keep_hash("take_first_password", mailbox.address, login.password)
        return Reply("ok", fields)

    async def _admitted(self, address: Address, source: str) -> bool:
        """Whether the password is to be looked at, now or after a moment."""
        reached = self._attempts.reached(address, source)
        if not reached:
            return True
        metrics.BARRED.inc()
        self._log.warning("login slowed down", address=str(address), source=source, reason=str(reached[0]))
        return await self._turns.wait(reached, self._attempts.rank(source))

    async def _wait_for_change(self, deadline: float) -> bool:
        """Return at the next change of any state, or after a moment; False once ``deadline`` is past."""
        now = asyncio.get_running_loop().time()
        if now >= deadline:
            return False
        # Woken by the change itself; the short limit covers one that came just before we began to wait.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(min(deadline, now + LOOK_AGAIN)), self._state_changed:
                await self._state_changed.wait()
        return True

    async def _check_at_legacy(self, domain: Domain, mailbox: Mailbox | None, address: Address, login: Login) -> Reply:
        fields = proxy_fields(legacy_of(domain, mailbox), login.service, address)
        if fields is None:
            return self._no("refused", domain)
        refusal = await self._refusal_there(domain, mailbox, address, login)
        if refusal is not None:
            return refusal
        if self._wants_credential(domain, mailbox, login.service):
            self._record(mailbox, address, login)
        return Reply("ok", fields)

    async def _refusal_there(
        self, domain: Domain, mailbox: Mailbox | None, address: Address, login: Login
    ) -> Reply | None:
        """Ask the legacy server, if it did not say just now; None: it takes the password."""
        answer = self._attempts.answer(address, login.password)
        if answer is None:
            if not await self._admitted(address, login.source):
                return Reply("temporary")
            try:
                with self._attempts.trying(address, login.source):
                    await self._legacy_logins.check(legacy_of(domain, mailbox), address, login.password)
            except LegacyRefusedLogin:
                self._attempts.failed(address, login.password, login.source)
                return self._no("refused", domain)
            except LegacyUnavailable as error:
                self._log.warning("login cannot be checked now", address=str(address), reason=error.message)
                return Reply("temporary")
            self._attempts.succeeded(address, login.password, login.source)
        else:
            metrics.REMEMBERED.inc()
            if not answer:
                return self._no("refused", domain)
        return None

    @staticmethod
    def _wants_credential(domain: Domain, mailbox: Mailbox | None, service: str) -> bool:
        if mailbox is None or mailbox.state == "legacy":
            has_declined = mailbox is not None and (mailbox.account is None or mailbox.account.declined)
            return domain.mode == "active" and domain.first_login_migrates and service in READING and not has_declined
        waits = mailbox.account is not None and mailbox.account.needs_credential
        return waits and mailbox.state in {"requested", "copying"}

    # What logins leave behind ------------------------------------------------------

    def _record(self, mailbox: Mailbox | None, address: Address, login: Login) -> None:
        """Keep the credential. No login waits for it; without the database, the next one is recorded."""
        key = (address, mailbox is not None)
        if key in self._recorded or address in self._recording or len(self._recording) >= MOST_RECORDING:
            return

        async def record(password: Password) -> None:
            try:
                await self._database.ask(
                    "SELECT bascule.record_login(%s, %s, %s)",
                    str(address),
                    self._sealer.seal(password),
                    login.service,
                    patience=10,
                )
            except DatabaseUnavailable as error:
                self._log.warning(
                    "login not recorded, the next one will be", address=str(address), reason=error.message
                )
            else:
                self._recorded[key] = True
            finally:
                self._recording.pop(address, None)

        self._recording[address] = asyncio.create_task(record(login.password))

    def _keep_hash(self, function: str, address: Address, password: Password, *former: str) -> None:
        """Have a password that was just found right checked by ARGON2ID from now on. No login waits for it; without
        the database, the next one is taken.
        """
        if address in self._recording or len(self._recording) >= MOST_RECORDING:
            return

        async def keep() -> None:
            try:
                hashed = await asyncio.get_running_loop().run_in_executor(self._hashing, password.hashed)
                places = ", ".join(["%s"] * (len(former) + 2))
                await self._database.ask(
                    f"SELECT bascule.{function}({places})", str(address), *former, hashed, patience=10
                )
            except DatabaseUnavailable as error:
                self._log.warning("password not kept, the next login's is", address=str(address), reason=error.message)
            finally:
                self._recording.pop(address, None)

        self._recording[address] = asyncio.create_task(keep())
