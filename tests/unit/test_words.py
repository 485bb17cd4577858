"""The texts for users: every one in every language, on the page and in messages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from babel.messages.extract import extract_from_dir
from babel.messages.pofile import read_po

from bascule.address import Address
from bascule.errors import BadSettings
from bascule.language import LANGUAGES, Language
from bascule.letters import KINDS, Kind, check, client_servers, compose, readable
from bascule.portal.languages import LOCALE
from bascule.settings import Users

PORTAL = LOCALE.parent
USERS = Users(
    organisation="Port of Example",
    contact="Help desk, telephone 4711",
    imap="imap.new.example.org:993",
    submission="smtp.new.example.org:587",
)
FIELDS = re.compile(r"%\((\w+)\)s")


def texts() -> set[object]:
    """What the templates say, singular and plural."""
    method_map = [("templates/**.html", "jinja2")]
    options = {"templates/**.html": {"trimmed": "true", "newstyle_gettext": "true"}}
    found = extract_from_dir(str(PORTAL), method_map, options)
    return {message for _, _, message, _, _ in found}


@pytest.mark.parametrize("language", [each for each in LANGUAGES if each != "en"])
def test_every_text_is_translated(language: Language) -> None:
    """If not: portal/locale/update.sh, then translate."""
    with (LOCALE / f"{language}.po").open("rb") as file:
        catalogue = read_po(file, locale=language, abort_invalid=True)
    translated = {message.id for message in catalogue if message.id}
    assert translated == texts()
    assert catalogue.obsolete == {}
    for message in catalogue:
        if not message.id:
            continue
        assert not message.fuzzy
        original = str(message.id[-1] if isinstance(message.id, tuple) else message.id)
        strings = message.string if isinstance(message.string, tuple) else (message.string,)
        assert len(strings) == (catalogue.num_plurals if message.pluralizable else 1)
        for string in map(str, strings):
            assert string, original
            assert set(FIELDS.findall(string)) == set(FIELDS.findall(original)), original
            assert string.count("<bdi>") == original.count("<bdi>")


def written(kind: Kind, language: Language, users: Users = USERS) -> str:
    return readable(
        compose(
            kind,
            language,
            users,
            address=Address("amina", "example.org"),
            message_id="<x@example.org>",
            url="https://move.example.org/m/secret",
        )
    )


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_message_in_every_language(kind: Kind, language: Language) -> None:
    text = written(kind, language)
    assert text.startswith("From: Port of Example <postmaster@example.org>\nTo: amina@example.org\nSubject: ")
    assert "Help desk, telephone 4711" in text
    assert "{" not in text
    if kind == "trouble":
        assert "https://move.example.org/m/secret" in text
    elif kind != "first-login":
        assert "imap.new.example.org" in text
        assert "993" in text
        assert "SSL/TLS" in text
        assert "STARTTLS" in text
    scripts = {"en": "mailbox", "fr": "boîte aux lettres", "ar": "بريدك"}
    assert scripts[language] in text


def test_messages_without_any_setting() -> None:
    check(Users())
    assert "None" not in "".join(written(kind, language, Users()) for kind in KINDS for language in LANGUAGES)
    assert client_servers(Users()) == ()


def test_the_lines_of_a_message_can_be_sent() -> None:
    for kind in KINDS:
        for language in LANGUAGES:
            raw = compose(
                kind, language, USERS, address=Address("a", "b.test"), message_id="<x@b.test>", url="https://x"
            )
            raw.decode("ascii")  # for any server (RFC 5322 section 2.3)
            assert max(len(line) for line in raw.split(b"\r\n")) <= 998
            assert b"\n" not in raw.replace(b"\r\n", b"")


def test_the_operators_own_template(tmp_path: Path) -> None:
    folder = tmp_path / "messages"
    folder.mkdir()
    (folder / "welcome.en.txt.j2").write_text("Subject: Hello from {{ organisation }}\n\nYou are {{ address }}.\n")
    users = USERS.model_copy(update={"templates": tmp_path})
    assert written("welcome", "en", users).endswith(
        "Subject: Hello from Port of Example\n\nYou are amina@example.org.\n"
    )
    assert "Bienvenue" in written("welcome", "fr", users)  # ours


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Subject: x\n\n{{ adress }}", "'adress' is undefined"),
        ("Subject: x\n\n{% if %}", "cannot be used"),
        ("Hello\n\nthere", "does not begin with a line 'Subject: ...'"),
        ("Subject: x\nBcc: y@example.org\n\nthere", "does not begin with a line 'Subject: ...'"),
        ("Subject: x", "does not begin with a line 'Subject: ...'"),
    ],
)
def test_a_template_that_cannot_be_used_is_told_at_the_start(tmp_path: Path, text: str, words: str) -> None:
    folder = tmp_path / "messages"
    folder.mkdir()
    (folder / "trouble.ar.txt.j2").write_text(text)
    with pytest.raises(BadSettings, match=words) as error:
        check(USERS.model_copy(update={"templates": tmp_path}))
    assert "messages/trouble.ar.txt.j2" in error.value.message
