#!/usr/bin/env bash
# The main example on the embedded text: a dense model, upcycled three ways, and two controls.
#
#   bash scripts/quickstart.sh     about 7 minutes on 2 CPU cores -> runs/quickstart/report.html
#
# Run it again to go on where it stopped. PYTHON=python3.13 chooses the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ "${1:-}" = --help ]; then
    sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"
    exit 0
elif [ $# -gt 0 ]; then
    echo "quickstart.sh takes no argument but --help; what it runs is in configs/quickstart.py" >&2
    exit 2
fi
source scripts/venv.sh
activate_venv requirements.txt
python scripts/sweep.py --config=configs/quickstart.py --workdir=runs/quickstart
