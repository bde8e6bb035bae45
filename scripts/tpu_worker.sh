#!/usr/bin/env bash
# scripts/tpu_vm.sh starts this on the workers of a TPU VM; it is not for a person.
#
#   bash scripts/tpu_worker.sh setup             Python, a virtual environment, jax[tpu]
#   bash scripts/tpu_worker.sh start CHIP ARG…   scripts/train.py ARG…, detached
#   bash scripts/tpu_worker.sh status            one line
#   bash scripts/tpu_worker.sh stop              SIGTERM: it saves and exits with 75
#   bash scripts/tpu_worker.sh log               what was printed, and what will be
#
# runs/tpu/ holds train.log, the pid of its shell and, at the end, the exit status.

set -euo pipefail
cd "$(dirname "$0")/.."
record=runs/tpu

# By its command too: after a reboot the number may be another program's.
running() {
    [ -f $record/pid ] &&
        [[ $(ps -o args= -p "$(cat $record/pid)" 2>/dev/null) == *scripts/train.py* ]]
}

setup() {
    # The images are Ubuntu 22.04, whose Python is 3.10.
    local python=python3
    if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        python=.venv/3.12/bin/python
        python3 -m pip install --quiet --user uv
        [ -x $python ] || python3 -m uv venv --quiet --seed --python 3.12 .venv/3.12
    fi
    # shellcheck source=scripts/venv.sh
    source scripts/venv.sh
    PYTHON=$python activate_venv requirements.txt
    # The libtpu of this jax: another one crashes or lies.
    local jax
    jax=$(python -c 'import importlib.metadata as m; print(m.version("jax"))')
    python -m pip install --quiet --disable-pip-version-check "jax[tpu]==$jax"
}

start() {
    local flags chip=$1
    shift
    if running; then
        echo "training already, pid $(cat $record/pid); tpu_vm.sh stop NAME ends it" >&2
        return 1
    fi
    mkdir -p $record
    rm -f $record/status
    # shellcheck disable=SC1090
    source .venv/*/bin/activate
    export PYTHONPATH=$PWD
    # Else a TPU that cannot be used is a silent run on the CPU.
    export JAX_PLATFORMS=${JAX_PLATFORMS:-tpu,cpu}
    flags=$(python scripts/xla_flags.py "$chip")
    eval "$flags"
    # `stop` signals both the shell and its train.py; the shell stays to write the status.
    # shellcheck disable=SC2016
    setsid nohup bash -c 'trap : TERM; python scripts/train.py "$@"; echo $? >"$0"' \
        $record/status "$@" >>$record/train.log 2>&1 </dev/null &
    echo $! >$record/pid
    echo "started, pid $!"
}

status() {
    if running; then
        echo "running, pid $(cat $record/pid)"
    elif [ -f $record/status ]; then
        echo "ended with $(cat $record/status)"
    elif [ -f $record/pid ]; then
        echo "killed"
    else
        echo "never started"
    fi
}

stop() {
    if running; then
        kill -TERM -- "-$(cat $record/pid)"
        echo "saving"
    else
        status
    fi
}

log() { exec tail -n 200 -F $record/train.log; }

case ${1:-} in
setup | start | status | stop | log) "$@" ;;
*)
    echo "tpu_worker.sh: '${1:-}' is none of setup, start, status, stop, log" >&2
    exit 2
    ;;
esac
