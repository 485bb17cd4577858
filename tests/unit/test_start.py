"""What the command imports, before it does anything: an administrator waits for it each time."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import click
import pytest

from bascule.cli import command

SLOW = ("alembic", "sqlalchemy", "rich", "dns", "spf", "imapclient", "jinja2", "argon2", "nacl", "procrastinate")

#: Runs the command and prints what it has imported, in a process of its own.
SCRIPT = """
import sys
from bascule.cli import main
try:
    main(sys.argv[1:], standalone_mode=False)
except BaseException as error:
    print(f"{type(error).__name__}: {error}")
print("imported:", *sorted({name.partition(".")[0] for name in sys.modules}))
"""


def imported(*arguments: str) -> tuple[str, set[str]]:
    done = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, check=True)
    said, _, names = done.stdout.rpartition("imported: ")
    return said, set(names.split())


def test_help_imports_nothing_that_it_does_not_need() -> None:
    said, names = imported("--help")
    assert "The usual way of a domain" in said
    assert not names & {*SLOW, "pydantic", "psycopg"}


def test_status_imports_no_more_than_settings_and_the_database(tmp_path: Path) -> None:
    path = tmp_path / "bascule.toml"
    path.write_text(f'database = "host={tmp_path} dbname=nowhere"\n')
    said, names = imported("--settings", str(path), "status")
    assert "DatabaseUnavailable" in said or "does not answer" in said  # it came as far as that
    assert {"pydantic", "psycopg"} <= names
    assert not names & set(SLOW)


@pytest.mark.parametrize("name", command.COMMANDS)
def test_every_command_is_where_the_list_says(name: str) -> None:
    found = command.main.get_command(click.Context(command.main), name)
    assert found is not None
    assert found.callback is not None
    assert found.callback.__module__ == f"bascule.cli.{command.COMMANDS[name].module}"


def test_every_command_is_in_the_list() -> None:
    """What a module enters and the list does not name could not be called."""
    folder = Path(command.__file__).parent
    for path in folder.glob("*.py"):
        importlib.import_module(f"bascule.cli.{path.stem}")
    assert isinstance(command.main, command.Cli)
    assert set(command.main.commands.entered) == set(command.COMMANDS)


def test_the_list_is_in_order() -> None:
    assert list(command.COMMANDS) == sorted(command.COMMANDS)
