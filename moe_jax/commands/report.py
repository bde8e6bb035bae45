"""Writes a page about finished runs: report.html, and its figures as PNG and SVG.

Examples:
  python scripts/report.py runs/quickstart
  python scripts/report.py runs/a runs/b runs/c --output=runs/abc

RUN is the workdir of a run or of a sweep, which stands for all of its runs. Runs whose configs are
equal but for `seed` are one row, with an interval over their seeds. The page needs no other file
and no network.
"""

import csv
import pathlib
import re

from moe_jax import command_line, untrusted
from moe_jax.report import page

ID = r"-[0-9a-f]{10}$"  # which a sweep adds to the name of a run


def main() -> None:
    parser = command_line.Parser(__doc__)
    add = parser.add_argument
    add(
        "runs",
        metavar="RUN",
        nargs="+",
        type=command_line.folder,
        help="a workdir of a run or sweep",
    )
    where = "the page's folder (default: RUN itself if it is one, else ./report)"
    add("--output", metavar="DIR", type=command_line.folder, help=where)
    arguments = parser.parse_args()
    output = arguments.output
    if output is None:
        [output] = arguments.runs if len(arguments.runs) == 1 else [pathlib.Path("report")]
    with parser.refusing():
        folders = _named([folder for run in arguments.runs for folder in _runs(run)])
        if not any(folders.values()):
            raise ValueError(
                f"{', '.join(folders)}: no run is finished; a finished one has result.json"
            )
        written = page.write(output, folders, [command_line.this_command()])
    print(f"report: {written}")


def _runs(workdir: pathlib.Path) -> list[pathlib.Path]:
    """The workdirs of the runs of a sweep, in its order; a run's workdir alone.

    Raises: ValueError if there is no run.
    """
    if (workdir / "config.json").exists():
        return [workdir]
    untrusted.check_folder(workdir)
    found = [path.parent for path in sorted(workdir.glob("*/config.json"))]
    if not found:
        raise ValueError(
            f"{workdir} is neither a run nor a sweep: it has no config.json; give others"
        )
    order = _order(workdir / "results.csv")
    return sorted(found, key=lambda folder: order.get(folder.name, len(order)))


def _order(results: pathlib.Path) -> dict[str, int]:
    """The place of each workdir's own name in a sweep's results.csv."""
    if not results.is_file():
        return {}
    try:
        with open(results, newline="", encoding="utf-8", errors="replace") as file:
            names = [pathlib.Path(row.get("workdir") or "").name for row in csv.DictReader(file)]
    except csv.Error as error:
        raise ValueError(f"{results} is no table: {error}; remove it") from None
    return {name: place for place, name in enumerate(names)}


def _named(workdirs: list[pathlib.Path]) -> dict[str, pathlib.Path | None]:
    """The workdirs by their names without ids if they then differ; None for an unfinished run."""
    resolved = dict.fromkeys(folder.resolve() for folder in workdirs)  # each once
    workdirs = [next(f for f in workdirs if f.resolve() == folder) for folder in resolved]
    names = [folder.resolve().name for folder in workdirs]
    bare = [re.sub(ID, "", name) for name in names]
    for shown in (bare, names, [str(folder) for folder in workdirs]):
        if len(set(shown)) == len(shown):
            break
    pairs = zip(shown, workdirs, strict=True)
    return {name: f if (f / "result.json").exists() else None for name, f in pairs}
