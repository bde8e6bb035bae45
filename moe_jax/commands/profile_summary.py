"""Prints the time of a profiled step by part of the model, and its memory.

Examples:
  python scripts/profile_summary.py runs/mine
  python scripts/profile_summary.py runs/mine --json

The run has to be told which steps to profile: --config.profile.steps="(5,7)". `xprof
--logdir=runs/mine/profile` (pip install xprof), or TensorBoard with its plugin, shows the trace.

A part is a jax.named_scope: router, dispatch, experts, combine and so on. The times are those of
the instructions that the compiler made, on average over the profiled steps and the devices; an
instruction that it fused from several parts counts for one of them. On a CPU they are the sum over
threads, and can be more than the step takes. "recomputed" is the forward pass that remat repeats.
"""

import dataclasses

from moe_jax import command_line, strict_json, untrusted
from moe_jax.benchmark import scopes

HEAD = "{:18}{:>9}{:>8}{:>10}{:>12}{:>10}   {}"
ROW = "{:18}{:9.2f}{:8.1%}{:10.2f}{:12.2f}{:10.2f}   {}"


def main() -> None:
    parser = command_line.Parser(__doc__)
    add = parser.add_argument
    add("workdir", metavar="RUN", type=command_line.folder, help="a run's workdir")
    add("--json", action="store_true", help="print the rows and facts as JSON (default: a table)")
    arguments = parser.parse_args()
    with parser.refusing():
        if not arguments.workdir.is_dir():
            raise ValueError(f"{arguments.workdir} is no folder; give a run's workdir")
        rows, facts = scopes.summary(arguments.workdir)
    if arguments.json:
        found = {"scopes": [dataclasses.asdict(row) for row in rows], **facts}
        print(strict_json.text(found, indent=1))
        return
    first, last = facts["steps"]
    print(
        f"steps {first} to {last}: {1e3 * facts['seconds_per_step']:.1f} ms a step "
        f"on {untrusted.label(facts['device'])} x {facts['devices']}; times in ms"
    )
    print(HEAD.format("scope", "a step", "share", "forward", "recomputed", "backward", ""))
    for row in rows:
        passes = (1e3 * seconds for seconds in (row.forward, row.recomputed, row.backward))
        about = scopes.SCOPES.get(row.scope, "")
        print(ROW.format(row.scope, 1e3 * row.seconds, row.share, *passes, about))
    sizes = {**facts["memory_of_step"], **facts["memory_of_device"]}
    shown = {name: size for name, size in sizes.items() if isinstance(size, int) and size}
    print(
        "memory, MB:", ", ".join(f"{n.replace('_', ' ')} {b / 1e6:,.1f}" for n, b in shown.items())
    )
