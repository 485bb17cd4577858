"""Where mail goes, as a table: state and mode against what Postfix is told."""

from __future__ import annotations

import pytest

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


@pytest.mark.parametrize("map_name", ["transport", "domains", "aliases", "route"])
@pytest.mark.parametrize("key", ["here@active.test", "active.test", "somebody@elsewhere.test"])
def test_before_the_first_load_everything_is_temporary(unloaded: Routes, map_name: str, key: str) -> None:
    assert str(unloaded.lookup(map_name, key)).startswith("TEMP ")


def test_the_barrier_is_seen_even_before_the_first_load(unloaded: Routes, barriers: list[str]) -> None:
    reply = unloaded.lookup("transport", "barrier-1@barrier.bascule.invalid")
    assert str(reply) == "OK discard:bascule barrier"
    assert barriers == ["barrier-1"]


@pytest.mark.parametrize(
    ("recipient", "action"),
    [
        ("anybody@active.test", "reject_unverified_recipient"),
        ("anybody@prepared.test", "reject_unverified_recipient"),
        ("here@active.test", "DUNNO"),
        ("here+tag@active.test", "DUNNO"),
        ("moving@active.test", "DUNNO"),
        ("info@active.test", "DUNNO"),
        ("anybody@closed.test", "550 5.1.1 no such user here"),
        ('"quoted local"@active.test', "reject_unverified_recipient"),
        ("no such address @active.test", "reject_unverified_recipient"),
        ("somebody@elsewhere.test", "DUNNO"),
        ("postmaster", "DUNNO"),
        ("", "DUNNO"),
    ],
)
def test_verification_at_rcpt(routes: Routes, recipient: str, action: str) -> None:
    assert routes.verification(recipient) == action


def test_verification_before_the_first_load_defers(unloaded: Routes) -> None:
    assert unloaded.verification("here@active.test").startswith("DEFER_IF_PERMIT 4.3.0 ")


@pytest.mark.parametrize(
    ("recipient", "counted"),
    [
        ("Anybody+tag@active.test", "anybody@active.test"),
        ("anybody@prepared.test", "anybody@prepared.test"),
        ("here@active.test", None),
        ("info@active.test", None),
        ("anybody@closed.test", None),
        ("somebody@elsewhere.test", None),
    ],
)
def test_sightings(routes: Routes, recipient: str, counted: str | None) -> None:
    seen = routes.sighting(recipient)
    assert (None if seen is None else str(seen)) == counted
