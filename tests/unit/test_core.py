"""Addresses, settings, credentials, the snapshot."""

from __future__ import annotations

import pickle
import traceback
from ipaddress import ip_network
from pathlib import Path

import pytest
from argon2.exceptions import InvalidHashError
from hypothesis import given
from hypothesis import strategies as st

from bascule import settings
from bascule.address import Address
from bascule.config_templates import render
from bascule.credential import (
    Password,
    PasswordNotUsable,
    Sealer,
    Unsealer,
    create_keys,
    forget_former_keys,
    rotate_keys,
)
from bascule.errors import BadAddress, BadSettings, CannotUnseal
from bascule.settings import Arc, Authenticator, Legacy, Milter, PolicyDaemon, Settings, Worker


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("alice@example.org", "alice@example.org"),
        (" Alice.B@Example.ORG. ", "alice.b@example.org"),
        ("a@b@c.test", "a@b@c.test"),
        ("Réception@Exämple.test", "réception@xn--exmple-cua.test"),
        ("alice@XN--EXMPLE-CUA.test", "alice@xn--exmple-cua.test"),
        ('"alice"@c.test', "alice@c.test"),
        ('"al\\ice"@c.test', "alice@c.test"),
        ('"John Doe"@c.test', '"john doe"@c.test'),
        ('"a@b"@c.test', '"a@b"@c.test'),
    ],
)
def test_addresses(text: str, parsed: str) -> None:
    assert str(Address.parse(text)) == parsed


@pytest.mark.parametrize(
    "text",
    [
        "",
        "alice",
        "@example.org",
        "alice@",
        "a b@c.test",
        "a\x00b@c.test",
        "a\n@b.test",
        "x" * 330 + "@b",
        "a@b c.test",
        '"a\x00"@b.test',
        "a@\u2024.test",
    ],
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(BadAddress):
        Address.parse(text)


@given(st.text(max_size=40))
def test_any_text_is_an_address_or_refused(text: str) -> None:
    try:
        address = Address.parse(text)
    except BadAddress:
        return
    assert Address.parse(str(address)) == address


def test_detail() -> None:
    assert str(Address.parse("alice+news@x.test").without_detail("+")) == "alice@x.test"
    assert str(Address.parse("+news@x.test").without_detail("+")) == "+news@x.test"
    assert str(Address.parse("alice@x.test").without_detail("+")) == "alice@x.test"


@pytest.mark.parametrize(
    "written",
    [
        Settings(database="host=/run dbname=x", node="mx1"),
        Settings(
            legacy=Legacy(ca_file=Path("/etc/ca.pem"), timeout=3.5),
            policy_daemon=PolicyDaemon(metrics="127.0.0.1:9101"),
            trusted_sources=(ip_network("192.0.2.0/24"), ip_network("2001:db8::/32")),
            authenticator=Authenticator(metrics="127.0.0.1:9102"),
            milter=Milter(
                metrics="127.0.0.1:9103",
                arc=Arc(domain="a.test", selector="s", key=Path("/etc/arc.pem"), authserv_id="mx.a.test"),
            ),
            worker=Worker(store="store2", mail_location="mdbox:~/mdbox"),
        ),
    ],
    ids=["mostly defaults", "everything that may be left out"],
)
def test_the_settings_template_gives_settings(tmp_path: Path, written: Settings) -> None:
    path = tmp_path / "bascule.toml"
    path.write_text(render("bascule.toml.j2", **written.model_dump()))
    assert settings.load(path) == written


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[portal]\nlisten = 25", "portal.listen"),
        ("[nonsense]\na = 1", "nonsense"),
        ("[legacy]\ntimeout = 0", "legacy.timeout"),
        ("not toml", "is not TOML"),
    ],
)
def test_wrong_settings_are_named(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "bascule.toml"
    path.write_text(text)
    with pytest.raises(BadSettings, match=words):
        settings.load(path)


def test_missing_settings_say_which_file(tmp_path: Path) -> None:
    with pytest.raises(BadSettings, match=r"no-such\.toml cannot be read"):
        settings.load(tmp_path / "no-such.toml")


def test_sealed_passwords_open_with_the_private_key_only(tmp_path: Path) -> None:
    create_keys(tmp_path / "pub", tmp_path / "key")
    create_keys(tmp_path / "other.pub", tmp_path / "other.key")
    sealed = Sealer(tmp_path / "pub").seal(Password("pâte"))
    assert b"p\xc3\xa2te" not in sealed
    assert Unsealer(tmp_path / "key").unseal(sealed).secret == "pâte"
    with pytest.raises(CannotUnseal):
        Unsealer(tmp_path / "other.key").unseal(sealed)
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o400


def test_a_new_key_leaves_no_password_behind(tmp_path: Path) -> None:
    public, private = tmp_path / "pub", tmp_path / "key"
    create_keys(public, private)
    former = Sealer(public).seal(Password("pâte"))
    rotate_keys(public, private)
    public.unlink()
    rotate_keys(public, private)  # as after a run that was stopped half-way
    assert len(private.read_bytes().split()) == 2
    assert private.stat().st_mode & 0o777 == 0o400
    unsealer = Unsealer(private)
    assert unsealer.unseal(former).secret == "pâte"
    anew = unsealer.reseal(former)
    assert anew is not None
    assert unsealer.reseal(anew) is None
    assert unsealer.reseal(Sealer(public).seal(Password("x"))) is None
    forget_former_keys(private)
    assert Unsealer(private).unseal(anew).secret == "pâte"
    with pytest.raises(CannotUnseal):
        Unsealer(private).unseal(former)


def test_keys_are_never_overwritten(tmp_path: Path) -> None:
    create_keys(tmp_path / "pub", tmp_path / "key")
    before = (tmp_path / "key").read_bytes()
    with pytest.raises(BadSettings, match="exists already"):
        create_keys(tmp_path / "new.pub", tmp_path / "key")
    assert (tmp_path / "key").read_bytes() == before
    assert not (tmp_path / "new.pub").exists()


def test_a_password_does_not_show_itself() -> None:
    password = Password("s3cret-xyzzy")
    shown = [repr(password), str(password), f"{password}", repr([password]), f"{password!r:>40}"]
    try:
        raise ValueError(password)  # noqa: TRY301
    except ValueError:
        shown.append(traceback.format_exc())
    assert not any("xyzzy" in each for each in shown)
    assert pickle.loads(pickle.dumps(password)) == password  # noqa: S301 (its own)


def test_hashes_are_dovecots() -> None:
    hashed = Password("x").hashed()
    assert hashed.startswith("{ARGON2ID}$argon2id$v=19$")
    assert Password("x").matches(hashed)
    assert not Password("y").matches(hashed)
    with pytest.raises(InvalidHashError):  # which is no wrong password
        Password("x").matches("{PLAIN}x")


@pytest.mark.parametrize("secret", ["a\tb", "line\nbreak", "nul\0", "del\x7f", "y" * 501, "ü" * 251])
def test_a_password_that_dovecot_does_not_take_is_refused(secret: str) -> None:
    with pytest.raises(PasswordNotUsable) as error:
        Password(secret).insist_on_usable()
    assert secret not in error.value.message
    assert error.value.hint


@pytest.mark.parametrize("secret", ["grüße-ñ€č", 'quo"te\\', " two words ", "100%u%d{x}", "🔑🔑", "y" * 500])
def test_passwords_as_people_have_them_are_taken(secret: str) -> None:
    Password(secret).insist_on_usable()
