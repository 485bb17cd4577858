"""A home is made for who moves, and never for who has moved."""

from __future__ import annotations

from pathlib import Path

import pytest

from bascule.migrator.attempt import HomeGone, InUse, exclusively


def test_a_home_is_made_for_who_moves(tmp_path: Path) -> None:
    with exclusively(tmp_path / "lab.test" / "alice"):
        assert (tmp_path / "lab.test" / "alice").is_dir()


def test_a_home_that_is_not_there_is_not_made_for_who_has_moved(tmp_path: Path) -> None:
    with pytest.raises(HomeGone, match="is not there") as error, exclusively(tmp_path / "alice", has_moved=True):
        pass
    assert "mounted" in error.value.hint
    assert not (tmp_path / "alice").exists()


def test_one_worker_at_a_time(tmp_path: Path) -> None:
    with exclusively(tmp_path), pytest.raises(InUse), exclusively(tmp_path):
        pass
    with exclusively(tmp_path):
        pass
