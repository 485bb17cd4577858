"""The running parts of bascule, and what they have found themselves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bascule.check.finding import Said, good, note, wrong
from bascule.check.registry import check
from bascule.check.subject import Subject


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
