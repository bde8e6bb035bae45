"""Checks every implementation of every op on this machine against the reference.

Examples:
  python scripts/doctor.py
  python scripts/doctor.py --json

It compares values and gradients on a small, ragged case. "auto" marks what a training run uses.
On a CPU the experts' products run in numpy's BLAS, whose kernels the first line names; they are
those of OPENBLAS_CORETYPE if your environment sets it.
Exit status: 0 if every implementation that can run here is correct, 1 otherwise.
"""

import dataclasses
import platform
import sys

import jax
import threadpoolctl

from moe_jax import command_line, strict_json
from moe_jax.ops import verify


def main() -> None:
    parser = command_line.Parser(__doc__)
    parser.add_argument("--json", action="store_true", help="print rows as JSON instead of a table")
    arguments = parser.parse_args()
    found = []
    if not arguments.json:
        device = jax.devices()[0].device_kind
        python = f"Python {platform.python_version()}, jax {jax.__version__}"
        print(", ".join([python, device, *_blas()]))
    for check in verify.checks():
        found.append(check)
        if not arguments.json:
            state = f"{check.status:9} {check.detail}"
            print(f"{check.op:15} {check.implementation:12} {state}", flush=True)
    if arguments.json:
        print(strict_json.text([dataclasses.asdict(check) for check in found], indent=1))
    sys.exit(any(check.status in ("wrong", "fails") for check in found))


def _blas() -> list[str]:
    """numpy's library of matrix products, with its version and the processor that its kernels are
    for; nothing if it does not tell."""
    libraries = (lib for lib in threadpoolctl.threadpool_info() if lib["user_api"] == "blas")
    named = [
        f"{lib['internal_api']} {lib['version']} with kernels for {lib['architecture']}"
        for lib in libraries
        if "architecture" in lib
    ]
    return named[:1]
