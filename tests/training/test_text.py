"""Runs on a mixture: losses and counts by source, resumption, changes at resume, refusals."""

import json
import re

import pytest

from moe_jax import config as configs
from moe_jax import train
from moe_jax.config import environment
from moe_jax.data import preparation, prepare, tokenizers
from moe_jax.report import page, records, tables
from moe_jax.training import checkpoint, metrics

CLOCK_FIELDS = ("tokens_per_second", "data_wait", "mfu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for name, number in (("a", 60), ("b", 30)):
        lines = [
            {"text": f"{name} {i} is {i * i}, ", "language": f"{i % 2}"} for i in range(number)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def config_of(folder, **changed):
    config = configs.default()
    config.model.update(
        vocab_size=259, hidden_size=8, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    config.data.update(
        source=str(folder / "{name}.jsonl"),
        sequence_length=8,
        validation_fraction=0.3,
        cache_dir=str(folder / "cache"),
    )
    config.data.mixture.update(
        shares=(("a", 3), ("b", 1)),
        most_epochs=(("b", 1),),
        stages=((8, (("a", 1), ("b", 1))),),
    )
    config.training.update(num_steps=12, batch_size=8, log_every=1)
    config.evaluation.update(every_steps=6, batch_size=8)
    config.checkpoint.update(every_steps=4, keep=9)
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changed.items()})
    return config


def run(folder, workdir, **changed):
    return train.run(configs.resolve(config_of(folder, **changed)), workdir)


def digests(workdir, step):
    return checkpoint.described(workdir / "checkpoints" / str(step))["digests"]


def rows_of(workdir):
    rows = metrics.read(workdir / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in CLOCK_FIELDS} for row in rows]


@pytest.fixture(scope="module")
def unbroken(folder, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "unbroken"
    return workdir, run(folder, workdir)


def test_losses_and_counts_are_reported_by_source(unbroken):
    workdir, result = unbroken
    per_source, per_label = result["per_source"], result["per_language"]
    assert set(per_label) == {"a/0", "a/1", "b/0", "b/1"}
    assert sum(row["held_out_tokens"] for row in per_source.values()) == result["held_out_tokens"]
    weighted = sum(row["loss"] * row["held_out_tokens"] for row in per_source.values())
    assert weighted / result["held_out_tokens"] == pytest.approx(result["loss"])
    low, high = sorted(per_label[f"a/{i}"]["loss"] for i in range(2))
    assert low <= per_source["a"]["loss"] <= high
    evaluated = [row for row in rows_of(workdir) if "validation" in row]
    assert [row["step"] for row in evaluated] == [0, 6, 12]
    assert evaluated[0]["sources"]["a"] == {"share": 0, "tokens": 0, "epochs": 0}
    assert evaluated[1]["sources"]["a"]["share"] == pytest.approx(0.75, abs=0.03)
    assert evaluated[1]["validation"]["per_source"].keys() == {"a", "b"}
    given = result["sources"]
    assert given == evaluated[2]["sources"]
    assert given["a"]["share"] + given["b"]["share"] == pytest.approx(1)
    [record] = page.records_of({"mixed": workdir})
    assert record.source == "a, b"
    assert f"{100 * given['b']['share']:.2f} %" in tables.of_sources(records.groups([record]))


def test_a_run_resumed_in_a_stage_and_in_another_is_the_unbroken_one(unbroken, folder, tmp_path):
    for stop in (3, 9):
        run(folder, tmp_path, training__stop_step=stop)
    run(folder, tmp_path)
    assert digests(tmp_path, 12) == digests(unbroken[0], 12)
    at_stops = [row for row in rows_of(tmp_path) if "loss" in row]
    assert at_stops == [row for row in rows_of(unbroken[0]) if "loss" in row]


@pytest.mark.long
def test_a_run_whose_batches_are_made_by_a_worker_process_is_the_same(unbroken, folder, tmp_path):
    run(folder, tmp_path, data__workers=1)
    assert digests(tmp_path, 12) == digests(unbroken[0], 12)


@pytest.mark.long
def test_a_mixture_changed_at_resume_says_so_and_keeps_its_history(folder, tmp_path, capsys):
    run(folder, tmp_path, training__stop_step=4)
    other = {"data__mixture__shares": (("a", 1), ("b", 1))}
    run(folder, tmp_path, **other, training__stop_step=9)
    said = capsys.readouterr().err
    assert "source a: 0.75 -> 0.5 from batch 4 on; source b: 0.25 -> 0.5 from batch 4 on" in said
    kept = checkpoint.described(tmp_path / "checkpoints" / "9")["data"]
    assert [stage[:2] for stage in kept["mixture"]] == [
        [0, {"a": 0.75, "b": 0.25}],
        [4, {"a": 0.5, "b": 0.5}],
        [8, {"a": 0.5, "b": 0.5}],
    ]
    assert set(kept["text"]) == {"a/train", "b/train", "a/validation", "b/validation"}
    run(folder, tmp_path, **other)
    assert "from batch" not in capsys.readouterr().err


def test_a_changed_source_is_refused_by_its_name(folder, tmp_path):
    before = {"a/train": "1", "b/train": "2"}
    settings = configs.resolve(config_of(folder))
    with pytest.raises(configs.ConfigError, match="mixture, source b:'.*b.jsonl'.* another train"):
        environment.changed_text(before, {**before, "b/train": "3"}, settings)
    assert not environment.changed_text(before, {**before, "c/train": "3"}, settings)
    settings = configs.resolve(config_of(folder, data__other_text=True))
    assert environment.changed_text(before, {**before, "b/train": "3"}, settings)


def test_labels_can_be_sources_and_rare_ones_are_left_out_and_named(folder, tmp_path, capsys):
    lines = [{"text": f"{i}", "language": "x" if i % 9 else "rare"} for i in range(60)]
    (folder / "labels.jsonl").write_text("\n".join(map(json.dumps, lines)))
    config = config_of(folder, data__source=str(folder / "labels.jsonl"))
    uniform = {
        "by_label": True,
        "weights": "uniform",
        "shares": (),
        "stages": (),
        "most_epochs": (),
    }
    config.data.mixture.update(uniform | {"minimum_documents": 20})
    config.training.num_steps = 1
    result = train.run(configs.resolve(config), tmp_path)
    assert re.search(r"left out for fewer than 20 documents: rare \(\d\)", capsys.readouterr().err)
    assert result["sources"]["rare"]["tokens"] == 0 < result["sources"]["x"]["tokens"]
    assert set(result["per_language"]) == {"x", "rare"} and "per_source" not in result


WRONG = {
    "data__mixture__shares=()": "has no effect without config.data.mixture.sources",
    "data__mixture__shares=(('a', 0),)": "needs mixture.shares with a positive weight",
    "data__source='a.jsonl'": "a, b have no text of their own, and data.source='a.jsonl' has no",
    "data__mixture__stages=((0, (('b', 1),)),)": "pairs (step, shares) of growing steps above 0",
    "data__mixture__stages=((9, (('c', 1),)),)": "step 9: source='c' is unknown; use one of a",
    "data__mixture__stages=((12, (('b', 1),)),)": "step 12, never begins: training.num_steps=12",
    "data__mixture__most_epochs=(('c', 1),)": "mixture.most_epochs: source='c' is unknown",
    "data__mixture__weights='temprature'": "'temprature'",
    "data__mixture__exponent=0.5": "no effect without config.data.mixture.weights='temperature'",
    "data__mixture__minimum_documents=5": "has no effect without config.data.mixture.weights='prop",
    "data__mixture__weights='uniform'": "has no effect without config.data.mixture.weights='fixed'",
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_mixture_is_refused_in_one_line(folder, wrong):
    key, _, value = wrong.partition("=")
    with pytest.raises(configs.ConfigError) as error:
        configs.resolve(config_of(folder, **{key: eval(value)}))
    assert WRONG[wrong] in str(error.value) and "\n" not in str(error.value)


def test_sources_without_a_text_are_all_named(folder, tmp_path):
    missing = {"data__mixture__shares": (("a", 1), ("b", 2), ("x", 1), ("y", 1))}
    with pytest.raises(configs.ConfigError) as error:
        run(folder, tmp_path / "run", **missing)
    assert "2 of 4 sources cannot be read: x (" in str(error.value)
    assert "; y ('" in str(error.value) and "matches no file); give" in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_text_that_has_been_prepared_is_no_conversations(folder, tmp_path):
    text = preparation.Text(str(folder / "a.jsonl"), 0.3, tmp_path)
    prepare.prepare_folder(text, tmp_path / "made", preparation.Job(tokenizers.load("bytes")))
    config = config_of(folder)
    config.data.mixture = configs.default().data.mixture
    source = f"prepared:{tmp_path / 'made'}"
    config.data.update(source=source, conversations=True, validation_fraction=0.05)
    with pytest.raises(configs.ConfigError, match="conversations=True, but prepared:.*made has"):
        train.run(configs.resolve(config), tmp_path / "run")


def test_sources_that_end_before_the_run_are_refused_with_the_step(folder, tmp_path):
    ends = {"data__mixture__most_epochs": (("*", 1),), "training__num_steps": 1000}
    with pytest.raises(configs.ConfigError) as error:
        run(folder, tmp_path / "run", **ends)
    [step] = re.findall(r"allows at step (\d+), before the run's last step 1000", str(error.value))
    assert str(error.value).endswith(f"; raise most_epochs, or set training.num_steps={step}")
    ends["training__num_steps"] = int(step) + 1
    with pytest.raises(configs.ConfigError):
        run(folder, tmp_path / "run", **ends)
    ends["data__mixture__most_epochs"] = (("*", 0.001),)
    with pytest.raises(configs.ConfigError, match="at step 0, before .*; raise most_epochs$"):
        run(folder, tmp_path / "run", **ends)


def test_a_source_too_small_to_hold_out_a_document_is_named_with_what_helps_it_alone(
    folder, tmp_path
):
    (folder / "c.jsonl").write_text('{"text": "g"}')
    shares = {"data__mixture__shares": (("a", 1), ("c", 1)), "data__mixture__stages": ()}
    with pytest.raises(configs.ConfigError) as error:
        run(folder, tmp_path / "run", **shares, data__mixture__most_epochs=())
    assert str(error.value).startswith("config.data.mixture, source c: data.source='")
    assert "has no validation documents; " in str(error.value)
    assert str(error.value).endswith("join a small source of a mixture with another one by a glob")


def test_a_mixture_survives_the_command_line_and_json(folder, tmp_path):
    path = tmp_path / "config.py"
    path.write_text("from moe_jax import config\ndef get_config():\n    return config.default()\n")
    flags = {
        "model.preset": "quickstart",
        "data.source": "t/{name}.jsonl",
        "data.mixture.shares": "(('a', 0.5), ('b', 1.5))",
        "data.mixture.sources": "(('b', 'other.txt'),)",
        "data.mixture.stages": "((10, (('b', 1),)),)",
    }
    config = configs.load(str(path), flags)
    configs.save_json(config, tmp_path)
    read = configs.data_of(configs.load_json(tmp_path))
    assert read.mixture == configs.resolve(config).data.mixture == configs.data_of(config).mixture
    assert read.named_sources == {"b": "other.txt", "a": "t/a.jsonl"}
    assert read.mixture.stages == ((10, (("b", 1),)),)
