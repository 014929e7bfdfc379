#!/usr/bin/env bash
# Trains, evaluates and reports on this machine; the first run sets up an environment.
#
#   launch/local.sh --config=experiments/digits.py [--workdir=runs/digits] [...]
#   launch/local.sh --help              all flags, and all keys of a config
#
# The flags are those of `python -m convnet.main`. launch/setup.sh says which Python
# it takes, and where the environment goes.
set -euo pipefail
unset CDPATH
python=$("$(dirname "$0")/setup.sh")
# It would send the environment's Python to another one's standard library.
unset PYTHONHOME
# -P: what lies in the current folder is data, whatever its name.
exec "$python" -P -m convnet.main "$@"
