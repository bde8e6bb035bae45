"""A run's row is of its own files, and a repetition of the run has the same one."""

import dataclasses
import json
import pathlib

import pytest

from moe_jax import config as configs
from moe_jax import model, train
from moe_jax.commands import results
from moe_jax.config import environment
from moe_jax.experiments import rows
from moe_jax.sweep import execution, launchers, plan
from moe_jax.sweep.plan import Run
from tests import tiny_runs

TINY = model.ModelConfig(
    vocab_size=259,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_experts=2,
    num_experts_per_tok=1,
    norm_topk_prob=False,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run on ten files, with one more whose name says test."""
    folder = tmp_path_factory.mktemp("run")
    config = tiny_runs.config(folder, TINY)
    (folder / "test.txt").write_text("four or five are not in the others " * 20)
    config.evaluation.update(test_split=True, every_steps=1)
    settings, workdir = configs.resolve(config), folder / "tiny_s1"
    train.run(settings, workdir)
    overrides = {"seed": 1, "model.layers": ("moe",)}
    return Run("tiny_s1", "id", workdir, (), group="tiny", seed=1, overrides=overrides)


@pytest.fixture(scope="module")
def row(run):
    [found] = rows.collect([run])
    return found


def test_a_row_has_the_numbers_of_the_runs_files(run, row):
    result = json.loads((run.workdir / "result.json").read_text())
    assert row.test_bits_per_byte == result["test"]["bits_per_byte"] != row.validation_bits_per_byte
    assert row.validation_bits_per_byte == result["bits_per_byte"]
    assert row.test_bits_by_label == {"all": pytest.approx(row.test_bits_per_byte, abs=1e-5)}
    assert (row.group, row.number, row.seed) == ("tiny", 1, 1)
    assert row.overrides == {"model.layers": ("moe",)} and row.tokens == 2 * 8 * 16
    assert [tokens for tokens, _ in row.curve] == [0, 8 * 16, 2 * 8 * 16]
    assert len(row.effective_experts) == len(row.max_violation) == 1
    assert 1 <= row.effective_experts[0] <= 2 and 0 <= row.max_violation_mean <= 1
    assert "core" in row.hardware and row.seconds > 0


def test_the_test_split_is_the_file_of_that_name_and_is_not_trained_on(run, row):
    result = json.loads((run.workdir / "result.json").read_text())
    text = "four or five are not in the others " * 20
    assert result["test"]["held_out_tokens"] == len(text) + 1  # and the token that ends it
    logged = (run.workdir / "metrics.jsonl").read_text()
    assert '"test"' not in logged  # read once, at the end


def test_only_what_is_of_the_execution_may_differ_between_repetitions(row, tmp_path):
    rows.write(tmp_path / "rows.jsonl", [row])
    old = rows.read(tmp_path / "rows.jsonl")
    again = dataclasses.replace(row, seconds=1.0, commit="other")
    assert rows.differences(old, [again]) == []
    value = row.test_loss * (1 + 2**-50)
    [line] = rows.differences(old, [dataclasses.replace(row, test_loss=value)])
    assert line.startswith("tiny_s1: test_loss=")
    assert rows.differences(old, [dataclasses.replace(row, name="new")]) == []


def test_what_analyze_left_in_the_folder_of_a_run_is_in_its_row(run, row, tmp_path):
    """A repetition that was not analysed has the same row, another finding is a difference."""
    folder = run.workdir / "analysis"
    folder.mkdir()
    layers = {"0": {"label_divergence": 0.25}, "1": {"label_divergence": 0.5}}
    found = {"layers": layers, "languages": {"mantel": {"statistic": 0.125}}}
    (folder / "result.json").write_text(json.dumps(found))
    [analysed] = rows.collect([run])
    assert row.languages is None
    assert analysed.languages == {"divergence": 0.375, "family": 0.125}
    assert rows.differences([analysed], [row]) == []
    other = dataclasses.replace(row, languages={"divergence": 0.375, "family": 0.25})
    [line] = rows.differences([analysed], [other])
    assert line.startswith("tiny_s1: languages=")
    (folder / "result.json").write_text(json.dumps(found | {"languages": None}))
    assert rows.collect([run])[0].languages is None  # the text had no related languages


def test_a_run_without_a_test_loss_is_refused(run, row):
    result = json.loads((run.workdir / "result.json").read_text())
    del result["test"]
    with pytest.raises(ValueError, match="tiny_s1 has no test loss; set config.evaluation.test_sp"):
        rows.of_run(run, result, "a CPU")


def test_a_source_without_a_test_split_is_refused_with_what_to_do(tmp_path):
    config = tiny_runs.config(tmp_path, TINY)
    config.evaluation.test_split = True
    with pytest.raises(configs.ConfigError, match="no test documents; add files whose names say"):
        train.run(configs.resolve(config), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_a_repetition_of_a_committed_run_has_its_row(tmp_path, monkeypatch):
    """The first run of the bench, on one of two cores, as in its sweep; with the tests' eight
    devices and optimisations of XLA, its bits would be others."""
    monkeypatch.delenv("XLA_FLAGS")
    config = "configs/experiments/bench/cpu.py"
    path = pathlib.Path(config).with_suffix(".jsonl")
    if not path.exists():
        pytest.skip("the study has not been run")
    runs, committed = plan.read(config, tmp_path), rows.read(path)
    [first, *_] = runs
    same = rows.hardware({"device": "cpu x 1"}) == committed[0].hardware
    if not same or environment.versions() != committed[0].versions:
        pytest.skip("the row is of other hardware or software, whose last bits may differ")
    launcher = launchers.Local(["python", "scripts/train.py"], max_parallel=2)
    execution.Execution(runs, launcher, tmp_path, max_parallel=2, chosen=[first]).execute()
    assert results._collect(config, tmp_path, check=True)[1] == []
