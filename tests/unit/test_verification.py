"""The verification finds each thing in which the two sides can differ; here they are made to differ on purpose."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import pytest

from bascule.imap import names, profiles
from bascule.imap.folder_rules import FolderRule
from bascule.imap.reader import Changes, Layout, ListedFolder, Message, Reader, Status
from bascule.migrator import verification
from bascule.migrator.copying import FolderState, Pass
from bascule.migrator.verification import NotEqual, NotServed, Verification, verify
from bascule.migrator.witness import Opened, Seen, Witness

WHEN = 1_078_099_198
FOLDERS = ("INBOX", "Sent", "Empty")


@dataclass
class Box:
    """A folder on one of the sides."""

    messages: dict[int, Seen] = field(default_factory=dict)
    uidvalidity: int = 7
    #: What it says it has, if that is not true.
    exists: int | None = None


def mailbox() -> dict[str, Box]:
    def message(uid: int) -> Seen:
        return Seen(frozenset({"\\Seen", "$Work"}) if uid % 2 else frozenset(), WHEN + uid, 100 + uid)

    return {
        "INBOX": Box({uid: message(uid) for uid in (1, 2, 5)}),
        "Sent": Box({uid: message(uid) for uid in (3, 4)}),
        "Empty": Box(),
    }


def digest_of(folder: str, uid: int) -> str:
    return f"{folder} {uid}".encode().hex().ljust(64, "0")


@dataclass
class Side:
    """Both the legacy server, as the reader and as the witness see it, and the new one."""

    boxes: dict[str, Box] = field(default_factory=mailbox)
    subscriptions: set[str] = field(default_factory=lambda: {"INBOX", "Sent"})
    uses: dict[str, frozenset[str]] = field(default_factory=lambda: {"Sent": frozenset({"\\sent"})})
    noselect: set[str] = field(default_factory=set)
    hidden_from_search: set[int] = field(default_factory=set)
    hidden_from_fetch: set[int] = field(default_factory=set)
    digest_of: Callable[[str, int], str] = digest_of
    namespaces: tuple[str, ...] = ()
    profile: profiles.Profile = profiles.UNKNOWN
    attributes: dict[str, frozenset[str]] = field(default_factory=dict)
    #: Gmail's numbers of messages, by folder and UID; None: it has none.
    ids: dict[str, dict[int, bytes]] | None = None

    # As a Reader
    def layout(self) -> Layout:
        return Layout("/", "", tuple(ListedFolder(name, True) for name in self.boxes), ())

    def changes(self, wanted: Iterable[tuple[str, Status | None]], *, sizes: bool = True) -> Iterator[Changes]:
        for name, _ in wanted:
            box = self.boxes[name]
            new = [
                Message(uid, seen.size if sizes else 0, seen.internaldate, seen.flags)
                for uid, seen in box.messages.items()
                if uid not in self.hidden_from_fetch
            ]
            yield Changes(name, box.uidvalidity, exists=len(box.messages), new=new)

    def announces(self, capability: str) -> bool:
        return capability == "X-GM-EXT-1" and self.ids is not None

    # As a Witness
    def message_ids(self, folders: Sequence[str]) -> Iterator[tuple[str, dict[int, bytes]]]:
        for name in folders:
            yield name, (self.ids or {}).get(name, {})

    def opened(self, name: str) -> Opened:
        box = self.boxes[name]
        return Opened(len(box.messages) if box.exists is None else box.exists, box.uidvalidity)

    def uids(self, folders: Mapping[str, Sequence[int]]) -> Iterator[tuple[str, Opened, set[int]]]:
        for name in folders:
            yield name, self.opened(name), self.boxes[name].messages.keys() - self.hidden_from_search

    def folders(self) -> dict[str, frozenset[str]]:
        return {
            name: frozenset({"\\noselect"} if name in self.noselect else ()) | self.attributes.get(name, frozenset())
            for name in self.boxes
        }

    def other_namespaces(self, _prefix: str, **_: bool) -> tuple[str, ...]:
        return self.namespaces

    def subscribed(self) -> frozenset[str]:
        return frozenset(self.subscriptions)

    def special_uses(self, **_: bool) -> dict[str, frozenset[str]]:
        return self.uses

    def messages(self, folders: Sequence[str]) -> Iterator[tuple[str, Opened, dict[int, Seen]]]:
        for name in folders:
            yield name, self.opened(name), self.boxes[name].messages

    def digests(self, folder: str, uids: Sequence[int]) -> dict[int, str]:
        return {uid: self.digest_of(folder, uid) for uid in uids if uid in self.boxes[folder].messages}


def last_pass(**changed: Any) -> Pass:
    listed = tuple(ListedFolder(name, True, "\\Sent" if name == "Sent" else "") for name in FOLDERS)
    layout = Layout("/", "", listed, ("INBOX", "Sent"))
    states = [FolderState("INBOX", 7, 6, 3, 6), FolderState("Sent", 7, 5, 2, 5), FolderState("Empty", 7, 1, 0, 1)]
    return replace(Pass(layout, names.of_layout(layout), folders=states), **changed)


def compare(there: Side, here: Side, done: Pass | None = None, **options: Any) -> Verification:
    return verify(
        cast(Reader, there),
        cast(Witness, there),
        cast(Witness, here),
        done or last_pass(),
        **({"digests": lambda folder: {uid: digest_of(folder, uid)[:32] for uid in range(10)}} | options),
    )


def test_equal_sides_are_equal_and_what_was_compared_is_kept() -> None:
    found = compare(Side(), Side())
    assert {(row["name"], row["messages"], row["uidnext"]) for row in found.folders} == {
        ("INBOX", 3, 6),
        ("Sent", 2, 5),
        ("Empty", 0, 1),
    }
    assert found.special_uses == {"sent": "Sent"}
    assert found.bodies_compared == 5
    assert found.notes == []
    assert found.odd_sizes == []


def test_what_was_waived_need_be_shown_by_nobody() -> None:
    there = Side(hidden_from_fetch={2})
    here = Side()
    lose(here)
    there.boxes["INBOX"].exists = 2  # SEARCH finds one more than there are
    with pytest.raises(NotEqual, match="finds 1 messages in 'INBOX' that it does not list, UID 2 first") as found:
        compare(there, here)
    assert found.value.uids == (2,)
    assert compare(there, here, last_pass(waived={("INBOX", 7, 2)})).waived == ["INBOX: UID 2"]
    with pytest.raises(NotEqual):
        compare(there, here, last_pass(waived={("Sent", 7, 2), ("INBOX", 8, 2)}))


def test_what_was_odd_about_a_message_is_in_the_report() -> None:
    class Odd(Side):
        def changes(self, wanted: Iterable[tuple[str, Status | None]], *, sizes: bool = True) -> Iterator[Changes]:
            for changes in super().changes(wanted, sizes=sizes):
                changes.new = [replace(each, remarks=("no date",) if each.uid == 2 else ()) for each in changes.new]
                yield changes

    assert compare(Odd(), Side()).notes == ["INBOX: UID 2: no date"]


def test_a_folder_that_was_waived_need_not_agree_with_itself() -> None:
    there, here = Side(hidden_from_fetch={2}), Side()
    lose(here)
    with pytest.raises(NotEqual, match="that it does not list"):
        compare(there, here)
    compare(there, here, last_pass(waived_folders={"INBOX"}))
    with pytest.raises(NotEqual, match="that it does not list"):
        compare(there, here, last_pass(waived_folders={"Sent"}))


def lose(side: Side) -> None:
    del side.boxes["INBOX"].messages[2]


def add(side: Side) -> None:
    side.boxes["Sent"].messages[1] = Seen(frozenset(), WHEN, 1)


def renumber(side: Side) -> None:
    side.boxes["INBOX"].messages[4] = side.boxes["INBOX"].messages.pop(5)


def change(**values: Any) -> Callable[[Side], None]:
    def apply(side: Side) -> None:
        side.boxes["INBOX"].messages[5] = side.boxes["INBOX"].messages[5]._replace(**values)

    return apply


def set_uidvalidity(side: Side) -> None:
    side.boxes["Sent"].uidvalidity = 8


def set_uidvalidity_of_an_empty_one(side: Side) -> None:
    side.boxes["Empty"].uidvalidity = 8


def announce_more(side: Side) -> None:
    side.boxes["INBOX"].exists = 4


def fill_the_empty_one(side: Side) -> None:
    side.boxes["Empty"].messages[1] = Seen(frozenset(), WHEN, 1)


def hide(side: Side) -> None:
    del side.boxes["Sent"]


def hide_empty(side: Side) -> None:
    del side.boxes["Empty"]


def close(side: Side) -> None:
    side.noselect.add("Sent")


def forget_subscription(side: Side) -> None:
    side.subscriptions.remove("Sent")


def find_more_than_is_listed(side: Side) -> None:
    side.hidden_from_fetch.add(5)


def more_folders(side: Side) -> None:
    side.boxes["Stray"] = Box({1: Seen(frozenset(), WHEN, 1)})


def other_bytes(side: Side) -> None:
    side.digest_of = lambda folder, uid: "f" * 64 if (folder, uid) == ("INBOX", 5) else digest_of(folder, uid)


def no_body(side: Side) -> None:
    side.digests = lambda *_: {}  # type: ignore[method-assign]


HERE = [
    (lose, "1 messages are missing here, 0 are gone there, UID 2 first", "INBOX"),
    (add, "0 messages are missing here, 1 are gone there, UID 1 first", "Sent"),
    (renumber, "1 messages are missing here, 1 are gone there, UID 5 first", "INBOX"),
    (change(flags=frozenset({"\\Seen"})), "the flags of UID 5 differ", "INBOX"),
    (change(flags=frozenset({"\\Seen", "$Work", "more"})), "the flags of UID 5 differ", "INBOX"),
    (change(flags=frozenset({"\\Seen", "\\Flagged", "$Work"})), "the flags of UID 5 differ", "INBOX"),
    (change(internaldate=WHEN), "the INTERNALDATE of UID 5 differs", "INBOX"),
    (set_uidvalidity, "another UIDVALIDITY here: 8", "Sent"),
    (set_uidvalidity_of_an_empty_one, "another UIDVALIDITY here: 8", "Empty"),
    (announce_more, "has 4 messages here, and shows 3", "INBOX"),
    (fill_the_empty_one, "1 are gone there", "Empty"),
    (hide, "is not listed here as 'Sent'", "Sent"),
    (hide_empty, "is not listed here as 'Empty'", "Empty"),
    (close, "cannot be opened here as 'Sent'", "Sent"),
    (forget_subscription, "the subscription of 'Sent' is missing", ""),
    (more_folders, "1 messages here in 'Stray'", ""),
    (other_bytes, "UID 5 is not served here as it came in", "INBOX"),
    (no_body, "cannot be read here", "INBOX"),
]


@pytest.mark.parametrize(("differ", "words", "folder"), HERE, ids=lambda each: getattr(each, "__name__", None))
def test_what_differs_here_is_found_and_named(differ: Callable[[Side], None], words: str, folder: str) -> None:
    here = Side()
    differ(here)
    with pytest.raises(NotEqual) as error:
        compare(Side(), here, bodies="all")
    assert words in error.value.message
    assert error.value.folder == folder


THERE = [
    (find_more_than_is_listed, "finds 1 messages in 'INBOX' that it does not list, UID 5 first"),
    (announce_more, "says that 'INBOX' has 4 messages, and shows 3"),
    (set_uidvalidity, "'Sent' has a new UIDVALIDITY on the legacy server"),
    (set_uidvalidity_of_an_empty_one, "'Empty' has a new UIDVALIDITY on the legacy server"),
    (add, "1 messages are missing here, 0 are gone there, UID 1 first"),
    (lose, "0 messages are missing here, 1 are gone there, UID 2 first"),
]


@pytest.mark.parametrize(("differ", "words"), THERE, ids=lambda each: getattr(each, "__name__", None))
def test_a_legacy_server_that_does_not_agree_with_itself_is_not_believed(
    differ: Callable[[Side], None], words: str
) -> None:
    there = Side()
    differ(there)
    with pytest.raises(NotEqual) as error:
        compare(there, Side())
    assert words in error.value.message


def test_a_server_that_cannot_search_is_counted_by_what_it_announces() -> None:
    assert compare(Side(hidden_from_search={1, 2, 3, 4, 5}), Side()).folders


def test_what_came_after_the_last_pass_is_the_sweeps() -> None:
    there = Side()
    there.boxes["INBOX"].messages[6] = Seen(frozenset(), WHEN, 1)
    assert compare(there, Side()).folders
    there.boxes["INBOX"].messages[4] = Seen(frozenset(), WHEN, 1)  # below the noted UID it is not
    with pytest.raises(NotEqual, match="UID 4 first"):
        compare(there, Side())


def test_what_is_waived_need_not_be_here() -> None:
    there = Side()
    there.boxes["INBOX"].messages[3] = Seen(frozenset(), WHEN, 1)
    found = compare(there, Side(), last_pass(waived=frozenset({("INBOX", 7, 3)})))
    assert found.waived == ["INBOX: UID 3"]
    with pytest.raises(NotEqual):
        compare(there, Side(), last_pass(waived=frozenset({("INBOX", 8, 3)})))


def test_only_keywords_that_were_announced_may_be_missing() -> None:
    there, here = Side(), Side()
    there.boxes["INBOX"].messages[5] = Seen(frozenset({"\\Seen", "$Work", "a(b"}), WHEN + 5, 105)
    assert compare(there, here, last_pass(dropped={"INBOX": {"a(b": "is no keyword"}})).folders
    with pytest.raises(NotEqual, match="flags of UID 5"):
        compare(there, here, last_pass(dropped={"Sent": {"a(b": "is no keyword"}}))


def test_keywords_are_compared_without_case() -> None:
    here = Side()
    change(flags=frozenset({"\\Seen", "$WORK"}))(here)
    assert compare(Side(), here).folders


def test_a_date_that_no_file_can_have_is_noted() -> None:
    there = Side()
    change(internaldate=2**33)(there)
    assert compare(there, Side()).notes == ["INBOX: the date of UID 5 cannot be kept"]


def test_a_message_with_such_a_date_has_its_body_compared() -> None:
    there = Side()
    change(internaldate=-5)(there)
    assert compare(there, Side(), compared={"INBOX": 5, "Sent": 5}).bodies_compared == 1


def test_large_mailboxes_are_compared_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "GROUP", 3)
    asked: list[list[str]] = []

    class Grouped(Side):
        def changes(self, wanted: Iterable[tuple[str, Status | None]], *, sizes: bool = True) -> Iterator[Changes]:
            some = list(wanted)
            asked.append([name for name, _ in some])
            return super().changes(some, sizes=sizes)

    assert len(compare(Grouped(), Side()).folders) == 3
    assert asked == [["INBOX"], ["Sent", "Empty"]]


def test_a_folder_that_the_last_pass_did_not_see_is_found() -> None:
    there, here = Side(), Side()
    there.boxes["Late"] = Box({1: Seen(frozenset(), WHEN, 9)})
    with pytest.raises(NotEqual, match="the folder 'Late' of the legacy server is not here") as found:
        compare(there, here)
    assert found.value.folder == "Late"


def test_all_bodies_of_a_folder_that_are_not_served_as_they_came_in_are_named() -> None:
    here = Side(digest_of=lambda folder, uid: digest_of(folder, uid + (folder == "INBOX" and uid < 5)))
    with pytest.raises(NotServed) as found:
        compare(Side(), here, bodies="all")
    assert (found.value.folder, found.value.uidvalidity, found.value.uids) == ("INBOX", 7, (1, 2))


def test_a_size_that_is_not_true_has_the_body_compared() -> None:
    there, here = Side(), Side()
    change(size=9)(there)
    found = compare(there, here, compared={"INBOX": 5, "Sent": 5})
    assert found.odd_sizes == ["INBOX: UID 5 says 9 bytes and has 105"]
    assert found.bodies_compared == 1
    other_bytes(here)
    with pytest.raises(NotEqual, match="not served here as it came in"):
        compare(there, here, compared={"INBOX": 5, "Sent": 5})


def test_bodies_that_were_compared_before_the_hold_are_not_compared_again() -> None:
    assert compare(Side(), Side(), compared={"INBOX": 6, "Sent": 5}).bodies_compared == 0


def test_a_special_use_that_is_not_shown_is_noted() -> None:
    assert compare(Side(), Side(uses={})).notes == ["Sent is not shown as \\Sent here"]


def test_folders_of_other_namespaces_are_the_operators() -> None:
    here = Side(namespaces=("Public/",))
    here.boxes["Public/news"] = Box({1: Seen(frozenset(), WHEN, 1)})
    assert compare(Side(), here).folders
    here.boxes["Publicity"] = Box({1: Seen(frozenset(), WHEN, 1)})
    with pytest.raises(NotEqual, match="'Publicity'"):
        compare(Side(), here)


def test_empty_folders_of_the_operators_do_no_harm() -> None:
    here = Side()
    here.boxes["Drafts"] = Box()
    assert compare(Side(), here).folders


def test_without_sizes_nothing_is_odd() -> None:
    there = Side()
    change(size=9)(there)
    assert compare(there, Side(), sizes=False).odd_sizes == []


# What is left out -----------------------------------------------------------------------------


def sides(*more: str) -> tuple[Side, Side]:
    """Both sides, the legacy one with these folders, too."""
    there = Side()
    for name in more:
        there.boxes[name] = Box({9: Seen(frozenset(), WHEN, 1)})
    return there, Side()


LEAVES_JUNK_OUT = FolderRule("name", "Junk")


@pytest.mark.parametrize(
    ("folder", "rules"),
    [
        ("Junk", [LEAVES_JUNK_OUT]),
        ("Public/a/b", [FolderRule("pattern", "Public/*")]),
        ("Gel&APY-scht", [FolderRule("name", "Gelo\u0308scht")]),
        ("Gel\udcf6scht", [FolderRule("name", "Gel\u00f6scht")]),
        ("Public/a", [FolderRule("pattern", "*", "copy"), FolderRule("pattern", "Public/*")]),
    ],
)
def test_what_a_rule_leaves_out_is_not_missing(folder: str, rules: list[FolderRule]) -> None:
    found = compare(*sides(folder), last_pass(left_out={folder: "a rule"}), rules=rules)
    assert found.folder_rules == [rule.as_json() for rule in rules]
    assert [FolderRule(**each) for each in found.folder_rules] == rules  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("left_out", "rules"),
    [
        ({}, []),  # the copy forgot it
        ({}, [LEAVES_JUNK_OUT]),  # and did not name it
        ({"Junk": "why not"}, []),  # and made up a rule
        ({"Junk": "a rule"}, [FolderRule("name", "junk")]),
        ({"Junk": "a rule"}, [FolderRule("pattern", "Junk/*")]),
        ({"Junk": "a rule"}, [FolderRule("special-use", "\\Junk")]),  # the server does not say so
        ({"Junk": "a rule"}, [FolderRule("pattern", "J*"), FolderRule("name", "Junk", "copy")]),
        ({"Junk": "a rule"}, [FolderRule("pattern", "J*"), FolderRule("pattern", "Ju*", "copy")]),
        ({"Junk": "a rule"}, [FolderRule("exchange-items")]),
    ],
)
def test_a_folder_that_no_rule_leaves_out_is_missing(left_out: dict[str, str], rules: list[FolderRule]) -> None:
    with pytest.raises(NotEqual, match="'Junk' of the legacy server is not here, and no rule leaves it out"):
        compare(*sides("Junk"), last_pass(left_out=left_out), rules=rules)


def test_a_folder_that_was_waived_may_be_left_out_too() -> None:
    done = last_pass(left_out={"Junk": "a rule"}, waived_folders=frozenset({"Junk"}))
    compare(*sides("Junk"), done, rules=[LEAVES_JUNK_OUT])


def test_a_special_use_is_asked_for_where_list_alone_does_not_show_it() -> None:
    there, here = sides("Spam")
    there.uses |= {"Spam": frozenset({"\\junk"})}
    compare(there, here, last_pass(left_out={"Spam": "a rule"}), rules=[FolderRule("special-use", "\\Junk")])


def test_what_others_share_and_what_has_no_messages_is_not_missing() -> None:
    there, here = sides("Public/a")
    there.namespaces = ("Public/",)
    there.boxes["top"] = Box()
    there.noselect = {"top"}
    compare(there, here)


def test_what_is_left_out_and_here_all_the_same_is_found() -> None:
    with pytest.raises(NotEqual, match="'Sent' is here, though a rule leaves it out"):
        compare(Side(), Side(), last_pass(left_out={"Sent": "a rule"}), rules=[FolderRule("name", "Sent")])


@pytest.mark.parametrize(
    ("name", "is_meant"), [("Kalender", True), ("Kalender/Urlaub", True), ("Work/Kalender", False)]
)
def test_exchanges_items_are_meant_only_where_it_is_one(name: str, is_meant: bool) -> None:
    there, here = sides(name)
    done, rules = last_pass(left_out={name: "a rule"}), [FolderRule("exchange-items")]
    with pytest.raises(NotEqual):
        compare(there, here, done, rules=rules)
    there.profile = replace(profiles.UNKNOWN, name="Exchange")
    if is_meant:
        compare(there, here, done, rules=rules)
        return
    with pytest.raises(NotEqual):
        compare(there, here, done, rules=rules)


def test_a_view_is_meant_only_at_gmail_and_where_all_comes() -> None:
    there, here = sides("Starred")
    there.attributes = {"Starred": frozenset({"\\flagged"}), "Sent": frozenset({"\\all"})}
    done = last_pass(left_out={"Starred": "built in"})
    with pytest.raises(NotEqual):
        compare(there, here, done)
    there.ids = {}
    compare(there, here, done)
    with pytest.raises(NotEqual):
        compare(there, here, done, rules=[FolderRule("special-use", "\\Flagged", "copy")])
    del there.attributes["Sent"]
    with pytest.raises(NotEqual):
        compare(there, here, done)


def test_of_a_folder_that_comes_once_only_what_is_nowhere_else_is_expected() -> None:
    there, here = Side(), Side()
    # UID 5 of INBOX is UID 3 of Sent, which is All Mail here.
    there.ids = {"INBOX": {1: b"11", 2: b"12", 5: b"15"}, "Sent": {3: b"15", 4: b"44"}}
    done = last_pass(once="Sent")
    with pytest.raises(NotEqual, match="1 are gone there"):
        compare(there, here, done)
    del here.boxes["Sent"].messages[3]
    assert compare(there, here, done).once == "Sent"
    there.ids["INBOX"].pop(5)  # it was taken out of INBOX
    with pytest.raises(NotEqual, match="1 messages are missing here"):
        compare(there, here, done)
    there.ids["INBOX"][5] = b"44"  # and the other one put there
    with pytest.raises(NotEqual, match="1 messages are missing here, 1 are gone there"):
        compare(there, here, done)
