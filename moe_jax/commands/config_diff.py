"""Prints the config keys in which two runs differ.

Examples:
  python scripts/config_diff.py runs/quickstart/naive runs/quickstart/drop_0.5
  python scripts/config_diff.py configs/mixtral/8x7b.py configs/olmoe/1b_7b.py

A run is given as a workdir, as RUN@STEP for the config in its checkpoint of a step, or as a config
file (FILE or FILE:ARG). Values are those of the resolved
config: all fields of a model are compared, whether a preset or a single key sets them.
"""

import pathlib

from moe_jax import command_line, config, stores
from moe_jax.config import listing, reading
from moe_jax.training import checkpoint


def main() -> None:
    parser = command_line.Parser(__doc__)
    parser.add_argument("a", metavar="RUN_A", help="a workdir, RUN@STEP or a config file")
    parser.add_argument("b", metavar="RUN_B", help="a workdir, RUN@STEP or a config file")
    arguments = parser.parse_args()
    with parser.refusing():
        rows = listing.difference(_settings(arguments.a), _settings(arguments.b))
    for name, first, second in rows:
        print(f"{name}: {listing.shown(first)} -> {listing.shown(second)}")
    if not rows:
        print("no difference")


def _settings(run: str) -> config.Run:
    if pathlib.Path(run.partition(":")[0]).is_file():
        return config.resolve(config.load(run))
    source = stores.find(run)
    if source.step is None:
        return config.of_stored(config.load_json(source.folder))
    stored = checkpoint.described(source.folder / "checkpoints" / str(source.step))["config"]
    return config.of_stored(reading.stored(stored))
