"""What others chose to say is shown as it is, and does nothing to the terminal."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import click
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from bascule.check.finding import Finding, wrong
from bascule.check.registry import Check, run
from bascule.check.subject import Subject
from bascule.cli.base import say
from bascule.cli.progress import Standing
from bascule.cli.screen import screen
from bascule.errors import BasculeError
from bascule.program import spoken
from bascule.settings import Settings
from bascule.words import MOST, printable, printable_lines

EVIL = "\x1b[2J\x1b]0;title\x07 [/x] [gmail] \r\u202egnp.exe\u200b\x9b31m\x7f"
SHOWN = r"\x1b[2J\x1b]0;title\x07 [/x] [gmail] \r\u202egnp.exe\u200b\x9b31m\x7f"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (EVIL, SHOWN),
        ("a\nb\tc", r"a\nb\tc"),
        ("Boîte de réception, بريد, 日本語 😀", "Boîte de réception, بريد, 日本語 😀"),
        ("\ud800", r"\ud800"),
        ("", ""),
    ],
)
def test_every_character_is_seen(text: str, shown: str) -> None:
    assert printable(text) == shown


@given(st.text())
def test_no_text_moves_the_cursor(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable() or any(character in "\u00a0\u3000" or not character.isascii() for character in shown)
    assert not any(ord(character) < 32 or 127 <= ord(character) < 160 for character in shown)


def test_a_flood_is_cut_off_and_says_so() -> None:
    assert printable("x" * (MOST + 5)) == "x" * MOST + " ... (5 more characters)"


def test_lines_of_ours_stay_lines() -> None:
    assert printable_lines("one\ntwo\x1b") == "one\ntwo\\x1b"


def test_an_error_is_shown_without_its_escapes() -> None:
    @click.command()
    def fail() -> None:
        with spoken():
            raise BasculeError(f"the server says {EVIL}", hint="See\nthere.")

    shown = CliRunner().invoke(fail).output
    assert SHOWN in shown
    assert "\x1b" not in shown
    assert "See\nthere." in shown


def test_what_the_command_says() -> None:
    @click.command()
    def speak() -> None:
        say(EVIL)

    assert CliRunner().invoke(speak).output == f"{SHOWN}\n"


def test_findings_are_shown_as_they_are() -> None:
    evil = Check("x.y", "IMAP", frozenset(), (), False, lambda _: iter([wrong(EVIL, EVIL)]))
    assert list(run([evil], Subject(Settings()))) == [Finding("wrong", "IMAP", SHOWN, SHOWN, "x.y")]


def test_the_screen_takes_nothing_for_markup() -> None:
    """A folder may be called [/x], which ends a style that was never begun."""
    standing = cast(
        Standing,
        SimpleNamespace(
            summary={"domain": "x.test", "migrated": 0, "known": 3, "pending": 1, "failed": 1, "forgotten": 1}
            | {"remaining": None, "moved_last_hour": 0, "readiness": "under way"},
            pending=[_row(address="[/a]@x.test", state="copying", percent=1, messages_copied=1, messages_total=2)],
            failed=[_row(address="b@x.test", problem=EVIL, advice="[gmail]")],
            silent=[{"problem": EVIL, "advice": "[/silent]"}],
            forgotten=[_row(address="[red]c@x.test")],
        ),
    )
    console = Console(width=400, record=True, color_system=None)
    with console.capture() as captured:
        console.print(screen(standing))
    text = captured.get()
    for words in ("[/a]@x.test", f"{SHOWN} -> [/silent]", "[gmail]", "[red]c@x.test"):
        assert words in text
    assert "\x1b" not in text


def _row(**values: Any) -> dict[str, Any]:
    return {"messages_per_second": None, "remaining": None} | values
