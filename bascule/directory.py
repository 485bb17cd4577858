"""What Postfix and Dovecot must know of domains and mailboxes, in memory.

A :class:`Directory` holds every domain, every alias, and the mailboxes whose
mail does not go to the legacy server; that of an authenticator all that are on
the move or have moved, and what Dovecot must know of them. It answers without the database;
:mod:`bascule.follower` keeps it up to date. Until the first load, or the last
known state from a snapshot, it knows nothing and says so
(:attr:`Directory.loaded`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from bascule.address import Address
from bascule.legacy import LegacySettings

Mode = Literal["prepared", "active", "closed"]
State = Literal["legacy", "requested", "copying", "cutover", "local", "returning"]
#: In these states the legacy server has no say in a login.
NOT_AT_LEGACY: tuple[State, ...] = ("cutover", "local", "returning")


@dataclass(frozen=True, slots=True)
class Domain:
    id: int
    mode: Mode
    legacy: LegacySettings
    #: Whether a first login here is a request to be moved.
    first_login_migrates: bool = True


@dataclass(frozen=True, slots=True)
class Served:
    """How Dovecot serves a mailbox; mailboxes that are served alike share one object."""

    store: str
    #: Where Dovecot on other hosts proxies sessions to; None: there is one store.
    login_host: str | None
    separator: str
    #: Of the personal namespace (RFC 2342).
    prefix: str
    #: Special use (RFC 6154), in lower case without backslash, and folder without prefix.
    special_uses: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Account:
    """What Dovecot must know of a mailbox; authenticators hold it, policy daemons do not."""

    #: Only in state local; None there: it moved without a password.
    password_hash: str | None
    #: The next password that the legacy server takes is of use for the move.
    needs_credential: bool
    #: Below mail_root.
    home: str
    served: Served
    #: The name by which the legacy server knows the user, if the domain's login form does not tell.
    legacy_login: str | None = None
    #: No login of this user sets a move off.
    declined: bool = False
    #: ``password_hash`` was brought from the legacy side, and no login has renewed it yet.
    imported: bool = False


@dataclass(frozen=True, slots=True)
class Mailbox:
    """A mailbox that is not where mail and logins go by default, to the legacy server.

    There may be a million: what they share (state, next hop, the domain's
    name) is one object for all.
    """

    id: int
    address: Address
    state: State
    epoch: int
    #: After ``lmtp:``, as in transport(5).
    lmtp_next_hop: str
    account: Account | None = None


@dataclass(slots=True)
class Directory:
    """See the module. ``delimiter`` is Postfix's recipient_delimiter, of one character or several."""

    delimiter: str = "+"
    loaded: bool = False
    domains: dict[str, Domain] = field(default_factory=dict)
    mailboxes: dict[Address, Mailbox] = field(default_factory=dict)
    aliases: dict[Address, Address] = field(default_factory=dict)
    #: Mailboxes of their own, not moved, that have a delimiter in their name.
    unmoved: set[Address] = field(default_factory=set)

    def mailbox(self, address: Address) -> Mailbox | None:
        """The mailbox of ``address``, or of it without its detail; None: not one of the exceptions."""
        exact = self.mailboxes.get(address)
        return exact or self.mailboxes.get(self.base(address))

    def of_login(self, name: Address) -> Mailbox | None:
        """The mailbox that a login by this name means, if it is one of those that we know.

        A legacy server may take other names of a user, an alias or one with a detail: after the flip such a name opens
        the mailbox here, and never the one that was left there.
        """
        mailbox = self.mailboxes.get(name)
        if mailbox is not None:
            return mailbox
        owned = self.mailboxes.get(self.owner(name))
        return owned if owned is not None and owned.state in NOT_AT_LEGACY else None

    def base(self, address: Address) -> Address:
        """``address`` without its detail; a mailbox that is known by the whole name is nobody's detail."""
        if address in self.mailboxes or address in self.unmoved:
            return address
        return address.without_detail(self.delimiter)

    def alias(self, address: Address) -> Address | None:
        """The mailbox that ``address`` is another name of; its detail is kept."""
        exact = self.aliases.get(address)
        if exact is not None:
            return exact
        base = self.base(address)
        target = self.aliases.get(base)
        if target is None or base == address:
            return target
        return Address(target.local_part + address.local_part[len(base.local_part) :], target.domain)

    def owner(self, address: Address) -> Address:
        """The mailbox that ``address`` is a name of: itself, or that of an alias; without a detail."""
        return self.base(self.alias(address) or address)
