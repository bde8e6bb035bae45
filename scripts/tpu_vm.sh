#!/usr/bin/env bash
# A Cloud TPU VM, one host or many, from its creation to its end. On your own machine, with gcloud:
#
#   vm() { bash scripts/tpu_vm.sh "$1" mine --zone=us-east5-a --type=v5p-32 --spot "${@:2}"; }
#   vm create                       asks for it as a queued resource and waits: hours, at times
#   vm setup                        copies this working tree to all workers and installs it there
#   vm run --config=configs/olmoe/1b_7b.py --workdir=/mnt/runs/olmoe
#   vm logs                         follows what worker 0 prints; Ctrl-C ends only the following
#   vm status                       the queued resource and what each worker does
#   vm resume --config=… --workdir=…     after a preemption: all of the above that is needed
#   vm stop                         training saves and exits with 75
#   vm delete                       the end of the bill, and of the VM's own disks
#
# usage: tpu_vm.sh COMMAND NAME --zone=ZONE [--type=TYPE] [--spot] [--project=PROJECT]
#                  [--runtime=VERSION] [--worker=N] [--dry_run] [ARGUMENTS OF train.py]
#   --type      accelerator type, for create, run and resume: v4-8, v5litepod-16 (v5e), v5p-32,
#               v6e-8; the number counts cores on v4 and v5p, chips on the others
#   --spot      cheap, and taken away at any time
#   --runtime   the image, if not the usual one for JAX on that chip
#   --worker    whose log (0)
#   --dry_run   prints the commands, as a shell would take them, and runs none; those of resume as
#               for a VM that was preempted
#
# For more than one worker gcloud wants its key in your agent: ssh-add ~/.ssh/google_compute_engine
#
# A run lives in its --workdir, and the VM's disks go with the VM. So --workdir is an absolute path
# of a disk that outlives it and that all workers see: a Filestore share, or a bucket mounted with
# gcsfuse, at the same place on each (for one host a data disk will do). There `resume` is exact: it
# goes on from the last checkpoint. A job that lasts is one that is asked for again and again:
#
#   while sleep 300; do vm resume --config=… --workdir=…; done
#
# `resume` deletes and asks anew for a resource that is SUSPENDED (preempted) or FAILED, waits for
# one in the queue, sets up and runs. It says so and changes nothing where training runs, is done, or
# ended in a way that running again does not mend; `run` would.
# Each worker runs one train.py, detached, and keeps runs/tpu/train.log and its pid; train.py finds
# the other workers by itself. Exit status of train.py in `status`: 0 done, 1 lost another process
# (resume), 75 stopped after saving (resume), 2 a mistake in the config, 3 losses not finite.

set -euo pipefail

fail() {
    echo "tpu_vm.sh: $1" >&2
    exit 2
}

# accelerator type, chip of scripts/xla_flags.py, image: cloud.google.com/tpu/docs/runtimes. tpu7x
# has no row: it is to be had through Kubernetes only.
TYPES="
v4-         v4   tpu-ubuntu2204-base
v5litepod-  v5e  v2-alpha-tpuv5-lite
v5p-        v5p  v2-alpha-tpuv5
v6e-        v6e  v2-alpha-tpuv6e
"

# Options ------------------------------------------------------------------------------------------

if [ "${1:-}" = --help ] || [ "${2:-}" = --help ]; then
    sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
    exit 0
fi
command=${1:-} name=${2:-}
case $command in
create | setup | run | logs | status | resume | stop | delete) shift ;;
*) fail "'$command' is none of create, setup, run, logs, status, resume, stop, delete; see --help" ;;
esac
case $name in
"" | -*) fail "the VM's name is missing: tpu_vm.sh $command NAME --zone=ZONE" ;;
*) shift ;;
esac

place=() tier=() training=() type='' chip='' runtime='' worker=0 dry_run=
for argument in "$@"; do
    value=${argument#*=}
    case $argument in
    --zone=* | --project=*) place+=("$argument") ;;
    --type=*) type=$value ;;
    --runtime=*) runtime=$value ;;
    --worker=*) worker=$value ;;
    --spot) tier=(--spot) ;;
    --dry_run) dry_run=yes ;;
    *) training+=("$argument") ;;
    esac
done
case " ${place[*]-} " in
*" --zone="?*) ;;
*) fail "--zone=ZONE is missing; gcloud compute tpus locations list shows them" ;;
esac

needs_type() {
    local prefix known_chip known_runtime
    while read -r prefix known_chip known_runtime; do
        if [ -n "$prefix" ] && [[ $type == "$prefix"[1-9]* ]]; then
            chip=$known_chip runtime=${runtime:-$known_runtime}
        fi
    done <<<"$TYPES"
    [ -n "$chip" ] || fail "--type=$type is none of v4-N, v5litepod-N, v5p-N, v6e-N"
    local number=${type##*-}
    case $chip in
    v4 | v5p)
        [[ $number =~ ^[0-9]+$ ]] && [ $((number % 8)) = 0 ] ||
            fail "--type=$type: N counts cores, 8 to a host; use $chip-8, $chip-16, $chip-32, …"
        ;;
    *)
        [[ " 1 4 8 16 32 64 128 256 " == *" $number "* ]] ||
            fail "--type=$type: N counts chips; use 1, 4, 8, 16, 32, 64, 128 or 256"
        ;;
    esac
}

needs_training() {
    local workdir=
    for argument in ${training[@]+"${training[@]}"}; do
        case $argument in --workdir=*) workdir=${argument#*=} ;; esac
    done
    case $workdir in
    /*) ;;
    gs://*) fail "--workdir=$workdir: mount the bucket with gcsfuse and give that folder" ;;
    *) fail "--workdir=$workdir goes with the VM; give an absolute path on a disk that outlives it" ;;
    esac
}

case $command in
run | resume)
    needs_type
    needs_training
    ;;
create) needs_type ;;
esac
if [ "$command" != run ] && [ "$command" != resume ] && [ ${#training[@]} -gt 0 ]; then
    fail "$command does not know ${training[0]}; see --help"
fi
[ -n "$dry_run" ] || command -v gcloud >/dev/null ||
    fail "gcloud is not here; install the Google Cloud CLI, then: gcloud auth login"

# Commands of gcloud -------------------------------------------------------------------------------

quoted() { printf '%q ' "$@"; }

# Runs or, with --dry_run, prints.
run_or_print() {
    if [ -n "$dry_run" ]; then
        quoted "$@" | sed 's/ $//'
        echo
    else
        "$@"
    fi
}

queue() { run_or_print gcloud compute tpus queued-resources "$1" "$name" "${place[@]}" "${@:2}"; }

# on WORKERS ARG…: tpu_worker.sh ARG… on them.
on() {
    run_or_print gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --worker="$1" \
        --command="bash moe_jax/scripts/tpu_worker.sh $(quoted "${@:2}" | sed 's/ $//')"
}

# A state of the queued resource, or nothing where there is none.
state() { queue describe --format='value(state.state)' 2>/dev/null || true; }

wait_for() {
    if [ -n "$dry_run" ]; then
        state
        return
    fi
    local now last=
    while now=$(state) && [ "$now" != ACTIVE ]; do
        case $now in
        "" | FAILED | SUSPENDED) fail "$name is ${now:-gone}: tpu_vm.sh resume asks for it anew" ;;
        esac
        [ "$now" = "$last" ] || echo "$name is $now"
        last=$now
        sleep "${TPU_VM_POLL_SECONDS:-30}"
    done
    echo "$name is ACTIVE"
}

# The commands -------------------------------------------------------------------------------------

create() {
    queue create --node-id="$name" --accelerator-type="$type" --runtime-version="$runtime" \
        ${tier[@]+"${tier[@]}"}
    wait_for
}

# The files that git does not ignore, committed or not.
pack() {
    local file
    mkdir -p "$(dirname "$1")"
    git ls-files -z --cached --others --exclude-standard |
        while IFS= read -r -d '' file; do
            [ ! -e "$file" ] || printf '%s\0' "$file"
        done |
        COPYFILE_DISABLE=1 tar -czf "$1" --null -T -
}

setup() {
    local archive=runs/$name.tar.gz
    [ -n "$dry_run" ] || pack "$archive"
    run_or_print gcloud compute tpus tpu-vm scp "$archive" "$name:moe_jax.tar.gz" "${place[@]}" \
        --worker=all
    rm -f "$archive"
    run_or_print gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" --worker=all \
        --command="mkdir -p moe_jax && tar -xzf moe_jax.tar.gz -C moe_jax"
    on all setup
}

run() { on all start "$chip" "${training[@]}"; }

logs() { on "$worker" log; }

status() {
    queue describe --format='value(state.state)'
    on all status
}

resume() {
    local now=SUSPENDED
    if [ -n "$dry_run" ]; then state; else now=$(state); fi
    case $now in
    "") create ;;
    SUSPENDED | FAILED)
        delete
        create
        ;;
    ACTIVE)
        if on all status | grep -E 'running, pid|ended with [023]$'; then return; fi
        ;;
    SUSPENDING | DELETING) fail "$name is $now; try again in a minute" ;;
    *) wait_for ;;
    esac
    setup
    run
}

stop() { on all stop; }

delete() { queue delete --force --quiet; }

cd "$(dirname "$0")/.."
"$command"
