#!/usr/bin/env bash
# Builds the site into site/, ready to be opened as files; the arguments are those of
# `mkdocs build`. A broken link, or whatever else MkDocs warns of, is an error.
set -euo pipefail
unset CDPATH
python=$("$(dirname "$0")/setup.sh" docs)
unset PYTHONHOME
cd "$(dirname "$0")/.."
# Not --quiet: what is not shown is not counted, and no error.
# The theme advertises its successor on each run, in the words of a warning.
export NO_MKDOCS_2_WARNING=1
exec "$python" -m mkdocs build --strict "$@"
