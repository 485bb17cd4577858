"""What lies in a home, and what who comes next does about it."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest

from bascule.address import Address
from bascule.imap import names
from bascule.imap.reader import Layout, ListedFolder
from bascule.migrator.copying import FolderState, Pass
from bascule.migrator.local import Local
from bascule.migrator.maildir import Folder, guid_of
from bascule.migrator.storage import GAP, Storage, evidence

ALICE = Address("alice", "lab.test")
MAILDIR, SDBOX = "maildir:~/Maildir:LAYOUT=fs", "sdbox:~/sdbox"


class Doveadm:
    """What doveadm was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, ...]] = []

        #: Exit statuses of those to come, 0 when there are none left.
        self.statuses: list[int] = []

    def doveadm(self, *arguments: str, location: str | None = None, good: tuple[int, ...] = (0,)) -> int:
        self.asked.append((*arguments, *((location,) if location else ())))
        status = self.statuses.pop(0) if self.statuses else 0
        assert status in good
        return status


@pytest.fixture
def doveadm() -> Doveadm:
    return Doveadm()


def storage(location: str, doveadm: Doveadm) -> Storage:
    return Storage(location, cast(Local, doveadm))


def filled(folder: Path, text: str = "x") -> Path:
    folder.mkdir(parents=True)
    (folder / "a message").write_text(text)
    return folder


def copied(root: Path, folder: str, uids: dict[int, bytes]) -> None:
    here = Folder(root, folder, 7)
    here.open()
    for uid, body in uids.items():
        here.keep(uid, 1_000_000_000, frozenset(), here.receive(len(body), [body]))
    here.write_index(max(uids, default=0) + 1)


def last_pass() -> Pass:
    listed = (ListedFolder("INBOX", True), ListedFolder("R&D", True))
    layout = Layout("/", "", listed, ())
    states = [FolderState("INBOX", 7, 4, 2, 9), FolderState("R&D", 7, 2, 1, 2)]
    return Pass(layout, names.of_layout(layout), folders=states, modseqs={"INBOX": 5})


def test_keywords_without_a_letter_are_added_after_each_dsync(tmp_path: Path, doveadm: Doveadm) -> None:
    here = storage(SDBOX, doveadm)
    root = here.root(tmp_path)
    for path, name in ((root, "INBOX"), (root / "a*", "a*")):
        folder = Folder(path, name, 7, is_staging=True)
        folder.open()
        for uid in (3, 4, 5, 9):
            flags = frozenset(f"k{number:02}" for number in range(28)) if uid != 9 and name == "a*" else frozenset()
            folder.keep(uid, 1_000_000_000, flags, folder.receive(1, [b"x"]))
        folder.write_index(10)
    for _ in range(2):
        doveadm.asked.clear()
        here.carry_over(ALICE, tmp_path)
        assert [each[0] for each in doveadm.asked] == ["backup", "flags"]
        guid = guid_of(root / "a*")
        assert len(guid) == 32
        assert doveadm.asked[1] == (
            "flags", "add", "-u", "alice@lab.test", "--", "k26 k27", "mailbox-guid", guid, "uid", "3:5",
        )  # fmt: skip


@pytest.mark.parametrize("location", [MAILDIR, SDBOX])
def test_a_mailbox_that_has_moved_is_dovecots_whatever_its_worker_left(
    tmp_path: Path, doveadm: Doveadm, location: str
) -> None:
    here = storage(location, doveadm)
    here.take_over(tmp_path)
    here.root(tmp_path).mkdir(exist_ok=True)
    (tmp_path / GAP).touch()
    here.recover(ALICE, tmp_path, "local")
    assert not (tmp_path / ".bascule-copying").exists()
    assert not (tmp_path / GAP).exists()
    assert here.root(tmp_path).exists() == (location == MAILDIR)


def test_a_mailbox_that_a_dead_return_closed_is_opened_again(tmp_path: Path, doveadm: Doveadm) -> None:
    here = storage(MAILDIR, doveadm)
    filled(tmp_path / "Maildir")
    here.close(tmp_path)
    assert (tmp_path / "Maildir").is_file()
    here.recover(ALICE, tmp_path, "local")
    assert (tmp_path / "Maildir" / "a message").exists()
    assert doveadm.asked == []


def test_mail_that_came_beside_a_closed_mailbox_is_brought_into_it(tmp_path: Path, doveadm: Doveadm) -> None:
    here = storage(MAILDIR, doveadm)
    filled(tmp_path / "Maildir", "old").rename(tmp_path / "Maildir.returning")  # power was lost right after this
    filled(tmp_path / "Maildir", "new")
    here.recover(ALICE, tmp_path, "local")
    assert (tmp_path / "Maildir" / "a message").read_text() == "old"
    (aside,) = tmp_path.glob("Maildir.before-*")
    assert (aside / "a message").read_text() == "new"
    assert doveadm.asked == [("import", "-u", "alice@lab.test", f"maildir:{aside}:LAYOUT=fs", "", "ALL")]


def test_a_mailbox_that_was_sent_back_is_out_of_the_way(tmp_path: Path, doveadm: Doveadm) -> None:
    here = storage(MAILDIR, doveadm)
    filled(tmp_path / "Maildir")
    here.close(tmp_path)
    here.recover(ALICE, tmp_path, "requested")
    assert not (tmp_path / "Maildir.returning").exists()
    assert len(list(tmp_path.glob("Maildir.returning.before-*"))) == 1


def test_a_mailbox_that_is_being_returned_is_left_as_it_is(tmp_path: Path, doveadm: Doveadm) -> None:
    here = storage(MAILDIR, doveadm)
    filled(tmp_path / "Maildir")
    here.close(tmp_path)
    here.recover(ALICE, tmp_path, "returning")
    assert (tmp_path / "Maildir.returning").exists()


@pytest.mark.parametrize("location", [MAILDIR, SDBOX])
def test_a_dbox_whose_next_uids_were_raised_for_nothing_is_made_anew(
    tmp_path: Path, doveadm: Doveadm, location: str
) -> None:
    here = storage(location, doveadm)
    box = filled(tmp_path / ("sdbox" if location == SDBOX else "Maildir"))
    (tmp_path / GAP).touch()
    here.recover(ALICE, tmp_path, "copying")
    assert not (tmp_path / GAP).exists()
    assert box.exists() == (location == MAILDIR)


def test_a_copy_that_goes_on_keeps_its_dbox(tmp_path: Path, doveadm: Doveadm) -> None:
    here = storage(SDBOX, doveadm)
    box = filled(tmp_path / "sdbox")
    here.recover(ALICE, tmp_path, "copying")
    assert box.exists()


def test_next_uids_are_raised_above_what_the_legacy_server_gives_next(tmp_path: Path, doveadm: Doveadm) -> None:
    here = storage(MAILDIR, doveadm)
    root = here.root(tmp_path)
    copied(root, "INBOX", {1: b"x", 3: b"y"})
    copied(root / "R&-D", "R&D", {1: b"z"})
    here.leave_gap(ALICE, tmp_path, last_pass())
    assert (tmp_path / GAP).exists()
    assert " N1009 " in (root / "dovecot-uidlist").read_text()
    assert " N1002 " in (root / "R&-D" / "dovecot-uidlist").read_text()


def test_dovecot_is_asked_by_the_names_here(tmp_path: Path, doveadm: Doveadm) -> None:
    here = storage(SDBOX, doveadm)
    here.leave_gap(ALICE, tmp_path, last_pass())
    update = ("mailbox", "update", "-u", "alice@lab.test")
    assert sorted(doveadm.asked) == [
        (*update, "--min-next-uid", "1002", "--", "R&D"),
        (*update, "--min-next-uid", "1009", "--", "INBOX"),
    ]
    doveadm.asked.clear()
    here.settle(ALICE, tmp_path, last_pass())
    assert doveadm.asked == [
        ("backup", "-u", "alice@lab.test", f"sdbox:{tmp_path}/sdbox", f"maildir:{tmp_path}/.bascule-staging:LAYOUT=fs"),
        (*update, "--min-highest-modseq", "1000005", "--", "INBOX"),
    ]


def test_what_came_in_is_written_down(tmp_path: Path, doveadm: Doveadm) -> None:
    here = storage(MAILDIR, doveadm)
    root = here.root(tmp_path)
    copied(root, "INBOX", {1: b"x\r\n", 3: b"y"})
    copied(root / "R&-D", "R&D", {1: b"x\r\n"})
    here.keep_evidence(tmp_path, last_pass())
    found = evidence(tmp_path)
    assert {key: size for key, (size, _, _) in found.items()} == {
        ("INBOX", 7, 1): 3,
        ("INBOX", 7, 3): 1,
        ("R&D", 7, 1): 3,
    }
    assert found["INBOX", 7, 1][1] == found["R&D", 7, 1][1] != found["INBOX", 7, 3][1]
    assert here.digests(tmp_path, last_pass(), "R&D") == {1: found["R&D", 7, 1][1]}


def test_dsync_is_run_again_when_it_wants_to_be(tmp_path: Path, doveadm: Doveadm) -> None:
    here = storage(SDBOX, doveadm)
    doveadm.statuses = [2, 2]
    here.carry_over(ALICE, tmp_path)
    assert len(doveadm.asked) == 3
    doveadm.asked.clear()
    doveadm.statuses = [2] * 10
    here.carry_over(ALICE, tmp_path)
    assert len(doveadm.asked) == 4, "what is there then is for the verification to find"
