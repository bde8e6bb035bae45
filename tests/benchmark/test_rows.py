"""Benchmark rows: the documented keys, ratios of medians of calls made in turn."""

import dataclasses
import json
import subprocess
import sys

import jax.numpy as jnp
import pytest

from moe_jax.benchmark import cases, peers
from moe_jax.benchmark import rows as benchmark


def test_functions_are_called_in_turn_and_medians_are_taken(monkeypatch):
    clock, calls = [0.0], []
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: clock[0])

    def taking(name, seconds):
        def function():
            clock[0] += seconds[calls.count(name)]
            calls.append(name)
            return jnp.zeros(())

        return function

    # The first call compiles and is not counted; then an outlier each.
    functions = {"ours": taking("ours", [50, 2, 90, 4]), "bound": taking("bound", [70, 1, 2, 80])}
    assert benchmark.medians(functions, repeats=3) == {"ours": 4, "bound": 2}
    assert calls == ["ours", "bound"] * 4


def test_a_row_has_the_documented_keys_and_the_ratio_of_its_times(monkeypatch):
    case = cases.Case("c", 100, {"a": lambda: 0, "b": lambda: 0}, "ideal", lambda: 0)
    monkeypatch.setitem(cases.BENCHMARKS, "fake", lambda: [case])
    monkeypatch.setattr(benchmark, "medians", lambda *_: {"a": 0.5, "b": 2.0, "ideal": 0.25})
    rows = [dataclasses.asdict(row) for row in benchmark.run("fake", 3)]
    assert set(rows[0]) == {
        "benchmark", "case", "implementation", "backend", "dtype", "median_seconds",
        "tokens_per_second", "bound", "bound_seconds", "ratio_to_bound",
    }  # fmt: skip
    assert [(r["implementation"], r["ratio_to_bound"], r["tokens_per_second"]) for r in rows] == [
        ("a", 2.0, 200.0),
        ("b", 8.0, 50.0),
    ]


def test_a_peer_gets_a_row_of_its_own(monkeypatch):
    case = cases.Case("c", 100, {"a": lambda: 0}, "ideal", lambda: 0, config="its config")
    monkeypatch.setitem(cases.BENCHMARKS, "fake", lambda: [case])
    built = []
    monkeypatch.setitem(peers.PEERS, "hf", {"fake": lambda c: built.append(c) or (lambda: 0)})
    monkeypatch.setitem(peers.NEEDS, "hf", ("json",))
    assert [row.implementation for row in benchmark.run("fake", 1, peer="hf")] == ["a", "hf"]
    assert built == ["its config"]


def test_a_peer_that_cannot_is_refused_in_one_line(monkeypatch):
    with pytest.raises(ValueError, match="--peer=hf does not do decode; it does train_step"):
        benchmark.run("decode", 1, peer="hf")
    monkeypatch.setitem(peers.NEEDS, "hf", ("json", "no_such_package"))
    with pytest.raises(ValueError, match="needs more: pip install no_such_package"):
        benchmark.run("train_step", 1, peer="hf")
    monkeypatch.setattr(peers.implementations, "platform", lambda: "gpu")
    with pytest.raises(ValueError, match="--peer=hf is made for a CPU, not for a gpu"):
        benchmark.run("train_step", 1, peer="hf")


@pytest.mark.long
@pytest.mark.parametrize("name", cases.BENCHMARKS)
def test_every_benchmark_prints_rows_as_json(name):
    script = [sys.executable, "scripts/benchmark.py", name, "--repeats=1", "--json"]
    rows = json.loads(subprocess.run(script, capture_output=True, check=True).stdout)
    assert rows and all(row["ratio_to_bound"] > 0 for row in rows)
    if name == "train_step":
        assert [row["case"] for row in rows] == ["8e-top2", "64e-top8"]
        assert {row["bound"] for row in rows} == {"dense_step"}
