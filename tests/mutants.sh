#!/bin/sh
# Set up, then put faults into the engine and see the unit tests find them: see tests/mutants.py, which takes the arguments.
set -eu
top=$(cd "$(dirname "$0")/.." && pwd)
venv=$(sh "$top/lab/setup.sh")
cd "$top"
exec "$venv/bin/python" tests/mutants.py "$@"
