"""Faults put into the engine on purpose, one at a time: how many of them do the unit tests find?

A mutant is a module with one change: a comparison turned round, a condition
that always or never holds, a statement left out. Each is tried with the unit
tests of its module; one that passes them all has survived, and is printed.

``python tests/mutants.py [--all] [--module NAME] [--least 0.9]``: by default a
sample that is the same in every run; exit status 1 if fewer are killed than ``--least``.
"""

from __future__ import annotations

import argparse
import ast
import copy
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
#: The modules, and the unit tests that are to find what is wrong with them.
MODULES = {
    "migrator/verification.py": ["test_verification.py"],
    "migrator/witness.py": ["test_witness.py"],
    "migrator/evidence.py": ["test_evidence.py"],
    "bascule/imap/names.py": ["test_names.py"],
    "migrator/maildir.py": ["test_maildir.py"],
    "migrator/copying.py": ["test_copying.py"],
    "migrator/sweep.py": ["test_sweep.py"],
    "migrator/returning.py": ["test_returning.py", "test_return_plan.py"],
    "migrator/return_plan.py": ["test_return_plan.py"],
}
SAMPLE = 28  # mutants of each module
TIMEOUT = 60.0  # seconds for one mutant; one that hangs is found

_TURNED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}
_OTHER: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}


@dataclass(frozen=True, slots=True)
class Mutant:
    """One change of a module: where, what, and the whole text with it."""

    module: str
    line: int
    what: str
    text: str


def mutants(module: str) -> Iterator[Mutant]:
    """Every mutant of a module."""
    source = (ROOT / module).read_text()
    tree = ast.parse(source)
    lines = source.splitlines()
    for number, node in enumerate(ast.walk(tree)):
        for what, change in _changes(node):
            mutated = copy.deepcopy(tree)
            change(next(each for place, each in enumerate(ast.walk(mutated)) if place == number))
            line = getattr(node, "lineno", 0)
            yield Mutant(
                module, line, f"{what}: {lines[line - 1].strip()}", ast.unparse(ast.fix_missing_locations(mutated))
            )


def _changes(node: ast.AST) -> Iterator[tuple[str, Callable[[Any], object]]]:
    match node:
        case ast.Compare(ops=[operator]) if type(operator) in _TURNED:
            yield "turned", lambda it: it.ops.__setitem__(0, _TURNED[type(it.ops[0])]())
        case ast.BoolOp():
            yield "and/or", lambda it: setattr(it, "op", ast.Or() if isinstance(it.op, ast.And) else ast.And())
        case ast.BinOp(op=operator) if type(operator) in _OTHER and not _is_text(node):
            yield "other operator", lambda it: setattr(it, "op", _OTHER[type(it.op)]())
        case ast.UnaryOp(op=ast.Not()):
            yield "without not", lambda it: setattr(it, "operand", ast.UnaryOp(ast.Not(), it.operand))
        case ast.If():
            yield "never", lambda it: setattr(it, "test", ast.Constant(False))
            yield "always", lambda it: setattr(it, "test", ast.Constant(True))
    for field in ("body", "orelse", "finalbody"):
        statements = getattr(node, field, None)
        for place, statement in enumerate(statements if isinstance(statements, list) else ()):
            if _can_go(statement):
                first = ast.unparse(statement).splitlines()[0][:80]
                yield f"left out (line {statement.lineno}: {first})", partial(_leave_out, field=field, place=place)


def _leave_out(node: Any, field: str, place: int) -> None:
    getattr(node, field)[place] = ast.Pass()


def _is_text(node: ast.BinOp) -> bool:
    """Whether an operator joins texts or types, where the other one makes no sense."""
    sides = (node.left, node.right)
    return any(
        isinstance(each, ast.JoinedStr)
        or (isinstance(each, ast.Constant) and isinstance(each.value, str | bytes | None))
        for each in sides
    )


def _can_go(statement: ast.stmt) -> bool:
    """Whether a statement does something that a test can miss; a log line is for people."""
    if isinstance(statement, ast.Raise | ast.Continue | ast.Break | ast.AugAssign | ast.Delete):
        return True
    if not isinstance(statement, ast.Expr) or not isinstance(statement.value, ast.Call):
        return False
    words = ast.unparse(statement.value.func)
    return not words.startswith(("log.", "self._log", "logger.", "metrics."))


class Tree:
    """A copy of the project, in which one mutant at a time is tried."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        ignored = shutil.ignore_patterns(".*", "build", "__pycache__", "*.egg-info")
        shutil.copytree(ROOT, folder, symlinks=True, ignore=ignored)

    def kills(self, mutant: Mutant) -> bool:
        """Whether a test fails with it."""
        path = self._folder / mutant.module
        former = path.read_text()
        path.write_text(mutant.text)
        try:
            return not self.passes(mutant.module)
        finally:
            path.write_text(former)

    def passes(self, module: str) -> bool:
        """Whether the tests of a module pass."""
        files = [f"tests/unit/{name}" for name in MODULES[module] if (self._folder / "tests/unit" / name).exists()]
        command = [sys.executable, "-B", "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *files]
        environment = os.environ | {"HYPOTHESIS_MAX_EXAMPLES": "30", "PYTHONDONTWRITEBYTECODE": "1"}
        try:
            done = subprocess.run(
                command, cwd=self._folder, env=environment, capture_output=True, timeout=TIMEOUT, check=False
            )
        except subprocess.TimeoutExpired:
            return False
        return done.returncode == 0


def chosen(*, everything: bool, only: str | None) -> list[Mutant]:
    """The mutants that are tried."""
    found: list[Mutant] = []
    for module in MODULES:
        if (ROOT / module).exists() and (only is None or only in module):
            every = list(mutants(module))
            sample = random.Random(1).sample(every, min(SAMPLE, len(every)))  # noqa: S311 (the same in every run)
            found += every if everything else sorted(sample, key=lambda mutant: mutant.line)
    return found


def main() -> int:
    """Try them; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every mutant, not a sample")
    parser.add_argument("--module", help="only modules with this in their path")
    parser.add_argument("--least", type=float, default=0.9, help="the share that must be killed")
    options = parser.parse_args()
    began = time.monotonic()
    tried, killed = Counter[str](), Counter[str]()
    processes = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="bascule-mutants-") as name, ThreadPoolExecutor(processes) as pool:
        trees: SimpleQueue[Tree] = SimpleQueue()
        for number in range(processes):
            trees.put(Tree(Path(name) / str(number)))
        whole = trees.get()
        to_try = chosen(everything=options.all, only=options.module)
        for module in dict.fromkeys(mutant.module for mutant in to_try):
            if not whole.passes(module):
                sys.stdout.write(f"the tests of {module} fail without any mutant\n")
                return 2
        trees.put(whole)

        def attempt(mutant: Mutant) -> tuple[Mutant, bool]:
            tree = trees.get()
            try:
                return mutant, tree.kills(mutant)
            finally:
                trees.put(tree)

        for mutant, is_killed in pool.map(attempt, to_try):
            tried[mutant.module] += 1
            killed[mutant.module] += is_killed
            if not is_killed:
                sys.stdout.write(f"survived: {mutant.module}:{mutant.line} {mutant.what}\n")
                sys.stdout.flush()
    for module, number in tried.items():
        sys.stdout.write(f"{module}: {killed[module]} of {number} killed\n")
    share = killed.total() / max(tried.total(), 1)
    seconds = time.monotonic() - began
    sys.stdout.write(f"{killed.total()} of {tried.total()} killed ({share:.0%}) in {seconds:.0f} s\n")
    return int(share < options.least)


if __name__ == "__main__":
    sys.exit(main())
