"""Where each legacy folder is here."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from imapclient import imap_utf7

from bascule.imap.names import place_of, places, readable

SLASH = ("/", "")
DOT = (".", "INBOX.")


def names_here(names: list[str], separator: str, prefix: str, delimiter: str | None = None) -> dict[str, str]:
    found = places(((name, separator if delimiter is None else delimiter) for name in names), separator, prefix)
    return {name: place.name(separator, prefix) for name, place in found.items()}


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("INBOX", SLASH),
        ("Archive/2019", SLASH),
        ("INBOX/child", SLASH),
        ("INBOX/Inbox", SLASH),
        ("v1.2", SLASH),
        ("&AMk-t&AOk-", SLASH),
        ("R&-D", SLASH),
        (" lead", SLASH),
        ("trail ", SLASH),
        (".dot", SLASH),
        ("a~b", SLASH),
        ("a/~b", SLASH),
        ('quo"te', SLASH),
        ("back\\slash", SLASH),
        ("100%", SLASH),
        ("INBOX.Sent", DOT),
        ("INBOX.INBOX.Sent", DOT),
        ("INBOX.inbox.x", DOT),
        ("current", SLASH),
    ],
)
def test_a_name_that_dovecot_can_open_is_kept(name: str, layout: tuple[str, str]) -> None:
    assert names_here([name], *layout) == {name: name}
    assert not places([(name, layout[0])], *layout)[name].is_renamed


@pytest.mark.parametrize(
    ("name", "layout", "here"),
    [
        ("R&D", SLASH, "R&-D"),
        ("R&D/plans", SLASH, "R&-D/plans"),
        ("&AGEAYg-", SLASH, "ab"),  # ASCII in base64
        ("&AOQ", SLASH, "&-AOQ"),  # a shift that does not end
        ("Entwürfe", SLASH, "Entw&APw-rfe"),  # UTF-8 as it is
        (b"Entw\xfcrfe".decode("utf-8", "surrogateescape"), SLASH, "Entw&APw-rfe"),  # Latin-1
        ("x\ty", SLASH, "x_y"),
        ("&AAk-", SLASH, "_"),  # a tab in base64
        ("~root", SLASH, "_~root"),
        ("inbox/x", SLASH, "INBOX/x"),
        ("Inbox/x", SLASH, "INBOX/x"),
        ("cur", SLASH, "cur_"),
        ("a/tmp", SLASH, "a/tmp_"),
        ("..", SLASH, ".._"),
        ("a//b", SLASH, "a/_/b"),
        ("a/", SLASH, "a/_"),
        ("subscriptions", SLASH, "_subscriptions"),
        ("a/dovecot.index", SLASH, "a/_dovecot.index"),
        ("Dovecot-uidlist", SLASH, "_Dovecot-uidlist"),
        (".bascule-passed.json", SLASH, "_.bascule-passed.json"),
        ("INBOX.INBOX", DOT, "INBOX.INBOX_"),
        ("INBOX.Inbox", DOT, "INBOX.Inbox_"),
        ("a/dbox-Mails", SLASH, "a/dbox-Mails_"),
        ("INBOX.a/b", DOT, "INBOX.a_b"),
        ("Inbox.Drafts", DOT, "INBOX.Drafts"),
        ("Other", DOT, "INBOX.Other"),
    ],
)
def test_a_name_that_dovecot_cannot_open_becomes_the_nearest(name: str, layout: tuple[str, str], here: str) -> None:
    assert names_here([name], *layout) == {name: here}
    assert places([(name, layout[0])], *layout)[name].is_renamed


def test_two_folders_never_share_a_place_and_who_can_keep_the_name_does() -> None:
    assert names_here(["Sent", "INBOX.Sent", "Inbox.Sent"], *DOT) == {
        "INBOX.Sent": "INBOX.Sent",
        "Inbox.Sent": "INBOX.Sent-2",
        "Sent": "INBOX.Sent-3",
    }


def test_a_name_without_a_delimiter_is_flat() -> None:
    assert names_here(["a/b"], "/", "", delimiter="") == {"a/b": "a_b"}
    assert names_here(["a.b"], "/", "", delimiter="") == {"a.b": "a.b"}


def test_a_folder_with_another_delimiter_has_the_mailboxs_here() -> None:
    assert names_here(["a.b"], "/", "", delimiter=".") == {"a.b": "a/b"}


def test_a_subscription_without_a_folder_has_a_place() -> None:
    assert place_of("gone", {}, "/", "/", "").parts == ("gone",)


def test_long_names_are_cut_and_stay_apart() -> None:
    found = names_here(["x" * 300 + "1", "x" * 300 + "2", "/".join(["deep" * 20] * 40)], *SLASH)
    assert len(set(found.values())) == 3
    assert all(len(part) <= 255 for name in found.values() for part in name.split("/"))
    assert all(len(name) < 1000 for name in found.values())


def test_names_are_readable() -> None:
    assert readable("&ZeVnLIqe-") == "日本語"
    assert readable("a&b") == "a&b"


PARTS = st.one_of(
    st.text(max_size=5),
    st.sampled_from(
        ["INBOX", "inbox", "cur", "new", "..", "~", "", "&", "&-", "dovecot", "a/b", "a.b", "\x7f", "&AGE-"]
    ),
)


@given(
    st.sets(st.lists(PARTS, min_size=1, max_size=3).map(tuple), min_size=1, max_size=6),
    st.sampled_from([SLASH, DOT, ("/", "INBOX/"), (".", "")]),
)
def test_any_names_have_places_that_dovecot_opens(paths: set[tuple[str, ...]], layout: tuple[str, str]) -> None:
    separator, prefix = layout
    names = {prefix + separator.join(path) for path in paths} | {"INBOX"}
    found = places(((name, separator) for name in names), separator, prefix)
    assert found.keys() == names
    parts = [place.parts for name, place in found.items() if name.upper() != "INBOX"]
    assert len(set(parts)) == len(parts), "two folders at one place"
    assert found["INBOX"].parts == ()
    for path in parts:
        assert path
        assert not (len(path) == 1 and path[0] == "INBOX")
        assert path[0] == "INBOX" or prefix or path[0].upper() != "INBOX"
        assert not path[0].startswith("~")
        for part in path:
            assert part not in {"", ".", "..", "cur", "new", "tmp"}
            assert not set(part) & {"/", separator, "\n", "\0"}
            assert imap_utf7.encode(imap_utf7.decode(part.encode())) == part.encode()


@given(st.permutations(["Sent", "INBOX.Sent", "Inbox.Sent", "INBOX.R&D", "INBOX.R&-D", "INBOX.INBOX", "INBOX.INBOX_"]))
def test_places_do_not_depend_on_the_order(names: list[str]) -> None:
    assert names_here(names, *DOT) == names_here(sorted(names), *DOT)
    assert all(a != b for a, b in itertools.pairwise(sorted(names_here(names, *DOT).values())))
