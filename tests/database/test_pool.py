"""Connections that are kept: one that is gone is not noticed by who asks, one that hangs is not waited for."""

from __future__ import annotations

import os
import signal

import pytest

from bascule import database
from bascule.database import Pool, value
from bascule.errors import DatabaseUnavailable
from bascule.lab.postgres import Postgres


def backend(pool: Pool) -> int:
    with pool.connection() as connection:
        return int(value(connection, "SELECT pg_backend_pid()"))


def test_a_connection_that_the_server_has_ended_is_replaced(postgres: Postgres) -> None:
    pool = Pool(postgres.dsn("postgres"), 1)
    other = Pool(postgres.dsn("postgres"), 1)
    before = backend(pool)
    with other.connection() as connection:
        assert value(connection, "SELECT pg_terminate_backend(%s, 10000)", before)
    assert backend(pool) != before


def test_a_server_that_hangs_is_waited_for_no_longer_than_said(
    postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "PATIENCE", 1.0)
    pool = Pool(postgres.dsn("postgres"), 1)
    hung = backend(pool)
    os.kill(hung, signal.SIGSTOP)
    try:
        with pytest.raises(DatabaseUnavailable):
            backend(pool)
    finally:
        os.kill(hung, signal.SIGCONT)
    assert backend(pool) != hung
