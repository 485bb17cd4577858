"""The one decision: who may log in where, where mailboxes are, and what guesses cost."""

from __future__ import annotations

import asyncio
import hashlib
from base64 import b64encode
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial
from ipaddress import ip_network
from pathlib import Path
from typing import Any, cast

import pytest

from bascule.address import Address
from bascule.attempts import PER_ACCOUNT, PER_DOMAIN, PER_SOURCE, Attempts
from bascule.credential import Password, Sealer
from bascule.directory import Account, Directory, Domain, Mailbox, Mode, Served, State
from bascule.errors import DatabaseUnavailable, LegacyRefusedLogin, LegacyUnavailable
from bascule.hooks import pace
from bascule.hooks.authenticator import Authenticator
from bascule.hooks.database import Database
from bascule.hooks.legacy_logins import LegacyLogins
from bascule.hooks.protocol import Login, Lookup, Reply
from bascule.hooks.service import has_new_password, write_domains
from bascule.legacy import LegacySettings, Service

RIGHT, HASH = "right", Password("right").hashed()
SERVED = Served("here", None, ".", "INBOX.", (("sent", "Gesendet"),))


class Sealing:
    """In the sealer's place, whose key would be a file."""

    def seal(self, password: Password) -> bytes:
        return password.secret.encode()


class Legacy:
    """A legacy server whose users all have the same password."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.names: list[str] = []
        self.answer: Exception | None = None
        self.meanwhile: Callable[[], object] = lambda: None

    async def check(self, legacy: LegacySettings, address: Address, password: Password) -> None:
        self.asked.append(str(address))
        self.names.append(legacy.login_name(address))
        await asyncio.sleep(0)
        self.meanwhile()
        if self.answer is not None:
            raise self.answer
        if password.secret != RIGHT:
            raise LegacyRefusedLogin("wrong")


class Asked:
    """A database that answers with these rows, or does not."""

    def __init__(self) -> None:
        self.rows: list[Any] | None = None
        self.questions: list[Sequence[object]] = []

    async def ask(self, query: str, *parameters: object, **_: float) -> list[Any]:
        self.questions.append((query, *parameters))
        if self.rows is None:
            raise DatabaseUnavailable("away")
        return self.rows


class Field:
    """An authenticator with all that it speaks to."""

    def __init__(self) -> None:
        self.directory = Directory(loaded=True)
        modes: dict[str, Mode] = {"active.test": "active", "closed.test": "closed", "prepared.test": "prepared"}
        for number, (name, mode) in enumerate(modes.items()):
            settings = LegacySettings(name, "imap.old.test", Service(993, "implicit"), "mx.old.test", 25)
            self.directory.domains[name] = Domain(number, mode, settings)
        for address, state in (
            ("here@active.test", "local"), ("copying@active.test", "copying"), ("moving@active.test", "cutover"),
            ("leaving@active.test", "returning"), ("here@closed.test", "local"),
        ):  # fmt: skip
            self.place(address, cast("State", state))
        self.legacy, self.database = Legacy(), Asked()
        self.attempts = Attempts([ip_network("127.0.0.0/8")])
        self.authenticator = Authenticator(
            self.directory,
            cast("Database", self.database),
            sealer=cast("Sealer", Sealing()),
            legacy_logins=cast("LegacyLogins", self.legacy),
            attempts=self.attempts,
            store="here",
            mail_root=Path("/var/vmail"),
            cutover_wait=0.2,
        )

    def place(
        self, address: str, state: State, *, password_hash: str | None = HASH, served: Served = SERVED
    ) -> Mailbox:
        parsed = Address.parse(address)
        account = Account(password_hash if state == "local" else None, False, f"{parsed.domain}/x", served)
        mailbox = Mailbox(1, parsed, state, 1, "unix:/run/lmtp", account)
        self.directory.mailboxes[parsed] = mailbox
        return mailbox

    async def log_in(
        self, user: str, password: str = RIGHT, *, service: str = "imap", source: str = "192.0.2.1"
    ) -> Reply:
        return await self.authenticator.log_in(Login(user, Password(password), service, source))


def run(work: Callable[[Field], Awaitable[None]]) -> None:
    async def running() -> None:
        async with asyncio.timeout(60):
            await work(Field())

    asyncio.run(running())


@pytest.mark.parametrize(
    ("user", "password", "result"),
    [
        ("here@active.test", "right", "ok"),
        ("HERE@Active.Test", "right", "ok"),
        ("here@active.test", "wrong", "refused"),
        ("moving@active.test", "right", "temporary"),
        ("leaving@active.test", "right", "temporary"),
        ("copying@active.test", "right", "ok"),
        ("new@active.test", "right", "ok"),
        ("new@active.test", "wrong", "refused"),
        ("here@closed.test", "right", "ok"),
        ("new@closed.test", "right", "refused"),
        ("new@prepared.test", "right", "ok"),
        # Until the domain is active, they may be users of the operator's.
        ("new@prepared.test", "wrong", "unknown"),
        ("here@elsewhere.test", "right", "unknown"),
        ("here", "right", "unknown"),
        # Such names are nobody's; those in our domains are not for others to take.
        ("a b@active.test", "right", "refused"),
        ("a b@elsewhere.test", "right", "unknown"),
    ],
)
def test_who_may_log_in(user: str, password: str, result: str) -> None:
    async def work(field: Field) -> None:
        reply = await field.log_in(user, password)
        assert reply.result == result
        if result == "ok":
            assert reply.fields["user"] == user.lower()
            assert ("proxy" in reply.fields) == (not user.lower().startswith("here"))
        assert all(not each.startswith("here") for each in field.legacy.asked), "the legacy server has no say"

    run(work)


def test_nothing_is_decided_before_the_first_load() -> None:
    async def work(field: Field) -> None:
        field.directory.loaded = False
        for user in ("here@active.test", "here@elsewhere.test"):
            assert (await field.log_in(user)).result == "temporary"
            assert (await field.authenticator.look_up(Lookup("userdb", user, "lmtp"))).result == "temporary"

    run(work)


@pytest.mark.parametrize(
    ("user", "result"),
    [
        ("here@active.test", "ok"),
        ("moving@active.test", "ok"),
        ("leaving@active.test", "ok"),
        ("copying@active.test", "temporary"),  # for the database is away
        ("new@active.test", "refused"),
        ("new@closed.test", "refused"),
        ("new@prepared.test", "unknown"),
        ("here@elsewhere.test", "unknown"),
        ("here", "unknown"),
        ("a b@active.test", "refused"),
    ],
)
def test_where_a_mailbox_is(user: str, result: str) -> None:
    async def work(field: Field) -> None:
        reply = await field.authenticator.look_up(Lookup("userdb", user, "lmtp"))
        assert reply.result == result
        if result == "ok":
            assert reply.fields == {
                "user": user,
                "home": "/var/vmail/active.test/x",
                "namespace/inbox/separator": ".",
                "namespace/inbox/prefix": "INBOX.",
                "namespace/inbox/mailbox": "bascule_sent",
                "namespace/inbox/mailbox/bascule_sent/name": "Gesendet",
                "namespace/inbox/mailbox/bascule_sent/special_use": "\\Sent",
            }

    run(work)


def test_a_mailbox_that_is_being_copied_is_asked_of_the_database() -> None:
    """Its worker may just have learnt the separator."""

    async def work(field: Field) -> None:
        field.database.rows = [(None, False, "active.test/copying", "here", None, "/", "", {})]
        reply = await field.authenticator.look_up(Lookup("userdb", "copying@active.test", "doveadm"))
        assert reply.fields["namespace/inbox/separator"] == "/"

    run(work)


def test_another_store_has_its_own_users() -> None:
    async def work(field: Field) -> None:
        field.place("afar@active.test", "local", served=Served("store2", "store2.test", "/", ""))
        assert sorted(field.authenticator.users()) == ["here@active.test", "here@closed.test"]
        assert (await field.authenticator.look_up(Lookup("userdb", "afar@active.test", "lmtp"))).result == "refused"
        for reply in (
            await field.log_in("afar@active.test"),
            await field.authenticator.look_up(Lookup("passdb", "afar@active.test", "imap")),
        ):
            assert (reply.result, reply.fields["proxy"], reply.fields["host"]) == ("ok", "y", "store2.test")

    run(work)


def test_a_lookup_gives_no_password_and_no_hash() -> None:
    async def work(field: Field) -> None:
        first, second = [
            await field.authenticator.look_up(Lookup("passdb", "here@active.test", "imap")) for _ in range(2)
        ]
        assert first.fields["password"] != second.fields["password"]
        assert HASH not in str(first)
        for user, result in (("copying@active.test", "refused"), ("moving@active.test", "temporary")):
            assert (await field.authenticator.look_up(Lookup("passdb", user, "imap"))).result == result

    run(work)


def test_a_flip_while_the_legacy_server_is_asked() -> None:
    async def work(field: Field) -> None:
        field.legacy.meanwhile = partial(field.place, "new@active.test", "local")
        reply = await field.log_in("new@active.test")
        assert (reply.result, "proxy" in reply.fields) == ("ok", False)

    run(work)


# Guesses ---------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "PACE", {"account": 0.05, "source": 0.05, "domain": 0.01})
    monkeypatch.setattr(pace, "PATIENCE", 3.0)


async def guess(field: Field, user: str, times: int, source: str) -> list[str]:
    replies = [
        field.log_in(user, f"guess {number} from {source}", source=source.format(number)) for number in range(times)
    ]
    return [reply.result for reply in await asyncio.gather(*replies)]


@pytest.mark.parametrize("user", ["here@active.test", "new@active.test"])
@pytest.mark.parametrize("source", ["127.0.0.1", "198.51.100.{}"])
def test_guesses_are_slowed_down_and_the_owner_comes_in(
    monkeypatch: pytest.MonkeyPatch, user: str, source: str
) -> None:
    """Moved or not, from one webmail or from everywhere; all at once, before there is an answer to any."""
    monkeypatch.setattr(pace, "PACE", {"account": 0.4, "source": 0.4, "domain": 0.01})
    monkeypatch.setattr(pace, "PATIENCE", 1.0)

    async def work(field: Field) -> None:
        results = await guess(field, user, 60, source)
        assert PER_ACCOUNT.amount <= results.count("refused") <= PER_ACCOUNT.amount + 4
        assert set(results) == {"refused", "temporary"}
        # The guessing goes on while the owner comes from a place where nobody has seen them.
        again = asyncio.create_task(guess(field, user, 60, source))
        await asyncio.sleep(0.1)
        assert (await field.log_in(user, source="203.0.113.9")).result == "ok"
        # From there they are known now, and do not wait.
        async with asyncio.timeout(20):
            assert await field.log_in(user, source="203.0.113.9")
        await again

    run(work)


def test_a_webmail_is_at_home_nowhere(quick: None) -> None:
    async def work(field: Field) -> None:
        assert (await field.log_in("here@active.test", source="127.0.0.1")).result == "ok"
        assert await guess(field, "here@active.test", PER_ACCOUNT.amount, "127.0.0.1")
        assert [limit.kind for limit in field.attempts.reached(Address.parse("here@active.test"), "127.0.0.1")] == [
            "account"
        ]

    run(work)


def test_one_password_at_many_accounts(quick: None) -> None:
    """A spray, from everywhere: strangers are slow in the whole domain, who is known is not."""

    async def work(field: Field) -> None:
        await field.log_in("owner@active.test", source="203.0.113.9")
        for number in range(PER_DOMAIN.amount):
            field.attempts.failed(
                Address(f"u{number}", "active.test"), Password("x"), f"198.51.{number // 250}.{number}"
            )
        stranger, owner = Address("new", "active.test"), Address("owner", "active.test")
        assert [limit.kind for limit in field.attempts.reached(stranger, "203.0.113.1")] == ["domain"]
        assert field.attempts.reached(owner, "203.0.113.9") == []
        assert (await field.log_in("new@active.test", source="203.0.113.1")).result == "ok", "after a moment"

    run(work)


def test_a_source_that_guesses_waits_at_every_account(quick: None) -> None:
    async def work(field: Field) -> None:
        for number in range(PER_SOURCE.amount):
            field.attempts.failed(Address(f"u{number}", "active.test"), Password("x"), "192.0.2.1")
        reached = field.attempts.reached(Address("new", "active.test"), "192.0.2.1")
        assert [str(limit) for limit in reached] == ["too many wrong passwords from 192.0.2.1"]

    run(work)


def test_another_hash_and_nothing_is_remembered() -> None:
    """A password that was changed is forgotten at once."""

    async def work(field: Field) -> None:
        before = field.directory.mailboxes[Address.parse("here@active.test")]
        assert (await field.log_in("here@active.test")).result == "ok"
        after = field.place("here@active.test", "local", password_hash=Password("another").hashed())
        assert (await field.log_in("here@active.test")).result == "refused"
        assert (await field.log_in("here@active.test", "another")).result == "ok"
        assert has_new_password(before, after)
        assert not has_new_password(before, before)
        assert not has_new_password(replace(before, state="cutover"), after)

    run(work)


def test_only_who_reads_mail_here_is_moved_by_it() -> None:
    async def work(field: Field) -> None:
        field.database.rows = []
        for service in ("smtp", "submission", "sieve"):
            field.directory.domains["active.test"] = replace(
                field.directory.domains["active.test"],
                legacy=replace(
                    field.directory.domains["active.test"].legacy,
                    pop3=Service(995, "implicit"), submission=Service(587, "starttls"), sieve=Service(4190, "starttls"),
                ),
            )  # fmt: skip
            assert (await field.log_in("new@active.test", service=service)).result == "ok"
            await asyncio.sleep(0)
        assert field.database.questions == []
        for service in ("imap", "pop3"):
            assert (await field.log_in(f"by-{service}@active.test", service=service)).result == "ok"
            await asyncio.sleep(0.01)
        assert [question[1:] for question in field.database.questions] == [
            (f"by-{service}@active.test", b"right", service) for service in ("imap", "pop3")
        ]
        # Once is enough; a login that could not be recorded is again.
        await field.log_in("by-imap@active.test")
        await asyncio.sleep(0.01)
        assert len(field.database.questions) == 2
        field.database.rows = None
        for _ in range(2):
            await field.log_in("unrecorded@active.test")
            await asyncio.sleep(0.01)
        assert len(field.database.questions) == 4

    run(work)


def test_a_legacy_server_that_cannot_say_is_temporary() -> None:
    async def work(field: Field) -> None:
        field.legacy.answer = LegacyUnavailable("away")
        assert (await field.log_in("new@active.test", "wrong")).result == "temporary"
        field.legacy.answer = None
        assert (await field.log_in("new@active.test", "wrong")).result == "refused"

    run(work)


def test_the_list_of_domains_is_for_everybody(tmp_path: Path) -> None:
    write_domains(tmp_path / "domains", frozenset({"b.test", "a.test"}))
    text = (tmp_path / "domains").read_text()
    assert text.endswith("\na.test\nb.test\n")
    assert (tmp_path / "domains").stat().st_mode & 0o777 == 0o644
    assert [path.name for path in tmp_path.iterdir()] == ["domains"]


# Brought hashes, no password, other names ---------------------------------------------

BROUGHT = "{SSHA}" + b64encode(hashlib.sha1(b"right" + b"salt").digest() + b"salt").decode()  # noqa: S324 (the legacy side's)


def place_with(field: Field, address: str, state: State, *, first: str | None = None, **changes: Any) -> Mailbox:
    mailbox = field.place(address, state, password_hash=first)
    assert mailbox.account is not None
    mailbox = replace(mailbox, account=replace(mailbox.account, **changes))
    field.directory.mailboxes[mailbox.address] = mailbox
    return mailbox


async def asked(field: Field, function: str) -> list[Sequence[object]]:
    """What the database was asked by this function, once all that logins leave behind is done."""
    await asyncio.gather(*field.authenticator._recording.values())
    return [each for each in field.database.questions if f"bascule.{function}(" in str(each[0])]


def test_a_brought_hash_is_verified_and_renewed_by_the_right_password_only() -> None:
    async def work(field: Field) -> None:
        field.database.rows = []
        place_with(field, "brought@active.test", "local", first=BROUGHT, imported=True)
        assert (await field.log_in("brought@active.test", "wrong")).result == "refused"
        assert await asked(field, "renew_password") == []
        reply = await field.log_in("brought@active.test")
        assert (reply.result, "proxy" in reply.fields) == ("ok", False)
        ((_, address, former, renewed),) = await asked(field, "renew_password")
        assert (address, former) == ("brought@active.test", BROUGHT)
        assert str(renewed).startswith("{ARGON2ID}")
        assert Password(RIGHT).matches(str(renewed))
        assert field.legacy.asked == []
        # One of our own is not renewed.
        assert (await field.log_in("here@active.test")).result == "ok"
        assert len(await asked(field, "renew_password")) == 1

    run(work)


def test_a_login_goes_on_when_its_hash_cannot_be_renewed() -> None:
    async def work(field: Field) -> None:
        place_with(field, "brought@active.test", "local", first=BROUGHT, imported=True)
        assert (await field.log_in("brought@active.test")).result == "ok"
        assert len(await asked(field, "renew_password")) == 1
        assert (await field.log_in("brought@active.test")).result == "ok"

    run(work)


def test_guesses_at_a_brought_hash_are_slowed_down(quick: None) -> None:
    async def work(field: Field) -> None:
        place_with(field, "brought@active.test", "local", first=BROUGHT, imported=True)
        await guess(field, "brought@active.test", PER_ACCOUNT.amount, "198.51.100.1")
        reached = field.attempts.reached(Address.parse("brought@active.test"), "203.0.113.1")
        assert [limit.kind for limit in reached] == ["account"]

    run(work)


def test_who_moved_without_a_password_is_asked_about_at_the_legacy_server() -> None:
    async def work(field: Field) -> None:
        field.database.rows = []
        place_with(field, "wordless@active.test", "local")
        assert (await field.log_in("wordless@active.test", "wrong")).result == "refused"
        field.legacy.answer = LegacyUnavailable("away")
        assert (await field.log_in("wordless@active.test")).result == "temporary"
        field.legacy.answer = None
        assert await asked(field, "take_first_password") == []
        reply = await field.log_in("wordless@active.test")
        assert (reply.result, "proxy" in reply.fields) == ("ok", False), "the mailbox is here"
        ((_, address, first),) = await asked(field, "take_first_password")
        assert address == "wordless@active.test"
        assert Password(RIGHT).matches(str(first))
        assert await asked(field, "record_login") == []

    run(work)


def test_once_the_domain_is_closed_nobody_is_asked() -> None:
    async def work(field: Field) -> None:
        place_with(field, "wordless@closed.test", "local")
        assert (await field.log_in("wordless@closed.test")).result == "refused"
        assert field.legacy.asked == []

    run(work)


@pytest.mark.parametrize("name", ["desk@active.test", "desk+tag@active.test", "here+tag@active.test"])
def test_another_name_of_who_has_moved_opens_the_mailbox_here(name: str) -> None:
    """A legacy server that takes aliases for user names must not say yes for them: the mailbox there is left behind."""

    async def work(field: Field) -> None:
        field.directory.aliases[Address.parse("desk@active.test")] = Address.parse("here@active.test")
        reply = await field.log_in(name)
        assert (reply.result, reply.fields["user"]) == ("ok", "here@active.test")
        assert "proxy" not in reply.fields
        assert (await field.log_in(name, "wrong")).result == "refused"
        assert field.legacy.asked == []

    run(work)


def test_sessions_end_for_another_password_and_not_for_a_better_hash() -> None:
    async def work(field: Field) -> None:
        without = place_with(field, "x@active.test", "local")
        brought = place_with(field, "x@active.test", "local", first=BROUGHT, imported=True)
        brought_again = place_with(field, "x@active.test", "local", first=HASH, imported=True)
        own = place_with(field, "x@active.test", "local", first=HASH)
        assert not has_new_password(without, own)
        assert not has_new_password(without, brought)
        assert not has_new_password(brought, own)
        assert has_new_password(brought, brought_again)
        assert has_new_password(own, brought)
        assert has_new_password(own, place_with(field, "x@active.test", "local", first=Password("other").hashed()))

    run(work)


def test_a_user_is_known_to_the_legacy_server_by_the_name_that_was_told() -> None:
    async def work(field: Field) -> None:
        field.database.rows = []
        place_with(field, "named@active.test", "legacy", legacy_login="OLD\\u12345")
        reply = await field.log_in("named@active.test")
        assert reply.fields["destuser"] == "OLD\\u12345"
        assert reply.fields["user"] == "named@active.test"
        assert field.legacy.names == ["OLD\\u12345"]
        assert len(await asked(field, "record_login")) == 1, "a first login moves them as others"
        place_with(field, "declined@active.test", "legacy", legacy_login="x", declined=True)
        assert (await field.log_in("declined@active.test")).result == "ok"
        assert len(await asked(field, "record_login")) == 1
        assert (await field.log_in("new@active.test")).fields.get("destuser") is None
        # An alias of who has not moved is known to the legacy server by itself, if at all.
        field.directory.aliases[Address.parse("desk@active.test")] = Address.parse("named@active.test")
        assert "destuser" not in (await field.log_in("desk@active.test")).fields

    run(work)


def test_another_name_waits_for_the_flip_and_a_mailbox_of_its_own_does_not() -> None:
    async def work(field: Field) -> None:
        field.directory.aliases[Address.parse("desk@active.test")] = Address.parse("moving@active.test")
        assert (await field.log_in("desk@active.test")).result == "temporary"
        field.directory.unmoved.add(Address.parse("here+own@active.test"))
        assert (await field.log_in("here+own@active.test")).fields["proxy"] == "y"
        field.directory.aliases[Address.parse("door@active.test")] = Address.parse("copying@active.test")
        assert (await field.log_in("door@active.test")).fields["user"] == "door@active.test"

    run(work)
