"""Which folders come along: one rule decides each, and the verification, which reads the rules by itself, agrees."""

from __future__ import annotations

from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from imapclient import imap_utf7

from bascule.imap import folder_names, names, profiles
from bascule.imap.folder_rules import Arranged, FolderRule, FolderRules, Traits
from bascule.imap.reader import SPECIAL_USES, Layout, ListedFolder, Reader
from bascule.migrator import verification
from bascule.migrator.copying import FolderState, Pass

GMAIL, EXCHANGE, ANY = Traits(has_message_ids=True), Traits(is_exchange=True), Traits()


def wire(name: str) -> str:
    encoded: bytes = imap_utf7.encode(name)
    return encoded.decode()


def layout(*folders: str | tuple[str, str], separator: str = "/", prefix: str = "") -> Layout:
    """Folders by name, some with attributes."""
    found = []
    for each in folders:
        name, attributes = (each, "") if isinstance(each, str) else each
        said = frozenset(attributes.lower().split())
        uses = [use for use in sorted(SPECIAL_USES) if use.lower() in said]
        found.append(ListedFolder(wire(name), "\\noselect" not in said, uses[0] if uses else "", separator, said))
    return Layout(separator, prefix, tuple(found), ())


def arranged(rules: list[FolderRule], there: Layout, traits: Traits = ANY) -> Arranged:
    return FolderRules(rules).arrange(there, traits)


def coming(found: Arranged) -> list[str]:
    return [names.readable(folder.name) for folder in found.layout.folders]


def uses(found: Arranged) -> dict[str, str]:
    return {names.readable(each.name): each.special_use for each in found.layout.folders if each.special_use}


def test_without_rules_everything_comes_as_it_is() -> None:
    there = layout(
        "INBOX", ("Sent", "\\Sent"), ("All", "\\All"), ("Starred", "\\Flagged"), "Calendar", "Contacts", "Tasks"
    )
    for traits in (ANY, EXCHANGE):
        found = arranged([], there, traits)
        assert (found.layout, found.left_out, found.renamed, found.once) == (there, {}, {}, "")


@pytest.mark.parametrize(
    ("rule", "left"),
    [
        (FolderRule("name", "Old"), ["Old"]),
        (FolderRule("name", "Gr\u00f6\u00dfe"), ["Größe"]),
        (FolderRule("name", "Gro\u0308\u00dfe"), ["Größe"]),  # the same letters, composed otherwise
        (FolderRule("name", "old"), []),
        (FolderRule("pattern", "Public/*"), ["Public/A", "Public/A/B"]),
        (FolderRule("pattern", "*/A"), ["Public/A"]),
        (FolderRule("pattern", "*"), ["Old", "Größe", "Public", "Public/A", "Public/A/B", "Junk"]),
        (FolderRule("pattern", "Pub.ic/*"), []),
        (FolderRule("pattern", "P*/A*B"), ["Public/A/B"]),
        (FolderRule("special-use", "\\Junk"), ["Junk"]),
        (FolderRule("special-use", "\\Trash"), []),
    ],
)
def test_what_is_left_out(rule: FolderRule, left: list[str]) -> None:
    there = layout("INBOX", "Old", "Gr\u00f6\u00dfe", "Public", "Public/A", "Public/A/B", ("Junk", "\\Junk"))
    found = arranged([rule], there)
    assert [names.readable(name) for name in found.left_out] == left
    assert coming(found) == [names.readable(each.name) for each in there.folders if each.name not in found.left_out]
    assert all(reason == str(rule) for reason in found.left_out.values())
    assert found.unused == (() if left else (rule,))


def test_inbox_always_comes() -> None:
    there = layout(("INBOX", "\\Junk \\Inbox"), "A")
    for rule in (FolderRule("pattern", "*"), FolderRule("pattern", "INB*"), FolderRule("special-use", "\\Junk")):
        assert "INBOX" in coming(arranged([rule], there))


def test_the_most_particular_rule_decides_whatever_the_order() -> None:
    rules = [
        FolderRule("pattern", "*"),
        FolderRule("special-use", "\\Sent", "copy", "By use"),
        FolderRule("pattern", "Public/Te*", "copy"),
        FolderRule("name", "Public/Test/old"),
        FolderRule("pattern", "Public/*"),
    ]
    there = layout("INBOX", "Public/Test", "Public/Test/old", "Public/x", ("Sent", "\\Sent"), "z")
    for order in (rules, rules[::-1]):
        found = arranged(order, there)
        assert coming(found) == ["INBOX", "Public/Test"]
        assert found.left_out["Public/Test/old"] == "the rule for the name 'Public/Test/old'"
        assert found.left_out["Public/x"] == "the rule for the pattern 'Public/*'"


def test_what_has_no_messages_needs_no_name() -> None:
    found = arranged([FolderRule("pattern", "Public*")], layout("INBOX", ("Public", "\\Noselect"), "Public/A"))
    assert (coming(found), set(found.left_out)) == (["INBOX"], {"Public/A"})


@pytest.mark.parametrize(
    ("rule", "places"),
    [
        (FolderRule("name", "Sent Items", "copy", "Sent"), {"Sent Items": "Sent"}),
        (FolderRule("name", "Sent Items", "copy", "Gesendet/Alt"), {"Sent Items": "Gesendet/Alt"}),
        (FolderRule("name", "Sent Items", "copy", "Drafts"), {"Sent Items": "Drafts-2"}),
        (FolderRule("name", "Sent Items", "copy", "Éléments envoyés"), {"Sent Items": "Éléments envoyés"}),
        (FolderRule("pattern", "Public/*", "copy", "Old/*!"), {"Public/A": "Old/A!", "Public/A/B": "Old/A/B!"}),
        (FolderRule("special-use", "\\Trash", "copy", "Bin"), {"Deleted": "Bin"}),
    ],
)
def test_what_is_called_otherwise(rule: FolderRule, places: dict[str, str]) -> None:
    there = layout("INBOX", "Drafts", "Sent Items", "Public/A", "Public/A/B", ("Deleted", "\\Trash"))
    found = arranged([rule], there)
    kept = names.of_layout(found.layout, found.renamed)
    here = {names.readable(name): names.readable(place.name("/", "")) for name, place in kept.items()}
    assert {name: other for name, other in here.items() if name != other} == places
    assert len(set(here.values())) == len(here)
    assert found.in_words(kept) == [
        f"the folder {name!r} is kept as {other!r}, as a rule says" for name, other in places.items()
    ]


def test_names_below_a_prefix_may_be_written_with_it_or_without() -> None:
    there = layout("INBOX", "INBOX.Sent Items", separator=".", prefix="INBOX.")
    for other in ("INBOX.Sent", "Sent"):
        found = arranged([FolderRule("name", "INBOX.Sent Items", "copy", other)], there)
        place = names.of_layout(found.layout, found.renamed)["INBOX.Sent Items"]
        assert (place.parts, place.name(".", "INBOX.")) == (("Sent",), "INBOX.Sent")


def test_a_special_use_goes_from_one_folder_to_another() -> None:
    there = layout("INBOX", ("Sent", "\\Sent"), "Sent Items")
    found = arranged([FolderRule("name", "Sent Items", "copy", "", "\\Sent")], there)
    assert uses(found) == {"Sent Items": "\\Sent"}
    assert sorted(found.notes) == [
        "the folder 'Sent Items' is shown as \\Sent here, as a rule says",
        "the folder 'Sent' is not shown as \\Sent here, for a rule gives it to another",
    ]


# By names that are common -------------------------------------------------------------------

COMMON = FolderRule("common-names", action="copy")


@pytest.mark.parametrize(
    ("folders", "found"),
    [
        (["Gesendete Objekte", "Gelöschte Objekte", "Entwürfe", "Junk-E-Mail", "Archiv"],
         ["\\Sent", "\\Trash", "\\Drafts", "\\Junk", "\\Archive"]),
        (["Éléments envoyés", "Éléments supprimés", "Brouillons", "Courrier indésirable", "Archive"],
         ["\\Sent", "\\Trash", "\\Drafts", "\\Junk", "\\Archive"]),
        (["SENT ITEMS", "Deleted Items", "drafts", "Junk E-mail"], ["\\Sent", "\\Trash", "\\Drafts", "\\Junk"]),
        (["العناصر المرسلة"], ["\\Sent"]),
        (["Projects", "Sent to Alice"], []),
    ],
)  # fmt: skip
def test_common_names_say_a_special_use(folders: list[str], found: list[str]) -> None:
    for prefix, separator in (("", "/"), ("INBOX.", ".")):
        there = layout("INBOX", *(prefix + name for name in folders), separator=separator, prefix=prefix)
        seen = arranged([COMMON], there)
        assert uses(seen) == {prefix + name: use for name, use in zip(folders, found, strict=False)}
        assert seen.renamed == {}
        assert uses(arranged([], there)) == {}


def test_where_two_have_such_a_name_or_the_server_says_a_use_nothing_is_guessed() -> None:
    found = arranged([COMMON], layout("INBOX", "Sent", "Sent Items", "Trash"))
    assert uses(found) == {"Trash": "\\Trash"}
    assert "none of 'Sent', 'Sent Items' is shown as \\Sent: each has a name of such a folder" in found.notes
    assert uses(arranged([COMMON], layout("INBOX", "Sent", ("Bin", "\\Trash")))) == {"Bin": "\\Trash"}
    assert uses(arranged([COMMON], layout("INBOX", "Work/Sent", "Inbox/Trash"))) == {}


def test_a_rule_for_a_name_goes_before_common_names() -> None:
    rules = [COMMON, FolderRule("name", "Outbox", "copy", "", "\\Sent"), FolderRule("name", "Trash")]
    assert uses(arranged(rules, layout("INBOX", "Sent", "Outbox", "Trash", "Papierkorb"))) == {
        "Outbox": "\\Sent",
        "Papierkorb": "\\Trash",
    }


def test_no_common_name_says_two_uses() -> None:
    every = [name for common in folder_names.SPECIAL_USES.values() for name in common]
    assert len(every) == len(set(every))
    items = {name for language in folder_names.EXCHANGE_ITEMS.values() for name in language}
    assert items.isdisjoint(every)
    assert all(name == name.lower() for name in (*every, *items))


# Exchange -----------------------------------------------------------------------------------

ITEMS = FolderRule("exchange-items")


@pytest.mark.parametrize("language", sorted(folder_names.EXCHANGE_ITEMS))
def test_what_exchange_lists_and_is_no_mail(language: str) -> None:
    items = [name.capitalize() for name in sorted(folder_names.EXCHANGE_ITEMS[language])]
    there = layout("INBOX", *items, f"{items[0]}/Birthdays", "Work", f"Work/{items[0]}")
    found = arranged([ITEMS], there, EXCHANGE)
    assert [names.readable(name) for name in found.left_out] == [*items, f"{items[0]}/Birthdays"]
    assert arranged([ITEMS], there, ANY).left_out == {}
    assert arranged([], there, EXCHANGE).left_out == {}


def test_a_folder_of_somebodys_is_not_taken_for_exchanges() -> None:
    there = layout("INBOX", "Calendar", "Contacts", "Tasks", "Notes", "Agenda", "Diario", "Notas")
    assert set(arranged([ITEMS], there, EXCHANGE).left_out) == {"Calendar", "Contacts", "Tasks", "Notes"}
    assert arranged([ITEMS], layout("INBOX", "Notes", "Journal"), EXCHANGE).left_out == {}
    kept = arranged([ITEMS, FolderRule("name", "Notes", "copy")], there, EXCHANGE)
    assert "Notes" not in kept.left_out


# Gmail --------------------------------------------------------------------------------------

AT_GMAIL = layout(
    "INBOX",
    ("[Gmail]", "\\Noselect"),
    ("[Gmail]/All Mail", "\\All"),
    ("[Gmail]/Starred", "\\Flagged"),
    ("[Gmail]/Important", "\\Important"),
    ("[Gmail]/Sent Mail", "\\Sent"),
)
ALL, STARRED, IMPORTANT = "[Gmail]/All Mail", "[Gmail]/Starred", "[Gmail]/Important"


def test_gmail_shows_a_message_once() -> None:
    found = arranged([], AT_GMAIL, GMAIL)
    assert (found.once, found.renamed) == (ALL, {ALL: "Archive"})
    assert set(found.left_out) == {STARRED, IMPORTANT}
    assert uses(found) == {ALL: "\\Archive", "[Gmail]/Sent Mail": "\\Sent"}
    assert arranged([], AT_GMAIL, ANY).left_out == {}


@pytest.mark.parametrize(
    ("rule", "once", "left"),
    [
        (FolderRule("special-use", "\\All", "copy"), "", {STARRED, IMPORTANT}),
        (FolderRule("name", ALL, "once"), ALL, {STARRED, IMPORTANT}),
        # What is in no other folder would be nowhere: the views come along.
        (FolderRule("special-use", "\\All"), "", {ALL}),
        (FolderRule("special-use", "\\Flagged", "copy"), ALL, {IMPORTANT}),
        (FolderRule("pattern", "*/Imp*", "copy"), ALL, {STARRED}),
    ],
)
def test_a_rule_goes_before_what_is_built_in(rule: FolderRule, once: str, left: set[str]) -> None:
    found = arranged([rule], AT_GMAIL, GMAIL)
    assert (found.once, set(found.left_out)) == (once, left)


def test_elsewhere_once_cannot_be_had_and_is_named() -> None:
    found = arranged([FolderRule("special-use", "\\All", "once", "Archive")], AT_GMAIL, ANY)
    assert (found.once, found.left_out) == ("", {})
    assert any("comes along whole, though the rule says once" in each for each in found.notes)


# Read twice ---------------------------------------------------------------------------------

ALPHABET = "aA*/.é"
NAMES = st.text(ALPHABET.replace("*", ""), min_size=1, max_size=5)
ATTRIBUTES = st.sampled_from(["", "\\Junk", "\\All", "\\Flagged", "\\Important", "\\Sent"])
RULES = st.lists(
    st.one_of(
        st.builds(FolderRule, st.just("name"), NAMES, st.sampled_from(["leave-out", "copy"])),
        st.builds(
            FolderRule,
            st.just("pattern"),
            st.text(ALPHABET, min_size=1, max_size=5),
            st.sampled_from(["leave-out", "copy"]),
        ),
        st.builds(
            FolderRule,
            st.just("special-use"),
            st.sampled_from(["\\Junk", "\\All", "\\Flagged"]),
            st.sampled_from(["leave-out", "copy"]),
        ),
    ),
    max_size=5,
    unique_by=lambda rule: (rule.kind, rule.folder),
)


class Told:
    """A reader of which only this is asked."""

    profile = profiles.UNKNOWN

    def __init__(self, *, is_gmail: bool) -> None:
        self._is_gmail = is_gmail

    def announces(self, _: str) -> bool:
        return self._is_gmail


@given(st.dictionaries(NAMES, ATTRIBUTES, max_size=6), RULES, st.booleans())
def test_the_verification_reads_the_rules_as_the_copy_does(
    folders: dict[str, str], rules: list[FolderRule], is_gmail: bool
) -> None:
    there = layout("INBOX", *folders.items())
    found = arranged(rules, there, Traits(has_message_ids=is_gmail))
    states = [FolderState(folder.name, 7, 1, 0, 1) for folder in found.layout.folders]
    done = Pass(found.layout, names.of_layout(found.layout, found.renamed), folders=states, left_out=found.left_out)
    attributes = {folder.name: folder.attributes for folder in there.folders}
    for folder in there.folders:
        # Of patterns as long as each other either may decide.
        meant = verification._is_meant(folder.name, attributes, done, rules, cast(Reader, Told(is_gmail=is_gmail)))
        fitting = {len(rule.folder) for rule in rules if rule.kind == "pattern"}
        if len(fitting) == sum(rule.kind == "pattern" for rule in rules):
            assert meant == (folder.name in found.left_out)


@given(st.text(ALPHABET, max_size=8), st.text(ALPHABET, min_size=1, max_size=6))
def test_patterns_are_read_alike(text: str, pattern: str) -> None:
    found = arranged([FolderRule("pattern", pattern)], layout("INBOX", "x" + text))
    if "*" in pattern:
        assert bool(found.left_out) == verification._fits("x" + text, pattern)
