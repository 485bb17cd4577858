"""What a return has to do, for two sides that a model changes as people do."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bascule.imap.reader import Message
from bascule.migrator.acts import Note, Straggler
from bascule.migrator.known import LAST, Known, Print
from bascule.migrator.return_plan import Folder, Implausible, Plan, Records, Side, insist_on_plausible, plan

SEEN = frozenset({"\\Seen"})
NONE: frozenset[str] = frozenset()


def message(uid: int, date: int, flags: frozenset[str] = NONE) -> Message:
    return Message(uid, 10, date, flags)


def copied(name: str = "INBOX", *uids: int, complete: bool = True) -> Known:
    """A folder that was copied with these UIDs; dates are the UIDs times ten."""
    prints = {(1, uid): Print(uid * 10, 0, uid, f"{uid:032x}") for uid in uids}
    return Known(name, 1, 100, complete, prints)


def folder(
    *uids: int, uidvalidity: int = 1, flags: frozenset[str] = NONE, kept: frozenset[str] | None = None
) -> Folder:
    return Folder(
        uidvalidity,
        {uid: message(uid, uid * 10, flags) for uid in uids},
        {uid: f"guid-{uid}" for uid in uids},
        kept,
    )


def side(**folders: Folder) -> Side:
    return Side(folders)


KNOWN = {"INBOX": copied("INBOX", 1, 2, 3)}


# Rule by rule ----------------------------------------------------------------------------


def test_equal_sides_need_nothing() -> None:
    found = plan(side(INBOX=folder(1, 2, 3)), side(INBOX=folder(1, 2, 3)), Records(KNOWN))
    assert len(found) == 0
    assert found.places == {("INBOX", uid): ("INBOX", uid) for uid in (1, 2, 3)}


def test_what_is_new_here_is_appended_and_what_is_gone_expunged() -> None:
    found = plan(side(INBOX=folder(1, 3, 101)), side(INBOX=folder(1, 2, 3)), Records(KNOWN))
    assert found.appends == (("INBOX", 101),)
    assert found.expunges == {"INBOX": (2,)}
    assert "UID 101 here" in found.why()


def test_what_was_never_here_stays_there() -> None:
    """A late message that nobody brought; one below UIDNEXT that was not visible at the flip; one with another date."""
    there = Folder(1, {1: message(1, 10), 2: message(2, 999), 50: message(50, 500), 120: message(120, 1)})
    found = plan(side(INBOX=folder(1)), side(INBOX=there), Records(KNOWN))
    assert found.expunges == {}


def test_without_evidence_all_below_uidnext_was_here() -> None:
    known = {"INBOX": copied("INBOX", 1, complete=False)}
    found = plan(side(INBOX=folder(1)), side(INBOX=folder(1, 50, 120)), Records(known))
    assert found.expunges == {"INBOX": (50,)}


def test_what_is_waived_stays_there() -> None:
    found = plan(side(INBOX=folder(1)), side(INBOX=folder(1, 2)), Records(KNOWN, waived=frozenset({("INBOX", 1, 2)})))
    assert found.expunges == {}


def test_the_last_message_is_removed() -> None:
    known = copied("INBOX", 1)
    known.prints[1, 120] = Print(1200, 5, LAST)
    known.prints[1, 121] = Print(1210, 5, 0)  # a message that need not come, and is nobody's
    found = plan(side(INBOX=folder(1)), side(INBOX=folder(1, 120, 121)), Records({"INBOX": known}))
    assert found.expunges == {"INBOX": (120,)}


def test_a_copy_that_the_legacy_server_numbered_anew_is_not_appended() -> None:
    known = copied("INBOX", 1)
    known.prints[1, 7] = known.prints.pop((1, 1))
    there = Folder(1, {7: message(7, 10), 1: message(1, 999)})
    found = plan(side(INBOX=folder(1)), side(INBOX=there), Records({"INBOX": known}))
    assert (found.appends, found.expunges) == ((), {})
    assert found.places == {("INBOX", 1): ("INBOX", 7)}


def test_a_folder_that_the_user_made_anew_here_has_no_copies() -> None:
    found = plan(side(INBOX=folder(1, uidvalidity=2)), side(INBOX=folder(1)), Records(KNOWN))
    assert found.appends == (("INBOX", 1),)
    assert found.expunges == {"INBOX": (1,)}


@pytest.mark.parametrize("delivered", [True, False])
@pytest.mark.parametrize("guid", ["", "guid-101"])
def test_a_late_message_is_where_it_belongs_also_if_nobody_recorded_that_it_was_delivered(
    *, delivered: bool, guid: str
) -> None:
    straggler = Straggler("INBOX", 1, 120, delivered=delivered, internaldate=1200, name="120.1.x", guid=guid)
    here = replace(folder(1, 101), guids={1: "guid-1", 101: guid or "5.L120.1.x.bascule,S=3"})
    found = plan(side(INBOX=here), side(INBOX=folder(1, 120)), Records(KNOWN, [straggler]))
    assert (found.appends, found.expunges) == ((), {})


def test_a_late_message_that_was_removed_here_is_removed_there() -> None:
    straggler = Straggler("INBOX", 1, 120, delivered=True, internaldate=1200, name="120.1.x")
    found = plan(side(INBOX=folder(1)), side(INBOX=folder(1, 120)), Records(KNOWN, [straggler]))
    assert found.expunges == {"INBOX": (120,)}
    other = replace(straggler, internaldate=7)
    found = plan(side(INBOX=folder(1)), side(INBOX=folder(1, 120)), Records(KNOWN, [other]))
    assert found.expunges == {}, "another message has its UID"


def test_a_late_message_that_is_in_inbox_for_want_of_its_folder_stays_where_it_is() -> None:
    straggler = Straggler("Late", 9, 4, delivered=True, internaldate=40, name="4.9.x", guid="late")
    here = replace(folder(1, 101), guids={101: "late"})
    there = side(INBOX=folder(1), Late=folder(4, uidvalidity=9))
    found = plan(side(INBOX=here), there, Records(KNOWN, [straggler]))
    assert (found.appends, found.expunges, found.deletes) == ((), {}, ())
    assert found.places["INBOX", 101] == ("Late", 4)
    # Its owner made the folder, and left the message in INBOX: that is where it is wanted.
    found = plan(side(INBOX=here, Late=folder()), there, Records(KNOWN, [straggler]))
    assert (found.appends, found.expunges) == ((("INBOX", 101),), {"Late": (4,)})


def test_a_late_message_that_was_copied_stands_for_one_only() -> None:
    straggler = Straggler("INBOX", 1, 120, delivered=True, internaldate=1200, guid="late")
    here = replace(folder(101, 102), guids={101: "late", 102: "late"})
    found = plan(side(INBOX=here), side(INBOX=folder(120)), Records(KNOWN, [straggler]))
    assert found.appends == (("INBOX", 102),)


def note(uid: int, legacy_uid: int | None, *, appended: bool = True, guid: str = "") -> Note:
    return Note("INBOX", uid, guid or f"guid-{uid}", b"", 100, legacy_uid, 1, uid * 10, "", appended)


def test_what_was_appended_is_not_appended_again() -> None:
    found = plan(side(INBOX=folder(1, 101)), side(INBOX=folder(1, 130)), Records(KNOWN, notes=[note(101, 130)]))
    assert (found.appends, found.expunges) == ((), {})
    found = plan(side(INBOX=folder(1, 101)), side(INBOX=folder(1, 130)), Records(KNOWN, notes=[note(101, None)]))
    assert (found.appends, found.expunges) == ((), {}), "the server said OK, and not where it is"


def test_what_may_have_been_appended_is_looked_for() -> None:
    intended = note(101, None, appended=False)
    found = plan(side(INBOX=folder(1, 101)), side(INBOX=folder(1, 130)), Records(KNOWN, notes=[intended]))
    assert found.appends == (("INBOX", 101),)


def test_a_uid_here_that_is_another_message_by_now_is_appended() -> None:
    other = note(101, 130, guid="another")
    found = plan(side(INBOX=folder(1, 101)), side(INBOX=folder(1, 130)), Records(KNOWN, notes=[other]))
    assert found.appends == (("INBOX", 101),)
    assert found.expunges == {"INBOX": (130,)}


def test_flags_are_compared_among_those_that_the_server_keeps() -> None:
    here = side(INBOX=folder(1, flags=frozenset({"\\Seen", "$Work", "todo"})))
    system = frozenset({"\\Seen", "\\Flagged"})
    there = side(INBOX=folder(1, flags=frozenset({"\\Flagged", "$work", "Kept"}), kept=system))
    found = plan(here, there, Records(KNOWN))
    assert {(each.flags, each.wanted) for each in found.stores} == {
        (frozenset({"\\Seen"}), True),
        (frozenset({"\\Flagged"}), False),
    }, "keywords that it keeps and does not list are left alone"
    there = side(INBOX=replace(there.folders["INBOX"], kept=None, refused=frozenset({"todo"})))
    found = plan(here, there, Records(KNOWN))
    assert {(each.flags, each.wanted) for each in found.stores} == {
        (frozenset({"\\Seen"}), True),
        (frozenset({"\\Flagged", "Kept"}), False),
    }, "$Work is there in another case; todo is refused"


def test_folders() -> None:
    known = KNOWN | {name: copied(name, 1) for name in ("Old", "Old/deep", "Full", "Kept")}
    there = Side(
        {
            "INBOX": folder(1, 2, 3),
            "Old": folder(1),
            "Old/deep": folder(),
            "Full": folder(1, 120),
            "Theirs": folder(),
            "Kept": folder(1),
        },
        frozenset({"Kept", "Theirs"}),
    )
    here = Side(
        {"INBOX": folder(1, 2, 3), "Kept": folder(1), "New": folder(), "New/deep": folder()}, frozenset({"New"})
    )
    found = plan(here, there, Records(known))
    assert found.creates == ("New", "New/deep")
    assert found.deletes == ("Old/deep", "Old"), "not what has a late message in it, nor what was made there"
    assert found.expunges == {"Old": (1,), "Full": (1,)}
    assert found.subscriptions == (("Kept", False), ("New", True))


def test_a_folder_with_others_below_stays() -> None:
    known = KNOWN | {"Old": copied("Old", 1)}
    here, there = side(INBOX=folder(1, 2, 3)), {"INBOX": folder(1, 2, 3), "Old": folder(1), "Old/theirs": folder()}
    assert plan(here, Side(there), Records(known)).deletes == ()


# Plausible, or not -------------------------------------------------------------------------


def judge(here: Side, there: Side | None = None, *, known: dict[str, Known] | None = None, had: int = 3) -> None:
    records = Records(known or KNOWN)
    insist_on_plausible(here, there or side(INBOX=folder(1, 2, 3)), records, {"INBOX": had}, "alice@lab.test")


MANY = {"INBOX": copied("INBOX", *range(1, 61)), "Old": copied("Old", *range(1, 4))}


def test_a_mailbox_that_reads_as_empty_is_not_believed() -> None:
    with pytest.raises(Implausible, match="reads as empty") as error:
        judge(side(INBOX=folder()))
    assert "mounted" in error.value.hint
    assert "--force" in error.value.hint


def test_a_folder_made_anew_there_is_not_believed() -> None:
    with pytest.raises(Implausible, match="made anew on the legacy server"):
        judge(side(INBOX=folder(1, 2, 3)), side(INBOX=folder(1, uidvalidity=2)))
    judge(side(INBOX=folder(1, 2, 3)), side(INBOX=folder(uidvalidity=2)))  # by us, say


def test_most_of_a_folder_gone_is_not_believed() -> None:
    judge(side(INBOX=folder(*range(1, 31))), known=MANY, had=60)
    with pytest.raises(Implausible, match=r"'INBOX' of alice@lab.test is almost empty here: 31 of the 60"):
        judge(side(INBOX=folder(*range(1, 30))), known=MANY, had=60)


def test_a_few_messages_may_go_and_a_whole_folder_may_not() -> None:
    judge(side(INBOX=folder(1)))
    with pytest.raises(Implausible, match=r"'INBOX' of alice@lab.test is not here any more: 3 of the 3"):
        judge(side(Other=folder(500)))


def test_messages_that_were_moved_are_not_lost() -> None:
    moved = Folder(7, {uid: message(uid, uid * 10) for uid in range(1, 61)})
    judge(side(INBOX=folder(), Archive=moved), known=MANY, had=60)
    judge(Side({"Archive": moved}), known=MANY, had=60)
    half = Folder(7, {uid: message(uid, uid * 10) for uid in range(1, 20)})
    with pytest.raises(Implausible):
        judge(side(INBOX=folder(), Archive=half), known=MANY, had=60)


# Whatever happens ---------------------------------------------------------------------------


@dataclass
class Model:
    """Two sides, and what was recorded; ``apply`` does what a plan says, as a server would."""

    here: dict[str, dict[int, Message]]
    there: dict[str, dict[int, Message]]
    kept: frozenset[str] | None
    known: dict[str, Known]
    stragglers: list[Straggler] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    guids: dict[tuple[str, int], str] = field(default_factory=dict)
    never_here: set[int] = field(default_factory=set)  # dates

    def sides(self) -> tuple[Side, Side]:
        here = {
            name: Folder(1 if name in self.known else 5, mails, {uid: self.guids[name, uid] for uid in mails})
            for name, mails in self.here.items()
        }
        return Side(here), Side({name: Folder(1, mails, kept=self.kept) for name, mails in self.there.items()})

    def plan(self) -> Plan:
        return plan(*self.sides(), Records(self.known, self.stragglers, self.notes))

    def apply(self, todo: Plan) -> None:
        for name in todo.creates:
            self.there[name] = {}
        for name, uid in todo.appends:
            mail = self.here[name][uid]
            legacy_uid = max([200, *self.there[name]]) + 1
            flags = mail.flags if self.kept is None else mail.flags & self.kept
            self.there[name][legacy_uid] = replace(mail, uid=legacy_uid, flags=flags)
            self.notes.append(Note(name, uid, self.guids[name, uid], b"", 0, legacy_uid, 1, appended=True))
        for name, uids in todo.expunges.items():
            for uid in uids:
                assert self.there[name].pop(uid).internaldate not in self.never_here
        for store in todo.stores:
            for uid in store.uids:
                mail = self.there[store.folder][uid]
                flags = mail.flags | store.flags if store.wanted else mail.flags - store.flags
                self.there[store.folder][uid] = replace(mail, flags=flags)
        for name in todo.deletes:
            assert not self.there.pop(name)


FLAGS = st.frozensets(st.sampled_from(["\\Seen", "\\Flagged", "todo"]))
NAMES = st.sampled_from(["INBOX", "A", "B"])


@st.composite
def models(draw: st.DrawFn) -> Model:
    dates = iter(range(1000, 10_000))
    start = draw(st.dictionaries(NAMES, st.dictionaries(st.integers(1, 9), FLAGS, max_size=4), min_size=1))
    start.setdefault("INBOX", {})
    model = Model({}, {}, draw(st.sampled_from([None, frozenset({"\\Seen", "\\Flagged"})])), {})
    for name, flags_of in start.items():
        prints = {}
        model.here[name], model.there[name] = {}, {}
        for number, flags in flags_of.items():
            date = next(dates)
            model.here[name][number] = message(number, date, flags)
            there = flags if model.kept is None else flags & model.kept
            model.there[name][number] = message(number, date, there)
            model.guids[name, number] = f"copy {name} {number}"
            prints[1, number] = Print(date, 0, number, "d")
        model.known[name] = Known(name, 1, 10, complete=True, prints=prints)
    for kind in draw(
        st.lists(st.sampled_from(["late", "brought", "new", "gone", "move", "flag", "fold", "drop"]), max_size=12)
    ):
        name = draw(NAMES)
        mails = model.here.get(name, {})
        uid = draw(st.sampled_from(sorted(mails))) if mails else None
        date = next(dates)
        if kind == "late":
            at = max([20, *model.there.get(name, {})]) + 1
            model.there.setdefault(name, {})[at] = message(at, date)
            model.never_here.add(date)
        elif kind == "brought":
            at = max([20, *model.there.get(name, {})]) + 1
            model.there.setdefault(name, {})[at] = message(at, date)
            target = name if name in model.here else "INBOX"
            fresh = 1000 + date
            model.here.setdefault(target, {})[fresh] = message(fresh, date)
            model.guids[target, fresh] = f"late {date}"
            model.stragglers.append(
                Straggler(name, 1, at, delivered=draw(st.booleans()), internaldate=date, guid=f"late {date}")
            )
        elif kind == "new" and name in model.here:
            mails[1000 + date] = message(1000 + date, date, draw(FLAGS))
            model.guids[name, 1000 + date] = f"new {date}"
        elif kind == "gone" and uid is not None:
            del mails[uid]
        elif kind == "flag" and uid is not None:
            mails[uid] = replace(mails[uid], flags=draw(FLAGS))
        elif kind == "move" and uid is not None:
            target = draw(NAMES)
            moved = mails.pop(uid)
            model.here.setdefault(target, {})[1000 + date] = replace(moved, uid=1000 + date)
            model.guids[target, 1000 + date] = model.guids[name, uid]
        elif kind == "fold":
            model.here.setdefault("C", {})
        elif kind == "drop" and name != "INBOX":
            model.here.pop(name, None)
    return model


@given(models())
@settings(max_examples=400, deadline=None)
def test_whatever_happened_the_sides_become_equal_and_stay_so(model: Model) -> None:
    expected = {mail.internaldate for mails in model.here.values() for mail in mails.values()} | model.never_here
    for _ in range(3):
        todo = model.plan()
        if not len(todo):
            break
        model.apply(todo)
    assert len(model.plan()) == 0, model.plan().why()
    found = Counter(mail.internaldate for mails in model.there.values() for mail in mails.values())
    assert found == Counter(expected), "each once"
    for (name, uid), (name_there, uid_there) in model.plan().places.items():
        wanted, present = model.here[name][uid], model.there[name_there][uid_there]
        assert wanted.internaldate == present.internaldate
        kept = model.kept or wanted.flags | present.flags
        assert wanted.flags & kept == present.flags & kept
        assert name == name_there or (name == "INBOX" and name_there not in model.here)
