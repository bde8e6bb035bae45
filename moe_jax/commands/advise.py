"""Compares upcycling with training from scratch: the costs, and what published rules advise.

Examples:
  python scripts/advise.py --config=configs/drop_upcycling/moe.py:8x3.7b \\
      --dense_tokens=1e12 --moe_tokens=5e11
  python scripts/advise.py --config=configs/nvidia/upcycled.py:e8g8t8 --granularity=8 \\
      --dense_tokens=8e12 --moe_tokens=1e12 --json

It trains nothing. FLOPs are model FLOPs: active parameters and causal attention, forward and
backward. The dense parent is the config's model with a single feed-forward per layer, --granularity
times as wide as an expert.
"""

from moe_jax import adviser, command_line, strict_json
from moe_jax import config as configs


def main() -> None:
    parser = command_line.Parser(__doc__)
    parser.add_argument("--config", required=True, metavar="FILE[:ARG]", help="config of the MoE")
    parser.add_argument(
        "--dense_tokens",
        required=True,
        type=float,
        metavar="N",
        help="tokens that the dense parent was trained on",
    )
    parser.add_argument(
        "--moe_tokens",
        required=True,
        type=float,
        metavar="N",
        help="tokens that the MoE will be trained on",
    )
    parent = parser.add_mutually_exclusive_group()
    parent.add_argument("--dense_config", metavar="FILE[:ARG]", help="config of the dense parent")
    width = "width of the parent's feed-forward, in expert widths (default: 1)"
    parent.add_argument("--granularity", type=int, default=1, metavar="N", help=width)
    parser.add_argument("--json", action="store_true", help="print a JSON object instead of tables")
    arguments = parser.parse_args()
    with parser.refusing():
        run = parent_run = configs.resolve(configs.load(arguments.config))
        if arguments.dense_config:
            parent_run = configs.resolve(configs.load(arguments.dense_config))
            dense = parent_run.model
        else:
            dense = adviser.dense_parent(run.model, arguments.granularity)
        budgets = adviser.budgets(
            run.model,
            dense,
            moe_tokens=arguments.moe_tokens,
            dense_tokens=arguments.dense_tokens,
            moe_sequence_length=run.data.sequence_length,
            dense_sequence_length=parent_run.data.sequence_length,
        )
    if arguments.json:
        print(strict_json.text(adviser.as_json(budgets), indent=1))
    else:
        print(adviser.report(budgets))
