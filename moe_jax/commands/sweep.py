"""Runs all experiments of a config file and writes a report on them.

Examples:
  python scripts/sweep.py --config=configs/quickstart.py --workdir=runs/quickstart
  python scripts/sweep.py --config=configs/quickstart.py --workdir=runs/quickstart --list

The file defines get_config() and get_sweep(), which returns a list of {"name", "overrides",
"after"}. Each run is a process of the command train in <workdir>/<name>-<id>, where the id is a
hash of its config. Run the same command again to resume: finished runs are skipped, and unfinished
ones resumed. results.csv, report.html and figures/*.png are written to the workdir.

Exit status: 0 all runs are done, 1 some are not, 2 a mistake in the config, 75 stopped by SIGTERM
or Ctrl-C (run again to resume).
"""

import shlex
import sys

from moe_jax import command_line, sweep


def main() -> None:
    parser = command_line.Parser(__doc__)
    add = parser.add_argument
    file = "a Python file with get_config() and get_sweep(); edit the file to change keys"
    add("--config", metavar="FILE[:ARG]", required=True, help=file)
    kept = "where the runs, results.csv and report.html are kept"
    add("--workdir", metavar="DIR", required=True, type=command_line.folder, help=kept)
    add("--list", action="store_true", help="only print the runs and their commands")
    add("--launcher", choices=["local"], default="local", help="where the runs are started")
    add("--max_parallel", type=int, default=1, help="number of runs at the same time")
    arguments = parser.parse_args()
    train = command_line.command("train")
    with parser.refusing():
        if arguments.max_parallel < 1:
            raise ValueError(f"--max_parallel={arguments.max_parallel} must be at least 1")
        runs = sweep.read(arguments.config, arguments.workdir)
    if arguments.list:
        print(sweep.listing(runs, train))
        return
    arguments.workdir.mkdir(parents=True, exist_ok=True)
    status = sweep.execute(runs, train, arguments.workdir, max_parallel=arguments.max_parallel)
    finished = [run for run in runs if status[run.name] == sweep.DONE]
    if finished:
        from moe_jax.report import page

        commands = [[*command_line.command("sweep"), *sys.argv[1:]]]
        commands += [run.command(train) for run in runs]
        folders = {run.name: run.workdir if run in finished else None for run in runs}
        with parser.refusing():
            shown = [shlex.join(words) for words in commands]
            written = page.write(arguments.workdir, folders, shown)
        print(f"report: {written}")
    raise SystemExit(0 if len(finished) == len(runs) else 1)
