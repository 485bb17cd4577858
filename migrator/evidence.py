"""A mailbox that has moved, compared once more with what came in, message by message.

At the flip the digest of every message was written down. Here Dovecot is asked
for every message, as a client asks, and each is looked for: where it was put, or,
for its owner is at work, wherever it is now. The legacy server is asked which
messages of before the flip it has that nobody brought.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field

from bascule import log
from bascule.errors import BasculeError
from bascule.migrator.acts import Identity, recorded
from bascule.migrator.attempt import Attempt
from bascule.migrator.storage import evidence
from bascule.migrator.witness import Witness

AT_ONCE = 50  # bodies that are asked for at a time
NAMED = 100  # messages of a kind that are named; all are counted

#: Folder and UID here.
Place = tuple[str, int]


@dataclass(slots=True)
class Evidence:
    """What was found: counts, and the first messages of each kind by folder and UID at the legacy server."""

    compared: int = 0
    moved: int = 0
    gone: int = 0
    different: int = 0
    never_brought: int = 0
    named: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def name(self, kind: str, identity: Identity) -> None:
        """Name a message, as one of its kind."""
        names = self.named.setdefault(kind, [])
        if len(names) < NAMED:
            names.append(f"{identity[0]}: UID {identity[2]}")


def compare(
    came_in: Mapping[Identity, tuple[int, str]], places: Mapping[str, str], here: Mapping[Place, str]
) -> Evidence:
    """Look for each message that came in among those that are here.

    ``came_in``: bytes and digest by legacy identity. ``places``: the name here of each legacy folder.
    ``here``: digests by folder and UID. Digests may be cut; the shorter length counts.
    """
    found = Evidence()
    left = Counter(digest[:32] for digest in here.values())
    elsewhere: list[tuple[Identity, str]] = []
    for identity, (_, digest) in came_in.items():
        folder, _, uid = identity
        served = here.get((places.get(folder, folder), uid))
        if served is None:
            elsewhere.append((identity, digest[:32]))
        elif served[:32] == digest[:32]:
            found.compared += 1
            left[digest[:32]] -= 1
        else:
            found.different += 1
            found.name("different", identity)
    for identity, digest in elsewhere:
        if left[digest] > 0:
            left[digest] -= 1
            found.moved += 1
        else:
            found.gone += 1
            found.name("gone", identity)
    return found


def verify_again(attempt: Attempt) -> None:
    """Verify a mailbox that has moved, and record what was found.

    Raises:
        BasculeError: this host's Dovecot does not show the mailbox.
    """
    acts, account = attempt.acts, attempt.account
    folders = acts.verified_folders(account.id)
    came_in = {
        (recorded(name), uidvalidity, uid): (size, digest)
        for (name, uidvalidity, uid), (size, digest, _) in evidence(attempt.home).items()
    }
    places = {folder["name"]: folder.get("here", folder["name"]) for folder in folders}
    with attempt.local.witness(account.address) as witness:
        found = compare(came_in, places, dict(_served(witness)))
    if not came_in:
        found.notes.append("no digests were kept at the flip: it was made by a version that kept none")
    else:
        _look_for_what_was_never_brought(attempt, found, came_in)
    acts.record_verification(account.id, asdict(found))
    log.get().info(
        "verified again",
        address=str(account.address),
        compared=found.compared,
        different=found.different,
        gone=found.gone,
    )


def _served(witness: Witness) -> Iterator[tuple[Place, str]]:
    """The digest of every message that a client can read."""
    names = [name for name, attributes in witness.folders().items() if not attributes & {"\\noselect", "\\nonexistent"}]
    known = [(name, sorted(messages)) for name, _, messages in witness.messages(names)]
    for name, uids in known:
        for start in range(0, len(uids), AT_ONCE):
            for uid, digest in witness.digests(name, uids[start : start + AT_ONCE]).items():
                yield (name, uid), digest


def _look_for_what_was_never_brought(
    attempt: Attempt, found: Evidence, came_in: Mapping[Identity, tuple[int, str]]
) -> None:
    """Which messages of before the flip the legacy server has, and are neither in the evidence nor waived."""
    acts, account = attempt.acts, attempt.account
    flipped = acts.flipped_folders(account.id)
    if once := acts.once_at_flip(account.id):
        flipped.pop(once, None)
        found.notes.append(f"{once}: only what was in no other folder came; the legacy server was not asked for more")
    brought = {(each.folder, each.uidvalidity, each.uid) for each in acts.stragglers(account.id) if each.delivered}
    known = came_in.keys() | brought | acts.waived_messages(account.id)
    try:
        attempt.sessions.reserve(1)
        with attempt.sessions.open() as there:
            now = {each.name for each in there.layout().folders if each.selectable}
            wanted: dict[str, Sequence[int]] = {name: () for name in now if recorded(name) in flipped}
            for wire, opened, uids in Witness(there.wire, "the legacy server").uids(wanted):
                name = recorded(wire)
                for uid in sorted(uids):
                    identity = (name, opened.uidvalidity, uid)
                    if opened.uidvalidity == flipped[name][0] and uid < flipped[name][1] and identity not in known:
                        found.never_brought += 1
                        found.name("never_brought", identity)
    except BasculeError as error:
        found.notes.append(f"the legacy server was not asked: {error.message}")
