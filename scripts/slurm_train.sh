#!/usr/bin/env bash
# Trains on a Slurm cluster, for as many jobs as it takes: before its time is over a job saves, and
# is queued again to go on. From the root of the repository, its environment activated:
#
#   mkdir -p runs
#   sbatch --nodes=2 --gpus-per-node=8 --cpus-per-task=64 --time=12:00:00 scripts/slurm_train.sh \
#       --config=configs/olmoe/1b_7b.py --workdir=/shared/runs/olmoe
#   tail -F runs/slurm-JOB.log        scancel JOB ends it for good
#
# Arguments after the script's name are those of scripts/train.py; --workdir is on a disk that all
# nodes see. Options before it are sbatch's and win over the #SBATCH lines of this file.
#
# One task a node, which has all GPUs of it: one input pipeline and one copy of the data a node.
# --ntasks-per-node=8 starts one for each GPU instead; scripts/train.py finds out by itself.
#
# Slurm sends SIGTERM 120 seconds before the end of the time (sbatch --signal=B:TERM@300 for a model
# that saves longer); train.py saves and exits with 75, and the job is requeued. Any other exit
# status is the job's: 0 done, 1 lost another process, 2 a mistake in the config, 3 losses not finite.

#SBATCH --job-name=moe_jax
#SBATCH --ntasks-per-node=1
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=runs/slurm-%j.log
set -euo pipefail

fail() {
    echo "slurm_train.sh: $1" >&2
    exit 2
}

if [ "${1:-}" = --help ]; then
    sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
    exit 0
fi
[ -n "${SLURM_JOB_ID:-}" ] || fail "runs inside a job: sbatch scripts/slurm_train.sh $*"
# sbatch runs a copy of this file, so what tells where the repository is is where it was submitted.
[ -f scripts/train.py ] || fail "$PWD is not the root of the repository; submit the job from there"
python -c 'import importlib.util as u, sys; sys.exit(u.find_spec("jax") is None)' 2>/dev/null ||
    fail "python has no jax here; activate the environment before sbatch (source .venv/*/bin/activate)"

export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
if [ -n "${SLURM_GPUS_ON_NODE:-}" ]; then
    flags=$(python scripts/xla_flags.py gpu)
    eval "$flags"
fi

# The signal does not go through srun, which takes a SIGTERM as an order to kill the step.
stopped=
trap 'stopped=yes; scancel --signal=TERM "$SLURM_JOB_ID" || true' TERM
srun python scripts/train.py "$@" &
wait $! && status=0 || status=$?
if [ -n "$stopped" ] && [ "$status" = 143 ]; then # the signal ended `wait`, not the step
    wait $! && status=0 || status=$?
fi

# A job that was preempted is in the queue already, and one that was cancelled must not come back.
if [ "$status" = 75 ] && [ "$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T)" = RUNNING ]; then
    echo "slurm_train.sh: saved before the end of the time; queued again" >&2
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
