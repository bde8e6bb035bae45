#!/usr/bin/env bash
# Times one GPU or TPU in at most 10 minutes: the rows of docs/performance.md, as JSON, in a folder.
#
#   bash scripts/gpu_benchmarks.sh runs/gpu          one file for each benchmark, NAME.json
#   PYTHON=/opt/jax/bin/python bash scripts/gpu_benchmarks.sh runs/gpu
#   BENCHMARKS="moe_layer decode" REPEATS=11 bash scripts/gpu_benchmarks.sh runs/gpu
#
# It installs nothing: $PYTHON (default: python) needs jax for the accelerator and requirements.txt.
# A benchmark that fails, or takes more than its part of the time, leaves NAME.log and no NAME.json.
set -euo pipefail
if [ "${1:-}" = --help ] || [ $# -ne 1 ]; then
    sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"
    [ "${1:-}" = --help ] && exit 0 || exit 2
fi
mkdir -p "$1"
folder=$(cd "$1" && pwd)
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
# The whole step of OLMoE-1B-7B holds 120 GB; other processes must have left the GPU by then.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.95}
failed=0
for name in ${BENCHMARKS:-block_stack train_step moe_layer full_step decode}; do
    echo "$name"
    if timeout "${LIMIT:-115}" "$python" scripts/benchmark.py "$name" --json \
        --repeats="${REPEATS:-5}" >"$folder/$name.partial" 2>"$folder/$name.log"; then
        mv "$folder/$name.partial" "$folder/$name.json"
        cat "$folder/$name.json"
    else
        failed=1
        rm "$folder/$name.partial"
        echo "$name failed; the end of $folder/$name.log:" >&2
        tail -n 3 "$folder/$name.log" >&2
    fi
done
exit $failed
