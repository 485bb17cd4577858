"""The PostgreSQL schema, as SQL files, and its upgrades.

``tables/`` holds the history of the tables, run once by Alembic, a revision at a
time. ``states.sql``, ``functions/``, the views and ``roles.sql`` are
the present text of everything that can be replaced; they are run whole, in the
same transaction, at each upgrade.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import psycopg
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine
from sqlalchemy.exc import DBAPIError

from bascule.database import connect, translated, value
from bascule.errors import BasculeError

FOLDER = Path(__file__).resolve().parent

REPLACEABLE = (
    "states.sql",
    "functions/addresses.sql",
    "views_for_parts.sql",
    "functions/administration.sql",
    "functions/requests.sql",
    "functions/passwords.sql",
    "functions/folders.sql",
    "functions/returns.sql",
    "functions/migration.sql",
    "functions/nodes.sql",
    "functions/routing.sql",
    "functions/sightings.sql",
    "functions/findings.sql",
    "functions/surveys.sql",
    "functions/verification.sql",
    "functions/logins.sql",
    "views.sql",
    "roles.sql",
)


class LaterSchema(BasculeError):
    """A later version has changed the tables."""


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(FOLDER / "alembic"))
    return config


@contextmanager
def _translating() -> Iterator[None]:
    try:
        yield
    except psycopg.Error as error:
        raise translated(error) from error
    except DBAPIError as error:
        if isinstance(error.orig, psycopg.Error):
            raise translated(error.orig) from error
        raise


def head() -> str | None:
    """The newest revision that this version of the product knows."""
    return ScriptDirectory.from_config(_config()).get_current_head()


def written() -> str:
    """What is said on the schema that this version installs: its revision, and a digest of all that can be replaced."""
    text = b"".join((FOLDER / name).read_bytes() for name in REPLACEABLE)
    return f"The state of all migrations. Revision {head()}, text {sha256(text).hexdigest()[:12]}"


def is_current(dsn: str) -> bool:
    """Whether the schema at ``dsn`` is this version's, to the letter."""
    with connect(dsn) as connection:
        said = value(connection, "SELECT obj_description(to_regnamespace('bascule'), 'pg_namespace')")
    return bool(said == written())


def current(dsn: str) -> str | None:
    """The revision of the database at ``dsn``; None if it has no schema of ours."""
    engine = create_engine("postgresql+psycopg://", creator=lambda: psycopg.connect(dsn))
    try:
        with _translating(), engine.connect() as connection:
            context = MigrationContext.configure(connection, opts={"version_table_schema": "bascule"})
            return context.get_current_revision()
    finally:
        engine.dispose()


def is_later(dsn: str) -> bool:
    """Whether a later version of the product has changed the tables at ``dsn``."""
    revision = current(dsn)
    known = {each.revision for each in ScriptDirectory.from_config(_config()).walk_revisions()}
    return revision is not None and revision not in known


def upgrade(dsn: str) -> None:
    """Bring the database at ``dsn`` to :func:`head`, in one transaction.

    The connecting role becomes the owner of the schema and must be allowed to
    create roles and schemas.

    Raises:
        LaterSchema, DatabaseUnavailable, BasculeError: nothing was changed.
    """
    if is_later(dsn):
        raise LaterSchema(
            f"the schema is of a later version of bascule ({current(dsn)}; this one knows {head()})",
            hint="It was left as it is: each version's schema serves the parts of the version before, too.",
        )
    config = _config()
    config.attributes["dsn"] = dsn
    with _translating():
        command.upgrade(config, "head")
