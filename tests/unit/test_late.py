"""Which messages came late: by place, by content, and where nobody can tell."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import pytest

from bascule.imap.reader import Message, Status
from bascule.migrator.acts import Note, Straggler
from bascule.migrator.known import LAST, Known, Look, Looks, Print, forget
from bascule.migrator.late import Content, Identification, Sorting, Verdict, sort_by_place

NONE: frozenset[str] = frozenset()


def message(uid: int, date: int) -> Message:
    return Message(uid, 0, date, NONE)


def content(text: str, message_id: str = "") -> Content:
    return Content(sha256(text.encode()).digest(), len(text), message_id or f"<{text}>")


def digest(text: str) -> str:
    return content(text).digest.hex()[:32]


class Here:
    """The mailbox here: what is still under its UID, and what is anywhere."""

    def __init__(self, in_place: dict[int, str] | None = None, anywhere: tuple[str, ...] = ()) -> None:
        self.in_place, self.anywhere = in_place or {}, anywhere

    def digest_at(self, uid: int) -> bytes | None:
        return content(self.in_place[uid]).digest if uid in self.in_place else None

    def holds(self, wanted: Content) -> bool:
        return wanted.digest in {content(text).digest for text in (*self.anywhere, *self.in_place.values())}


def known(*, complete: bool = True, evidence: bool = True) -> Known:
    """A and B were copied with UIDs 1 and 2."""
    prints = {
        (1, 1): Print(10, 1, 1, digest("A") if evidence else ""),
        (1, 2): Print(20, 1, 2, digest("B") if evidence else ""),
    }
    return Known("INBOX", 1, 3, complete, prints)


def straggler(uid: int, text: str, date: int | None, uidvalidity: int = 1) -> Straggler:
    found = content(text)
    return Straggler("INBOX", uidvalidity, uid, delivered=True, digest=found.digest, internaldate=date, name=text)


def sort(
    what: Known, *messages: Message, stragglers: tuple[Straggler, ...] = (), notes: tuple[Note, ...] = (), of: int = 1
) -> Sorting:
    return sort_by_place(what, of, messages, stragglers, notes, frozenset())


def verdicts(sorting: Sorting, what: Known, here: Here, contents: dict[int, Content]) -> dict[int, Verdict]:
    """As the sweep asks: exactly for all of them, then anyhow for those that are left."""
    identification = Identification(sorting, what, here)
    found: dict[int, Verdict] = {}
    left = []
    for each in sorting.doubtful:
        if identification.exactly(each, contents[each.uid]):
            found[each.uid] = Verdict.KNOWN
        else:
            left.append(each)
    for each in left:
        found[each.uid] = identification.anyhow(each, contents[each.uid])
    identification.finish()
    return found


# By place ---------------------------------------------------------------------------------


def test_who_is_where_it_was_is_not_read() -> None:
    assert sort(known(), message(1, 10), message(2, 20)).doubtful == []


def test_another_date_under_the_same_uid_is_another_message() -> None:
    assert sort(known(), message(1, 10), message(2, 21)).doubtful == [message(2, 21)]
    late = straggler(5, "L", 50)
    assert sort(known(), message(5, 50), stragglers=(late,)).doubtful == []
    assert sort(known(), message(5, 51), stragglers=(late,)).doubtful == [message(5, 51)]
    assert sort(known(), message(5, 51), stragglers=(straggler(5, "L", None),)).doubtful == [], "no date was kept"


def test_dates_that_no_file_can_have_are_compared_as_they_are_kept() -> None:
    what = Known("INBOX", 1, 3, complete=True, prints={(1, 1): Print(0, 0, 1, digest("A"))})
    assert sort(what, message(1, -5)).doubtful == []


def test_a_uid_below_uidnext_that_was_not_there_at_the_flip_is_doubtful() -> None:
    what = Known("INBOX", 1, 9, complete=True, prints=known().prints)
    assert sort(what, message(5, 50)).doubtful == [message(5, 50)]
    what.complete = False
    assert sort(what, message(5, 50)).doubtful == [], "without evidence it is taken to have been copied"
    assert sort(what, message(9, 50)).doubtful == [message(9, 50)]
    assert sort(what, message(5, 50), of=2).doubtful == [message(5, 50)]


def test_what_is_waived_need_not_come_and_is_known_by_its_date_from_then_on() -> None:
    what = known()
    waived = frozenset({("INBOX", 1, 7)})
    assert sort_by_place(what, 1, [message(7, 70)], (), (), waived).doubtful == []
    assert sort_by_place(what, 1, [message(7, 71)], (), (), waived).doubtful == [message(7, 71)]


def test_what_a_return_appended_need_not_come() -> None:
    note = Note("INBOX", 101, "g", b"d", 5, 7, 1, 70, "", appended=True)
    assert sort(known(), message(7, 99), notes=(note,)).doubtful == []
    assert sort(known(), message(7, 99), notes=(note,), of=2).doubtful == [message(7, 99)]


def test_signs_that_messages_were_numbered_anew() -> None:
    assert not sort(known(), message(1, 10), message(2, 20), message(3, 30)).is_renumbered
    assert sort(known(), message(1, 10), message(3, 20)).is_renumbered
    assert sort(known(), message(6, 50), stragglers=(straggler(5, "L", 50),)).is_renumbered


# By content -------------------------------------------------------------------------------


@pytest.mark.parametrize("evidence", [True, False])
def test_a_copy_that_lost_its_uid_to_a_late_message(*, evidence: bool) -> None:
    what = known(evidence=evidence)
    sorting = sort(what, message(1, 10), message(2, 15), message(3, 20))
    found = verdicts(sorting, what, Here({1: "A", 2: "B"}), {2: content("L"), 3: content("B")})
    assert found == {2: Verdict.LATE, 3: Verdict.KNOWN}
    assert what.prints[1, 3].origin == 2
    assert (1, 2) not in what.prints
    assert sort(what, message(1, 10), message(3, 20)).doubtful == []


def test_two_that_changed_places_are_both_known() -> None:
    what = known()
    found = verdicts(sort(what, message(2, 10), message(1, 20)), what, Here(), {2: content("A"), 1: content("B")})
    assert found == {1: Verdict.KNOWN, 2: Verdict.KNOWN}
    assert (what.prints[1, 1].origin, what.prints[1, 2].origin) == (2, 1)


def test_the_same_message_delivered_twice_is_two() -> None:
    what = known()
    sorting = sort(what, message(1, 10), message(2, 20), message(3, 20), message(4, 20))
    contents = dict.fromkeys((2, 3, 4), content("B"))
    found = verdicts(sorting, what, Here({1: "A", 2: "B"}), contents)
    assert found == {2: Verdict.KNOWN, 3: Verdict.LATE, 4: Verdict.LATE}
    # One of three lost its place, and accounts for one.
    what = known()
    sorting = sort(what, message(1, 10), message(3, 20), message(4, 20))
    assert sorted(verdicts(sorting, what, Here({1: "A", 2: "B"}), contents).values(), key=str) == [
        Verdict.KNOWN,
        Verdict.LATE,
    ]


def test_of_messages_of_one_second_nobody_is_known_by_the_uid_alone() -> None:
    what, late = known(), straggler(5, "L", 50)
    sorting = sort(what, message(5, 50), message(6, 50), stragglers=(late,))
    assert sorting.doubtful == [message(5, 50), message(6, 50)]
    identification = Identification(sorting, what, Here())
    assert not identification.exactly(message(5, 50), content("M"))
    assert identification.exactly(message(6, 50), content("L"))
    what = known()
    sorting = sort(what, message(1, 10), message(2, 20), message(3, 20))
    found = verdicts(sorting, what, Here(), {2: content("M"), 3: content("B")})
    assert found == {2: Verdict.LATE, 3: Verdict.KNOWN}


def test_a_message_with_the_content_of_one_that_is_in_its_place_came_late() -> None:
    what = known()
    sorting = sort(what, message(1, 10), message(2, 20), message(3, 30))
    assert verdicts(sorting, what, Here({1: "A", 2: "B"}), {3: content("A")}) == {3: Verdict.LATE}


def test_a_late_message_that_was_numbered_anew_is_not_brought_again() -> None:
    what, late = known(), straggler(5, "L", 50)
    sorting = sort(what, message(1, 10), message(2, 20), message(5, 49), message(6, 50), stragglers=(late,))
    identification = Identification(sorting, what, Here())
    assert identification.exactly(message(6, 50), content("L"))
    assert identification.moved_stragglers == {(1, 5): (1, 6)}
    assert identification.anyhow(message(5, 49), content("M")) is Verdict.LATE


def test_dates_count_under_one_uidvalidity_and_not_in_a_folder_made_anew() -> None:
    what, late = known(), straggler(5, "L", 50)
    sorting = sort(what, message(7, 77), stragglers=(late,))
    assert verdicts(sorting, what, Here(), {7: content("L")}) == {7: Verdict.LATE}, "it was sent once more"
    what = known()
    assert verdicts(sort(what, message(7, 77)), what, Here(), {7: content("A")}) == {7: Verdict.LATE}
    what = known()
    sorting = sort(what, message(1, 90), message(2, 90), message(3, 90), stragglers=(late,), of=2)
    contents = {1: content("A"), 2: content("L"), 3: content("N")}
    found = verdicts(sorting, what, Here(), contents)
    assert found == {1: Verdict.KNOWN, 2: Verdict.KNOWN, 3: Verdict.LATE}
    assert what.prints[2, 1].origin == 1


def test_the_right_one_of_two_that_differ_in_their_dates_is_taken() -> None:
    prints = {(1, 1): Print(10, 1, 1, digest("A")), (1, 2): Print(20, 1, 2, digest("A"))}
    what = Known("INBOX", 1, 3, complete=True, prints=prints)
    sorting = sort(what, message(4, 99), message(5, 10), message(6, 20), of=2)
    contents = dict.fromkeys((4, 5, 6), content("A"))
    assert verdicts(sorting, what, Here(), contents) == {4: Verdict.LATE, 5: Verdict.KNOWN, 6: Verdict.KNOWN}


def test_without_evidence_what_its_owner_removed_cannot_be_told() -> None:
    def ask(here: Here, text: str = "B") -> Verdict:
        what = known(evidence=False)
        return verdicts(sort(what, message(1, 10), message(3, 20)), what, here, {3: content(text)})[3]

    assert ask(Here({1: "A"})) is Verdict.UNDECIDED
    assert ask(Here({1: "A"}, anywhere=("B",))) is Verdict.KNOWN, "it was moved here"
    assert ask(Here({1: "A", 2: "B"}), "X") is Verdict.LATE, "the copy is here, and another one"
    assert ask(Here({1: "A"}), "longer") is Verdict.LATE, "it has another size"


def test_with_evidence_what_its_owner_removed_is_known_all_the_same() -> None:
    what = known()
    assert verdicts(sort(what, message(1, 10), message(3, 20)), what, Here(), {3: content("B")}) == {3: Verdict.KNOWN}
    what = known()
    assert verdicts(sort(what, message(1, 10), message(3, 20)), what, Here(), {3: content("X")}) == {3: Verdict.LATE}


def test_what_a_return_appended_and_the_server_altered() -> None:
    def note(date: int, legacy_uid: int | None = None) -> Note:
        return Note("INBOX", 101, "g", b"another", 5, legacy_uid, 1, date, "<X>", appended=True)

    what = known()
    sorting = sort(what, message(7, 70), notes=(note(70),))
    identification = Identification(sorting, what, Here())
    assert identification.exactly(message(7, 70), content("X"))
    assert [(each.uid, uid) for each, uid in identification.found_notes] == [(101, 7)]
    sorting = sort(what, message(7, 71), notes=(note(70),))
    assert verdicts(sorting, what, Here(), {7: content("X")}) == {7: Verdict.UNDECIDED}
    sorting = sort(what, message(7, 71), notes=(note(70),))
    assert verdicts(sorting, what, Here(), {7: content("Y")}) == {7: Verdict.LATE}
    sorting = sort(what, message(7, 71), message(8, 70), notes=(note(70, 8),))
    assert verdicts(sorting, what, Here(), {7: content("X")}) == {7: Verdict.LATE}, "the other one is known by its UID"


def test_the_last_message_is_known_again() -> None:
    what = known()
    sorting = sort(what, message(7, 70))
    identification = Identification(sorting, what, Here())
    identification.is_last(message(7, 70), content("last"))
    identification.finish()
    assert what.prints[1, 7].origin == LAST
    assert sort(what, message(7, 70)).doubtful == []


# What is kept -----------------------------------------------------------------------------


def test_what_is_known_is_kept_for_the_flip_of_which_it_is(tmp_path: Path) -> None:
    what = known(complete=False)
    what.prints[2, 9] = Print(90, 5, LAST, "d")
    what.save(tmp_path)
    assert Known.load(tmp_path, "INBOX", 1, 3) == what
    assert Known.load(tmp_path, "INBOX", 1, 4) is None
    assert Known.load(tmp_path, "INBOX", 2, 3) is None
    assert Known.load(tmp_path, "Inbox2", 1, 3) is None
    forget(tmp_path)
    assert Known.load(tmp_path, "INBOX", 1, 3) is None


def test_evidence_is_complete_or_learned_from_the_mailbox_here() -> None:
    came = {1: (5, "d1", 10), 2: (5, "d2", 20), 9: (5, "d9", 90)}
    what = Known.of_flip("INBOX", 1, 3, came, 2)
    assert what.complete
    assert set(what.prints) == {(1, 1), (1, 2)}
    what = Known.of_flip("INBOX", 1, 3, {1: (5, "d1", 10)}, 2)
    assert not what.complete
    what.learn([message(1, 11), message(2, 20), message(3, 30)])
    assert {key: each.digest for key, each in what.prints.items()} == {(1, 1): "d1", (1, 2): ""}


def test_what_was_seen_is_forgotten_with_the_next_move(tmp_path: Path) -> None:
    looks = Looks(tmp_path, "monday")
    looks.set("INBOX", Look(Status(1, 5, 4, 9), 3))
    looks.save()
    assert Looks(tmp_path, "monday").get("INBOX") == Look(Status(1, 5, 4, 9), 3)
    assert Looks(tmp_path, "tuesday").get("INBOX") is None
