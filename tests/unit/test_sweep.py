"""Late mail: brought once, whatever the legacy server calls it and whoever dies; nothing else ends the sweeps."""

from __future__ import annotations

import gzip
from collections import Counter
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bascule.errors import BasculeError
from bascule.imap.folder_rules import FolderRule
from bascule.imap.reader import FolderNotReadable, Status
from bascule.lab.attempts import Killed, World
from bascule.lab.memory import Mail
from bascule.migrator.delivery import ARRIVING, HEADER, Digest, legacy_name, message_id_of, new_name
from bascule.migrator.storage import EVIDENCE
from bascule.migrator.sweep import LateMessageUnreadable, MailboxGone, Undecided, sweep

STORES = pytest.mark.parametrize("is_maildir", [True, False], ids=["maildir", "dbox"])


def mail(text: str) -> bytes:
    return f"Subject: {text}\r\nMessage-ID: <{text}@lab.test>\r\n\r\n{text}\r\n".encode()


def texts(world: World) -> dict[str, Counter[str]]:
    """What each folder here holds, by subject."""
    return {
        name: Counter(body.decode().splitlines()[0].removeprefix("Subject: ") for body, _, _ in found)
        for name, found in world.here.contents().items()
    }


def moved(home: Path, *, is_maildir: bool = True, evidence: bool = True) -> World:
    """A user whose INBOX had A and B, and whose Sent had S."""
    world = World(home, is_maildir=is_maildir)
    world.there.put("INBOX", mail("A"), date=10)
    world.there.put("INBOX", mail("B"), date=20)
    world.there.put("Sent", mail("S"), date=10)
    world.flip(evidence=evidence)
    return world


COPIED = {"INBOX": Counter("AB"), "Sent": Counter("S")}


@STORES
def test_a_late_message_is_brought_once_with_its_keywords(tmp_path: Path, *, is_maildir: bool) -> None:
    world = moved(tmp_path, is_maildir=is_maildir)
    world.there.put("Sent", mail("L"), date=30, flags={"\\Seen", "$Work", "todo"})
    for _ in range(3):
        sweep(world.attempt())
    assert texts(world) == COPIED | {"Sent": Counter("SL")}
    (found,) = [each for each in world.here.folders["Sent"].mails.values() if each.body == mail("L")]
    assert (found.internaldate, found.flags) == (30, frozenset({"\\Seen", "$Work", "todo"}))
    (row,) = world.acts.rows.values()
    assert (row.delivered, row.place, row.guid) == (True, "Sent", found.guid)
    assert world.acts.swept == [(None, "")] * 3
    assert list((tmp_path / ".bascule-staged").iterdir()) == []


@STORES
def test_a_keyword_that_dovecot_refuses_keeps_no_message_away(tmp_path: Path, *, is_maildir: bool) -> None:
    world = moved(tmp_path, is_maildir=is_maildir)
    world.there.put("Sent", mail("L"), date=30, flags={"bad]", "odd", "todo"})
    world.here.refuses = frozenset({"bad]", "odd"})
    sweep(world.attempt())
    assert [each.flags for each in world.here.folders["Sent"].mails.values() if each.body == mail("L")] == [{"todo"}]


@STORES
def test_a_quiet_mailbox_costs_one_status_a_folder(tmp_path: Path, *, is_maildir: bool) -> None:
    world = moved(tmp_path, is_maildir=is_maildir)
    sweep(world.attempt())
    assert not (tmp_path / ".bascule-known" / "looked.json").read_text().count("INBOX")
    assert world.sessions == 1


@STORES
def test_a_status_that_cannot_be_true_hides_nothing(tmp_path: Path, *, is_maildir: bool) -> None:
    """It has a UIDNEXT that the folder was above at the flip."""
    world = moved(tmp_path, is_maildir=is_maildir)
    world.there.put("Sent", mail("T"), date=12)
    world.flip()
    world.there.stale["Sent"] = Status(world.there.folders["Sent"].uidvalidity, 2, 1)
    sweep(world.attempt())
    world.there.put("Sent", mail("L"), date=30)
    for _ in range(2):
        sweep(world.attempt())
    assert texts(world) == COPIED | {"Sent": Counter("STL")}


@STORES
def test_inbox_is_opened_for_its_status_may_stand_still(tmp_path: Path, *, is_maildir: bool) -> None:
    world = moved(tmp_path, is_maildir=is_maildir)
    world.there.stale["INBOX"] = Status(world.there.folders["INBOX"].uidvalidity, 3, 2)
    sweep(world.attempt())
    world.there.put("INBOX", mail("L"), date=30)
    for _ in range(2):
        sweep(world.attempt())
    assert texts(world) == COPIED | {"INBOX": Counter("ABL")}


@STORES
def test_a_folder_that_is_not_here_means_inbox(tmp_path: Path, *, is_maildir: bool) -> None:
    world = moved(tmp_path, is_maildir=is_maildir)
    world.there.make("Made there")
    world.there.put("Made there", mail("L"), date=30)
    sweep(world.attempt())
    assert texts(world) == COPIED | {"INBOX": Counter("ABL")}
    (row,) = world.acts.rows.values()
    assert (row.folder, row.place) == ("Made there", "INBOX")


def test_a_folder_made_after_the_flip_whose_name_no_directory_can_have(tmp_path: Path) -> None:
    world = moved(tmp_path)
    for name in ("~odd", "new", "a/../b", "x" * 250):
        world.there.make(name)
        world.there.put(name, mail("L"), date=30)
    sweep(world.attempt())
    assert texts(world)["INBOX"] == Counter("ABLLLL")


@STORES
@pytest.mark.parametrize("keywords", [(), ("$Work",)])
def test_whoever_dies_at_whatever_step_it_is_brought_once(
    tmp_path: Path, *, is_maildir: bool, keywords: tuple[str, ...]
) -> None:
    """Three late messages, two of them equal to the last byte."""
    expected = COPIED | {"INBOX": Counter("ABLL"), "Sent": Counter("SK")}
    step = 0
    while True:
        step += 1
        home = tmp_path / str(step)
        home.mkdir()
        world = moved(home, is_maildir=is_maildir)
        world.there.put("INBOX", mail("L"), date=30, flags=keywords)
        world.there.put("INBOX", mail("L"), date=30, flags=keywords)
        world.there.put("Sent", mail("K"), date=31, flags=keywords)
        world.here.tick = world.steps.tick
        world.steps.die_at = step
        try:
            sweep(world.attempt())
        except Killed:
            sweep(world.attempt())
        assert texts(world) == expected, step
        sweep(world.attempt())
        assert texts(world) == expected, step
        late = [
            each for folder in world.here.folders.values() for each in folder.mails.values() if each.internaldate > 20
        ]
        assert {each.flags for each in late} == {frozenset(keywords)}, step
        if world.steps.done < step:
            break
    assert step > 12


@STORES
def test_what_is_staged_comes_also_when_it_is_gone_there(tmp_path: Path, *, is_maildir: bool) -> None:
    world = moved(tmp_path, is_maildir=is_maildir)
    uid = world.there.put("INBOX", mail("L"), date=30, flags={"\\Seen"})
    world.steps.die_at = 3  # staged, and not yet put
    world.here.tick = world.steps.tick
    with pytest.raises(Killed):
        sweep(world.attempt())
    del world.there.folders["INBOX"].mails[uid]
    sweep(world.attempt())
    assert texts(world)["INBOX"] == Counter("ABL")


def test_dbox_takes_an_equal_message_of_the_users_for_none_of_ours(tmp_path: Path) -> None:
    world = moved(tmp_path, is_maildir=False)
    world.there.put("INBOX", mail("A"), date=30)  # sent once more
    world.here.tick = world.steps.tick
    world.steps.die_at = 3
    with pytest.raises(Killed):
        sweep(world.attempt())
    sweep(world.attempt())
    assert texts(world)["INBOX"] == Counter("AAB")
    assert not [each for each in world.here.folders["INBOX"].mails.values() if ARRIVING in each.flags]


# UIDs that do not last --------------------------------------------------------------------


@STORES
@pytest.mark.parametrize("evidence", [True, False])
def test_a_late_message_takes_the_uid_of_one_that_was_brought(
    tmp_path: Path, *, is_maildir: bool, evidence: bool
) -> None:
    world = moved(tmp_path, is_maildir=is_maildir, evidence=evidence)
    world.there.put("INBOX", mail("L"), date=50, order=2)
    sweep(world.attempt())
    world.there.put("INBOX", mail("M"), date=50, order=1)
    world.there.renumber("INBOX", 3)
    for _ in range(2):
        sweep(world.attempt())
    assert texts(world)["INBOX"] == Counter("ABLM")


@STORES
@pytest.mark.parametrize("evidence", [True, False])
def test_a_late_message_takes_the_uid_of_one_that_was_copied(
    tmp_path: Path, *, is_maildir: bool, evidence: bool
) -> None:
    world = moved(tmp_path, is_maildir=is_maildir, evidence=evidence)
    world.there.put("INBOX", mail("M"), date=15)
    world.there.renumber("INBOX", 1)
    for _ in range(2):
        sweep(world.attempt())
    assert texts(world)["INBOX"] == Counter("ABM")


def test_one_below_uidnext_that_was_not_visible_at_the_flip_is_brought(tmp_path: Path) -> None:
    world = moved(tmp_path)
    world.acts.flipped["INBOX"] = (100, 9)  # the server had given UIDs up to 8
    world.there.folders["INBOX"].uidnext = 9
    sweep(world.attempt())
    world.there.folders["INBOX"].mails[5] = Mail(mail("M"), 15)
    sweep(world.attempt())
    assert texts(world)["INBOX"] == Counter("ABM")
    world.there.put("INBOX", mail("L"), date=30)
    world.there.folders["INBOX"].mails[6] = Mail(mail("N"), 15)
    sweep(world.attempt())
    assert texts(world)["INBOX"] == Counter("ABLMN")


def test_the_first_look_is_at_the_whole_folder(tmp_path: Path) -> None:
    """One was removed there, so that the count says nothing of the one that appears below UIDNEXT."""
    world = moved(tmp_path)
    world.acts.flipped["INBOX"] = (100, 9)
    world.there.folders["INBOX"].uidnext = 9
    del world.there.folders["INBOX"].mails[1]
    world.there.folders["INBOX"].mails[5] = Mail(mail("M"), 15)
    world.there.put("INBOX", mail("L"), date=30)
    sweep(world.attempt())
    assert texts(world)["INBOX"] == Counter("ABLM")


@STORES
def test_a_folder_made_anew_is_swept_after_the_others(tmp_path: Path, *, is_maildir: bool) -> None:
    world = moved(tmp_path, is_maildir=is_maildir)
    world.there.make("INBOX")
    for text, date in (("B", 20), ("L", 30), ("A", 99), ("A", 100)):
        world.there.put("INBOX", mail(text), date=date)
    world.there.put("Sent", mail("K"), date=30)
    for _ in range(3):
        sweep(world.attempt())
    assert texts(world) == {"INBOX": Counter("AABL"), "Sent": Counter("SK")}
    assert [row.folder for row in world.acts.rows.values()] == ["Sent", "INBOX", "INBOX"]


def test_what_cannot_be_told_is_named_and_can_be_waived(tmp_path: Path) -> None:
    world = moved(tmp_path, evidence=False)
    sweep(world.attempt())
    del world.here.folders["INBOX"].mails[2]  # its owner removes B
    world.there.put("INBOX", mail("M"), date=15)
    world.there.put("Sent", mail("K"), date=30)
    world.there.renumber("INBOX", 1)
    with pytest.raises(Undecided, match="came late or were removed here") as error:
        sweep(world.attempt())
    assert "waive-messages alice@lab.test --folder 'INBOX'" in error.value.hint
    assert texts(world) == {"INBOX": Counter("AM"), "Sent": Counter("SK")}, "all else is brought"
    (named,) = world.acts.unreadable
    assert (named["folder"], named["uidvalidity"], named["uid"]) == ("INBOX", 100, 3)
    world.acts.waived.add(("INBOX", 100, 3))
    sweep(world.attempt())
    assert texts(world)["INBOX"] == Counter("AM")


def test_what_a_return_appended_before_it_was_called_off_is_not_late(tmp_path: Path) -> None:
    from dataclasses import replace  # noqa: PLC0415

    from bascule.migrator.acts import Note  # noqa: PLC0415

    world = moved(tmp_path)
    uid = world.there.put("INBOX", mail("N"), date=40)
    digest = Digest()
    digest.update(mail("N"))
    note = Note("INBOX", 1005, "g", digest.content().digest, 3, uid, 100, 40, "", appended=True)
    world.acts.kept_notes["INBOX", 1005] = note
    sweep(world.attempt())
    assert texts(world) == COPIED
    world.acts.kept_notes["INBOX", 1005] = replace(note, legacy_uid=None, appended=False)
    sweep(world.attempt())
    assert texts(world) == COPIED
    assert world.acts.kept_notes["INBOX", 1005].legacy_uid == uid


#: Dates, orders and texts of the messages that come, and whether the folder is made anew then.
Round = tuple[list[tuple[int, int, str]], bool]
DELIVERIES = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.sampled_from("LM")), max_size=3)


@given(st.lists(st.tuples(DELIVERIES, st.booleans()), min_size=1, max_size=4), st.booleans())
@settings(max_examples=150, deadline=None)
def test_however_uids_change_each_message_is_here_once(rounds: list[Round], dbox: bool) -> None:
    """A server that numbers everything anew at each look, messages of one second in any order, many of them equal."""
    with TemporaryDirectory() as home:
        world = moved(Path(home), is_maildir=not dbox)
        expected = Counter("AB")
        for deliveries, is_made_anew in rounds:
            for date, order, text in deliveries:
                world.there.put("INBOX", mail(text), date=15 + date, order=order)
                expected[text] += 1
            if is_made_anew:
                former = world.there.folders["INBOX"].mails
                world.there.make("INBOX").mails = former
            world.there.renumber("INBOX", 1)
            sweep(world.attempt())
            assert texts(world)["INBOX"] == expected


# What does not end the sweeps ---------------------------------------------------------------


def test_a_message_that_cannot_be_read_is_named_and_the_others_come(tmp_path: Path) -> None:
    world = moved(tmp_path)
    uid = world.there.put("INBOX", mail("L"), date=30)
    world.there.unreadable.add(("INBOX", uid))
    world.there.put("INBOX", mail("M"), date=31)
    world.there.put("Sent", mail("K"), date=30)
    world.last_message_at = None
    with pytest.raises(LateMessageUnreadable, match="UID 3 in 'INBOX'"):
        sweep(world.attempt())
    assert texts(world) == {"INBOX": Counter("ABM"), "Sent": Counter("SK")}
    assert [each["uid"] for each in world.acts.unreadable] == [3]
    world.acts.waived.add(("INBOX", 100, uid))
    sweep(world.attempt())
    assert len(world.acts.swept) == 1
    world.acts.waived.clear()
    world.there.unreadable.clear()
    world.there.put("INBOX", mail("N"), date=32)
    sweep(world.attempt())
    assert world.acts.unreadable == [], "nothing is named any more"


def test_a_folder_that_cannot_be_opened_is_named_and_the_others_come(tmp_path: Path) -> None:
    world = moved(tmp_path)
    world.there.closed_folders.add("INBOX")
    world.there.put("Sent", mail("K"), date=30)
    with pytest.raises(FolderNotReadable, match="late mail of 'INBOX' is not brought") as error:
        sweep(world.attempt())
    assert "--folder 'INBOX'" in error.value.hint
    assert texts(world)["Sent"] == Counter("SK")
    assert list(world.acts.unreadable_folders) == ["INBOX"]
    world.acts.waived_names.add("INBOX")
    sweep(world.attempt())
    assert world.acts.swept == [(None, "")]


def test_the_last_message_is_written_once_and_known_again(tmp_path: Path) -> None:
    world = moved(tmp_path)
    world.last_message_at = None
    world.there.insists_on_select = True
    world.there.tick = world.steps.tick
    world.steps.die_at = 3  # it is there, and nobody recorded it
    world.steps.done = 0
    with pytest.raises(Killed):
        sweep(world.attempt())
    sweep(world.attempt())
    sweep(world.attempt())
    assert len(world.there.folders["INBOX"].mails) == 3
    assert world.acts.last_written
    assert texts(world) == COPIED, "it is not brought here"


def test_a_last_message_that_is_not_taken_ends_nothing(tmp_path: Path) -> None:
    world = moved(tmp_path)
    world.last_message_at, world.to_be_welcomed = None, True
    welcomes = []
    world.welcome = lambda: welcomes.append(1)
    world.refuses_client = "append failed: over quota"
    world.there.put("Sent", mail("K"), date=30)
    for _ in range(2):
        sweep(world.attempt())
    assert texts(world)["Sent"] == Counter("SK")
    assert not world.acts.last_written
    trouble, advice = world.acts.swept[-1]
    assert trouble == "last message not written: append failed: over quota"
    assert "bascule waive-last-message alice@lab.test" in advice
    assert welcomes == [1]
    world.refuses_client = ""
    sweep(world.attempt())
    assert world.acts.last_written
    assert world.acts.swept[-1] == (None, "")


def test_a_welcome_that_is_not_taken_is_written_at_the_next_sweep(tmp_path: Path) -> None:
    world = moved(tmp_path)
    world.last_message_at, world.to_be_welcomed = None, True

    def refuse() -> None:
        raise BasculeError("the mailbox here is full")

    world.welcome = refuse
    with pytest.raises(BasculeError, match="full"):
        sweep(world.attempt())
    assert not world.acts.last_written, "the next sweep would not come back to the welcome"
    world.welcome = lambda: None
    sweep(world.attempt())
    assert (world.acts.last_written, world.acts.is_welcomed) == (True, True)
    assert len(world.there.folders["INBOX"].mails) == 3


def test_nothing_is_done_with_a_mailbox_that_is_not_where_it_was(tmp_path: Path) -> None:
    world = moved(tmp_path)
    (tmp_path / "mail").rename(tmp_path / "elsewhere")
    world.there.put("INBOX", mail("L"), date=30)
    with pytest.raises(MailboxGone, match=r"alice@lab\.test is not in") as error:
        sweep(world.attempt())
    assert "mounted" in error.value.hint
    assert world.acts.rows == {}


def test_no_two_late_messages_have_one_name() -> None:
    name = new_name("INBOX", 1, 6, b"d", frozenset())
    assert name.startswith(legacy_name("INBOX", 1, 6))
    other = new_name("INBOX", 1, 6, b"d", {name})
    assert len({name, other, new_name("INBOX", 1, 6, b"d", {name, other}), new_name("INBOX", 1, 6, b"e", {name})}) == 4


# Contents ---------------------------------------------------------------------------------


@given(st.lists(st.sampled_from([b"a", b"\r", b"\n", b"\r\n", b"\0", b"bc"])), st.integers(1, 4))
def test_a_digest_is_the_same_however_the_bytes_come(parts: list[bytes], size: int) -> None:
    body = b"".join(parts)
    pieces, whole, served = Digest(), Digest(), Digest()
    for start in range(0, len(body), size):
        pieces.update(body[start : start + size])
    whole.update(body)
    served.update(body.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n").replace(b"\0", b"\x80"))
    assert pieces.content() == whole.content() == served.content()


def test_a_message_id_is_looked_for_in_the_header_only(tmp_path: Path) -> None:
    file = tmp_path / "mail"
    file.write_bytes(b"Subject: x\nMessage-Id:\n <a@b>\n\nMessage-ID: <c@d>\n")
    assert message_id_of(file) == "<a@b>"
    file.write_bytes(b"Subject: x\r\n\r\nMessage-ID: <c@d>\r\n")
    assert message_id_of(file) == ""
    file.write_bytes(b"X: " + b"x" * HEADER + b"\r\nMessage-ID: <late@d>\r\n\r\n")
    assert message_id_of(file) == ""


# Rules for folders --------------------------------------------------------------------------


@STORES
def test_late_mail_of_a_folder_that_was_left_out_stays(tmp_path: Path, *, is_maildir: bool) -> None:
    world = moved(tmp_path, is_maildir=is_maildir)
    world.there.make("Junk")
    world.acts.left_out = {"Junk": "the rule for the name 'Junk'"}
    world.there.put("Junk", mail("J"), date=30)
    world.there.put("Sent", mail("L"), date=30)
    world.there.closed_folders = {"Junk"}  # nor is it asked for
    for _ in range(2):
        sweep(world.attempt())
    assert texts(world) == COPIED | {"Sent": Counter("SL")}
    assert world.acts.swept == [(None, "")] * 2


@STORES
def test_a_folder_made_since_is_left_out_by_the_rules_of_the_flip_and_named(
    tmp_path: Path, *, is_maildir: bool
) -> None:
    world = moved(tmp_path, is_maildir=is_maildir)
    world.acts.rules = [FolderRule("pattern", "P*"), FolderRule("name", "Sent")]
    for name in ("Public", "Other"):
        world.there.make(name)
        world.there.put(name, mail(name), date=30)
    # Sent came along, whatever the rules say of it: late mail of it does, too.
    world.there.put("Sent", mail("L"), date=30)
    sweep(world.attempt())
    assert texts(world) == COPIED | {"INBOX": Counter(["A", "B", "Other"]), "Sent": Counter("SL")}
    assert world.acts.left_out == {"Public": "the rule for the pattern 'P*'"}


# Gmail: All Mail has every message once more


def at_gmail(home: Path, *, is_maildir: bool = True) -> World:
    """INBOX and Sent, and All Mail, of which only what was archived came."""
    world = World(home, is_maildir=is_maildir, folders=("INBOX", "Sent", "All"))
    world.there.is_gmail = True
    for number, name in enumerate(("INBOX", "Sent", ""), 1):
        post(world, "ISX"[number - 1], name, number=number)
    world.flip()
    # As the copy would have it: of All Mail only X is here, and only of it there is evidence.
    here = world.here.folders["All"]
    here.mails = {uid: each for uid, each in here.mails.items() if each.body == mail("X")}
    next(each for each in world.acts.folders if each["name"] == "All")["messages"] = 1
    with gzip.open(home / EVIDENCE, "rt") as file:
        kept = [line for line in file if not line.startswith("All") or line.split("\t")[2] == "3"]
    with gzip.open(home / EVIDENCE, "wt") as file:
        file.writelines(kept)
    world.acts.once = "All"
    return world


def post(world: World, text: str, *folders: str, number: int, date: int = 30) -> None:
    """A message with these labels."""
    for name in (*filter(None, folders), "All"):
        uid = world.there.put(name, mail(text), date=date)
        world.there.folders[name].mails[uid].message_id = number


def unlabel(world: World, name: str, number: int) -> None:
    mails = world.there.folders[name].mails
    world.there.folders[name].mails = {uid: each for uid, each in mails.items() if each.message_id != number}


AT_GMAIL = {"INBOX": Counter("I"), "Sent": Counter("S"), "All": Counter("X")}


@STORES
def test_a_late_message_with_several_labels_is_not_brought_from_all_mail_too(
    tmp_path: Path, *, is_maildir: bool
) -> None:
    world = at_gmail(tmp_path, is_maildir=is_maildir)
    sweep(world.attempt())
    assert texts(world) == AT_GMAIL
    post(world, "L", "INBOX", number=4)
    post(world, "Z", number=5)  # archived as it came
    for _ in range(2):
        sweep(world.attempt())
        assert texts(world) == AT_GMAIL | {"INBOX": Counter("IL"), "All": Counter("XZ")}
    # What is taken out of its folder there was brought from there, and is in All Mail as ever.
    for name, number in (("INBOX", 1), ("INBOX", 4), ("Sent", 2)):
        unlabel(world, name, number)
        sweep(world.attempt())
    assert texts(world) == AT_GMAIL | {"INBOX": Counter("IL"), "All": Counter("XZ")}
    assert world.acts.unreadable == []
    assert world.acts.swept[-1] == (None, "")


def test_all_mail_of_a_quiet_mailbox_is_not_read(tmp_path: Path) -> None:
    world = at_gmail(tmp_path)
    world.there.unreadable = {("All", 1), ("All", 2), ("All", 3)}
    for _ in range(3):
        sweep(world.attempt())
    assert world.acts.swept == [(None, "")] * 3


def test_a_message_that_is_not_seen_in_all_mail_until_it_was_archived_comes_once(tmp_path: Path) -> None:
    """It came while the folders were read: after All Mail and before INBOX."""
    world = at_gmail(tmp_path)
    post(world, "L", "INBOX", number=4)
    hidden = world.there.folders["All"].mails.popitem()
    world.there.folders["All"].uidnext -= 1
    sweep(world.attempt())
    assert texts(world)["INBOX"] == Counter("IL")
    unlabel(world, "INBOX", 4)
    world.there.folders["All"].mails.update([hidden])
    world.there.folders["All"].uidnext += 1
    for _ in range(2):
        sweep(world.attempt())
        assert texts(world) == AT_GMAIL | {"INBOX": Counter("IL")}


def test_what_does_not_come_from_its_folder_is_not_forgotten(tmp_path: Path) -> None:
    world = at_gmail(tmp_path)
    post(world, "L", "INBOX", number=4)
    world.there.unreadable = {("INBOX", 2)}
    with pytest.raises(LateMessageUnreadable):
        sweep(world.attempt())
    assert texts(world) == AT_GMAIL  # it is to come from INBOX
    world.there.unreadable.clear()
    unlabel(world, "INBOX", 4)
    sweep(world.attempt())
    assert texts(world) == AT_GMAIL | {"All": Counter("XL")}


def test_what_came_from_its_folder_is_not_read_again_in_all_mail(tmp_path: Path) -> None:
    world = at_gmail(tmp_path)
    post(world, "L", "INBOX", number=4)
    sweep(world.attempt())
    unlabel(world, "INBOX", 4)
    world.there.unreadable = {("All", 4)}
    sweep(world.attempt())
    assert texts(world) == AT_GMAIL | {"INBOX": Counter("IL")}


def test_all_mail_that_was_made_anew_is_not_guessed_about(tmp_path: Path) -> None:
    world = at_gmail(tmp_path)
    world.there.folders["All"].uidvalidity += 1
    post(world, "L", "INBOX", number=4)
    with pytest.raises(FolderNotReadable, match="late mail of 'All' is not brought: it was made anew"):
        sweep(world.attempt())
    assert texts(world) == AT_GMAIL | {"INBOX": Counter("IL")}


@STORES
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_late_mail_at_gmail_comes_once_whoever_dies(data: st.DataObject, *, is_maildir: bool) -> None:
    with TemporaryDirectory() as home:
        world = at_gmail(Path(home), is_maildir=is_maildir)
        number, posted = 10, Counter[str]()
        for _ in range(data.draw(st.integers(1, 4))):
            for _ in range(data.draw(st.integers(0, 3))):
                number += 1
                text = f"L{number}"
                folders = data.draw(st.sampled_from([("INBOX",), ("Sent",), ()]))
                post(world, text, *folders, number=number)
                posted[text] += 1
            world.steps.die_at = world.steps.done + data.draw(st.integers(1, 12))
            with suppress(Killed):
                sweep(world.attempt())
            world.steps.die_at = 0
            if data.draw(st.booleans()):
                unlabel(world, data.draw(st.sampled_from(["INBOX", "Sent"])), data.draw(st.integers(1, number)))
        sweep(world.attempt())
        found = sum(texts(world).values(), Counter[str]())
        assert found == posted + Counter("ISX")
