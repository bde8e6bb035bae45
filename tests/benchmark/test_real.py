"""Real models: the bytes that decoding must read, by hand, and rows of each kind of work."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import jax
import pytest

from moe_jax import hf, model
from moe_jax.benchmark import peers, real
from moe_jax.commands import benchmark as benchmark_command

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
DENSE = model.ModelConfig(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    tie_word_embeddings=True,
)


def test_a_dense_model_is_read_whole_with_its_cache():
    total, _ = model.count_parameters(DENSE)
    cached = 2 * 2 * 16 * 10 * 3  # keys and values, layers, width, positions, rows
    assert real.bytes_due(DENSE, rows=3, length=10) == 4 * (total + cached)
    halves = dataclasses.replace(DENSE, dtype="bfloat16")
    assert real.bytes_due(halves, rows=3, length=10) == 2 * (total + cached)
    # Decoding reads only the rows' tokens of an embedding that is not tied.
    untied = dataclasses.replace(DENSE, tie_word_embeddings=False)
    assert real.bytes_due(untied, rows=3, length=0) == 4 * (total + 3 * 16)


@pytest.mark.parametrize(("rows", "share"), [(1, 1 / 4), (2, 7 / 16), (1000, 1)])
def test_of_a_mixture_the_chosen_experts_are_read(rows, share):
    mixture = dataclasses.replace(DENSE, num_experts=8, num_experts_per_tok=2)
    total, _ = model.count_parameters(mixture)
    experts = 2 * 8 * 3 * 16 * 24
    due = 4 * (total - experts + share * experts)
    assert real.bytes_due(mixture, rows=rows, length=0) == pytest.approx(due)


@pytest.fixture
def small(monkeypatch):
    """Fewer and shorter rows, and no process for each measurement."""
    for name, work in real.WORKS.items():
        fewer = dataclasses.replace(work, rows=2, length=8)
        monkeypatch.setitem(real.WORKS, name, fewer)
    monkeypatch.setattr(real, "_in_a_process", lambda function, *rest: function(*rest))
    monkeypatch.setattr(peers, "PROMPT", 4)
    monkeypatch.setattr(real, "NEW", 8)


@pytest.mark.parametrize("work", ["forward", "train", "decode_8"])
def test_a_row_for_each_work_and_implementation(small, work, monkeypatch):
    theirs = {work.split("_")[0]: lambda folder, rows, length: lambda: 0}
    monkeypatch.setitem(peers.REAL, "hf", theirs)
    monkeypatch.setattr(peers, "NEEDS", {"hf": ("json",)})
    found = list(real.run([GOLDEN / "mixtral"], [work], 1, "hf"))
    assert [row.implementation for row in found] == ["moe_jax", "hf"]
    for row in found:
        assert (row.benchmark, row.case) == ("real", f"mixtral {work}")
        assert row.tokens_per_second == pytest.approx(16 / row.median_seconds)
        assert row.bound_seconds > 0


def test_mistakes_are_one_line(monkeypatch, capsys):
    def said(*options):
        monkeypatch.setattr(sys, "argv", ["benchmark.py", *options])
        with pytest.raises(SystemExit) as ended:
            benchmark_command.main()
        [line] = capsys.readouterr().err.splitlines()
        assert ended.value.code == 2
        return line

    assert "the benchmark real needs --model=DIR" in said("real")
    assert "only it takes --model" in said("decode", "--model=tests/golden/llama")
    assert "only it takes --model and --work" in said("decode", "--work=train")
    assert "tests/golden" in said("real", "--model=tests/golden")


@pytest.mark.long
def test_the_command_prints_rows_of_processes(tmp_path):
    folder = tmp_path / "dense"
    hf.save(folder, DENSE, model.init(DENSE, jax.random.key(0)))
    command = [sys.executable, "scripts/benchmark.py", "real", f"--model={folder}", "--json"]
    command += ["--repeats=1", "--work=decode_1", "--work=forward"]
    rows = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert [row["case"] for row in rows] == ["dense decode_1", "dense forward"]
