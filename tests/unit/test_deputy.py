"""What stands in for an authenticator that does not answer: what is left, for whom, and when it is on the disk."""

from __future__ import annotations

import asyncio
import grp
import os
import re
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bascule import hooks, netstring
from bascule.address import Address
from bascule.directory import Account, Directory, Domain, Mailbox, Mode, Served, State
from bascule.errors import BadAddress, BasculeError
from bascule.follower import Follower
from bascule.hooks import deputy
from bascule.hooks.authenticator import left_for_domain, left_for_mailbox
from bascule.hooks.deputy import GOOD, LONGEST, Deputy, Left, domain_file_name, file_name
from bascule.hooks.service import Resident
from bascule.legacy import LegacySettings, LoginForm, Service
from bascule.settings import Settings

HERE, MAIL = "here", Path("/var/vmail")
HASH = "{ARGON2ID}$argon2id$v=19$m=8,t=1,p=1$c2FsdHNhbHQ$aGFzaA"
#: All services that Dovecot has, or Postfix asks it for.
SERVICES = ("imap", "pop3", "submission", "sieve", "smtp", "lmtp", "doveadm", "managesieve", "", "*")


def domain(name: str = "a.test", mode: Mode = "active", *, form: LoginForm = "address", number: int = 1) -> Domain:
    settings = LegacySettings(
        name, "imap.old.test", Service(993, "implicit"), "mx.old.test", 25, login_form=form,
        pop3=Service(110, "starttls"), submission=Service(587, "starttls"),
    )  # fmt: skip
    return Domain(number, mode, settings)


def mailbox(address: str, state: State = "local", *, store: str = HERE, login_host: str | None = None) -> Mailbox:
    parsed = Address.parse(address)
    served = Served(store, login_host, ".", "INBOX.", (("sent", "Gesendet, 1=2"),))
    return Mailbox(1, parsed, state, 1, "unix:/run/lmtp", Account(HASH, False, f"{parsed.domain}/x", served))


def parsed(content: bytes) -> dict[tuple[str, str], str]:
    """As the hooks read it, but by code of ours: request and service, and what is replied."""
    words = [each.decode().split("\0", 2) for each in netstring.Parser().feed(content)]
    return {(word[0], "" if word[0] == "password" else word[1]): word[-1] for word in words}


def of_mailbox(box: Mailbox) -> dict[tuple[str, str], str] | None:
    left = left_for_mailbox(box, domain(), HERE, MAIL)
    return None if left is None else parsed(left.encode())


# What is left -----------------------------------------------------------------------


def test_of_who_is_here() -> None:
    assert of_mailbox(mailbox("al@a.test")) == {
        ("password", ""): HASH,
        ("login", "smtp"): "ok\0user=al@a.test",
        ("login", "*"): "ok\0user=al@a.test",
        ("passdb", "smtp"): "ok\0user=al@a.test",
        ("passdb", "*"): "ok\0user=al@a.test",
        ("userdb", "*"): "\0".join(
            [
                "ok",
                "user=al@a.test",
                "home=/var/vmail/a.test/x",
                "namespace/inbox/separator=.",
                "namespace/inbox/prefix=INBOX.",
                "namespace/inbox/mailbox=bascule_sent",
                "namespace/inbox/mailbox/bascule_sent/name=Gesendet, 1=2",
                "namespace/inbox/mailbox/bascule_sent/special_use=\\Sent",
            ]
        ),
    }


def test_of_who_is_at_another_store() -> None:
    left = of_mailbox(mailbox("al@a.test", store="store2", login_host="store2.test"))
    assert left is not None
    assert left["login", "*"] == "ok\0user=al@a.test\0proxy=y\0host=store2.test\0starttls=yes"
    assert left["login", "smtp"] == "ok\0user=al@a.test"
    assert (left["password", ""], left["userdb", "*"]) == (HASH, "refused")


@pytest.mark.parametrize("state", ["cutover", "returning"])
def test_nobody_logs_in_during_a_hold(state: State) -> None:
    left = of_mailbox(mailbox("al@a.test", state))
    assert left is not None
    assert {key for key, _ in left} == {"userdb"}
    assert left["userdb", "*"].startswith("ok\0")


def test_without_an_account_nothing_is_known() -> None:
    assert of_mailbox(replace(mailbox("al@a.test"), account=None)) == {}


@pytest.mark.parametrize("state", ["legacy", "requested", "copying"])
def test_who_is_at_the_legacy_server_is_as_everybody_else(state: State) -> None:
    assert of_mailbox(mailbox("al@a.test", state)) is None


def named_there(box: Mailbox, name: str) -> Mailbox:
    """The same, with a name of its own at the legacy server."""
    assert box.account is not None
    return replace(box, account=replace(box.account, password_hash=None, legacy_login=name))


def test_of_who_has_a_name_of_their_own_at_the_legacy_server() -> None:
    box = named_there(mailbox("al@a.test", "legacy"), "OLD\\al*")
    assert of_mailbox(box) == {
        ("login", "imap"): "ok\0user=al@a.test\0proxy=y\0host=imap.old.test\0port=993\0ssl=yes\0destuser=OLD\\al*",
        ("login", "pop3"): "ok\0user=al@a.test\0proxy=y\0host=imap.old.test\0port=110\0starttls=yes\0destuser=OLD\\al*",
        ("login", "submission"): "ok\0user=al@a.test\0proxy=y\0host=imap.old.test\0port=587\0starttls=yes"
        "\0destuser=OLD\\al*",
    }
    assert left_for_mailbox(box, domain(mode="closed"), HERE, MAIL) == Left(())


@pytest.mark.parametrize(("form", "more"), [("address", ""), ("local_part", "\0destuser=*")])
def test_of_everybody_else(form: LoginForm, more: str) -> None:
    assert parsed(left_for_domain(domain(form=form)).encode()) == {
        ("login", "imap"): f"ok\0user=*@a.test\0proxy=y\0host=imap.old.test\0port=993\0ssl=yes{more}",
        ("login", "pop3"): f"ok\0user=*@a.test\0proxy=y\0host=imap.old.test\0port=110\0starttls=yes{more}",
        ("login", "submission"): f"ok\0user=*@a.test\0proxy=y\0host=imap.old.test\0port=587\0starttls=yes{more}",
    }


@pytest.mark.parametrize("mode", ["prepared", "active", "closed"])
def test_no_login_of_who_has_not_moved_is_proved_by_a_reply(mode: Mode) -> None:
    """Without a password to compare, Dovecot must be made to ask the legacy server."""
    left = left_for_domain(domain(mode=mode))
    assert left.password_hash is None
    for answer in left.answers:
        if answer.kind == "login":
            assert mode == "active"
            assert answer.service in {"imap", "pop3", "submission", "sieve"}
            assert answer.reply.fields["proxy"] == "y"
            assert answer.reply.fields["host"] == "imap.old.test"
        else:
            assert (mode, answer.reply.result) == ("prepared", "unknown")


# Names ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("local_part", "name"),
    [
        ("al", "al@a.test"),
        ("a/b", "a%2Fb@a.test"),
        ("a%2fb", "a%252fb@a.test"),
        ("..", "%2E.@a.test"),
        (".", "%2E@a.test"),
        ("al.x-y_z~1", "al.x-y_z~1@a.test"),
        ("josé", "jos%C3%A9@a.test"),
        ("a@b", "a%40b@a.test"),
        ("*", "%2A@a.test"),
        ("a\0b", "a%00b@a.test"),
    ],
)
def test_names_of_files(local_part: str, name: str) -> None:
    assert file_name(Address(local_part, "a.test")) == name
    assert domain_file_name("../a.test") == "@%2E.%2Fa.test"


@given(st.text(min_size=1, max_size=64), st.text(min_size=1, max_size=64))
def test_a_name_is_one_file_and_never_another_ones(local_part: str, name: str) -> None:
    try:
        address = Address.parse(f"{local_part}@{name}")
    except (BadAddress, UnicodeError):
        return
    file = file_name(address)
    if file is None or not address.domain:  # "al@." has none
        return
    assert re.fullmatch(r"[a-zA-Z0-9_~%-][a-zA-Z0-9_.~%-]*@[a-zA-Z0-9_.~%-]+", file)
    assert file != domain_file_name(address.domain)
    assert len(file) <= LONGEST


def test_a_name_that_is_too_long_has_no_file() -> None:
    assert file_name(Address("x" * 248, "a.test")) is not None
    assert file_name(Address("x" * 249, "a.test")) is None


# Keeping -----------------------------------------------------------------------------


class Kept:
    def __init__(self, folder: Path) -> None:
        self.folder, self.until = folder / "deputy", folder / "run" / "until"
        for path in (self.folder, self.until.parent):
            path.mkdir(exist_ok=True)
        self.directory = Directory(loaded=True)
        self.directory.domains["a.test"] = domain()
        self.deputy = Deputy(
            self.folder,
            self.until,
            self.directory,
            mailbox=partial(left_for_mailbox, store=HERE, mail_root=MAIL),
            domain=left_for_domain,
        )

    def place(self, address: str, state: State = "local") -> Address:
        box = mailbox(address, state)
        self.directory.mailboxes[box.address] = box
        self.deputy.mailbox_changed(box.address)
        return box.address

    def names(self) -> set[str]:
        return {path.name for path in self.folder.iterdir()}

    async def settled(self) -> None:
        async with asyncio.timeout(20):
            await self.deputy.settled.wait()

    async def complete(self) -> None:
        """Have it said that all is good."""
        self.deputy.sure()
        await self.settled()
        assert self.until.exists()


def keeping(
    tmp_path: Path, work: Callable[[Kept], Awaitable[None]], before: Callable[[Kept], None] | None = None
) -> None:
    async def run() -> None:
        kept = Kept(tmp_path)
        if before is not None:
            before(kept)
        task = asyncio.create_task(kept.deputy.keep())
        async with asyncio.timeout(60):
            await work(kept)
        assert not task.done()
        task.cancel()

    asyncio.run(run())


def test_what_changes_is_written_and_what_goes_is_removed(tmp_path: Path) -> None:
    async def work(kept: Kept) -> None:
        al = kept.place("al@a.test", "cutover")
        await kept.deputy.written(al)
        assert kept.names() == {"al@a.test"}
        file = kept.folder / "al@a.test"
        assert ("login", "*") not in parsed(file.read_bytes())
        kept.place("al@a.test")
        await kept.deputy.written(al)
        assert parsed(file.read_bytes())["password", ""] == HASH
        assert file.stat().st_mode & 0o7777 == 0o640
        kept.place("al@a.test", "copying")
        await kept.deputy.written(al)
        assert kept.names() == set()
        del kept.directory.mailboxes[al]
        kept.deputy.mailbox_changed(al)
        await kept.deputy.written(al)

    before = os.umask(0o077)
    try:
        keeping(tmp_path, work)
    finally:
        os.umask(before)


def test_a_domain_that_changes_changes_who_has_a_name_of_their_own_there(tmp_path: Path) -> None:
    async def work(kept: Kept) -> None:
        al = named_there(mailbox("al@a.test", "legacy"), "old-al")
        kept.directory.mailboxes[al.address] = al
        kept.deputy.mailbox_changed(al.address)
        await kept.deputy.written(al.address)
        file = kept.folder / "al@a.test"
        assert "imap.old.test" in file.read_text()
        settings = replace(kept.directory.domains["a.test"].legacy, imap_host="new-name.old.test")
        kept.directory.domains["a.test"] = replace(kept.directory.domains["a.test"], legacy=settings)
        kept.deputy.domains_changed()
        await kept.settled()
        assert "host=new-name.old.test" in file.read_text()
        assert "destuser=old-al" in file.read_text()
        kept.directory.aliases = {Address.parse("desk@a.test"): al.address}
        kept.deputy.domains_changed()
        await kept.settled()
        assert kept.names() == {"@a.test", "al@a.test"}, "an alias is known there by itself, if at all"

    keeping(tmp_path, work)


def test_an_alias_of_who_has_moved_has_the_same_file(tmp_path: Path) -> None:
    """A legacy server that takes aliases for names must not open the mailbox that was left there."""

    async def work(kept: Kept) -> None:
        al = kept.place("al@a.test")
        desk, door = Address.parse("desk@a.test"), Address.parse("door@a.test")
        kept.directory.aliases = {desk: al, door: kept.place("bo@a.test", "copying")}
        kept.deputy.domains_changed()
        await kept.settled()
        assert kept.names() == {"@a.test", "al@a.test", "desk@a.test"}
        assert (kept.folder / "desk@a.test").read_bytes() == (kept.folder / "al@a.test").read_bytes()
        kept.place("bo@a.test")
        kept.place("al@a.test", "returning")
        await kept.settled()
        assert kept.names() == {"@a.test", "al@a.test", "desk@a.test", "bo@a.test", "door@a.test"}
        assert ("login", "*") not in parsed((kept.folder / "desk@a.test").read_bytes())
        kept.place("al@a.test", "legacy")
        kept.directory.aliases = {}
        kept.deputy.domains_changed()
        await kept.settled()
        assert kept.names() == {"@a.test", "bo@a.test"}

    keeping(tmp_path, work)


def test_files_have_the_group_of_their_folder(tmp_path: Path) -> None:
    """Dovecot's, whom their owner does not belong to."""
    if os.geteuid() != 0:
        pytest.skip("only root can give a folder away")

    async def work(kept: Kept) -> None:
        await kept.deputy.written(kept.place("al@a.test"))
        assert (kept.folder / "al@a.test").stat().st_gid == grp.getgrnam("nogroup").gr_gid

    def give(kept: Kept) -> None:
        os.chown(kept.folder, 0, grp.getgrnam("nogroup").gr_gid)
        kept.folder.chmod(0o2750)

    keeping(tmp_path, work, give)


def test_at_the_start_all_is_compared_and_only_then_good(tmp_path: Path) -> None:
    """What is as it should be is not touched, what is not is written, what is nobody's is removed."""
    former = Kept(tmp_path)
    for number in range(500):
        former.place(f"u{number}@a.test")

    async def first(kept: Kept) -> None:
        kept.directory.mailboxes = dict(former.directory.mailboxes)
        await kept.complete()
        assert len(kept.names()) == 501

    keeping(tmp_path, first)
    inodes = {path.name: path.stat().st_ino for path in former.folder.iterdir()}
    (former.folder / "u7@a.test").write_bytes(b"half")
    (former.folder / "gone@a.test").write_bytes(b"x")
    (former.folder / "u1@gone.test").write_bytes(b"x")
    (former.folder / "@gone.test").write_bytes(b"x")
    (former.folder / "%FF@a.test").write_bytes(b"nobody's")
    foreign = former.folder / os.fsdecode(b"\xff@a.test")
    foreign.write_bytes(b"nobody's")
    (former.folder / "u8@a.test").unlink()
    former.until.unlink()

    async def second(kept: Kept) -> None:
        kept.directory.mailboxes = dict(former.directory.mailboxes)
        kept.deputy.domains_changed()
        await kept.settled()
        assert not kept.until.exists(), "nobody has said that the directory is what the database says"
        await kept.complete()
        foreign.unlink()
        (kept.folder / "%FF@a.test").unlink()
        now = {path.name: path.stat().st_ino for path in kept.folder.iterdir()}
        assert now.keys() == inodes.keys()
        assert {name for name in now if now[name] != inodes[name]} <= {"u7@a.test", "u8@a.test"}
        assert parsed((kept.folder / "u7@a.test").read_bytes())["password", ""] == HASH
        assert time.time() + GOOD - 60 < float(kept.until.read_text()) <= time.time() + GOOD + 1
        assert kept.until.stat().st_mode & 0o777 == 0o644

    keeping(tmp_path, second)


def test_another_legacy_server_is_in_the_domains_file(tmp_path: Path) -> None:
    async def work(kept: Kept) -> None:
        await kept.complete()
        file = kept.folder / "@a.test"
        assert "host=imap.old.test" in parsed(file.read_bytes())["login", "imap"]
        before = kept.directory.domains["a.test"]
        kept.directory.domains["a.test"] = replace(before, legacy=replace(before.legacy, imap_host="new.old.test"))
        kept.deputy.domains_changed()
        await kept.settled()
        assert "host=new.old.test" in parsed(file.read_bytes())["login", "imap"]
        del kept.directory.domains["a.test"]
        kept.deputy.domains_changed()
        await kept.settled()
        assert not file.exists()

    keeping(tmp_path, work)


def test_a_change_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the disk: ``written`` returns when the file is there, never before; the loop goes on meanwhile."""
    begun, go = threading.Event(), threading.Event()
    real = Deputy._replace

    def slow(path: Path, content: bytes, mode: int) -> None:
        begun.set()
        assert go.wait(20)
        real(path, content, mode)

    monkeypatch.setattr(Deputy, "_replace", staticmethod(slow))

    async def work(kept: Kept) -> None:
        al = kept.place("al@a.test", "cutover")
        waiting = asyncio.create_task(kept.deputy.written(al))
        await asyncio.to_thread(begun.wait, 20)
        await asyncio.sleep(0.05)
        assert not waiting.done()
        assert kept.names() == set()
        # It changes once more: that is waited for as well.
        kept.place("al@a.test")
        go.set()
        await waiting
        assert parsed((kept.folder / "al@a.test").read_bytes())["password", ""] == HASH

    keeping(tmp_path, work)


@pytest.mark.parametrize("state", ["cutover", "local", "returning"])
def test_a_hold_is_on_the_disk_before_it_is_acknowledged(monkeypatch: pytest.MonkeyPatch, state: State) -> None:
    """What is not on the disk is not acknowledged; sessions end when no new one comes about by the file of before."""
    done: list[str] = []
    box = mailbox("al@a.test", state)
    resident = Resident(Settings())

    async def written(_deputy: Deputy, address: Address) -> None:
        assert address == box.address
        await asyncio.sleep(0.01)
        done.append("written")

    async def kick(_resident: Resident, _address: Address) -> bool:
        done.append("kicked")
        return False

    async def acknowledge(_follower: Follower, _box: Mailbox) -> None:
        done.append("acknowledged")

    async def full(_deputy: Deputy, _address: Address) -> None:
        raise BasculeError("no space")

    monkeypatch.setattr(Deputy, "written", written)
    monkeypatch.setattr(Resident, "_kick", kick)
    monkeypatch.setattr(Follower, "acknowledge", acknowledge)

    async def changes() -> None:
        resident._changed(None, box)
        await asyncio.gather(*resident._tasks, return_exceptions=True)

    asyncio.run(changes())
    assert done == ["written", "kicked", "acknowledged"]
    monkeypatch.setattr(Deputy, "written", full)
    asyncio.run(changes())
    assert done == ["written", "kicked", "acknowledged"]


def test_a_disk_that_takes_nothing_is_tried_again_and_nothing_is_called_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deputy, "RETRY", 0.01)
    monkeypatch.setattr(deputy, "PATIENCE", 0.2)

    async def work(kept: Kept) -> None:
        kept.folder.rename(tmp_path / "elsewhere")
        al = kept.place("al@a.test", "cutover")
        kept.deputy.sure()
        with pytest.raises(BasculeError, match=r"al@a\.test is not on the disk") as raised:
            await kept.deputy.written(al)
        assert str(kept.folder) in raised.value.hint
        assert not kept.until.exists()
        kept.folder.mkdir()
        monkeypatch.setattr(deputy, "PATIENCE", 20)
        await kept.deputy.written(al)
        await kept.settled()
        assert kept.until.exists()
        assert kept.names() == {"al@a.test", "@a.test"}

    keeping(tmp_path, work)


def test_it_is_put_off_each_minute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(kept: Kept) -> None:
        await kept.complete()
        before = kept.until.read_text()
        monkeypatch.setattr(deputy, "GOOD", GOOD + 5)
        await kept.complete()
        assert kept.until.read_text() == before
        monkeypatch.setattr(deputy, "REFRESH", 0.0)
        await kept.complete()
        assert float(kept.until.read_text()) >= float(before) + 5

    keeping(tmp_path, work)


def test_many_mailboxes_do_not_hold_up_the_loop(tmp_path: Path) -> None:
    async def work(kept: Kept) -> None:
        for number in range(20_000):
            box = mailbox(f"u{number}@a.test")
            kept.directory.mailboxes[box.address] = box
        kept.deputy.sure()
        longest, last = 0.0, time.monotonic()
        while not kept.deputy.settled.is_set():
            await asyncio.sleep(0.001)
            longest, last = max(longest, time.monotonic() - last), time.monotonic()
        assert longest < 1.0
        assert len(kept.names()) == 20_001

    keeping(tmp_path, work)


# The same rules elsewhere -----------------------------------------------------------


def test_hooks_know_the_same_limits() -> None:
    for name in ("passdb.lua", "bascule-checkpassword"):
        text = (Path(hooks.__file__).parent / name).read_text()
        assert f"LONGEST = {LONGEST} " in text
