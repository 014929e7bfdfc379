#!/usr/bin/env bash
# Trains on a slice of Cloud TPU machines, on all of its workers.
#
#   gcloud auth login && gcloud config set project PROJECT
#   launch/tpu.sh create            # asks for the slice, and waits until it is there
#   launch/tpu.sh setup             # copies the project to all workers, sets it up
#   launch/tpu.sh train --config=experiments/imagenet_resnet50.py \
#       --workdir=/shared/runs/resnet50 --config.data.dir=/shared/imagenet
#   launch/tpu.sh stop              # all workers save the same step, and end
#   launch/tpu.sh delete            # gives the slice back: until then it costs
#
# Edit the values below, or set them in the environment. TPU_VERSION is
# v2-alpha-tpuv5-lite for v5e, v2-alpha-tpuv5 for v5p, v2-alpha-tpuv6e for v6e.
#
# The workdir is a path of a file system, not gs://: files in it are locked and renamed,
# which a bucket cannot do. With SHARED=HOST:/PATH (NFS, such as Filestore) each worker
# mounts that at /shared. With SHARED=gs://BUCKET gcsfuse mounts it, if the machines
# have it: no lock then keeps a second run out of a workdir, and renames are copies. Take
# NFS for workdirs, and a bucket for data at most.
#
# `train` ends when the run does, and fails if it fails. After `stop`, `train` goes on.
# Is the slice preempted, then `delete`, `create`, `setup` and `train` go on from the
# last checkpoint: see checkpoint.every_steps.
set -euo pipefail
unset CDPATH
name=${TPU_NAME:-convnet}
zone=${TPU_ZONE:-us-central2-b}
type=${TPU_TYPE:-v4-32}
version=${TPU_VERSION:-tpu-ubuntu2204-base}
shared=${SHARED:-}
# "--spot" is cheaper and may be taken away; "" is not.
read -ra spot <<<"${TPU_SPOT---spot}"
cd "$(dirname "$0")/.."

tpu() { gcloud compute tpus "$@" --zone="$zone"; }

everywhere() { # COMMAND
    tpu tpu-vm ssh "$name" --worker=all --command="$1"
}

create() {
    local state
    tpu queued-resources create "$name" --node-id="$name" \
        --accelerator-type="$type" --runtime-version="$version" ${spot[@]+"${spot[@]}"}
    while :; do
        state=$(tpu queued-resources describe "$name" --format='value(state.state)')
        echo "convnet: $name is $state" >&2
        case $state in
        ACTIVE) break ;;
        FAILED | SUSPENDING | SUSPENDED) exit 1 ;;
        esac
        sleep "${POLL_SECONDS:-30}"
    done
}

setup() {
    local archive mount=:
    archive=$(mktemp -d)/convnet.tar.gz
    tar --exclude=./.git --exclude=./.venv* --exclude=./runs --exclude=./site \
        --exclude=__pycache__ -czf "$archive" .
    tpu tpu-vm scp "$archive" "$name:convnet.tar.gz" --worker=all
    rm -r "${archive%/*}"
    case $shared in
    gs://*) mount="sudo mkdir -p /shared && sudo chown \$USER /shared && gcsfuse \
--implicit-dirs ${shared#gs://} /shared" ;;
    ?*) mount="sudo apt-get install -qy nfs-common && sudo mkdir -p /shared && \
sudo mount -t nfs $shared /shared" ;;
    esac
    # The machines' Python is 3.10: uv's is one that the project takes.
    everywhere "set -e; mkdir -p convnet; tar -xzf convnet.tar.gz -C convnet
mountpoint -q /shared || { $mount; }
[ -x .local/bin/uv ] || python3 -m pip install -q --user uv
.local/bin/uv python install -q 3.12
cd convnet
CONVNET_PYTHON=\$(\$HOME/.local/bin/uv python find 3.12) launch/setup.sh tpu"
}

train() { # FLAGS...
    # JAX finds the workers, and which of them it is on.
    everywhere "cd convnet && echo \$\$ >train.pid && exec .venv/bin/python -P -m convnet.main ${*@Q}"
}

case ${1:-} in
create | setup) "$1" ;;
train)
    shift
    train "$@"
    ;;
stop) everywhere "kill -TERM \$(cat convnet/train.pid)" ;;
delete) tpu queued-resources delete "$name" --force --quiet ;;
*)
    sed -n '2,/^set -euo/{/^set/d;s/^# \{0,1\}//;p;}' "launch/${0##*/}"
    exit 2
    ;;
esac
