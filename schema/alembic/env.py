"""Alembic's entry point: run the revisions, then every replaceable file.

Statements go to psycopg directly: the files hold many statements and literal
percent signs, which SQLAlchemy's layer would take for parameters.
"""

import random
import time

import psycopg
from alembic import context
from sqlalchemy import Connection, create_engine

from bascule.errors import BasculeError
from bascule.schema import FOLDER, REPLACEABLE, written

PATIENCE = 10.0  # seconds
GRASP = 500  # milliseconds, of which PostgreSQL's deadlock_timeout, 1 s, is more

LOCK_ALL = """
DO $$
DECLARE
    relations text := (SELECT string_agg(oid::regclass::text, ', ' ORDER BY oid) FROM pg_class
                        WHERE relnamespace = 'bascule'::regnamespace AND relkind IN ('r', 'v'));
BEGIN
    IF relations IS NOT NULL THEN
        EXECUTE 'LOCK TABLE ' || relations || ' IN ACCESS EXCLUSIVE MODE';
    END IF;
END
$$
"""


def driver_of(connection: Connection) -> psycopg.Connection:
    driver = connection.connection.driver_connection
    assert isinstance(driver, psycopg.Connection)  # noqa: S101 (narrows the type)
    return driver


def lock_all(driver: psycopg.Connection) -> None:
    """Lock all tables and views, or let go of all and try again.

    One who holds some and waits for others can be waited for by a part that holds those: a deadlock, in which
    PostgreSQL kills the one or the other. We let go before it looks.

    Raises:
        BasculeError: somebody holds one of them for too long.
    """
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            with driver.transaction():
                driver.execute(f"SET LOCAL statement_timeout = {GRASP}".encode())
                driver.execute(LOCK_ALL)
                driver.execute("SET LOCAL statement_timeout TO DEFAULT")
                return
        except (psycopg.errors.QueryCanceled, psycopg.errors.LockNotAvailable) as error:
            if time.monotonic() > deadline:
                raise BasculeError(
                    f"lock timeout: the schema was in use for {PATIENCE:.0f} seconds without a break",
                    hint="Nothing was changed. Somebody has a transaction open: see pg_stat_activity, and try again.",
                ) from error
            time.sleep(random.uniform(0.01, 0.1))  # noqa: S311 (nothing secret)


def replace(driver: psycopg.Connection, name: str) -> None:
    """Run one of the files of what can be replaced.

    Raises:
        BasculeError: a view would lose a column, or something of an operator's stands in the way.
    """
    try:
        driver.execute((FOLDER / name).read_bytes())
    except (psycopg.errors.InvalidTableDefinition, psycopg.errors.DependentObjectsStillExist) as error:
        details = " ".join(each for each in (error.diag.message_primary, error.diag.message_detail) if each)
        raise BasculeError(
            f"a view or function of ours cannot be brought to this version ({name}): {details}",
            hint="Nothing was changed, and nothing is dropped that others may stand on. Was it changed by hand? "
            "Then drop it, with what stands on it, and upgrade again.",
        ) from error


dsn: str = context.config.attributes["dsn"]
engine = create_engine("postgresql+psycopg://", creator=lambda: psycopg.connect(dsn))
try:
    with engine.connect() as connection:
        driver = driver_of(connection)
        driver.execute("SET lock_timeout = '10s'; CREATE SCHEMA IF NOT EXISTS bascule; SET search_path = bascule")
        lock_all(driver)
        context.configure(connection=connection, version_table_schema="bascule")
        with context.begin_transaction():
            context.run_migrations()
            for name in REPLACEABLE:
                replace(driver, name)
            driver.execute(f"COMMENT ON SCHEMA bascule IS '{written()}'".encode())
        connection.commit()
finally:
    engine.dispose()
