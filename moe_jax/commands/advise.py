"""Compares upcycling with training from scratch: the costs, and what published rules advise.

Examples:
  python scripts/advise.py --config=configs/drop_upcycling/moe.py:8x3.7b \\
      --dense_tokens=1e12 --moe_tokens=5e11
  python scripts/advise.py --config=configs/nvidia/upcycled.py:e8g8t8 --granularity=8 \\
      --dense_tokens=8e12 --moe_tokens=1e12 --json
  python scripts/advise.py --measure --config=configs/upcycle.py --workdir=runs/rates \\
      --config.init.source=path/to/dense --config.data.source=path/to/text --seeds=3

Without --measure it trains nothing. FLOPs are model FLOPs: active parameters and causal attention,
forward and backward. The dense parent is the config's model with a single feed-forward per layer,
--granularity times as wide as an expert.

--measure compares learning rates after upcycling by short runs: a range test, then the first
--steps steps of the config with its own schedule (re-warmed), with the parent's last rate
(inherited) and with the schedule's last rate (minimum). It prints the dip of the held-out loss, the
tokens to recover and the ranking, and keeps runs, report.html and advice.json in --workdir. Run the
same command again to resume.
"""

import dataclasses
import functools
import pathlib

from moe_jax import adviser, command_line, files, strict_json
from moe_jax import config as configs

RULES = ("dense_tokens", "moe_tokens")
# Options with an effect only without --measure, and only with it.
OF_RULES, OF_RUNS = (*RULES, "dense_config", "json"), ("workdir", "inherited_rate", "list")
PARENT = "parent"  # its name in the report


def main() -> None:
    parser = command_line.Parser(__doc__)
    add = parser.add_argument
    add("--config", required=True, metavar="FILE[:ARG]", help="config of the MoE")
    trained = "tokens that the dense parent was trained on"
    add("--dense_tokens", type=float, metavar="N", help=trained)
    add("--moe_tokens", type=float, metavar="N", help="tokens that the MoE will be trained on")
    parent = parser.add_mutually_exclusive_group()
    parent.add_argument("--dense_config", metavar="FILE[:ARG]", help="config of the dense parent")
    width = "width of the parent's feed-forward, in expert widths (default: 1)"
    parent.add_argument("--granularity", type=int, default=1, metavar="N", help=width)
    add("--json", action="store_true", help="print a JSON object instead of tables")
    add = parser.add_argument_group("learning rate after upcycling").add_argument
    add("--measure", action="store_true", help="compare learning rates by short runs")
    add("--workdir", type=command_line.folder, metavar="DIR", help="where the runs are kept")
    add("--steps", type=int, default=200, metavar="N", help="steps of each run (default: 200)")
    add("--seeds", type=int, default=1, metavar="N", help="runs of each arm (default: 1)")
    last = "the parent's last learning rate (default: as its run has recorded it)"
    add("--inherited_rate", type=float, metavar="RATE", help=last)
    add("--list", action="store_true", help="only print the runs, with estimated times")
    add("--config.SECTION.KEY", dest="override", metavar="VALUE", help="overrides one key")
    arguments, others = parser.parse_known_args()
    for name in OF_RULES if arguments.measure else OF_RUNS:
        if getattr(arguments, name):
            only = "has no effect with" if arguments.measure else "needs"
            parser.error(f"--{name} {only} --measure")
    if arguments.measure:
        measure(parser, arguments, others)
        return
    if others:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    if missing := [f"--{name}" for name in RULES if getattr(arguments, name) is None]:
        parser.error(f"the following arguments are required: {', '.join(missing)}")
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


def measure(parser: command_line.Parser, arguments, others: list[str]) -> None:
    """Runs the range test and the arms, and prints what they show."""
    from moe_jax.commands import sweep
    from moe_jax.report import records
    from moe_jax.sweep import launchers, learning_rates, plan, status

    workdir, train = arguments.workdir, command_line.command("train")
    with parser.refusing():
        if workdir is None:
            raise ValueError("--workdir=DIR is missing: the folder for the runs")
        given = command_line.options("config", others)
        settings = configs.resolve(configs.load(arguments.config, given))
        sources = settings.init.sources
        inherited = arguments.inherited_rate or learning_rates.last_rate(sources)
        how = {"steps": arguments.steps, "seeds": arguments.seeds, "inherited": inherited}
        entries = learning_rates.entries(settings, given, **how)
        runs = plan.runs_of(arguments.config, entries, workdir)
    print(status.listing(runs, train) if arguments.list else status.total(runs), flush=True)
    if inherited is None:
        print(
            "no arm inherits the parent's last rate, which is not recorded: --inherited_rate=RATE"
        )
    if arguments.list:
        return
    make = functools.partial(launchers.Local, train, 1)
    finished = sweep.execute(parser, runs, workdir, make)
    with parser.refusing():
        beside = _finished_parent(sources)
        parents = [records.read_record(name, len(runs), path) for name, path in beside.items()]
        found = learning_rates.advice(runs, next(iter(parents), None))
    if found is None:
        parser.exit(1, f"{parser.prog}: no arm has finished; see {workdir}/results.csv\n")
    shown = [run for run in runs if run.name != learning_rates.RANGE_TEST]
    folders = {run.name: run.workdir if run in finished else None for run in shown}
    commands = [run.command(train) for run in runs]
    written = sweep.write_report(parser, workdir, {**beside, **folders}, commands)
    as_text = strict_json.text(dataclasses.asdict(found), indent=1) + "\n"
    files.write_text(workdir / "advice.json", as_text)
    print(learning_rates.in_words(found), f"report: {written}", sep="\n")
    raise SystemExit(0 if all(run in finished for run in shown) else 1)


def _finished_parent(sources) -> dict[str, pathlib.Path]:
    """The workdir of the only source if it is a finished run, for the report."""
    found = [source.folder for source in sources]
    is_run = len(found) == 1 and (found[0] / "result.json").is_file()
    return {PARENT: found[0]} if is_run else {}
