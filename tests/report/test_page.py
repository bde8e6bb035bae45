"""Router health by hand, and a report of made-up runs: complete, self-contained, escaped."""

import json
import re

import matplotlib
import numpy as np
import pytest

from moe_jax.report import figures, load_figures, page, style, tables
from moe_jax.report.records import COLOURS
from tests.report.made_up import router_rows


def test_health_of_even_collapsed_and_mixed_layers():
    health = router_rows([[5, 5, 5, 5], [20, 0, 0, 0], [10, 10, 0, 0]])
    assert health["effective_experts"] == [4, 1, 2]
    assert health["max_violation"] == [0, 3, 1]
    assert health["dead_experts"] == [0, 3, 2]
    assert health["tokens_per_expert"][2] == [0.5, 0.5, 0, 0]
    assert health["virtual_drop_rate"] == [0, 0.75, 0.5]


def make_run(folder, *, num_experts, bits, source="", router=None):
    folder.mkdir()
    load = np.full((2, num_experts), 1 / num_experts) if num_experts else None
    languages = {"en": {"loss": bits, "bits_per_byte": bits}, "el": {"loss": 1, "bits_per_byte": 1}}
    rows = []
    for step in range(0, 41, 10):
        rows.append({"step": step, "tokens": step * 100, "loss": 3 - step / 40})
        row = {"step": step, "tokens": step * 100, "validation": {"bits_per_byte": bits}}
        if num_experts:
            row["router"] = router_rows(load)
            row |= {"parent_similarity": [1, 0.5], "parent_distance": [0, bits]} if source else {}
        rows.append(row)
    result = {
        "steps": 40, "tokens": 4000, "training_flops": 2e12, "loss": bits, "bits_per_byte": bits,
        "parent_training_flops": 3e12 if source else 0, "per_language": languages,
        "parameters": 1e6, "active_parameters": 5e5, "byte_unigram_bits": 4.5,
        "tokens_per_expert": None if load is None else load.tolist(),
        "effective_experts": [num_experts] * 2 if num_experts else None,
        "router_drift": [1.5, 2.5] if num_experts else [],
        "expert_similarity": [bits / 4, bits / 8] if num_experts else None,
        "samples": [{"prompt": "Click <here>", "continuation": f" & {folder.name}"}],
        "versions": {"jax": "1.2.3"}, "device": "cpu",
    }  # fmt: skip
    settings = {"num_experts": num_experts, "router": router}
    config = {"data": {"source": "embedded"}, "init": {"source": source}, "model": settings}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def one_figure(monkeypatch):
    """Leaves the figures out but one, because drawing all of them takes 5 seconds."""
    monkeypatch.setattr(figures, "FIGURES", {"training_flops": figures.FIGURES["training_flops"]})


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return {
        "dense": make_run(root / "dense", num_experts=0, bits=3.5),
        "naive": make_run(root / "naive", num_experts=4, bits=3.25, source="dense"),
        "drop": make_run(root / "drop", num_experts=4, bits=3.125, source="dense"),
    }


def test_a_report_shows_every_run_and_needs_no_other_file(folders, tmp_path):
    written = page.write(tmp_path, folders, ["python a.py --b='<c>'"])
    text = written.read_text()
    assert not re.search(r'(src|href)="(?!data:)', text)
    for shown in ("3.500", "3.250", "3.125", "4.500", "jax 1.2.3", "technical register only"):
        assert shown in text
    assert "python a.py --b=&#x27;&lt;c&gt;&#x27;" in text
    for name in folders:
        assert f"<b>Click &lt;here&gt;</b> &amp; {name}" in text
    assert 'class="best"' not in text  # a single run proves nothing
    for kind in ("png", "svg"):
        pictures = {path.stem for path in (tmp_path / "figures").glob(f"*.{kind}")}
        assert pictures == set(figures.FIGURES) - {"preferences"}  # no run is on pairs
    assert text.count("data:image/png;base64,") == 2 * len(pictures)  # for two widths


def test_figures_show_the_numbers_of_the_records(folders):
    records = [page.read_record(name, i, f) for i, (name, f) in enumerate(folders.items())]
    left, right = figures.loss(records).axes
    curves = {line.get_label(): line.get_ydata() for line in right.get_lines()}
    np.testing.assert_array_equal(curves["drop"], [3.125] * 5)
    np.testing.assert_array_equal(curves["dense (0.00 M tokens)"], [3.5, 3.5])
    assert len(left.get_lines()) == 3
    bars = [bar.get_width() for bar in figures.training_flops(records).axes[0].patches]
    assert bars == [2, 2, 2, 0, 3, 3]
    used, axes, drift = load_figures.experts_by_layer(records).axes
    assert list(drift.get_lines()[0].get_ydata()) == [1.5, 2.5]
    assert list(used.get_lines()[0].get_ydata()) == [4, 4]
    curves = {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()}
    assert curves == {"naive": [3.25 / 4, 3.25 / 8], "drop": [3.125 / 4, 3.125 / 8]}
    cosine, away = figures.parent_similarity(records).axes
    assert list(cosine.get_lines()[0].get_ydata()) == [0.75] * 5
    lines = {line.get_label(): list(line.get_ydata()) for line in away.get_lines()}
    assert lines == {"naive": [3.25 / 2] * 5, "drop": [3.125 / 2] * 5}
    [dots] = figures.languages(records).axes
    assert [tick.get_text() for tick in dots.get_yticklabels()] == ["el", "en"]


def test_a_run_that_is_not_finished_is_named_and_changes_no_colour(folders, tmp_path, one_figure):
    written = page.write(tmp_path, {**folders, "naive": None}, [])
    assert "Not finished, and not shown here: naive" in written.read_text()
    place = list(folders).index("drop")  # among all runs, finished or not
    record = page.read_record("drop", place, folders["drop"])
    assert record.look["color"] == COLOURS[place]
    shown = page.records_of({**folders, "naive": None})
    assert shown == [page.read_record("dense", 0, folders["dense"]), record]


def test_a_run_that_is_in_no_mean_is_named(folders, tmp_path, one_figure):
    for name in ("naive", "again"):
        folder = make_run(tmp_path / name, num_experts=4, bits=3.25)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"seed": 1}))
    shown = {name: tmp_path / name for name in ("naive", "again")}
    text = page.write(tmp_path, shown, []).read_text()
    assert "In no mean, because a run of the same config and seed is in it: again." in text
    assert "In no mean" not in page.write(tmp_path, folders, []).read_text()


def test_dense_runs_alone_have_no_router_figures(folders):
    records = [page.read_record("dense", 0, folders["dense"])]
    pictures = {name for name, row in figures.FIGURES.items() if row.draw(records)}
    assert pictures == {"loss", "loss_against_flops", "languages", "training_flops"}


def test_runs_that_do_not_say_how_alike_their_experts_are_have_no_such_figure(folders):
    record = page.read_record("drop", 0, folders["drop"])
    del record.result["expert_similarity"]
    assert load_figures.experts_by_layer([record]) is None


def test_a_run_of_forced_balance_is_always_labelled(tmp_path, one_figure):
    run = make_run(tmp_path / "run", num_experts=4, bits=3.5, router="forced_balance")
    written = page.write(tmp_path, {"timing": run}, []).read_text()
    assert written.count("timing") == written.count("timing (forced balance)") > 2


def test_a_dense_run_that_goes_on_is_an_arm_and_its_parent_a_level(tmp_path):
    parent = make_run(tmp_path / "dense", num_experts=0, bits=3.5)
    control = make_run(tmp_path / "control", num_experts=0, bits=3.4, source="dense")
    records = page.records_of({"dense": parent, "control": control})
    with matplotlib.rc_context(style.STYLE):
        left, _ = figures.loss(records).axes
    assert [line.get_label() for line in left.get_lines() if len(line.get_xdata()) > 2] == [
        "control"
    ]


def test_a_parents_level_is_of_the_sample_of_the_curves_and_empty_labels_are_left_out(folders):
    records = page.records_of(folders)
    parent = records[0]
    parent.result["bits_per_byte"] = 3.0  # on all text
    figure = figures.loss(records)
    [level] = [line for line in figure.axes[1].lines if line.get_label().startswith("dense")]
    assert set(level.get_ydata()) == {3.5}
    for record in records:
        record.result["per_language"]["und"] = {"loss": 1.0, "bits_per_byte": None}
    [axes] = figures.languages(records).axes
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["el", "en"]


def test_labels_are_shown_as_they_are_and_do_no_harm(tmp_path, monkeypatch):
    """Not as formulas, of which a broken one ends the program, nor as markup, nor as line ends."""
    names = [
        "$\\frac{1}$",
        "$x^$",
        "<script>",
        "a\nb\x1b[31m",
        "\u202ea",
        "x" * 5000,
        *map(str, range(500)),
    ]
    folder = make_run(tmp_path / "run", num_experts=0, bits=2.0)
    result = json.loads((folder / "result.json").read_text())
    bits = (dict.fromkeys(("loss", "bits_per_byte"), 5.0 + n) for n in range(len(names), 0, -1))
    result["per_language"] = dict(zip(names, bits, strict=True))
    (folder / "result.json").write_text(json.dumps(result))
    run = "$\\nothing{<q>"
    record = page.read_record(run, 0, folder)
    with matplotlib.rc_context(style.STYLE):
        figure = figures.languages([record])
        ticks = [tick.get_text() for tick in figure.axes[0].get_yticklabels()]
        assert len(ticks) == figures.MOST_LABELS
        assert ticks[:-7:-1] == [*names[:3], "a�b�[31m", "�a", "x" * 99 + "…"]
        assert figure.get_figheight() < 40
    monkeypatch.setattr(figures, "FIGURES", {"languages": figures.FIGURES["languages"]})
    text = page.write(tmp_path, {run: folder}, []).read_text()
    assert "<q>" not in text and "$\\nothing{&lt;q&gt;" in text


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": "x"},
        {"versions": 3},
        {"samples": None},
        {"per_language": []},
        {"tokens_per_expert": {}},
    ],
)
def test_a_result_of_another_form_is_one_line(change, tmp_path, one_figure):
    folder = make_run(tmp_path / "run", num_experts=4, bits=2.0)
    result = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps(result | change))
    with pytest.raises(ValueError) as refused:
        page.write(tmp_path, {"run": folder}, [])
    assert "\n" not in str(refused.value)


def test_figures_are_not_written_through_links(tmp_path, one_figure):
    folder = make_run(tmp_path / "run", num_experts=0, bits=2.0)
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "loss.png").symlink_to(tmp_path / "mine")
    with pytest.raises(ValueError, match="loss.png is a link out of its folder"):
        page.write(tmp_path, {"run": folder}, [])
    (tmp_path / "figures").rename(tmp_path / "theirs")
    (tmp_path / "figures").symlink_to("theirs")
    with pytest.raises(ValueError, match="figures is a link"):
        page.write(tmp_path, {"run": folder}, [])
    assert (tmp_path / "mine").read_text() == "mine"


def test_records_that_were_skipped_are_said_with_their_reasons(tmp_path):
    folder = make_run(tmp_path / "run", num_experts=0, bits=2.0)
    assert tables.skipped_records([page.read_record("run", 0, folder)]) == ""
    for skipped, said in (
        ({"train": {"not UTF-8": 2, "too long": 1}}, "run (2 not UTF-8, 1 too long)."),
        ({"train": {}}, ""),
        ({"train": 3}, ""),
        ([3], ""),
        ({"train": {"a\x1b[31m": 1}}, "run (1 a\N{REPLACEMENT CHARACTER}[31m)."),
    ):
        result = json.loads((folder / "result.json").read_text()) | {"skipped_records": skipped}
        (folder / "result.json").write_text(json.dumps(result))
        assert tables.skipped_records([page.read_record("run", 0, folder)]).endswith(said)
