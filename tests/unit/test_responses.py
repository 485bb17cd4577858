"""What servers say, in the forms that are legal and in those that were seen."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bascule.imap import responses
from bascule.imap.profiles import recognise, throttled
from bascule.imap.responses import Date, Fetched, Listed, Malformed, Namespaces

# Numbers ------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "value"), [(b"0", 0), (b"7", 7), (b"4294967295", 2**32 - 1), (b"007", 7)])
def test_numbers(text: bytes, value: int) -> None:
    assert responses.number(text) == value


@pytest.mark.parametrize(
    "text", [b"", b"-1", b"+1", b"1_0", b" 1", b"4294967296", b"NIL", b"1.0", b"9" * 5000, "\u00b2", "\u0661"]
)
def test_what_is_no_number(text: bytes | str) -> None:
    with pytest.raises(Malformed):
        responses.number(text)


@pytest.mark.parametrize(
    ("text", "found"),
    [(b"1", [(1, 1)]), (b"1,4:6", [(1, 1), (4, 6)]), (b"6:4", [(4, 6)])],
)
def test_sequence_sets(text: bytes, found: list[tuple[int, int]]) -> None:
    assert responses.ranges(text) == found


@pytest.mark.parametrize("text", [b"", b"0", b"1,", b"*", b"1:*", b"a", b"1:2:3", b"1," * 1_000_000 + b"1"])
def test_what_is_no_sequence_set(text: bytes) -> None:
    with pytest.raises(Malformed):
        responses.ranges(text)


@pytest.mark.parametrize(
    ("text", "uids"),
    [
        (b"SEARCH", []),
        (b"SEARCH 3 1", [3, 1]),
        (b"SEARCH 3 (MODSEQ 917)", [3]),
        (b'ESEARCH (TAG "p1") UID ALL 1:3,9', [1, 2, 3, 9]),
        (b'ESEARCH (TAG "p1") UID', []),
    ],
)
def test_what_was_searched(text: bytes, uids: list[int]) -> None:
    assert [uid for first, last in responses.searched(text) for uid in range(first, last + 1)] == uids


# Messages -----------------------------------------------------------------------------

ODD = b'a]b {5} %* "two words" \xdf \x04'

FETCHES: list[tuple[bytes, dict[bytes, bytes | None]]] = [
    (b"()", {}),
    (b"(UID 5 FLAGS ())", {b"UID": b"5", b"FLAGS": b""}),
    (b"(uid 5 rfc822.size 0)", {b"UID": b"5", b"RFC822.SIZE": b"0"}),
    (b"(FLAGS (\\Seen UID 7) UID 5)", {b"FLAGS": b"\\Seen UID 7", b"UID": b"5"}),
    (b"(FLAGS (\\Seen roof(south) UID 5)", {b"FLAGS": b"\\Seen roof(south", b"UID": b"5"}),
    (b"(FLAGS (\\Seen left)right) UID 5)", {b"FLAGS": b"\\Seen left)right", b"UID": b"5"}),
    (b"(UID 5 FLAGS (a (b) c))", {b"UID": b"5", b"FLAGS": b"a (b) c"}),
    (b"(UID 5 FLAGS (a) b))", {b"UID": b"5", b"FLAGS": b"a) b"}),
    (
        b'(UID 5 FLAGS (a]b {5} %* "two words" \xdf \x04))',
        {b"UID": b"5", b"FLAGS": b'a]b {5} %* "two words" \xdf \x04'},
    ),
    (b'(INTERNALDATE "1-Jan-2001 (x)" UID 5)', {b"INTERNALDATE": b"1-Jan-2001 (x)", b"UID": b"5"}),
    (b"(INTERNALDATE NIL RFC822.SIZE nil UID 5)", {b"INTERNALDATE": None, b"RFC822.SIZE": None, b"UID": b"5"}),
    (b'(BODY[] "a\\"b\\\\" UID 5)', {b"BODY[]": b'a"b\\', b"UID": b"5"}),
    (b'(UID 5 MODSEQ (90) X (a (b) ")"))', {b"UID": b"5", b"MODSEQ": b"90", b"X": b'a (b) ")"'}),
    (b"(BODY[]<0> NIL UID 5) ", {b"BODY[]<0>": None, b"UID": b"5"}),
    (b'(BODY[HEADER.FIELDS ("DATE")] "x" UID 5)', {b'BODY[HEADER.FIELDS ("DATE")]': b"x", b"UID": b"5"}),
]


@pytest.mark.parametrize(("items", "found"), FETCHES)
def test_messages(items: bytes, found: dict[bytes, bytes | None]) -> None:
    assert responses.fetched(b"3 FETCH " + items) == Fetched(3, found)
    assert responses.fetched(b"3 fetch " + items) == Fetched(3, found)


@pytest.mark.parametrize(
    "text",
    [
        b"3 FETCH (UID 5 FLAGS (",
        b"3 FETCH (UID 5",
        b"3 FETCH UID 5",
        b"3 FETCH (UID 5)x",
        b"3 FETCH (UID 5) (FLAGS ())",
        b"3 FETCH (UID)",
        b'3 FETCH (UID 5 INTERNALDATE "x)',
        b"3 FETCH (UID 5 BODY[] {3})",  # a literal that was none
        b"0 FETCH (UID 5)",
        b"99999999999 FETCH (UID 5)",
        b"x FETCH (UID 5)",
        b"3 FETCH (X (((((((((((((((((((((((((((((((((((a",
    ],
)
def test_what_is_no_message(text: bytes) -> None:
    with pytest.raises(Malformed):
        responses.fetched(text)


@pytest.mark.parametrize("text", [b"3 EXISTS", b"OK FETCH", b"SEARCH 1", b"LIST () NIL FETCH", b"", b"FETCH"])
def test_other_responses_are_no_messages(text: bytes) -> None:
    assert responses.fetched(text) is None


def test_literals_are_found_by_their_place() -> None:
    text = b"3 FETCH (FLAGS ({1}) BODY[] {1} UID 5)"
    place = text.index(b"{1} UID")
    assert responses.fetched(text, {place: b"x"}) == Fetched(3, {b"FLAGS": b"{1}", b"BODY[]": b"x", b"UID": b"5"})


@pytest.mark.parametrize("rest", [b"abc)", b"", b"abc", b" ", b" UID 5", b" UID 5)x", b")x", b" X", b"))"])
def test_what_follows_a_literal_must_be_right(rest: bytes) -> None:
    text = b"3 FETCH (UID 5 BODY[] {3}"
    with pytest.raises(Malformed):
        responses.fetched(text + rest, {text.index(b"{"): b"abc"})


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (b"1 FETCH (UID 1 BODY[] {12}", (22, 12, True)),
        (b"1 FETCH (BODY[]<0> ~{12}", (19, 12, True)),
        (b"1 FETCH (BODY[TEXT] {12}", (20, 12, False)),
        (b'LIST () "/" {4}', (12, 4, False)),
        (b"x {4+}", (2, 4, False)),
    ],
)
def test_literals_are_announced(line: bytes, found: tuple[int, int, bool]) -> None:
    literal = responses.announced(line)
    assert literal is not None
    assert (literal.place, literal.size, literal.is_body) == found


@pytest.mark.parametrize("line", [b"", b"{}", b"{a}", b"{4} ", b"{-4}", b"a}"])
def test_what_announces_no_literal(line: bytes) -> None:
    assert responses.announced(line) is None


def test_a_literal_longer_than_any_number_is_refused() -> None:
    with pytest.raises(Malformed):
        responses.announced(b"{%s}" % (b"9" * 5000))


@pytest.mark.parametrize(
    ("value", "found"),
    [(b"5", 5), (b"0", None), (b"4294967296", None), (b"x", None), (None, None), (b"9" * 5000, None)],
)
def test_uids_are_within_their_bounds(value: bytes | None, found: int | None) -> None:
    assert Fetched(1, {b"UID": value}).number(b"UID") == found


# Folders ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (b'(\\HasChildren \\Sent) "/" INBOX', Listed(frozenset({"\\haschildren", "\\sent"}), b"/", b"INBOX")),
        (b'() "." "a \\"b\\" \\\\c"', Listed(frozenset(), b".", b'a "b" \\c')),
        (b'() NIL "NIL"', Listed(frozenset(), b"", b"NIL")),
        (b"() nil NIL", Listed(frozenset(), b"", b"NIL")),
        (b'() "\\\\" a\\b', Listed(frozenset(), b"\\", b"a\\b")),
        (b'() "" x', Listed(frozenset(), b"", b"x")),
        (b'() "/" Boats 1 (old)', Listed(frozenset(), b"/", b"Boats 1 (old)")),
        (b'() "/" "Boats" ("CHILDINFO" ("SUBSCRIBED"))', Listed(frozenset(), b"/", b"Boats")),
        (b'() "/" Boats ("CHILDINFO" ("SUBSCRIBED"))', Listed(frozenset(), b"/", b"Boats")),
        (b'() "/" "a"b"', Listed(frozenset(), b"/", b'a"b')),
        (b'() "/" Gr\xfc\xdfe', Listed(frozenset(), b"/", b"Gr\xfc\xdfe")),
        (b'() "/" ""', Listed(frozenset(), b"/", b"")),
        (b"() / a", Listed(frozenset(), b"/", b"a")),
    ],
)
def test_listed_folders(text: bytes, found: Listed) -> None:
    assert responses.listed(b"LIST " + text) == found


def test_a_name_may_be_a_literal() -> None:
    text = b'LIST () "/" {3}'
    assert responses.listed(text, {text.index(b"{"): b"a\nb"}).name == b"a\nb"


@pytest.mark.parametrize("text", [b"LIST", b"LIST ", b'LIST () "/"', b'LIST () "/" ', b'LIST "/" a', b"LIST (() NIL a"])
def test_what_lists_no_folder(text: bytes) -> None:
    with pytest.raises(Malformed):
        responses.listed(text)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (b"INBOX (MESSAGES 3 UIDNEXT 9)", (b"INBOX", {"MESSAGES": 3, "UIDNEXT": 9})),
        (b'"b (odd" (messages 2)', (b"b (odd", {"MESSAGES": 2})),
        (b"Boats 1 (MESSAGES 2)", (b"Boats 1", {"MESSAGES": 2})),
        (b"a (MESSAGES NIL UIDNEXT -3 UIDVALIDITY 4)", (b"a", {"UIDVALIDITY": 4})),
        (b"a (HIGHESTMODSEQ 9223372036854775807)", (b"a", {"HIGHESTMODSEQ": 2**63 - 1})),
        (b"a (HIGHESTMODSEQ 9223372036854775808)", (b"a", {})),
        (b"a ()", (b"a", {})),
    ],
)
def test_statuses(text: bytes, found: tuple[bytes, dict[str, int]]) -> None:
    assert responses.status(b"STATUS " + text) == found


@pytest.mark.parametrize("text", [b"STATUS", b"STATUS a", b"STATUS (MESSAGES 1)", b"STATUS a (MESSAGES 1"])
def test_what_is_no_status(text: bytes) -> None:
    with pytest.raises(Malformed):
        responses.status(text)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (b'(("INBOX." ".")) (("user." ".")) (("" "."))', Namespaces(b"INBOX.", (b"user.",))),
        (b"NIL NIL NIL", Namespaces(b"", ())),
        (b'(("" "/"))', Namespaces(b"", ())),
        (b"", Namespaces(b"", ())),
    ],
)
def test_namespaces(text: bytes, found: Namespaces) -> None:
    assert responses.namespaces(b"NAMESPACE " + text) == found


# Flags, dates, words ------------------------------------------------------------------


def test_flags_are_as_said() -> None:
    assert responses.flags(b"\\SEEN \\recent $Label1 $label1 Stra\xdfe  {y}") == {
        "\\Seen", "$Label1", "$label1", "Stra\udcdfe", "{y}",
    }  # fmt: skip


@pytest.mark.parametrize("keyword", ["$Forwarded", "NonJunk", "urgent?", "home/garden", "e=f;g,h", "[x"])
def test_legal_keywords(keyword: str) -> None:
    assert responses.is_legal_keyword(keyword)


@pytest.mark.parametrize(
    "keyword", ["", "a b", "a(b", "a)b", "{5", "a%", "a*", 'a"', "a\\", "a]", "\x04a", "ß", "\udcdf", "\\X"]
)
def test_illegal_keywords(keyword: str) -> None:
    assert not responses.is_legal_keyword(keyword)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (b"17-Jul-1996 02:44:25 -0700", 837596665),
        (b" 7-jul-1996 02:44:25 -0700", 836732665),
        (b"3-Feb-1999 08:09:10 -0300", 918040150),
        (b"14-Mar-98 09:26:53 +0100", 889864013),
        (b"Tue, 02 May 2023 11:12:13 +0200", 1683018733),
        (b"01-Jan-1970 00:00:00 +0000", 0),
        (b"29-Feb-2012 23:59:60 +0000", 1330560000),
    ],
)
def test_dates(text: bytes, seconds: int) -> None:
    assert responses.internaldate(text) == Date(seconds)


@pytest.mark.parametrize(
    ("text", "seconds"), [(b"14-Mar-2011 09:26:53", 1300094813), (b"02-May-2023 11:12:13 +9900", 1683025933)]
)
def test_dates_without_a_zone_are_taken_for_utc(text: bytes, seconds: int) -> None:
    found = responses.internaldate(text)
    assert found.seconds == seconds
    assert "UTC" in found.remark


@pytest.mark.parametrize(
    "text",
    [
        None, b"", b"00-Jan-0000 00:00:00 +0000", b" 1-Jan-0001 00:00:00 +0000", b" 1-Jan-1601 00:00:00 +0000",
        b"31-Dec-9999 23:59:59 +0000", b"14-Dez-2011 09:26:53 +0100", b"00-000-0000 00:00:00 +0000", b"yesterday",
        b"32-Jan-2011 09:26:53 +0100", b"14-Mar-2011 25:26:53 +0100", b"31-Dec-1969 23:59:59 +0000", b"\xff\x00",
        b"," * 500,
    ],
)  # fmt: skip
def test_dates_that_cannot_be_known_are_named(text: bytes | None) -> None:
    found = responses.internaldate(text)
    assert found.seconds is None
    assert found.remark.startswith("it")


@pytest.mark.parametrize(
    ("text", "name", "argument"),
    [
        ("[UIDVALIDITY 5] x", "UIDVALIDITY", "5"),
        ("[alert]", "ALERT", ""),
        ("[PERMANENTFLAGS (\\Seen a]b \\*)] x", "PERMANENTFLAGS", "(\\Seen a]b \\*)"),
        ("words [LIMIT]", "", ""),
        ("[", "", ""),
        ("[]", "", ""),
    ],
)
def test_response_codes(text: str, name: str, argument: str) -> None:
    for found in (responses.code(text), responses.code(text.encode())):
        assert (found.name, found.argument) == (name, argument)


@pytest.mark.parametrize(
    ("said", "shown"),
    [(b"a\x1b[31mb\0\r", "a?[31mb??"), ("a\u202eb", "a?b"), (b"\xff", "\\xff"), (b"x" * 500, "x" * 300 + "...")],
)
def test_words_of_a_server_are_made_harmless(said: bytes | str, shown: str) -> None:
    assert responses.printable(said) == shown
    assert responses.printable(said).isprintable()


@pytest.mark.parametrize(
    ("words", "wait"),
    [
        ("Request is throttled. Suggested Backoff Time: 299961 milliseconds", 299.961),
        ("Server Busy", 0),
        ("[ALERT] Account exceeded command or bandwidth limits.", 0),
        ("backoff time 5 seconds", 5),
        ("[SERVERBUG] cannot read the message", None),
        ("no such message", None),
    ],
)
def test_throttling_in_words(words: str, wait: float | None) -> None:
    found = throttled(words)
    assert (None if found is None else found.wait) == wait


@pytest.mark.parametrize(
    ("greeting", "capabilities", "identity", "name"),
    [
        ("OK [CAPABILITY IMAP4rev1] Courier-IMAP ready.", "", "", "Courier"),
        ("OK ready", "IMAP4REV1 ACL2=UNION", "", "Courier"),
        ("OK ready", "", 'ID ("NAME" "Zimbra")', "Zimbra"),
        ("OK The Microsoft Exchange IMAP4 service is ready.", "", "", "Exchange"),
        ("OK Gimap ready for requests", "", "", "Gmail"),
        ("OK Dovecot ready.", "", "", "Dovecot"),
        ("OK ready", "IMAP4REV1", "", ""),
    ],
)
def test_servers_are_recognised(greeting: str, capabilities: str, identity: str, name: str) -> None:
    profile = recognise(greeting, frozenset(capabilities.split()), identity)
    assert profile.name == name
    assert profile.select_only == (name == "Courier")
    assert profile.no_qresync == (name == "Zimbra")


# Anything -----------------------------------------------------------------------------

READERS: list[Callable[[bytes], object]] = [
    responses.tokens,
    responses.fetched,
    responses.announced,
    responses.number,
    responses.ranges,
    responses.vanished,
    responses.internaldate,
    responses.header_date,
    responses.code,
    responses.flags,
    responses.printable,
    lambda text: list(responses.searched(text)),
    lambda text: responses.listed(b"LIST " + text),
    lambda text: responses.status(b"STATUS " + text),
    lambda text: responses.namespaces(b"NAMESPACE " + text),
    lambda text: responses.fetched(b"1 FETCH (" + text),
    lambda text: responses.fetched(b"1 FETCH (FLAGS (" + text),
]

_PIECES = [b"(", b")", b'"', b"\\", b" ", b"{3}", b"NIL", b"UID", b"7", b"FLAGS (", b"BODY[] ", b"]", b"[", b"\xff"]


@settings(deadline=None)
@given(st.binary(max_size=60) | st.lists(st.sampled_from(_PIECES), max_size=25).map(b"".join))
def test_nothing_but_malformed_is_raised(text: bytes) -> None:
    for read in READERS:
        try:
            read(text)
        except Malformed:
            continue


_atoms = st.text(alphabet="abcXYZ0189$-_.", min_size=1, max_size=8).map(str.encode)


@settings(deadline=None)
@given(
    st.integers(1, 2**32 - 1),
    st.lists(_atoms | st.binary(min_size=1, max_size=6).filter(lambda each: not set(each) & set(b" \r\n")), max_size=5),
    st.integers(0, 2**32 - 1),
)
def test_flags_of_any_kind_lose_no_item(uid: int, keywords: list[bytes], size: int) -> None:
    text = b"1 FETCH (UID %d FLAGS (%s) RFC822.SIZE %d)" % (uid, b" ".join(keywords), size)
    found = responses.fetched(text)
    assert found is not None
    assert found.items == {b"UID": b"%d" % uid, b"FLAGS": b" ".join(keywords), b"RFC822.SIZE": b"%d" % size}


@pytest.mark.parametrize("text", [b"(" * 100_000, b'"' * 100_001, b"\\" * 100_000, b") " * 100_000, b"a" * 1_000_000])
def test_work_is_in_proportion_to_the_text(text: bytes) -> None:
    """It ends: none of these goes back and forth."""
    for read in READERS:
        try:
            read(text)
        except Malformed:
            continue
