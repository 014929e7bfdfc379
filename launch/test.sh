#!/usr/bin/env bash
# Runs the tests; the arguments are pytest's, seen from the project's folder.
#
#   launch/test.sh [-k NAME] [tests/test_models.py] [...]
set -euo pipefail
unset CDPATH
python=$("$(dirname "$0")/setup.sh" test)
unset PYTHONHOME
cd "$(dirname "$0")/.."
# Each worker compiles, with several threads and up to 2 GB: more than 4 gain nothing.
parallel="-n logical --maxprocesses 4"
for argument in "$@"; do
    case $argument in
    -n* | --numprocesses* | --pdb | --trace | --co | --collect-only | --version)
        parallel= ;;
    esac
done
# shellcheck disable=SC2086 # these are several words
exec "$python" -m pytest $parallel "$@"
