#!/bin/sh
# Set up, then every check: style, types, tests. Arguments go to pytest. Two
# files at a time are played, each in a lab of its own: mostly, a lab waits.
set -eu
top=$(cd "$(dirname "$0")/.." && pwd)
. "$top/lab/debian.sh"
# A container may boot no hosts: the tests that need them are skipped there, and named at the end.
if may_mount; then
    venv=$(sh "$top/lab/setup.sh" hosts)
    sh "$top/lab/trees.sh" trixie
else
    venv=$(sh "$top/lab/setup.sh" tests)
fi
cd "$top"
"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .
"$venv/bin/mypy"
"$venv/bin/mypy" hooks/bascule-checkpassword
exec "$venv/bin/python" -m pytest --numprocesses 2 --dist loadfile "$@"
