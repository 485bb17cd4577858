#!/bin/sh
# The whole story on real servers in a throw-away directory: sets up what it needs, then tells it.
set -eu
top=$(cd "$(dirname "$0")/.." && pwd)
venv=$(sh "$top/lab/setup.sh" story)
cd /
exec "$venv/bin/python" -m bascule.lab.story
