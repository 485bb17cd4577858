"""Jinja2 templates of everything that is written for another program or for people.

Ansible, the lab and the programs render the same files; ``render`` is for the
latter two. An undefined variable is an error, never an empty string.
"""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from bascule.location import dovecot_settings

FOLDER = Path(__file__).resolve().parent


def environment(*folders: Path) -> Environment:
    """Templates of ``folders``, then of this one.

    The settings are those of Ansible's template module: the last newline is
    kept, blocks leave no empty line.
    """
    made = Environment(
        loader=FileSystemLoader([*folders, FOLDER]),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
        autoescape=select_autoescape(enabled_extensions=("html.j2",), default_for_string=False),
    )
    made.filters["dovecot_settings"] = dovecot_settings
    return made


def render(name: str, **variables: object) -> str:
    """The text of the template ``name``, a path below this folder.

    Raises:
        jinja2.UndefinedError: a variable is missing.
    """
    return environment().get_template(name).render(**variables)
