#!/bin/sh
# Set up, then try the Ansible roles on hosts that boot: see lab/hosts.py. The
# namespaces end with the program, and with them whatever it started.
set -eu
top=$(cd "$(dirname "$0")/.." && pwd)
venv=$(sh "$top/lab/setup.sh")
sh "$top/lab/trees.sh"
cd "$top"
exec unshare --net --mount --pid --fork --kill-child --mount-proc --cgroup --propagation private \
    "$venv/bin/python" -m bascule.lab.hosts --checkout "$top" "$@"
