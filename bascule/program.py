"""How every part starts: settings from ``--settings``, logs to standard error, our errors as words."""

from __future__ import annotations

import ctypes
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from bascule import settings
from bascule.errors import BadSettings, BasculeError
from bascule.words import printable_lines

MIN_SECRET = 32  # characters
_PR_SET_DUMPABLE = 4  # linux/prctl.h

settings_option = click.option(
    "--settings",
    "path",
    type=click.Path(path_type=Path),
    default=settings.DEFAULT_PATH,
    show_default=True,
    help="The settings file.",
)


class Spoken(click.Command):
    """A command whose errors are said in words, with exit status 1."""

    def invoke(self, ctx: click.Context) -> Any:
        with spoken():
            return super().invoke(ctx)


@contextmanager
def spoken() -> Iterator[None]:
    """Turn our errors, with what to do next, into click's."""
    try:
        yield
    except BasculeError as error:
        raise click.ClickException(
            printable_lines(error.message + (f"\n{error.hint}" if error.hint else ""))
        ) from error


def command(part: str, purpose: str, run: Callable[[settings.Settings], None]) -> click.Command:
    """The command of a part: ``run`` serves until it is told to stop."""

    @click.command(cls=Spoken, help=purpose)
    @settings_option
    def main(path: Path) -> None:
        from bascule import log  # noqa: PLC0415 (slow to start; the command bascule logs nothing)

        keep_memory_private()
        log.configure(part)
        run(settings.load(path))

    return main


def keep_memory_private() -> None:
    """Let no password of this process end in a core dump, nor be read by a debugger of the same user (prctl(2))."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def read_secret(path: Path, what: str) -> bytes:
    """The content of a key file that an administrator made.

    Raises:
        BadSettings: it cannot be read or is too short.
    """
    try:
        key = path.read_bytes().strip()
    except OSError as error:
        raise BadSettings(f"the {what} {path} cannot be read: {error.strerror}") from error
    if len(key) < MIN_SECRET:
        raise BadSettings(
            f"the {what} {path} is too short", hint=f"Write {MIN_SECRET} random characters or more into it."
        )
    return key
