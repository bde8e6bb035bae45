"""Times one part of the project next to a bound measured in the same run.

Examples:
  python scripts/benchmark.py train_step
  python scripts/benchmark.py grouped_matmul --repeats=21 --json
  python scripts/benchmark.py train_step --peer=hf       (needs transformers and torch)

It times small float32 models on a CPU, and four layers of Drop-Upcycling 8x1.5B and of OLMoE-1B-7B
in bfloat16 on a GPU or TPU. Times are medians; a ratio of 1.20 means 20 % slower than the bound.
Leave the machine idle otherwise while it runs.
"""

import dataclasses

from moe_jax import command_line, strict_json
from moe_jax.benchmark import cases, peers
from moe_jax.benchmark import rows as benchmark

HEAD = "{:24} {:15} {:>10} {:>10}  {:26} {:>10} {:>7}"
ROW = "{:24} {:15} {:10.1f} {:10,.0f}  {:26} {:10.1f} {:7.2f}"


def main() -> None:
    parser = command_line.Parser(__doc__)
    parser.add_argument("name", choices=cases.BENCHMARKS, metavar="NAME", help="one of %(choices)s")
    parser.add_argument("--repeats", type=int, default=11, help="number of timed calls")
    library = "also time this library on the same work: %(choices)s"
    parser.add_argument("--peer", choices=peers.PEERS, default="", help=library)
    parser.add_argument("--json", action="store_true", help="print rows as JSON instead of a table")
    arguments = parser.parse_args()
    if arguments.repeats < 1:
        parser.error(f"--repeats={arguments.repeats} must be at least 1")
    with parser.refusing():
        rows = benchmark.run(arguments.name, arguments.repeats, arguments.peer)
    if arguments.json:
        print(strict_json.text([dataclasses.asdict(row) for row in rows], indent=1))
    else:
        print(HEAD.format("case", "impl.", "ms", "tokens/s", "bound", "its ms", "ratio"))
        for row in rows:
            milliseconds, bound = 1e3 * row.median_seconds, 1e3 * row.bound_seconds
            first = row.case, row.implementation, milliseconds, row.tokens_per_second
            print(ROW.format(*first, row.bound, bound, row.ratio_to_bound), flush=True)
