"""Writes docs/results.md from the rows of all studies, or the rows of a study from its runs.

Examples:
  python scripts/results.py
  python scripts/results.py --check
  python scripts/results.py --collect=runs/experiments --config=configs/experiments/bench/cpu.py
  python scripts/results.py --collect=runs/again --config=configs/experiments/bench/cpu.py --check

Studies are configs/experiments/NAME/*.py. With --collect, the finished runs of the config's sweep
in that workdir become its rows: a file .jsonl beside the config, one line of JSON for each run.
Collect on the machine of the runs, whose processor is written down. Without it, docs/results.md and
docs/results.svg are made from the rows of all studies; the runs are not needed.

--check writes nothing, and exits with status 1 if the page differs from its rows or, with
--collect, if a collected run differs from its row in anything but its time and its commit. Its
analysis, where the row has one, is compared if it was made again.
"""

import pathlib

from moe_jax import command_line, files
from moe_jax.commands import write_docs
from moe_jax.experiments import figure, page, rows
from moe_jax.sweep import plan

ROOT = pathlib.Path(__file__).parents[2]


def main() -> None:
    parser = command_line.Parser(__doc__)
    add = parser.add_argument
    kept = "the workdir of a study's sweep, whose finished runs become its rows"
    add("--collect", metavar="DIR", type=command_line.folder, help=kept)
    add("--config", metavar="FILE", help="the study's file, with --collect")
    add("--check", action="store_true", help="only compare, write nothing")
    arguments = parser.parse_args()
    if bool(arguments.collect) != bool(arguments.config):
        parser.error("--collect and --config belong together; give both or neither")
    with parser.refusing():
        if arguments.collect:
            said, lines = _collect(arguments.config, arguments.collect, arguments.check)
        else:
            said, lines = _write_page(ROOT, arguments.check)
    print(said)
    if lines:
        parser.exit(1, "".join(f"{line}\n" for line in lines))


def _collect(config: str, workdir: pathlib.Path, check: bool) -> tuple[str, list[str]]:
    """Writes or compares the rows of a study; returns what to say, and the differences."""
    runs = plan.read(config, workdir)
    path = pathlib.Path(config).with_suffix(".jsonl")
    found = rows.collect(runs)
    if not found:
        raise ValueError(f"--collect={workdir}: no run of {config} is finished there")
    if check:
        lines = rows.differences(rows.read(path), found)
        return f"{len(found)} runs compared with {path}", lines
    rows.write(path, found)
    return f"{path}: {len(found)} of {len(runs)} runs", []


def _write_page(root: pathlib.Path, check: bool) -> tuple[str, list[str]]:
    """Writes or compares the page; returns what to say, and the differences."""
    if not (root / "docs").is_dir():
        raise ValueError(f"{root / 'docs'} does not exist; this command is for a checkout")
    target, studies = root / "docs" / "results.md", page.read(root)
    old = target.read_text(encoding="utf-8")
    new = write_docs.replaced(old, page.text(studies))
    if check:
        lines = ["docs/results.md is old; run python scripts/results.py"] if old != new else []
        return f"{len(studies)} studies compared", lines
    files.write_text(target, new)
    for one in (one for one in studies if one.study.control):
        with files.whole_file(target.with_suffix(".svg")) as unfinished:
            unfinished.write_bytes(figure.svg(one))
    return f"docs/results.md: {len(studies)} studies", []
