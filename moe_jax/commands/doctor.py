"""Checks every implementation of every op on this machine against the reference.

Examples:
  python scripts/doctor.py
  python scripts/doctor.py --json

It compares values and gradients on a small, ragged case. "auto" marks what a training run uses.
Exit status: 0 if every implementation that can run here is correct, 1 otherwise.
"""

import dataclasses
import platform
import sys

import jax

from moe_jax import command_line, strict_json
from moe_jax.ops import verify


def main() -> None:
    parser = command_line.Parser(__doc__)
    parser.add_argument("--json", action="store_true", help="print rows as JSON instead of a table")
    arguments = parser.parse_args()
    found = []
    if not arguments.json:
        device = jax.devices()[0].device_kind
        print(f"Python {platform.python_version()}, jax {jax.__version__}, {device}")
    for check in verify.checks():
        found.append(check)
        if not arguments.json:
            state = f"{check.status:9} {check.detail}"
            print(f"{check.op:15} {check.implementation:12} {state}", flush=True)
    if arguments.json:
        print(strict_json.text([dataclasses.asdict(check) for check in found], indent=1))
    sys.exit(any(check.status in ("wrong", "fails") for check in found))
