#!/bin/sh
# Set up, then try the Ansible roles on hosts that boot: see lab/roles.py.
set -eu
top=$(cd "$(dirname "$0")/.." && pwd)
venv=$(sh "$top/lab/setup.sh" hosts)
sh "$top/lab/trees.sh"
cd "$top"
exec "$venv/bin/python" -m bascule.lab.roles --checkout "$top" "$@"
