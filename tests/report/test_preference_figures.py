"""The figure of runs on pairs of answers."""

import json
import re
import shutil

import matplotlib

from moe_jax.analysis import answers
from moe_jax.report import figures, page, style
from tests.report.test_layout import sweep_of_22  # noqa: F401


def test_runs_on_pairs_have_a_curve_for_each_measure(sweep_of_22, tmp_path):  # noqa: F811
    folder = shutil.copytree(sweep_of_22["naive_s1"], tmp_path / "preferred")
    path, last = folder / "metrics.jsonl", dict.fromkeys(answers.MEASURES, 0.5)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for number, row in enumerate(row for row in rows if "validation" in row):
        row["preferences"] = dict.fromkeys(answers.MEASURES, 0.25 * number)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps(result | {"preferences": last}))
    row = figures.FIGURES["preferences"]
    records = page.records_of({"preferred": folder, "naive_s1": sweep_of_22["naive_s1"]})
    with matplotlib.rc_context(style.STYLE):
        figure = row.draw(records, style.WIDE)
    shown = [axes for axes in figure.axes if axes.get_lines()]
    assert len(shown) == len(answers.MEASURES)
    for axes in shown:
        (line,) = axes.get_lines()
        assert list(line.get_ydata()[:3]) == [0, 0.25, 0.5]
    assert re.search(r"preferred 50\.0 %", row.result(records))
