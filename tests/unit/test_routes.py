"""Where mail goes, as a table: state and mode against what Postfix is told."""

from __future__ import annotations

import pytest

from bascule.address import Address
from bascule.policy_daemon.routes import Routes

RELAY = "OK relay:[mx.old.test]:25"
LOCAL = "OK bascule-lmtp:unix:/run/lmtp"
HELD = "OK bascule-hold:unix:/run/hold"
NOT_FOUND = "NOTFOUND "


@pytest.mark.parametrize(
    ("key", "reply"),
    [
        ("anybody@active.test", RELAY),
        ("anybody+tag@active.test", RELAY),
        ("anybody@prepared.test", RELAY),
        ("active.test", RELAY),
        ("ACTIVE.test", RELAY),
        ("here@active.test", LOCAL),
        ("Here@Active.TEST", LOCAL),
        ("here+tag@active.test", LOCAL),
        ("here+tag+more@active.test", LOCAL),
        ("here+own@active.test", RELAY),  # a mailbox of its own, though its name looks like a detail
        ("here+own+tag@active.test", LOCAL),
        ("anybody@verified.test", "OK bascule-relay-verify:[mx.old.test]:25"),
        ("barrier-1@barrier.bascule.invalid", HELD),
        ("+here@active.test", RELAY),
        ("moving@active.test", HELD),
        ("moving+tag@active.test", HELD),
        ("leaving@active.test", HELD),
        ("here@closed.test", LOCAL),
        ("afar@active.test", "OK bascule-lmtp-tls:inet:store2.test:24"),
        ("anybody@closed.test", "OK error:5.1.1 no such user here"),
        ("somebody@elsewhere.test", NOT_FOUND),
        ("elsewhere.test", NOT_FOUND),
        (".active.test", NOT_FOUND),
        ("*", NOT_FOUND),
        ("", NOT_FOUND),
        ("no domain@", NOT_FOUND),
        ('"quoted local"@elsewhere.test', NOT_FOUND),
        ('"quoted local"@active.test', RELAY),
        ('"here"@active.test', LOCAL),
        ('"HERE+tag"@active.test', LOCAL),
        ("no such address @active.test", RELAY),
        ("x" * 400 + "@active.test", RELAY),
        ("here@\u00dcml\u00e4ut.test", LOCAL),
        ("anybody@xn--mlut-moa5l.TEST", RELAY),
        ("anybody@\u2024.test", NOT_FOUND),
        ("\udcff\udcfe@elsewhere.test", NOT_FOUND),
        ("\udcff\udcfe@active.test", RELAY),
    ],
)
def test_transport(routes: Routes, key: str, reply: str) -> None:
    assert str(routes.lookup("transport", key)) == reply


@pytest.mark.parametrize(
    ("key", "reply"),
    [
        ("active.test", "OK active.test"),
        ("Prepared.TEST", "OK Prepared.TEST"),
        ("closed.test", "OK closed.test"),
        ("elsewhere.test", NOT_FOUND),
        ("sub.active.test", NOT_FOUND),
    ],
)
def test_domains(routes: Routes, key: str, reply: str) -> None:
    assert str(routes.lookup("domains", key)) == reply


@pytest.mark.parametrize(
    ("key", "reply"),
    [
        ("info@active.test", "OK here@active.test"),
        ("INFO@active.test", "OK here@active.test"),
        ("info+news@active.test", "OK here+news@active.test"),
        ("here@active.test", NOT_FOUND),
        ("@active.test", NOT_FOUND),
        ("info", NOT_FOUND),
        ("here@xn--mlut-moa5l.test", NOT_FOUND),
        ("Here+x@\u00dcml\u00e4ut.test", "OK Here+x@xn--mlut-moa5l.test"),
        ("here@\u00fcbel.test", NOT_FOUND),
    ],
)
def test_aliases(routes: Routes, key: str, reply: str) -> None:
    assert str(routes.lookup("aliases", key)) == reply


@pytest.mark.parametrize(
    ("key", "reply"),
    [
        ("anybody@active.test", "OK legacy"),
        ("here+tag@active.test", "OK local"),
        ("moving@active.test", "OK held"),
        ("info@active.test", "OK local"),
        ("anybody@elsewhere.test", NOT_FOUND),
    ],
)
def test_the_route_that_the_milter_names(routes: Routes, key: str, reply: str) -> None:
    assert str(routes.lookup("route", key)) == reply


def test_an_unknown_map_is_a_permanent_error(routes: Routes) -> None:
    assert str(routes.lookup("nonsense", "key")).startswith("PERM ")


@pytest.mark.parametrize("map_name", ["transport", "domains", "aliases", "senders", "route"])
@pytest.mark.parametrize("key", ["here@active.test", "active.test", "somebody@elsewhere.test"])
def test_before_the_first_load_everything_is_temporary(unloaded: Routes, map_name: str, key: str) -> None:
    assert str(unloaded.lookup(map_name, key)).startswith("TEMP ")


def test_the_barrier_goes_its_way_even_before_the_first_load(unloaded: Routes) -> None:
    assert str(unloaded.lookup("transport", "barrier-1@barrier.bascule.invalid")) == HELD


@pytest.mark.parametrize(
    ("sender", "owner"),
    [
        ("here@active.test", "OK here@active.test"),
        ("Here+tag@active.test", "OK here@active.test"),
        ("here+own@active.test", "OK here+own@active.test"),
        ("moving@active.test", "OK moving@active.test"),
        ("anybody@active.test", "OK anybody@active.test"),
        ("anybody+tag@active.test", "OK anybody@active.test"),
        ("anybody@prepared.test", "OK anybody@prepared.test"),
        ("info@active.test", "OK here@active.test"),
        ("info+news@active.test", "OK here@active.test"),
        ("tom@active.test", "OK unmoved@active.test"),
        ("here@closed.test", "OK here@closed.test"),
        ("nobody@closed.test", NOT_FOUND),
        ("@active.test", NOT_FOUND),
        ("here", NOT_FOUND),
        ("somebody@elsewhere.test", NOT_FOUND),
    ],
)
def test_who_may_send_as_an_address(routes: Routes, sender: str, owner: str) -> None:
    assert str(routes.lookup("senders", sender)) == owner


@pytest.mark.parametrize(
    ("recipient", "action"),
    [
        ("anybody@active.test", "anybody@active.test"),
        ("anybody@prepared.test", "anybody@prepared.test"),
        ("here+own@active.test", "here+own@active.test"),
        ("here@active.test", "DUNNO"),
        ("here+tag@active.test", "DUNNO"),
        ("moving@active.test", "DUNNO"),
        ("info@active.test", "DUNNO"),
        ("anybody@closed.test", "550 5.1.1 no such user here"),
        ('"quoted local"@active.test', '"quoted local"@active.test'),
        # As Postfix hands them over, without the quotes that RFC 5321 wants.
        ("quoted local@active.test", '"quoted local"@active.test'),
        ("here+a tag@active.test", '"here+a tag"@active.test'),
        (" here@active.test", '" here"@active.test'),
        ("here @active.test", '"here "@active.test'),
        ("no\x07name@active.test", "550 5.1.3 no mailbox can have this name"),
        ("somebody@elsewhere.test", "DUNNO"),
        ("postmaster", "DUNNO"),
        ("", "DUNNO"),
    ],
)
def test_verification_at_rcpt(routes: Routes, recipient: str, action: str) -> None:
    """An address stands for the question to its legacy server."""
    found = routes.verification(recipient)
    assert (found if isinstance(found, str) else str(found[1])) == action


def test_verification_before_the_first_load_defers(unloaded: Routes) -> None:
    assert str(unloaded.verification("here@active.test")).startswith("DEFER_IF_PERMIT 4.3.0 ")


@pytest.mark.parametrize(
    ("recipient", "counted"),
    [
        ("Anybody+tag@active.test", "anybody@active.test"),
        ("anybody@prepared.test", "anybody@prepared.test"),
        ("here+own@active.test", "here+own@active.test"),
        ("here@active.test", None),
        ("info@active.test", None),
        ("anybody@closed.test", None),
        ("somebody@elsewhere.test", None),
    ],
)
def test_what_was_accepted_is_counted(
    routes: Routes, accepted: list[Address], recipient: str, counted: str | None
) -> None:
    reply = routes.lookup("accepted", recipient)
    assert reply.status == ("NOTFOUND" if counted is None else "OK")
    assert [str(each) for each in accepted] == ([] if counted is None else [counted])


@pytest.mark.parametrize(
    ("delimiters", "address", "base"),
    [
        ("+", "a+b@x.test", "a@x.test"),
        ("+-", "a-b+c@x.test", "a@x.test"),
        ("+-", "a+b-c@x.test", "a@x.test"),
        ("-", "a+b@x.test", "a+b@x.test"),
        ("+-", "-b+c@x.test", "-b+c@x.test"),
        ("", "a+b@x.test", "a+b@x.test"),
    ],
)
def test_delimiters_are_postfix_s(delimiters: str, address: str, base: str) -> None:
    assert str(Address.parse(address).without_detail(delimiters)) == base
