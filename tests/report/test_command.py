"""moe_jax report: a run, several runs, a sweep; what is damaged is one line."""

import json
import os
import re
import sys

import pytest

from moe_jax.commands import report
from moe_jax.report import figures
from tests.report import made_up


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "FIGURES", {})
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "sweep"
    made_up.write_run(root / "dense-0123456789", seed=0, start=6.0, end=3.4)
    child = {"num_experts": 8, "source": "elsewhere/dense-0123456789", "start": 3.5}
    made_up.write_run(root / "naive-abcdef0123", seed=1, end=3.3, **child)
    rows = ["name,workdir", "naive,elsewhere/naive-abcdef0123", "dense,dense-0123456789"]
    (root / "results.csv").write_text("\n".join(rows))
    return root


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["report.py", *map(str, arguments)])
    report.main()


def runs_of(page):
    table = page.read_text().split("<h2>Runs</h2>")[1].split("</table>")[0]
    return re.findall(r'<tr><td data-value="(.*?)"', table)


def test_a_sweep_stands_for_its_runs_in_its_order(sweep, monkeypatch, capsys):
    run(monkeypatch, sweep)
    assert capsys.readouterr().out == f"report: {sweep}/report.html\n"
    text = (sweep / "report.html").read_text()
    assert runs_of(sweep / "report.html") == ["naive", "dense"]
    assert "naive −0.1" in text and "report.py" in text
    (sweep / "naive-abcdef0123" / "result.json").unlink()
    run(monkeypatch, sweep)
    assert "not shown here: naive." in (sweep / "report.html").read_text()


def test_runs_are_named_once_and_by_their_folders(sweep, monkeypatch, tmp_path):
    dense, naive = sweep / "dense-0123456789", sweep / "naive-abcdef0123"
    run(monkeypatch, dense, naive, dense)
    assert runs_of(tmp_path / "report" / "report.html") == ["dense", "naive"]
    other = made_up.write_run(tmp_path / "dense", seed=5, start=6.0, end=3.4)
    run(monkeypatch, dense, other, "--output=both")
    found = runs_of(tmp_path / "both" / "report.html")
    assert found in (["dense-0123456789 …"], ["dense …"])  # one group of two seeds
    run(monkeypatch, naive)
    assert runs_of(naive / "report.html") == ["naive"]


def damage(folder, kind):
    path = folder / "result.json"
    result = json.loads(path.read_text())
    match kind:
        case "not JSON":
            path.write_text("{")
        case "another form":
            path.write_text(json.dumps(result | {"tokens": "many"}))
        case "blocks":
            path.write_text(json.dumps(result | {"blocks": {"a": 1}}))
        case "metrics":
            (folder / "metrics.jsonl").write_text("{}\n")
        case "validation":
            row = {"step": 1, "tokens": 1, "validation": 3}
            (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
        case "config":
            (folder / "config.json").write_text("{}")
        case "pipe":
            path.unlink()
            os.mkfifo(path)
        case "link":
            path.unlink()
            path.symlink_to(folder.parents[1] / "secret.json")


@pytest.mark.parametrize(
    "kind",
    ["not JSON", "another form", "blocks", "metrics", "validation", "config", "pipe", "link"],
)
def test_a_damaged_run_is_one_line_with_its_name(kind, sweep, monkeypatch, capsys, tmp_path):
    (tmp_path / "secret.json").write_text("{}")
    damage(sweep / "naive-abcdef0123", kind)
    with pytest.raises(SystemExit, match="^2$"):
        run(monkeypatch, sweep)
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("report.py: ") and "naive-abcdef0123" in line
    assert not (sweep / "report.html").exists()


@pytest.mark.parametrize("kind", ["empty", "no folder", "table"])
def test_what_is_no_run_is_one_line(kind, sweep, monkeypatch, capsys, tmp_path):
    folder = sweep if kind == "table" else tmp_path / kind
    if kind == "empty":
        folder.mkdir()
    if kind == "table":
        (sweep / "results.csv").write_text('name,workdir\n"' + "x" * 200_000 + '",b\n')
    with pytest.raises(SystemExit, match="^2$"):
        run(monkeypatch, folder)
    [line] = capsys.readouterr().err.splitlines()
    assert str(folder) in line
