"""The running parts of bascule, and what they have found themselves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bascule.check.finding import Said, first, good, note, wrong
from bascule.check.registry import check
from bascule.check.subject import Subject

NAMED = 20  # addresses that are named; all are counted


@check("bascule.parts", "bascule", needs=("database",))
def parts(subject: Subject) -> Iterator[Said]:
    """Whether policy daemon, authenticator and a worker run."""
    yield from check_parts(subject.parts)


def check_parts(parts: Sequence[tuple[str, str, bool]]) -> Iterator[Said]:
    """``parts``: name of a part, its node, whether it gave a sign of life lately."""
    a_worker_lives = any(part == "worker" and alive for part, _, alive in parts)
    for part, node, alive in parts:
        if alive:
            continue
        if part == "worker" and a_worker_lives:
            # It has another number when it is started again.
            yield note(f"{node} ended suddenly; others work", "See the workers' logs.")
        else:
            yield wrong(
                f"{part} on {node} gave no sign of life lately", "Start it, or see its log; nobody waits for it."
            )
    for part in ("policy_daemon", "authenticator", "worker"):
        running = [node for name, node, alive in parts if name == part and alive]
        if running:
            yield good(f"{part} runs on {', '.join(sorted(running))}")
        else:
            yield wrong(f"no {part} runs anywhere", f"Start bascule-{part.replace('_', '-')}.")


@check("bascule.unreadable", "bascule", needs=("user", "database"))
def unreadable(subject: Subject) -> Iterator[Said]:
    """Messages and folders of the user that the legacy server did not give when they were to be copied."""
    if subject.connection is None:
        return
    rows = subject.connection.execute(
        "SELECT folder, uid, reason FROM bascule.unreadable WHERE address = %s AND waived_at IS NULL ORDER BY 1, 2",
        (str(subject.account.address),),
    ).fetchall()
    for folder, uid, reason in rows:
        what = f"the folder {folder!r}" if uid is None else f"UID {uid} of the folder {folder!r}"
        yield wrong(
            f"the legacy server did not give {what}: {reason}",
            f"Have it mended there, or move without it: bascule waive-messages {subject.account.address}.",
        )


@check("bascule.findings", "bascule", needs=("database",), stops=True)
def findings(subject: Subject) -> Iterator[Said]:
    """What the nodes have found wrong by themselves."""
    if subject.connection is None:
        return
    rows = subject.connection.execute(
        "SELECT node, level, text, remedy FROM bascule.findings WHERE domain = %s OR domain IS NULL "
        "ORDER BY level DESC, node, name",
        (subject.domain if subject.has(("domain",)) else None,),
    ).fetchall()
    for node, level, text, remedy in rows:
        yield (wrong if level == "wrong" else note)(f"{node} says: {text}", remedy)


@check("bascule.passwords", "bascule", needs=("database", "domain"))
def passwords(subject: Subject) -> Iterator[Said]:
    """Who could not log in here after the flip, for no password is proved or imported."""
    if subject.connection is None:
        return
    rows = subject.connection.execute(
        "SELECT address, state = 'local' FROM bascule.mailboxes "
        "WHERE domain = %s AND state <> 'legacy' AND password = 'none' ORDER BY address",
        (subject.domain,),
    ).fetchall()
    moved = [address for address, has_moved in rows if has_moved]
    moving = [address for address, has_moved in rows if not has_moved]
    if moved:
        yield note(
            f"moved without a password: {first(moved, NAMED)}",
            "Their first login here is asked about at the legacy server and sets it; before the close, have them "
            "log in, or bring their hashes: bascule password import.",
        )
    if moving:
        yield note(
            f"on the move without a password: {first(moving, NAMED)}",
            "Bring their hashes (bascule password import), have them log in here, or move them --without-password.",
        )
    if not rows:
        yield good("everybody who moves or has moved can log in here")
