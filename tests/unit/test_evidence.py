"""What came in, and what is here now."""

from __future__ import annotations

from pathlib import Path

from bascule.migrator.evidence import NAMED, compare
from bascule.migrator.storage import EVIDENCE, evidence

A, B, C = ("a" * 64, "b" * 64, "c" * 64)
CAME_IN = {("Old", 7, 1): (3, A[:32]), ("Old", 7, 2): (3, B[:32]), ("INBOX", 7, 1): (3, A[:32])}
PLACES = {"Old": "New", "INBOX": "INBOX"}


def test_messages_are_found_where_they_were_put() -> None:
    found = compare(CAME_IN, PLACES, {("New", 1): A, ("New", 2): B, ("INBOX", 1): A, ("INBOX", 9): C})
    assert (found.compared, found.moved, found.gone, found.different) == (3, 0, 0, 0)


def test_messages_that_their_owner_moved_are_found_and_counted_once() -> None:
    found = compare(CAME_IN, PLACES, {("New", 1): A, ("Trash", 5): B, ("INBOX", 1): A})
    assert (found.compared, found.moved, found.gone) == (2, 1, 0)
    # One copy does not stand for two messages.
    found = compare(CAME_IN, PLACES, {("Trash", 1): A, ("Trash", 5): B})
    assert (found.compared, found.moved, found.gone) == (0, 2, 1)


def test_messages_that_are_gone_or_changed_are_named() -> None:
    found = compare(CAME_IN, PLACES, {("New", 1): C, ("INBOX", 1): A})
    assert (found.compared, found.different, found.gone) == (1, 1, 1)
    assert found.named == {"different": ["Old: UID 1"], "gone": ["Old: UID 2"]}


def test_not_more_are_named_than_can_be_read() -> None:
    found = compare({("Old", 7, uid): (1, A) for uid in range(1, NAMED + 50)}, PLACES, {})
    assert found.gone == NAMED + 49
    assert len(found.named["gone"]) == NAMED


def test_a_home_without_evidence_has_none(tmp_path: Path) -> None:
    assert evidence(tmp_path) == {}
    assert not (tmp_path / EVIDENCE).exists()
