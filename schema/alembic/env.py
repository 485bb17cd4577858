"""Alembic's entry point: run the revisions, then every replaceable file.

Statements go to psycopg directly: the files hold many statements and literal
percent signs, which SQLAlchemy's layer would take for parameters.
"""

import psycopg
from alembic import context
from sqlalchemy import Connection, create_engine

from bascule.schema import FOLDER, REPLACEABLE, written


def run(connection: Connection, sql: str) -> None:
    driver = connection.connection.driver_connection
    assert isinstance(driver, psycopg.Connection)  # noqa: S101 (narrows the type)
    driver.execute(sql.encode())


dsn: str = context.config.attributes["dsn"]
engine = create_engine("postgresql+psycopg://", creator=lambda: psycopg.connect(dsn))
try:
    with engine.connect() as connection:
        run(connection, "SET lock_timeout = '10s'; CREATE SCHEMA IF NOT EXISTS bascule; SET search_path = bascule")
        context.configure(connection=connection, version_table_schema="bascule")
        with context.begin_transaction():
            context.run_migrations()
            for name in REPLACEABLE:
                run(connection, (FOLDER / name).read_text())
            run(connection, f"COMMENT ON SCHEMA bascule IS '{written()}'")
        connection.commit()
finally:
    engine.dispose()
