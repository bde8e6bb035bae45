"""Prints the compiler flags for a chip, for a shell to set before the program starts.

Examples:
  python scripts/xla_flags.py v5p                 export LIBTPU_INIT_ARGS='...'
  eval "$(python scripts/xla_flags.py gpu)"       sets them here; flags already set take precedence
  python scripts/xla_flags.py v6e --reasons       why each flag is set

scripts/slurm_train.sh and scripts/tpu_worker.sh set them on their own.
"""

from moe_jax import command_line
from moe_jax.parallel import xla_flags


def main() -> None:
    parser = command_line.Parser(__doc__)
    parser.add_argument("chip", choices=xla_flags.CHIPS, help="what the program will run on")
    parser.add_argument("--reasons", action="store_true", help="print why each flag is set instead")
    arguments = parser.parse_args()
    if arguments.reasons:
        for flag in xla_flags.CHIPS[arguments.chip].flags:
            print(f"{flag}\n    {flag.reason}")
    else:
        print(xla_flags.export(arguments.chip))
