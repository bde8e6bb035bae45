"""Trains a model as a config file says.

Examples:
  python scripts/train.py --config=configs/quickstart.py --workdir=runs/dense
  python scripts/train.py --config=configs/quickstart.py --workdir=runs/mine \\
      --config.data.source=path/to/folder --config.training.num_steps=2000

Run the same command again to go on where a run stopped. The config file is Python and is executed.
All keys with their defaults: moe_jax/config.py.

Exit status: 0 done, 2 a mistake in the config, 3 losses not finite, 75 stopped by SIGTERM or
Ctrl-C after saving (run again to go on).
"""

import pathlib

from moe_jax import command_line, config, train


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
    arguments, overrides = parser.parse_known_args()
    try:
        settings = config.parse([f"--config={arguments.config}", *overrides])
        result = train.run(settings, arguments.workdir)
    except config.ConfigError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(130, "train.py: interrupted\n")
    print(
        f"done: {result['steps']} steps, held-out loss {result['loss']:.4f} nats/token, "
        f"{result['bits_per_byte']:.4f} bits/byte -> {arguments.workdir}/result.json"
    )


if __name__ == "__main__":
    main()
