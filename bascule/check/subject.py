"""What is looked at: this host, and perhaps a domain, its legacy server, and a user whose password is known."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

from bascule import legacy as legacy_server
from bascule.address import Address
from bascule.check.facts import Commands, DovecotFacts, Here, NotReadable, PostfixFacts
from bascule.credential import Password
from bascule.database import Connection, value
from bascule.directory import Mode, State
from bascule.endpoint import host_and_port
from bascule.imap.folder_rules import FolderRule, FolderRules
from bascule.imap.reader import Reader
from bascule.legacy import LegacySettings, Login, MasterLogin, Trust, UserLogin, imap_session
from bascule.settings import Settings

if TYPE_CHECKING:
    from imapclient import IMAPClient

    from bascule.check.imap import Survey

#: Local parts that checks invent begin so; the database never counts them (schema/functions/findings.sql).
INVENTED = "bascule-check-"
NAMED = 5  # folders that one finding names, unless all are wanted


def invented(domain: str) -> Address:
    """An address of a domain that exists nowhere."""
    return Address(f"{INVENTED}{secrets.token_hex(6)}", domain)


@dataclass(frozen=True, slots=True)
class User:
    """An address, and its password at the legacy server; or that of a master user ``master``, who may act for it."""

    address: Address
    password: Password
    master: str = ""

    @property
    def login(self) -> Login:
        if self.master:
            return MasterLogin(self.address, self.master, self.password)
        return UserLogin(self.address, self.password)


@dataclass(frozen=True, slots=True)
class Store:
    """A row of ``bascule.store``."""

    name: str
    login_host: str | None


class Subject:
    """What checks look at; what is asked once is kept.

    ``legacy_only``: nothing of this host is asked, whatever is there.
    ``addresses``: those of the domain that are looked at, not all that are known.
    ``named``: how many folders one finding names.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        legacy: LegacySettings | None = None,
        user: User | None = None,
        connection: Connection | None = None,
        commands: Commands | None = None,
        legacy_only: bool = False,
        addresses: Sequence[Address] | None = None,
        named: int = NAMED,
    ) -> None:
        self.settings = settings
        self.user = user
        self.connection = connection
        self.legacy_only = legacy_only
        self.addresses = addresses
        self.named = named
        self.trust = Trust(settings.legacy.ca_file, settings.legacy.timeout)
        self._legacy = legacy
        self._commands = commands or Here(settings.postfix.config_directory, settings.dovecot.config_file)

    def has(self, needs: Iterable[str]) -> bool:
        """Whether it has what a check needs; Postfix and Dovecot are only known when they are asked."""
        return all(
            {
                "domain": self._legacy is not None,
                "user": self.user is not None,
                "database": self.connection is not None,
                "plugged": self._legacy is not None,
            }.get(need, True)
            for need in needs
        )

    # This host ------------------------------------------------------------------

    @cached_property
    def postfix(self) -> PostfixFacts:
        return PostfixFacts(self._commands)

    @cached_property
    def dovecot(self) -> DovecotFacts:
        return DovecotFacts(self._commands)

    @cached_property
    def is_plugged_into_postfix(self) -> bool:
        """Whether main.cf names any of our sockets."""
        ours = self.socket(self.settings.policy_daemon.socketmap)
        try:
            return any(ours in self.postfix.value(each) for each in ("transport_maps", "relay_domains"))
        except NotReadable:
            return False

    def socket(self, endpoint: str) -> str:
        """An endpoint as main.cf has it, for services that are chrooted into the queue directory."""
        return endpoint.replace(f"unix:{self.postfix.value('queue_directory')}/", "unix:")

    # The domain -----------------------------------------------------------------

    @property
    def legacy(self) -> LegacySettings:
        """Of a check that needs a domain."""
        if self._legacy is None:
            raise NotReadable("no domain is looked at")
        return self._legacy

    @property
    def domain(self) -> str:
        return self.legacy.domain

    @property
    def account(self) -> User:
        """Of a check that needs a user."""
        if self.user is None:
            raise NotReadable("no user is looked at")
        return self.user

    @cached_property
    def folder_rules(self) -> FolderRules:
        """Which folders of the domain's mailboxes come along."""
        if self.connection is None:
            return FolderRules()
        rows = self.connection.execute(
            "SELECT kind, folder, action, name_here, special_use_here FROM bascule.folder_rules WHERE domain = %s",
            (self.domain,),
        ).fetchall()
        return FolderRules(FolderRule(*row) for row in rows)

    @cached_property
    def mode(self) -> Mode:
        found = self._ask("SELECT mode FROM bascule.domain WHERE name = %s", self.domain)
        return "prepared" if found is None else cast("Mode", found)

    @cached_property
    def state(self) -> State:
        """Of the user's mailbox."""
        found = self._ask("SELECT state FROM bascule.mailboxes WHERE address = %s", str(self.account.address))
        return "legacy" if found is None else cast("State", found)

    @property
    def has_moved(self) -> bool:
        return self.state in {"local", "cutover", "returning"}

    @cached_property
    def login_is_a_request(self) -> bool:
        """Whether a login of the user here would set the move off."""
        migrates = self._ask("SELECT first_login_migrates FROM bascule.domain WHERE name = %s", self.domain)
        return self.mode == "active" and bool(migrates) and self.state == "legacy"

    def _ask(self, query: str, *parameters: object) -> Any:
        return None if self.connection is None else value(self.connection, query, *parameters)

    @cached_property
    def parts(self) -> list[tuple[str, str, bool]]:
        """Name of a part, its node, whether it gave a sign of life lately."""
        if self.connection is None:
            return []
        rows = self.connection.execute("SELECT part, name, alive FROM bascule.parts ORDER BY 1, 2").fetchall()
        return [(part, name, alive) for part, name, alive in rows]

    @property
    def nodes(self) -> tuple[str, ...]:
        """The names of the MX: those whose policy daemon lives, or this host."""
        alive = {name for part, name, alive in self.parts if part == "policy_daemon" and alive}
        return tuple(sorted(alive or {self.settings.node}))

    @cached_property
    def stores(self) -> Sequence[Store]:
        if self.connection is None:
            return ()
        rows = self.connection.execute("SELECT name, login_host FROM bascule.store ORDER BY 1").fetchall()
        return [Store(name, login_host) for name, login_host in rows]

    @property
    def client_names(self) -> tuple[str, ...]:
        """The names that users tell their mail programs."""
        users = self.settings.users
        told = {host_and_port(where)[0] for where in (users.imap, users.pop3, users.submission) if where}
        return tuple(sorted(told))

    # The user at the legacy server -----------------------------------------------

    @contextmanager
    def fresh_session(self) -> Iterator[IMAPClient]:
        """A session of the user's on the legacy IMAP server.

        Raises:
            LegacyRefusedLogin, LegacyUnavailable
        """
        with imap_session(self.legacy, self.trust, self.account.login) as session:
            yield session

    @contextmanager
    def reader(self) -> Iterator[Reader]:
        """Another one, in the hands of what copies mailboxes.

        Raises:
            LegacyRefusedLogin, LegacyUnavailable
        """
        with legacy_server.session(self.legacy, self.trust, self.account.login) as connection:
            yield Reader.of(connection)

    @cached_property
    def survey(self) -> Survey:
        """What the copy's own reader sees of the user's mailbox."""
        from bascule.check.imap import look_around  # noqa: PLC0415 (it is entered into the list of checks there)

        return look_around(self)
