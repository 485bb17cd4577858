"""Man pages and completion of the command ``bascule``."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from bascule.cli import main

PAGES = Path(__file__).parents[2] / "docs" / "man"


def commands(command: click.Command, name: str) -> Iterator[tuple[str, click.Command]]:
    yield name, command
    if isinstance(command, click.Group):
        for below, each in command.commands.items():
            yield from commands(each, f"{name}-{below}")


ALL = dict(commands(main, "bascule"))


@pytest.mark.parametrize("name", ALL)
def test_the_man_page_has_every_option(name: str) -> None:
    """If not: docs/man/update.sh."""
    page = (PAGES / f"{name}.1").read_text().replace("\\-", "-")
    for parameter in ALL[name].params:
        for option in (*parameter.opts, *parameter.secondary_opts):
            assert option in page if isinstance(parameter, click.Option) else option.upper() in page


def test_no_man_page_is_of_a_command_that_is_gone() -> None:
    assert {path.stem for path in PAGES.glob("*.1")} == set(ALL)


def test_man_can_read_them() -> None:
    done = subprocess.run(
        ["man", "--warnings", "-l", str(PAGES / "bascule.1")],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": "/usr/bin:/bin", "MANWIDTH": "100", "LANG": "C.UTF-8"},
    )
    assert "The usual way of a domain:" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        (["bascule", "act"], "activate"),
        (["bascule", "prepare", "--imap-t"], "--imap-tls"),
        (["bascule", "prepare", "--imap-tls", "st"], "starttls"),
    ],
)
def test_bash_completes(typed: list[str], offered: str) -> None:
    """In a real bash, with what ``bascule completion bash`` prints."""
    program = Path(sys.executable).parent / "bascule"
    words = " ".join(f"'{word}'" for word in typed)
    script = f"""
        eval "$({program} completion bash)"
        COMP_WORDS=({words}) COMP_CWORD={len(typed) - 1}
        _bascule_completion "{program}"
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert offered in done.stdout.split()
    assert done.stderr == ""


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells(shell: str) -> None:
    program = Path(sys.executable).parent / "bascule"
    done = subprocess.run([str(program), "completion", shell], capture_output=True, text=True, check=True)
    assert "_BASCULE_COMPLETE" in done.stdout
