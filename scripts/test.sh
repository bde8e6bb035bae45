#!/usr/bin/env bash
# Installs what the tests need and runs them.
#
#   bash scripts/test.sh                        the default suite
#   bash scripts/test.sh --long                 and the long cases and full matrices
#   bash scripts/test.sh tests/model -k router  any pytest arguments
#   PYTHON=python3.13 bash scripts/test.sh      another interpreter, in a venv of its own
set -euo pipefail
cd "$(dirname "$0")/.."
if [ "${1:-}" = --help ]; then
    sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"
    exit 0
fi
source scripts/venv.sh
activate_venv requirements-dev.txt
# The commands that tests start would compile the package's source again, a second each.
unset PYTHONDONTWRITEBYTECODE
python -m pytest --numprocesses 2 --dist worksteal "$@"
