"""The tables of the first release, and the task queue's own schema."""

import psycopg
from alembic import op
from procrastinate.schema import SchemaManager

from bascule.schema import FOLDER

revision = "0001"
down_revision = None


def upgrade() -> None:
    driver = op.get_bind().connection.driver_connection
    assert isinstance(driver, psycopg.Connection)  # noqa: S101 (narrows the type)
    driver.execute("CREATE SCHEMA queue; SET search_path = queue")
    driver.execute(SchemaManager.get_schema().encode())
    driver.execute("SET search_path = bascule")
    driver.execute((FOLDER / "tables" / "0001_initial.sql").read_bytes())
