"""The Maildir writer: names, resumption, what Dovecot reads."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bascule.migrator import maildir
from bascule.migrator.maildir import Folder, more_keywords

WHEN = 1_078_099_198  # 29-Feb-2004 23:59:58 +0000
SEEN = frozenset({"\\Seen"})


def put(folder: Folder, uid: int, flags: frozenset[str], *chunks: bytes) -> int:
    received = folder.receive(sum(len(chunk) for chunk in chunks), iter(chunks))
    folder.keep(uid, WHEN, flags, received)
    return received.size


def opened(path: Path, uidvalidity: int = 7) -> Folder:
    folder = Folder(path, "name", uidvalidity)
    folder.open()
    return folder


def test_a_message_is_found_again(tmp_path: Path) -> None:
    folder = opened(tmp_path / "INBOX")
    flags = frozenset({"\\Seen", "\\Answered", "$Label1", "todo"})
    assert put(folder, 5, flags, b"one\r\n", b"two\r\n") == 10
    again = opened(tmp_path / "INBOX")
    assert again.messages == folder.messages
    assert again.messages[5].flags == flags
    path = tmp_path / "INBOX" / "cur" / again.messages[5].file_name
    assert path.read_bytes() == b"one\r\ntwo\r\n"
    assert path.stat().st_mtime == WHEN


def test_flags_change_and_messages_go(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    put(folder, 1, SEEN, b"x")
    put(folder, 2, SEEN, b"y")
    folder.set_flags(1, frozenset({"\\Flagged"}))
    folder.expunge(2)
    again = opened(tmp_path)
    assert {uid: stored.flags for uid, stored in again.messages.items()} == {1: frozenset({"\\Flagged"})}


def test_what_an_interrupted_run_left_is_cleared_away(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    put(folder, 1, SEEN, b"whole")
    (tmp_path / "tmp" / "half").write_bytes(b"ha")
    torn = tmp_path / "cur" / folder.messages[1].file_name.replace("U1V", "U2V")
    torn.write_bytes(b"who")  # named for 5 bytes, has 3: power was lost
    (tmp_path / "cur" / "1.stranger:2,S").write_bytes(b"not ours")
    again = opened(tmp_path)
    assert set(again.messages) == {1}
    assert list((tmp_path / "tmp").iterdir()) == []
    assert len(list((tmp_path / "cur").iterdir())) == 1


def test_a_new_uidvalidity_begins_anew(tmp_path: Path) -> None:
    put(opened(tmp_path, 7), 1, SEEN, b"x")
    assert opened(tmp_path, 8).messages == {}


def test_the_index_is_dovecots(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    for uid in (12, 3):
        put(folder, uid, frozenset({"work", "$Junk"}), b"x")
    folder.write_index(1012)
    header, *lines = (tmp_path / "dovecot-uidlist").read_text().splitlines()
    assert header.startswith("3 V7 N1012 G")
    digest = sha256(b"x").hexdigest()[:32]
    assert lines == [f"{uid} :{int(WHEN)}.U{uid}V7H{digest}.bascule,S=1,W=1" for uid in (3, 12)]
    assert (tmp_path / "dovecot-keywords").read_text() == "0 $Junk\n1 work\n"


def test_keywords_keep_their_letters(tmp_path: Path) -> None:
    put(opened(tmp_path), 1, frozenset({"zebra"}), b"x")
    folder = opened(tmp_path)
    put(folder, 2, frozenset({"ant", "zebra"}), b"x")
    again = opened(tmp_path)
    assert again.messages[1].flags == {"zebra"}
    assert again.messages[2].flags == {"ant", "zebra"}


def test_keywords_that_a_maildir_has_no_letters_for_are_named(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    put(folder, 1, frozenset(f"k{number:02}" for number in range(27)), b"x")
    assert folder.messages[1].flags == {f"k{number:02}" for number in range(26)}
    assert folder.dropped == {"k26": "is more than the 26 that a folder can have here"}
    assert opened(tmp_path).messages[1].flags == folder.messages[1].flags


def staging(path: Path) -> Folder:
    folder = Folder(path, "INBOX", 7, is_staging=True)
    folder.open()
    return folder


def test_in_a_staging_area_keywords_without_a_letter_are_kept_beside_it(tmp_path: Path) -> None:
    folder = staging(tmp_path)
    all_of_them = frozenset(f"k{number:02}" for number in range(30))
    put(folder, 1, all_of_them | SEEN, b"x")
    put(folder, 2, frozenset({"K28", "k01"}), b"x")
    put(folder, 3, SEEN, b"x")
    assert folder.dropped == {}
    folder.write_index(4)
    again = staging(tmp_path)
    assert {uid: stored.flags for uid, stored in again.messages.items()} == {
        1: all_of_them | SEEN,
        2: {"k28", "k01"},  # the first spelling
        3: SEEN,
    }
    assert more_keywords(tmp_path) == {1: {"k26", "k27", "k28", "k29"}, 2: {"k28"}}
    again.set_flags(2, frozenset({"k01"}))
    again.set_flags(3, again.storable(frozenset({"K29", "new"})))
    again.expunge(1)
    again.write_index(4)
    assert more_keywords(tmp_path) == {3: {"k29", "new"}}
    # Another folder under that name has none of them.
    other = Folder(tmp_path, "another name", 7, is_staging=True)
    other.open()
    assert more_keywords(tmp_path) == {}


def test_a_keyword_that_dsync_does_not_hand_on_is_named(tmp_path: Path) -> None:
    folder = staging(tmp_path)
    put(folder, 1, frozenset({"k" * 50, "k" * 51}), b"x")
    assert folder.messages[1].flags == {"k" * 50}
    assert folder.dropped == {"k" * 51: "is longer than the 50 characters that Dovecot takes"}
    put(opened(tmp_path / "a Maildir"), 1, frozenset({"k" * 51}), b"x")


@pytest.mark.parametrize("keyword", ["a(b", "a)b", "{x", "a]", "50%", "*", 'q"', "a b", "\x04", "Été", "\\Odd", ""])
def test_what_is_no_keyword_is_named_and_not_kept(tmp_path: Path, keyword: str) -> None:
    folder = opened(tmp_path)
    put(folder, 1, frozenset({"\\Seen", "$good", "k" * 50, keyword}), b"x")
    assert folder.messages[1].flags == {"\\Seen", "$good", "k" * 50}
    assert folder.dropped.keys() == {keyword}


def test_of_keywords_that_differ_by_case_the_first_spelling_is_kept(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    put(folder, 1, frozenset({"$Forwarded"}), b"x")
    put(folder, 2, frozenset({"$forwarded", "$FORWARDED"}), b"x")
    assert folder.messages[2].flags == {"$Forwarded"}
    assert folder.dropped == {}
    assert (tmp_path / "dovecot-keywords").read_text() == "0 $Forwarded\n"


def test_a_directory_that_was_another_folders_is_emptied(tmp_path: Path) -> None:
    put(opened(tmp_path), 1, SEEN, b"of the first")
    (tmp_path / "dovecot.index").write_bytes(b"what Dovecot noted")
    other = Folder(tmp_path, "another name", 7)  # the same UIDVALIDITY: some servers always say the same
    other.open()
    assert other.messages == {}
    assert other.indexes_forgotten
    assert not (tmp_path / "dovecot.index").exists()


def test_dovecot_reads_a_folder_anew_when_a_message_comes_below_its_next_uid(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    put(folder, 5, SEEN, b"x")
    folder.write_index(6)
    (tmp_path / "dovecot.index.log").write_bytes(b"what Dovecot noted")
    folder = opened(tmp_path)
    put(folder, 6, SEEN, b"y")
    folder.write_index(7)
    assert (tmp_path / "dovecot.index.log").exists()
    folder = opened(tmp_path)
    put(folder, 3, SEEN, b"z")
    folder.write_index(7)
    assert folder.indexes_forgotten
    assert not (tmp_path / "dovecot.index.log").exists()


@pytest.mark.parametrize(
    ("date", "kept"), [(-62_135_596_800, 0), (-1, 0), (0, 0), (2**32 - 1, 2**32 - 1), (253_402_300_799, 2**32 - 1)]
)
def test_dates_that_a_file_cannot_have_are_the_nearest(tmp_path: Path, date: int, kept: int) -> None:
    folder = opened(tmp_path)
    folder.keep(1, date, SEEN, folder.receive(1, [b"x"]))
    assert opened(tmp_path).messages[1].internaldate == kept


@given(
    st.lists(
        st.tuples(
            st.integers(1, 2**32 - 1),
            st.frozensets(st.sampled_from([*maildir.FLAG_LETTERS, "$Label1", "work"])),
            st.binary(max_size=50),
        ),
        max_size=8,
        unique_by=lambda each: each[0],
    )
)
def test_any_messages_are_found_again(
    tmp_path_factory: pytest.TempPathFactory, messages: list[tuple[int, frozenset[str], bytes]]
) -> None:
    path = tmp_path_factory.mktemp("maildir")
    folder = opened(path)
    for uid, flags, body in messages:
        put(folder, uid, flags, body)
    folder.write_index(2**32)
    again = opened(path)
    assert {uid: stored.flags for uid, stored in again.messages.items()} == {uid: flags for uid, flags, _ in messages}
    for uid, _, body in messages:
        assert (path / "cur" / again.messages[uid].file_name).read_bytes() == body


def test_folders_that_are_gone_are_removed_and_no_others(tmp_path: Path) -> None:
    for name in ("", "kept", "kept/child", "gone", "parent/gone"):
        put(opened(tmp_path / name), 1, SEEN, b"x")
    (tmp_path / "half-made" / "cur").mkdir(parents=True)  # a worker was killed before it made the rest
    maildir.remove_other_folders(tmp_path, {tmp_path, tmp_path / "kept", tmp_path / "kept" / "child"})
    assert {path.parent.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("cur")} == {
        ".",
        "kept",
        "kept/child",
    }


def test_sizes_are_told_with_and_without_carriage_returns(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    put(folder, 1, SEEN, b"a\r\nb\nc\r", b"\nd\n", b"\n")
    assert ",S=11,W=14:2,S" in folder.messages[1].file_name  # three bare line feeds


@given(st.lists(st.binary(max_size=6).map(lambda part: part.replace(b"x", b"\r").replace(b"y", b"\n")), max_size=6))
def test_virtual_sizes_do_not_depend_on_the_pieces(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[bytes]
) -> None:
    whole = b"".join(pieces)
    received = maildir.receive(str(tmp_path_factory.mktemp("body") / "x"), len(whole), pieces)
    served = whole.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
    assert received.virtual_size == len(served)
    assert received.digest == sha256(served.replace(b"\0", b"\x80")).hexdigest()


def test_a_body_that_is_cut_short_is_no_message(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    with pytest.raises(OSError, match="No space left"):
        folder.receive(10, [b"short"])
    assert opened(tmp_path).messages == {}


def test_what_was_not_flushed_before_a_loss_of_power_is_not_trusted(tmp_path: Path) -> None:
    home, root = tmp_path, tmp_path / "Maildir"
    maildir.take_over(home, root)
    folder = opened(root)
    put(folder, 1, SEEN, b"flushed")
    folder.write_index(2)
    put(folder, 2, SEEN, b"perhaps not")
    maildir.take_over(home, root)  # the worker was killed, the host was not
    assert opened(root).messages.keys() == {1, 2}
    (home / ".bascule-copying").write_text("another start of the host")
    maildir.take_over(home, root)
    assert opened(root).messages.keys() == {1}


def test_what_an_earlier_worker_left_unflushed_is_flushed_before_it_is_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(opened(tmp_path), 1, SEEN, b"x")  # and its worker died
    flushed: list[str] = []
    monkeypatch.setattr(maildir, "_flush", lambda path: flushed.append(path.name))
    again = opened(tmp_path)
    again.write_index(2)
    assert again.messages[1].file_name in flushed


def test_a_mailbox_that_is_not_ours_is_set_aside(tmp_path: Path) -> None:
    root = tmp_path / "Maildir"
    put(opened(root), 1, SEEN, b"somebody's")
    maildir.take_over(tmp_path, root)
    assert not root.exists()
    (aside,) = tmp_path.glob("Maildir.before-*")
    assert [path.read_bytes() for path in (aside / "cur").iterdir()] == [b"somebody's"]
    put(opened(root), 2, SEEN, b"ours")
    maildir.take_over(tmp_path, root)
    assert opened(root).messages.keys() == {2}
    maildir.hand_over(tmp_path)
    maildir.take_over(tmp_path, root)
    assert len(list(tmp_path.glob("Maildir.before-*"))) == 2


def test_uids_of_later_messages_begin_above_a_gap(tmp_path: Path) -> None:
    folder = opened(tmp_path)
    put(folder, 5, SEEN, b"x")
    folder.write_index(6, {5: "uidl-of-5"})
    maildir.raise_uidnexts({tmp_path: 1006})
    header, line = (tmp_path / "dovecot-uidlist").read_text().splitlines()
    assert header.split()[:3] == ["3", "V7", "N1006"]
    assert line.startswith("5 Puidl-of-5 :")
    maildir.raise_uidnexts({tmp_path: 2**32 + 5})
    assert " N4294967295 " in (tmp_path / "dovecot-uidlist").read_text()
