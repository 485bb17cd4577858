"""A return: each message is there once, whoever dies, whatever the legacy server makes of it."""

from __future__ import annotations

import gzip
import os
from collections import Counter
from pathlib import Path
from typing import cast

import pytest

from bascule.errors import BasculeError, LegacyUnavailable
from bascule.imap.folder_rules import FolderRule
from bascule.imap.writer import Writer
from bascule.lab.attempts import Killed, World
from bascule.lab.memory import Mail
from bascule.migrator import returning
from bascule.migrator.delivery import Delivery
from bascule.migrator.return_plan import Implausible
from bascule.migrator.returning import CalledOff, NotClean, Return, give_back, names_there
from bascule.migrator.storage import EVIDENCE
from bascule.migrator.sweep import Late, MailboxGone, sweep


def mail(text: str) -> bytes:
    return f"Subject: {text}\r\nMessage-ID: <{text}@lab.test>\r\n\r\n{text}\r\n".encode()


def texts(world: World) -> dict[str, Counter[str]]:
    """What each folder at the legacy server holds, by subject."""
    return {
        name: Counter(body.decode().split("Subject: ")[1].splitlines()[0] for body, _, _ in found)
        for name, found in world.there.contents().items()
    }


def used(home: Path) -> World:
    """A user whose INBOX had A and B, who has removed B, got N twice to the last byte, and has made a folder."""
    world = World(home)
    world.there.put("INBOX", mail("A"), date=10)
    world.there.put("INBOX", mail("B"), date=20)
    world.there.put("Sent", mail("S"), date=10, flags={"old"})
    world.flip()
    world.here.put("INBOX", mail("N"), date=30, flags={"\\Seen", "todo"})
    world.here.put("INBOX", mail("N"), date=30)
    world.here.make("Made here")
    world.here.put("Made here", b"Subject: M\r\n\r\n", date=31, flags={"\\Deleted"})  # it has no Message-ID
    world.here.subscribed.add("Made here")
    del world.here.folders["INBOX"].mails[2]
    world.here.folders["Sent"].mails[1].flags = frozenset({"\\Flagged", "new"})
    return world


GIVEN_BACK = {"INBOX": Counter("ANN"), "Sent": Counter("S"), "Made here": Counter("M")}


def flags(world: World) -> dict[str, list[frozenset[str]]]:
    return {
        name: sorted((each.flags for each in folder.mails.values()), key=sorted)
        for name, folder in world.there.folders.items()
    }


def test_everything_goes_back(tmp_path: Path) -> None:
    world = used(tmp_path)
    give_back(world.attempt())
    assert texts(world) == GIVEN_BACK
    assert flags(world)["INBOX"] == [frozenset(), frozenset(), frozenset({"\\Seen", "todo"})]
    assert flags(world)["Sent"] == [frozenset({"\\Flagged", "new"})]
    assert flags(world)["Made here"] == [frozenset({"\\Deleted"})]
    assert world.there.subscribed == {"Made here"}
    assert world.acts.state == "legacy"
    assert world.acts.left_behind == ""
    assert not (tmp_path / ".bascule-known").exists()


def test_a_folder_that_list_leaves_out_is_not_filled_once_more(tmp_path: Path) -> None:
    world = used(tmp_path)
    world.there.unlisted = {"Sent"}
    give_back(world.attempt())
    assert texts(world) == GIVEN_BACK


def uidplus(world: World) -> None:
    """As nearly all servers are."""


def no_uidplus(world: World) -> None:
    world.there.has_uidplus = False


def alters(world: World) -> None:
    world.there.alters = lambda body: b"X-Seen-By: Exchange\r\n" + body


def alters_and_no_uidplus(world: World) -> None:
    no_uidplus(world)
    alters(world)


def ignores_dates(world: World) -> None:
    no_uidplus(world)
    world.there.keeps_dates = False


def insists_on_select(world: World) -> None:
    world.there.insists_on_select = True


SERVERS = pytest.mark.parametrize(
    "server",
    [uidplus, no_uidplus, alters, alters_and_no_uidplus, ignores_dates, insists_on_select],
    ids=lambda each: each.__name__,
)


@SERVERS
def test_whoever_dies_at_whatever_step_each_message_is_there_once(tmp_path: Path, server: object) -> None:
    """Also two that are equal to the last byte; the next attempts do not append anything again."""
    step = 0
    while True:
        step += 1
        home = tmp_path / str(step)
        home.mkdir()
        world = used(home)
        assert callable(server)
        server(world)
        world.there.tick = world.steps.tick
        world.steps.die_at = step
        try:
            give_back(world.attempt())
        except Killed:
            world.acts.state = "local" if world.acts.state == "returning" else world.acts.state
            if world.acts.state == "local":
                give_back(world.attempt())
        assert texts(world) == GIVEN_BACK, (step, world.there.written)
        assert flags(world)["Made here"] == [frozenset({"\\Deleted"})], step
        if world.steps.done < step:
            break
    assert step > 20


@SERVERS
def test_a_return_that_was_called_off_leaves_nothing_that_is_late(tmp_path: Path, server: object) -> None:
    step = 0
    while True:
        step += 1
        home = tmp_path / str(step)
        home.mkdir()
        world = used(home)
        assert callable(server)
        server(world)
        before = world.here.contents()
        world.there.tick = world.steps.tick
        world.steps.die_at = step
        try:
            give_back(world.attempt())
            break
        except Killed:
            if world.acts.state == "legacy":
                break
        world.acts.state = "local"
        sweep(world.attempt())
        assert world.here.contents() == before, step
        give_back(world.attempt())
        assert texts(world) == GIVEN_BACK, step
    assert step > 20


def test_what_came_late_is_where_it_belongs_also_in_a_folder_that_is_not_here(tmp_path: Path) -> None:
    world = used(tmp_path)
    world.there.make("Late")
    world.there.put("Late", mail("L"), date=40)
    world.there.put("INBOX", mail("K"), date=40)
    sweep(world.attempt())
    world.there.put("INBOX", mail("J"), date=41)  # nobody has brought it yet
    give_back(world.attempt())
    assert texts(world) == GIVEN_BACK | {"INBOX": Counter("ANNKJ"), "Late": Counter("L")}
    assert world.there.written.count("APPEND INBOX") == 2


def test_a_late_message_that_was_renumbered_is_not_taken_for_another(tmp_path: Path) -> None:
    world = used(tmp_path)
    world.there.put("INBOX", mail("L"), date=50, order=2)
    sweep(world.attempt())
    world.there.put("INBOX", mail("K"), date=50, order=1)
    world.there.renumber("INBOX", 3)
    give_back(world.attempt())
    assert texts(world)["INBOX"] == Counter("ANNLK")


def test_a_folder_that_the_user_removed_goes_unless_something_came_to_it(tmp_path: Path) -> None:
    for came in (False, True):
        home = tmp_path / str(came)
        home.mkdir()
        world = used(home)
        world.here.move("Sent", 1, "INBOX")
        del world.here.folders["Sent"]

        def deliver(world: World = world, came: bool = came) -> None:
            if came and world.there.written[-1:] == ["EXPUNGE Sent"]:
                world.there.put("Sent", mail("just came"), date=60)

        world.there.tick = deliver
        give_back(world.attempt())
        assert texts(world).get("Sent") == (Counter(["just came"]) if came else None)
        assert texts(world)["INBOX"] == Counter("ANNS")
        assert ("'Sent' stays" in world.acts.left_behind) == came


def test_what_is_another_message_by_the_time_it_is_removed_stays(tmp_path: Path) -> None:
    world = used(tmp_path)

    def replace_it() -> None:
        if "APPEND INBOX" in world.there.written and (2 in world.there.folders["INBOX"].mails):
            world.there.folders["INBOX"].mails[2] = Mail(mail("other"), 77)

    world.there.tick = replace_it
    give_back(world.attempt())
    assert texts(world)["INBOX"] == Counter(["A", "N", "N", "other"])


def test_others_that_are_marked_deleted_are_not_expunged(tmp_path: Path) -> None:
    world = used(tmp_path)
    no_uidplus(world)
    world.there.put("INBOX", mail("theirs"), date=50, flags={"\\Deleted"})
    world.acts.waived.add(("INBOX", 100, 3))
    with pytest.raises(LegacyUnavailable, match="nothing can be expunged from 'INBOX'"):
        give_back(world.attempt())
    assert texts(world)["INBOX"] == Counter(["A", "B", "N", "N", "theirs"])
    assert world.acts.state == "local"


def test_ours_that_are_marked_deleted_are_marked_again(tmp_path: Path) -> None:
    world = used(tmp_path)
    no_uidplus(world)
    for side in (world.here, world.there):
        side.folders["INBOX"].mails[1].flags = frozenset({"\\Deleted"})
    give_back(world.attempt())
    assert texts(world)["INBOX"] == Counter("ANN")
    assert next(each.flags for each in world.there.folders["INBOX"].mails.values()) == frozenset({"\\Deleted"})


def test_keywords_that_the_server_does_not_take_are_named_and_end_nothing(tmp_path: Path) -> None:
    world = used(tmp_path)
    world.there.refuses = frozenset({"todo", "new"})
    give_back(world.attempt())
    assert texts(world) == GIVEN_BACK
    assert frozenset({"\\Seen"}) in flags(world)["INBOX"]
    assert flags(world)["Sent"] == [frozenset({"\\Flagged"})]
    assert "does not keep the flag new in 'Sent'" in world.acts.left_behind
    assert "refuses a keyword of a message in 'INBOX'" in world.acts.left_behind


def test_a_flag_that_does_not_stay_is_given_up_and_named(tmp_path: Path) -> None:
    world = used(tmp_path)
    world.there.forgets = frozenset({"\\flagged"})
    give_back(world.attempt())
    assert world.acts.state == "legacy"
    assert "\\Flagged in 'Sent': it does not stay" in world.acts.left_behind


def test_keywords_that_are_kept_and_not_listed_stay(tmp_path: Path) -> None:
    world = used(tmp_path)
    world.there.kept = frozenset({"\\Flagged", "\\Seen", "\\Deleted"})
    give_back(world.attempt())
    assert flags(world)["Sent"] == [frozenset({"\\Flagged", "old"})]


def test_a_script_that_was_changed_here_is_named(tmp_path: Path) -> None:
    world = used(tmp_path)
    (tmp_path / "sieve").mkdir()
    for name, when in (("old", 1_000), ("holiday", 2_000_000_000)):
        path = tmp_path / "sieve" / f"{name}.sieve"
        path.write_text("keep;")
        os.utime(path, (when, when))
    give_back(world.attempt())
    assert (
        world.acts.left_behind
        == "The Sieve script 'holiday' was changed here, and is not changed at the legacy server."
    )


def test_an_append_that_was_answered_and_is_not_recognised_is_not_repeated(tmp_path: Path) -> None:
    world = used(tmp_path)
    no_uidplus(world)
    world.there.alters = lambda _: b"Subject: altered\r\n\r\n"
    for each in world.here.folders["INBOX"].mails.values():
        each.flags |= {"\\Deleted"}  # not set there: an EXPUNGE of ours would take it

    def deliver() -> None:  # so that there is not only one that is new
        if world.there.written.count("APPEND INBOX") == 1 and len(world.there.folders["INBOX"].mails) == 3:
            world.there.put("INBOX", mail("K"), date=61)

    world.there.tick = deliver
    give_back(world.attempt())
    assert texts(world)["INBOX"] == Counter(["A", "altered", "altered", "K"])
    assert world.there.written.count("APPEND INBOX") == 2


def test_the_one_new_message_is_the_one_that_was_appended(tmp_path: Path) -> None:
    world = used(tmp_path)
    no_uidplus(world)
    world.there.alters = lambda _: b"Subject: altered\r\n\r\n"
    with world.there.open() as session:
        back = Return(world.attempt(), cast(Writer, session))
        back.make_equal(None)
        assert texts(world)["INBOX"] == Counter(["A", "altered", "altered"])
        for uid in [uid for uid, each in world.here.folders["INBOX"].mails.items() if each.body == mail("N")]:
            del world.here.folders["INBOX"].mails[uid]
        back.make_equal(None)
    assert texts(world)["INBOX"] == Counter("A"), "so it can be removed"


@SERVERS
def test_a_return_finds_what_it_appended_also_where_the_sweep_could_not_look(
    tmp_path: Path, server: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(returning, "bring_late", lambda attempt: Late(attempt, Delivery(attempt)))
    step = 0
    while True:
        step += 1
        home = tmp_path / str(step)
        home.mkdir()
        world = used(home)
        assert callable(server)
        server(world)
        world.there.tick = world.steps.tick
        world.steps.die_at = step
        try:
            give_back(world.attempt())
            break
        except Killed:
            if world.acts.state == "legacy":
                break
        world.acts.state = "local"
        give_back(world.attempt())
        assert texts(world) == GIVEN_BACK, (step, world.there.written)
    assert step > 20


def test_what_may_have_been_appended_and_was_removed_here_is_removed_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(returning, "bring_late", lambda attempt: Late(attempt, Delivery(attempt)))
    world = used(tmp_path)

    def die() -> None:
        if "APPEND INBOX" in world.there.written:
            raise Killed

    world.there.tick = die
    with pytest.raises(Killed):
        give_back(world.attempt())
    world.there.tick = lambda: None
    world.acts.state = "local"
    for uid in [uid for uid, each in world.here.folders["INBOX"].mails.items() if each.body == mail("N")]:
        del world.here.folders["INBOX"].mails[uid]
    give_back(world.attempt())
    assert texts(world)["INBOX"] == Counter("A")


def test_a_mailbox_that_vanishes_between_two_passes_is_missed(tmp_path: Path) -> None:
    world = used(tmp_path)
    with world.there.open() as session:
        back = Return(world.attempt(), cast(Writer, session))
        back.make_equal(None)
        (tmp_path / "mail").rename(tmp_path / "elsewhere")
        with pytest.raises(MailboxGone):
            back.make_equal(None)


# What is not done ---------------------------------------------------------------------------


def test_a_mailbox_that_is_not_where_it_was_takes_nothing_away_there(tmp_path: Path) -> None:
    world = used(tmp_path)
    (tmp_path / "mail").rename(tmp_path / "elsewhere")
    world.acts.wanted = (True, True)  # not even by force
    with pytest.raises(MailboxGone):
        give_back(world.attempt())
    assert texts(world) == {"INBOX": Counter("AB"), "Sent": Counter("S")}


def test_an_empty_mailbox_takes_nothing_away_there_but_by_force(tmp_path: Path) -> None:
    world = used(tmp_path)
    for folder in world.here.folders.values():
        folder.mails.clear()
    with pytest.raises(Implausible, match="reads as empty"):
        give_back(world.attempt())
    assert world.there.written == []
    world.acts.wanted = (True, True)
    give_back(world.attempt())
    assert texts(world) == {"INBOX": Counter(), "Sent": Counter(), "Made here": Counter()}


def test_a_folder_made_anew_there_is_returned_to_by_force_only(tmp_path: Path) -> None:
    world = used(tmp_path)
    world.there.make("INBOX")
    for text, date in (("A", 10), ("B", 20), ("L", 40)):
        world.there.put("INBOX", mail(text), date=date)
    with pytest.raises(Implausible, match="made anew"):
        give_back(world.attempt())
    assert world.there.written == []
    world.acts.wanted = (True, True)
    give_back(world.attempt())
    assert texts(world)["INBOX"] == Counter("ALNN")


def test_a_folder_that_is_gone_there_is_made_again(tmp_path: Path) -> None:
    world = used(tmp_path)
    del world.there.folders["Sent"]
    give_back(world.attempt())
    assert texts(world) == GIVEN_BACK


def test_a_return_that_is_called_off_stops(tmp_path: Path) -> None:
    world = used(tmp_path)
    world.acts.wanted = (False, False)
    with pytest.raises(CalledOff):
        give_back(world.attempt())
    assert world.there.written == []


def test_a_full_mailbox_there_is_named_and_the_user_stays(tmp_path: Path) -> None:
    world = used(tmp_path)
    world.there.append_refusal = "over quota"
    with pytest.raises(BasculeError, match="over quota"):
        give_back(world.attempt())
    assert world.acts.state == "local"
    assert texts(world)["INBOX"] == Counter("AB"), "nothing is removed before all is there"


def test_a_server_that_makes_messages_vanish_is_told_of_with_folder_and_uid(tmp_path: Path) -> None:
    world = used(tmp_path)

    def vanish() -> None:
        for uid, each in list(world.there.folders["INBOX"].mails.items()):
            if each.body == mail("N"):
                del world.there.folders["INBOX"].mails[uid]

    world.there.refresh = vanish
    with pytest.raises(NotClean, match=r"UID 100[34] here in 'INBOX' is not there") as error:
        give_back(world.attempt())
    assert "bascule cancel-return alice@lab.test" in error.value.hint
    assert world.acts.state == "local"


def test_a_return_whose_time_is_over_says_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = used(tmp_path)
    monkeypatch.setattr(returning, "MAX_PASSES", 0)
    world.acts.left = 1
    with pytest.raises(NotClean, match="not equal in time: the folder 'Made here' is not there"):
        give_back(world.attempt())
    assert world.acts.state == "local"
    world.acts.left = 60
    give_back(world.attempt())
    assert texts(world) == GIVEN_BACK


# Rules for folders --------------------------------------------------------------------------


def test_what_was_left_out_is_not_touched(tmp_path: Path) -> None:
    world = used(tmp_path)
    for name in ("Junk", "Public"):
        world.there.make(name)
        world.there.put(name, mail(name), date=5)
    world.acts.left_out = {"Junk": "the rule for the name 'Junk'"}
    world.acts.rules = [FolderRule("name", "Junk"), FolderRule("pattern", "Pub*")]
    world.there.closed_folders = {"Junk"}  # nor looked at
    give_back(world.attempt())
    assert texts(world) == GIVEN_BACK | {"Junk": Counter(["Junk"]), "Public": Counter(["Public"])}
    assert not [each for each in world.there.written if "Junk" in each or "Public" in each]
    assert set(world.acts.left_out) == {"Junk", "Public"}


def test_a_folder_made_here_under_the_name_of_one_that_was_left_out_is_brought_to_it(tmp_path: Path) -> None:
    world = used(tmp_path)
    world.there.make("Junk")
    world.there.put("Junk", mail("theirs"), date=5)
    world.acts.left_out = {"Junk": "the rule for the name 'Junk'"}
    world.here.make("Junk")
    world.here.put("Junk", mail("ours"), date=40)
    give_back(world.attempt())
    assert texts(world) == GIVEN_BACK | {"Junk": Counter(["theirs", "ours"])}


def test_a_folder_that_is_called_otherwise_here_goes_back_to_its_own(tmp_path: Path) -> None:
    world = World(tmp_path, folders=("INBOX", "Sent Items"))
    world.there.put("Sent Items", mail("S"), date=10)
    world.flip()
    world.here.folders["Sent"] = world.here.folders.pop("Sent Items")
    world.acts.folders[1]["here"] = "Sent"
    world.here.put("Sent", mail("T"), date=20)
    # The user's mail program makes what it misses.
    world.here.make("Sent Items")
    world.here.put("Sent Items", mail("O"), date=30)
    world.here.subscribed |= {"Sent", "Sent Items"}
    give_back(world.attempt())
    assert texts(world) == {"INBOX": Counter(), "Sent Items": Counter("ST"), "Sent Items-2": Counter("O")}
    assert world.there.subscribed == {"Sent Items", "Sent Items-2"}


def test_no_two_folders_here_have_one_name_there() -> None:
    copied = {"Sent": "Sent Items", "INBOX": "INBOX", "B": "A", "gone": "C"}
    assert names_there(["INBOX", "Sent", "Sent Items", "Sent Items-2", "A", "B", "C"], copied) == {
        "INBOX": "INBOX",
        "Sent": "Sent Items",
        "B": "A",
        "A": "A-2",
        "C": "C",
        "Sent Items": "Sent Items-2",
        "Sent Items-2": "Sent Items-2-2",
    }


def test_only_in_all_mail_at_gmail_goes_back_and_all_else_there_stays(tmp_path: Path) -> None:
    world = World(tmp_path, folders=("INBOX", "All"))
    world.there.is_gmail = True
    for text, folders in (("I", ("INBOX", "All")), ("X", ("All",)), ("Y", ("All",))):
        for name in folders:
            world.there.put(name, mail(text), date=10)
    world.flip()
    here = world.here.folders["All"].mails
    world.here.folders["All"].mails = {uid: each for uid, each in here.items() if each.body != mail("I")}
    next(each for each in world.acts.folders if each["name"] == "All")["messages"] = 2
    with gzip.open(tmp_path / EVIDENCE, "rt") as file:
        kept = [line for line in file if not line.startswith("All") or line.split("\t")[2] != "1"]
    with gzip.open(tmp_path / EVIDENCE, "wt") as file:
        file.writelines(kept)
    world.acts.once = "All"
    del world.here.folders["All"].mails[3]
    world.here.put("All", mail("N"), date=40)
    give_back(world.attempt())
    # Y was removed here; I is in All as it is in INBOX.
    assert texts(world) == {"INBOX": Counter("I"), "All": Counter("IXN")}
