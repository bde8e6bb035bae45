"""Converts models between Hugging Face folders and checkpoints of runs.

Examples:
  python scripts/convert.py --source=runs/quickstart/drop_0.5 --output=path/to/folder --to=hf
  python scripts/convert.py --source=path/to/folder --output=path/to/copy --to=hf --dtype=bfloat16
  python scripts/convert.py --source=path/to/folder --output=runs/imported --to=orbax
  python scripts/convert.py --source=runs/lola --output=path/to/lola --to=hf --dropless

The source is a Hugging Face folder, a run's workdir, or RUN@STEP for a run's checkpoint of a step.
From folder to folder, tensors are read and written one at a time. A checkpoint is verified before
use, and therefore held in memory as a whole. The output is written atomically: it appears when it
is complete.
"""

import dataclasses
import sys

import numpy as np

from moe_jax import cards, command_line, stores
from moe_jax import config as configs
from moe_jax.hf import folders, writing
from moe_jax.model.config import ModelConfig
from moe_jax.parallel import mesh

DTYPES = ("float32", "bfloat16", "float16")


def main() -> None:
    parser = command_line.Parser(__doc__)
    given = "a run's workdir, RUN@STEP or a Hugging Face folder"
    parser.add_argument("--source", required=True, metavar="DIR", help=given)
    parser.add_argument(
        "--output",
        required=True,
        type=command_line.folder,
        metavar="DIR",
        help="the folder to write, which must not exist yet",
    )
    parser.add_argument("--to", required=True, choices=("hf", "orbax"), help="format of the output")
    dropless = "write a model trained with a capacity as one that drops no tokens"
    parser.add_argument("--dropless", action="store_true", help=dropless)
    parser.add_argument(
        "--dtype", choices=DTYPES, help="dtype of the output (default: the source's)"
    )
    parser.add_argument("--allow_nonfinite", **stores.ALLOW_NONFINITE)
    arguments = parser.parse_args()
    with parser.refusing():
        run(arguments)
    print(f"done: {arguments.output}")


def run(arguments) -> None:
    """Writes the model in the other format, with a model card."""
    source = stores.find(arguments.source)
    config = _converted(source, arguments)
    command = [*command_line.command("convert"), *sys.argv[1:]]
    cards.write(arguments.output, cards.of_conversion(config, source, command))


def _converted(source: configs.Source, arguments) -> ModelConfig:
    allow = arguments.allow_nonfinite
    if arguments.to == "hf" and folders.is_folder(source.folder):
        opened = folders.Folder(source.folder, allow_nonfinite=allow)
        given = opened.dtypes().items()
        dtypes = {path: np.dtype(arguments.dtype or dtype) for path, dtype in given}
        writing.write(
            arguments.output,
            opened.config,
            dtypes,
            lambda slot: opened.part(slot.path, slot.row),
            source=opened.path,
            progress=True,
        )
        return opened.config
    config, params = stores.load(source, mesh.one_device(), allow_nonfinite=allow)
    if arguments.dropless:
        config = dataclasses.replace(config, dispatch="dropless")
    how = {"source": source.folder, "dtype": arguments.dtype}
    stores.save_as(arguments.to, arguments.output, config, params, **how)
    return config
