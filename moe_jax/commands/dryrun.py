"""Compiles a config's training step for devices that this machine lacks, and reports on it.

Examples:
  python scripts/dryrun.py --config=configs/mixtral/8x7b.py --topology=v5p:2x2x4
  python scripts/dryrun.py --config=configs/mixtral/8x7b.py:32 --topology="2*v5p:2x2x4" --json
  python scripts/dryrun.py --config=configs/olmoe/1b_7b.py --topology=v5p:2x2x2 --search
  python scripts/dryrun.py --config=configs/mixtral/8x7b.py --topology=v5p-32 --price=4.2
  python scripts/dryrun.py --config=configs/olmoe/1b_7b.py --topology=h100:8
  python scripts/dryrun.py --config=configs/quickstart.py --topology=cpu:8

It prints, for one device and one step: memory use against the chip's memory, and whether it fits;
FLOPs of the executed matrix products against the two analytic counts; the bytes to and from memory
against the least that any such step must move (state, weights, gradients and blocks' inputs); bytes
and number of collectives by mesh axis ("slices": between slices); and the minimum time for the
products, memory (HBM) and networks (ICI, DCN). roofline_seconds is the slowest of these four, as if
they overlapped perfectly; it bounds the MFU, the tokens per second, and the days and device hours
of the whole run. --price adds the cost.

TPUs are v4, v5e, v5p, v6e and tpu7x, with the topology or Google Cloud's accelerator type:
v5p:2x2x2 is v5p-16. No TPU is needed, only its compiler, libtpu: pip install 'jax[tpu]==' and the
version of jax that is installed. GPUs are a100, h100, h200 and b200; h100:16 is two nodes of 8.
Their step is compiled for CPU devices, and the report says that it is an estimate. For fake CPU
devices, cpu:8, there are only memory, FLOPs and collectives. No data is read, and of a parent only
the config.

--search compiles many times: it tries remat policies on the config's mesh, then other meshes, each
with the fewest microbatches that fit. It prints its trials on stderr, then the fastest one that
fits and the options to copy.
"""

import argparse
import dataclasses
import functools
import math
import sys

from moe_jax import command_line, strict_json
from moe_jax import config as configs
from moe_jax.parallel import chips


def main() -> None:
    parser = command_line.Parser(__doc__)
    parser.usage = "%(prog)s --config=FILE --topology=CHIP:SHAPE [--config.SECTION.KEY=VALUE ...]"
    add = parser.add_argument
    add("--config", metavar="FILE[:ARG]", required=True, help="a Python file with get_config()")
    where = "v5p:2x2x4 or v5p-32; two slices: 2*v5p:2x2x4; GPUs: h100:8; fake devices: cpu:8"
    add("--topology", metavar="CHIP:SHAPE", required=True, help=where)
    add(
        "--hbm_limit",
        metavar="GB",
        type=float,
        help="memory of a device (default: that of the chip)",
    )
    add("--search", action="store_true", help="try remat policies, microbatches and meshes")
    add(
        "--price",
        metavar="USD",
        type=float,
        default=0.0,
        help="price of one device per hour, to print the cost of the run",
    )
    add("--json", action="store_true", help="print a JSON object instead of tables")
    add("--config.SECTION.KEY", dest="override", metavar="VALUE", help="overrides one key")
    arguments, overrides = parser.parse_known_args()
    with parser.refusing():
        if arguments.hbm_limit is not None and not 0 < arguments.hbm_limit < math.inf:
            raise ValueError(
                f"--hbm_limit={arguments.hbm_limit} must be a number of GB more than 0"
            )
        config = configs.parse([f"--config={arguments.config}", *overrides])
        if config.model.dtype == configs.AUTO and chips.topology(arguments.topology).facts:
            config.model.dtype = "bfloat16"  # all chips in the table support it
        report = run(configs.resolve(config), arguments)
    from moe_jax.dryrun import report as dryrun
    from moe_jax.dryrun import search

    if arguments.json:
        print(strict_json.text(dataclasses.asdict(report), indent=1))
        return
    print(dryrun.text(report, arguments.price))
    if arguments.search:
        print(f"  options  {search.flags(report)}")


def run(settings, arguments: argparse.Namespace):
    """The `dryrun.report.Report` to print: the run's, or with --search the best one found."""
    import jax

    from moe_jax.dryrun import report as dryrun
    from moe_jax.dryrun import search, topologies

    jax.config.update("jax_platforms", "cpu")  # jax need not look for the topology's chips here
    topology = chips.topology(arguments.topology)
    limit = None if arguments.hbm_limit is None else int(arguments.hbm_limit * 1e9)
    devices = topologies.devices(topology)
    trial = functools.partial(
        dryrun.run, topology=topology, devices=devices, name=arguments.config, hbm_limit=limit
    )
    if not arguments.search:
        return trial(settings)
    if topology.facts is None and limit is None:
        raise ValueError(f"--search needs to know what fits {topology.name}; add --hbm_limit=GB")
    tried = []
    print(search.HEADER, file=sys.stderr)
    for report in search.search(settings, len(devices), trial):
        tried.append(report)
        print(search.line(report), file=sys.stderr, flush=True)
    best = search.best(tried)
    if best is None:
        raise ValueError(f"nothing of {len(tried)} tried fits {topology.name}; use more chips")
    return best
