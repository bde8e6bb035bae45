"""Multiple choice within a run: at its interval, at the end, and as the command reports it."""

import dataclasses
import json

import jax
import pytest

from moe_jax import config as configs
from moe_jax import model, stores, train
from moe_jax.data import tokenizers
from moe_jax.evaluation import evaluators
from moe_jax.training import metrics
from tests.evaluation.test_evaluate import run

ITEM = {"context": "one, two,", "choices": [" three", " eight!"], "answer": 0, "label": "en"}


@pytest.fixture
def config(tmp_path):
    (tmp_path / "text").mkdir()
    for i in range(4):
        (tmp_path / "text" / f"{i}.txt").write_text("one, two, three, four " * 20)
    (tmp_path / "items.jsonl").write_text(
        "\n".join(json.dumps({**ITEM, "answer": n % 2}) for n in range(5))
    )
    config = configs.default()
    config.model.update(
        vocab_size=259,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    config.data.update(
        source=str(tmp_path / "text"),
        sequence_length=32,
        validation_fraction=0.25,
        cache_dir=str(tmp_path / "cache"),
    )
    config.training.update(num_steps=2, batch_size=8, log_every=1)
    config.evaluation.update(
        every_steps=1, batch_size=8, multiple_choice=str(tmp_path / "items.jsonl")
    )
    return config


def test_the_evaluator_reports_what_the_command_reports(config, tmp_path, monkeypatch, capsys):
    settings = configs.resolve(config)
    evaluators.check(settings)
    mesh, tokenizer = stores.evaluation_mesh(settings.model), tokenizers.load("bytes")
    context = evaluators.Context(settings, mesh, None, tokenizer, {})
    scheduled = evaluators.schedule(context)["multiple_choice"]
    assert scheduled.is_due(1) and scheduled.logged_at_end
    params = jax.jit(lambda: model.init(settings.model, jax.random.key(0)))()
    stores.save(tmp_path / "run", settings.model, params)
    on_mesh = stores.load(stores.find(str(tmp_path / "run")), mesh)[1]
    found = scheduled.evaluate(on_mesh)
    assert found.row == found.result and found.row["multiple_choice"]["n"] == 5
    options = f"--checkpoint={tmp_path / 'run'}", f"--items={config.evaluation.multiple_choice}"
    [own] = json.loads(run(monkeypatch, capsys, *options, "--json"))["models"]
    whole = found.row["multiple_choice"]
    assert {name: own[name] for name in whole} == whole
    assert whole["accuracy"] in (0.4, 0.6)  # the same choice for all five
    off = dataclasses.replace(settings.evaluation, multiple_choice="")
    assert evaluators.intervals(off)["multiple_choice"] == 0


@pytest.mark.long
def test_a_run_reports_multiple_choice_at_its_interval(config, tmp_path):
    config.evaluation.intervals = (("multiple_choice", 2),)
    result = train.run(configs.resolve(config), tmp_path / "run")
    rows = [r for r in metrics.read(tmp_path / "run" / "metrics.jsonl") if "multiple_choice" in r]
    assert [row["step"] for row in rows] == [0, 2]
    found = rows[-1]["multiple_choice"]
    assert found == json.loads((tmp_path / "run" / "result.json").read_text())["multiple_choice"]
    assert found["n"] == found["labels"]["en"]["n"] == 5 and found["chance"] == 0.5
    assert result["multiple_choice"]["accuracy"] in (0.4, 0.6)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"multiple_choice": "none.jsonl"}, "multiple_choice: none.jsonl is not a file"),
        ({"multiple_choice": "WRONG"}, "wrong.jsonl, line 1: 'answer' is 2"),
    ],
)
def test_items_that_cannot_be_read_are_refused_before_the_run(changes, complaint, config, tmp_path):
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text(json.dumps({**ITEM, "answer": 2}))
    changes = {name: str(wrong) if value == "WRONG" else value for name, value in changes.items()}
    config.evaluation.update(changes)
    with pytest.raises(configs.ConfigError, match=complaint):
        train.run(configs.resolve(config), tmp_path / "run")
    assert not (tmp_path / "run").exists()
