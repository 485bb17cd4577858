#!/bin/sh
# Bring the catalogues up to date with the templates, after a change of text.
# Then translate what is new (msgstr "") or marked "fuzzy".
set -eu
cd "$(dirname "$0")/.."
pot=$(mktemp)
trap 'rm -f "$pot"' EXIT
pybabel extract --mapping locale/babel.cfg --no-location --sort-output --omit-header --output "$pot" .
for language in fr ar; do
    pybabel update --no-wrap --no-fuzzy-matching --ignore-obsolete --omit-header --locale "$language" \
        --input-file "$pot" --output-file "locale/$language.po"
done
