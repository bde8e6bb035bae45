"""Evaluators within a run: multiple choice as the command reports it, similarity to the parent."""

import dataclasses
import json

import jax
import pytest

from moe_jax import config as configs
from moe_jax import stores, train
from moe_jax.data import tokenizers
from moe_jax.evaluation import evaluators
from moe_jax.training import metrics
from tests import drawn
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
    params = drawn.parameters(settings.model)
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


@pytest.fixture
def upcycled(config, tmp_path):
    """The config of a mixture made from a dense model, and the parent's parameters."""
    dense = configs.resolve(config).model
    params = drawn.parameters(dense)
    stores.save(tmp_path / "dense", dense, params)
    config.init.source = str(tmp_path / "dense")
    config.init.upcycle.recipe, config.data.tokenizer = "naive", "bytes"
    config.model.update(num_experts=4, num_experts_per_tok=2)
    config.evaluation.multiple_choice = ""
    return config, (params, dense)


def test_copies_of_the_parent_are_like_it_until_it_is_gone(upcycled, tmp_path, capsys):
    settings, (params, dense) = configs.resolve(upcycled[0]), upcycled[1]
    evaluators.check(settings)
    kept = [(params, dense)]

    def parent():
        if not kept:
            raise ValueError("the parent is not there")
        return kept[0]

    context = evaluators.Context(settings, None, None, None, {}, parent)
    row = evaluators.EVALUATORS["parent_similarity"]
    assert row.every(settings.evaluation) == 1
    evaluate = row.make(context)
    mixture = drawn.parameters(settings.model, 1)
    layer = mixture["blocks"]["0"]["moe"]["experts"]
    for name in layer:
        w_LXY = params["blocks"]["0"]["mlp"][name]
        layer[name] = jax.numpy.stack([w_LXY, 3 * w_LXY] * 2, axis=1)
    found = evaluate(mixture)
    assert found.row == found.result == {"parent_similarity": [1], "parent_distance": [1]}
    kept.clear()
    assert evaluate(mixture) == evaluate(mixture) == evaluators.Evaluation({}, {})
    assert capsys.readouterr().err.count("the parent is not there") == 1


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"model.num_experts": None, "model.num_experts_per_tok": None,
          "init.upcycle.recipe": ""}, "the run is not upcycled"),
        ({"model.moe_intermediate_size": 16}, "have 32 neurons, and an expert 16"),
    ],
)  # fmt: skip
def test_an_interval_for_a_parent_that_cannot_be_compared_is_refused(changes, complaint, upcycled):
    config = upcycled[0]
    for key, value in changes.items():
        config.update_from_flattened_dict({key: value})
    evaluators.check(configs.resolve(config))
    config.evaluation.intervals = (("parent_similarity", 1),)
    with pytest.raises(configs.ConfigError, match=complaint):
        evaluators.check(configs.resolve(config))


@pytest.mark.long
def test_an_upcycled_run_measures_its_parent_at_each_evaluation(upcycled, tmp_path):
    settings = configs.resolve(upcycled[0])
    train.run(settings, tmp_path / "run")
    rows = metrics.read(tmp_path / "run" / "metrics.jsonl")
    found = [row["parent_similarity"] for row in rows if "parent_similarity" in row]
    assert len(found) == 3 and found[0] == [1] and 0.9 < found[2][0] < 1
    (tmp_path / "dense").rename(tmp_path / "moved")
    upcycled[0].training.num_steps = 3
    train.run(configs.resolve(upcycled[0]), tmp_path / "run")
    rows = metrics.read(tmp_path / "run" / "metrics.jsonl")  # those of step 2 are written anew
    assert [row["step"] for row in rows if "parent_similarity" in row] == [0, 1]
    assert [row["step"] for row in rows if "validation" in row] == [0, 1, 2, 3]
