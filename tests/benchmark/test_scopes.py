"""A profile says which part of the model took how long, and recording it changes no step."""

import ast
import contextlib
import dataclasses
import json
import pathlib
import re
import sys
import types

import jax
import jax.numpy as jnp
import pytest

from moe_jax import config as configs
from moe_jax import model, train
from moe_jax.benchmark import scopes
from moe_jax.benchmark.scopes import Event
from moe_jax.commands import profile_summary
from moe_jax.data.batches import Batch
from moe_jax.training import metrics, optimizer, step
from moe_jax.training.state import TrainState
from tests import tiny_runs

PACKAGE = pathlib.Path(__file__).parents[2] / "moe_jax"
TINY = model.ModelConfig(
    vocab_size=259,
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_experts=4,
    num_experts_per_tok=2,
)


def test_every_named_scope_of_the_package_is_in_the_table():
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "jax.named_scope":
                if isinstance(node.args[0], ast.Constant):
                    found.add(node.args[0].value)
    assert found == set(scopes.SCOPES)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("jit(train_step)/jvp(moe)/router/dot_general", ("router", "forward")),
        ("jit(train_step)/transpose(jvp(moe))/while/body/experts/mul", ("experts", "backward")),
        ("jit(f)/transpose(jvp(moe))/checkpoint/rematted_computation/experts/mul",
         ("experts", "recomputed")),
        ("jit(train_step)/jvp(moe)/add", ("moe", "forward")),
        ("jit(train_step)/my_moe/experts_2/add", (scopes.OTHER, "forward")),  # not these words
        ("", (scopes.OTHER, "forward")),
        (None, (scopes.ELSEWHERE, "forward")),
    ],
)  # fmt: skip
def test_the_innermost_scope_and_the_pass_are_read_from_an_instructions_name(name, expected):
    assert scopes.place(name) == expected


def test_a_loop_has_only_the_time_that_its_body_leaves():
    events = [
        Event(0, 100, "loop", ""),
        Event(10, 30, "a", ""),
        Event(30, 90, "inner loop", ""),
        Event(40, 80, "b", ""),
        Event(100, 105, "after", ""),
    ]
    own = {event.name: seconds for event, seconds in scopes.self_times(reversed(events))}
    assert own == {"loop": 20, "a": 20, "inner loop": 20, "b": 40, "after": 5}
    assert sum(own.values()) == 105  # all of the time, and none of it twice


def test_a_fusion_without_a_name_has_that_of_its_instructions():
    text = """HloModule jit_f, is_scheduled=true

%fused (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  %tanh.1 = f32[4]{0} tanh(%p), metadata={op_name="jit(f)/experts/tanh"}
  ROOT %copy.1 = f32[4]{0} copy(%tanh.1)
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  %fusion.1 = f32[4]{0} fusion(%x), kind=kLoop, calls=%fused
  ROOT %add.1 = f32[4]{0} add(%fusion.1, %x), metadata={op_name="jit(f)/router/add"}
}
"""
    names = scopes.op_names(text)
    assert names["fusion.1"] == "jit(f)/experts/tanh" and names["add.1"] == "jit(f)/router/add"


def test_a_device_with_a_line_of_xla_ops_counts_each_instruction_once():
    def event(name, start, **stats):
        return types.SimpleNamespace(name=name, start_ns=start, duration_ns=5, stats=stats.items())

    def profile(**lines):
        found = [
            types.SimpleNamespace(name=k.replace("_", " "), events=v) for k, v in lines.items()
        ]
        return types.SimpleNamespace(planes=[types.SimpleNamespace(lines=found)])

    tpu = profile(
        XLA_Modules=[event("jit_f", 0)], XLA_Ops=[event("%dot.3 = f32[2] dot(%a)", 0, flops=7)]
    )
    assert sum(map(list, scopes.lines(tpu)), []) == [Event(0, 5, "dot.3", "")]
    gpu = profile(
        python=[event("f", 0)], Stream=[event("gemm", 0, hlo_op="dot.3", hlo_module="jit_f")]
    )
    assert sum(map(list, scopes.lines(gpu)), []) == [Event(0, 5, "dot.3", "jit_f")]


def lowered(**changes):
    run = configs.Run(model=dataclasses.replace(TINY, **changes))
    tx = optimizer.adamw(run.optimizer, 10)
    state = jax.eval_shape(lambda key: TrainState.create(model.init(TINY, key), tx), KEY)
    batch = Batch.of_rows(jnp.ones((2, 17), jnp.int32), jnp.ones((2, 16), jnp.int32))
    return jax.jit(step.make_train_step(run, tx)).lower(state, batch)


KEY = jax.random.key(0)


def test_the_scopes_are_names_alone_and_the_program_is_the_same_without_them(monkeypatch):
    named = lowered()
    for scope in ("embedding", "attention", "router", "experts", "unembedding_loss", "optimizer"):
        assert re.search(rf"\b{scope}\b", named.as_text(debug_info=True)), scope
    monkeypatch.setattr(jax, "named_scope", lambda name: contextlib.nullcontext())
    bare = lowered()
    assert not re.search(r"\bexperts\b/", bare.as_text(debug_info=True))
    assert named.as_text() == bare.as_text()


@pytest.mark.long
def test_the_compiler_fuses_the_same_without_the_scopes(monkeypatch):
    def instructions(step):
        return re.sub(r", metadata=\{[^}]*\}|(?s:\nFileNames.*)", "", step.compile().as_text())

    # Else the second could be the first, from the cache.
    jax.config.update("jax_compilation_cache_include_metadata_in_key", True)
    named = instructions(lowered())
    monkeypatch.setattr(jax, "named_scope", lambda name: contextlib.nullcontext())
    assert instructions(lowered()) == named


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    config = tiny_runs.config(tmp_path_factory.mktemp("profiled"), TINY)
    config.training.num_steps = 4
    return config


@pytest.mark.long
def test_a_run_records_its_steps_and_computes_the_same(config, tmp_path, monkeypatch, capsys):
    plain = train.run(configs.resolve(config), tmp_path / "plain")
    config.profile.steps = (2, 3)
    profiled = train.run(configs.resolve(config), tmp_path / "profiled")
    assert profiled["loss"] == plain["loss"]
    losses = [
        [row["loss"] for row in metrics.read(tmp_path / name / "metrics.jsonl") if "loss" in row]
        for name in ("plain", "profiled")
    ]
    assert len(losses[0]) == 4 and losses[0] == losses[1]
    [trace] = (tmp_path / "profiled" / "profile").glob("plugins/profile/*/*.xplane.pb")
    lines = (
        line for p in jax.profiler.ProfileData.from_file(str(trace)).planes for line in p.lines
    )
    events = [dict(event.stats) for line in lines for event in line.events if event.name == "train"]
    assert sorted(stats["step_num"] for stats in events) == [2, 3]
    command = ["profile_summary", str(tmp_path / "profiled"), "--json"]
    monkeypatch.setattr(sys, "argv", command)
    capsys.readouterr()
    profile_summary.main()
    found = json.loads(capsys.readouterr().out)
    assert found["steps"] == [2, 3] and found["memory_of_step"]["temp"] > 0
    rows = {row["scope"]: row for row in found["scopes"]}
    assert {"attention", "router", "experts", "optimizer", "unembedding_loss"} <= rows.keys()
    assert sum(row["share"] for row in found["scopes"]) == pytest.approx(1)
    assert rows["experts"]["backward"] > 0 and rows["optimizer"]["backward"] == 0
    assert (tmp_path / "profiled" / "profile" / "memory.prof").stat().st_size > 0
    monkeypatch.setattr(sys, "argv", command[:2])
    profile_summary.main()
    table = capsys.readouterr().out
    assert table.startswith("steps 2 to 3: ") and "\nexperts " in table and "memory, MB: " in table


def test_a_run_without_a_profile_is_refused_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["profile_summary", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        profile_summary.main()
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1 and "config.profile.steps" in said


def test_a_profile_of_a_stranger_without_a_device_is_refused_in_one_line(
    tmp_path, monkeypatch, capsys
):
    facts = {"steps": [2, 3], "seconds_per_step": 1.0, "devices": 1, "memory_of_step": {}}
    (tmp_path / "profile").mkdir()
    (tmp_path / "profile" / "profile.json").write_text(json.dumps(facts))
    monkeypatch.setattr(sys, "argv", ["profile_summary", str(tmp_path)])
    with pytest.raises(SystemExit):
        profile_summary.main()
    assert "profile.json is not as a run writes it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("steps", "complaint"),
    [
        ((5, 4), "no pair of steps"),
        ((0, 4), "no pair of steps"),
        ((1, 51), "more than 50 steps"),
        ((999, 1001), "end after the run's last step, 1000"),
    ],
)
def test_steps_that_cannot_be_profiled_are_refused(steps, complaint):
    with pytest.raises(configs.ConfigError, match=complaint):
        configs.Run(model=TINY, profile=configs.Profile(steps=steps))


def test_the_steps_of_a_run_by_epochs_are_compared_when_they_are_known():
    by_epochs = configs.Training(num_steps=0, num_epochs=1.0, batch_size=8)
    warmup, profile = configs.Optimizer(warmup_steps=0), configs.Profile(steps=(2, 3))
    sections = {"optimizer": warmup, "training": by_epochs, "profile": profile}
    run = configs.Run(model=TINY, config=configs.default(), **sections)
    assert run.with_rows_per_epoch(24).training.last_step == 3
    with pytest.raises(configs.ConfigError, match="end after the run's last step, 2"):
        run.with_rows_per_epoch(16)
