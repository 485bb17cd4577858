#!/bin/sh
# Set up, then play with several nodes: see lab/nodes.py. The namespaces end with
# the program, and with them whatever it started.
set -eu
top=$(cd "$(dirname "$0")/.." && pwd)
venv=$(sh "$top/lab/setup.sh")
cd "$top"
exec unshare --net --mount --pid --fork --kill-child --mount-proc --propagation private \
    "$venv/bin/python" -m bascule.lab.nodes "$@"
