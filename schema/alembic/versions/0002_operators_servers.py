"""What 0.2.0 adds to the tables: one file for each concern, in the order of their names."""

import psycopg
from alembic import op

from bascule.schema import FOLDER

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    driver = op.get_bind().connection.driver_connection
    assert isinstance(driver, psycopg.Connection)  # noqa: S101 (narrows the type)
    for path in sorted((FOLDER / "tables").glob("0002_*.sql")):
        driver.execute(path.read_bytes())
