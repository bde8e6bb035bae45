"""Compiles a config's train step for devices that this machine does not have, and reads it.

Examples:
  python scripts/dryrun.py --config=configs/mixtral/8x7b.py --topology=v5p:2x2x4
  python scripts/dryrun.py --config=configs/mixtral/8x7b.py:32 --topology="2*v5p:2x2x4" --json
  python scripts/dryrun.py --config=configs/olmoe/1b_7b.py --topology=v5p:2x2x2 --search
  python scripts/dryrun.py --config=configs/quickstart.py --topology=cpu:8

Prints, for one device and one step: memory against the chip's, and whether it fits; FLOPs of the
products beside those due; bytes and number of the collectives by axes of the mesh ("slices":
between slices); the least time by products, memory (HBM) and networks (ICI, DCN). roofline_seconds
is the slowest of these four, as if they overlapped perfectly; the MFU it bounds is model FLOPs.

Chips are v4, v5e, v5p, v6e and tpu7x, sides as in the pages of Google Cloud. It needs no TPU but
its compiler, libtpu: pip install 'jax[tpu]==' and the version of jax that is installed. Fake CPU
devices, cpu:8, need nothing and have memory and collectives only. Data and parents are not read.

--search compiles many times: it tries remat policies on the config's mesh, then other meshes, each
with the fewest microbatches that fit, and prints the fastest that fits; what it tries on stderr.
"""

import argparse
import functools
import json
import math
import sys

import jax

from moe_jax import command_line, dryrun
from moe_jax import config as configs
from moe_jax.dryrun import search, topologies
from moe_jax.parallel import chips


def main() -> None:
    parser = command_line.Parser(__doc__)
    parser.usage = "%(prog)s --config=FILE --topology=CHIP:SHAPE [--config.SECTION.KEY=VALUE ...]"
    parser.add_argument("--config", metavar="FILE[:ARG]", required=True, help="of the run")
    parser.add_argument(
        "--topology", metavar="CHIP:SHAPE", required=True, help="v5p:2x2x4; two: 2*v5p:2x2x4; cpu:8"
    )
    parser.add_argument(
        "--hbm_limit", metavar="GB", type=float, help="of a device, instead of the chip's"
    )
    parser.add_argument(
        "--search", action="store_true", help="try remat policies, microbatches and meshes"
    )
    parser.add_argument("--json", action="store_true", help="print an object, no tables")
    parser.add_argument(
        "--config.SECTION.KEY", dest="override", metavar="VALUE", help="overrides one key"
    )
    arguments, overrides = parser.parse_known_args()
    jax.config.update("jax_platforms", "cpu")  # what is compiled for is not looked for here
    try:
        report = run(arguments, overrides)
    except (configs.ConfigError, ValueError) as error:
        parser.error(" ".join(str(error).split()))
    except KeyboardInterrupt:
        parser.exit(130, "dryrun.py: interrupted\n")
    if arguments.json:
        print(json.dumps(dryrun.as_json(report), indent=1))
    else:
        print("\n".join(filter(None, (dryrun.text(report), dryrun.collectives_text(report)))))


def run(arguments: argparse.Namespace, overrides: list[str]) -> dryrun.Report:
    if arguments.hbm_limit is not None and not 0 < arguments.hbm_limit < math.inf:
        raise ValueError(f"--hbm_limit={arguments.hbm_limit} must be a number of GB more than 0")
    settings = configs.resolve(configs.parse([f"--config={arguments.config}", *overrides]))
    topology = chips.topology(arguments.topology)
    limit = None if arguments.hbm_limit is None else int(arguments.hbm_limit * 1e9)
    devices = topologies.devices(topology)
    trial = functools.partial(
        dryrun.run,
        topology=topology,
        devices=devices,
        name=arguments.config,
        hbm_limit=limit,
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
