"""Upcycle or train from scratch: what each would cost, and what published rules say.

Examples:
  python scripts/advise.py --config=configs/drop_upcycling/moe.py:8x3.7b \\
      --dense_tokens=1e12 --moe_tokens=5e11
  python scripts/advise.py --config=configs/nvidia/upcycled.py:e8g8t8 --granularity=8 \\
      --dense_tokens=8e12 --moe_tokens=1e12 --json

Trains nothing. FLOPs are model FLOPs: active parameters and causal attention, forward and backward.
The dense parent is the config's model with one feed-forward, --granularity times an expert's width.
"""

import argparse
import json

from moe_jax import adviser, command_line
from moe_jax import config as configs


def main() -> None:
    parser = command_line.Parser(__doc__)
    parser.add_argument("--config", required=True, help="of the sparse model: FILE[:arg]")
    parser.add_argument("--dense_tokens", required=True, type=float, help="of the parent, had")
    parser.add_argument("--moe_tokens", required=True, type=float, help="of the MoE, to be spent")
    parent = parser.add_mutually_exclusive_group()
    parent.add_argument("--dense_config", help="of the parent: FILE[:arg]; else made from --config")
    parent.add_argument("--granularity", type=int, default=1, help="parent's width / an expert's")
    parser.add_argument("--json", action="store_true", help="print an object, no tables")
    arguments = parser.parse_args()
    try:
        budgets = read(arguments)
    except (configs.ConfigError, ValueError) as error:
        parser.error(" ".join(str(error).split()))
    if arguments.json:
        print(json.dumps(adviser.as_json(budgets), indent=1))
    else:
        print(adviser.report(budgets))


def read(arguments: argparse.Namespace) -> adviser.Budgets:
    run = configs.resolve(configs.load(arguments.config))
    moe, length = run.model, run.data.sequence_length
    if arguments.dense_config:
        run = configs.resolve(configs.load(arguments.dense_config))
        dense = run.model
    else:
        dense = adviser.dense_parent(moe, arguments.granularity)
    return adviser.budgets(
        moe,
        dense,
        moe_tokens=arguments.moe_tokens,
        dense_tokens=arguments.dense_tokens,
        moe_sequence_length=length,
        dense_sequence_length=run.data.sequence_length,
    )
