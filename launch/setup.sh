#!/usr/bin/env bash
# Makes the project's Python environment, unless it is there, and prints its Python.
#
#   launch/setup.sh [EXTRA...]          e.g. `launch/setup.sh cuda`, for NVIDIA GPUs
#   launch/setup.sh --find [VERSION...] only prints the Python to make it with
#
#   CONVNET_PYTHON=python3.12   this Python, not the newest from 3.11 to 3.13 that runs
#   CONVNET_VENV=DIR            the environment is here, not in the project's .venv
#
# Extras add up: what is asked for once stays. What stops half-way is made again by the
# next run; two runs at once take turns. Only messages, on stderr, besides the result.
# It has to work in macOS's bash 3.2.
set -euo pipefail
unset CDPATH
# What these point to, pip would take for installed.
unset PYTHONHOME PYTHONPATH
root=$(cd "$(dirname "$0")/.." && pwd -P)
newline=$'\n'

say() { printf 'convnet: %s\n' "$*" >&2; }

fail() { # STATUS MESSAGE...
    local status=$1
    shift
    say "$@"
    exit "$status"
}

# Prints "3.13.0 /real/path" if this Python is one of VERSIONS, finished, with a global
# lock (most wheels need one) and able to make environments. The path is the real one,
# also of a pyenv shim or of an environment, which may be the one about to be removed.
probe() { # PYTHON VERSION...
    local python=$1
    shift
    "$python" -I -c '
import os, sys
info, wanted = sys.version_info, sys.argv[1:]
version = "%d.%d.%d" % info[:3]
if "%d.%d" % info[:2] not in wanted:
    sys.exit("is Python %s, not %s" % (version, ", ".join(wanted)))
if sys.implementation.name != "cpython" or "t" in sys.abiflags or info[3] != "final":
    sys.exit("is %s, not a release of ordinary CPython" % sys.version.split("\n")[0])
import ensurepip, ssl, venv
print(version, os.path.realpath(getattr(sys, "_base_executable", sys.executable)))
' "$@" </dev/null
}

# Of what a probe printed, the line that says what is wrong.
reason() { # OUTPUT
    case $1 in
    Traceback*) printf '%s' "${1##*"$newline"}" ;;
    *) printf '%s' "${1%%"$newline"*}" ;;
    esac
}

# All that may be one of VERSIONS, in the order to try them.
candidates() { # VERSION...
    local version versions=${PYENV_ROOT:-${HOME:-}/.pyenv}/versions
    for version in "$@"; do
        type -aP "python$version" || true
        (cd "$versions" && ls -d "$version".*) 2>/dev/null | sort -t. -k3,3nr |
            while read -r name; do echo "$versions/$name/bin/python"; done || true
    done
    type -aP python3 || true
}

# Sets `python` and `version` to the Python to make the environment with.
find_python() { # VERSION...
    local candidate found= tried=
    if [ -n "${CONVNET_PYTHON:-}" ]; then
        type -P "$CONVNET_PYTHON" >/dev/null ||
            fail 2 "CONVNET_PYTHON=$CONVNET_PYTHON: no such program." \
                "Name a Python ($*), or unset it."
        found=$(probe "$CONVNET_PYTHON" "$@" 2>&1) ||
            fail 2 "CONVNET_PYTHON=$CONVNET_PYTHON cannot be used:" \
                "$(reason "$found"). Name a Python ($*) that can make environments," \
                "or unset it."
    else
        while read -r candidate; do
            [ -x "$candidate" ] || continue
            found=$(probe "$candidate" "$@" 2>&1) && break
            tried="$tried
  $candidate: $(reason "$found")"
            found=
        done < <(candidates "$@")
        [ -n "$found" ] ||
            fail 1 "no Python ($*) runs here and can make environments. Install one," \
                "or name one: CONVNET_PYTHON=/path/to/python3.13.${tried:+ Tried:$tried}"
    fi
    found=${found##*"$newline"}
    version=${found%% *}
    python=${found#* }
}

if [ "${1:-}" = --find ]; then
    shift
    [ $# -gt 0 ] || set -- 3.13 3.12 3.11
    find_python "$@"
    echo "$python"
    exit
fi

venv=${CONVNET_VENV:-$root/.venv}
venv=${venv%/}
case $venv in /*) ;; *) venv=$PWD/$venv ;; esac
log=$venv/setup.log
# What was asked for. It is written first, and says that the folder is ours to remove.
asked=$venv/.convnet-extras
# It is written last: its lines are place, Python, pins and extras.
stamp=$venv/.convnet-stamp
extras=$*
# Neither can be moved, nor shared by two kinds of machine.
place="$HOSTTYPE $root $venv"
pins=$(cat "$root/pyproject.toml" "$root/launch/pins.txt" | cksum)
python= version=
[ -z "${CONVNET_PYTHON:-}" ] || find_python 3.13 3.12 3.11

# Is there an environment that was finished here, of this Python? An environment keeps
# its Python until CONVNET_PYTHON names another.
finished() {
    local old_place=
    old_python= old_pins= old_extras=
    [ -f "$stamp" ] && [ -x "$venv/bin/python" ] || return 1
    { read -r old_place && read -r old_python && read -r old_pins &&
        read -r old_extras || true; } <"$stamp"
    [ "$old_place" = "$place" ] || return 1
    [ -z "${CONVNET_PYTHON:-}" ] || [ "$old_python" = "$python" ]
}

# Does it hold all that is asked for?
complete() {
    local extra
    finished && [ "$old_pins" = "$pins" ] || return 1
    for extra in $extras; do
        case " $old_extras " in *" $extra "*) ;; *) return 1 ;; esac
    done
}

done_if_complete() {
    ! complete || { echo "$venv/bin/python" && exit; }
}

# Removes what is left of an environment, but nothing that somebody else needs.
clear_venv() {
    local name
    if [ "$venv" != "$root/.venv" ] && [ ! -f "$asked" ]; then
        for name in "$venv"/* "$venv"/.[!.]*; do
            [ ! -e "$name" ] || fail 2 "CONVNET_VENV=$CONVNET_VENV holds files that" \
                "launch/setup.sh did not make ($name): name a new or empty folder"
        done
    fi
    mkdir -p "$venv"
    [ -f "$asked" ] || : >"$asked"
    find "$venv/" -mindepth 1 -maxdepth 1 ! -name "${asked##*/}" -exec rm -rf {} +
}

logged() { # COMMAND...
    "$@" >>"$log" 2>&1 </dev/null && return
    tail -n 12 "$log" >&2
    fail 1 "could not set up $venv. The lines above are the end of $log." \
        "Mend what they name (network, a proxy or mirror in pip's configuration, disk" \
        "space), then run the same command again: it starts afresh."
}

done_if_complete
mkdir -p "${venv%/*}"
if [ -z "$python" ]; then
    if finished; then python=$old_python; else find_python 3.13 3.12 3.11; fi
fi
# The lock belongs to file descriptor 9: it ends with this process and its children,
# however they end. Python takes it, because macOS has no flock command.
exec 9>>"$venv.lock"
"$python" -I -c '
import fcntl, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
try:
    fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    print("convnet: waiting for another set-up of", sys.argv[1], file=sys.stderr)
    fcntl.flock(9, fcntl.LOCK_EX)
' "$venv"
done_if_complete
trap 'say "interrupted; the next run makes $venv again"; exit 130' INT

# A finished environment takes what is new; one that is not may hold anything.
if finished; then
    python=$old_python
    rm -f "$stamp"
    say "bringing $venv up to date"
else
    [ -n "$version" ] || find_python 3.13 3.12 3.11
    say "making $venv, of about 1 GB, with Python $version ($python)"
    clear_venv
    : >"$log"
    logged "$python" -I -m venv "$venv"
fi
for extra in $(cat "$asked" 2>/dev/null); do
    case " $extras " in *" $extra "*) ;; *) extras="$extras $extra" ;; esac
done
extras=${extras# }
echo "$extras" >"$asked"
say "installing the pinned packages${extras:+ ($extras)}; see $log"
cd "$root"
logged "$venv/bin/python" -I -m pip install --no-input --no-compile \
    --disable-pip-version-check --progress-bar off -c launch/pins.txt \
    -e ".${extras:+[${extras// /,}]}"
# pip would compile on one core, and tests too. Some libraries hold files for other
# versions of Python, which do not compile: that is no failure. Without bytecode, and
# where none may be written (PYTHONDONTWRITEBYTECODE), every start takes seconds more.
"$venv/bin/python" -I -m compileall -q -j 0 -x '/tests/' "$venv/lib" \
    >>"$log" 2>&1 </dev/null || true
printf '%s\n' "$place" "$python" "$pins" "$extras" >"$stamp.new"
mv "$stamp.new" "$stamp"
say "ready after $SECONDS s"
echo "$venv/bin/python"
