"""Trains a model as a config file says.

Examples:
  python scripts/train.py --config=configs/quickstart.py --workdir=runs/dense
  python scripts/train.py --config=configs/quickstart.py --workdir=runs/mine \\
      --config.data.source=path/to/folder --config.training.num_steps=2000

  python scripts/train.py --config=FILE --workdir=DIR \\
      --coordinator=host0:9876 --num_processes=2 --process_id=0

Run the same command again to go on where a run stopped. The config file is Python and is executed.
All keys with their defaults: moe_jax/config/sections.py.

On several hosts start the same command on each, with one workdir that all of them see. Slurm's
srun, Open MPI, Cloud TPU slices and Kubernetes (GKE) say themselves how many there are; elsewhere
the three flags do. --num_processes=1 runs alone in spite of them.

Exit status: 0 done, 1 lost another process (run all again to go on), 2 a mistake in the config,
3 losses not finite, 75 stopped by SIGTERM or Ctrl-C after saving (run again to go on).
"""

import pathlib

from moe_jax import command_line, config, train
from moe_jax.parallel import distributed


def main() -> None:
    parser = command_line.Parser(__doc__)
    parser.usage = "%(prog)s --config=FILE --workdir=DIR [--config.SECTION.KEY=VALUE ...]"
    parser.add_argument(
        "--config", metavar="FILE[:ARG]", required=True, help="a Python file with get_config()"
    )
    parser.add_argument(
        "--workdir",
        metavar="DIR",
        required=True,
        type=pathlib.Path,
        help="where metrics, checkpoints and the result are kept",
    )
    parser.add_argument(
        "--config.SECTION.KEY", dest="override", metavar="VALUE", help="overrides one key"
    )
    hosts = parser.add_argument_group("several processes")
    hosts.add_argument("--coordinator", metavar="HOST:PORT", default="", help="of process 0")
    hosts.add_argument("--num_processes", metavar="N", type=int, help="of the whole run")
    hosts.add_argument("--process_id", metavar="I", type=int, help="from 0 to N - 1")
    arguments, overrides = parser.parse_known_args()
    try:
        settings = config.parse([f"--config={arguments.config}", *overrides])
        distributed.initialize(arguments.coordinator, arguments.num_processes, arguments.process_id)
    except ValueError as error:
        parser.error(str(error))
    with distributed.ending_together():
        try:
            result = train.run(settings, arguments.workdir)
        except config.ConfigError as error:
            parser.error(str(error))
        except KeyboardInterrupt:
            parser.exit(130, "train.py: interrupted\n")
    if distributed.is_first():
        print(
            f"done: {result['steps']} steps, held-out loss {result['loss']:.4f} nats/token, "
            f"{result['bits_per_byte']:.4f} bits/byte -> {arguments.workdir}/result.json"
        )
