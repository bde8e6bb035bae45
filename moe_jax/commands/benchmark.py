"""Times one part of the project next to a bound measured in the same run.

Examples:
  python scripts/benchmark.py train_step
  python scripts/benchmark.py grouped_matmul --repeats=21 --json
  python scripts/benchmark.py train_step --peer=hf       (needs transformers and torch)
  python scripts/benchmark.py data --repeats=3           (rows of packed documents)
  python scripts/benchmark.py real --model=runs/smollm2/dense --model=runs/smollm2/moe --repeats=3

It times small float32 models on a CPU, and four layers of Drop-Upcycling 8x1.5B and of OLMoE-1B-7B
in bfloat16 on a GPU or TPU. Times are medians; a ratio of 1.20 means 20 % slower than the bound.
The benchmark "real" times Hugging Face folders on a CPU: 4 x 512 tokens forward and trained, and 32
new tokens decoded for 1, 8 and 64 rows. scripts/smollm2.py makes the two folders of the example.
The benchmark "data" opens plans of 65,536 to a thousand million documents and times rows of them.
Leave the machine idle otherwise while it runs.
"""

import dataclasses
import pathlib
from collections.abc import Iterator

from moe_jax import command_line, strict_json
from moe_jax.benchmark import cases, data, peers, real
from moe_jax.benchmark import rows as benchmark
from moe_jax.config import machine
from moe_jax.parallel import allocator

HEAD = "{:32} {:15} {:>10} {:>16}  {:26} {:>10} {:>8}"
ROW = "{:32} {:15} {:>10} {:16,.0f}  {:26} {:>10} {:8.2f}"


def main() -> None:
    parser = command_line.Parser(__doc__)
    names = [*cases.BENCHMARKS, "data", "real"]
    parser.add_argument("name", choices=names, metavar="NAME", help="one of %(choices)s")
    parser.add_argument("--repeats", type=int, default=11, help="number of timed calls")
    library = "also time this library on the same work: %(choices)s"
    parser.add_argument("--peer", choices=peers.PEERS, default="", help=library)
    folder = "a Hugging Face folder for the benchmark real; can be given several times"
    parser.add_argument("--model", action="append", type=pathlib.Path, metavar="DIR", help=folder)
    work = (
        "what the benchmark real times, of %(choices)s; can be given several times (default: all)"
    )
    parser.add_argument("--work", action="append", choices=real.WORKS, metavar="WORK", help=work)
    parser.add_argument("--json", action="store_true", help="print rows as JSON instead of a table")
    arguments = parser.parse_args()
    if arguments.repeats < 1:
        parser.error(f"--repeats={arguments.repeats} must be at least 1")
    rows: Iterator[benchmark.Row]
    is_real = arguments.name == "real"
    if is_real != bool(arguments.model) or (arguments.work and not is_real):
        parser.error("the benchmark real needs --model=DIR, and only it takes --model and --work")
    if arguments.name == "train_step" and not machine.has_accelerator():
        allocator.keep_freed_memory()  # as the command train does
    with parser.refusing():
        if is_real:
            works = arguments.work or list(real.WORKS)
            rows = real.run(arguments.model, works, arguments.repeats, arguments.peer)
        elif arguments.name == "data":
            if arguments.peer:
                parser.error("the benchmark data has no --peer")
            rows = data.run(arguments.repeats)
        else:
            rows = benchmark.run(arguments.name, arguments.repeats, arguments.peer)
    if arguments.json:
        print(strict_json.text([dataclasses.asdict(row) for row in rows], indent=1))
    else:
        print(HEAD.format("case", "impl.", "ms", "tokens/s", "bound", "its ms", "ratio"))
        for row in rows:
            milliseconds, bound = (
                _milliseconds(row.median_seconds),
                _milliseconds(row.bound_seconds),
            )
            first = row.case, row.implementation, milliseconds, row.tokens_per_second
            print(ROW.format(*first, row.bound, bound, row.ratio_to_bound), flush=True)


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.1f}" if seconds >= 1e-3 else f"{1e3 * seconds:.4f}"
