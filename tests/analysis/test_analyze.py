"""The command analyze: from a model and a text to tables, and its mistakes."""

import csv
import dataclasses
import json
import shutil
import sys

import numpy as np
import pytest

from moe_jax import config as configs
from moe_jax import stores
from moe_jax.analysis import decisions, recording, routing, routing_comparison, routing_counts
from moe_jax.commands import analyze
from moe_jax.parallel import mesh as meshes
from moe_jax.report import analysis_text
from moe_jax.training import checkpoint
from tests import drawn
from tests.analysis import test_decisions
from tests.evaluation.test_evaluate import CONFIG
from tests.hf.test_golden import GOLDEN

SIX = dataclasses.replace(
    CONFIG, num_experts=6, num_hidden_layers=2, num_experts_per_tok=2, layers=("dense", "moe")
)
QUICK = "--permutations=99", "--json"
TEXTS = {
    "en": "one and two are three",
    "de": "eins und zwei sind drei",
    "ja": "一たす二は三",
    "ru": "один и два будет три",
    "pl": "jeden i dwa to trzy",
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A model, a text in five languages, and its recorded routing."""
    root = tmp_path_factory.mktemp("analyze")
    for name, seed in (("model", 0), ("later", 1)):
        stores.save(root / name, SIX, drawn.parameters(SIX, seed))
    lines = [json.dumps({"text": text, "language": label}) for label, text in TEXTS.items()]
    (root / "text.jsonl").write_text("\n".join(lines))
    for name in ("model", "later"):
        argv = sys.argv
        try:
            sys.argv = ["analyze.py", *options(root, name), f"--save_routing={root / name}_routing"]
            analyze.main()
        finally:
            sys.argv = argv
    return root


def options(root, name="model"):
    return (
        f"--checkpoint={root / name}",
        f"--text={root / 'text.jsonl'}",
        "--sequence_length=16",
        *QUICK,
    )


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["analyze.py", *map(str, arguments)])
    capsys.readouterr()
    analyze.main()
    return capsys.readouterr().out


def refusal(monkeypatch, capsys, *arguments):
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, capsys, *arguments)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_the_numbers_are_those_of_all_tokens_at_once(root, monkeypatch, capsys):
    report = json.loads(run(monkeypatch, capsys, *options(root)))
    found = decisions.load(root / "model_routing")
    assert (
        report["tokens"]
        == found.facts.num_tokens
        == sum(len(t.encode()) + 1 for t in TEXTS.values())
    )
    ((tokens, chosen),) = found.chunks(1)
    counts = routing_counts.count(
        *(chosen.expert_NA.astype(int), chosen.weight_NA, chosen.probability_NP, tokens.label_N),
        num_labels=5,
        num_experts=6,
    )
    (row,) = report["layers"].values()
    load_E = np.bincount(chosen.expert_NA.ravel(), minlength=6)
    assert row["effective_experts"] == pytest.approx(float(routing.effective_experts(load_E)))
    assert row["confidence"] == pytest.approx(chosen.probability_NP[:, 0].mean(), abs=1e-6)
    ids, first = tokens.predicted_N, chosen.expert_NA[:, 0]
    largest = [np.bincount(first[ids == i]).max() / (ids == i).sum() for i in np.unique(ids)]
    assert row["vocabulary"]["predicted"]["mean"] == pytest.approx(np.mean(largest))
    for i, label in enumerate(found.facts.labels):
        own = report["labels"][label]
        assert (
            own["tokens"] == int(np.asarray(counts.tokens_G)[i]) == len(TEXTS[label].encode()) + 1
        )
        share_E = routing.share(np.asarray(counts.label_GE)[i])
        assert own["largest_share"] == pytest.approx(share_E.max())
    assert report["languages"]["families"].count("Indo-European") == 4
    assert report["languages"]["purity"]["n"] == 4


def test_saved_routing_gives_the_same_report_without_the_model(root, monkeypatch, capsys):
    whole = run(monkeypatch, capsys, *options(root))
    monkeypatch.setattr(recording, "record", None)
    saved = f"--routing={root / 'model_routing'}"
    assert run(monkeypatch, capsys, saved, *QUICK) == whole


def test_saturation_is_one_against_itself_and_less_against_another(root, monkeypatch, capsys):
    rows = {}
    for name in ("model", "later"):
        arguments = f"--routing={root / 'model_routing'}", f"--compare={root / name}_routing"
        report = json.loads(run(monkeypatch, capsys, *arguments, *QUICK))
        (rows[name],) = report["compared"].values()
    assert (rows["model"]["top_1"], rows["model"]["top_k"]) == (1, 1)
    later = rows["later"]
    assert later["top_k"] < 1 and 0.2 < later["top_k_chance"] < 0.5  # 1/3 if the loads are even


def test_tables_and_files(root, monkeypatch, capsys, tmp_path):
    text = run(
        *(monkeypatch, capsys, f"--routing={root / 'model_routing'}"),
        *(f"--compare={root / 'later_routing'}", f"--output={tmp_path / 'out'}", QUICK[0]),
    )
    lines = text.splitlines()
    assert "2 of 6 experts per token" in lines[0]
    assert sum("Indo-European" in line for line in lines) == 4
    assert "p = " in text and "n = 4" in text and "best matching" in text
    assert "members" in text and "stretches of text, 99 permutations" in text
    counts = np.load(tmp_path / "out" / "counts.npz")
    report = json.loads((tmp_path / "out" / "result.json").read_text())
    assert counts["tokens_G"].sum() == report["tokens"]
    names = "expert_share coactivation vocabulary gate_ratios languages language_tree language_map"
    rows = list(csv.DictReader((tmp_path / "out" / "vocabulary.csv").open()))
    frequent = {(row["ids"], int(row["id"])): int(row["occurrences"]) for row in rows}
    ids = decisions.load(root / "model_routing").tokens().input_N
    numbers = np.bincount(ids)
    expected = {("input", i): int(numbers[i]) for i in np.flatnonzero(numbers >= 10)}
    assert {key: n for key, n in frequent.items() if key[0] == "input"} == expected
    assert not any(row["token"] for row in rows)  # without the model
    drawn = sorted(path.name for path in (tmp_path / "out" / "figures").iterdir())
    assert drawn == sorted(f"{name}.{end}" for name in names.split() for end in ("png", "svg"))


def test_a_run_has_saturation_curves_and_coupling(root, monkeypatch, capsys, tmp_path):
    shutil.copytree(root / "model", workdir := tmp_path / "run")
    _, params = stores.load(root / "later", meshes.one_device())
    config = configs.load_json(workdir).to_dict()
    checkpoint.save(workdir / "checkpoints", 7, {"params": params}, data={}, config=config)
    later = f"--checkpoint={workdir}", *options(root)[1:], "--coupling"
    output = f"--output={tmp_path / 'o'}"
    report = json.loads(run(monkeypatch, capsys, *later, "--steps=all", output))
    ours, theirs = (decisions.load(root / f"{name}_routing") for name in ("model", "later"))
    compared = routing_comparison.compare(ours, theirs)
    assert list(report["steps"]) == ["0"]
    assert report["steps"]["0"]["1"]["top_k"] == compared[1]["top_k"] < 1
    own = report["coupling"]["1"]
    assert own["n"] == 6 and 0 < own["p"] <= 1
    assert (tmp_path / "o" / "figures" / "saturation.png").exists()
    rows = csv.DictReader((tmp_path / "o" / "vocabulary.csv").open())
    assert {" "} <= {row["token"] for row in rows}
    text = analysis_text.text(report)
    assert "router saturation against run" in text and "own rows" in text


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--steps=all",), "has no checkpoint before step 0"),
        (("--steps=3",), "has no checkpoint of step 3; it has 0"),
        (("--steps=0",), "--steps=0 must be steps before 0"),
        ((f"--checkpoint={GOLDEN / 'mixtral'}", "--steps=all"), "--steps needs a run"),
    ],
)
def test_steps_that_are_not_there_are_refused(arguments, complaint, root, monkeypatch, capsys):
    monkeypatch.setattr(recording, "record", None)
    assert complaint in refusal(monkeypatch, capsys, *options(root), *arguments)


def test_labels_of_strangers_are_shown_without_their_control_characters(
    monkeypatch, capsys, tmp_path
):
    facts = dataclasses.replace(test_decisions.FACTS, labels=("\x1b[2J", "\u202ben"))
    test_decisions.write(tmp_path / "routing", facts)
    text = run(monkeypatch, capsys, f"--routing={tmp_path / 'routing'}")
    assert "\x1b" not in text and "\u202b" not in text and "[2J" in text


@pytest.mark.parametrize(
    ("option", "complaint"),
    [
        ("--text=nowhere.txt", "analyze.py: --text='nowhere.txt' matches no file"),
        ("--permutations=0", "--permutations=0 must be at least 1"),
        ("--max_tokens=0", "--max_tokens=0 must be at least 1"),
        ("--sequence_length=0", "--sequence_length=0 must be at least 1"),
        ("--tokenizer=words", "analyze.py: --tokenizer='words' is not a file"),
        ("--distances=nowhere.csv", "nowhere.csv is not a file"),
    ],
)
def test_a_mistake_is_one_line(option, complaint, root, monkeypatch, capsys):
    monkeypatch.setattr(recording, "record", None)
    assert complaint in refusal(monkeypatch, capsys, *options(root), option)


def test_models_without_routing_of_tokens_are_refused(monkeypatch, capsys):
    found = refusal(monkeypatch, capsys, f"--checkpoint={GOLDEN / 'llama'}", "--text=nowhere.txt")
    assert "the model is dense" in found
    merged = dataclasses.replace(
        CONFIG, dispatch="merge", merge_segment_length=4, num_experts_per_tok=1
    )
    with pytest.raises(ValueError, match="no token is routed to an expert"):
        recording.check(merged)


def test_a_tokenizer_of_more_ids_than_the_model_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(stores, "weights", None)
    options = f"--checkpoint={GOLDEN / 'mixtral'}", "--tokenizer=bytes"
    found = refusal(monkeypatch, capsys, *options)
    assert "the tokenizer has 259 ids and the model 151" in found


def test_routing_of_another_model_or_text_is_refused(root, monkeypatch, capsys):
    saved = f"--routing={root / 'model_routing'}"
    found = refusal(monkeypatch, capsys, saved, *options(root, "later"))
    assert "is the routing of another model" in found
    found = refusal(monkeypatch, capsys, saved, *options(root), "--max_tokens=30")
    assert "is the routing of another text" in found
    found = refusal(monkeypatch, capsys, saved, f"--text={root / 'text.jsonl'}")
    assert "needs --checkpoint" in found
    monkeypatch.setattr(recording, "record", None)
    compared = f"--compare={root / 'later_routing'}"
    found = refusal(monkeypatch, capsys, *options(root), "--max_tokens=30", compared)
    assert "is the routing of another text" in found
    assert "give --checkpoint" in refusal(monkeypatch, capsys, "--json")
    assert "--coupling needs the model" in refusal(monkeypatch, capsys, saved, "--coupling")
