"""Runs all experiments of a config file and writes a report on them.

Examples:
  python scripts/sweep.py --config=configs/quickstart.py --workdir=runs/quickstart
  python scripts/sweep.py --config=configs/quickstart.py --workdir=runs/quickstart --list
  python scripts/sweep.py --config=configs/quickstart.py --workdir=runs/quickstart --status
  python scripts/sweep.py --config=configs/quickstart.py --workdir=runs/quickstart \\
      --only='drop*' --max_parallel=2 --retries=1

The file defines get_config() and get_sweep(), which returns a list of {"name", "overrides",
"after"}; moe_jax/sweep/arms.py has products, pairs, chains and seeds of such lists. Each run is a
process of the command train in <workdir>/<name>-<id>, where the id is a hash of its config. Run the
same command again to resume: finished runs are skipped, and unfinished ones resumed, also after a
kill. results.csv (runs), groups.csv (mean, deviation and 95 % interval over seeds), report.html and
figures/*.png are written to the workdir.

--launcher=slurm submits each run as a job, with options of sbatch such as --slurm.partition=gpu,
--slurm.gpus_per_node=8 and --slurm.timeout_min=600. It needs the package submitit.

Exit status: 0 all runs are done, 1 some are not, 2 a mistake in the config, 75 stopped by SIGTERM
or Ctrl-C (run again to resume).
"""

import contextlib
import functools
import pathlib
import shlex
from collections.abc import Callable, Mapping, Sequence

from moe_jax import command_line
from moe_jax.sweep import execution, launchers, plan, results, slurm


def main() -> None:
    parser = command_line.Parser(__doc__)
    add = parser.add_argument
    file = "a Python file with get_config() and get_sweep(); edit the file to change keys"
    add("--config", metavar="FILE[:ARG]", required=True, help=file)
    kept = "where the runs, results.csv and report.html are kept; --list works without it"
    add("--workdir", metavar="DIR", type=command_line.folder, help=kept)
    only = parser.add_mutually_exclusive_group()
    listed = "only print the runs with their FLOPs, estimated times and commands"
    only.add_argument("--list", action="store_true", help=listed)
    shown = "only print a table of what is done, running and left, live on a terminal"
    only.add_argument("--status", action="store_true", help=shown)
    some = "names of runs or groups to execute, with the runs that they start from: 'drop*,naive'"
    add("--only", metavar="PATTERNS", help=some)
    where = "where the runs are started: processes here, or jobs of Slurm"
    add("--launcher", choices=["local", "slurm"], default="local", help=where)
    several = "number of runs at the same time, which share the cores (default: 1; slurm: all)"
    add("--max_parallel", type=int, help=several)
    tries = "how often a run that fails is started again, unless its config has a mistake"
    add("--retries", type=int, default=0, help=tries)
    add("--slurm.NAME", dest="slurm", metavar="VALUE", help="an option of sbatch")
    arguments, others = parser.parse_known_args()
    if unknown := [text for text in others if not text.startswith("--slurm.")]:
        keys = [text for text in unknown if text.startswith("--config.")]
        fix = "; a sweep takes no keys: edit its file" if keys else ""
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{fix}")
    if not (arguments.workdir or arguments.list):
        parser.error("the following arguments are required: --workdir")
    train = command_line.command("train")
    workdir = arguments.workdir or pathlib.Path("DIR")  # as in --help
    with parser.refusing():
        options = command_line.options("slurm", others)
        if options and arguments.launcher != "slurm":
            raise ValueError(f"--slurm.{next(iter(options))} needs --launcher=slurm")
        if arguments.max_parallel is not None and arguments.max_parallel < 1:
            raise ValueError(f"--max_parallel={arguments.max_parallel} must be at least 1")
        if arguments.retries < 0:
            raise ValueError(f"--retries={arguments.retries} must be at least 0")
        runs = plan.read(arguments.config, workdir)
        chosen = plan.only(runs, arguments.only) if arguments.only else runs
    if arguments.list or arguments.status:
        from moe_jax.sweep import status  # Pallas takes time

    if arguments.list:
        print(status.listing(chosen, train))
        return
    if arguments.status:
        status.watch(chosen)
        return
    at_once = arguments.max_parallel or (1 if arguments.launcher == "local" else len(chosen))
    make: Callable[[], launchers.Launcher] = functools.partial(launchers.Local, train, at_once)
    if arguments.launcher == "slurm":
        make = functools.partial(slurm.Slurm, train, workdir, options)
    how = {"max_parallel": at_once, "retries": arguments.retries, "chosen": chosen}
    finished = execute(parser, runs, workdir, make, **how)
    if finished:
        folders = {run.name: run.workdir if run in finished else None for run in runs}
        written = write_report(parser, workdir, folders, [run.command(train) for run in runs])
        print(results.table(runs))
        print(f"report: {written}")
    raise SystemExit(0 if all(run in finished for run in chosen) else 1)


def execute(
    parser: command_line.Parser,
    runs: Sequence[plan.Run],
    workdir: pathlib.Path,
    make: Callable[[], launchers.Launcher],
    **how,
) -> list[plan.Run]:
    """Executes the runs on the launcher that `make` returns, with keyword arguments of
    `execution.Execution`; returns those that are finished."""
    with contextlib.ExitStack() as held:
        with parser.refusing():
            held.enter_context(execution.alone(workdir))
            launcher = make()
        ended = execution.Execution(runs, launcher, workdir, **how).execute()
    return [run for run in runs if ended[run.name] == results.DONE]


def write_report(
    parser: command_line.Parser,
    workdir: pathlib.Path,
    folders: Mapping[str, pathlib.Path | None],
    commands: Sequence[Sequence[str]],
) -> pathlib.Path:
    """Writes report.html with this command and those of the runs; returns its path."""
    from moe_jax.report import page  # matplotlib takes a second

    words = [command_line.this_command(), *map(shlex.join, commands)]
    with parser.refusing():
        return page.write(workdir, dict(folders), words)
