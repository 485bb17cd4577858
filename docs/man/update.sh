#!/bin/sh
# Write the man pages anew, after a change of the command line. Needs bascule[test] installed.
set -eu
cd "$(dirname "$0")"
rm -f ./*.1
click-man bascule --target . --man-date "$(date -u +%F)"
