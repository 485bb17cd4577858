"""The documents: links lead somewhere, and the commands that are shown exist, with the options that are shown."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from bascule.cli import main

CHECKOUT = Path(__file__).parents[2]
PAGES = sorted(
    path
    for path in [*CHECKOUT.glob("*.md"), *CHECKOUT.glob("docs/*.md"), *CHECKOUT.glob("ansible/**/*.md")]
    if path.name != "CHANGELOG.md"  # of former versions, too
)
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
SHOWN = re.compile(r"`(bascule [^`]+)`|^ {4,}(bascule [^#\n]+)", re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """What a heading is reached by, as forges make it: lower case, hyphens for spaces, no punctuation."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(CHECKOUT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(page.read_text()):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def commands(page: Path) -> Iterator[str]:
    """Every call of the command that the page shows, on one line."""
    for match in SHOWN.finditer(page.read_text()):
        yield " ".join((match[1] or match[2]).split())


def wrong_with(shown: str) -> str:
    """What of a command line does not exist; empty: nothing."""
    words = shlex.split(re.sub(r"[|>;]\s.*", "", shown).replace("'", ""))[1:]
    command: click.Command = main
    context = click.Context(main)
    while words and isinstance(command, click.Group) and re.fullmatch(r"[a-z][a-z0-9|-]*", words[0]):
        first, *others = words.pop(0).split("|")
        if missing := [each for each in (first, *others) if command.get_command(context, each) is None]:
            return f"no command {missing[0]}"
        if others:
            return ""  # several at once, as in `domain add|set`
        command = command.get_command(context, first) or command
    options = {name for each in command.get_params(context) for name in (*each.opts, *each.secondary_opts)}
    for word in words:
        named = re.match(r"--[a-z][a-z-]*", word)
        if named and named[0] not in options:
            return f"{command.name} has no option {named[0]}"
    return ""


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(CHECKOUT)))
def test_commands_that_are_shown_exist(page: Path) -> None:
    assert {shown: wrong for shown in commands(page) if (wrong := wrong_with(shown))} == {}


def test_a_command_that_does_not_exist_is_seen() -> None:
    assert wrong_with("bascule transfer example.org") == "no command transfer"
    assert wrong_with("bascule domain add example.org --imap-hots x") == "add has no option --imap-hots"
    assert wrong_with("bascule domain add|sett x") == "no command sett"
    assert wrong_with("bascule status example.org --watch") == ""
