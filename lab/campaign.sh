#!/bin/sh
# The fault campaign: sets up what it needs, then plays rounds. Arguments go to bascule.lab.campaign.
# In a mount namespace of its own, for the small disk that is filled.
set -eu
top=$(cd "$(dirname "$0")/.." && pwd)
venv=$(sh "$top/lab/setup.sh")
cd /
exec unshare --mount --propagation private "$venv/bin/python" -m bascule.lab.campaign "$@"
