"""The figure of runs on pairs of answers."""

import json
import re
import shutil

import matplotlib

from moe_jax.analysis import answers
from moe_jax.report import figures, page, style, tables
from moe_jax.report import records as records_module
from tests.report.test_layout import sweep_of_22  # noqa: F401


def on_pairs(run, folder, offset):
    """A copy of a run that has measured pairs: 0, 0.25, 0.5 … and the offset."""
    shutil.copytree(run, folder)
    path = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for number, row in enumerate(row for row in rows if "validation" in row):
        row["preferences"] = dict.fromkeys(answers.MEASURES, 0.25 * number + offset)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = json.loads((folder / "result.json").read_text())
    last = {"preferences": dict.fromkeys(answers.MEASURES, 0.5 + offset)}
    (folder / "result.json").write_text(json.dumps(result | last))
    return folder


def test_runs_on_pairs_have_a_mean_and_a_band_over_seeds_for_each_measure(
    sweep_of_22,  # noqa: F811
    tmp_path,
):
    runs = {
        f"preferred_s{seed}": on_pairs(sweep_of_22[f"naive_s{seed}"], tmp_path / str(seed), offset)
        for seed, offset in ((1, 0), (2, 0.125))
    }
    row = figures.FIGURES["preferences"]
    records = page.records_of(runs)
    with matplotlib.rc_context(style.STYLE):
        figure = row.draw(records, style.WIDE)
    shown = [axes for axes in figure.axes if axes.get_lines()]
    assert len(shown) == len(answers.MEASURES)
    for axes in shown:
        (line,) = axes.get_lines()
        assert list(line.get_ydata()[:3]) == [0.0625, 0.3125, 0.5625]
        (band,) = axes.collections
        low, high = (getattr(band.get_paths()[0].vertices[:, 1], name)() for name in ("min", "max"))
        assert low == 0 and high == line.get_ydata()[-1] + 0.0625
    assert re.search(r"preferred 56\.2 %", row.result(records))
    text = tables.summary(records_module.groups(records))
    assert re.search(r"<th[^>]*>preference accuracy", text) and "0.562" in text
