"""Shows what a run's checkpoint holds: its leaves, its config, and whether it is intact.

Examples:
  python scripts/inspect_checkpoint.py runs/quickstart/dense
  python scripts/inspect_checkpoint.py runs/quickstart/dense --verify
  python scripts/inspect_checkpoint.py runs/quickstart/naive --diff=runs/quickstart/drop_0.5
  python scripts/inspect_checkpoint.py runs/quickstart/naive@240 --json

Without --verify, only the description of a checkpoint is read, which takes a second for a
checkpoint of any size. --verify reads every checkpoint of the run, compares each leaf with the
digest that it was saved with, and shows norms. --diff compares the digests of two runs leaf by
leaf. Exit status: 0, or 1 if a checkpoint fails verification or two runs differ.
"""

import math
import pathlib
import sys

import numpy as np

from moe_jax import command_line, stopping, stores, strict_json, untrusted
from moe_jax.training import bounds, checkpoint


def main() -> None:
    parser = command_line.Parser(__doc__)
    add = parser.add_argument
    add("run", metavar="RUN", help="a run's workdir, or RUN@STEP (without a step: the newest)")
    add("--verify", action="store_true", help="read all leaves and compare them with their digests")
    add("--diff", metavar="RUN", help="another run or step, to compare leaf by leaf")
    add("--json", action="store_true", help="print a JSON object instead of a table")
    arguments = parser.parse_args()
    with parser.refusing():
        folder = _folder(arguments.run)
        try:
            report = _described(folder)
        except ValueError:
            if not arguments.verify:
                raise
            report = {"checkpoint": str(folder), "leaves": {}}
        if arguments.diff:
            other = _described(_folder(arguments.diff))
            report["differences"] = _differences(report, other)
        if arguments.verify:
            report["verified"] = {
                step: _verified(folder.with_name(str(step)), report)
                for step in checkpoint.steps(folder.parent)
            }
    print(strict_json.text(report, indent=1) if arguments.json else _table(report))
    failed = any(report.get("verified", {}).values())
    sys.exit(int(failed or bool(report.get("differences"))))


def _folder(run: str) -> pathlib.Path:
    """The folder of a run's checkpoint. Raises: ValueError if there is none."""
    source = stores.find(run)
    untrusted.check_folder(source.folder)
    directory = source.checkpoints
    steps = checkpoint.steps(directory)
    if not steps:
        raise ValueError(f"{run} has no checkpoint")
    return directory / str(steps[-1] if source.step is None else source.step)


def _described(folder: pathlib.Path) -> dict:
    """The description of a checkpoint, without its values. Raises: ValueError if it is damaged."""
    try:
        meta = checkpoint.described(folder)
    except Exception as error:  # damaged files make Orbax and TensorStore raise any type
        stopping.pass_on(error)
        raise ValueError(f"{folder} cannot be read: {_short(error)}; try --verify") from error
    leaves = {
        path: {"shape": shape, "dtype": dtype, "digest": f"{meta['digests'][path]:08x}"}
        for path, (shape, dtype) in meta["leaves"].items()
    }
    data = {name: meta["data"][name] for name in bounds.FORMS if name in meta["data"]}
    return {"checkpoint": str(folder), **data, "leaves": leaves, "config": meta["config"]}


def _verified(folder: pathlib.Path, report: dict) -> str:
    """The complaint about a checkpoint, "" for a sound one; norms go into the report on it."""
    try:
        for path, leaf in checkpoint.verified(folder):
            if str(folder) == report["checkpoint"]:
                values = np.asarray(leaf, np.float64)
                report["leaves"][path]["norm"] = float(np.linalg.norm(values))
                report["leaves"][path]["not_finite"] = int(np.count_nonzero(~np.isfinite(values)))
    except Exception as error:  # as above
        stopping.pass_on(error)
        return _short(error)
    return ""


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _differences(report: dict, other: dict) -> dict[str, str]:
    """Path of each leaf that differs -> the difference, in words."""
    ours, theirs, found = report["leaves"], other["leaves"], {}
    for path in sorted(ours | theirs):
        if path not in theirs or path not in ours:
            found[path] = f"only in {(report if path in ours else other)['checkpoint']}"
        elif ours[path] != theirs[path]:
            forms = [f"{leaf['dtype']}{leaf['shape']}" for leaf in (ours[path], theirs[path])]
            found[path] = " and ".join(forms) if forms[0] != forms[1] else "other values"
    return found


def _table(report: dict) -> str:
    leaves = report["leaves"]
    width = max(map(len, leaves), default=0)
    lines = [report["checkpoint"]]
    for path, leaf in leaves.items():
        form = f"{leaf['dtype']}{leaf['shape']}"
        norm = f"  norm {leaf['norm']:.6g}" if "norm" in leaf else ""
        norm += f"  NOT FINITE: {leaf['not_finite']}" if leaf.get("not_finite") else ""
        lines.append(f"  {path:{width}}  {form:28}  {leaf['digest']}{norm}")
    number = sum(math.prod(leaf["shape"]) for path, leaf in leaves.items() if _is_param(path))
    lines.append(f"{number:,} parameters in {sum(map(_is_param, leaves))} of {len(leaves)} leaves")
    for step, complaint in report.get("verified", {}).items():
        lines.append(f"step {step} {f'does not verify: {complaint}' if complaint else 'verifies'}")
    for path, difference in report.get("differences", {}).items():
        lines.append(f"differs: {path}: {difference}")
    if report.get("differences") == {}:
        lines.append("no leaf differs")
    return "\n".join(map(untrusted.line, lines))


def _is_param(path: str) -> bool:
    return path.startswith("params/")
