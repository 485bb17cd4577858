"""What came in, and what is here now."""

from __future__ import annotations

import gzip
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from bascule.errors import LegacyUnavailable
from bascule.migrator import evidence as module
from bascule.migrator.acts import Straggler
from bascule.migrator.attempt import Attempt
from bascule.migrator.evidence import NAMED, compare, verify_again
from bascule.migrator.storage import EVIDENCE, evidence
from bascule.migrator.witness import Opened

A, B, C = ("a" * 64, "b" * 64, "c" * 64)
CAME_IN = {("Old", 7, 1): (3, A[:32]), ("Old", 7, 2): (3, B[:32]), ("INBOX", 7, 1): (3, A[:32])}
PLACES = {"Old": "New", "INBOX": "INBOX"}


def test_messages_are_found_where_they_were_put() -> None:
    found = compare(CAME_IN, PLACES, {("New", 1): A, ("New", 2): B, ("INBOX", 1): A, ("INBOX", 9): C})
    assert (found.compared, found.moved, found.gone, found.different) == (3, 0, 0, 0)


def test_messages_that_their_owner_moved_are_found_and_counted_once() -> None:
    found = compare(CAME_IN, PLACES, {("New", 1): A, ("Trash", 5): B, ("INBOX", 1): A})
    assert (found.compared, found.moved, found.gone) == (2, 1, 0)
    # One copy does not stand for two messages, nor one that was found in its place.
    found = compare(CAME_IN, PLACES, {("New", 1): A})
    assert (found.compared, found.moved, found.gone) == (1, 0, 2)
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


@dataclass
class Server:
    """Both servers: what the witness shows of the mailbox here, and the UIDs of the legacy one."""

    here: dict[str, dict[int, str]] = field(default_factory=dict)
    there: dict[str, tuple[int, set[int]]] = field(default_factory=dict)
    asked_at_once: list[int] = field(default_factory=list)
    wire: None = None

    def folders(self) -> dict[str, frozenset[str]]:
        return {name: frozenset() for name in self.here} | {"parent": frozenset({"\\noselect"})}

    def messages(self, names: Sequence[str]) -> Iterator[tuple[str, Opened, dict[int, object]]]:
        for name in names:
            yield name, Opened(0, 7), dict.fromkeys(self.here[name])

    def digests(self, name: str, uids: Sequence[int]) -> dict[int, str]:
        self.asked_at_once.append(len(uids))
        return {uid: self.here[name][uid] for uid in uids}

    def layout(self) -> Any:
        return SimpleNamespace(folders=[SimpleNamespace(name=name, selectable=True) for name in self.there])

    def uids(self, wanted: Mapping[str, Sequence[int]]) -> Iterator[tuple[str, Opened, set[int]]]:
        for name in wanted:
            validity, uids = self.there[name]
            yield name, Opened(len(uids), validity), uids


def verified(
    monkeypatch: pytest.MonkeyPatch, home: Path, server: Server, came_in: str, *, away: bool = False, once: str = ""
) -> dict[str, Any]:
    """What verify_again() records, with the witness on either side played by ``server``."""
    if came_in:
        with gzip.open(home / EVIDENCE, "wt") as file:
            file.write(came_in)
    recorded: list[dict[str, Any]] = []

    @contextmanager
    def session(*_: object) -> Iterator[Server]:
        if away:
            raise LegacyUnavailable("it is away")
        yield server

    @contextmanager
    def witness(*_: object) -> Iterator[Server]:
        yield server

    acts = SimpleNamespace(
        once_at_flip=lambda _: once,
        verified_folders=lambda _: [{"name": "Old", "here": "New"}, {"name": "INBOX"}],
        flipped_folders=lambda _: {"Old": (7, 10), "INBOX": (7, 5), "removed": (7, 3)},
        stragglers=lambda _: [Straggler("INBOX", 7, 4, True), Straggler("Old", 7, 9, False)],
        waived_messages=lambda _: frozenset({("Old", 7, 8)}),
        record_verification=lambda _, result: recorded.append(result),
    )
    monkeypatch.setattr(module, "Witness", lambda *_: server)
    attempt = SimpleNamespace(
        acts=acts,
        account=SimpleNamespace(id=1, address="alice@lab.test"),
        home=home,
        local=SimpleNamespace(witness=witness),
        sessions=SimpleNamespace(reserve=lambda _: 1, open=session),
    )
    verify_again(cast(Attempt, attempt))
    (result,) = recorded
    return result


CAME = "".join(
    f"{folder}\t7\t{uid}\t3\t{digest[:32]}\t1000000000\n"
    for folder, uid, digest in (("Old", 1, A), ("Old", 2, B), ("INBOX", 1, C))
)


def test_every_message_is_read_and_what_was_never_brought_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server(
        here={"New": {1: A, 2: B}, "INBOX": {1: C} | dict.fromkeys(range(2, 103), A)},
        there={"Old": (7, {1, 2, 3, 8, 9, 10}), "INBOX": (8, {1, 2, 3}), "new": (7, {1})},
    )
    found = verified(monkeypatch, tmp_path, server, CAME)
    assert (found["compared"], found["different"], found["gone"], found["moved"]) == (3, 0, 0, 0)
    # 8 is waived, 10 came late, INBOX was numbered anew; 9 was staged and never brought.
    assert found["named"] == {"never_brought": ["Old: UID 3", "Old: UID 9"]}
    assert found["never_brought"] == 2
    assert found["notes"] == []
    assert sum(server.asked_at_once) == 104
    assert max(server.asked_at_once) == 50


def test_a_straggler_that_was_brought_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(here={"New": {}, "INBOX": {}}, there={"INBOX": (7, {1, 4})})
    assert verified(monkeypatch, tmp_path, server, CAME)["never_brought"] == 0


def test_without_the_legacy_server_the_rest_is_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(here={"New": {1: A, 2: B}, "INBOX": {1: C}})
    found = verified(monkeypatch, tmp_path, server, CAME, away=True)
    assert found["compared"] == 3
    assert found["notes"] == ["the legacy server was not asked: it is away"]


def test_a_move_of_which_nothing_was_kept_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = verified(monkeypatch, tmp_path, Server(here={"INBOX": {1: C}}), "")
    assert found["compared"] == found["never_brought"] == 0
    assert "no digests were kept" in found["notes"][0]


def test_of_what_came_in_part_the_legacy_server_is_not_asked_for_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server(here={"New": {1: A, 2: B}, "INBOX": {1: C}}, there={"Old": (7, {1, 2, 3}), "INBOX": (7, {1, 2})})
    found = verified(monkeypatch, tmp_path, server, CAME, once="Old")
    assert found["named"] == {"never_brought": ["INBOX: UID 2"]}
    assert found["notes"] == ["Old: only what was in no other folder came; the legacy server was not asked for more"]
